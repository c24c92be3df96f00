"""Backend "cuda": the hand-written kernels of libfastattn_cuda.so on CUDA tensors, or, for testing, its emulator on CPU tensors."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .. import libraries
from ..params import Call, LinearCall, SoftmaxCall, SoftmaxParams, SoftmaxTensors, empty_like_layout

LIBRARY = libraries.PACKAGE / "libfastattn_cuda.so"
EMULATOR = "FASTATTN_CUDA_EMULATOR"  # path of the library built for the emulator of tests/cuda_emulator
FORCED = "FASTATTN_CUDA_KERNELS"  # "hopper" or "portable": only that family
REBUILD = libraries.rebuild("cuda")
FAMILIES = {"portable": 0, "hopper": 1}  # fastattn::CudaKernel
DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
HOPPER_HEAD_DIMS = (64, 128, 256)
ALIGNMENT = 16  # bytes, of rows in memory
LOG2_PARTS = True  # lse_parts count in powers of two

# The kernels pass in the emulator and compile; flip once the GPU tests have passed on a device.
VERIFIED_ON_HARDWARE = False


@cache
def _load(path: str) -> str | None:
    """Why the library at `path` cannot be used, or None once it is loaded."""
    native, problem = libraries.native()
    if native is None:
        return str(problem).replace(libraries.rebuild(), REBUILD)
    if not Path(path).exists():
        if path != str(LIBRARY):
            return f"{path} does not exist; mend {EMULATOR}"
        if _record_problem():
            return _record_problem()
        targets = ", ".join(built_archs())
        if targets:
            return f"half-built: the record names targets {targets}, but {path} does not exist; {REBUILD}"
        return f"the package was built without CUDA kernels; {REBUILD}"
    try:
        problem = libraries.cut_off(path)
        if problem is None:
            native.cuda_load(path)
    except Exception as error:
        problem = str(error)
    return None if problem is None else libraries.with_remedy(f"the CUDA library does not load: {problem}", REBUILD)


@cache
def built_archs() -> list[str]:
    """Targets the library was compiled for, as in FASTATTN_CUDA_ARCHS: ["80", "90a"]."""
    found = libraries.record().get("cuda_archs", "")
    return found.split(";") if found else []


@cache
def _record_problem() -> str | None:
    record = libraries.record()
    return record["reason"].replace(libraries.rebuild(), REBUILD) if record["mode"] == "unknown" else None


def covers(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether machine code for some target runs on the device, or the newest target's PTX can be compiled for it."""
    targets = sorted((int(arch.rstrip("a")) // 10, int(arch.rstrip("a")) % 10) for arch in archs)
    same_major = any(target[0] == capability[0] and target <= capability for target in targets)
    return same_major or (bool(targets) and targets[-1] <= capability)


def uncovered(capability: tuple[int, int]) -> str | None:
    """What is wrong and how to rebuild, where the library has nothing for a device of this capability."""
    if capability < (8, 0):
        found = ".".join(map(str, capability))
        return f"its kernels need compute capability 8.0, this GPU has {found}; use backend triton or eager"
    if _record_problem() or covers(built_archs(), capability):
        return _record_problem()
    arch = f"{capability[0]}{capability[1]}" + ("a" if capability == (9, 0) else "")
    problem = f"the library was built for {', '.join(built_archs()) or 'nothing'}, not for this GPU (sm_{arch})"
    return f"{problem}; {libraries.rebuild('cuda', arch)}"


def status() -> str | None:
    emulator = os.environ.get(EMULATOR)
    if emulator:
        return _load(os.path.abspath(emulator))
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs; use backend eager"
    return _no_device() or _load(str(LIBRARY))


def _no_device() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a build with CUDA (pytorch.org)"
    try:
        torch.cuda.init()
        problem = "torch sees no CUDA device"
    except Exception as error:  # no driver or one that is too old, in torch's words
        problem = str(error).replace(". Please", "; please", 1)
    return libraries.with_remedy(problem, "look at nvidia-smi and CUDA_VISIBLE_DEVICES")


def why_not(call: Call) -> list[str]:
    reason = status()
    if reason is not None:
        return [reason]
    x = call.x
    if os.environ.get(EMULATOR):
        if x.q.device.type != "cpu":
            return [f"{EMULATOR} runs it on CPU tensors, these are on {x.q.device}"]
    elif x.q.device.type != "cuda":
        return [f"it runs on CUDA tensors, these are on {x.q.device}"]
    else:
        missing = uncovered(_capability(x.q))
        if missing:
            return [missing]
    return [] if _family(call) else _elsewhere("portable", call) or portable_refuses(call)


def portable_refuses(call: Call) -> list[str]:
    """What the mma.sync kernels, for compute capability 8.0 and newer, lack for the call."""
    if isinstance(call, LinearCall):
        return ["no kernel of linear attention"]
    x, reasons = call.x, []
    D, Dv = x.q.shape[3], x.v.shape[3]
    if x.q.dtype not in DTYPES:
        reasons.append(f"dtype {x.q.dtype} is not bfloat16 or float16")
    if max(D, Dv) > MAX_HEAD_DIM:
        reasons.append(f"head dimension {max(D, Dv)} is over {MAX_HEAD_DIM}")
    if D % 8 or Dv % 8 or min(D, Dv) == 0:
        reasons.append(f"head dimensions {D} and {Dv} are not multiples of 8")
    if x.mask is not None:
        reasons.append("a bool mask tensor: fastattn.masks.from_dense makes a mask object of it, which they take")
    if x.slopes is not None and call.needs_grad and x.slopes.requires_grad:
        reasons.append("a gradient of ALiBi slopes")
    return reasons


def hopper_refuses(call: Call) -> list[str]:
    """What the wgmma kernels, for compute capability 9.0, lack for the call."""
    reasons = portable_refuses(call)
    if isinstance(call, LinearCall):
        return reasons
    x = call.x
    D, Dv = x.q.shape[3], x.v.shape[3]
    if D != Dv or D not in HOPPER_HEAD_DIMS:
        reasons.append(f"head dimensions {D} and {Dv} are not twice one of {', '.join(map(str, HOPPER_HEAD_DIMS))}")
    if x.bias is not None:
        reasons.append("a bias")
    if x.slopes is not None:
        reasons.append("ALiBi")
    if call.params.dropout_p > 0:
        reasons.append("dropout")
    return reasons


def _elsewhere(family: str, call: Call) -> list[str]:
    """Why the kernels of `family` are out of the question whatever the call is."""
    if os.environ.get(FORCED) not in (None, "", family):
        return [f"{FORCED}={os.environ[FORCED]}"]
    if family == "hopper" and not os.environ.get(EMULATOR) and _capability(call.x.q) != (9, 0):
        return ["the device is not of compute capability 9.0"]
    if family == "hopper" and not os.environ.get(EMULATOR) and "90a" not in built_archs():
        return ["the library was built without sm_90a"]
    return []


def _family(call: Call) -> str | None:
    """The kernels that run the call, the faster ones first."""
    if not _elsewhere("hopper", call) and not hopper_refuses(call):
        return "hopper"
    return None if _elsewhere("portable", call) or portable_refuses(call) else "portable"


def why_not_by_default(call: Call) -> list[str]:
    if os.environ.get(EMULATOR):
        return ["the emulator is for testing: ask for it with backend='cuda'"]
    if not VERIFIED_ON_HARDWARE:
        return ["not yet verified on a GPU: ask for it with backend='cuda'"]
    return []


def describe(call: Call) -> str:
    where = "emulated" if os.environ.get(EMULATOR) else f"sm_{''.join(map(str, _capability(call.x.q)))}"
    if _family(call) == "hopper":
        return f"Hopper kernels (wgmma, TMA), {where}"
    refused = "; ".join(_elsewhere("hopper", call) or hopper_refuses(call))
    return f"portable kernels (mma.sync), {where}; not the Hopper ones: {refused}"


def _capability(q: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(q.device)


def _launch(x: SoftmaxTensors, params: SoftmaxParams) -> tuple[int, int, int, int, bool]:
    """What the library is told besides the tensors: see csrc/bind/cuda.cpp."""
    family = FAMILIES[_family(SoftmaxCall(x, params, False)) or "portable"]
    if not x.q.is_cuda:
        return family, 0, -1, 2, params.deterministic
    device = x.q.get_device()
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return family, torch.cuda.current_stream(device).cuda_stream, device, processors, params.deterministic


def _readable(t: Tensor) -> Tensor:
    """t, copied where its rows are one (expanded), not dense, or do not start at multiples of 16 bytes."""
    unit = ALIGNMENT // t.element_size()
    aligned = all(stride % unit == 0 for stride, size in zip(t.stride()[:3], t.shape) if size > 1)
    rows = t.stride(3) == 1 and (t.stride(2) != 0 or t.shape[2] == 1)
    return t if rows and aligned and t.data_ptr() % ALIGNMENT == 0 else t.clone(memory_format=torch.contiguous_format)


def _prepared(x: SoftmaxTensors) -> SoftmaxTensors:
    slopes, sinks, diagonal = (t if t is None else t.contiguous() for t in (x.slopes, x.sinks, x.diagonal))
    q, k, v = _readable(x.q), _readable(x.k), _readable(x.v)
    return x._replace(q=q, k=k, v=v, slopes=slopes, sinks=sinks, diagonal=diagonal)


def _run(function, q: Tensor, *arguments) -> None:
    def allocate(size: int) -> Tensor:
        x = torch.empty(size // 4 + 64, dtype=torch.float32, device=q.device)
        return x[-x.data_ptr() % 256 // 4 :]

    if q.is_cuda:
        with torch.cuda.device(q.device):
            function(*arguments, allocate)
    else:
        function(*arguments, allocate)


def softmax_forward(x: SoftmaxTensors, params: SoftmaxParams, with_parts: bool):
    import fastattn._C as _C

    q = x.q
    out = empty_like_layout(q, x.v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    parts = q.new_empty((*q.shape[:3], 2), dtype=torch.float32) if with_parts else None
    if lse.numel():
        ready, (lo, hi) = _prepared(x), params.band(q.shape[2], x.k.shape[2])
        _run(
            _C.cuda_softmax_forward, q, ready, out, lse, parts,
            params.scale, lo, hi, params.softcap, params.dropout_p, _launch(x, params),
        )  # fmt: skip
    return out, lse, parts


def softmax_backward(dout, dlse, x: SoftmaxTensors, out, parts, params: SoftmaxParams, needs):
    import fastattn._C as _C

    q = x.q
    dq, dk, dv = (empty_like_layout(t, t.shape[3]) if need else None for t, need in zip((q, x.k, x.v), needs))
    dbias = None if x.bias is None or not needs[3] else x.bias.new_empty(x.bias.shape, dtype=torch.float32)
    gradients = [dq, dk, dv, dbias]
    if q[..., 0].numel() == 0 or x.k.shape[2] == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
    else:
        ready, (lo, hi) = _prepared(x), params.band(q.shape[2], x.k.shape[2])
        _run(
            _C.cuda_softmax_backward, q, _readable(dout), dlse, ready, _readable(out), parts.contiguous(), *gradients,
            params.scale, lo, hi, params.softcap, params.dropout_p, _launch(x, params),
        )  # fmt: skip
    return dq, dk, dv, None if dbias is None or x.bias is None else dbias.to(x.bias.dtype), None
