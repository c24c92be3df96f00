"""Decay of each channel on its own: what rows of a chunk see of one another, in blocks of 16 rows.

Against tokens before its block (behind it, backward in time) a row is compared through the block's first (last) row, so
that both factors are at most 1 and tensor cores can multiply; inside the block, pair by pair.
"""

import triton
import triton.language as tl

from .tiles import BLOCK, channel_gates, chunk_at, load_factor, load_tile, scale_pairs


@triton.jit
def _through(gates, plane, b, s, heads, L, row, inside, start, ref, F: tl.constexpr, BF: tl.constexpr):
    """[BR, BF] decay from the reference row to `row`, which comes later, as a log <= 0."""
    one = ref + tl.arange(0, 1)
    high, low = channel_gates(gates, plane, b, s, heads, L, row, inside, start, F, BF)
    ref_high, ref_low = channel_gates(gates, plane, b, s, heads, L, one, one >= 0, start, F, BF)
    return (high - ref_high) + (low - ref_low)


@triton.jit
def _between(
    gates, plane, b, s, heads, L, row, inside, start, seen, F: tl.constexpr, BF: tl.constexpr, REVERSE: tl.constexpr
):
    """[16, 16, BF] decay between the rows of a block; 0 where not seen."""
    high, low = channel_gates(gates, plane, b, s, heads, L, row, inside, start, F, BF)
    between = (high[:, None, :] - high[None, :, :]) + (low[:, None, :] - low[None, :, :])
    if REVERSE:
        between = -between
    return tl.exp(tl.where(seen[:, :, None], between, float("-inf")))


