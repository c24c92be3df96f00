"""Softmax attention backward: delta, then dK and dV per key tile and dQ per query tile. No atomics: always the same bits."""

import torch
import triton
import triton.language as tl

from ..common.dropout import keep_tile
from ..common.launch import INTERPRETED, arch_of, launch
from ..common.plans import bits_at, planned_block, run_at, runs_of
from ..common.scores import alibi_distance, capped, drop_unseen, finish_logits
from ..common.tiles import head_of, keys_in_reach, load_rows, span, store_rows, tile_start, work_item
from . import config

LOG2E = tl.constexpr(1.4426950408889634)
# group is specialised: 1 (no GQA) makes the loop over its heads vanish.
UNSPECIALIZED = config.UNSPECIALIZED


@triton.jit
def weights(s, top, tail, scale, LOGITS: tl.constexpr):
    """P of scores or LOGITS s. None passes the largest, but by rounding of huge ones. NaN stays NaN."""
    below = (s - top) * (LOG2E if LOGITS else scale * LOG2E)
    return tl.exp2(tl.minimum(below, 0.0, propagate_nan=tl.PropagateNan.ALL) - tail)


@triton.jit
def logit_gradient(p, dp, delta, visible, HIDES: tl.constexpr):
    """d loss / d logit; a hidden key's dp may be NaN."""
    dz = p * (dp - delta)
    return tl.where(visible, dz, 0.0) if HIDES else dz


@triton.jit
def score_gradient(dz, damp, softcap, visible, HIDES: tl.constexpr):
    """d loss / d (scale * score); a hidden key's damp may be NaN."""
    ds = dz
    if softcap is not None:
        ds = tl.where(visible, dz * damp, 0.0) if HIDES else dz * damp
    return ds


