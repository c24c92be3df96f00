"""Linear attention: the public functions."""

from __future__ import annotations

from typing import Literal, Optional, Union, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..autograd import autocast, full_precision, transformed
from ..dispatch import BACKENDS, Explanation, select
from ..dispatch import explain as explain_call
from ..params import LinearCall, LinearState, LinearTensors
from . import linear_checks
from .linear_autograd import attend, attend_without_gradient, step
from .linear_plain import plain_linear_attention, plain_step

FeatureMap = Literal["identity", "relu", "elu1", "taylor1", "taylor2"]
State = Union[LinearState, Tensor]


@overload
def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, return_state: Literal[False] = ..., **options) -> Tensor: ...
@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_state: Literal[True], **options
) -> tuple[Tensor, LinearState]: ...
def linear_attention(  # type: ignore[misc]  # the overloads leave the options to this signature
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap = "elu1",
    causal: bool = True,
    decay: Optional[Tensor] = None,
    beta: Optional[Tensor] = None,
    normalize: Optional[bool] = None,
    scale: Optional[float] = None,
    initial_state: Optional[State] = None,
    return_state: bool = False,
    key_mask: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
    chunk_size: Optional[int] = None,
    backend: str = "auto",
):
    """Linear attention: a state of fixed size in place of the Lq x Lk weights, in time and memory O(L).

        S_t = Diag(exp g_t) S_{t-1} + phi(k_t) v_t^T            z_t = Diag(exp g_t) z_{t-1} + phi(k_t)
        o_t = scale * phi(q_t)^T S_t                            normalised: / max(scale * phi(q_t) . z_t, 1e-6)

    and with beta, the delta rule:  S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T.

    Args:
        q: [B, Hq, Lq, D], float32, bfloat16, float16 or float64. Any strides are read in place.
        k: [B, Hk, Lk, D].
        v: [B, Hv, Lk, Dv]. There are H = max(Hk, Hv) states and max(Hq, H) heads of out; fewer heads of q, k or v are
            shared by groups of these: head h reads head h // group.
        feature_map: phi, of D numbers: "identity"; "relu"; "elu1", elu(x) + 1 (Katharopoulos et al. 2020); "taylor1",
            [1, x / |x|], so that weights are 1 + cos(q, k) (Li et al. 2020, arXiv 2007.14902); "taylor2",
            [1, x / D^(1/4), x (x) x / sqrt(2 D)], so that they are 1 + s + s^2 / 2, s = q . k / sqrt(D) (Based,
            Arora et al. 2024), a state of 1 + D + D^2 rows. Others: map q and k before the call.
        causal: out_t sees tokens up to t (Lq == Lk). False: every query sees the sum over all keys; Lq may differ
            from Lk; no decay, no beta.
        decay: g, the natural logarithm of a gate in (0, 1], finite: [H] per head (RetNet, Lightning Attention), [B, H, L]
            per token (Mamba-2, Gated DeltaNet) or [B, H, L, D] per channel (GLA); not the last with taylor maps.
            Differentiable.
        beta: [B, H, L] in [0, 2], the share of a value that replaces what the state predicts for its key (DeltaNet,
            Yang et al. 2024). Takes feature_map="identity" and no normaliser; keys are best of length 1. Differentiable.
        normalize: divide by the sum of weights; default: True for every feature map but "identity".
        scale: defaults to D ** -0.5; cancels where normalised, and must be > 0 there.
        initial_state: a LinearState (kv [B, H, F, Dv], and z [B, H, F] where normalised), or kv alone; differentiable.
        return_state: also return the LinearState after the last token.
        key_mask: bool [B, Lk], True = takes part; with causal=False. Masked keys may hold NaN.
        cu_seqlens: int32 [n + 1], from 0 to L: B = 1 and n sequences lie end to end; each has a state of its own.
        chunk_size: tokens per chunk on backends that compute in chunks (16, 32, 64, 128 or 256); changes no meaning.
        backend: "auto", "native" (C++ on CPU), "triton", "eager" (torch) or "reference" (token by token).

    Returns:
        out [B, max(Hq, H), Lq, Dv] in the dtype of q; with return_state also the LinearState, in float32 (float64 for
        float64 inputs), differentiable like out. All sums are kept in that dtype.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, the shapes and the way out. Values of decay,
            beta and cu_seqlens are looked at on the CPU only: elsewhere that would wait for the device.
        UnsupportedError: the backend asked for (or every backend) refuses; the message lists the reasons.

    A second derivative raises RuntimeError, but on backend="reference". `fastattn.explain_linear` with the same arguments
    tells which kernel runs, and why.
    """
    if backend == "auto" and not return_state and initial_state is key_mask is cu_seqlens is chunk_size is None:
        quick = plain_linear_attention(q, k, v, feature_map, causal, decay, beta, normalize, scale)
        if quick is not None:
            return quick
    call = _call(
        q, k, v, feature_map, causal, decay, beta, normalize, scale, initial_state, key_mask, cu_seqlens, chunk_size
    )
    out, kv, z = _run(call, select(call, backend))
    return (out, LinearState(kv, z)) if return_state else out


