"""From q.k to logits: softcap, bias, ALiBi, and what is hidden. i and j broadcast: tiles may be [BM, BN] or [BN, BM]."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .plans import seen_in_tile
from .tiles import head_of


class Terms(NamedTuple):
    """What a score goes through on its way to a logit; any may be None."""

    softcap: Any  # float
    bias: Any  # [B|1, Hq|1, Lq|1, Lk|1]
    bias_strides: Any
    slopes: Any  # fp32 [B * Hq]
    diagonal: Any  # int32 [Lq]
    mask: Any  # int1, like bias
    mask_strides: Any
    words: Any  # int64 [n, 64]: bits of partial tiles of a plan


@triton.jit
def capped(s, scale, softcap, LOGITS: tl.constexpr):
    """(softcap(scale * s), its derivative by scale * s); s as it is where scores are not scaled yet."""
    if softcap is None:
        z, damp = s * scale if LOGITS else s, 1.0
    else:
        # tanh: a polynomial (Cephes) where 1 - e loses digits; e <= 1 cannot overflow.
        x = s * (scale / softcap)
        square = x * x
        poly = 2.06390887954e-2 - 5.70498872745e-3 * square
        poly = (poly * square - 5.37397155531e-2) * square + 1.33314422036e-1
        small = x + x * square * (poly * square - 3.33332819422e-1)
        e = tl.exp2(tl.abs(x) * -2.8853900817779268)
        large = (1 - e) / (1 + e)
        t = tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))
        # 1 - tanh ** 2 without the cancellation.
        z, damp = softcap * t, 4 * e / ((1 + e) * (1 + e))
    return z, damp


@triton.jit
def alibi_distance(i, j, diagonal, Lq, Lk):
    """fp32 |zero(i) - j|, where zero is i + diagonal[i], or i + Lk - Lq."""
    shift = Lk - Lq
    if diagonal is not None:
        shift = tl.load(diagonal + i, mask=i < Lq, other=0)
    return tl.abs(i + shift - j).to(tl.float32)


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
def finish_logits(
    z,
    i,
    j,
    terms,
    bits,
    head,
    Hq,
    Lq,
    Lk,
    lo,
    hi,
    MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    BAND: tl.constexpr,
    TAIL: tl.constexpr,
):
    """(z + bias - ALiBi with -inf where hidden, visible).

    The tile crosses an edge of the band or is seen in part (BAND); the last key (TAIL).
    """
    visible = j >= 0
    if TAIL:
        visible = j < Lk
    if BAND:
        if lo is not None:
            visible = visible & (j >= i + lo)
        if hi is not None:
            visible = visible & (j <= i + hi)
        if terms.words is not None:
            visible = visible & seen_in_tile(terms.words, bits, i, j)
    if terms.mask is not None:
        mask = head_of(terms.mask, head // Hq, head % Hq, terms.mask_strides)
        visible = visible & _load(mask, i, j, Lq, Lk, terms.mask_strides, 0, MASK_ROWS)
    if terms.bias is not None:
        bias = head_of(terms.bias, head // Hq, head % Hq, terms.bias_strides)
        b_bias = _load(bias, i, j, Lq, Lk, terms.bias_strides, float("-inf"), BIAS_ROWS).to(tl.float32)
        z = z + b_bias
        visible = visible & (b_bias != float("-inf"))
    if terms.slopes is not None:
        z = z - tl.load(terms.slopes + head) * alibi_distance(i, j, terms.diagonal, Lq, Lk)
    CUT: tl.constexpr = BAND and ((lo is not None or hi is not None) or terms.words is not None)
    if (TAIL or CUT) or (terms.mask is not None or terms.bias is not None):
        # Hidden keys may hold NaN: replace, do not add.
        z = tl.where(visible, z, float("-inf"))
    return z, visible


@triton.jit
def drop_unseen(x, visible):
    """Zero the rows of x [BN, ...] whose key no query of the tile sees: 0 * NaN would reach every query."""
    seen = tl.max(visible.to(tl.int32), 0) > 0  # [BN]
    return tl.where(seen[:, None], x, 0.0)
