"""Linear attention backward: states again, their gradients backward in time, then what rows of dq, dk and dv read."""

import torch
import triton
import triton.language as tl

from ..common.launch import INTERPRETED, launch
from ..common.sizes import block_dim, ceil_div, wide
from ..common.tiles import head_of, load_rows
from .forward import key_states
from .gates import gate_gradient_kernel
from .run import begin
from .tiles import rows_of

ROWS = 32


@triton.jit(do_not_specialize=["L"])
def row_factors_kernel(out, dout, den, factors, out_strides, dout_strides, H, L, n_tiles, scale, n_rows,
                       DV: tl.constexpr, BM: tl.constexpr, BDV: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """factors fp32 [2, B, H, L]: d numerator / dout = scale / den, and the gradient of the denominator."""
    tile, head = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
    b, h = head // H, head % H
    first = tile * BM
    row = first + tl.arange(0, BM)
    inside = row < L
    b_out = load_rows(head_of(out, b, h, out_strides), first, inside, out_strides, DV, BDV, BM, WIDE, UPCAST)
    b_dout = load_rows(head_of(dout, b, h, dout_strides), first, inside, dout_strides, DV, BDV, BM, WIDE, UPCAST)
    place = tl.cast(head, tl.int64) * L + row
    b_den = tl.load(den + place, mask=inside, other=1.0)
    b_factor = scale / tl.abs(b_den)
    b_dden = -tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1) * b_factor
    tl.store(factors + place, b_factor, mask=inside)
    tl.store(factors + n_rows + place, tl.where(b_den < 0, 0.0, b_dden), mask=inside)


def row_factors(dout, out, den, scale):
    """(scale / den, gradient of the denominator), each fp32 [B, H, L]; (scale, None) without den."""
    B, H, L, Dv = out.shape
    if den is None:
        return torch.full((1, 1, 1), scale, dtype=torch.float32, device=out.device).expand(B, H, L), None
    factors = torch.empty(2, B, H, L, dtype=torch.float32, device=out.device)
    n_tiles = ceil_div(L, ROWS)
    launch(
        row_factors_kernel, n_tiles * B * H, out, dout, den, factors, out.stride(), dout.stride(), H, L, n_tiles,
        float(scale), B * H * L, DV=Dv, BM=ROWS, BDV=block_dim(Dv), WIDE=wide(out, dout),
        UPCAST=INTERPRETED and torch.bfloat16 in (out.dtype, dout.dtype),
    )  # fmt: skip
    return factors[0], factors[1]


def map_gradient(x, dphi, feature_map):
    """Gradient of rows x [B, heads, L, D] from fp32 dphi [B, heads, L, F] of maps of whole rows."""
    D, x = x.shape[3], x.float()
    if feature_map == "taylor1":
        square = x.square().sum(-1, keepdim=True)
        norm = torch.where(square == 0, 0.0, square.rsqrt())
        unit, dphi = x * norm, dphi[..., 1:]
        return (dphi - unit * (unit * dphi).sum(-1, keepdim=True)) * norm
    y, pairs = x * D**-0.25, dphi[..., 1 + D :].unflatten(-1, (D, D)) * 0.5**0.5
    return (dphi[..., 1 : 1 + D] + ((pairs + pairs.mT) @ y[..., None])[..., 0]) * D**-0.25


def read_gradient(run, chunks, heads, width, c, a, b, maps, group, target=None, x=None, touched=False, **options):
    """(rows, touched): what `run.read` fills, and phi(x) times it for the gradient of decay.

    rows: `target` [B, heads, L, width] or, without one, new and fp32.
    """
    B, L = run.x.q.shape[0], chunks.L
    fp32 = {"dtype": torch.float32, "device": run.x.q.device}
    rows = torch.empty(B, heads, L, width, **fp32) if target is None else target
    found = None
    if touched:
        parts = (1, width) if run.decay == "vector" else (ceil_div(width, run.tiles.read.columns), 1)
        found = torch.empty(1 + options.get("reverse", False), B, heads, L, *parts, **fp32)
    inner = run.x.v.shape[3] if options.get("transposed") else run.F
    run.read(chunks, c, a, b, maps, heads, group, inner, width, rows, x=x, touched=found, **options)
    return rows, found


