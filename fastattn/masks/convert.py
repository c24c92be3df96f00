"""Masks from what other libraries use: dense tensors, torch's causal biases, flash-attn's arguments, padding masks."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from . import data
from .algebra import Mask
from .patterns import causal, dense, full, key_padding, window
from .rows import TILE, table_of
from .sequences import from_cu_seqlens
from .structure import Report, recognise

_CHUNK = 2**24  # pairs that are scanned at once


def from_dense(visible: Tensor) -> tuple[Mask, Report]:
    """The mask of a bool tensor, True = visible, and what structure it was found to have.

    visible: [Lq, Lk], [B, Lq, Lk] or [B, H, Lq, Lk]; Lq may be 1 for "all queries". Batches, heads or queries that are
    all equal become one. Patterns with a name come first, then rows of few intervals, then bits.
    Errors: TypeError for other dtypes; ValueError for another device or number of dimensions.
    """
    data.refuse_foreign("visible", visible, (2, 3, 4))
    if visible.dtype != torch.bool:
        raise TypeError(f"visible must be a bool tensor (True = visible), got {visible.dtype}")
    whole = data.leading(visible.detach(), 2)
    B, H = (1 if whole.stride(d) == 0 else whole.shape[d] for d in (0, 1))
    whole = whole[:B, :H]
    Lq, Lk = whole.shape[2:]
    if whole.numel() == 0:
        return dense(visible), Report("empty", 0.0, None)
    step = TILE * max(1, _CHUNK // max(B * H * Lk, 1) // TILE)
    with data.plainly():
        rows = [table_of(whole[:, :, i : i + step]) for i in range(0, Lq, step)]
    return recognise(rows, Lq, Lk)


def from_causal_bias(bias: Any) -> Mask:
    """The mask of torch.nn.attention.bias.causal_lower_right or causal_upper_left; its lengths are left open.

    Errors: TypeError for anything else.
    """
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if not isinstance(bias, CausalBias):
        raise TypeError(f"expected a torch.nn.attention.bias.CausalBias, got {type(bias).__name__}")
    return causal("bottom_right" if bias.variant == CausalVariant.LOWER_RIGHT else "top_left")


def from_flash(
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    cu_seqlens_q: Optional[data.Ints] = None,
    cu_seqlens_k: Optional[data.Ints] = None,
) -> Mask:
    """The mask of flash-attn's arguments: sides of -1 are unbounded, causal is bottom-right, cu_seqlens packs sequences.

    Errors: TypeError, ValueError for sides below -1, and as `from_cu_seqlens`.
    """
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, it means bottom-right in flash-attn; got {causal!r}")
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be (left, right), got {window_size!r}")
    left, right = (None if data.whole("window_size", side, -1) == -1 else side for side in window_size)
    if cu_seqlens_q is not None:
        return from_cu_seqlens(cu_seqlens_q, cu_seqlens_k, causal=causal, window=(left, right))
    if cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k without cu_seqlens_q")
    if (left, right) == (None, None):
        return _causal() if causal else full()
    return _causal() & window(left, right) if causal else window(left, right)


_causal = causal  # from_flash has an argument of this name


def from_padding_mask(attention_mask: Tensor) -> Mask:
    """The mask of a Hugging Face tokenizer: attention_mask [B, Lk], 1 or True for tokens, 0 or False for padding.

    Errors: TypeError, ValueError for other values or shapes (additive masks are biases, not masks).
    """
    keys = data.owned("attention_mask", attention_mask, (2,))
    if bool(((keys != 0) & (keys != 1)).any()):
        raise ValueError("attention_mask must hold 0 (padding) and 1 (token) only; pass additive masks as bias=")
    return key_padding(keys.bool())
