"""Softmax attention forward: one program owns BM queries of one head and walks over the keys its band reaches."""

import triton
import triton.language as tl

from ..common.dropout import keep_tile
from ..common.launch import INTERPRETED, arch_of, launch
from ..common.scores import drop_unseen, finish_scores
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
    mask,
    bias,
    rng,
    k_strides,
    v_strides,
    mask_strides,
    bias_strides,
    head,
    i_first,
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
    MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Fold all key tiles of one kind into (acc, l, m)."""
    i_last = min(i_first + BM, Lq) - 1
    HIDES: tl.constexpr = (PARTIAL or mask is not None) or bias is not None
    start, full_start, full_end, n_partial, n_full = span(i_first, i_last, lo, hi, Lk, BN)
    for n in range(0, n_partial if PARTIAL else n_full):
        j_first = tile_start(n, start, full_start, full_end, BN, PARTIAL)
        j = j_first + tl.arange(0, BN)
        reach = None
        if PARTIAL:
            reach = keys_in_reach(j, i_first, i_last, Lk, lo, hi)
        b_k = load_rows(k, j_first, reach, k_strides, D, BD, BN, WIDE, UPCAST)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if bias is not None:
            b_s = b_s * scale
        b_s, visible = finish_scores(
            b_s, i_first + tl.arange(0, BM)[:, None], j[None, :], mask, bias, mask_strides, bias_strides,
            Lq, Lk, lo, hi, MASK_ROWS, BIAS_ROWS, PARTIAL, PARTIAL,
        )  # fmt: skip

        m_new = tl.maximum(b_m, tl.max(b_s, 1))
        m_ref = m_new
        if HIDES:
            # A row that has seen nothing yet has max -inf, and -inf - -inf is NaN.
            m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)
        b_p = tl.exp2((b_s - m_ref[:, None]) * unit)
        alpha = tl.exp2((b_m - m_ref) * unit)
        b_l = b_l * alpha + tl.sum(b_p, 1)
        b_m = m_new
        if rng is not None:
            b_p = tl.where(keep_tile(rng, threshold, head, i_first, j_first, BM, BN), b_p, 0.0)

        b_v = load_rows(v, j_first, reach, v_strides, DV, BDV, BN, WIDE, UPCAST)  # [BN, BDV]
        if mask is not None or bias is not None:
            b_v = drop_unseen(b_v, visible)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * alpha[:, None], input_precision=PRECISION)
    return b_acc, b_l, b_m


@triton.jit(do_not_specialize=["Hq", "group", "Lq", "Lk", "lo", "hi", "threshold", "n_tiles", "n_heads", "section"])
def forward_kernel(
    q,  # [B, Hq, Lq, D]
    k,  # [B, Hk, Lk, D]
    v,  # [B, Hk, Lk, DV]
    mask,  # int1 [B|1, Hq|1, Lq|1, Lk|1] or None
    bias,  # like mask
    rng,  # int64 [2] or None
    out,  # [B, Hq, Lq, DV]
    lse,  # fp32 [B, Hq, Lq], contiguous
    parts,  # fp32 [B, Hq, Lq, 2], contiguous, or None
    q_strides,
    k_strides,
    v_strides,
    mask_strides,
    bias_strides,
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
    MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    i_tile, head = work_item(tl.program_id(0), n_tiles, n_heads, section, hi is not None and lo is None)
    i_first = i_tile * BM
    b, h = head // Hq, head % Hq
    k = head_of(k, b, h // group, k_strides)
    v = head_of(v, b, h // group, v_strides)
    mask = None if mask is None else head_of(mask, b, h, mask_strides)
    bias = None if bias is None else head_of(bias, b, h, bias_strides)
    row = i_first + tl.arange(0, BM)
    b_q = load_rows(head_of(q, b, h, q_strides), i_first, row < Lq, q_strides, D, BD, BM, WIDE, UPCAST)
    if bias is None:
        # Scores stay unscaled until after the subtraction of their maximum, so a negative scale turns q around.
        sign = tl.where(scale < 0, -1.0, 1.0)
        magnitude = tl.abs(scale)
        b_q = tl.where(scale < 0, -b_q, b_q)
    else:
        sign = 1.0
        magnitude = 1.0
    unit = tl.maximum(magnitude * LOG2E, TINY)

    b_acc = tl.zeros([BM, BDV], tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    for partial in tl.static_range(2):
        b_acc, b_l, b_m = _attend(
            b_acc,
            b_l,
            b_m,
            b_q,
            k,
            v,
            mask,
            bias,
            rng,
            k_strides,
            v_strides,
            mask_strides,
            bias_strides,
            head,
            i_first,
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
            MASK_ROWS,
            BIAS_ROWS,
            PRECISION,
            WIDE,
            UPCAST,
            PARTIAL=partial,
        )

    # A row that sees nothing: 0 and log 0 = -inf.
    b_top = tl.where(b_m == float("-inf"), 0.0, b_m)
    b_log = tl.log(b_l)
    b_out = b_acc * (keep_scale / tl.where(b_l == 0, 1.0, b_l))[:, None]
    store_rows(head_of(out, b, h, out_strides), i_first, b_out, Lq, out_strides, DV, BDV, BM)
    at = head.to(tl.int64) * Lq + row
    tl.store(lse + at, b_top * magnitude + b_log, mask=row < Lq)
    if parts is not None:
        tl.store(parts + at * 2, b_top * sign, mask=row < Lq)
        tl.store(parts + at * 2 + 1, b_log, mask=row < Lq)


def forward(q, k, v, mask, bias, rng, out, lse, parts, params) -> None:
    """Fill out [B, Hq, Lq, Dv], lse fp32 [B, Hq, Lq] and, where a backward pass will follow, parts fp32 [B, Hq, Lq, 2].

    parts: the q.k (with bias, the logit) of the row's heaviest key and the log of the sum of weights relative to it,
    (0, -inf) where the row sees nothing. lse and parts are contiguous. params: scale, dropout_p, band(Lq, Lk).
    """
    B, Hq, Lq, D = q.shape
    Hk, Lk, Dv = k.shape[1], k.shape[2], v.shape[3]
    if B * Hq * Lq == 0:
        return
    extra = mask is not None or bias is not None or rng is not None
    tile = config.pick_forward(D, Dv, q.dtype, arch_of(q), Lq, extra)
    lo, hi = config.useful_band(*params.band(Lq, Lk), Lq, Lk)
    n_tiles = config.ceil_div(Lq, tile.BM)
    launch(
        forward_kernel,
        n_tiles * B * Hq,
        q,
        k,
        v,
        mask,
        bias,
        rng,
        out,
        lse,
        parts,
        q.stride(),
        k.stride(),
        v.stride(),
        config.score_strides(mask),
        config.score_strides(bias),
        out.stride(),
        Hq,
        Hq // Hk,
        Lq,
        Lk,
        lo,
        hi,
        float(params.scale),
        *config.dropout_scalars(params.dropout_p),
        n_tiles,
        B * Hq,
        config.heads_per_section(B * Hq, Hq // Hk, k.element_size() * Lk * (D + Dv)),
        **config.compile_options(tile, (q, k, v), mask, bias, INTERPRETED),
    )
