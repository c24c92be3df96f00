"""Backend "native": the C++ kernels of fastattn._C on CPU tensors, and its builder of tile plans."""

from __future__ import annotations

from typing import Any

import torch

from .. import libraries
from ..params import (
    CAUSAL_BOTTOM_RIGHT,
    CAUSAL_TOP_LEFT,
    Call,
    LinearCall,
    LinearParams,
    LinearTensors,
    SoftmaxCall,
    SoftmaxParams,
    SoftmaxTensors,
    empty_like_layout,
)

_C, _missing = libraries.native()

MAX_HEAD_DIM = 512
TOKENS_PER_KEPT_STATE = 1024  # kLinearMark
MAX_LINEAR_HEAD_DIM = 256
MAX_SQUARED_HEAD_DIM = 64  # of taylor2, whose features are D^2
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def status() -> str | None:
    return _missing


def why_not(call: Call) -> list[str]:
    if _missing is not None:
        return [_missing]
    x = call.x
    reasons = []
    if not x.q.is_cpu:
        reasons.append(f"it runs on CPU tensors, these are on {x.q.device}")
    if x.q.dtype not in DTYPES:
        reasons.append(f"dtype {x.q.dtype} is not float32, bfloat16 or float16")
    return reasons + (_why_not_linear(call) if isinstance(call, LinearCall) else _why_not_softmax(call))


def _why_not_softmax(call: SoftmaxCall) -> list[str]:
    widest = max(call.x.q.shape[3], call.x.v.shape[3])
    return [f"head dimension {widest} is over {MAX_HEAD_DIM}"] if widest > MAX_HEAD_DIM else []


def _why_not_linear(call: LinearCall) -> list[str]:
    x, params = call.x, call.params
    D, Dv = x.q.shape[3], x.v.shape[3]
    reasons = []
    if min(D, Dv) == 0:
        reasons.append("a head dimension is 0")
    if max(D, Dv) > MAX_LINEAR_HEAD_DIM:
        reasons.append(f"head dimension {max(D, Dv)} is over {MAX_LINEAR_HEAD_DIM}")
    elif params.feature_map == "taylor2" and D > MAX_SQUARED_HEAD_DIM:
        reasons.append(f"taylor2 at head dimension {D} is over {MAX_SQUARED_HEAD_DIM}")
    return reasons


