"""What malloc keeps between calls; peak memory of any call of this process, and of a long one in a process of its own.

`python -m fastattn.bench.memory` is that process.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

RESET = Path("/proc/self/clear_refs")  # a 5 written there makes VmHWM start again
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LENGTH, HEADS, HEAD_DIM = 32768, 1, 64
NAME = f"bf16 forward + backward causal, B1 H{HEADS} L{LENGTH} D{HEAD_DIM}"


def measure(timeout: float, threads: int, backend: str = "auto", length: int = LENGTH) -> dict[str, Any]:
    """Runs this module in a fresh process; a reason instead of numbers when it fails or takes too long."""
    command = [sys.executable, "-m", __name__, str(threads), backend, str(length)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"case": NAME, "status": "n/a", "reason": f"took more than {timeout:.0f} s"}
    if done.returncode != 0:
        return {"case": NAME, "status": "n/a", "reason": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return {"case": NAME, **json.loads(done.stdout.splitlines()[-1])}


def peak_extra(call: Callable[[], object], device: str) -> int | None:
    """Bytes that a call needs at its peak beyond what was there before, results included; None where nobody counts.

    On the CPU the pages of the process: what malloc has kept is handed back first, or it would hide as much.
    """
    try:
        if device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            allocated = torch.cuda.memory_allocated()
            call()
            return torch.cuda.max_memory_allocated() - allocated
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5")
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError, RuntimeError, MemoryError):
        return None


def keep_freed() -> None:
    """Tells glibc's malloc to keep what is freed for the next call, as allocators made for such work do by themselves.

    Left alone it hands back to the system what is free beyond a threshold that follows what was freed before, so that
    whether a call pays for fresh pages is a matter of what ran before it. Blocks over 32 MiB are handed back always.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 32 << 20)


def _resident(field: str) -> int:
    """Bytes, from /proc/self/status: VmRSS is now, VmHWM the peak since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def _use_up_freed_heap(size: int) -> list[Any]:
    """Blocks that fill what is freed but still resident: left open, it would hide as much of what the op takes."""
    import torch

    blocks: list[Any] = []
    fresh = 0
    while fresh < 4 and len(blocks) < 100:
        before = _resident("VmRSS")
        blocks.append(torch.ones(size, dtype=torch.uint8))
        fresh = fresh + 1 if _resident("VmRSS") - before > 0.9 * size else 0
    return blocks


def _child(threads: int, backend: str, length: int) -> dict[str, Any]:
    import torch

    import fastattn

    torch.set_num_threads(threads)

    def tensors(L: int) -> list[torch.Tensor]:
        shape = (1, HEADS, L, HEAD_DIM)
        return [torch.randn(shape, dtype=torch.bfloat16) for _ in range(4)]

    def step(q, k, v, dout):
        for x in (q, k, v):
            x.requires_grad_()
        fastattn.attention(q, k, v, causal=True, backend=backend).backward(dout)

    def right(q, k, v, dout):
        # Every row of weights sums to 1, so dv sums to what dout sums to; no dense oracle has this length.
        error = (v.grad.float().sum(2) - dout.float().sum(2)).abs().max() / dout.float().norm(dim=2).max()
        return bool(error < 0.05 and q.grad.isfinite().all() and k.grad.isfinite().all())

    step(*tensors(256))  # libraries, thread stacks and allocator pools are not the op's memory
    inputs = tensors(length)
    size = inputs[0].nbytes
    blocks = _use_up_freed_heap(size)
    RESET.write_text("5")
    before = _resident("VmRSS")
    start = perf_counter()
    step(*inputs)
    seconds = perf_counter() - start
    peak = _resident("VmHWM")
    del blocks
    if not right(*inputs):
        return {"status": "wrong", "reason": "the gradients break an identity, or are not finite"}
    return {
        "status": "ok",
        "extra_bytes": peak - before,
        "results_bytes": 4 * size,  # out, dq, dk, dv: any implementation has to hold these
        "scores_bytes": HEADS * length * length * 2,  # one Lq x Lk matrix in bf16
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(_child(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
