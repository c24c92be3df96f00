"""Linear attention without a state, a key mask or packed sequences, and single steps, by the shortest way.

For calls of microseconds, as softmax_plain.py: C++ looks at the tensors once, and leaves what is unusual to the general
call, complaints included.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from ..autograd import apply, ordinary
from ..dispatch import BACKENDS
from ..params import LinearParams, LinearTensors, accumulate_dtype, normalized
from .linear_autograd import LinearAttentionBackward

Options = tuple[str, bool, bool, Optional[float]]  # feature_map, causal, normalize, scale


def plain_linear_attention(q, k, v, feature_map, causal, decay, beta, normalize, scale) -> Optional[Tensor]:
    """out, differentiable; None where the general call is to be made."""
    if type(causal) is not bool or not _usual(feature_map, normalize, scale):
        return None
    if torch.is_autocast_enabled("cpu") and getattr(q, "dtype", None) is not torch.get_autocast_dtype("cpu"):
        return None
    options = feature_map, causal, normalized(feature_map, normalize), scale
    found = BACKENDS["native"].linear_plain_forward(q, k, v, decay, beta, *options)
    return PlainLinearAttention.apply(q, k, v, decay, beta, found, options) if type(found) is tuple else found


def plain_step(q, k, v, state, feature_map, decay, beta, normalize, scale) -> Optional[Tensor]:
    """out of a step; None where the general call is to be made."""
    if not _usual(feature_map, normalize, scale) or torch.is_autocast_enabled("cpu"):
        return None
    kv, z = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    x = LinearTensors(q, k, v, decay, beta, kv, z)
    return BACKENDS["native"].linear_plain_step(x, feature_map, normalized(feature_map, normalize), scale)


def _usual(feature_map, normalize, scale) -> bool:
    known = type(feature_map) is str and (normalize is None or type(normalize) is bool)
    return known and (scale is None or type(scale) is float) and ordinary()


class PlainLinearAttention(torch.autograd.Function):
    """(q, k, v, decay, beta, (out, saved), options) -> out, whose backward is to be had."""

    @staticmethod
    def forward(ctx, q, k, v, decay, beta, found: tuple[Tensor, Optional[Tensor]], options: Options) -> Tensor:
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, decay, beta, *found)
        return found[0]

    @staticmethod
    def backward(ctx, dout: Optional[Tensor]) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * 7
        q, k, v, decay, beta, out, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        if not torch.is_grad_enabled() and ordinary():
            tensors = q, k, v, decay, beta, out, saved
            grads = BACKENDS["native"].linear_plain_backward(dout, *tensors, needs, ctx.options)
            if grads is not None:
                return (*grads, None, None)
        feature_map, causal, normalize, scale = ctx.options
        if decay is not None and decay.dim() == 1:
            decay = decay[None, :, None].expand(q.shape[0], -1, k.shape[2])
        x = LinearTensors(q, k, v, decay, beta)
        if saved is None:
            saved = q.new_empty(0, dtype=accumulate_dtype(q.dtype))
        elif beta is None:
            saved = saved[..., 0]
        params = LinearParams(feature_map, causal, normalize, q.shape[3] ** -0.5 if scale is None else scale)
        wanted = [*needs, False, False]
        grads = apply(LinearAttentionBackward, dout, None, None, *x, out, saved, *params, wanted, "native")
        return (*(g if need else None for g, need in zip(grads, needs)), None, None)
