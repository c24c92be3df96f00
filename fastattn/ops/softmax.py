"""Softmax attention: the public function."""

from __future__ import annotations

from typing import Literal, Optional, Union, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import checks
from ..autograd import autocast, full_precision, transformed, unobserved
from ..dispatch import BACKENDS, Explanation, select
from ..dispatch import explain as explain_call
from ..masks import Mask, TilePlan
from ..masks.data import uncompiled
from ..masks.plan import plan_from_dense, refuse_malformed
from ..params import SoftmaxCall, SoftmaxParams, SoftmaxTensors, accumulate_dtype
from .softmax_autograd import attend, attend_without_gradient
from .softmax_packed import packed_plan
from .softmax_plain import plain_attention

Causal = Union[bool, Literal["top_left", "bottom_right"]]
AnyMask = Union[Tensor, Mask, TilePlan]


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options) -> Tensor: ...
@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options) -> tuple[Tensor, Tensor]: ...
def attention(  # type: ignore[misc]  # the overloads leave the options to this signature
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Optional[AnyMask] = None,
    bias: Optional[Tensor] = None,
    causal: Causal = False,
    window: checks.Window = None,
    softcap: Optional[float] = None,
    alibi_slopes: Optional[Tensor] = None,
    sinks: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    scale: Optional[float] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    return_lse: bool = False,
    deterministic: Optional[bool] = None,
    backend: str = "auto",
):
    """Softmax attention, exact, without forming the Lq x Lk matrix (Vaswani et al. 2017; Dao et al. 2022).

        z_ij  = softcap(scale * q_i . k_j) + bias_ij - alibi_h * |i + Lk - Lq - j|      over visible keys j
        lse_i = log (sum_j exp(z_ij) + exp(sink_h))                                     natural log
        out_i = sum_j dropout(exp(z_ij - lse_i)) v_j

    Args:
        q: [B, Hq, Lq, D], float32, bfloat16, float16 or float64. Any strides are read in place.
        k: [B, Hk, Lk, D]. Hq is a multiple of Hk; query head h reads key head h // (Hq / Hk) (GQA, MQA).
        v: [B, Hk, Lk, Dv]. Dv may differ from D.
        mask: what is visible: a bool tensor, broadcastable to [B, Hq, Lq, Lk]; or an object of `fastattn.masks`, which
            costs memory and time by what is visible (one kept over calls keeps its plan); or its plan for these lengths.
        bias: float (dtype of q, or float32), broadcastable to [B, Hq, Lq, Lk], never expanded; differentiable, the
            gradient has bias's own shape. -inf entries mean masked.
        causal: False, "top_left" (key j visible iff j <= i) or "bottom_right" (j <= i + Lk - Lq). True means
            bottom_right, the convention of decoding. Both agree when Lq == Lk.
        window: (left, right) in tokens: visible iff -left <= j - (i + Lk - Lq) <= right; None is unbounded.
            Combines with causal and mask by AND.
        softcap: c > 0 bounds logits: softcap(x) = c * tanh(x / c) (Gemma 2).
        alibi_slopes: float [Hq] or [B, Hq] (Press et al. 2022); differentiable.
        sinks: float [Hq], one learnable logit per head that takes weight and gives none; differentiable.
        dropout_p: probability in [0, 1] of dropping a weight; the others are divided by 1 - dropout_p. Bits come
            from Philox4x32-10 and do not depend on the backend; seed and offset come from torch's generator.
        scale: defaults to D ** -0.5. Any finite value.
        cu_seqlens_q: int32 [n + 1], from 0 to Lq: B = 1 and the n sequences lie end to end in q, k and v. Every option
            means the same in each: causal, window and ALiBi count from the sequence's own ends. Length 0 is legal.
            mask, bias and dropout bits are indexed by the place in the whole of q and k.
        cu_seqlens_k: likewise for k and v; defaults to cu_seqlens_q.
        return_lse: also return lse.
        deterministic: True asks for the same bits every time; None follows torch.are_deterministic_algorithms_enabled().
            All kernels give them anyhow but the Hopper backward, which sums dq in two passes then, not in memory.
        backend: "auto", "native" (C++ on CPU), "cuda" (hand-written), "triton", "eager" (torch, O(L) memory) or "reference"
            (dense torch).
            A named backend never falls back: it raises with its reasons.

    Returns:
        out [B, Hq, Lq, Dv] in the dtype of q and its memory layout; with return_lse also lse [B, Hq, Lq] in float32
        (float64 for float64 inputs), differentiable like out. A row that sees no key gives out 0, lse -inf (its sink,
        if there is one) and gradients 0. Keys hidden from every query may hold NaN or Inf.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, the shapes and the way out.
        UnsupportedError: the backend asked for (or every backend) refuses; the message lists the reasons.

    Double backward runs through torch ops in O(L) memory. Forward-mode AD, and torch.func's second derivatives, raise
    but on backend="reference".
    Call `fastattn.explain` with the same arguments to see which kernel runs, and why.
    """
    if (
        window is softcap is alibi_slopes is sinks is cu_seqlens_q is cu_seqlens_k is deterministic is None
        and dropout_p == 0
        and dropout_p is not False
        and not return_lse
        and backend == "auto"
        and (mask is None or type(mask) is Tensor and mask.dtype is torch.bool and bias is None)
        and (bias is None or type(bias) is Tensor and bias.dtype is not torch.bool)
    ):
        quick = plain_attention(q, k, v, bias if mask is None else mask, scale, causal)
        if quick is not None:
            return quick
    call = _call(
        q, k, v, mask, bias, causal, window, softcap, alibi_slopes, sinks, dropout_p, scale, cu_seqlens_q, cu_seqlens_k,
        deterministic,
    )  # fmt: skip
    out, lse = _run(call, select(call, backend))
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Optional[AnyMask] = None,
    bias: Optional[Tensor] = None,
    causal: Causal = False,
    window: checks.Window = None,
    softcap: Optional[float] = None,
    alibi_slopes: Optional[Tensor] = None,
    sinks: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    scale: Optional[float] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    return_lse: bool = False,
    deterministic: Optional[bool] = None,
    backend: str = "auto",
) -> Explanation:
    """Takes the arguments of `attention`; returns a table of every backend: chosen, or the reasons why not."""
    call = _call(
        q, k, v, mask, bias, causal, window, softcap, alibi_slopes, sinks, dropout_p, scale, cu_seqlens_q, cu_seqlens_k,
        deterministic,
    )  # fmt: skip
    return explain_call(call, backend)


