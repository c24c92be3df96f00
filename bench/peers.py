"""Everyone who computes softmax attention, by name, as bench implementations of one `fastattn.testing.inputs.Case`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.testing.inputs import Case as Problem
from fastattn.testing.inputs import Inputs

from .case import Implementation, NotAvailable, installed

BACKENDS = tuple(fastattn.dispatch.BACKENDS)
TORCH_BACKENDS = {
    "math": "MATH",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
}
ALL = "all"  # in place of names: everyone whom an op knows
COMPILED_SHAPES = 1024  # torch.compile would stop at eight and run FlexAttention unfused

torch_attention = F.scaled_dot_product_attention  # bound here: fastattn.enable() must not reach the baseline


def options_of(problem: Problem) -> dict[str, Any]:
    """Keyword arguments of fastattn.attention."""
    return {"causal": problem.causal, "window": problem.window, "softcap": problem.softcap}


def backend(problem: Problem, name: str) -> Implementation:
    """The drop-in wherever its signature can say it and no backend is named, else `fastattn.attention`."""
    options = {**options_of(problem), "backend": name}

    def kernel(x: Inputs) -> str:
        return in_words(fastattn.explain(x.q, x.k, x.v, mask=x.mask, **options))

    special = problem.window is not None or problem.softcap is not None or problem.causal == "bottom_right"
    if name != "auto" or special:
        return Implementation(lambda x: fastattn.attention(x.q, x.k, x.v, mask=x.mask, **options), kernel)
    dropin, causal, gqa = fastattn.scaled_dot_product_attention, bool(problem.causal), problem.Hq != problem.Hk
    return Implementation(lambda x: dropin(x.q, x.k, x.v, attn_mask=x.mask, is_causal=causal, enable_gqa=gqa), kernel)


def portable(problem: Problem) -> Implementation:
    """Backend cuda held to the kernels that every GPU from compute capability 8.0 on runs."""
    ours = backend(problem, "cuda")

    def held(function: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
        def call(x: Inputs) -> Any:
            with patch.dict(os.environ, FASTATTN_CUDA_KERNELS="portable"):
                return function(x)

        return call

    return Implementation(held(ours.call), held(ours.kernel))


def in_words(explanation: fastattn.Explanation) -> str:
    return f"{explanation.chosen}: {explanation.kernel}"


def band(problem: Problem) -> tuple[int | None, int | None]:
    """causal and window as lo <= j - i <= hi; None is unbounded."""
    shift = problem.Lk - problem.Lq
    left, right = problem.window or (None, None)
    lo = None if left is None else shift - left
    hi = None if right is None else shift + right
    if problem.causal:
        diagonal = 0 if problem.causal == "top_left" else shift
        hi = diagonal if hi is None else min(hi, diagonal)
    return lo, hi


@cache
def _band_mask(Lq: int, Lk: int, lo: int | None, hi: int | None, device: str) -> Tensor:
    """A band as torch has to be given it: a dense bool mask."""
    return _in_band(torch.arange(Lq, device=device), Lk, lo, hi)


def _in_band(rows: Tensor, Lk: int, lo: int | None, hi: int | None) -> Tensor:
    offset = torch.arange(Lk, device=rows.device)[None, :] - rows[:, None]
    return (offset >= (-rows[-1] if lo is None else lo)) & (offset <= (Lk if hi is None else hi))


def visible(problem: Problem, x: Inputs, rows: Tensor | None = None) -> Tensor | None:
    """A dense bool mask of what these queries see, or all of them; None: everything."""
    found = x.mask if x.mask is None or rows is None else x.mask.index_select(-2, rows)
    lo, hi = band(problem)
    if lo is None and hi is None:
        return found
    if rows is None:
        inside = _band_mask(problem.Lq, problem.Lk, lo, hi, x.q.device.type)
    else:
        inside = _in_band(rows, problem.Lk, lo, hi)
    return inside if found is None else inside & found


def _dense_mask(problem: Problem, x: Inputs) -> Tensor | None:
    """What torch has to be given as a mask, beyond is_causal."""
    if x.mask is not None:
        return x.mask
    if problem.window is None and (problem.causal in (False, "top_left") or problem.Lq == problem.Lk):
        return None
    return _band_mask(problem.Lq, problem.Lk, *band(problem), x.q.device.type)


def torch_sdpa(problem: Problem, name: str | None = None) -> Implementation:
    """torch's own function, all by itself or held to one of its backends."""
    if problem.softcap is not None:
        if name is not None:
            return unavailable("torch's function has no softcap")
        return Implementation(lambda x: _spelled_out(problem, x), lambda x: "torch operations, dense scores", peer=True)

    def given(x: Inputs) -> dict[str, Any]:
        mask = _dense_mask(problem, x)
        causal = bool(problem.causal) and (mask is None or x.mask is not None)
        return {"attn_mask": mask, "is_causal": causal, "enable_gqa": problem.Hq != problem.Hk}

    def attend(x: Inputs) -> Tensor:
        return torch_attention(x.q, x.k, x.v, **given(x))

    if name is None:
        return Implementation(attend, lambda x: _torch_choice(x, given(x)), peer=True)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    only = getattr(SDPBackend, TORCH_BACKENDS[name])

    def attend_by_name(x: Inputs) -> Tensor:
        with sdpa_kernel(only):
            return attend(x)

    return Implementation(attend_by_name, lambda x: f"torch {name}", peer=True)


