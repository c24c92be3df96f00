"""Peak memory of one long forward and backward, in a process of its own: `python -m fastattn.bench.memory`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

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
    return {"case": NAME, "status": "ok", **json.loads(done.stdout.splitlines()[-1])}


def _resident(field: str) -> int:
    """Bytes, from /proc/self/status: VmRSS is now, VmHWM the peak since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def _child(threads: int, backend: str, length: int) -> dict[str, Any]:
    import torch

    import fastattn

    torch.set_num_threads(threads)

    def tensors(L: int) -> list[torch.Tensor]:
        shape = (1, HEADS, L, HEAD_DIM)
        return [torch.randn(shape).bfloat16() for _ in range(4)]

    def step(q, k, v, dout):
        for x in (q, k, v):
            x.requires_grad_()
        fastattn.attention(q, k, v, causal=True, backend=backend).backward(dout)

    step(*tensors(256))  # libraries, thread stacks and allocator pools are not the op's memory
    inputs = tensors(length)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _resident("VmRSS")
    start = perf_counter()
    step(*inputs)
    seconds = perf_counter() - start
    size = inputs[0].nbytes
    return {
        "extra_bytes": _resident("VmHWM") - before,
        "results_bytes": 4 * size,  # out, dq, dk, dv: any implementation has to hold these
        "scores_bytes": HEADS * length * length * 2,  # one Lq x Lk matrix in bf16
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(_child(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
