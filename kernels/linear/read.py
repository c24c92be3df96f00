"""What rows read: from the state before (or behind) their chunk, and from the rows of their own chunk."""

import triton
import triton.language as tl

from .tiles import (
    channel_gates,
    chunk_at,
    feature_gradient,
    head_rows,
    load_factor,
    load_tile,
    row_gates,
    scale_pairs,
    state_at,
    state_offsets,
)


@triton.jit
def _rest_of(
    gates, plane, b, s, heads, L, row, inside, last, start, F: tl.constexpr, BF: tl.constexpr, REVERSE: tl.constexpr
):
    """[BT, BF] log decay between a row and the state it reads."""
    high, low = channel_gates(gates, plane, b, s, heads, L, row, inside, start, F, BF)
    if REVERSE:
        one = last + tl.arange(0, 1)
        total, total_low = channel_gates(gates, plane, b, s, heads, L, one, one >= 0, start, F, BF)
        high = total - high
        low = total_low - low
    return high + low


@triton.jit
def _load_pairs(pairs, b, h, heads, L, row, inside, BT: tl.constexpr):
    """[BT, BT] of [B, heads, L, BT]."""
    p = pairs + ((tl.cast(b, tl.int64) * heads + h) * L + row)[:, None] * BT + tl.arange(0, BT)[None, :]
    return tl.load(p, mask=inside[:, None], other=0.0)


@triton.jit
def _store_touched(p, x, place, i_l, lane, stored, inside, N_L: tl.constexpr, LANES: tl.constexpr, DECAY: tl.constexpr):
    """x [BT, BL] by channel, or its sums over lanes."""
    if DECAY == "vector":
        tl.store(p + place[:, None] * LANES + lane[None, :], x, mask=stored)
    else:
        tl.store(p + place * N_L + i_l, tl.sum(x, 1), mask=inside)


