"""Linear attention as torch.library ops inside autograd functions: what torch.compile, export and vmap see."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..autograd import apply, fold_batch, full_precision, register, vmap_by_loop
from ..dispatch import BACKENDS
from ..params import (
    LINEAR_DIFFERENTIABLE,
    LinearParams,
    LinearTensors,
    accumulate_dtype,
    empty_like_layout,
    feature_rows,
)

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor? kv, Tensor? z, "
    "Tensor? key_mask, Tensor? cu_seqlens, "
)
_OPTIONS = "str feature_map, bool causal, bool normalize, float scale, int? chunk_size, "
_COUNT = len(LinearTensors._fields)
_PARAMS = len(LinearParams._fields)


def attend(x: LinearTensors, params: LinearParams, backend: str) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """(out, kv, z), differentiable; z is None where nothing is normalised."""
    if torch.compiler.is_compiling():  # Dynamo refuses one tensor as two arguments of an autograd function
        x = x._replace(k=x.k.view_as(x.k), v=x.v.view_as(x.v))
    out, kv, z, _ = apply(LinearAttention, *x, *params, backend)
    return out, kv, z if params.normalize else None


def attend_without_gradient(x: LinearTensors, params: LinearParams, backend: str):
    out, kv, z, _ = linear_forward(*x, *params, False, backend)
    return out, kv, z if params.normalize else None


def _forward(*args):
    x, (*params, with_saved, backend) = LinearTensors(*args[:_COUNT]), args[_COUNT:]
    with full_precision(x.q):
        out, kv, z, saved = BACKENDS[backend].linear_forward(x, LinearParams(*params), with_saved)
    nothing = kv.new_empty(0)
    return out, kv, nothing if z is None else z, kv.new_empty(0) if saved is None else saved


def _forward_fake(*args):
    x, (*options, with_saved, backend) = LinearTensors(*args[:_COUNT]), args[_COUNT:]
    params, wide = LinearParams(*options), accumulate_dtype(x.q.dtype)
    shape = x.state_shape(params.feature_map)
    saved = BACKENDS[backend].linear_saved_shape(x, params) if with_saved else (0,)
    kv, z, saved = (x.q.new_empty(s, dtype=wide) for s in (shape, shape[:3] if params.normalize else (0,), saved))
    return x.empty_out(), kv, z, saved


def _fold(tensors, in_dims, V: int, B: int) -> list[Optional[Tensor]]:
    return [fold_batch(t, dim, V, B) for t, dim in zip(tensors, in_dims)]


def _batch(t: Tensor, dim: Optional[int]) -> int:
    """The batch of one call, of a tensor with or without the vmapped dimension."""
    return t.shape[0] if dim is None else t.shape[int(dim == 0)]


def _unfold(t: Tensor, V: int, B: int) -> Tensor:
    return t.unflatten(0, (V, B)) if t.dim() > 1 else t.expand(V, 0)


def _forward_vmap(info, in_dims, *args):
    x, V = LinearTensors(*args[:_COUNT]), info.batch_size
    if x.cu_seqlens is not None:
        return vmap_by_loop(linear_forward, info, in_dims, args)
    B = _batch(x.q, in_dims[0])
    outputs = linear_forward(*_fold(x, in_dims, V, B), *args[_COUNT:])
    return tuple(_unfold(t, V, B) for t in outputs), (0,) * 4


def _backward(dout, dkv, dz, *args):
    x, (out, saved, *params, needs, backend) = LinearTensors(*args[:_COUNT]), args[_COUNT:]
    with full_precision(x.q):
        grads = BACKENDS[backend].linear_backward(dout, dkv, dz, x, out, saved, LinearParams(*params), needs)
    return tuple(x.q.new_empty(0) if g is None else g for g in grads)


def _backward_fake(dout, dkv, dz, *args):
    x, needs = LinearTensors(*args[:_COUNT]), args[-2]
    grads = [empty_like_layout(t, t.shape[3]) if need else x.q.new_empty(0) for t, need in zip(x[:3], needs)]
    rest = [t.new_empty(t.shape) if t is not None and need else x.q.new_empty(0) for t, need in zip(x[3:7], needs[3:])]
    return (*grads, *rest)


def _backward_vmap(info, in_dims, *args):
    x, V = LinearTensors(*args[3 : 3 + _COUNT]), info.batch_size
    if x.cu_seqlens is not None:
        return vmap_by_loop(linear_backward, info, in_dims, args)
    B, end = _batch(x.q, in_dims[3]), 4 + _COUNT  # `saved` comes after out, which ends there
    saved = args[end]
    kept = saved.dim() > 1 + (in_dims[end] is not None)
    saved = fold_batch(saved, in_dims[end], V, B) if kept else saved.new_empty(0)
    grads = linear_backward(*_fold(args[:end], in_dims[:end], V, B), saved, *args[end + 1 :])
    return tuple(_unfold(g, V, B) for g in grads), (0,) * len(grads)


def _forward_flops(q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    """Each token's update of the state and read-out of it."""
    feature_map = next((a for a in args if isinstance(a, str)), "identity")
    B, Hq, Lq, D = q_shape
    state = feature_rows(feature_map, D) * v_shape[3]
    states, heads = max(k_shape[1], v_shape[1]), max(Hq, k_shape[1], v_shape[1])
    return 2 * B * state * (heads * Lq + states * k_shape[2])