def describe(call: Call) -> str:
    assert _C is not None
    if isinstance(call, LinearCall):
        scan = "scan by groups of 4 tokens" if call.x.beta is not None else "scan by blocks of 16 tokens"
        kind = "one step in place" if call.step else scan if call.params.causal else "two passes"
        isa = _C.common_isa()
    else:
        q, k = call.x.q, call.x.k
        few_rows = _C.is_decode(q.shape[2], q.shape[1] // max(k.shape[1], 1), k.shape[2])
        kind = "split-key decode" if few_rows else "tiled"
        isa = _C.isa()
    return f"{isa} {kind}, {torch.get_num_threads()} threads"


def softmax_forward(x: SoftmaxTensors, params: SoftmaxParams, with_parts: bool):
    assert _C is not None
    x = _dense(x)
    q, k, v = x.q, x.k, x.v
    out = empty_like_layout(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    parts = lse.new_empty((*q.shape[:3], 2)) if with_parts else None
    lo, hi = params.band(q.shape[2], k.shape[2])
    _C.softmax_forward(
        x, out, lse, parts, params.scale, lo, hi, params.softcap, params.dropout_p, torch.get_num_threads()
    )
    return out, lse, parts


CAUSAL_CODES = {False: 0, CAUSAL_TOP_LEFT: 1, CAUSAL_BOTTOM_RIGHT: 2, True: 2}


def softmax_plain_forward(q, k, v, mask, scale: float | None, causal: bool | str, grouped: bool):
    """Of a call with a mask or a bias at most: out, or, where a gradient is wanted, (out, parts), or None if anything is unusual."""
    code = CAUSAL_CODES.get(causal)
    if _C is None or code is None:
        return None
    grad = torch.is_grad_enabled()
    return _C.softmax_plain_forward(q, k, v, mask, scale, code, grouped, grad, torch.get_num_threads())


def softmax_plain_backward(dout, q, k, v, mask, out, parts, needs, scale: float | None, causal: bool | str):
    """(dq, dk, dv), or None if anything is unusual."""
    assert _C is not None
    code = CAUSAL_CODES[causal]
    return _C.softmax_plain_backward(dout, q, k, v, mask, out, parts, needs, scale, code, torch.get_num_threads())


def softmax_backward(dout, dlse, x: SoftmaxTensors, out, parts, params: SoftmaxParams, needs):
    assert _C is not None
    x = _dense(x)
    q, k, v, bias, slopes, _ = x.differentiable()
    dq, dk, dv = (empty_like_layout(t, t.shape[3]) if need else None for t, need in zip((q, k, v), needs))
    dbias, dslopes = (
        t.new_empty(t.shape, dtype=torch.float32) if need else None for t, need in zip((bias, slopes), needs[3:])
    )
    lo, hi = params.band(q.shape[2], k.shape[2])
    _C.softmax_backward(
        dout, dlse, x, out, parts.contiguous(), dq, dk, dv, dbias, dslopes,
        params.scale, lo, hi, params.softcap, params.dropout_p, torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv, None if dbias is None else dbias.to(bias.dtype), dslopes


def _dense(x: SoftmaxTensors) -> SoftmaxTensors:
    """The small tensors lie densely: the library reads them so."""
    if x.slopes is x.sinks is x.diagonal is None:
        return x
    slopes, sinks, diagonal = (t if t is None else t.contiguous() for t in (x.slopes, x.sinks, x.diagonal))
    return x._replace(slopes=slopes, sinks=sinks, diagonal=diagonal)


def linear_saved_shape(x: LinearTensors, params: LinearParams) -> tuple[int, ...]:
    """The denominators [B, H, Lq]; with beta, for each token what it is to be multiplied by, and some states [D, Dv]."""
    if x.beta is not None:
        (B, _, L, D), Dv = x.q.shape, x.v.shape[3]
        return (B, x.heads, L + L // TOKENS_PER_KEPT_STATE * D, Dv)
    return (x.q.shape[0], x.heads, x.q.shape[2]) if params.normalize else (0,)


def linear_forward(x: LinearTensors, params: LinearParams, with_saved: bool):
    assert _C is not None
    out = x.empty_out()
    kv = x.q.new_empty(x.state_shape(params.feature_map), dtype=torch.float32)
    z = kv.new_empty(kv.shape[:3]) if params.normalize else None
    saved = kv.new_empty(linear_saved_shape(x, params)) if with_saved and _saves(x, params) else None
    _C.linear_forward(_dense_states(x), out, kv, z, saved, *_linear_options(params), torch.get_num_threads())
    return out, kv, z, saved


def linear_backward(dout, dkv, dz, x: LinearTensors, out, saved, params: LinearParams, needs):
    assert _C is not None
    qkv = tuple(empty_like_layout(t, t.shape[3]) if need else None for t, need in zip(x[:3], needs))
    rest = tuple(t.new_empty(t.shape) if t is not None and need else None for t, need in zip(x[3:7], needs[3:]))
    dkv, dz, saved = (None if t is None else t.contiguous() for t in (dkv, dz, saved if _saves(x, params) else None))
    _C.linear_backward(
        dout, dkv, dz, _dense_states(x), out, saved, qkv + rest, *_linear_options(params), torch.get_num_threads()
    )
    return qkv + rest


def linear_step(x: LinearTensors, params: LinearParams):
    assert _C is not None
    out = x.empty_out()
    _C.linear_step(x, out, params.feature_map, params.normalize, params.scale, torch.get_num_threads())
    x.state_was_written()
    return out


def linear_plain_forward(q, k, v, decay, beta, feature_map: str, causal: bool, normalize: bool, scale: float | None):
    """out, or, where a gradient is wanted, (out, saved or None), or None if anything is unusual."""
    if _C is None:
        return None
    options = feature_map, causal, normalize, scale
    return _C.linear_plain_forward(q, k, v, decay, beta, *options, torch.is_grad_enabled(), torch.get_num_threads())


def linear_plain_backward(dout, q, k, v, decay, beta, out, saved, needs, options: tuple[str, bool, bool, float | None]):
    """Gradients of the first five inputs, or None if anything is unusual."""
    assert _C is not None
    return _C.linear_plain_backward(dout, q, k, v, decay, beta, out, saved, needs, *options, torch.get_num_threads())


def linear_plain_step(x: LinearTensors, feature_map: str, normalize: bool, scale: float | None):
    """out of a step whose tensors are as they were given; None if anything about them is unusual."""
    if _C is None:
        return None
    grad = torch.is_grad_enabled()
    out = _C.linear_plain_step(x, feature_map, normalize, scale, grad, torch.get_num_threads())
    if out is not None:
        x.state_was_written()
    return out


def _saves(x: LinearTensors, params: LinearParams) -> bool:
    return params.normalize or x.beta is not None


def _linear_options(params: LinearParams) -> tuple[str, bool, bool, float]:
    return params.feature_map, params.causal, params.normalize, params.scale


def _dense_states(x: LinearTensors) -> LinearTensors:
    """States and offsets lie densely: the library reads them so."""
    if x.kv is x.z is x.cu_seqlens is None:
        return x
    kv, z, cu_seqlens = (t if t is None else t.contiguous() for t in (x.kv, x.z, x.cu_seqlens))
    return x._replace(kv=kv, z=z, cu_seqlens=cu_seqlens)


def plan_of_programs(programs, batches: int, heads: int, Lq: int, Lk: int) -> tuple[torch.Tensor, ...]:
    """The seven tensors of a fastattn.masks.TilePlan, from (i0, i1, steps) in order."""
    assert _C is not None
    builder = _C.PlanBuilder(batches, heads, Lq, Lk)
    for i0, i1, steps in programs:
        builder.add_rows(_row_steps(steps), i0, i1)
    return _plan_tensors(builder, batches * heads, Lq, Lk)


def visible_pairs(programs, batches: int, heads: int, Lq: int, Lk: int) -> int:
    assert _C is not None
    builder = _C.PlanBuilder(batches, heads, Lq, Lk)
    return sum(builder.count_pairs(_row_steps(steps), i0, i1) for i0, i1, steps in programs)


def _row_steps(steps) -> list[tuple]:
    """Of names, and of named tuples (Intervals, Words, ...) that end with Lk."""
    return [(step,) if isinstance(step, str) else (type(step).__name__.lower(), *step[:-1]) for step in steps]


def plan_of_mask(mask: torch.Tensor, Lq: int, Lk: int) -> tuple[torch.Tensor, ...]:
    """The same from a bool tensor [B, H, Lq|1, Lk|1]."""
    assert _C is not None
    batches, heads = mask.shape[:2]
    builder = _C.PlanBuilder(batches, heads, Lq, Lk)
    builder.add_mask(mask, torch.get_num_threads())
    return _plan_tensors(builder, batches * heads, Lq, Lk)


def _plan_tensors(builder: Any, slices: int, Lq: int, Lk: int) -> tuple[torch.Tensor, ...]:
    q_tiles, k_tiles = -(-Lq // 64), -(-Lk // 64)
    n_rows, n_columns, n_words = builder.finish()
    shapes = (slices * q_tiles + 1,), (n_rows, 3), (slices * k_tiles + 1,), (n_columns, 3)
    runs = [torch.empty(shape, dtype=torch.int32, device="cpu") for shape in shapes]
    orders = [torch.empty(slices, n, dtype=torch.int32, device="cpu") for n in (q_tiles, k_tiles)]
    tensors = (*runs, torch.empty(n_words, 64, dtype=torch.int64, device="cpu"), *orders)
    builder.write(tensors)
    return tensors
