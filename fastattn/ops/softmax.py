"""Softmax attention: the public function, its torch.library ops and its gradients."""

from __future__ import annotations

from typing import Literal, Optional, Union, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import checks
from ..autograd import (
    RefuseGradient,
    autocast,
    fold_batch,
    full_precision,
    register,
    transformed,
    unobserved,
    vmap_by_loop,
)
from ..dispatch import BACKENDS, Explanation, select
from ..dispatch import explain as explain_call
from ..eager.softmax import softmax_double_backward
from ..params import SoftmaxCall, SoftmaxParams, accumulate_dtype, empty_like_layout

Causal = Union[bool, Literal["top_left", "bottom_right"]]


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options) -> Tensor: ...
@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options) -> tuple[Tensor, Tensor]: ...
def attention(  # type: ignore[misc]  # the overloads leave the options to this signature
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    causal: Causal = False,
    window: checks.Window = None,
    dropout_p: float = 0.0,
    scale: Optional[float] = None,
    return_lse: bool = False,
    backend: str = "auto",
):
    """Softmax attention, exact, without forming the Lq x Lk matrix (Vaswani et al. 2017; Dao et al. 2022).

        z_ij  = scale * q_i . k_j + bias_ij          over visible keys j
        lse_i = log sum_j exp(z_ij)                  natural log
        out_i = sum_j dropout(exp(z_ij - lse_i)) v_j

    Args:
        q: [B, Hq, Lq, D], float32, bfloat16, float16 or float64. Any strides are read in place.
        k: [B, Hk, Lk, D]. Hq is a multiple of Hk; query head h reads key head h // (Hq / Hk) (GQA, MQA).
        v: [B, Hk, Lk, Dv]. Dv may differ from D.
        mask: bool, broadcastable to [B, Hq, Lq, Lk]; True means visible.
        bias: float (dtype of q, or float32), broadcastable to [B, Hq, Lq, Lk], never expanded; differentiable, the
            gradient has bias's own shape. -inf entries mean masked.
        causal: False, "top_left" (key j visible iff j <= i) or "bottom_right" (j <= i + Lk - Lq). True means
            bottom_right, the convention of decoding. Both agree when Lq == Lk.
        window: (left, right) in tokens: visible iff -left <= j - (i + Lk - Lq) <= right; None is unbounded.
            Combines with causal and mask by AND.
        dropout_p: probability in [0, 1] of dropping a weight; the others are divided by 1 - dropout_p. Bits come
            from Philox4x32-10 and do not depend on the backend; seed and offset come from torch's generator.
        scale: defaults to D ** -0.5. Any finite value.
        return_lse: also return lse.
        backend: "auto", "native" (C++ on CPU), "triton", "eager" (torch, O(L) memory) or "reference" (dense torch).
            A named backend never falls back: it raises with its reasons.

    Returns:
        out [B, Hq, Lq, Dv] in the dtype of q and its memory layout; with return_lse also lse [B, Hq, Lq] in float32
        (float64 for float64 inputs), differentiable like out. A row that sees no key gives out 0, lse -inf and
        gradients 0. Keys hidden from every query may hold NaN or Inf.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, the shapes and the way out.
        UnsupportedError: the backend asked for (or every backend) refuses; the message lists the reasons.

    Double backward runs through torch ops in O(L) memory. Forward-mode AD raises NotImplementedError.
    Call `fastattn.explain` with the same arguments to see which kernel runs, and why.
    """
    call = _call(q, k, v, mask, bias, causal, window, dropout_p, scale)
    out, lse = _run(call, select(call, backend))
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    causal: Causal = False,
    window: checks.Window = None,
    dropout_p: float = 0.0,
    scale: Optional[float] = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Explanation:
    """Takes the arguments of `attention`; returns a table of every backend: chosen, or the reasons why not."""
    return explain_call(_call(q, k, v, mask, bias, causal, window, dropout_p, scale), backend)


