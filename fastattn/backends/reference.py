"""Backend "reference": the dense oracle. Plain torch, so autograd, vmap and export see through it."""

from __future__ import annotations

from typing import Any

import torch

from ..params import (
    DIFFERENTIABLE,
    LINEAR_DIFFERENTIABLE,
    LINEAR_EPS,
    Call,
    LinearParams,
    LinearTensors,
    SoftmaxParams,
    SoftmaxTensors,
    accumulate_dtype,
    to_layout,
)
from ..philox import keep_mask
from ..reference.linear import linear
from ..reference.softmax import softmax


def status() -> str | None:
    return None


def why_not(call: Call) -> list[str]:
    return []


def describe(call: Call) -> str:
    return "dense torch, O(Lq x Lk) memory" if call.op == "softmax" else "torch, token by token"


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


def linear_attention(x: LinearTensors, params: LinearParams):
    """(out, kv, z), differentiable as it stands; low-precision inputs are computed in fp32."""
    q, wide = x.q, accumulate_dtype(x.q.dtype)
    tensors: dict[str, Any] = {
        name: None if t is None else t.to(wide) for name, t in zip(LINEAR_DIFFERENTIABLE, x.differentiable())
    }
    out, kv, z = linear(
        **tensors, key_mask=x.key_mask, cu_seqlens=x.cu_seqlens,
        feature_map=params.feature_map, causal=params.causal, normalize=params.normalize, scale=params.scale, eps=LINEAR_EPS,
    )  # fmt: skip
    out = out.to(q.dtype)
    return to_layout(out, q) if q.shape[1] == out.shape[1] else out, kv, z if params.normalize else None


def linear_saved_shape(x: LinearTensors, params: LinearParams) -> tuple[int, ...]:
    return (0,)


def linear_forward(x: LinearTensors, params: LinearParams, with_saved: bool):
    with torch.no_grad():
        out, kv, z = linear_attention(x, params)
        return out, kv.clone(), None if z is None else z.clone(), None


def linear_backward(dout, dkv, dz, x: LinearTensors, out, saved, params: LinearParams, needs):
    leaves: list[Any] = [
        None if t is None else t.detach().requires_grad_(need) for t, need in zip(x.differentiable(), needs)
    ]
    with torch.enable_grad():
        results = linear_attention(x._replace(**dict(zip(LINEAR_DIFFERENTIABLE, leaves))), params)
    pairs = [(y, dy) for y, dy in zip(results, (dout, dkv, dz)) if dy is not None and y is not None and y.requires_grad]
    wanted = [t for t, need in zip(leaves, needs) if need]
    ys, dys = [y for y, _ in pairs], [dy for _, dy in pairs]
    if not ys:
        return tuple(torch.zeros_like(t) if need else None for t, need in zip(leaves, needs))
    found = iter(torch.autograd.grad(ys, wanted, dys, materialize_grads=True))
    return tuple(next(found) if need else None for need in needs)


def linear_step(x: LinearTensors, params: LinearParams):
    with torch.no_grad():
        out, kv, z = linear_attention(x, params)
        for state, after in ((x.kv, kv), (x.z, z)):
            if state is not None:
                state.copy_(after)
        return out