def _backward_flops(dout_shape, dkv_shape, dz_shape, q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    """One such pass for each of dq, dk and dv."""
    return 3 * _forward_flops(q_shape, k_shape, v_shape, *args)


# `saved` is what the backend keeps for its backward pass (`linear_saved_shape`); empty without with_saved.
linear_forward = register(
    "linear_forward",
    f"({_TENSORS}{_OPTIONS}bool with_saved, str backend) -> (Tensor out, Tensor kv, Tensor z, Tensor saved)",
    _forward,
    _forward_fake,
    _forward_vmap,
    _forward_flops,
)
linear_backward = register(
    "linear_backward",
    f"(Tensor dout, Tensor? dkv, Tensor? dz, {_TENSORS}Tensor out, Tensor saved, {_OPTIONS}bool[] needs, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor ddecay, Tensor dbeta, Tensor dkv0, Tensor dz0)",
    _backward,
    _backward_fake,
    _backward_vmap,
    _backward_flops,
)


def step(x: LinearTensors, params: LinearParams, backend: str) -> Tensor:
    """One token, whose kv and z are advanced in place."""
    return linear_step(*x.differentiable(), params.feature_map, params.normalize, params.scale, backend)


def _step(*args):
    x, (feature_map, normalize, scale, backend) = LinearTensors(*args[:7]), args[7:]
    with full_precision(x.q):
        return BACKENDS[backend].linear_step(x, LinearParams(feature_map, True, normalize, scale))


def _step_fake(*args):
    return LinearTensors(*args[:7]).empty_out()


def _step_vmap(info, in_dims, *args):
    raise NotImplementedError("linear_attention_step writes in place; use linear_attention under vmap")


linear_step = register(
    "linear_step",
    "(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor(a!) kv, Tensor(b!)? z, "
    "str feature_map, bool normalize, float scale, str backend) -> Tensor",
    _step,
    _step_fake,
    _step_vmap,
    _forward_flops,
)


# Arguments are named one by one below: Dynamo counts the parameters of `forward`.
class LinearAttention(torch.autograd.Function):
    """(*LinearTensors, *LinearParams, backend) -> (out, kv, z, saved)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q, k, v, decay, beta, kv, z, key_mask, cu_seqlens,
        feature_map, causal, normalize, scale, chunk_size, backend,
    ):  # fmt: skip
        return linear_forward(
            q, k, v, decay, beta, kv, z, key_mask, cu_seqlens,
            feature_map, causal, normalize, scale, chunk_size, True, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        out, _, z, saved = output
        ctx.options = inputs[_COUNT:]
        ctx.mark_non_differentiable(*((saved,) if LinearParams(*inputs[_COUNT:-1]).normalize else (z, saved)))
        ctx.save_for_backward(*inputs[:_COUNT], out, saved)

    @staticmethod
    def backward(ctx, dout, dkv, dz, _):
        *tensors, out, saved = ctx.saved_tensors
        *params, backend = ctx.options
        needs = list(ctx.needs_input_grad[: len(LINEAR_DIFFERENTIABLE)])
        if not LinearParams(*params).normalize:
            dz = None  # a traced graph hands in zeros for every output
        if dout is None:
            if dkv is None and dz is None:
                return (None,) * (_COUNT + _PARAMS + 1)
            dout = out.new_zeros(()).expand_as(out)
        grads = apply(LinearAttentionBackward, dout, dkv, dz, *tensors, out, saved, *params, needs, backend)
        wanted = (g if need else None for g, need in zip(grads, needs))
        return (*wanted, *(None,) * (_COUNT - len(needs) + _PARAMS + 1))


class LinearAttentionBackward(torch.autograd.Function):
    """The gradient as a function of its own, so that whoever differentiates it is told."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dout, dkv, dz, q, k, v, decay, beta, kv, z, key_mask, cu_seqlens, out, saved,
        feature_map, causal, normalize, scale, chunk_size, needs, backend,
    ):  # fmt: skip
        return linear_backward(
            dout, dkv, dz, q, k, v, decay, beta, kv, z, key_mask, cu_seqlens, out, saved,
            feature_map, causal, normalize, scale, chunk_size, needs, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *cotangents):
        raise RuntimeError("linear attention has no second derivative on this backend; backend='reference' has all")