@triton.jit(do_not_specialize=["Hq", "Lq"])
def row_stats_kernel(out, dout, parts, dlse, stats, out_strides, dout_strides, dlse_strides, Hq, Lq, n_tiles,
                     DV: tl.constexpr, BM: tl.constexpr, BDV: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """stats fp32 [B * Hq, 3, n_tiles * BM]: the parts of lse, the log in base 2, and delta = rowsum(out * dout) - dlse.

    All are 0 beyond Lq.
    """
    i_tile, head = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
    b, h = head // Hq, head % Hq
    row = i_tile * BM + tl.arange(0, BM)
    out = head_of(out, b, h, out_strides)
    dout = head_of(dout, b, h, dout_strides)
    b_out = load_rows(out, i_tile * BM, row < Lq, out_strides, DV, BDV, BM, WIDE, UPCAST).to(tl.float32)
    b_dout = load_rows(dout, i_tile * BM, row < Lq, dout_strides, DV, BDV, BM, WIDE, UPCAST).to(tl.float32)
    b_delta = tl.sum(b_out * b_dout, 1)
    if dlse is not None:
        p_dlse = head_of(dlse, b, h, dlse_strides) + row.to(tl.int64) * dlse_strides[2]
        b_delta -= tl.load(p_dlse, mask=row < Lq, other=0.0)
    p_parts = parts + (head.to(tl.int64) * Lq + row) * 2
    p_stats = stats + head.to(tl.int64) * 3 * n_tiles * BM + row
    tl.store(p_stats, tl.load(p_parts, mask=row < Lq, other=0.0))
    tl.store(p_stats + n_tiles * BM, tl.load(p_parts + 1, mask=row < Lq, other=0.0) * LOG2E)
    tl.store(p_stats + 2 * n_tiles * BM, b_delta)


@triton.jit
def load_stats(stats, padded, head, i_first, BM: tl.constexpr):
    """(top, tail, delta) [BM] of the rows i_first.. of a head."""
    p = stats + tl.cast(head, tl.int64) * 3 * padded + i_first + tl.arange(0, BM)
    return tl.load(p), tl.load(p + padded), tl.load(p + 2 * padded)


@triton.jit
def _add_queries(b_dk, b_dv, b_column, b_k, b_v, q, dout, stats, padded, terms, rng, walk, i_slice,
                 q_strides, dout_strides, head, j_first, Hq, Lq, Lk, lo, hi, scale, threshold, keep_scale,
                 D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                 BDV: tl.constexpr, LOGITS: tl.constexpr, MASK_ROWS: tl.constexpr, BIAS_ROWS: tl.constexpr,
                 PRECISION: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, COLUMN: tl.constexpr,
                 PARTIAL: tl.constexpr):  # fmt: skip
    """Add what all query tiles of one kind and head give to dK [BN, BD], dV [BN, BDV] and column sums of dZ [BN]."""
    CUT: tl.constexpr = PARTIAL and (walk is not None or (lo is not None or hi is not None))
    HIDES: tl.constexpr = (terms.mask is not None or terms.bias is not None) or CUT
    # lo <= j - i <= hi read from the keys: -hi <= i - j <= -lo.
    below = None if hi is None else -hi
    above = None if lo is None else -lo
    j_last = min(j_first + BN, Lk) - 1
    first_run, end_run = runs_of(walk, i_slice, j_first, Lk)
    for run in range(first_run, end_run):
        begin, full_begin, end, bits = run_at(walk, run, Lq)
        start, full_start, full_end, n_partial, n_full = span(j_first, j_last, below, above, begin, full_begin, end, BM)
        for n in range(0, n_partial if PARTIAL else n_full):
            i_first = tile_start(n, start, full_start, full_end, BM, PARTIAL)
            wanted = None
            if PARTIAL:
                wanted = tl.arange(0, BM) < Lq - i_first
            b_q = load_rows(q, i_first, wanted, q_strides, D, BD, BM, WIDE, UPCAST)  # [BM, BD]
            # Transposed, so that P and dS come out as the left operands of the products below.
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
            b_z, b_damp = capped(b_s, scale, terms.softcap, LOGITS)
            b_z, visible = finish_logits(
                b_z, i_first + tl.arange(0, BM)[None, :], j_first + tl.arange(0, BN)[:, None], terms, bits, head, Hq,
                Lq, Lk, lo, hi, MASK_ROWS, BIAS_ROWS, PARTIAL, False,
            )  # fmt: skip
            b_top, b_tail, b_delta = load_stats(stats, padded, head, i_first, BM)
            b_p = weights(b_z, b_top[None, :], b_tail[None, :], scale, LOGITS)
            if HIDES:
                # Also where tail is -inf: such a query sees nothing.
                b_p = tl.where(visible, b_p, 0.0)

            b_dout = load_rows(dout, i_first, wanted, dout_strides, DV, BDV, BM, WIDE, UPCAST)  # [BM, BDV]
            b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION)  # [BN, BM]
            b_kept = b_p
            if rng is not None:
                keep = tl.trans(keep_tile(rng, threshold, head, i_first, j_first, BM, BN))
                b_kept = tl.where(keep, b_p * keep_scale, 0.0)
                b_dp = tl.where(keep, b_dp * keep_scale, 0.0)
            b_dv = tl.dot(b_kept.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
            b_dz = logit_gradient(b_p, b_dp, b_delta[None, :], visible, HIDES)
            if COLUMN:
                b_column += tl.sum(b_dz, 1)
            b_ds = score_gradient(b_dz, b_damp, terms.softcap, visible, HIDES)
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv, b_column


@triton.jit(do_not_specialize=UNSPECIALIZED)
def keys_kernel(q, k, v, dout, stats, terms, rng, slice_b, slice_h, walk, dk, dv, column,
                q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides,
                padded, Hq, group, Lq, Lk, lo, hi, scale, threshold, keep_scale, n_tiles, n_heads, section,
                D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                BDV: tl.constexpr, LOGITS: tl.constexpr, MASK_ROWS: tl.constexpr, BIAS_ROWS: tl.constexpr,
                PRECISION: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """dK and dV of BN keys of one kv head, summed over its group of query heads; column [B, Hq, Lk] takes sum_i dZ_ij."""
    HEAVY_LAST: tl.constexpr = walk is None and (hi is None and lo is not None)
    j_tile, head_kv = work_item(tl.program_id(0), n_tiles, n_heads, section, HEAVY_LAST)
    Hk = Hq // group
    b, h_kv = head_kv // Hk, head_kv % Hk
    j_first = j_tile * BN
    if walk is not None:
        j_first = planned_block(j_tile, walk, b * slice_b + h_kv * group * slice_h, Lk, BN)
    j = j_first + tl.arange(0, BN)
    # Queries beyond Lq, all zero, would see keys that no other query sees and that may hold NaN.
    reach = keys_in_reach(j, 0, Lq - 1, Lk, lo, hi)
    b_k = load_rows(head_of(k, b, h_kv, k_strides), j_first, reach, k_strides, D, BD, BN, WIDE, UPCAST)
    b_v = load_rows(head_of(v, b, h_kv, v_strides), j_first, reach, v_strides, DV, BDV, BN, WIDE, UPCAST)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BDV], tl.float32)
    # Without licm: what both kinds of tiles need would stay in registers through the whole group.
    for h in tl.range(h_kv * group, h_kv * group + group, disable_licm=True):
        head = b * Hq + h
        b_column = tl.zeros([BN], tl.float32)
        for partial in tl.static_range(2):
            b_dk, b_dv, b_column = _add_queries(
                b_dk, b_dv, b_column, b_k, b_v, head_of(q, b, h, q_strides), head_of(dout, b, h, dout_strides),
                stats, padded, terms, rng, walk, b * slice_b + h * slice_h, q_strides, dout_strides,
                head, j_first, Hq, Lq, Lk, lo, hi, scale, threshold, keep_scale,
                D, DV, BM, BN, BD, BDV, LOGITS, MASK_ROWS, BIAS_ROWS, PRECISION, WIDE, UPCAST, column is not None, partial,
            )  # fmt: skip
        if column is not None:
            tl.store(column + tl.cast(head, tl.int64) * Lk + j, b_column, mask=j < Lk)
    store_rows(head_of(dk, b, h_kv, dk_strides), j_first, b_dk * scale, Lk, dk_strides, D, BD, BN)
    store_rows(head_of(dv, b, h_kv, dv_strides), j_first, b_dv, Lk, dv_strides, DV, BDV, BN)