@triton.jit(
    do_not_specialize=["plane", "L", "N", "per_sequence", "group", "rows_per_state", "plane_touched", "pair_heads"]
)
def read_kernel(
    c,  # Rows [.., INNER] that read
    a,  # Rows [.., INNER]
    v,  # Rows [.., LANES]
    added,  # Rows or None: their factor is added to every c . a_j, that of row, or backward in time of j
    state,  # [n, Hs, INNER, LANES], fp32 or DTYPE, or None
    state_z,  # fp32 [n, Hs, INNER or, if TRANSPOSED, LANES], or None
    gates,  # fp32 [2, B, Hs, L, 1 or F]: decay summed inside chunks, or None
    plane,  # elements of each of the two
    pairs,  # c . a_j with the decay of each channel, fp32 [B, H, L, BT], read by column if REVERSE; or None
    near,  # what rows read from other rows of their chunk, fp32 [B, heads, L, LANES], or None
    out,  # Rows [.., LANES] to fill
    den,  # fp32 [B, heads, L] to fill with the denominator, negative where it was clamped; or None
    touched,  # fp32 [1, B, heads, L, n_lanes or, by channel, LANES] to fill with phi(x) times what out is made of, but
    # for the pair of a row with itself; REVERSE: [2, ..], first what comes from the chunk, then from the state; or None
    x,  # Rows whose gradient `out` is, if GRADIENT
    key_mask,  # bool [B, L] of the rows, or None
    mask_strides,
    packing,
    L,
    N,
    heads,  # of c and out
    rows_per_state,  # heads of c per head of state
    group,  # heads of a and b per head of c
    per_sequence,
    plane_touched,  # elements of each of the two of touched
    pair_heads,  # of pairs
    scale,
    eps,
    D: tl.constexpr,  # numbers of a query or key
    INNER: tl.constexpr,  # width of c and a
    LANES: tl.constexpr,  # width of b and out
    MAP: tl.constexpr,
    C_MAP: tl.constexpr,
    A_MAP: tl.constexpr,
    B_MAP: tl.constexpr,
    DECAY: tl.constexpr,
    CAUSAL: tl.constexpr,
    REVERSE: tl.constexpr,
    STRICT: tl.constexpr,  # a row does not read itself
    TRANSPOSED: tl.constexpr,  # the state is [LANES, INNER]
    GRADIENT: tl.constexpr,  # out is the gradient of x, not of phi(x)
    BT: tl.constexpr,
    BK: tl.constexpr,
    BL: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
):
    """One [BT, BL] tile of out. Forward, rows see j <= i with decay e^(G_i - G_j); backward in time, j >= i."""
    N_L: tl.constexpr = (LANES + BL - 1) // BL
    pid = tl.program_id(0)
    i_l = pid % N_L
    h = pid // N_L % heads
    i_chunk = pid // (N_L * heads)
    s = h // rows_per_state
    state_heads = heads // rows_per_state
    n, b, first, end = chunk_at(i_chunk, packing, L, N, per_sequence, BT)
    row = first + tl.arange(0, BT)
    inside = row < end
    wanted = inside
    if key_mask is not None:
        p_mask = key_mask + tl.cast(b, tl.int64) * mask_strides[0] + row.to(tl.int64) * mask_strides[1]
        wanted = inside & (tl.load(p_mask, mask=inside, other=0) != 0)
    last = tl.minimum(first + BT, end) - 1
    lane = i_l * BL + tl.arange(0, BL)

    if DECAY == "scalar":
        high, low = row_gates(gates, plane, b, s, state_heads, L, row, inside)
        b_rest = high + low  # [BT]
        if REVERSE:
            total, total_low = row_gates(gates, plane, b, s, state_heads, L, last, last >= first)
            b_rest = (total - high) + (total_low - low)
        b_rest = tl.exp(b_rest)

    # What weighs the same in q dq and in k dk is left out of both, or it would drown their difference.
    APART: tl.constexpr = CAUSAL and (touched is not None or near is not None)
    b_own = tl.zeros([BT, BL], tl.float32) if APART else None
    b_acc = tl.zeros([BT, BL], tl.float32)
    b_den = tl.zeros([BT], tl.float32)
    if state is not None:
        i_state = i_chunk if CAUSAL else n
        p_state = state_at(state, i_state, state_heads, s, INNER, LANES)
        for start in range(0, INNER, BK):
            b_c = load_tile(c, b, h, first, wanted, start, D, INNER, C_MAP, BT, BK, BD, WIDE, DTYPE)  # [BT, BK]
            if DECAY == "vector" and not TRANSPOSED:
                b_rest = tl.exp(
                    _rest_of(gates, plane, b, s, state_heads, L, row, inside, last, start, INNER, BK, REVERSE)
                )
                b_c = (b_c.to(tl.float32) * b_rest).to(DTYPE)
            inner = start + tl.arange(0, BK)
            if TRANSPOSED:
                at, in_state = state_offsets(lane, inner, LANES, INNER)
                b_s = tl.trans(tl.load(p_state + at, mask=in_state, other=0.0))  # [BK, BL]
            else:
                at, in_state = state_offsets(inner, lane, INNER, LANES)
                b_s = tl.load(p_state + at, mask=in_state, other=0.0)
                if state_z is not None:
                    p_z = state_at(state_z, i_state, state_heads, s, INNER, 1) + inner
                    b_z = tl.load(p_z, mask=inner < INNER, other=0.0)
                    b_den += tl.sum(b_c.to(tl.float32) * b_z[None, :], 1)
            b_acc = tl.dot(b_c.to(b_s.dtype), b_s, b_acc, input_precision=STATE_PRECISION)
        if c.factor is not None:
            b_acc *= load_factor(c, b, h, row, wanted)[:, None]
        if TRANSPOSED and state_z is not None:
            b_z = tl.load(state_at(state_z, i_state, state_heads, s, LANES, 1) + lane, mask=lane < LANES, other=0.0)
            b_weight = tl.where(wanted, 1.0, 0.0)
            if added is not None and not REVERSE:
                b_weight = load_factor(added, b, h, row, wanted)
            b_acc += b_weight[:, None] * b_z[None, :]
        if DECAY == "scalar":
            b_acc *= b_rest[:, None]
            b_den *= b_rest
        if DECAY == "vector" and TRANSPOSED:
            b_acc *= tl.exp(
                _rest_of(gates, plane, b, s, state_heads, L, row, inside, last, i_l * BL, LANES, BL, REVERSE)
            )
    place = (tl.cast(b, tl.int64) * heads + h) * L + row  # [BT] in [B, heads, L]
    stored = inside[:, None] & (lane < LANES)[None, :]
    if touched is not None and REVERSE:
        b_phi = load_tile(x, b, h, first, wanted, i_l * BL, D, LANES, MAP, BT, BL, BD, WIDE, tl.float32)
        _store_touched(
            touched + plane_touched, b_phi * (b_acc * scale), place, i_l, lane, stored, inside, N_L, LANES, DECAY
        )
        b_own = b_acc
        b_acc = tl.zeros([BT, BL], tl.float32)
    if near is not None:
        b_acc += tl.load(near + place[:, None] * LANES + lane[None, :], mask=stored, other=0.0)
        for g in range(0, group):
            other = s * group + g
            b_self = tl.zeros([BT], tl.float32)
            for start in range(0, INNER, BK):
                b_c = load_tile(c, b, h, first, inside, start, D, INNER, C_MAP, BT, BK, BD, WIDE, DTYPE)
                b_a = load_tile(a, b, other, first, inside, start, D, INNER, A_MAP, BT, BK, BD, WIDE, DTYPE)
                b_self += tl.sum(b_c.to(tl.float32) * b_a.to(tl.float32), 1)
            if c.factor is not None:
                b_self *= load_factor(c, b, h, row, inside)
            if a.factor is not None:
                b_self *= load_factor(a, b, other, row, inside)
            if added is not None:
                b_self += load_factor(added, b, other if REVERSE else h, row, inside)
            b_v = load_tile(v, b, other, first, inside, i_l * BL, D, LANES, B_MAP, BT, BL, BD, WIDE, tl.float32)
            b_own += b_self[:, None] * b_v

    if CAUSAL and near is None:
        j = first + tl.arange(0, BT)
        if REVERSE:
            visible = (j[None, :] > row[:, None]) if STRICT else (j[None, :] >= row[:, None])
        else:
            visible = (j[None, :] < row[:, None]) if STRICT else (j[None, :] <= row[:, None])
        visible = visible & inside[:, None] & inside[None, :]
        if DECAY == "scalar":
            # Differences of pairs: sums of a chunk may be thousands where neighbours differ by 1e-4.
            exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
            if REVERSE:
                exponent = -exponent
            b_decay = tl.exp(tl.where(visible, exponent, float("-inf")))
        for g in range(0, group):
            other = s * group + g
            if pairs is not None:
                b_p = _load_pairs(pairs, b, other if REVERSE else h, pair_heads, L, row, inside, BT)
                if REVERSE:
                    b_p = tl.trans(b_p)
            else:
                b_p = tl.zeros([BT, BT], tl.float32)
                for start in range(0, INNER, BK):
                    b_c = load_tile(c, b, h, first, inside, start, D, INNER, C_MAP, BT, BK, BD, WIDE, DTYPE)
                    b_a = load_tile(a, b, other, first, inside, start, D, INNER, A_MAP, BT, BK, BD, WIDE, DTYPE)
                    b_p = tl.dot(b_c, tl.trans(b_a), b_p, input_precision=PRECISION)  # [BT, BT]
                b_p = scale_pairs(b_p, c, a, b, h, row, other, j, inside, inside)
                if added is not None:
                    if REVERSE:
                        b_p += load_factor(added, b, other, j, inside)[None, :]
                    else:
                        b_p += load_factor(added, b, h, row, inside)[:, None]
            b_p = tl.where(visible, b_p, 0.0)
            if DECAY == "scalar":
                b_p *= b_decay
            b_den += tl.sum(b_p, 1)
            if v.factor is not None:
                b_p *= load_factor(v, b, other, j, inside)[None, :]
            b_b = load_tile(v, b, other, first, inside, i_l * BL, D, LANES, B_MAP, BT, BL, BD, WIDE, DTYPE)
            if APART:
                diagonal = row[:, None] == j[None, :]
                b_own += tl.sum(tl.where(diagonal, b_p, 0.0), 1)[:, None] * b_b.to(tl.float32)
                b_p = tl.where(diagonal, 0.0, b_p)
            b_acc = tl.dot(b_p.to(DTYPE), b_b, b_acc, input_precision=PRECISION)

    b_acc *= scale
    if den is not None:
        b_den *= scale
        clamped = b_den < eps
        b_den = tl.where(clamped, eps, b_den)
        b_acc /= b_den[:, None]
        tl.store(den + place, tl.where(clamped, -b_den, b_den), mask=inside & (i_l == 0))
    if GRADIENT:
        b_phi = load_tile(x, b, h, first, wanted, i_l * BL, D, LANES, MAP, BT, BL, BD, WIDE, tl.float32)
        if touched is not None:
            _store_touched(touched, b_phi * b_acc, place, i_l, lane, stored, inside, N_L, LANES, DECAY)
        if APART:
            b_acc += b_own * scale
        b_acc = feature_gradient(b_phi, b_acc, MAP)
    p_out = head_rows(out, b, h) + row.to(tl.int64)[:, None] * out.stride_t + lane.to(tl.int64)[None, :] * out.stride_d
    tl.store(p_out, b_acc.to(out.x.dtype.element_ty), mask=stored)
