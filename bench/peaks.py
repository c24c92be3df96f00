"""Denominators, measured in the same run as what they divide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import fastattn
from fastattn.testing.timing import interleave

READ_BYTES = 256 << 20
WINDOW_SECONDS = 0.3


@dataclass(frozen=True)
class Peaks:
    """GFLOP/s and GB/s; None where it cannot be measured, with the reason."""

    fp32: float | None = None
    bf16: float | None = None
    read: float | None = None
    source: str = ""
    fp16: float | None = None  # where it differs from fp32's

    def of(self, dtype: str, bound: str) -> float | None:
        """The peak that limits a case. A CPU without fp16 arithmetic computes fp16 in fp32."""
        if bound != "compute":
            return self.read
        return {"fp32": self.fp32, "bf16": self.bf16, "fp16": self.fp16 or self.fp32}[dtype]

    def best(self, other: Peaks) -> Peaks:
        def larger(a: float | None, b: float | None) -> float | None:
            return max((x for x in (a, b) if x is not None), default=None)

        numbers = {name: larger(getattr(self, name), getattr(other, name)) for name in ("fp32", "bf16", "read", "fp16")}
        return Peaks(**numbers, source=self.source)


def measure(device: str, threads: int) -> Peaks:
    return _cuda() if device == "cuda" else _cpu(threads)


def bandwidth(bound: str, threads: int) -> float | None:
    """GB/s now: it moves with what the neighbours of a shared machine do, so rows bound by memory ask again."""
    if bound == "update":
        return update_bandwidth()
    native = native_library()
    return None if native is None else native.read_bandwidth(threads, READ_BYTES)


def update_bandwidth() -> float:
    """GB/s read plus written by torch's own negation in place, on torch's threads."""
    numbers = torch.ones(READ_BYTES // 4)
    samples = interleave({"update": lambda: numbers.neg_()}, budget=WINDOW_SECONDS)
    return 2e-9 * READ_BYTES / samples["update"].quantile(0.2)


def native_library() -> Any:
    """fastattn._C, or None where the package has none that loads."""
    return fastattn.backends.native._C


def _cpu(threads: int) -> Peaks:
    native = native_library()
    if native is None:
        return Peaks(source="n/a: the native library is not built")
    fma = native.peak_fma(threads, WINDOW_SECONDS)
    bf16 = native.peak_bf16_dot(threads, WINDOW_SECONDS) or fma  # 0: no such instruction, bf16 runs in fp32
    read = native.read_bandwidth(threads, READ_BYTES)
    return Peaks(fma, bf16, read, f"native micro-kernels, {native.isa()}, {threads} threads")


def _cuda() -> Peaks:
    """Matmuls and device copy: what a kernel can be expected to reach, not the data sheet. fp32 without TF32."""
    n, size = {"float32": 4096, "bfloat16": 8192, "float16": 8192}, 2 << 30
    source, target = (torch.empty(size, dtype=torch.int8, device="cuda") for _ in range(2))
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    for name, length in n.items():
        factors = torch.randn(2, length, length, device="cuda", dtype=getattr(torch, name))
        calls[name] = partial(torch.matmul, *factors)
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        samples = interleave(calls, device="cuda", budget=1.0)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    fp32, bf16, fp16 = (2e-9 * length**3 / samples[name].quantile(0.2) for name, length in n.items())
    copy = 2e-9 * size / samples["copy"].quantile(0.2)
    where = f"matmuls of 4096 (fp32 without TF32) and 8192, and copy on {torch.cuda.get_device_name()}"
    return Peaks(fp32, bf16, copy, where, fp16)
