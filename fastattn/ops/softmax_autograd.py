"""Softmax attention as torch.library ops inside autograd functions: what torch.compile, export and vmap see."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor

from ..autograd import RefuseGradient, apply, fold_batch, full_precision, register, transformed, vmap_by_loop
from ..dispatch import BACKENDS
from ..eager.softmax import softmax_double_backward
from ..masks.plan import TilePlan
from ..params import (
    CAUSAL_BOTTOM_RIGHT,
    CAUSAL_NONE,
    CAUSAL_TOP_LEFT,
    DIFFERENTIABLE,
    SoftmaxParams,
    SoftmaxTensors,
    accumulate_dtype,
    empty_like_layout,
)

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? slopes, Tensor? sinks, "
    "Tensor? mask, Tensor? diagonal, Tensor? rng, Tensor[] plan, "
)
_OPTIONS = (
    "float scale, str causal, SymInt? window_left, SymInt? window_right, float softcap, float dropout_p, "
    "bool deterministic, "
)
_PLAN = SoftmaxTensors._fields.index("plan")  # place of the plan among the tensors
_END = _PLAN + 7  # tensors of a call, the plan's one by one


def attend(x: SoftmaxTensors, params: SoftmaxParams, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable."""
    if torch.compiler.is_compiling():  # Dynamo refuses one tensor as two arguments of an autograd function
        x = x._replace(k=x.k.view_as(x.k), v=x.v.view_as(x.v))
    *tensors, plan = x
    fields = (None,) * 7 if plan is None else plan.tensors()
    return apply(SoftmaxAttention, *tensors, *fields, *params, backend)[:2]


def attend_without_gradient(x: SoftmaxTensors, params: SoftmaxParams, backend: str) -> tuple[Tensor, Tensor]:
    *tensors, plan = x
    return softmax_forward(*tensors, [] if plan is None else plan.tensors(), *params, False, backend)[:2]


def _tensors(args) -> SoftmaxTensors:
    """From the tensors of an op, the plan's in a list."""
    *_, plan = args
    x = SoftmaxTensors(*args)
    return x._replace(plan=TilePlan.of(plan, x.q.shape[2], x.k.shape[2]) if plan else None)


def _params(options) -> SoftmaxParams:
    """Of an op, which anyone may call."""
    params = SoftmaxParams(*options)
    if params.causal not in (CAUSAL_NONE, CAUSAL_TOP_LEFT, CAUSAL_BOTTOM_RIGHT):
        raise ValueError(f'causal must be "none", "top_left" or "bottom_right", got {params.causal!r}')
    return params


def _nothing(q: Tensor) -> Tensor:
    """What an op returns in place of None."""
    return q.new_empty(0)


# lse_parts [B, Hq, Lq, 2], in the dtype of lse: the largest score of a row, or (native) one not far below, in the unit
# of its backend, and the log of the sum of weights relative to it; (0, -inf) where the row sees nothing. The backward
# pass reads it in place of lse, which at 1e5 has lost the log and at 1e30 the differences of scores as well. Without
# with_parts it is empty.


def _forward(*args):
    x, (*params, with_parts, backend) = _tensors(args[: _PLAN + 1]), args[_PLAN + 1 :]
    with full_precision(x.q):
        out, lse, parts = BACKENDS[backend].softmax_forward(x, _params(params), with_parts)
    return out, lse, _nothing(x.q) if parts is None else parts


def _forward_fake(q, k, v, *args):
    with_parts = args[-2]
    lse = q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
    return empty_like_layout(q, v.shape[3]), lse, lse.new_empty((*q.shape[:3], 2)) if with_parts else _nothing(q)


def _must_loop(tensors, in_dims, dropout_p: float) -> bool:
    """Whether folding the vmapped dimension into the batch would change what the call means."""
    x, dims = _tensors(tensors), SoftmaxTensors(*in_dims)
    plan_by_batch = x.plan is not None and x.plan.batches > 1
    return dropout_p > 0 or x.sinks is not None or dims.diagonal is not None or plan_by_batch


def _fold(args, in_dims, V: int) -> tuple[list[Optional[Tensor]], int]:
    """Tensors with the vmapped dimension folded into their batch, and the batch of one call."""
    at = next(i for i, t in enumerate(args) if t is not None and t.dim() - (in_dims[i] is not None) == 4)
    B = args[at].shape[0 if in_dims[at] is None else int(in_dims[at] == 0)]
    return [fold_batch(t, dim, V, B) for t, dim in zip(args, in_dims)], B


