"""One place that starts kernels: interpreter or device, lock or device guard."""

import threading
from contextlib import nullcontext

import torch
import triton

# Read once: kernels are bound to the interpreter or the compiler when they are decorated.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# The interpreter patches triton.language globally, so it must not run in two threads at once.
_interpreter_lock = threading.Lock()

# Architectures with a table of their own; any other takes the nearest older one. 86: Ampere to Blackwell cards with 99 KB.
ARCHS = (80, 86, 90, 100)
_SMALL_SHARED_MEMORY = (86, 87, 89, 120, 121)


def table_arch(major: int, minor: int) -> int:
    """Key of the launch tables for a device of compute capability major.minor."""
    capability = 10 * major + minor
    if capability in _SMALL_SHARED_MEMORY:
        return 86
    return max((arch for arch in ARCHS if arch != 86 and arch <= capability), default=80)


def arch_of(x: torch.Tensor) -> int:
    """0 stands for the interpreter."""
    return 0 if INTERPRETED else table_arch(*torch.cuda.get_device_capability(x.device))


def launch(kernel, n_programs: int, *args, **options) -> None:
    """Run `n_programs` programs of `kernel` on the device of its first argument, a tensor or a tuple that begins with one."""
    if n_programs == 0:
        return
    if INTERPRETED:
        guard = _interpreter_lock
    else:
        device = (args[0] if isinstance(args[0], torch.Tensor) else args[0][0]).device
        guard = nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
    # s * scale + bias must not become one fma in one kernel and not in another: backward needs the logits of forward.
    with guard:
        kernel[(n_programs,)](*args, enable_fp_fusion=False, **options)
