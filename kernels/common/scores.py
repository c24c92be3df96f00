"""Masks and biases of a score tile. i and j broadcast against each other, so tiles may be [BM, BN] or [BN, BM]."""

import triton
import triton.language as tl


@triton.jit
def _load(base, i, j, Lq, Lk, strides, other, ROWS: tl.constexpr):
    # Without ROWS the values do not depend on the query and stay one row.
    p = base + j.to(tl.int64) * strides[3]
    wanted = j < Lk
    if ROWS:
        p = p + i.to(tl.int64) * strides[2]
        wanted = wanted & (i < Lq)
    return tl.load(p, mask=wanted, other=other)


@triton.jit
def finish_scores(
    s,
    i,
    j,
    mask,
    bias,
    mask_strides,
    bias_strides,
    Lq,
    Lk,
    lo,
    hi,
    MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    BAND: tl.constexpr,
    TAIL: tl.constexpr,
):
    """(s + bias with -inf where hidden, visible). The tile crosses an edge of the band (BAND), the last key (TAIL)."""
    visible = j >= 0
    if TAIL:
        visible = j < Lk
    if BAND:
        if lo is not None:
            visible = visible & (j >= i + lo)
        if hi is not None:
            visible = visible & (j <= i + hi)
    if mask is not None:
        visible = visible & _load(mask, i, j, Lq, Lk, mask_strides, 0, MASK_ROWS)
    if bias is not None:
        b_bias = _load(bias, i, j, Lq, Lk, bias_strides, float("-inf"), BIAS_ROWS).to(tl.float32)
        s = s + b_bias
        visible = visible & (b_bias != float("-inf"))
    if (TAIL or mask is not None) or (bias is not None or (BAND and (lo is not None or hi is not None))):
        # Hidden keys may hold NaN: replace, do not add.
        s = tl.where(visible, s, float("-inf"))
    return s, visible


@triton.jit
def drop_unseen(x, visible):
    """Zero the rows of x [BN, ...] whose key no query of the tile sees: 0 * NaN would reach every query."""
    seen = tl.max(visible.to(tl.int32), 0) > 0  # [BN]
    return tl.where(seen[:, None], x, 0.0)
