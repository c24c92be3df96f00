"""Backend "triton": fastattn.kernels on CUDA tensors, or on CPU tensors in Triton's interpreter for testing."""

from __future__ import annotations

import importlib.util
import os

import torch

from ..params import Call, SoftmaxCall, SoftmaxParams, SoftmaxTensors, empty_like_layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256

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
        return "it has no launch configurations for AMD GPUs"
    if not torch.cuda.is_available():
        return "it needs a CUDA device (or TRITON_INTERPRET=1, for testing)"
    return None


def why_not(call: Call) -> list[str]:
    if call.op != "softmax":
        return ["it has no kernel for this op yet"]
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

    assert isinstance(call, SoftmaxCall)
    x, params, _ = call
    q, extra = x.q, has_extras(x, params) or params.dropout_p > 0  # `explain` draws no rng
    tile = pick_forward(q.shape[3], x.v.shape[3], q.dtype, arch_of(q), q.shape[2], extra, x.plan is not None)
    where = "interpreter" if _interpreted() else f"sm_{arch_of(q)} table"
    return f"{where}, {tile.BM}x{tile.BN} tiles, {tile.num_warps} warps, {tile.num_stages} stages"


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