@triton.jit
def _gradient_tile(b_q, b_dout, b_top, b_tail, b_delta, k, v, terms, rng, k_strides, v_strides,
                   bits, head, i_first, j_first, i_last, Hq, Lq, Lk, lo, hi, scale, threshold, keep_scale,
                   D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                   BDV: tl.constexpr, LOGITS: tl.constexpr, MASK_ROWS: tl.constexpr, BIAS_ROWS: tl.constexpr,
                   PRECISION: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
                   PARTIAL: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    """dZ [BM, BN] and dS of one tile, and its keys [BN, BD] with unseen ones zeroed; TAIL: also dZ past Lk is zero."""
    CUT: tl.constexpr = PARTIAL and (terms.words is not None or (lo is not None or hi is not None))
    HIDES: tl.constexpr = (terms.mask is not None or terms.bias is not None) or (CUT or TAIL)
    j = j_first + tl.arange(0, BN)
    reach = None
    if PARTIAL:
        reach = keys_in_reach(j, i_first, i_last, Lk, lo, hi)
    b_k = load_rows(k, j_first, reach, k_strides, D, BD, BN, WIDE, UPCAST)  # [BN, BD]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
    b_z, b_damp = capped(b_s, scale, terms.softcap, LOGITS)
    b_z, visible = finish_logits(
        b_z, i_first + tl.arange(0, BM)[:, None], j[None, :], terms, bits, head, Hq,
        Lq, Lk, lo, hi, MASK_ROWS, BIAS_ROWS, PARTIAL, TAIL,
    )  # fmt: skip
    b_p = weights(b_z, b_top[:, None], b_tail[:, None], scale, LOGITS)
    b_v = load_rows(v, j_first, reach, v_strides, DV, BDV, BN, WIDE, UPCAST)  # [BN, BDV]
    b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)  # [BM, BN]
    if rng is not None:
        keep = keep_tile(rng, threshold, head, i_first, j_first, BM, BN)
        b_dp = tl.where(keep, b_dp * keep_scale, 0.0)
    b_dz = logit_gradient(b_p, b_dp, b_delta[:, None], visible, HIDES)
    if (terms.mask is not None or terms.bias is not None) or (PARTIAL and terms.words is not None):
        b_k = drop_unseen(b_k, visible)
    return b_dz, score_gradient(b_dz, b_damp, terms.softcap, visible, HIDES), b_k


