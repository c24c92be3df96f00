"""Packed sequences: which keys they leave visible, as a plan, so that no kernel has to know of them."""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from .. import checks, masks
from ..masks import Mask, TilePlan
from ..masks.data import plainly
from ..params import CAUSAL_NONE, SoftmaxParams, SoftmaxTensors


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
    sides = (params.window_left, params.window_right)
    causal = False if params.causal == CAUSAL_NONE else params.causal
    visible: Mask = masks.from_cu_seqlens(cu_q, cu_k, causal, sides)
    if mask is not None:
        if not isinstance(mask, Mask):
            mask = masks.dense(
                _own_part(checks.bool_mask(mask, (B, Hq, Lq, Lk), x.q.device)).expand(-1, -1, -1, Lk).cpu()
            )
        visible = visible & mask
    checks.slices(visible.slices, (B, Hq))
    plan = visible.plan(Lq, Lk).to(x.q.device)
    params = params._replace(causal=CAUSAL_NONE, window_left=None, window_right=None)
    if not with_diagonal:
        return plan, None, params
    # Sequences are aligned at their ends: key j is at distance 0 from query i where j = i + diagonal[i].
    diagonal = torch.repeat_interleave(cu_k[1:] - cu_q[1:], cu_q.diff())
    return plan, diagonal.to(x.q.device, torch.int32), params


def _own_part(mask: Tensor) -> Tensor:
    """A mask [B, Hq, Lq, Lk] with 1 batch, head or query where it repeats one."""
    for dim in range(3):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask
