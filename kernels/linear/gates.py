"""Decay: sums inside chunks as pairs of fp32, and the gradient of decay from what queries and keys received."""

import triton
import triton.language as tl

from .tiles import chunk_at


@triton.jit(do_not_specialize=["L", "N", "per_sequence", "plane"])
def sum_gates_kernel(
    decay,  # fp32 [B, Hs, L, F] by strides
    strides,
    gates,  # fp32 [2, B, Hs, L, F]
    plane,
    packing,
    L,
    N,
    heads,
    per_sequence,
    F: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """Decay from the start of a chunk to each of its tokens, the token included, as two fp32 that add up to it."""
    N_F: tl.constexpr = (F + BF - 1) // BF
    pid = tl.program_id(0)
    s = pid // N_F % heads
    _, b, first, end = chunk_at(pid // (N_F * heads), packing, L, N, per_sequence, BT)
    row = first + tl.arange(0, BT)
    f = pid % N_F * BF + tl.arange(0, BF)
    inside = (row < end)[:, None] & (f < F)[None, :]
    p = decay + tl.cast(b, tl.int64) * strides[0] + tl.cast(s, tl.int64) * strides[1]
    p += row.to(tl.int64)[:, None] * strides[2] + f.to(tl.int64)[None, :] * strides[3]
    b_g = tl.cumsum(tl.load(p, mask=inside, other=0.0).to(tl.float64), 0)
    high = b_g.to(tl.float32)
    p_gates = gates + ((tl.cast(b, tl.int64) * heads + s) * L + row)[:, None] * F + f[None, :]
    tl.store(p_gates, high, mask=inside)
    tl.store(p_gates + plane, (b_g - high.to(tl.float64)).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["L", "N", "per_sequence", "group", "n_parts", "n_passed", "n_chunks", "plane"])
def gate_gradient_kernel(
    of_queries,  # fp32 [1, B, heads * group, L, n_parts, F]: phi(q) dq, each without the pair of a token with itself
    of_keys,  # fp32 [2, B, heads, L, n_parts, F]: phi(k) dk out of its chunk, and what comes from behind it
    plane,  # elements of each of the two
    passed,  # fp32 [n_passed, n_chunks, heads, F]: <e^total S, dS>, S before the chunk and dS behind it
    ddecay,  # fp32 [B, heads, L, F], contiguous
    packing,
    n_parts,
    n_passed,
    n_chunks,
    L,
    N,
    heads,
    group,
    per_sequence,
    F: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """dg_t = passed + sum over i >= t in the chunk of (q dq - k dk)_i + sum over j < t of (k dk from behind)_j.

    That is the sum of all that crosses t, without differences of what lies on one side of it.
    """
    N_F: tl.constexpr = (F + BF - 1) // BF
    pid = tl.program_id(0)
    s = pid // N_F % heads
    i_chunk = pid // (N_F * heads)
    _, b, first, end = chunk_at(i_chunk, packing, L, N, per_sequence, BT)
    row = first + tl.arange(0, BT)
    f = pid % N_F * BF + tl.arange(0, BF)
    inside = (row < end)[:, None] & (f < F)[None, :]
    b_g = tl.zeros([BT, BF], tl.float64)
    b_behind = tl.zeros([BT, BF], tl.float64)
    for part in range(0, n_parts):
        for g in range(0, group):
            at = ((tl.cast(b, tl.int64) * heads + s) * group + g) * L + row
            p = of_queries + (at * n_parts + part)[:, None] * F + f[None, :]
            b_g += tl.load(p, mask=inside, other=0.0).to(tl.float64)
        at = (tl.cast(b, tl.int64) * heads + s) * L + row
        p = of_keys + (at * n_parts + part)[:, None] * F + f[None, :]
        b_g -= tl.load(p, mask=inside, other=0.0).to(tl.float64)
        # One row earlier, so that the running sum leaves row t out.
        p_earlier = p + plane - n_parts * F
        b_behind += tl.load(p_earlier, mask=inside & (row > first)[:, None], other=0.0).to(tl.float64)
    b_g = tl.cumsum(b_g, 0, reverse=True) + tl.cumsum(b_behind, 0)
    for part in range(0, n_passed):
        p_passed = passed + ((tl.cast(part, tl.int64) * n_chunks + i_chunk) * heads + s) * F + f
        b_g += tl.load(p_passed, mask=(f < F) & (first < end), other=0.0).to(tl.float64)[None, :]
    p = ddecay + ((tl.cast(b, tl.int64) * heads + s) * L + row)[:, None] * F + f[None, :]
    tl.store(p, b_g.to(tl.float32), mask=inside)
