"""Softmax attention forward: one program owns BM queries of one head and walks over the keys its band reaches."""

import triton
import triton.language as tl

from ..common.dropout import keep_tile
from ..common.launch import INTERPRETED, arch_of, launch
from ..common.plans import planned_block, run_at, runs_of
from ..common.scores import capped, drop_unseen, finish_logits
from ..common.tiles import head_of, keys_in_reach, load_rows, span, store_rows, tile_start, work_item
from . import config

LOG2E = tl.constexpr(1.4426950408889634)
# Stands for a scale of 0: any finite difference of scores times this vanishes, and -inf stays -inf.
TINY = tl.constexpr(1.2e-38)


@triton.jit
def _attend(
    b_acc,  # [BM, BDV]
    b_l,  # [BM] sum of weights
    b_m,  # [BM] running maximum
    b_q,  # [BM, BD]
    k,  # [Lk, D] of this head, and so on
    v,
    terms,
    rng,
    walk,
    i_slice,
    k_strides,
    v_strides,
    head,
    i_first,
    Hq,
    Lq,
    Lk,
    lo,
    hi,
    scale,
    unit,  # weight = 2 ** ((s - max) * unit)
    threshold,
    D: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    LOGITS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Fold all key tiles of one kind into (acc, l, m)."""
    i_last = min(i_first + BM, Lq) - 1
    DROPS: tl.constexpr = (terms.mask is not None or terms.bias is not None) or (PARTIAL and walk is not None)
    first_run, end_run = runs_of(walk, i_slice, i_first, Lq)
    for run in range(first_run, end_run):
        begin, full_begin, end, bits = run_at(walk, run, Lk)
        start, full_start, full_end, n_partial, n_full = span(i_first, i_last, lo, hi, begin, full_begin, end, BN)
        for n in range(0, n_partial if PARTIAL else n_full):
            j_first = tile_start(n, start, full_start, full_end, BN, PARTIAL)
            j = j_first + tl.arange(0, BN)
            reach = None
            if PARTIAL:
                reach = keys_in_reach(j, i_first, i_last, Lk, lo, hi)
            b_k = load_rows(k, j_first, reach, k_strides, D, BD, BN, WIDE, UPCAST)  # [BN, BD]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
            b_s, _ = capped(b_s, scale, terms.softcap, LOGITS)
            b_s, visible = finish_logits(
                b_s, i_first + tl.arange(0, BM)[:, None], j[None, :], terms, bits, head, Hq,
                Lq, Lk, lo, hi, MASK_ROWS, BIAS_ROWS, PARTIAL, PARTIAL,
            )  # fmt: skip

            m_new = tl.maximum(b_m, tl.max(b_s, 1))
            m_ref = m_new
            if PARTIAL or DROPS:
                # A row that has seen nothing yet has max -inf, and -inf - -inf is NaN.
                m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)
            b_p = tl.exp2((b_s - m_ref[:, None]) * unit)
            alpha = tl.exp2((b_m - m_ref) * unit)
            b_l = b_l * alpha + tl.sum(b_p, 1)
            b_m = m_new
            if rng is not None:
                b_p = tl.where(keep_tile(rng, threshold, head, i_first, j_first, BM, BN), b_p, 0.0)

            b_v = load_rows(v, j_first, reach, v_strides, DV, BDV, BN, WIDE, UPCAST)  # [BN, BDV]
            if DROPS:
                b_v = drop_unseen(b_v, visible)
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * alpha[:, None], input_precision=PRECISION)
    return b_acc, b_l, b_m


@triton.jit(do_not_specialize=["group", *config.UNSPECIALIZED])
def forward_kernel(
    q,  # [B, Hq, Lq, D]
    k,  # [B, Hk, Lk, D]
    v,  # [B, Hk, Lk, DV]
    terms,
    sinks,  # fp32 [Hq] or None
    rng,  # int64 [2] or None
    walk,  # rows of a plan, or None; slice of (b, h): b * slice_b + h * slice_h
    slice_b,
    slice_h,
    out,  # [B, Hq, Lq, DV]
    lse,  # fp32 [B, Hq, Lq], contiguous
    parts,  # fp32 [B, Hq, Lq, 2], contiguous, or None
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    Hq,
    group,
    Lq,
    Lk,
    lo,
    hi,
    scale,
    threshold,
    keep_scale,
    n_tiles,
    n_heads,
    section,
    D: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    LOGITS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    HEAVY_LAST: tl.constexpr = walk is None and (hi is not None and lo is None)
    i_tile, head = work_item(tl.program_id(0), n_tiles, n_heads, section, HEAVY_LAST)
    b, h = head // Hq, head % Hq
    i_first = i_tile * BM
    i_slice = 0
    if walk is not None:
        i_slice = b * slice_b + h * slice_h
        i_first = planned_block(i_tile, walk, i_slice, Lq, BM)
    k = head_of(k, b, h // group, k_strides)
    v = head_of(v, b, h // group, v_strides)
    row = i_first + tl.arange(0, BM)
    b_q = load_rows(head_of(q, b, h, q_strides), i_first, row < Lq, q_strides, D, BD, BM, WIDE, UPCAST)
    if LOGITS:
        sign = 1.0
        magnitude = 1.0
    else:
        # Scores stay unscaled until after the subtraction of their maximum, so a negative scale turns q around.
        sign = tl.where(scale < 0, -1.0, 1.0)
        magnitude = tl.abs(scale)
        b_q = tl.where(scale < 0, -b_q, b_q)
    unit = tl.maximum(magnitude * LOG2E, TINY)

    b_acc = tl.zeros([BM, BDV], tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    if sinks is not None:
        # A sink is a key that comes before all others; its value is 0.
        b_m = tl.zeros([BM], tl.float32) + tl.load(sinks + h)
        b_l = tl.where(b_m == float("-inf"), 0.0, 1.0)
    for partial in tl.static_range(2):
        b_acc, b_l, b_m = _attend(
            b_acc,
            b_l,
            b_m,
            b_q,
            k,
            v,
            terms,
            rng,
            walk,
            i_slice,
            k_strides,
            v_strides,
            head,
            i_first,
            Hq,
            Lq,
            Lk,
            lo,
            hi,
            scale,
            unit,
            threshold,
            D,
            DV,
            BM,
            BN,
            BD,
            BDV,
            LOGITS,
            MASK_ROWS,
            BIAS_ROWS,
            PRECISION,
            WIDE,
            UPCAST,
            PARTIAL=partial,
        )

    # A row that sees nothing and has no sink: 0 and log 0 = -inf.
    b_top = tl.where(b_m == float("-inf"), 0.0, b_m)
    b_log = tl.log(b_l)
    b_out = b_acc * (keep_scale / tl.where(b_l == 0, 1.0, b_l))[:, None]
    store_rows(head_of(out, b, h, out_strides), i_first, b_out, Lq, out_strides, DV, BDV, BM)
    at = head.to(tl.int64) * Lq + row
    tl.store(lse + at, b_top * magnitude + b_log, mask=row < Lq)
    if parts is not None:
        tl.store(parts + at * 2, b_top * sign, mask=row < Lq)
        tl.store(parts + at * 2 + 1, b_log, mask=row < Lq)


def forward(x, out, lse, parts, params) -> None:
    """Fill out [B, Hq, Lq, Dv], lse fp32 [B, Hq, Lq] and, where a backward pass will follow, parts fp32 [B, Hq, Lq, 2].

    parts: the largest q.k of the row (its largest logit where `config.uses_logits`) and the log of the sum of weights
    relative to it, (0, -inf) where the row sees nothing. lse and parts are contiguous.
    x: q, k, v, bias, slopes, sinks, mask, diagonal, rng, plan. params: scale, softcap, dropout_p, band(Lq, Lk).
    """
    q, k, v = x.q, x.k, x.v
    B, Hq, Lq, D = q.shape
    Hk, Lk, Dv = k.shape[1], k.shape[2], v.shape[3]
    if B * Hq * Lq == 0:
        return
    tile = config.pick_forward(D, Dv, q.dtype, arch_of(q), Lq, config.has_extras(x, params), x.plan is not None)
    n_tiles = config.count_blocks(Lq, tile.BM, x.plan)
    launch(
        forward_kernel,
        n_tiles * B * Hq,
        q,
        k,
        v,
        config.terms_of(x, params),
        x.sinks,
        x.rng,
        config.rows_of(x.plan),
        *config.slice_strides(x.plan),
        out,
        lse,
        parts,
        q.stride(),
        k.stride(),
        v.stride(),
        out.stride(),
        Hq,
        Hq // Hk,
        Lq,
        Lk,
        *config.useful_band(*params.band(Lq, Lk), Lq, Lk),
        float(params.scale),
        *config.dropout_scalars(params.dropout_p),
        n_tiles,
        B * Hq,
        config.heads_per_section(B * Hq, Hq // Hk, k.element_size() * Lk * (D + Dv)),
        **config.compile_options(tile, (q, k, v), x, params, INTERPRETED),
    )
