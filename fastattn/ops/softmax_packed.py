"""Packed sequences: which keys they leave visible, as a plan, so that no kernel has to know of them."""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from .. import checks, masks
from ..masks import Mask, TilePlan
from ..masks.data import plainly
from ..params import CAUSAL_NONE, CAUSAL_TOP_LEFT, SoftmaxParams, SoftmaxTensors


@plainly()
def packed_plan(
    cu_q: Optional[Tensor],
    cu_k: Optional[Tensor],
    mask: Optional[Union[Tensor, Mask, TilePlan]],
    x: SoftmaxTensors,
    params: SoftmaxParams,
    with_diagonal: bool,
) -> tuple[TilePlan, Optional[Tensor], SoftmaxParams]:
    """(plan of causal, window, mask and sequences together, diagonal for ALiBi, params without causal and window)."""
    B, Hq, Lq, Lk = x.q.shape[0], x.q.shape[1], x.q.shape[2], x.k.shape[2]
    if cu_q is None:
        raise ValueError("cu_seqlens_k is given without cu_seqlens_q")
    if B != 1:
        raise ValueError(
            f"packed sequences lie end to end in one batch: with cu_seqlens, B must be 1, got q {list(x.q.shape)}"
        )
    cu_q = checks.cu_seqlens("cu_seqlens_q", cu_q, "q", Lq)
    cu_k = checks.cu_seqlens("cu_seqlens_k", cu_q if cu_k is None else cu_k, "k", Lk)
    if len(cu_q) != len(cu_k):
        raise ValueError(
            f"cu_seqlens_q {list(cu_q.shape)} and cu_seqlens_k {list(cu_k.shape)} must name as many sequences"
        )
    if isinstance(mask, TilePlan):
        raise TypeError("a plan cannot be combined with cu_seqlens: pass the mask object")
    lengths_q = cu_q.diff()
    # Key j is on the diagonal of query i of its sequence where j = i + diagonal[i]: aligned at the ends, or the starts.
    ends, starts = cu_k[1:] - cu_q[1:], cu_k[:-1] - cu_q[:-1]
    diagonal, top_left = (torch.repeat_interleave(d, lengths_q) for d in (ends, starts))
    i = torch.arange(Lq)
    lo = torch.repeat_interleave(cu_k[:-1], lengths_q)
    hi = torch.repeat_interleave(cu_k[1:], lengths_q)
    if params.causal != CAUSAL_NONE:
        hi = torch.minimum(hi, i + 1 + (top_left if params.causal == CAUSAL_TOP_LEFT else diagonal))
    if params.window_left is not None:
        lo = torch.maximum(lo, i + diagonal - params.window_left)
    if params.window_right is not None:
        hi = torch.minimum(hi, i + 1 + diagonal + params.window_right)
    lo = lo.clamp(0, Lk)
    visible: Mask = masks.intervals(lo[:, None], torch.maximum(lo, hi)[:, None])
    if mask is not None:
        if not isinstance(mask, Mask):
            mask = masks.dense(checks.bool_mask(mask, (B, Hq, Lq, Lk), x.q.device).expand(-1, -1, Lq, Lk).cpu())
        visible = visible & mask
    plan = checks.tile_plan(visible.plan(Lq, Lk), (B, Hq, Lq, Lk), x.q.device)
    params = params._replace(causal=CAUSAL_NONE, window_left=None, window_right=None)
    return plan, diagonal.to(x.q.device, torch.int32) if with_diagonal else None, params