def in_place(gradient, heads):
    """Where rows of `heads` heads can be written as they are: the gradient, or None."""
    return gradient if gradient is not None and gradient.shape[1] == heads else None


def settle(gradient, rows) -> None:
    """Sum fp32 rows [B, heads, L, width] of shared heads into their gradient."""
    if gradient is not None and rows is not gradient:
        gradient.copy_(rows.unflatten(1, (gradient.shape[1], -1)).sum(2))


def settle_mapped(run, gradient, x, dphi, key_mask=None) -> None:
    """The same through maps of whole rows; masked rows of x may hold NaN."""
    summed = dphi.unflatten(1, (x.shape[1], -1)).sum(2)
    x = x if key_mask is None else x.masked_fill(~key_mask[:, None, :, None], 0)
    gradient.copy_(map_gradient(x, summed, run.params.feature_map))


def gate_gradient(run, of_queries, of_keys, passed, ddecay) -> None:
    """Fill ddecay, contiguous fp32, from what `read_gradient` and the scan backward in time left."""
    chunks, heads = run.keys, run.x.state_heads
    F = of_keys.shape[5]
    BF = 1 if F == 1 else min(32, block_dim(F))
    launch(
        gate_gradient_kernel, chunks.n_chunks * heads * ceil_div(F, BF), of_queries, of_keys, of_keys[0].numel(), passed, ddecay,
        chunks.packing, of_keys.shape[4], passed.shape[0], chunks.n_chunks, chunks.L, chunks.N, heads,
        run.x.heads // heads, chunks.per_sequence, F=F, BT=run.tiles.BT, BF=BF, num_warps=4,
    )  # fmt: skip


def backward(dout, dkv, dz, x, out, den, params, dq, dk, dv, ddecay, dbeta, dkv0, dz0) -> None:
    """Fill the gradients that are not None, for x and params as in `forward`; those of decay and state are contiguous fp32."""
    run = begin(x, params)
    start, start_z = (None if t is None else t.contiguous() for t in (dkv, dz))
    if x.beta is not None:
        backward_delta(run, dout, start, dq, dk, dv, ddecay, dbeta, dkv0)
        return
    q, k, v, heads, state_heads = x.q, x.k, x.v, x.heads, x.state_heads
    Dv, F, group, causal, phi = v.shape[3], run.F, heads // state_heads, params.causal, params.feature_map
    factor, dden = row_factors(dout, out, den, params.scale)
    d_rows = rows_of(dout, heads, factor)
    added = None if dden is None else rows_of(dout, heads, dden)
    q_rows, k_rows, v_rows = rows_of(q, heads), rows_of(k, state_heads), rows_of(v, state_heads)

    states = key_states(run)
    dstates = run.scan(
        run.queries, q_rows, d_rows, group, Dv, weights=added, start=start, start_z=start_z, z=params.normalize,
        reverse=True, other=states,
    )  # fmt: skip
    for gradient, found in ((dkv0, dstates.final), (dz0, dstates.final_z)):
        if gradient is not None:
            gradient.copy_(found)
    before, before_z = (states.before, states.before_z) if causal else (states.final, states.final_z)
    behind, behind_z = (dstates.before, dstates.before_z) if causal else (dstates.final, dstates.final_z)

    whole = phi in ("taylor1", "taylor2")
    gated = ddecay is not None
    maps = "identity", "identity", phi
    of_queries = of_keys = None
    if dq is not None or gated:
        rows, of_queries = read_gradient(
            run, run.queries, heads, F, d_rows, v_rows, k_rows, maps, 1, None if whole else in_place(dq, heads), q_rows, gated,
            state=before, state_z=before_z, added=added, near=run.near(d_rows, v_rows, k_rows, added, heads, 1), transposed=True,
        )  # fmt: skip
        settle_mapped(run, dq, q, rows) if whole and dq is not None else settle(dq, rows)
    if dk is not None or gated:
        near = run.near(v_rows, d_rows, q_rows, added, state_heads, group, reverse=True)
        rows, of_keys = read_gradient(
            run, run.keys, state_heads, F, v_rows, d_rows, q_rows, maps, group, None if whole else in_place(dk, state_heads),
            k_rows, gated, state=behind, state_z=behind_z, added=added, near=near, transposed=True, reverse=True, masked=True,
        )  # fmt: skip
        settle_mapped(run, dk, k, rows, x.key_mask) if whole and dk is not None else settle(dk, rows)
    if dv is not None:
        rows, _ = read_gradient(
            run, run.keys, state_heads, Dv, k_rows, q_rows, d_rows, (phi, phi, "identity"), group, in_place(dv, state_heads),
            state=behind, pairs=run.pairs(), reverse=True, masked=True,
        )  # fmt: skip
        settle(dv, rows)
    if gated:
        gate_gradient(run, of_queries, of_keys, dstates.passed, ddecay)


