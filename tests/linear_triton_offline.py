"""Compile the Triton kernels of linear attention exactly as a launch would, without a GPU; see triton_offline.py.

By hand: python tests/linear_triton_offline.py [arch [D]]
"""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import torch
from triton_offline import Launch, compiled_row, specialization

from fastattn.kernels.linear import backward, forward, run, step
from fastattn.params import LinearParams, LinearTensors


class Case(NamedTuple):
    """What decides which kernels are compiled."""

    arch: int
    D: int
    dtype: str = "bfloat16"
    phi: str = "elu1"
    decay: str = "none"  # "scalar", "vector"
    beta: bool = False
    causal: bool = True
    packed: bool = False
    step: bool = False
    group: int = 1


CASES = [
    Case(90, 128, decay="scalar"),
    Case(80, 64, decay="scalar", phi="identity", group=2),
    Case(100, 256, phi="relu"),
    Case(90, 64, decay="vector", phi="identity"),
    Case(90, 128, decay="scalar", phi="identity", beta=True),
    Case(80, 64, "float32", decay="scalar", phi="identity", packed=True),
    Case(90, 80, "float16", causal=False, phi="taylor1"),
    Case(90, 128, step=True, decay="scalar"),
]
# Too many for every test run.
MORE = [
    *(Case(arch, D, dtype, decay=decay) for arch in (80, 86, 90, 100) for D in (64, 128, 256)
      for dtype in ("bfloat16", "float32") for decay in ("none", "scalar", "vector")),
    *(Case(arch, D, dtype, "identity", "scalar", True) for arch in (80, 86, 90, 100) for D in (64, 128, 256)
      for dtype in ("bfloat16", "float32", "float16")),
    *(Case(90, 16, dtype, "taylor2", causal=causal) for dtype in ("bfloat16", "float16") for causal in (True, False)),
    *(Case(90, D, phi=phi, step=True, beta=phi == "identity") for D in (64, 256) for phi in ("identity", "taylor1")),
]  # fmt: skip


def launches(case: Case) -> list[Launch]:
    """The different launches of one forward and backward call or one step on `case.arch`, recorded instead of run."""
    B, H, L, D, dtype = 1 if case.packed else 2, 4, 1 if case.step else 512, case.D, getattr(torch, case.dtype)
    heads, normalize = H // case.group, case.phi != "identity"
    q, k = torch.zeros(B, H, L, D, dtype=dtype), torch.zeros(B, heads, L, D, dtype=dtype)
    gates = {"none": None, "scalar": torch.zeros(B, heads, L), "vector": torch.zeros(B, heads, L, D)}[case.decay]
    cu_seqlens = torch.tensor([0, 100, 512], dtype=torch.int32) if case.packed else None
    x = LinearTensors(q, k, k, gates, torch.zeros(B, heads, L) if case.beta else None, cu_seqlens=cu_seqlens)
    kv = torch.zeros(x.state_shape(case.phi))
    z = kv[..., 0].contiguous() if normalize else None
    x = x._replace(kv=kv, z=z)
    params = LinearParams(case.phi, case.causal, normalize, 0.1)
    found: dict[str, Launch] = {}

    def record(kernel, n_programs, *args, **options):
        launch = Launch(kernel, args, options)
        found.setdefault(f"{kernel.__name__} {specialization(launch)} {options}", launch)

    for module in (run, backward, step):
        module.launch = record  # type: ignore[attr-defined]
    run.arch_of = lambda x: case.arch  # type: ignore[attr-defined]
    if case.step:
        step.step(x, params, torch.empty_like(q), 1e-6)
        return list(found.values())
    den = torch.zeros(B, H, L) if normalize else None
    out = torch.empty_like(q)
    forward.forward(x, params, out, den, 1e-6)
    if normalize and dtype != torch.float32:  # with a gradient out is kept as it was before rounding
        out = torch.empty(B, H, L, 1 + D)[..., 1:]
        forward.forward(x, params, out, den, 1e-6)
    gradients = [None if t is None else torch.empty_like(t) for t in x[:7]]
    backward.backward(q, kv, z, x, out, den, params, *gradients)
    return list(found.values())


def main() -> None:
    """Arguments: nothing (all cases), an architecture and a head dimension, or --slice n m of those that are tested."""
    words = sys.argv[1:]
    numbers = [int(word) for word in words if word.isdigit()]
    if words[:1] == ["--slice"]:
        # One launch in m, so that processes have equally much to do.
        jobs = [(case, launch) for case in CASES for launch in launches(case)][numbers[0] :: numbers[1]]
    else:
        wanted = [case for case in CASES + MORE if [case.arch, case.D][: len(numbers)] == numbers]
        jobs = [(case, launch) for case in wanted for launch in launches(case)]
    for case, launch in jobs:
        options: dict[str, Any] = {name: launch.options.get(name) for name in ("REVERSE", "TRANSPOSED", "BT")}
        print(json.dumps({"case": case._asdict(), **compiled_row(launch, case.arch), **options}), flush=True)


if __name__ == "__main__":
    main()