def explain_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap = "elu1",
    causal: bool = True,
    decay: Optional[Tensor] = None,
    beta: Optional[Tensor] = None,
    normalize: Optional[bool] = None,
    scale: Optional[float] = None,
    initial_state: Optional[State] = None,
    return_state: bool = False,
    key_mask: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
    chunk_size: Optional[int] = None,
    backend: str = "auto",
) -> Explanation:
    """Takes the arguments of `linear_attention`; returns a table of every backend: chosen, or the reasons why not."""
    call = _call(
        q, k, v, feature_map, causal, decay, beta, normalize, scale, initial_state, key_mask, cu_seqlens, chunk_size
    )
    return explain_call(call, backend)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    *,
    feature_map: FeatureMap = "elu1",
    decay: Optional[Tensor] = None,
    beta: Optional[Tensor] = None,
    normalize: Optional[bool] = None,
    scale: Optional[float] = None,
    backend: str = "auto",
) -> Tensor:
    """One token of causal `linear_attention`, for decoding: reads q, k, v and advances `state` in place.

    Args:
        q, k, v: [B, heads, 1, D or Dv]. decay: [H], [B, H, 1] or [B, H, 1, D]. beta: [B, H, 1].
        state: the LinearState of the tokens before (`LinearState.zeros`, or a call with return_state), contiguous.
        The others as in `linear_attention`, with the values the state was made with.

    Returns:
        out [B, max(Hq, H), 1, Dv]. Nothing waits for the device; on triton nothing is allocated but out.

    Raises:
        As `linear_attention`; RuntimeError where a gradient would be recorded: the state is overwritten.
    """
    if state is None:
        raise TypeError("a step advances a state, got None; start from LinearState.zeros(...)")
    if backend == "auto":
        quick = plain_step(q, k, v, state, feature_map, decay, beta, normalize, scale)
        if quick is not None:
            return quick
    call = _call(q, k, v, feature_map, True, decay, beta, normalize, scale, state, None, None, None, look=False)
    x = call.x
    if call.needs_grad:
        raise RuntimeError(
            "linear_attention_step overwrites its state and records no gradient: call it under torch.no_grad(), or use "
            "linear_attention(..., initial_state=state, return_state=True)"
        )
    if x.q.shape[2] != 1:
        raise ValueError(
            f"a step takes one token, got q {list(x.q.shape)}; use linear_attention(..., initial_state=state)"
        )
    if transformed() or torch.is_grad_enabled() and forward_ad._current_level >= 0:
        raise NotImplementedError(
            "linear_attention_step writes in place; use linear_attention under vmap, with backend='reference' under jvp"
        )
    for name, t in zip(("kv", "z"), (x.kv, x.z)):
        if t is not None and not t.is_contiguous():
            raise ValueError(f"state.{name} must be contiguous to be advanced in place; pass state.{name}.contiguous()")
    chosen = select(call._replace(step=True), backend)
    if chosen != "native":  # which looks at values itself: torch's reductions cost more than the rest of a small step
        if x.decay is not None:
            linear_checks.decay_values(x.decay)
        if x.beta is not None:
            linear_checks.beta_values(x.beta)
    return step(x, call.params, chosen)


def _call(
    q, k, v, feature_map, causal, decay, beta, normalize, scale, state, key_mask, cu_seqlens, chunk_size, look=True
) -> LinearCall:
    """Checks what the arguments mean and normalises them; `look`: also the values of decay and beta."""
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        q, k, v = autocast(q, k, v)
    linear_checks.qkv(q, k, v, causal)
    x = LinearTensors(q, k, v)
    params = linear_checks.params(feature_map, causal, normalize, scale, chunk_size, beta, q.shape[3])
    if cu_seqlens is not None:
        x = x._replace(cu_seqlens=linear_checks.cu_seqlens(cu_seqlens, x))
    if decay is not None:
        x = x._replace(decay=linear_checks.decay(decay, x, params, look))
    if beta is not None:
        x = x._replace(beta=linear_checks.beta(beta, x, params, look))
    if key_mask is not None:
        x = x._replace(key_mask=linear_checks.key_mask(key_mask, x, params))
    if state is not None:
        kv, z = linear_checks.state(state, x, params)
        x = x._replace(kv=kv, z=z)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in x.differentiable())
    return LinearCall(x, params, needs_grad)


def _run(call: LinearCall, backend: str) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    x, params, needs_grad, _ = call
    if backend == "reference":
        with full_precision(x.q):
            return BACKENDS["reference"].linear_attention(x, params)
    # A dual tensor must meet the autograd function, which refuses it; the bare op would drop the tangent.
    if needs_grad or forward_ad._current_level >= 0 or transformed():
        return attend(x, params, backend)
    return attend_without_gradient(x, params, backend)
