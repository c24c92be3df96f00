"""Delta rule in chunks (WY form): the inverse that unties the tokens of a chunk, and the two scans over chunks.

With A_ij = beta_i (k_i . k_j) e^(G_i - G_j) for j < i, T = (I + A)^-1 and r = v - e^G k S, the rows u = T (beta r) are
the values that a plain scan would add: S' = e^total S + (e^rest k)^T u.
"""

import triton
import triton.language as tl

from .tiles import BLOCK, chunk_at, load_factor, load_tile, row_gates, state_at, state_offsets


@triton.jit(do_not_specialize=["plane", "L", "N", "per_sequence"])
def inverse_kernel(
    k,  # Rows [.., D]
    betas,  # Rows whose factor is beta
    gates,  # fp32 [2, B, Hs, L, 1] or None
    plane,
    inverse,  # [B, Hs, L, BT]
    packing,
    L,
    N,
    heads,
    per_sequence,
    D: tl.constexpr,
    MAP: tl.constexpr,
    DECAY: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    MERGE: tl.constexpr,  # precision of products of T with T
):
    """T of one chunk: blocks of 16 on the diagonal row by row, then their merge, exact because it is nilpotent."""
    N_A: tl.constexpr = BT // BLOCK
    pid = tl.program_id(0)
    s = pid % heads
    _, b, first, end = chunk_at(pid // heads, packing, L, N, per_sequence, BT)
    row = first + tl.arange(0, BT)
    inside = row < end
    b_a = tl.zeros([BT, BT], tl.float32)
    for start in range(0, D, BK):
        b_x = load_tile(k, b, s, first, inside, start, D, D, MAP, BT, BK, BD, WIDE, DTYPE)
        b_a = tl.dot(b_x, tl.trans(b_x), b_a, input_precision=PRECISION)
    visible = (row[None, :] < row[:, None]) & inside[:, None]
    if DECAY == "scalar":
        high, low = row_gates(gates, plane, b, s, heads, L, row, inside)
        exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        b_a *= tl.exp(tl.where(visible, exponent, float("-inf")))
    b_a = tl.where(visible, b_a * load_factor(betas, b, s, row, inside)[:, None], 0.0)

    # [N_A, 16, 16]: the blocks on the diagonal.
    i_block = tl.arange(0, N_A)
    own = i_block[:, None, None, None] == i_block[None, None, :, None]
    b_d = tl.sum(tl.where(own, tl.reshape(b_a, [N_A, BLOCK, N_A, BLOCK]), 0.0), 2)
    i = tl.arange(0, BLOCK)[None, :, None]
    b_t = tl.where(i == tl.arange(0, BLOCK)[None, None, :], 1.0, 0.0) + tl.zeros([N_A, BLOCK, BLOCK], tl.float32)
    for r in range(1, BLOCK):
        b_row = tl.sum(tl.where(i == r, b_d, 0.0), 1)  # [N_A, 16]
        b_step = tl.sum(b_row[:, :, None] * b_t, 1)  # rows before r are done, later ones meet a zero
        b_t -= tl.where(i == r, b_step[:, None, :], 0.0)
    b_t = tl.reshape(tl.where(own, b_t[:, :, None, :], 0.0), [BT, BT])
    if N_A > 1:
        # I + A = B (I + M) with B the blocks on the diagonal and M = B^-1 (A - blocks), M^4 = 0 for up to four blocks.
        same = (tl.arange(0, BT) // BLOCK)[:, None] == (tl.arange(0, BT) // BLOCK)[None, :]
        b_m = tl.dot(b_t, tl.where(same, 0.0, b_a), input_precision=MERGE)
        b_t -= tl.dot(b_m, b_t, input_precision=MERGE)
        if N_A > 2:
            b_t += tl.dot(tl.dot(b_m, b_m, input_precision=MERGE), b_t, input_precision=MERGE)
    p = inverse + ((tl.cast(b, tl.int64) * heads + s) * L + row)[:, None] * BT + tl.arange(0, BT)[None, :]
    tl.store(p, b_t.to(inverse.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["plane", "L", "N", "per_sequence", "group", "n_chunks"])
def delta_kernel(
    q,  # Rows [.., D], backward
    k,  # Rows [.., D]
    v,  # Rows [.., V]: values, or backward the gradient of the output, whose factor is the scale
    betas,  # Rows whose factor is beta
    gates,  # fp32 [2, B, Hs, L, 1] or None
    plane,
    inverse,  # [B, Hs, L, BT]
    u,  # [B, Hs, L, V] to fill: u, or backward the gradient of beta r
    inner,  # fp32 [B, Hs, L, V], backward: the gradient of u out of its own chunk
    packing,
    start,  # fp32 [N, Hs, D, V] or None
    states,  # [n_chunks, Hs, D, V] to fill
    final,  # fp32 [N, Hs, D, V] to fill
    other,  # backward with decay: states of the forward scan
    passed,  # fp32 [n_v, n_chunks, Hs] to fill as in `states_kernel`, or None
    L,
    N,
    heads,
    group,
    per_sequence,
    n_chunks,
    D: tl.constexpr,
    V: tl.constexpr,
    MAP: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BV columns of the state, chunk after chunk.

    Forward: u = T beta (v - e^G k S), S <- e^total S + (e^rest k)^T u.
    Backward: du = T^T (inner + e^rest k dS), dS <- e^total dS + (e^G q)^T dout - (beta e^G k)^T du.
    """
    N_V: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v = pid % N_V
    s = pid // N_V % heads
    n = pid // (N_V * heads)
    b = n
    begin = 0
    end = L
    chunk = n * per_sequence
    if packing is not None:
        b = 0
        begin = tl.load(packing.cu_seqlens + n)
        end = tl.load(packing.cu_seqlens + n + 1)
        chunk = tl.load(packing.first_chunk + n)
    count = (end - begin + BT - 1) // BT
    column = i_v * BV + tl.arange(0, BV)
    at, in_state = state_offsets(tl.arange(0, BD), column, D, V)
    b_s = tl.zeros([BD, BV], tl.float32)
    if start is not None:
        b_s = tl.load(state_at(start, n, heads, s, D, V) + at, mask=in_state, other=0.0)

    for step in range(0, count):
        i = step
        if REVERSE:
            i = count - 1 - step
        tl.store(state_at(states, chunk + i, heads, s, D, V) + at, b_s.to(states.dtype.element_ty), mask=in_state)
        first = begin + i * BT
        row = first + tl.arange(0, BT)
        inside = row < end
        b_beta = load_factor(betas, b, s, row, inside)
        b_k = load_tile(k, b, s, first, inside, 0, D, D, MAP, BT, BD, BD, WIDE, DTYPE)  # [BT, BD]
        at_row = (tl.cast(b, tl.int64) * heads + s) * L + row
        p_inverse = inverse + at_row[:, None] * BT + tl.arange(0, BT)[None, :]
        b_t = tl.load(p_inverse, mask=inside[:, None], other=0.0).to(DTYPE)
        p_u = at_row[:, None] * V + column[None, :]
        in_rows = inside[:, None] & (column < V)[None, :]
        if DECAY == "scalar":
            high, low = row_gates(gates, plane, b, s, heads, L, row, inside)
            last = tl.minimum(first + BT, end) - 1
            total, total_low = row_gates(gates, plane, b, s, heads, L, last, last >= 0)
            b_past = tl.exp(high + low)
            b_rest = tl.exp((total - high) + (total_low - low))
            b_total = tl.exp(total + total_low)
        else:
            b_past = tl.where(inside, 1.0, 0.0)
            b_rest = b_past
            b_total = 1.0
        b_seen = tl.dot(b_k, b_s.to(DTYPE), input_precision=PRECISION)  # [BT, BV]
        if REVERSE:
            b_du = tl.load(inner + p_u, mask=in_rows, other=0.0) + b_seen * b_rest[:, None]
            b_du = tl.dot(tl.trans(b_t), b_du.to(DTYPE), input_precision=PRECISION)
            tl.store(u + p_u, b_du, mask=in_rows)
            b_s *= b_total
            if passed is not None:
                p_other = state_at(other, chunk + i, heads, s, D, V) + at
                b_passed = b_s * tl.load(p_other, mask=in_state, other=0.0).to(tl.float32)
                p_passed = passed + (tl.cast(i_v, tl.int64) * n_chunks + chunk + i) * heads + s
                tl.store(p_passed, tl.sum(tl.sum(b_passed, 1), 0))
            b_x = (b_k.to(tl.float32) * (-b_beta * b_past)[:, None]).to(DTYPE)
            b_s = tl.dot(tl.trans(b_x), b_du.to(DTYPE), b_s, input_precision=PRECISION)
            for h in range(s * group, s * group + group):
                b_q = load_tile(q, b, h, first, inside, 0, D, D, MAP, BT, BD, BD, WIDE, DTYPE)
                b_q = (b_q.to(tl.float32) * (b_past * load_factor(v, b, h, row, inside))[:, None]).to(DTYPE)
                b_dout = load_tile(v, b, h, first, inside, i_v * BV, V, V, MAP, BT, BV, BD, WIDE, DTYPE)
                b_s = tl.dot(tl.trans(b_q), b_dout, b_s, input_precision=PRECISION)
        else:
            b_v = load_tile(v, b, s, first, inside, i_v * BV, V, V, MAP, BT, BV, BD, WIDE, tl.float32)
            b_r = (b_v - b_seen * b_past[:, None]) * b_beta[:, None]
            b_u = tl.dot(b_t, b_r.to(DTYPE), input_precision=PRECISION).to(DTYPE)
            tl.store(u + p_u, b_u, mask=in_rows)
            b_x = (b_k.to(tl.float32) * b_rest[:, None]).to(DTYPE)
            b_s = tl.dot(tl.trans(b_x), b_u, b_s * b_total, input_precision=PRECISION)
    tl.store(state_at(final, n, heads, s, D, V) + at, b_s, mask=in_state)