def _call(q, k, v, mask, bias, causal, window, dropout_p, scale) -> SoftmaxCall:
    """Checks what the arguments mean and normalises them."""
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        q, k, v = autocast(q, k, v)
    checks.qkv(q, k, v)
    if mask is not None or bias is not None:
        target = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        mask = None if mask is None else checks.bool_mask(mask, target, q.device)
        bias = None if bias is None else checks.float_bias(bias, q, target)
    params = SoftmaxParams(
        checks.scale_value(scale, q.shape[3]),
        checks.causal_mode(causal),
        *checks.window_sides(window),
        checks.probability(dropout_p),
    )
    needs_grad = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad)
    )
    return SoftmaxCall(q, k, v, mask, bias, params, needs_grad)


def _run(call: SoftmaxCall, backend: str) -> tuple[Tensor, Tensor]:
    q, k, v, mask, bias, params, needs_grad = call
    rng = None
    if params.dropout_p > 0:
        rng = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=q.device)
    if backend == "reference":
        with full_precision(q):
            return BACKENDS["reference"].softmax_attention(q, k, v, mask, bias, rng, params)
    # A dual tensor must meet the autograd function, which refuses it; the bare op would drop the tangent.
    if needs_grad or forward_ad._current_level >= 0 or transformed():
        return SoftmaxAttention.apply(q, k, v, mask, bias, rng, *params, backend)[:2]
    # The op costs as much as a small kernel; where nobody looks, its implementation is called directly.
    if unobserved(q, k, v, mask, bias):
        with full_precision(q):
            return BACKENDS[backend].softmax_forward(q, k, v, mask, bias, rng, params, False)[:2]
    return softmax_forward(q, k, v, mask, bias, rng, *params, False, backend)[:2]


_OPTIONS = "float scale, str causal, int? window_left, int? window_right, float dropout_p, "
_QKV = "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? rng, "
_FORWARD_TENSORS, _BACKWARD_TENSORS = 6, 10

# lse_parts [B, Hq, Lq, 2], in the dtype of lse: the largest score of a row, in the unit of its backend, and the log of the
# sum of weights relative to it; (0, -inf) where the row sees nothing. The backward pass reads it in place of lse, which
# at 1e5 has lost the log and at 1e30 the differences of scores as well. Without with_parts it is empty.


def _forward(q, k, v, mask, bias, rng, *options):
    *params, with_parts, backend = options
    with full_precision(q):
        out, lse, parts = BACKENDS[backend].softmax_forward(
            q, k, v, mask, bias, rng, SoftmaxParams(*params), with_parts
        )
    return out, lse, q.new_empty(0) if parts is None else parts


def _forward_fake(q, k, v, mask, bias, rng, *options):
    lse = q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
    return empty_like_layout(q, v.shape[3]), lse, lse.new_empty((*q.shape[:3], 2)) if options[-2] else q.new_empty(0)


def _forward_vmap(info, in_dims, *args):
    q, q_dim, p, with_parts = args[0], in_dims[0], args[10], args[11]
    if p > 0:
        return vmap_by_loop(softmax_forward, info, in_dims, args)
    V = info.batch_size
    B = q.shape[0 if q_dim is None else int(q_dim == 0)]
    folded = [fold_batch(t, dim, V, B) for t, dim in zip(args[:_FORWARD_TENSORS], in_dims)]
    *outputs, parts = softmax_forward(*folded, *args[_FORWARD_TENSORS:])
    split = [t.unflatten(0, (V, B)) for t in outputs]
    return (*split, parts.unflatten(0, (V, B)) if with_parts else parts.expand(V, 0)), (0, 0, 0)


def _backward(dout, dlse, q, k, v, mask, bias, rng, out, parts, *options):
    *params, needs, backend = options
    run = BACKENDS[backend].softmax_backward
    with full_precision(q):
        grads = run(dout, dlse, q, k, v, mask, bias, rng, out, parts, SoftmaxParams(*params), needs)
    return tuple(q.new_empty(0) if g is None else g for g in grads)


def _backward_fake(dout, dlse, q, k, v, mask, bias, rng, out, parts, *options):
    needs = options[-2]
    grads = [empty_like_layout(t, t.shape[3]) if need else q.new_empty(0) for t, need in zip((q, k, v), needs)]
    return (*grads, bias.new_empty(bias.shape) if needs[3] else q.new_empty(0))


