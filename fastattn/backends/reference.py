"""Backend "reference": the dense oracle. Plain torch, so autograd, vmap and export see through it."""

from __future__ import annotations

import torch

from ..params import SoftmaxCall, accumulate_dtype, to_layout
from ..philox import keep_mask
from ..reference.softmax import softmax


def status() -> str | None:
    return None


def why_not(call: SoftmaxCall) -> list[str]:
    return []


def describe(call: SoftmaxCall) -> str:
    return "dense torch, O(Lq x Lk) memory"


def softmax_attention(q, k, v, mask, bias, rng, params):
    """Differentiable as it stands; low-precision inputs are computed in fp32."""
    wide = accumulate_dtype(q.dtype)
    Lq, Lk, p = q.shape[2], k.shape[2], params.dropout_p
    keep = None if p == 0 else keep_mask(rng, p, q.shape[0], q.shape[1], (0, Lq), (0, Lk))
    bias = None if bias is None else bias.to(wide)
    q_wide, k_wide, v_wide = (t.to(wide) for t in (q, k, v))
    out, lse = softmax(
        q_wide, k_wide, v_wide, mask, bias, keep, scale=params.scale, band=params.band(Lq, Lk), dropout_p=p
    )
    return to_layout(out.to(q.dtype), q), lse


def softmax_forward(q, k, v, mask, bias, rng, params, with_parts):
    with torch.no_grad():
        out, lse = softmax_attention(q, k, v, mask, bias, rng, params)
        return out, lse, torch.stack((lse, torch.zeros_like(lse)), -1) if with_parts else None


def softmax_backward(dout, dlse, q, k, v, mask, bias, rng, out, parts, params, needs):
    inputs = [None if t is None else t.detach().requires_grad_(need) for t, need in zip((q, k, v, bias), needs)]
    with torch.enable_grad():
        results = softmax_attention(*inputs[:3], mask, inputs[3], rng, params)
    pairs = [(result, grad) for result, grad in zip(results, (dout, dlse)) if grad is not None]
    wanted = [t for t, need in zip(inputs, needs) if need]
    found = iter(torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs]))
    return tuple(next(found) if need else None for need in needs)