def _call(
    q, k, v, mask, bias, causal, window, softcap, alibi_slopes, sinks, dropout_p, scale, cu_seqlens_q, cu_seqlens_k,
    deterministic,
) -> SoftmaxCall:  # fmt: skip
    """Checks what the arguments mean and normalises them."""
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        q, k, v = autocast(q, k, v)
    checks.qkv(q, k, v)
    params = SoftmaxParams(
        checks.scale_value(scale, q.shape[3]),
        checks.causal_mode(causal),
        *checks.window_sides(window),
        checks.softcap_value(softcap),
        checks.probability(dropout_p),
        checks.deterministic(deterministic),
    )
    x = SoftmaxTensors(q, k, v)
    if not (mask is bias is alibi_slopes is sinks is cu_seqlens_q is cu_seqlens_k is None):
        x, params = _extras(x, params, mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in x.differentiable())
    return SoftmaxCall(x, params, needs_grad)


def _extras(x, params, mask, bias, slopes, sinks, cu_q, cu_k) -> tuple[SoftmaxTensors, SoftmaxParams]:
    """x with everything beside q, k and v; the params of packed sequences lose what their plan says."""
    q, k = x.q, x.k
    B, Hq, Lq, Lk, wide = q.shape[0], q.shape[1], q.shape[2], k.shape[2], accumulate_dtype(q.dtype)
    target = (B, Hq, Lq, Lk)
    plan = diagonal = None
    if cu_q is not None or cu_k is not None:
        plan, diagonal, params = uncompiled(packed_plan)(cu_q, cu_k, mask, x, params, slopes is not None)
        mask = None
    elif isinstance(mask, TilePlan):
        if not transformed() and unobserved(*(t for t in mask if isinstance(t, Tensor) and not t.is_meta)):
            refuse_malformed(mask)
        plan, mask = checks.tile_plan(mask, target, q.device), None
    elif isinstance(mask, Mask):
        checks.slices(mask.slices, target)
        plan, mask = mask.plan(Lq, Lk, device=q.device), None
    return x._replace(
        bias=None if bias is None else checks.float_bias(bias, q, target),
        slopes=None if slopes is None else checks.alibi_slopes(slopes, B, Hq, q.device).to(wide),
        sinks=None if sinks is None else checks.sinks(sinks, Hq, q.device).to(wide),
        mask=None if mask is None else checks.bool_mask(mask, target, q.device),
        diagonal=diagonal,
        plan=plan,
    ), params


def _run(call: SoftmaxCall, backend: str) -> tuple[Tensor, Tensor]:
    x, params, needs_grad = call
    if params.dropout_p > 0:
        x = x._replace(rng=torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=x.q.device))
    scan = backend == "native" and needs_grad and not transformed()
    if scan and x.mask is not None and unobserved(x.q, x.mask):
        # Scanned here, forward and backward share one plan.
        x = x._replace(mask=None, plan=plan_from_dense(x.mask, x.q.shape[2], x.k.shape[2]))
    if backend == "reference":
        with full_precision(x.q):
            return BACKENDS["reference"].softmax_attention(x, params)
    # A dual tensor must meet the autograd function, which refuses it; the bare op would drop the tangent.
    if needs_grad or forward_ad._current_level >= 0 or transformed():
        return attend(x, params, backend)
    return attend_without_gradient(x, params, backend)
