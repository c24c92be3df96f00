"""Backend "reference": the dense oracle. Plain torch, so autograd, vmap and export see through it."""

from __future__ import annotations

from typing import Any

import torch

from ..params import DIFFERENTIABLE, SoftmaxCall, SoftmaxParams, SoftmaxTensors, accumulate_dtype, to_layout
from ..philox import keep_mask
from ..reference.softmax import softmax


def status() -> str | None:
    return None


def why_not(call: SoftmaxCall) -> list[str]:
    return []


def describe(call: SoftmaxCall) -> str:
    return "dense torch, O(Lq x Lk) memory"


def softmax_attention(x: SoftmaxTensors, params: SoftmaxParams):
    """Differentiable as it stands; low-precision inputs are computed in fp32."""
    q, wide = x.q, accumulate_dtype(x.q.dtype)
    Lq, Lk, p = q.shape[2], x.k.shape[2], params.dropout_p
    keep = None if p == 0 else keep_mask(x.rng, p, q.shape[0], q.shape[1], (0, Lq), (0, Lk))
    mask = x.mask if x.plan is None else x.plan.to_dense()
    q_wide, k, v, bias, slopes, sinks = (None if t is None else t.to(wide) for t in x.differentiable())
    out, lse = softmax(
        q_wide, k, v, bias, slopes, sinks, mask, x.diagonal, keep,
        scale=params.scale, band=params.band(Lq, Lk), softcap=params.softcap, dropout_p=p,
    )  # fmt: skip
    return to_layout(out.to(q.dtype), q), lse


def softmax_forward(x: SoftmaxTensors, params: SoftmaxParams, with_parts: bool):
    with torch.no_grad():
        out, lse = softmax_attention(x, params)
        return out, lse, torch.stack((lse, torch.zeros_like(lse)), -1) if with_parts else None


def softmax_backward(dout, dlse, x: SoftmaxTensors, out, parts, params: SoftmaxParams, needs):
    needs = [*needs, False]
    leaves: list[Any] = [
        None if t is None else t.detach().requires_grad_(need) for t, need in zip(x.differentiable(), needs)
    ]
    with torch.enable_grad():
        results = softmax_attention(x._replace(**dict(zip(DIFFERENTIABLE, leaves))), params)
    pairs = [(result, grad) for result, grad in zip(results, (dout, dlse)) if grad is not None]
    wanted = [t for t, need in zip(leaves, needs) if need]
    found = iter(torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs]))
    return tuple(next(found) if need else None for need in needs[:5])
