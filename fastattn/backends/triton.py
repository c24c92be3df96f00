"""Backend "triton": fastattn.kernels on CUDA tensors, or on CPU tensors in Triton's interpreter for testing."""

from __future__ import annotations

import importlib.util
import os

import torch

from ..params import SoftmaxCall, SoftmaxParams, empty_like_layout

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


def why_not(call: SoftmaxCall) -> list[str]:
    reason = status()
    if reason is not None:
        return [reason]
    q, v = call.q, call.v
    reasons = []
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


def why_not_by_default(call: SoftmaxCall) -> list[str]:
    if _interpreted():
        return ["the interpreter is for testing: ask for it with backend='triton'"]
    if not VERIFIED_ON_HARDWARE:
        return ["not yet verified on a GPU: ask for it with backend='triton'"]
    return []


def describe(call: SoftmaxCall) -> str:
    from ..kernels.common.launch import arch_of
    from ..kernels.softmax.config import pick_forward

    q = call.q
    extra = call.mask is not None or call.bias is not None or call.params.dropout_p > 0
    tile = pick_forward(q.shape[3], call.v.shape[3], q.dtype, arch_of(q), q.shape[2], extra)
    where = "interpreter" if _interpreted() else f"sm_{arch_of(q)} table"
    return f"{where}, {tile.BM}x{tile.BN} tiles, {tile.num_warps} warps, {tile.num_stages} stages"


def softmax_forward(q, k, v, mask, bias, rng, params: SoftmaxParams, with_parts: bool):
    from ..kernels.softmax.forward import forward

    out = empty_like_layout(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    parts = q.new_empty((*q.shape[:3], 2), dtype=torch.float32) if with_parts else None
    forward(q, k, v, mask, bias, rng, out, lse, parts, params)
    return out, lse, parts


def softmax_backward(dout, dlse, q, k, v, mask, bias, rng, out, parts, params: SoftmaxParams, needs):
    from ..kernels.softmax.backward import backward

    gradients = [empty_like_layout(x, x.shape[3]) if need else None for x, need in zip((q, k, v), needs)]
    gradients.append(bias.new_empty(bias.shape) if needs[3] else None)
    backward(dout, dlse, q, k, v, mask, bias, rng, out, parts, params, *gradients)
    return tuple(gradients)
