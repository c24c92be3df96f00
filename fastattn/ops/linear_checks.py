"""Argument checks of linear attention. Each error names the argument, the shapes, and the way out."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor

from .. import checks
from ..autograd import PLAIN, traced, transformed
from ..params import LinearParams, LinearTensors, accumulate_dtype, known_map, normalized


def qkv(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """q [B, Hq, Lq, D], k [B, Hk, Lk, D], v [B, Hv, Lk, Dv]; Lq = Lk where causal; heads divide the most there are."""
    checks.dense_floats(q, k, v)
    checks.same_sizes(q, k, v)
    Hq, Hk, Hv = (t.shape[1] for t in (q, k, v))
    states = max(Hk, Hv)
    heads = max(Hq, states)
    wrong = [
        n for n, all_heads in ((Hq, heads), (states, heads), (Hk, states), (Hv, states)) if n == 0 or all_heads % n
    ]
    if wrong and heads:
        raise ValueError(
            f"the heads of q, k and v do not form groups: {checks.shapes(q=q, k=k, v=v)}; those of k and v must divide the "
            f"{states} heads of state, these and those of q the {heads} heads of the output"
        )
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"causal=True needs as many queries as keys: {checks.shapes(q=q, k=k)}; pass earlier tokens as initial_state, "
            "or causal=False"
        )


def params(feature_map, causal, normalize, scale, chunk_size, beta, D: int) -> LinearParams:
    known_map(feature_map)
    for name, value in (("causal", causal), ("normalize", normalize)):
        if not isinstance(value, bool) and not (name == "normalize" and value is None):
            raise TypeError(f"{name} must be a bool{' or None' * (name == 'normalize')}, got {value!r}")
    if beta is not None:
        if feature_map != "identity":
            raise ValueError(
                f'beta (the delta rule) takes feature_map="identity", got {feature_map!r}; map q and k before the call'
            )
        if normalize:
            raise ValueError("normalize does not go with beta: the delta rule has no denominator; pass normalize=False")
    divided = normalized(feature_map, normalize)
    factor = checks.scale_value(scale, D)
    if divided and factor <= 0:
        raise ValueError(f"scale must be > 0 where the output is normalised, got {scale!r}; or pass normalize=False")
    return LinearParams(feature_map, causal, divided, factor, _chunk_size(chunk_size))


def _chunk_size(size: Any) -> Optional[int]:
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"chunk_size must be an int or None, got {size!r}")
    if size not in (16, 32, 64, 128, 256):
        raise ValueError(f"chunk_size must be 16, 32, 64, 128 or 256, or None for the backend's choice, got {size}")
    return size


def _values_visible(t: Tensor) -> bool:
    """Whether a look at the values costs no wait for a device and no graph break."""
    return t.is_cpu and t.numel() > 0 and not transformed() and not traced() and type(t) in PLAIN


def _floats(name: str, t: Any, q: Tensor) -> Tensor:
    if not isinstance(t, Tensor) or t.dtype not in checks.FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be a floating point tensor, got {getattr(t, 'dtype', type(t).__name__)}; float32, bfloat16, "
            "float16 and float64 are taken"
        )
    checks.refuse_layout(name, t)
    if t.device != q.device:
        raise ValueError(f"{name} is on {t.device} but q is on {q.device}; move it with .to(q.device)")
    return t


def decay_values(g: Tensor) -> None:
    if _values_visible(g):
        least, most = g.detach().aminmax()
        if not (most <= 0 and least > -math.inf):
            raise ValueError(
                f"decay is the logarithm of a gate and must be finite and <= 0, got values from {float(least)} to {float(most)}; "
                "pass torch.nn.functional.logsigmoid(x), or log(gate)"
            )


def beta_values(b: Tensor) -> None:
    if _values_visible(b):
        least, most = b.detach().aminmax()
        if not (least >= 0 and most <= 2):
            raise ValueError(
                f"beta must be in [0, 2], got values from {float(least)} to {float(most)}; pass beta.sigmoid(), or twice that"
            )


def decay(g: Any, x: LinearTensors, call: LinearParams, look: bool) -> Tensor:
    """[Hs], [B, Hs, L] or [B, Hs, L, D] -> the last two, in the dtype of sums; `look`: refuse wrong values here."""
    if not call.causal:
        raise ValueError("decay needs an order of tokens: pass causal=True, or no decay")
    g = _floats("decay", g, x.q)
    B, L, D, Hs = x.q.shape[0], x.k.shape[2], x.k.shape[3], x.state_heads
    shapes = (Hs,), (B, Hs, L), (B, Hs, L, D)
    if not checks.has_shape(g, shapes):
        raise ValueError(
            f"decay {list(g.shape)} must be {list(shapes[0])} (one per head), {list(shapes[1])} (one per token) or "
            f"{list(shapes[2])} (one per channel)"
        )
    if g.dim() == 4 and call.feature_map.startswith("taylor"):
        raise ValueError(f"decay per channel {list(g.shape)} does not go with feature_map={call.feature_map!r}")
    if look:
        decay_values(g)
    g = g.to(accumulate_dtype(x.q.dtype))
    return g[None, :, None].expand(B, Hs, L) if g.dim() == 1 else g


def beta(b: Any, x: LinearTensors, call: LinearParams, look: bool) -> Tensor:
    if not call.causal:
        raise ValueError("beta (the delta rule) needs an order of tokens: pass causal=True, or no beta")
    b = _floats("beta", b, x.q)
    wanted = (x.q.shape[0], x.state_heads, x.k.shape[2])
    if tuple(b.shape) != wanted:
        raise ValueError(f"beta {list(b.shape)} must be [B, H, L] = {list(wanted)}, one number per token")
    if look:
        beta_values(b)
    return b.to(accumulate_dtype(x.q.dtype))


def key_mask(mask: Any, x: LinearTensors, call: LinearParams) -> Tensor:
    if call.causal:
        raise ValueError(
            "key_mask goes with causal=False; for padded causal batches use cu_seqlens, or let the padding come last"
        )
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"key_mask must be a bool tensor (True = takes part), got {getattr(mask, 'dtype', type(mask).__name__)}"
        )
    checks.refuse_layout("key_mask", mask)
    if mask.device != x.q.device:
        raise ValueError(f"key_mask is on {mask.device} but q is on {x.q.device}; move it with .to(q.device)")
    if mask.shape != (x.k.shape[0], x.k.shape[2]):
        raise ValueError(f"key_mask {list(mask.shape)} must be [B, Lk] = {[x.k.shape[0], x.k.shape[2]]}")
    return mask


def cu_seqlens(ends: Any, x: LinearTensors) -> Tensor:
    B, L, Lk = x.q.shape[0], x.q.shape[2], x.k.shape[2]
    if B != 1 or L != Lk:
        raise ValueError(
            f"cu_seqlens lays sequences end to end in one batch of q and k: {checks.shapes(q=x.q, k=x.k)}; B must be 1 and "
            "the lengths equal"
        )
    checks.sequence_ends("cu_seqlens", ends)
    if ends.device != x.q.device:
        raise ValueError(f"cu_seqlens is on {ends.device} but q is on {x.q.device}; move it with .to(q.device)")
    if _values_visible(ends):
        checks.rising_ends("cu_seqlens", ends, "q", L)
    return ends.to(torch.int32)


def state(given: Any, x: LinearTensors, call: LinearParams) -> tuple[Tensor, Optional[Tensor]]:
    """(kv, z) of a LinearState, or of a bare kv where nothing is normalised."""
    kv, z = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    wide, shape = accumulate_dtype(x.q.dtype), x.state_shape(call.feature_map)
    wanted: tuple[tuple[str, Any, tuple[int, ...]], ...] = (("kv", kv, shape),)
    if call.normalize:
        wanted += (("z", z, shape[:3]),)
    elif z is not None:
        raise ValueError("the state has a z, which only a normalised output reads; pass LinearState(kv, None)")
    for part, t, size in wanted:
        if not isinstance(t, Tensor):
            raise TypeError(
                f"the state must be a LinearState{' with kv and z' * call.normalize}, got {part} {type(t).__name__}"
            )
        checks.refuse_layout(f"state.{part}", t)
        if t.shape != size:
            raise ValueError(
                f"state.{part} {list(t.shape)} must be {list(size)}: sequences, heads, features of {call.feature_map!r}"
                + ", value dimension" * (part == "kv")
            )
        if t.dtype != wide:
            raise TypeError(f"state.{part} must be {wide}, the dtype of sums, got {t.dtype}; cast it with .to({wide})")
        if t.device != x.q.device:
            raise ValueError(f"state.{part} is on {t.device} but q is on {x.q.device}; move it with .to(q.device)")
    return kv, z if call.normalize else None