def _torch_choice(x: Inputs, given: dict[str, Any]) -> str:
    """Which backend torch's function picks: it asks the same question. Not every version of torch can be asked."""
    from torch.nn.attention import SDPBackend

    names = {getattr(SDPBackend, theirs).value: name for name, theirs in TORCH_BACKENDS.items()}
    try:
        return f"torch's choice, {names[torch._fused_sdp_choice(x.q, x.k, x.v, **given)]}"
    except (AttributeError, TypeError, RuntimeError, KeyError):
        return "torch's choice"


def _scores(problem: Problem, x: Inputs) -> Tensor:
    """[B, Hq, Lq, Lk], softcapped and masked."""
    scores = x.q @ x.k.repeat_interleave(problem.Hq // problem.Hk, 1).transpose(2, 3) * problem.D**-0.5
    if problem.softcap is not None:
        scores = (scores / problem.softcap).tanh() * problem.softcap
    seen = visible(problem, x)
    return scores if seen is None else scores.masked_fill(~seen, float("-inf"))


def _spelled_out(problem: Problem, x: Inputs) -> Tensor:
    """As models write what torch's function cannot say."""
    weights = _scores(problem, x).float().softmax(-1).to(x.v.dtype)
    return weights @ x.v.repeat_interleave(problem.Hq // problem.Hk, 1)


def compiled_flex(block_mask: Callable[[Inputs], Any], softcap: float | None = None) -> Implementation:
    """FlexAttention, compiled for the shape; `block_mask(inputs)` is asked once."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = COMPILED_SHAPES
    compiled = torch.compile(flex_attention, dynamic=False)
    known: list[Any] = []
    cap = softcap or 1.0
    score = None if softcap is None else lambda s, b, h, i, j: cap * torch.tanh(s / cap)

    def attend(x: Inputs) -> Tensor:
        if not known:
            known.append(block_mask(x))
        gqa = x.q.shape[1] != x.k.shape[1]
        return compiled(x.q, x.k, x.v, score_mod=score, block_mask=known[0], enable_gqa=gqa)

    return Implementation(attend, lambda x: "compiled FlexAttention", peer=True)


def flex(problem: Problem) -> Implementation:
    lo, hi = band(problem)

    def block_mask(x: Inputs) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        dense = x.mask
        if dense is not None:
            seen: Callable = lambda b, h, i, j: dense[i, j]
        elif lo is not None and hi is not None:
            seen = lambda b, h, i, j: (j - i >= lo) & (j - i <= hi)
        elif hi is not None:
            seen = lambda b, h, i, j: j - i <= hi
        elif lo is not None:
            seen = lambda b, h, i, j: j - i >= lo
        else:
            return None
        return create_block_mask(seen, None, None, problem.Lq, problem.Lk, device=x.q.device)

    return compiled_flex(block_mask, problem.softcap)


def sides(problem: Problem) -> tuple[int | None, int | None]:
    """causal and window as other packages take them: so many tokens to the left and right of i + Lk - Lq.

    Errors: NotAvailable where a side is negative, or a mask is no band.
    """
    if problem.mask is not None:
        raise NotAvailable("it takes no such mask")
    lo, hi = band(problem)
    shift = problem.Lk - problem.Lq
    found = None if lo is None else shift - lo, None if hi is None else hi - shift
    if any(side is not None and side < 0 for side in found):
        raise NotAvailable("it has no such alignment")
    return found


def flash_attn(problem: Problem) -> Implementation:
    """Dao's package."""

    def attend(x: Inputs) -> Tensor:
        attention = installed("flash_attn").flash_attn_func
        left, right = sides(problem)
        if (left, right) == (None, 0):
            return attention(x.q, x.k, x.v, causal=True, softcap=problem.softcap or 0.0)
        window = tuple(-1 if side is None else side for side in (left, right))
        return attention(x.q, x.k, x.v, window_size=window, softcap=problem.softcap or 0.0)

    return Implementation(attend, lambda x: "flash_attn package", peer=True, blhd=True)


def xformers(problem: Problem) -> Implementation:
    def attend(x: Inputs) -> Tensor:
        ops = installed("xformers.ops")
        if problem.softcap is not None or problem.Hq != problem.Hk:
            raise NotAvailable("this bench gives xformers equal heads without softcap only")
        biases = ops.fmha.attn_bias
        if problem.mask is None and band(problem) == (None, 0):
            bias = biases.LowerTriangularMask()
        elif (both := sides(problem)) == (None, None):
            bias = None
        elif both == (None, 0):
            bias = biases.LowerTriangularFromBottomRightMask()
        else:
            left, right = (problem.Lk if side is None else side for side in both)
            bias = biases.LocalAttentionFromBottomRightMask(window_left=left, window_right=right)
        return ops.memory_efficient_attention(x.q, x.k, x.v, attn_bias=bias)

    return Implementation(attend, lambda x: "xformers memory_efficient_attention", peer=True, blhd=True)


def entmax(problem: Problem) -> Implementation:
    """Sparse weights instead of softmax, over dense scores: a yardstick of time only."""

    def attend(x: Inputs) -> Tensor:
        sparse = installed("entmax").entmax15(_scores(problem, x), dim=-1)
        return sparse.to(x.v.dtype) @ x.v.repeat_interleave(problem.Hq // problem.Hk, 1)

    return Implementation(attend, lambda x: "entmax15 over dense scores", peer=True, other=True)


def unavailable(reason: str) -> Implementation:
    def attend(x: Any) -> Tensor:
        raise NotAvailable(reason)

    return Implementation(attend, peer=True)


def of_softmax(problem: Problem) -> dict[str, Callable[[], Implementation]]:
    """Everyone, by name; made when asked for."""
    others = {"flex": flex, "flash_attn": flash_attn, "xformers": xformers, "entmax": entmax}
    return {
        "torch": partial(torch_sdpa, problem),
        **{name: partial(torch_sdpa, problem, name) for name in TORCH_BACKENDS},
        **{name: partial(make, problem) for name, make in others.items()},
        **{name: partial(backend, problem, name) for name in BACKENDS},
    }


def together(
    baseline: dict[str, Implementation],
    ours: Implementation,
    everyone: dict[str, Callable[[], Implementation]],
    names: tuple[str, ...],
    without: Collection[str] = (),
) -> dict[str, Implementation]:
    """Baseline first, fastattn last, between them who is asked for.

    `everyone` is whom the op knows, `without` who has no such operation; of others this bench has no call.
    """
    found = dict(baseline)
    for name in dict.fromkeys(one for asked in names for one in (everyone if asked == ALL else (asked,))):
        if name not in found and name != "fastattn":
            reason = "it has no such operation" if name in without else "not wired in this bench"
            found[name] = everyone[name]() if name in everyone else unavailable(reason)
    return found | {"fastattn": ours}