@triton.jit(do_not_specialize=["plane", "L", "N", "per_sequence", "rows_per_state"])
def pairs_kernel(
    q,  # Rows [.., F]
    k,  # Rows [.., F]
    gates,  # fp32 [2, B, Hs, L, F]
    plane,
    pairs,  # fp32 [B, H, L, BT]
    packing,
    L,
    N,
    heads,
    rows_per_state,
    per_sequence,
    D: tl.constexpr,
    F: tl.constexpr,
    MAP: tl.constexpr,
    DECAY: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """pairs_ij = sum_f phi(q_i)_f phi(k_j)_f e^(G_if - G_jf) for j <= i in one chunk; 16 rows per program."""
    N_A: tl.constexpr = BT // BLOCK
    pid = tl.program_id(0)
    h = pid // N_A % heads
    s = h // rows_per_state
    state_heads = heads // rows_per_state
    _, b, first, end = chunk_at(pid // (N_A * heads), packing, L, N, per_sequence, BT)
    begin = first + pid % N_A * BLOCK
    row = begin + tl.arange(0, BLOCK)
    j = first + tl.arange(0, BT)
    inside = row < end
    t = begin + tl.arange(0, BLOCK)
    b_p = tl.zeros([BLOCK, BT], tl.float32)
    b_near = tl.zeros([BLOCK, BLOCK], tl.float32)
    ref = tl.maximum(tl.minimum(begin, end - 1), 0)
    before = j < tl.minimum(begin, end)
    for start in range(0, F, BK):
        b_q = load_tile(q, b, h, begin, inside, start, D, F, MAP, BLOCK, BK, BD, WIDE, tl.float32)  # [16, BK]
        b_k = load_tile(k, b, s, first, before, start, D, F, MAP, BT, BK, BD, WIDE, tl.float32)  # [BT, BK]
        near_ref = tl.where(
            inside[:, None], _through(gates, plane, b, s, state_heads, L, row, inside, start, ref, F, BK), 0.0
        )
        from_ref = _through(gates, plane, b, s, state_heads, L, j, before, start, ref, F, BK)
        b_far = (b_k * tl.exp(tl.where(before[:, None], -from_ref, float("-inf")))).to(DTYPE)
        b_p = tl.dot((b_q * tl.exp(near_ref)).to(DTYPE), tl.trans(b_far), b_p, input_precision=PRECISION)
        b_t = load_tile(k, b, s, begin, inside, start, D, F, MAP, BLOCK, BK, BD, WIDE, tl.float32)
        seen = (t[None, :] <= row[:, None]) & inside[:, None]
        b_e = _between(gates, plane, b, s, state_heads, L, row, inside, start, seen, F, BK, False)  # [16, 16, BK]
        b_near += tl.sum(b_q[:, None, :] * b_t[None, :, :] * b_e, 2)
    p = pairs + ((tl.cast(b, tl.int64) * heads + h) * L + row)[:, None] * BT - first
    tl.store(p + j[None, :], b_p, mask=inside[:, None] & before[None, :])
    tl.store(p + t[None, :], b_near, mask=inside[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["plane", "L", "N", "per_sequence", "group", "rows_per_state"])
def near_kernel(
    c,  # Rows [.., INNER]
    a,  # Rows [.., INNER]
    v,  # Rows [.., LANES]
    added,  # Rows or None: their factor is added to every c . a_j
    gates,  # fp32 [2, B, Hs, L, LANES]
    plane,
    near,  # fp32 [B, heads, L, LANES]
    packing,
    L,
    N,
    heads,
    rows_per_state,
    group,
    per_sequence,
    D: tl.constexpr,
    INNER: tl.constexpr,
    LANES: tl.constexpr,
    MAP: tl.constexpr,  # of v
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BL: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """near_i = sum_j (c_i . a_j) e^(G_i - G_j) phi(v_j) over j < i of a chunk, backward in time j > i; 16 rows per program."""
    N_A: tl.constexpr = BT // BLOCK
    N_L: tl.constexpr = (LANES + BL - 1) // BL
    pid = tl.program_id(0)
    start_l = pid % N_L * BL
    h = pid // (N_L * N_A) % heads
    s = h // rows_per_state
    state_heads = heads // rows_per_state
    _, b, first, end = chunk_at(pid // (N_L * N_A * heads), packing, L, N, per_sequence, BT)
    begin = first + pid // N_L % N_A * BLOCK
    row = begin + tl.arange(0, BLOCK)
    j = first + tl.arange(0, BT)
    inside = row < end
    present = j < end
    stop = tl.minimum(begin + BLOCK, end)
    if REVERSE:
        ref = tl.maximum(stop - 1, 0)
        far = present & (j >= stop)
    else:
        ref = tl.maximum(tl.minimum(begin, end - 1), 0)
        far = j < tl.minimum(begin, end)
    near_ref = _through(gates, plane, b, s, state_heads, L, row, inside, start_l, ref, LANES, BL)
    far_ref = _through(gates, plane, b, s, state_heads, L, j, far, start_l, ref, LANES, BL)
    if REVERSE:
        near_ref = -near_ref
    else:
        far_ref = -far_ref
    b_near = tl.exp(tl.where(inside[:, None], near_ref, 0.0))
    b_far = tl.exp(tl.where(far[:, None], far_ref, float("-inf")))

    t = begin + tl.arange(0, BLOCK)
    seen = (t[None, :] > row[:, None]) if REVERSE else (t[None, :] < row[:, None])
    seen = seen & inside[:, None] & inside[None, :]
    b_e = _between(gates, plane, b, s, state_heads, L, row, inside, start_l, seen, LANES, BL, REVERSE)  # [16, 16, BL]
    b_acc = tl.zeros([BLOCK, BL], tl.float32)
    for g in range(0, group):
        other = s * group + g
        b_p = tl.zeros([BLOCK, BT], tl.float32)
        b_own = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(0, INNER, BK):
            b_c = load_tile(c, b, h, begin, inside, start, D, INNER, "identity", BLOCK, BK, BD, WIDE, DTYPE)
            b_a = load_tile(a, b, other, first, present, start, D, INNER, "identity", BT, BK, BD, WIDE, DTYPE)
            b_p = tl.dot(b_c, tl.trans(b_a), b_p, input_precision=PRECISION)  # [16, BT]
            b_t = load_tile(a, b, other, begin, inside, start, D, INNER, "identity", BLOCK, BK, BD, WIDE, DTYPE)
            b_own = tl.dot(b_c, tl.trans(b_t), b_own, input_precision=PRECISION)  # [16, 16]
        b_p = scale_pairs(b_p, c, a, b, h, row, other, j, inside, present)
        b_own = scale_pairs(b_own, c, a, b, h, row, other, t, inside, inside)
        if added is not None:
            if REVERSE:
                b_p += load_factor(added, b, other, j, present)[None, :]
                b_own += load_factor(added, b, other, t, inside)[None, :]
            else:
                b_p += load_factor(added, b, h, row, inside)[:, None]
                b_own += load_factor(added, b, h, row, inside)[:, None]
        b_v = load_tile(v, b, other, first, far, start_l, D, LANES, MAP, BT, BL, BD, WIDE, tl.float32)
        b_seen = tl.where(far[None, :], b_p, 0.0).to(DTYPE)
        b_acc += b_near * tl.dot(b_seen, (b_v * b_far).to(DTYPE), input_precision=PRECISION)
        b_t = load_tile(v, b, other, begin, inside, start_l, D, LANES, MAP, BLOCK, BL, BD, WIDE, tl.float32)
        b_acc += tl.sum(b_own[:, :, None] * b_t[None, :, :] * b_e, 1)
    lane = start_l + tl.arange(0, BL)
    p = near + ((tl.cast(b, tl.int64) * heads + h) * L + row)[:, None] * LANES + lane[None, :]
    tl.store(p, b_acc, mask=inside[:, None] & (lane < LANES)[None, :])