def _forward_vmap(info, in_dims, *args):
    tensors, options = args[: _PLAN + 1], args[_PLAN + 1 :]
    *params, with_parts, _ = options
    if _must_loop(tensors, in_dims[: _PLAN + 1], SoftmaxParams(*params).dropout_p):
        return vmap_by_loop(softmax_forward, info, in_dims, args)
    V = info.batch_size
    folded, B = _fold(tensors[:7], in_dims[:7], V)
    *outputs, parts = softmax_forward(*folded, *tensors[7:], *options)
    split = [t.unflatten(0, (V, B)) for t in outputs]
    return (*split, parts.unflatten(0, (V, B)) if with_parts else parts.expand(V, 0)), (0, 0, 0)


def _backward(dout, dlse, *args):
    x, (out, parts, *options) = _tensors(args[: _PLAN + 1]), args[_PLAN + 1 :]
    *params, needs, backend = options
    with full_precision(x.q):
        grads = [*BACKENDS[backend].softmax_backward(dout, dlse, x, out, parts, _params(params), needs[:5])]
        if needs[5]:
            natural = parts * math.log(2) if getattr(BACKENDS[backend], "LOG2_PARTS", False) else parts
            grads.append(_sink_gradient(dout, dlse, x.sinks, out, natural))
        else:
            grads.append(None)
    return tuple(_nothing(x.q) if g is None else g for g in grads)


def _sink_gradient(dout, dlse, sinks, out, parts) -> Tensor:
    """A sink is one more key with value 0: dsink = -P (rowsum(dout * out) - dlse), P = exp(sink - lse).

    With sinks the parts of lse are a logit and a log on every backend, some of which count in powers of two.
    """
    top, log = parts.unbind(-1)
    delta = torch.linalg.vecdot(dout.to(parts.dtype), out.to(parts.dtype))
    if dlse is not None:
        delta = delta - dlse
    # The log is -inf only where a sink of -inf is alone.
    p = torch.exp(sinks[:, None] - top - log.masked_fill(log == -torch.inf, torch.inf))
    return -(p * delta).sum((0, 2))


def _backward_fake(dout, dlse, *args):
    x, needs = SoftmaxTensors(*args[: _PLAN + 1]), args[-2]
    grads = [empty_like_layout(t, t.shape[3]) if need else _nothing(x.q) for t, need in zip(x[:3], needs)]
    rest = [t.new_empty(t.shape) if need else _nothing(x.q) for t, need in zip(x[3:6], needs[3:])]
    return (*grads, *rest)


def _backward_vmap(info, in_dims, *args):
    tensors, options = args[2 : 3 + _PLAN], args[5 + _PLAN :]
    *params, needs, _ = options
    if _must_loop(tensors, in_dims[2 : 3 + _PLAN], SoftmaxParams(*params).dropout_p):
        return vmap_by_loop(softmax_backward, info, in_dims, args)
    V, end = info.batch_size, 3 + _PLAN
    (dout, dlse, *folded), B = _fold(args[:9], in_dims[:9], V)
    (out, parts), _ = _fold(args[end : end + 2], in_dims[end : end + 2], V)
    grads = softmax_backward(dout, dlse, *folded, *args[9:end], out, parts, *options)
    split = [g.unflatten(0, (V, B)) if need else g.expand(V, 0) for g, need in zip(grads, needs)]
    for i in (3, 4):  # bias and slopes may have been expanded along the batch
        t, dim = tensors[i], in_dims[2 + i]
        if needs[i] and B != 1 and t.shape[0 if dim is None else int(dim == 0)] == 1:
            split[i] = split[i].sum(1, keepdim=True)
    return tuple(split), (0,) * len(split)


def _pairs(q_shape, k_shape, v_shape) -> tuple[int, int, int]:
    B, H, Lq, D = q_shape
    return B * H * Lq * k_shape[2], D, v_shape[3]


