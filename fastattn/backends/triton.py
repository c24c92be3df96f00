"""Backend "triton": fastattn.kernels on CUDA tensors, or on CPU tensors in Triton's interpreter for testing."""

from __future__ import annotations

import importlib.util
import os

import torch

from ..params import (
    LINEAR_EPS,
    Call,
    LinearCall,
    LinearParams,
    LinearTensors,
    SoftmaxCall,
    SoftmaxParams,
    SoftmaxTensors,
    empty_like_layout,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
MAX_TAYLOR2_DIM = 16  # its states have 1 + D + D * D rows

# The kernels pass in the interpreter and compile for sm_80 to sm_120; flip once the GPU tests have passed on a device.
VERIFIED_ON_HARDWARE = False


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def status() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if _interpreted():
        return None
    if torch.version.hip is not None:
        return "it has no launch configurations for AMD GPUs; use backend eager"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; look at nvidia-smi, or set TRITON_INTERPRET=1 to test it on the CPU"
    return None


def why_not(call: Call) -> list[str]:
    reason = status()
    if reason is not None:
        return [reason]
    q, v = call.x.q, call.x.v
    reasons: list[str] = []
    if _interpreted():
        if q.device.type != "cpu":
            reasons.append(f"TRITON_INTERPRET=1 runs it on CPU tensors, these are on {q.device}")
    elif q.device.type != "cuda":
        reasons.append(f"it runs on CUDA tensors (or, for testing, TRITON_INTERPRET=1), these are on {q.device}")
    elif torch.cuda.get_device_capability(q.device) < (8, 0):
        reasons.append("it needs compute capability 8.0 (Ampere) or newer")
    if q.dtype not in DTYPES:
        reasons.append(f"dtype {q.dtype} is not float32, bfloat16 or float16")
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        reasons.append(f"head dimension {max(q.shape[3], v.shape[3])} is over {MAX_HEAD_DIM}")
    return reasons + _why_not_linear(call) if isinstance(call, LinearCall) else reasons


def _why_not_linear(call: LinearCall) -> list[str]:
    x, params = call.x, call.params
    D, reasons = x.q.shape[3], []
    if params.feature_map == "taylor2" and D > MAX_TAYLOR2_DIM:
        reasons.append(f"head dimension {D} is over {MAX_TAYLOR2_DIM} for feature map taylor2")
    if not call.step and x.beta is not None and x.decay is not None and x.decay.dim() == 4:
        reasons.append("the delta rule with a decay for each channel has no chunked kernel")
    if 0 in (x.q.shape[0], x.heads, x.state_heads, D, x.v.shape[3]):
        reasons.append("a dimension other than the length is empty")
    return reasons


def why_not_by_default(call: Call) -> list[str]:
    if _interpreted():
        return ["the interpreter is for testing: ask for it with backend='triton'"]
    if not VERIFIED_ON_HARDWARE:
        return ["not yet verified on a GPU: ask for it with backend='triton'"]
    return []


def describe(call: Call) -> str:
    from ..kernels.common.launch import arch_of
    from ..kernels.softmax.config import has_extras, pick_forward

    if isinstance(call, LinearCall):
        return _describe_linear(call)
    assert isinstance(call, SoftmaxCall)
    x, params, _ = call
    q, extra = x.q, has_extras(x, params) or params.dropout_p > 0  # `explain` draws no rng
    tile = pick_forward(q.shape[3], x.v.shape[3], q.dtype, arch_of(q), q.shape[2], extra, x.plan is not None)
    where = "interpreter" if _interpreted() else f"sm_{arch_of(q)} table"
    return f"{where}, {tile.BM}x{tile.BN} tiles, {tile.num_warps} warps, {tile.num_stages} stages"


def _describe_linear(call: LinearCall) -> str:
    from ..kernels.common.launch import arch_of
    from ..kernels.linear.config import pick

    if call.step:
        return "state in registers"
    q = call.x.q
    tiles = pick(q.dtype, arch_of(q), q.shape[3], call.x.beta is not None, call.params.chunk_size)
    where = "interpreter" if _interpreted() else f"sm_{arch_of(q)} table"
    return f"{where}, chunks of {tiles.BT}, {tiles.read.rows}x{tiles.read.columns} tiles, {tiles.read.num_warps} warps"


def softmax_forward(x: SoftmaxTensors, params: SoftmaxParams, with_parts: bool):
    from ..kernels.softmax.forward import forward

    q = x.q
    out = empty_like_layout(q, x.v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    parts = q.new_empty((*q.shape[:3], 2), dtype=torch.float32) if with_parts else None
    forward(x, out, lse, parts, params)
    return out, lse, parts


def softmax_backward(dout, dlse, x: SoftmaxTensors, out, parts, params: SoftmaxParams, needs):
    from ..kernels.softmax.backward import backward

    gradients = [empty_like_layout(t, t.shape[3]) if need else None for t, need in zip(x.differentiable()[:3], needs)]
    gradients += [
        t.new_empty(t.shape) if t is not None and need else None for t, need in zip((x.bias, x.slopes), needs[3:])
    ]
    backward(dout, dlse, x, out, parts, params, *gradients)
    return tuple(gradients)


def linear_saved_shape(x: LinearTensors, params: LinearParams) -> tuple[int, ...]:
    """The denominators; of 16-bit inputs, with the rows of out unrounded: the gradient of a denominator reads them."""
    if not params.normalize:
        return (0,)
    rows = x.q.shape[0], x.heads, x.q.shape[2]
    return rows if x.q.dtype == torch.float32 else (*rows, 1 + x.v.shape[3])


def linear_forward(x: LinearTensors, params: LinearParams, with_saved: bool):
    from ..kernels.linear.forward import forward

    out = x.empty_out()
    den = x.q.new_empty(x.q.shape[0], x.heads, x.q.shape[2], dtype=torch.float32) if params.normalize else None
    if not with_saved or den is None or x.q.dtype == torch.float32:
        kv, z = forward(x, params, out, den, LINEAR_EPS)
        return out, kv, z, den if with_saved else None
    saved = den.new_empty(linear_saved_shape(x, params))
    kv, z = forward(x, params, saved[..., 1:], den, LINEAR_EPS)
    saved[..., 0] = den
    return out.copy_(saved[..., 1:]), kv, z, saved


def linear_backward(dout, dkv, dz, x: LinearTensors, out, saved, params: LinearParams, needs):
    from ..kernels.linear.backward import backward

    gradients = [empty_like_layout(t, t.shape[3]) if need else None for t, need in zip(x[:3], needs)]
    gradients += [t.new_empty(t.shape) if t is not None and need else None for t, need in zip(x[3:7], needs[3:])]
    den = saved if params.normalize else None
    if den is not None and den.dim() == 4:
        out, den = saved[..., 1:], saved[..., 0].contiguous()
    backward(dout, dkv, dz, x, out, den, params, *gradients)
    return tuple(gradients)


def linear_step(x: LinearTensors, params: LinearParams):
    from ..kernels.linear.step import step

    out = x.empty_out()
    step(x, params, out, LINEAR_EPS)
    x.state_was_written()
    return out
