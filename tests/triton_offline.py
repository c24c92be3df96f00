"""Compile the Triton kernels exactly as a launch would, without a GPU, and print what came out, one JSON line per kernel.

By hand: python tests/triton_offline.py [arch [D]]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastattn.kernels.softmax import backward, forward
from fastattn.masks import causal, prefix
from fastattn.params import SoftmaxParams, SoftmaxTensors

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


class Case(NamedTuple):
    """What decides which kernels are compiled."""

    arch: int
    D: int
    dtype: str = "bfloat16"
    causal: str = "none"
    group: int = 1
    mask: bool = False
    bias: str = ""  # "full": [B, H, Lq, Lk], "heads": [1, H, Lq, Lk], "keys": [1, H, 1, Lk]
    dropout_p: float = 0.0
    Lq: int = 512
    softcap: float = 0.0
    slopes: bool = False
    sinks: bool = False
    diagonal: bool = False
    plan: bool = False


ARCHS = (80, 90, 100)
DEFAULTS = [
    *(Case(arch, D, causal="top_left") for arch in ARCHS for D in (64, 128, 256)),
    Case(80, 64, "float32"),
    Case(90, 128, "float32"),
    Case(86, 256),
    Case(90, 80),
    Case(90, 128, Lq=1),
]
EXTRAS = [
    Case(90, 128, causal="top_left", group=4),
    Case(90, 128, mask=True, bias="heads", dropout_p=0.1, causal="top_left"),
    Case(80, 64, mask=True, bias="full"),
    Case(100, 256, bias="keys", dropout_p=0.1),
    *(Case(arch, D, plan=True) for arch in ARCHS for D in (64, 128, 256)),
    Case(90, 64, "float32", plan=True),
    Case(90, 128, causal="top_left", softcap=30.0),
    Case(80, 64, causal="top_left", slopes=True),
    Case(90, 64, causal="top_left", sinks=True),
    Case(90, 128, softcap=30.0, slopes=True, sinks=True, diagonal=True, plan=True, bias="heads", group=4),
]
# Too many for every test run.
MORE = [
    *(Case(arch, D, dtype) for arch in (80, 86, 90, 100) for D in (64, 128, 256) for dtype in ("bfloat16", "float32")),
    *(Case(arch, D, mask=True) for arch in (80, 86, 90, 100) for D in (64, 128, 256)),
    Case(90, 128, "float16", "top_left"),
]


class Launch(NamedTuple):
    kernel: Any
    args: tuple
    options: dict


def launches(case: Case) -> list[Launch]:
    """The launches of one forward and backward call on `case.arch`, recorded instead of run."""
    B, H, L, D, dtype = 2, 4, 512, case.D, getattr(torch, case.dtype)
    q, k = torch.zeros(B, H, case.Lq, D, dtype=dtype), torch.zeros(B, H // case.group, L, D, dtype=dtype)
    lse, parts = torch.zeros(B, H, case.Lq), torch.zeros(B, H, case.Lq, 2)
    shapes = {"full": (B, H, case.Lq, L), "heads": (1, H, case.Lq, L), "keys": (1, H, 1, L)}
    x = SoftmaxTensors(
        q, k, k,
        bias=torch.zeros(shapes[case.bias], dtype=dtype) if case.bias else None,
        slopes=torch.zeros(1, H) if case.slopes else None,
        sinks=torch.zeros(H) if case.sinks else None,
        mask=torch.ones(B, H, case.Lq, L, dtype=torch.bool) if case.mask else None,
        diagonal=torch.zeros(case.Lq, dtype=torch.int32) if case.diagonal else None,
        rng=torch.zeros(2, dtype=torch.int64) if case.dropout_p else None,
        plan=(causal() | prefix(case.Lq // 7)).plan(case.Lq, L) if case.plan else None,
    )  # fmt: skip
    params = SoftmaxParams(0.1, case.causal, softcap=case.softcap, dropout_p=case.dropout_p)
    found: list[Launch] = []

    def record(kernel, n_programs, *args, **options):
        found.append(Launch(kernel, args, options))

    for module in (forward, backward):
        module.launch, module.arch_of = record, lambda x: case.arch  # type: ignore[attr-defined]
    forward.forward(x, torch.empty_like(q), lse, parts, params)
    gradients = [None if t is None else torch.empty_like(t) for t in x[:5]]
    backward.backward(q, lse, x, q, parts, params, *gradients)
    return found


def signature_of(arg, specialize: bool, path: tuple[int, ...], constants: dict, attributes: dict):
    """Triton's own specialisation: None and 1 become constants, addresses and ints may be known multiples of 16."""
    if isinstance(arg, tuple):
        types = [signature_of(x, specialize, (*path, n), constants, attributes) for n, x in enumerate(arg)]
        return type(arg)(*types) if hasattr(arg, "_fields") else tuple(types)
    if arg is None or (specialize and isinstance(arg, int) and arg == 1):
        constants[path] = arg
        return "constexpr"
    if isinstance(arg, float):
        return "fp32"
    is_tensor = isinstance(arg, torch.Tensor)
    if (is_tensor and arg.data_ptr() % 16 == 0) or (not is_tensor and specialize and arg % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    if is_tensor:
        return "*" + TYPES[arg.dtype]
    return "i32" if -(2**31) <= arg < 2**31 else "i64"


def specialization(launch: Launch):
    """(signature, constants, attributes): a launch for which these differ is compiled again."""
    kernel, args, options = launch
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for n, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name], constants[(n,)] = "constexpr", options[parameter.name]
        else:
            signature[parameter.name] = signature_of(
                args[n], not parameter.do_not_specialize, (n,), constants, attributes
            )
    return signature, constants, attributes


def compile_launch(launch: Launch, arch: int):
    kernel, _, options = launch
    signature, constants, attributes = specialization(launch)
    compiler_options = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={**compiler_options, "enable_fp_fusion": False},
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack). Triton kernels have no other use of the stack than spills."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))  # type: ignore[index, return-value]


def compiled_row(launch: Launch, arch: int) -> dict:
    """What came out of compiling one launch."""
    compiled = compile_launch(launch, arch)
    registers, stack = resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return {
        "kernel": launch.kernel.__name__.removesuffix("_kernel"),
        "tile": [launch.options.get(name) for name in ("BM", "BN", "num_warps", "num_stages")],
        "registers": registers,
        "spills": stack,
        "shared": compiled.metadata.shared,
        "wgmma": "wgmma.mma_async" in ptx,
        "tcgen05": "tcgen05.mma" in ptx,
        "tf32": "tf32" in ptx,
    }


def report(case: Case) -> list[dict]:
    return [compiled_row(launch, case.arch) for launch in launches(case)]


def main() -> None:
    """Arguments: nothing (all cases), an architecture and a head dimension, or --slice n m of those that are tested.

    --specializations compiles nothing: it prints what Triton would compile plans of several lengths and contents for.
    """
    words = sys.argv[1:]
    if words == ["--specializations"]:
        for Lq in (300, 512, 64, 65):
            for launch in launches(Case(90, 64, plan=True, Lq=Lq)):
                print(json.dumps([launch.kernel.__name__, str(specialization(launch))]))
        return
    numbers = [int(word) for word in words if word.isdigit()]
    if words[:1] == ["--slice"]:
        cases = (DEFAULTS + EXTRAS)[numbers[0] :: numbers[1]]
    else:
        cases = [case for case in DEFAULTS + EXTRAS + MORE if [case.arch, case.D][: len(numbers)] == numbers]
    for case in cases:
        for row in report(case):
            print(json.dumps({"case": case, **row}), flush=True)


if __name__ == "__main__":
    main()