def backward_delta(run, dout, dkv, dq, dk, dv, ddecay, dbeta, dkv0) -> None:
    """The same for the delta rule: u_t = beta_t r_t are the values that a plain scan adds, du their gradient.

    Token t reads the state twice: for its output with q_t, and for r_t with k_t, whose gradient is -beta_t du_t.
    """
    x, heads, state_heads = run.x, run.x.heads, run.x.state_heads
    D, Dv, group, keys, plain = x.q.shape[3], x.v.shape[3], heads // state_heads, run.keys, ("identity",) * 3
    factor, _ = row_factors(dout, dout, None, run.params.scale)
    d_rows = rows_of(dout, heads, factor)
    q_rows, k_rows, v_rows = rows_of(x.q, heads), rows_of(x.k, state_heads), rows_of(x.v, state_heads)
    inverse = run.inverse()
    u, states = run.scan_delta(inverse, v_rows, None if x.kv is None else x.kv.contiguous())
    inner, _ = read_gradient(run, keys, state_heads, Dv, k_rows, q_rows, d_rows, plain, group, reverse=True)
    du, dstates = run.scan_delta(inverse, d_rows, dkv, reverse=True, inner=inner, other=states)
    if dkv0 is not None:
        dkv0.copy_(dstates.final)

    u_rows = rows_of(u, state_heads)
    k_reads = rows_of(du, state_heads, -x.beta)
    gated = ddecay is not None
    of_queries = of_keys = None
    if dq is not None or gated:
        rows, of_queries = read_gradient(
            run, keys, heads, D, d_rows, u_rows, k_rows, plain, 1, in_place(dq, heads), q_rows, gated,
            state=states.before, transposed=True,
        )  # fmt: skip
        settle(dq, rows)
    if dk is not None or gated:
        written, of_written = read_gradient(
            run, keys, state_heads, D, u_rows, d_rows, q_rows, plain, group, None, k_rows, gated,
            state=dstates.before, transposed=True, reverse=True,
        )  # fmt: skip
        erased, of_erased = read_gradient(
            run, keys, state_heads, D, u_rows, k_reads, k_rows, plain, 1, None, k_rows, gated,
            transposed=True, reverse=True, strict=True,
        )  # fmt: skip
        read, of_read = read_gradient(
            run, keys, state_heads, D, k_reads, u_rows, k_rows, plain, 1, None, k_rows, gated,
            state=states.before, transposed=True, strict=True,
        )  # fmt: skip
        settle(dk, written + erased + read)
        of_keys = of_written + of_erased if gated else None
        if gated:
            of_keys[0] -= of_read[0]
    if dbeta is not None:
        seen, _ = read_gradient(
            run, keys, state_heads, Dv, k_rows, k_rows, u_rows, plain, 1, state=states.before, strict=True
        )
        values = x.v.repeat_interleave(state_heads // x.v.shape[1], 1)
        dbeta.copy_(torch.linalg.vecdot(du, values.float() - seen))
    if dv is not None:
        settle(dv, du * x.beta[..., None])
    if gated:
        gate_gradient(run, of_queries, of_keys, dstates.passed, ddecay)