def _forward_flops(q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    pairs, D, Dv = _pairs(q_shape, k_shape, v_shape)
    return 2 * pairs * (D + Dv)


def _backward_flops(dout_shape, dlse_shape, q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    pairs, D, Dv = _pairs(q_shape, k_shape, v_shape)
    return 2 * pairs * (3 * D + 2 * Dv)


softmax_forward = register(
    "softmax_forward",
    f"({_TENSORS}{_OPTIONS}bool with_parts, str backend) -> (Tensor out, Tensor lse, Tensor lse_parts)",
    _forward,
    _forward_fake,
    _forward_vmap,
    _forward_flops,
)
softmax_backward = register(
    "softmax_backward",
    f"(Tensor dout, Tensor? dlse, {_TENSORS}Tensor out, Tensor lse_parts, {_OPTIONS}bool[] needs, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dslopes, Tensor dsinks)",
    _backward,
    _backward_fake,
    _backward_vmap,
    _backward_flops,
)


# Arguments are named one by one below: Dynamo counts the parameters of `forward`.
class SoftmaxAttention(torch.autograd.Function):
    """(*SoftmaxTensors, its plan as seven tensors, *SoftmaxParams, backend) -> (out, lse, lse_parts for backward)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q, k, v, bias, slopes, sinks, mask, diagonal, rng,
        row_start, rows, column_start, columns, words, row_order, column_order,
        scale, causal, window_left, window_right, softcap, dropout_p, deterministic, backend,
    ):  # fmt: skip
        plan = [] if rows is None else [row_start, rows, column_start, columns, words, row_order, column_order]
        return softmax_forward(
            q, k, v, bias, slopes, sinks, mask, diagonal, rng, plan,
            scale, causal, window_left, window_right, softcap, dropout_p, deterministic, True, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.options = inputs[_END:]
        out, _, parts = output
        ctx.mark_non_differentiable(parts)
        ctx.save_for_backward(*inputs[:_END], out, parts)

    @staticmethod
    def backward(ctx, dout, dlse, _):
        *tensors, out, parts = ctx.saved_tensors
        *params, backend = ctx.options
        needs = list(ctx.needs_input_grad[: len(DIFFERENTIABLE)])
        if dout is None:
            if dlse is None:
                return (None,) * (_END + len(ctx.options))
            dout = out.new_zeros(()).expand_as(out)
        grads = apply(SoftmaxAttentionBackward, dout, dlse, *tensors, out, parts, *params, needs, backend)
        wanted = (g if need else None for g, need in zip(grads, needs))
        return (*wanted, *(None,) * (_END + len(ctx.options) - len(needs)))


class SoftmaxAttentionBackward(torch.autograd.Function):
    """The gradient as a function of its own, so that it has a gradient too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dout, dlse, q, k, v, bias, slopes, sinks, mask, diagonal, rng,
        row_start, rows, column_start, columns, words, row_order, column_order, out, parts,
        scale, causal, window_left, window_right, softcap, dropout_p, deterministic, needs, backend,
    ):  # fmt: skip
        plan = [] if rows is None else [row_start, rows, column_start, columns, words, row_order, column_order]
        return softmax_backward(
            dout, dlse, q, k, v, bias, slopes, sinks, mask, diagonal, rng, plan, out, parts,
            scale, causal, window_left, window_right, softcap, dropout_p, deterministic, needs, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        *ctx.params, ctx.needs, _ = inputs[_END + 4 :]
        ctx.save_for_backward(*inputs[: _END + 2])

    @staticmethod
    def backward(ctx, *cotangents):
        dout, dlse, *tensors = ctx.saved_tensors
        wanted = [c if need else None for c, need in zip(cotangents, ctx.needs)]
        count = _END + 4 + len(ctx.params) + 2
        if all(c is None for c in wanted):
            return (None,) * count
        if transformed():
            raise RuntimeError(
                "torch.func takes one derivative of attention; for a second one use backend='reference', or "
                "torch.autograd.grad(..., create_graph=True)"
            )
        plan = tensors[_PLAN:]
        x = _tensors((*tensors[:_PLAN], [] if plan[0] is None else plan))
        with full_precision(x.q), torch.no_grad():
            grads: Any = softmax_double_backward(wanted, dout, dlse, x, SoftmaxParams(*ctx.params))
        if torch.is_grad_enabled():
            message = "attention has no third derivative; backend='reference' has all"
            grads = RefuseGradient.apply(message, len(grads), *grads, *wanted, dout, dlse, *x.differentiable())
        return (*grads, *(None,) * (count - len(grads)))
