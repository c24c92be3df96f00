"""The scan over chunks: states before every chunk, or, backward in time, their gradients behind every chunk."""

import triton
import triton.language as tl

from .tiles import channel_gates, load_factor, load_tile, row_gates, state_at, state_offsets


@triton.jit(do_not_specialize=["plane", "L", "N", "per_sequence", "per_part", "group", "n_chunks"])
def states_kernel(
    x,  # Rows [.., F]: features of keys, or backward of queries
    y,  # Rows [.., V]: values, or backward the gradient of the numerator
    weights,  # Rows whose factor is what x counts in z, or None for 1
    gates,  # fp32 [2, B, Hs, L, 1 or F]: decay summed inside chunks, or None
    plane,  # elements of each of the two
    key_mask,  # bool [B, L] or None
    mask_strides,
    packing,
    start,  # fp32 [N, Hs, F, V] and [N, Hs, F], or None
    start_z,
    states,  # [n_chunks, Hs, F, V] and fp32 [n_chunks, Hs, F], or None
    states_z,
    final,  # fp32 [n_parts, N, Hs, F, V] and [n_parts, N, Hs, F]
    final_z,
    other,  # the states and states_z of the forward scan
    other_z,
    passed,  # fp32 [n_v (n_f n_v where the decay is per head), n_chunks, Hs(, F)] to fill, or None
    L,
    N,
    heads,
    group,  # heads of x and y per head of state
    per_sequence,
    per_part,
    n_chunks,
    D: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    MAP: tl.constexpr,
    DECAY: tl.constexpr,  # "none", "scalar", "vector"
    REVERSE: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One [BF, BV] tile of a state, chunk after chunk: S <- e^total S + (e^rest x)^T y, and z <- e^total z + x^T weight.

    passed: what goes through whole chunks, <e^total S, dS> with S before a chunk and dS behind it.
    """
    N_V: tl.constexpr = (V + BV - 1) // BV
    N_F: tl.constexpr = (F + BF - 1) // BF
    pid = tl.program_id(0)
    i_v = pid % N_V
    i_f = pid // N_V % N_F
    s = pid // (N_V * N_F) % heads
    n = pid // (N_V * N_F * heads) % N
    part = pid // (N_V * N_F * heads) // N
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

    f = i_f * BF + tl.arange(0, BF)
    v = i_v * BV + tl.arange(0, BV)
    at, inside = state_offsets(f, v, F, V)
    own_z = (f < F) & (i_v == 0)
    b_s = tl.zeros([BF, BV], tl.float32)
    b_z = tl.zeros([BF], tl.float32)
    if start is not None:
        b_s = tl.load(state_at(start, n, heads, s, F, V) + at, mask=inside & (part == 0), other=0.0)
    if start_z is not None:
        b_z = tl.load(state_at(start_z, n, heads, s, F, 1) + f, mask=(f < F) & (part == 0), other=0.0)

    for step in range(part * per_part, min(count, (part + 1) * per_part)):
        i = step
        if REVERSE:
            i = count - 1 - step
        if states is not None:
            tl.store(state_at(states, chunk + i, heads, s, F, V) + at, b_s.to(states.dtype.element_ty), mask=inside)
        if states_z is not None:
            tl.store(state_at(states_z, chunk + i, heads, s, F, 1) + f, b_z, mask=own_z)
        first = begin + i * BT
        row = first + tl.arange(0, BT)
        wanted = row < end
        if key_mask is not None:
            p_mask = key_mask + tl.cast(b, tl.int64) * mask_strides[0] + row.to(tl.int64) * mask_strides[1]
            wanted = wanted & (tl.load(p_mask, mask=wanted, other=0) != 0)
        last = min(first + BT, end) - 1
        if DECAY == "scalar":
            high, low = row_gates(gates, plane, b, s, heads, L, row, wanted)
            total, total_low = row_gates(gates, plane, b, s, heads, L, last, last >= 0)
            if not REVERSE:
                high = total - high
                low = total_low - low
            b_w = tl.exp(high + low)[:, None]
            b_total = tl.exp(total + total_low)
            b_s *= b_total
            b_z *= b_total
        elif DECAY == "vector":
            high, low = channel_gates(gates, plane, b, s, heads, L, row, wanted, i_f * BF, F, BF)
            one = last + tl.arange(0, 1)
            total, total_low = channel_gates(gates, plane, b, s, heads, L, one, one >= 0, i_f * BF, F, BF)
            if not REVERSE:
                high = total - high
                low = total_low - low
            b_w = tl.exp(high + low)
            b_total = tl.sum(tl.exp(total + total_low), 0)
            b_s *= b_total[:, None]
            b_z *= b_total
        if passed is not None:
            p_other = state_at(other, chunk + i, heads, s, F, V) + at
            b_passed = tl.sum(b_s * tl.load(p_other, mask=inside, other=0.0).to(tl.float32), 1)  # [BF]
            if other_z is not None:
                b_passed += b_z * tl.load(state_at(other_z, chunk + i, heads, s, F, 1) + f, mask=own_z, other=0.0)
            if DECAY == "vector":
                p_passed = passed + ((tl.cast(i_v, tl.int64) * n_chunks + chunk + i) * heads + s) * F + f
                tl.store(p_passed, b_passed, mask=f < F)
            else:
                p_passed = passed + (tl.cast(i_f * N_V + i_v, tl.int64) * n_chunks + chunk + i) * heads + s
                tl.store(p_passed, tl.sum(b_passed, 0))
        for h in range(s * group, s * group + group):
            b_x = load_tile(x, b, h, first, wanted, i_f * BF, D, F, MAP, BT, BF, BD, WIDE, DTYPE)  # [BT, BF]
            b_y = load_tile(y, b, h, first, wanted, i_v * BV, V, V, "identity", BT, BV, BD, WIDE, DTYPE)  # [BT, BV]
            b_wide = b_x.to(tl.float32)
            if DECAY != "none":
                b_wide *= b_w
            if final_z is not None:
                b_xz = b_wide.to(DTYPE).to(tl.float32)
                if weights is not None:
                    b_xz *= load_factor(weights, b, h, row, wanted)[:, None]
                b_z += tl.sum(b_xz, 0)
            if y.factor is not None:
                b_wide *= load_factor(y, b, h, row, wanted)[:, None]
            b_s = tl.dot(tl.trans(b_wide.to(DTYPE)), b_y, b_s, input_precision=PRECISION)

    tl.store(state_at(final, part * N + n, heads, s, F, V) + at, b_s, mask=inside)
    if final_z is not None:
        tl.store(state_at(final_z, part * N + n, heads, s, F, 1) + f, b_z, mask=own_z)
