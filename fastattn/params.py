"""What one call asks for: the only objects that travel from the public function to a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .masks.plan import TilePlan

CAUSAL_NONE, CAUSAL_TOP_LEFT, CAUSAL_BOTTOM_RIGHT = "none", "top_left", "bottom_right"


class SoftmaxParams(NamedTuple):
    """Options of one softmax attention call, normalised (see `fastattn.attention` for their meaning)."""

    scale: float
    causal: str = CAUSAL_NONE
    window_left: Optional[int] = None
    window_right: Optional[int] = None
    softcap: float = 0.0  # 0: none
    dropout_p: float = 0.0

    def band(self, Lq: int, Lk: int) -> tuple[Optional[int], Optional[int]]:
        """(lo, hi): key j is visible to query i only if lo <= j - i <= hi; None is unbounded."""
        shift = Lk - Lq
        lo = None if self.window_left is None else shift - self.window_left
        hi = None if self.window_right is None else shift + self.window_right
        if self.causal != CAUSAL_NONE:
            diagonal = 0 if self.causal == CAUSAL_TOP_LEFT else shift
            hi = diagonal if hi is None else min(hi, diagonal)
        return lo, hi


class SoftmaxTensors(NamedTuple):
    """The tensors of one call. The first six are differentiable; `wide` is float32, or float64 for float64 inputs."""

    q: Tensor  # [B, Hq, Lq, D]
    k: Tensor  # [B, Hk, Lk, D]
    v: Tensor  # [B, Hk, Lk, Dv]
    bias: Optional[Tensor] = None  # dtype of q or float32 [B|1, Hq|1, Lq|1, Lk|1]
    slopes: Optional[Tensor] = None  # wide [B|1, Hq]: subtracts slopes * |i + diagonal[i] - j| from a logit
    sinks: Optional[Tensor] = None  # wide [Hq]: exp(sinks) enters the denominator
    mask: Optional[Tensor] = None  # bool [B|1, Hq|1, Lq|1, Lk|1]; not together with a plan
    diagonal: Optional[Tensor] = None  # int32 [Lq]; None is Lk - Lq in every row
    rng: Optional[Tensor] = None  # int64 [2]: seed and offset of the dropout bits
    plan: Optional[TilePlan] = None

    def differentiable(self) -> tuple[Any, ...]:
        return self[:6]


DIFFERENTIABLE: tuple[str, ...] = SoftmaxTensors._fields[:6]


class SoftmaxCall(NamedTuple):
    """One call as dispatch sees it: tensors, options, and whether a gradient will be asked for."""

    x: SoftmaxTensors
    params: SoftmaxParams
    needs_grad: bool

    @property
    def op(self) -> str:
        return "softmax"


def _memory_order(q: Tensor) -> tuple[int, int, int]:
    """The first three dimensions of q, outermost in memory first."""
    strides = q.stride()
    if strides[0] >= strides[1] >= strides[2]:
        return 0, 1, 2
    if strides[0] >= strides[2] >= strides[1]:
        return 0, 2, 1
    first, second, third = sorted(range(3), key=lambda dim: -strides[dim])
    return first, second, third


def empty_like_layout(q: Tensor, last: int, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Uninitialised [B, H, L, last] whose dimensions lie in memory in the order of q's (out follows q)."""
    if dtype is None and q.shape[3] == last and q.is_contiguous():
        return torch.empty_like(q)  # half the cost of new_empty, which shows where a call takes microseconds
    order = _memory_order(q)
    if order == (0, 1, 2):
        return q.new_empty((*q.shape[:3], last), dtype=dtype)
    inverse = [order.index(dim) for dim in range(3)]
    return q.new_empty([q.shape[dim] for dim in order] + [last], dtype=dtype).permute(*inverse, 3)


def to_layout(out: Tensor, q: Tensor) -> Tensor:
    """out, moved where its dimensions do not lie in memory in the order of q's; differentiable."""
    order = _memory_order(q)
    inverse = [order.index(dim) for dim in range(3)]
    return out.permute(*order, 3).contiguous().permute(*inverse, 3)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax, lse and all sums are kept in this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