def _backward_vmap(info, in_dims, *args):
    q, q_dim, p, needs = args[2], in_dims[2], args[14], args[15]
    if p > 0:
        return vmap_by_loop(softmax_backward, info, in_dims, args)
    V = info.batch_size
    B = q.shape[0 if q_dim is None else int(q_dim == 0)]
    folded = [fold_batch(t, dim, V, B) for t, dim in zip(args[:_BACKWARD_TENSORS], in_dims)]
    grads = softmax_backward(*folded, *args[_BACKWARD_TENSORS:])
    split = [g.unflatten(0, (V, B)) if need else g.expand(V, 0) for g, need in zip(grads, needs)]
    bias, bias_dim = args[6], in_dims[6]
    if needs[3] and B != 1 and bias.shape[0 if bias_dim is None else int(bias_dim == 0)] == 1:
        split[3] = split[3].sum(1, keepdim=True)
    return tuple(split), (0, 0, 0, 0)


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
    f"({_QKV}{_OPTIONS}bool with_parts, str backend) -> (Tensor out, Tensor lse, Tensor lse_parts)",
    _forward,
    _forward_fake,
    _forward_vmap,
    _forward_flops,
)
softmax_backward = register(
    "softmax_backward",
    f"(Tensor dout, Tensor? dlse, {_QKV}Tensor out, Tensor lse_parts, {_OPTIONS}bool[] needs, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    _backward,
    _backward_fake,
    _backward_vmap,
    _backward_flops,
)


class SoftmaxAttention(torch.autograd.Function):
    """(q, k, v, mask, bias, rng, *SoftmaxParams, backend) -> (out, lse, lse_parts); the last is for backward alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, mask, bias, rng, scale, causal, window_left, window_right, dropout_p, backend):
        return softmax_forward(
            q, k, v, mask, bias, rng, scale, causal, window_left, window_right, dropout_p, True, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.options = inputs[_FORWARD_TENSORS:]
        out, _, parts = output
        ctx.mark_non_differentiable(parts)
        ctx.save_for_backward(*inputs[:_FORWARD_TENSORS], out, parts)

    @staticmethod
    def backward(ctx, dout, dlse, _):
        q, k, v, mask, bias, rng, out, parts = ctx.saved_tensors
        *params, backend = ctx.options
        needs = [*ctx.needs_input_grad[:3], ctx.needs_input_grad[4]]
        if dout is None:
            if dlse is None:
                return (None,) * 12
            dout = out.new_zeros(()).expand_as(out)
        dq, dk, dv, dbias = SoftmaxAttentionBackward.apply(
            dout, dlse, q, k, v, mask, bias, rng, out, parts, *params, needs, backend
        )
        grads = [g if need else None for g, need in zip((dq, dk, dv, dbias), needs)]
        return (*grads[:3], None, grads[3], *(None,) * 7)


class SoftmaxAttentionBackward(torch.autograd.Function):
    """The gradient as a function of its own, so that it has a gradient too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dout, dlse, q, k, v, mask, bias, rng, out, parts,
        scale, causal, window_left, window_right, dropout_p, needs, backend,
    ):  # fmt: skip
        return softmax_backward(
            dout, dlse, q, k, v, mask, bias, rng, out, parts,
            scale, causal, window_left, window_right, dropout_p, needs, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        *ctx.params, ctx.needs, _ = inputs[_BACKWARD_TENSORS:]
        ctx.save_for_backward(*inputs[:8])

    @staticmethod
    def backward(ctx, *cotangents):
        dout, dlse, q, k, v, mask, bias, rng = ctx.saved_tensors
        wanted = [c if need else None for c, need in zip(cotangents, ctx.needs)]
        if all(c is None for c in wanted):
            return (None,) * 17
        params = SoftmaxParams(*ctx.params)
        with full_precision(q), torch.no_grad():
            grads = softmax_double_backward(*wanted, dout, dlse, q, k, v, mask, bias, rng, params)
        if torch.is_grad_enabled():
            message = "attention has no third derivative; backend='reference' has all"
            grads = RefuseGradient.apply(message, len(grads), *grads, *wanted, dout, dlse, q, k, v, bias)
        gdout, gdlse, gq, gk, gv, gbias = grads
        return gdout, gdlse, gq, gk, gv, None, gbias, *(None,) * 10
