"""Softmax attention with a mask or bias at most, on the native backend, by the shortest way: for calls of microseconds.

The general call checks and describes what it is asked to do step by step, which costs as much as a small kernel. Here
C++ looks at q, k and v once; whatever is unusual about them is left to the general call, complaints included.
"""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor

from ..autograd import apply, ordinary
from ..checks import causal_mode
from ..dispatch import BACKENDS
from ..params import SoftmaxParams, SoftmaxTensors
from .softmax_autograd import SoftmaxAttentionBackward


def plain_attention(q, k, v, mask, scale, causal, grouped: bool = True) -> Optional[Tensor]:
    """out, differentiable; None where the general call is to be made. `mask` is a bool mask, a bias or None."""
    if not (scale is None or type(scale) is float) or type(causal) not in (bool, str) or not ordinary():
        return None
    if torch.is_autocast_enabled("cpu") and getattr(q, "dtype", None) is not torch.get_autocast_dtype("cpu"):
        return None
    found = BACKENDS["native"].softmax_plain_forward(q, k, v, mask, scale, causal, grouped)
    return PlainAttention.apply(q, k, v, mask, found, scale, causal) if type(found) is tuple else found


class PlainAttention(torch.autograd.Function):
    """(q, k, v, mask, (out, lse_parts), scale, causal) -> out, whose backward is to be had."""

    @staticmethod
    def forward(
        ctx, q, k, v, mask, found: tuple[Tensor, Tensor], scale: Optional[float], causal: Union[bool, str]
    ) -> Tensor:
        ctx.options = scale, causal
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, mask, *found)
        return found[0]

    @staticmethod
    def backward(ctx, dout: Optional[Tensor]) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * 7
        q, k, v, mask, out, parts = ctx.saved_tensors
        scale, causal = ctx.options
        needs = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled() and ordinary():
            grads = BACKENDS["native"].softmax_plain_backward(dout, q, k, v, mask, out, parts, needs, scale, causal)
            if grads is not None:
                return (*grads, None, None, None, None)
        x = SoftmaxTensors(q, k, v)
        if mask is not None:
            mask = mask[(None,) * (4 - mask.dim())]
            x = x._replace(mask=mask) if mask.dtype == torch.bool else x._replace(bias=mask)
        params = SoftmaxParams(q.shape[3] ** -0.5 if scale is None else scale, causal_mode(causal))
        needs = [*needs, False, False, False]
        grads = apply(SoftmaxAttentionBackward, dout, None, *x[:-1], *(None,) * 7, out, parts, *params, needs, "native")
        return (*(g if need else None for g, need in zip(grads[:3], needs)), None, None, None, None)