@triton.jit(do_not_specialize=UNSPECIALIZED)
def queries_kernel(q, k, v, dout, stats, terms, rng, slice_b, slice_h, walk, dq, dbias, slope_rows,
                   q_strides, k_strides, v_strides, dout_strides, dq_strides, dbias_strides,
                   padded, Hq, group, Lq, Lk, lo, hi, scale, threshold, keep_scale, n_tiles, n_heads, section,
                   D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                   BDV: tl.constexpr, LOGITS: tl.constexpr, MASK_ROWS: tl.constexpr, BIAS_ROWS: tl.constexpr,
                   PRECISION: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """dQ of BM queries of one head. Where not None, dbias [B, Hq, Lq, Lk] takes dZ, slope_rows [B, Hq, Lq] sum_j dZ |..|."""
    HEAVY_LAST: tl.constexpr = walk is None and (hi is not None and lo is None)
    i_tile, head = work_item(tl.program_id(0), n_tiles, n_heads, section, HEAVY_LAST)
    b, h = head // Hq, head % Hq
    i_first = i_tile * BM
    i_slice = b * slice_b + h * slice_h
    if walk is not None:
        i_first = planned_block(i_tile, walk, i_slice, Lq, BM)
    i_last = min(i_first + BM, Lq) - 1
    row = i_first + tl.arange(0, BM)
    k = head_of(k, b, h // group, k_strides)
    v = head_of(v, b, h // group, v_strides)
    if dbias is not None:
        p_dbias = head_of(dbias, b, h, dbias_strides) + row.to(tl.int64)[:, None] * dbias_strides[2]
    b_q = load_rows(head_of(q, b, h, q_strides), i_first, row < Lq, q_strides, D, BD, BM, WIDE, UPCAST)
    b_dout = load_rows(head_of(dout, b, h, dout_strides), i_first, row < Lq, dout_strides, DV, BDV, BM, WIDE, UPCAST)
    b_top, b_tail, b_delta = load_stats(stats, padded, head, i_first, BM)

    b_dq = tl.zeros([BM, BD], tl.float32)
    b_slope = tl.zeros([BM], tl.float32)
    first_run, end_run = runs_of(walk, i_slice, i_first, Lq)
    for partial in tl.static_range(2):
        for run in range(first_run, end_run):
            begin, full_begin, end, bits = run_at(walk, run, Lk)
            start, full_start, full_end, n_partial, n_full = span(i_first, i_last, lo, hi, begin, full_begin, end, BN)
            for n in range(0, n_partial if partial else n_full):
                j_first = tile_start(n, start, full_start, full_end, BN, partial)
                b_dz, b_ds, b_k = _gradient_tile(
                    b_q, b_dout, b_top, b_tail, b_delta, k, v, terms, rng, k_strides, v_strides,
                    bits, head, i_first, j_first, i_last, Hq, Lq, Lk, lo, hi, scale, threshold, keep_scale,
                    D, DV, BM, BN, BD, BDV, LOGITS, MASK_ROWS, BIAS_ROWS, PRECISION, WIDE, UPCAST,
                    partial, partial and slope_rows is not None,
                )  # fmt: skip
                b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
                j = (j_first + tl.arange(0, BN))[None, :]
                if slope_rows is not None:
                    b_slope += tl.sum(b_dz * alibi_distance(row[:, None], j, terms.diagonal, Lq, Lk), 1)
                if dbias is not None:
                    inside = (row < Lq)[:, None] & (j < Lk)
                    tl.store(p_dbias + j.to(tl.int64) * dbias_strides[3], b_dz.to(dbias.dtype.element_ty), mask=inside)
    store_rows(head_of(dq, b, h, dq_strides), i_first, b_dq * scale, Lq, dq_strides, D, BD, BM)
    if slope_rows is not None:
        tl.store(slope_rows + tl.cast(head, tl.int64) * Lq + row, b_slope, mask=row < Lq)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def bias_kernel(q, k, v, dout, stats, terms, rng, slice_b, slice_h, walk, dbias,
                q_strides, k_strides, v_strides, dout_strides, dbias_strides,
                padded, Hq, group, Lq, Lk, lo, hi, scale, threshold, keep_scale, n_i, n_j, dbias_heads, sum_b, sum_h,
                D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                BDV: tl.constexpr, LOGITS: tl.constexpr, MASK_ROWS: tl.constexpr, BIAS_ROWS: tl.constexpr,
                PRECISION: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """One [BM, BN] tile of dbias [B|1, Hq|1, Lq, Lk]: dZ summed over sum_b batches and sum_h heads, in order."""
    pid = tl.program_id(0)
    i_first = pid // n_j % n_i * BM
    j_first = pid % n_j * BN
    i_last = min(i_first + BM, Lq) - 1
    slab = pid // (n_i * n_j)
    slab_b, slab_h = slab // dbias_heads, slab % dbias_heads
    row = i_first + tl.arange(0, BM)
    j = (j_first + tl.arange(0, BN))[None, :]
    reachable = j_first >= 0
    if lo is not None:
        reachable = reachable & (j_first + BN - 1 >= i_first + lo)
    if hi is not None:
        reachable = reachable & (j_first <= i_last + hi)

    b_sum = tl.zeros([BM, BN], tl.float32)
    for n in range(0, tl.where(reachable, sum_b * sum_h, 0)):
        b = slab_b + n // sum_h
        h = slab_h + n % sum_h
        head = b * Hq + h
        bits = bits_at(walk, b * slice_b + h * slice_h, i_first, j_first, Lq)
        if bits != -2:
            b_q = load_rows(head_of(q, b, h, q_strides), i_first, row < Lq, q_strides, D, BD, BM, WIDE, UPCAST)
            p_dout = head_of(dout, b, h, dout_strides)
            b_dout = load_rows(p_dout, i_first, row < Lq, dout_strides, DV, BDV, BM, WIDE, UPCAST)
            b_top, b_tail, b_delta = load_stats(stats, padded, head, i_first, BM)
            b_dz, _, _ = _gradient_tile(
                b_q, b_dout, b_top, b_tail, b_delta, head_of(k, b, h // group, k_strides),
                head_of(v, b, h // group, v_strides), terms, rng, k_strides, v_strides,
                bits, head, i_first, j_first, i_last, Hq, Lq, Lk, lo, hi, scale, threshold, keep_scale,
                D, DV, BM, BN, BD, BDV, LOGITS, MASK_ROWS, BIAS_ROWS, PRECISION, WIDE, UPCAST, True, False,
            )  # fmt: skip
            b_sum += b_dz
    dbias = head_of(dbias, slab_b, slab_h, dbias_strides)
    p_dbias = dbias + row.to(tl.int64)[:, None] * dbias_strides[2] + j.to(tl.int64) * dbias_strides[3]
    tl.store(p_dbias, b_sum.to(dbias.dtype.element_ty), mask=(row < Lq)[:, None] & (j < Lk))


def _row_sums(dout, dlse, x, out, parts):
    """sum_j dZ_ij [B, Hq, Lq]: the weights of a row sum to 1, to 0 where it sees nothing, or to what a sink leaves."""
    log_total = parts[..., 1]
    rows = torch.zeros_like(log_total) if dlse is None else dlse.masked_fill(log_total == -torch.inf, 0.0)
    if x.sinks is None:
        return rows
    of_sink = torch.exp(x.sinks[:, None] - parts[..., 0] - log_total.masked_fill(log_total == -torch.inf, torch.inf))
    return rows + of_sink * (torch.linalg.vecdot(dout.float(), out.float()) - rows)


def backward(dout, dlse, x, out, parts, params, dq, dk, dv, dbias, dslopes) -> None:
    """Fill the gradients that are not None, for x and params as in `forward`.

    dbias [B|1, Hq|1, Lq|1, Lk|1] and dslopes fp32 [B|1, Hq] are summed over their broadcast dimensions.
    """
    q, k, v, rng, plan = x.q, x.k, x.v, x.rng, x.plan
    B, Hq, Lq, D = q.shape
    Hk, Lk, Dv = k.shape[1], k.shape[2], v.shape[3]
    if B * Hq * Lq * Lk == 0:
        for gradient in (dq, dk, dv, dbias, dslopes):
            if gradient is not None:
                gradient.zero_()
        return
    if dbias is not None and dbias.shape[3] == 1:
        dbias.copy_(_row_sums(dout, dlse, x, out, parts)[..., None].sum_to_size(dbias.shape))
        dbias = None
    if all(gradient is None for gradient in (dq, dk, dv, dbias, dslopes)):
        return

    tiles = config.pick_backward(D, Dv, q.dtype, arch_of(q), config.has_extras(x, params), plan is not None)
    group = Hq // Hk
    padded = config.ceil_div(Lq, config.STATS_PADDING) * config.STATS_PADDING
    stats = parts.new_empty(B * Hq, 3, padded)
    n_tiles = padded // config.STATS_ROWS
    strides = (out.stride(), dout.stride(), None if dlse is None else dlse.stride())
    launch(
        row_stats_kernel, n_tiles * B * Hq, out, dout, parts, dlse, stats, *strides, Hq, Lq, n_tiles, DV=Dv,
        BM=config.STATS_ROWS, BDV=config.block_dim(Dv), WIDE=config.wide(out, dout),
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
    )  # fmt: skip

    inputs = (q, k, v, dout, stats, config.terms_of(x, params), rng, *config.slice_strides(plan))
    strides = (q.stride(), k.stride(), v.stride(), dout.stride())
    band = config.useful_band(*params.band(Lq, Lk), Lq, Lk)
    dropout = config.dropout_scalars(params.dropout_p)
    scalars = (padded, Hq, group, Lq, Lk, *band, float(params.scale), *dropout)

    def compiled_for(tile):
        return config.compile_options(tile, (q, dout, k, v), x, params, INTERPRETED)

    by_column = dbias is not None and dbias.shape[2] == 1
    by_tile = dbias is not None and not by_column and dbias.shape[:2] != (B, Hq)
    if dk is not None or dv is not None or by_column:
        dk = torch.empty_like(k) if dk is None else dk
        dv = torch.empty_like(v) if dv is None else dv
        column = parts.new_empty(B, Hq, Lk) if by_column else None
        n_tiles = config.count_blocks(Lk, tiles.keys.BN, plan)
        section = config.heads_per_section(B * Hk, 1, q.element_size() * Lq * (D + Dv) * group)
        launch(
            keys_kernel, n_tiles * B * Hk, *inputs, config.columns_of(plan), dk, dv, column, *strides, dk.stride(), dv.stride(),
            *scalars, n_tiles, B * Hk, section, **compiled_for(tiles.keys),
        )  # fmt: skip
        if by_column:
            dbias.copy_(column[:, :, None].sum_to_size(dbias.shape))
    in_place = dbias if dbias is not None and not by_column and not by_tile else None
    if dq is not None or in_place is not None or dslopes is not None:
        dq = torch.empty_like(q) if dq is None else dq
        slope_rows = None if dslopes is None else parts.new_empty(B, Hq, Lq)
        if in_place is not None and (band != (None, None) or plan is not None):
            in_place.zero_()  # tiles outside the band or the plan are never visited
        n_tiles = config.count_blocks(Lq, tiles.queries.BM, plan)
        section = config.heads_per_section(B * Hq, group, k.element_size() * Lk * (D + Dv))
        launch(
            queries_kernel, n_tiles * B * Hq, *inputs, config.rows_of(plan), dq, in_place, slope_rows, *strides, dq.stride(),
            None if in_place is None else in_place.stride(), *scalars, n_tiles, B * Hq, section,
            **compiled_for(tiles.queries),
        )  # fmt: skip
        if dslopes is not None:
            dslopes.copy_(-slope_rows.sum(2).sum_to_size(dslopes.shape))
    if by_tile:
        n_i, n_j = config.ceil_div(Lq, tiles.queries.BM), config.ceil_div(Lk, tiles.queries.BN)
        slabs_b, slabs_h = dbias.shape[:2]
        launch(
            bias_kernel, slabs_b * slabs_h * n_i * n_j, *inputs, config.rows_of(plan), dbias, *strides, dbias.stride(), *scalars,
            n_i, n_j, slabs_h, B // slabs_b, Hq // slabs_h, **compiled_for(tiles.queries),
        )  # fmt: skip
