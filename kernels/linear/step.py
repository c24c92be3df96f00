"""One token: the state in place, and what the token reads from it."""

import triton
import triton.language as tl

from ..common.launch import launch
from ..common.sizes import block_dim, ceil_div, wide
from .tiles import load_factor, load_tile, rows_of, state_at, state_offsets

# Numbers of a state that one program holds in registers.
STATE_TILE = 8192


@triton.jit
def _gate(decay, b, s, f, F: tl.constexpr, DECAY: tl.constexpr):
    """[BF] or [1] factors of the state's rows; decay: Rows [B, Hs, 1, 1 or F]."""
    p = decay.x + tl.cast(b, tl.int64) * decay.stride_b + tl.cast(s, tl.int64) * decay.stride_h
    if DECAY == "vector":
        return tl.exp(tl.load(p + f.to(tl.int64) * decay.stride_d, mask=f < F, other=0.0))
    return tl.exp(tl.load(p + tl.arange(0, 1)))


@triton.jit
def step_kernel(
    q,  # Rows [.., F]
    k,  # Rows [.., F]
    v,  # Rows [.., V]
    decay,  # Rows [.., 1 or F] by head of state, or anything
    betas,  # Rows whose factor is beta, or None
    kv,  # fp32 [B, Hs, F, V], advanced
    z,  # fp32 [B, Hs, F], read, or None
    out,  # Rows [.., V]
    heads,
    group,
    scale,
    eps,
    D: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    MAP: tl.constexpr,
    DECAY: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """BV columns of one state: S <- e^g S + k (beta (v - k^T e^g S))^T or plain, and out for its group of heads."""
    N_V: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v = pid % N_V
    s = pid // N_V % heads
    b = pid // (N_V * heads)
    f = tl.arange(0, BF)
    column = i_v * BV + tl.arange(0, BV)
    one = tl.arange(0, 1)
    at, inside = state_offsets(f, column, F, V)
    p_s = state_at(kv, b, heads, s, F, V) + at
    b_s = tl.load(p_s, mask=inside, other=0.0)
    b_k = tl.sum(load_tile(k, b, s, 0, one == 0, 0, D, F, MAP, 1, BF, BD, WIDE, tl.float32), 0)  # [BF]
    b_v = tl.sum(load_tile(v, b, s, 0, one == 0, i_v * BV, V, V, "identity", 1, BV, BD, WIDE, tl.float32), 0)  # [BV]
    if DECAY != "none":
        b_s *= _gate(decay, b, s, f, F, DECAY)[:, None]
    if betas is not None:
        b_v = (b_v - tl.sum(b_k[:, None] * b_s, 0)) * tl.sum(load_factor(betas, b, s, one, one == 0), 0)
    b_s += b_k[:, None] * b_v[None, :]
    tl.store(p_s, b_s, mask=inside)
    if z is not None:
        b_z = tl.load(state_at(z, b, heads, s, F, 1) + f, mask=f < F, other=0.0)
        if DECAY != "none":
            b_z *= _gate(decay, b, s, f, F, DECAY)
        b_z += b_k
    for h in range(s * group, s * group + group):
        b_q = tl.sum(load_tile(q, b, h, 0, one == 0, 0, D, F, MAP, 1, BF, BD, WIDE, tl.float32), 0) * scale
        b_out = tl.sum(b_q[:, None] * b_s, 0)
        if z is not None:
            b_den = tl.sum(b_q * b_z, 0)
            b_out /= tl.where(b_den < eps, eps, b_den)
        p = out.x + tl.cast(b, tl.int64) * out.stride_b + tl.cast(h, tl.int64) * out.stride_h
        tl.store(p + column * out.stride_d, b_out.to(out.x.dtype.element_ty), mask=column < V)


@triton.jit
def step_z_kernel(
    k,  # Rows [.., F]
    decay,  # as above
    z,  # fp32 [B, Hs, F], advanced
    heads,
    D: tl.constexpr,
    F: tl.constexpr,
    MAP: tl.constexpr,
    DECAY: tl.constexpr,
    BF: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """z <- e^g z + k. A launch of its own: all programs of the other one read z."""
    s = tl.program_id(0) % heads
    b = tl.program_id(0) // heads
    f = tl.arange(0, BF)
    one = tl.arange(0, 1)
    p = state_at(z, b, heads, s, F, 1) + f
    b_z = tl.load(p, mask=f < F, other=0.0)
    if DECAY != "none":
        b_z *= _gate(decay, b, s, f, F, DECAY)
    b_z += tl.sum(load_tile(k, b, s, 0, one == 0, 0, D, F, MAP, 1, BF, BD, WIDE, tl.float32), 0)
    tl.store(p, b_z, mask=f < F)


def step(x, params, out, eps) -> None:
    """Fill out [B, H, 1, Dv] and advance x.kv fp32 [B, Hs, F, Dv] and x.z fp32 [B, Hs, F], both contiguous, by one token."""
    q, k, v, kv, z = x.q, x.k, x.v, x.kv, x.z
    B, heads, F, V = kv.shape
    BF = block_dim(F)
    BV = max(16, min(block_dim(V), STATE_TILE // BF, 64))
    decay, kind = k, "none"
    if x.decay is not None:
        decay, kind = (x.decay, "vector") if x.decay.dim() == 4 else (x.decay[..., None], "scalar")
    D = q.shape[3]
    options = {"D": D, "F": F, "MAP": params.feature_map, "DECAY": kind, "BF": BF, "BD": block_dim(D), "num_warps": 4}
    k_rows, gates = rows_of(k, heads), rows_of(decay, heads)
    launch(
        step_kernel, ceil_div(V, BV) * heads * B, rows_of(q, x.heads), k_rows, rows_of(v, heads), gates,
        None if x.beta is None else rows_of(v, heads, x.beta), kv, z, rows_of(out, x.heads), heads, x.heads // heads,
        float(params.scale), eps, V=V, BV=BV, WIDE=wide(q, k, v), **options,
    )  # fmt: skip
    if z is not None:
        launch(step_z_kernel, heads * B, k_rows, gates, z, heads, WIDE=wide(k), **options)
