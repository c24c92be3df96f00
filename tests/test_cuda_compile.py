"""The Hopper kernels as nvcc compiles them for sm_90a: spills, instructions and their order. No GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from cuda_build import ROOT, compile_cuda, kernel_sources

NVCC = shutil.which("nvcc")
SOURCES = [path for path in kernel_sources() if path.stem.endswith("_sm90")]
FLAGS = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}",
         f"-I{ROOT / 'csrc' / 'include'}"]  # fmt: skip

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that triton brings."""
    triton = find_spec("triton")
    shipped = (
        Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton and triton.origin else None
    )
    return shutil.which("cuobjdump") or (str(shipped) if shipped and shipped.exists() else None)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[Path, tuple[Path, str]]:
    """Object file and what ptxas says, of every source."""
    folder = tmp_path_factory.mktemp("cuda")

    def compile_one(source: Path) -> tuple[Path, str]:
        target = folder / f"{source.stem}.o"
        return target, compile_cuda(NVCC, *FLAGS, "-c", source, "-o", target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(SOURCES, pool.map(compile_one, SOURCES)))


@pytest.fixture(scope="module")
def kernels(compiled) -> dict[str, list[str]]:
    """Instructions of every kernel, by mangled name."""
    tool = disassembler()
    if tool is None:
        pytest.skip("neither the CUDA toolkit nor triton brings cuobjdump")
    found: dict[str, list[str]] = {}
    for target, _ in compiled.values():
        text = subprocess.run([tool, "-sass", target], capture_output=True, text=True, check=True).stdout
        for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", text, re.S):
            found[name] = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", body, re.M)
    return found


def forward_kernels(kernels: dict[str, list[str]]) -> dict[str, list[str]]:
    found = {name: code for name, code in kernels.items() if "forward_kernel" in name}
    assert len(found) == 18  # two dtypes, three widths; scores, logits, packed
    return found


def gradient_kernels(kernels: dict[str, list[str]]) -> dict[str, list[str]]:
    found = {name: code for name, code in kernels.items() if "gradient_kernel" in name}
    assert len(found) == 16  # two dtypes; keys and queries of three widths, keys with sums of dQ of two
    return found


@pytest.mark.slow
def test_nothing_spills(compiled):
    for source, (_, text) in compiled.items():
        functions = re.findall(r"properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill", text)
        assert functions, f"{source.name}: ptxas named no kernel"
        assert not [f for f in functions if f[1:] != ("0", "0")], source.name


def test_products_are_not_serialised(compiled):
    """C7510 to C7518: ptxas waits after every wgmma, or adds waits of its own. C7508: setmaxnreg is ignored."""
    for source, (_, text) in compiled.items():
        assert not re.findall(r".*\(C75(?:08|1[0-8])\).*", text), source.name


def test_products_are_wgmma_and_loads_are_tma(kernels):
    for name, code in {**forward_kernels(kernels), **gradient_kernels(kernels)}.items():
        operations = " ".join(line.replace("@", " ") for line in code)
        assert "HGMMA" in operations and "UTMALDG" in operations, name
        assert not re.search(r"\bHMMA", operations), name


def pieces(code: list[str]) -> list[str]:
    """The order of what matters: s and r for products (shared, registers), 1 and 0 for waits, e for exponentials."""
    found = []
    for line in code:
        if "HGMMA" in line:
            found.append("r" if re.search(r"R\d+, R\d+, gdesc", line) else "s")
        elif "WARPGROUP.DEPBAR" in line:
            found.append("1" if line.endswith("0x1") else "0")
        elif "MUFU.EX2" in line:
            found.append("e")
    return found


def test_exponentials_run_beside_the_second_product(kernels):
    """Both loops: scores, product, wait for the scores, all exponentials, and only then the wait for the product."""
    for name, code in forward_kernels(kernels).items():
        order = re.sub(r"(.)\1*", r"\1", "".join(pieces(code)))
        assert order.count("sr1e0") == 2, (name, order)
        steps = re.findall(r"s+r+1(e+)0", "".join(pieces(code)))
        keys = 64 if "Li256E" in name else 128
        assert all(len(step) >= keys // 2 for step in steps), (name, [len(step) for step in steps])


def test_exponentials_of_gradients_run_beside_the_product_for_dp(kernels):
    """Where a warpgroup makes dS: scores, dP, a wait for the scores, exponentials, and only then the wait for dP."""
    for name, code in gradient_kernels(kernels).items():
        assert len(re.findall(r"s1e{32,}0e{32}r", "".join(pieces(code)))) == 1, name


def test_sums_of_dq_are_added_by_the_copy_engine(kernels):
    """Keys of D = 64 and 128 have a kernel for all three gradients; no kernel adds to memory by atomics of threads."""
    adding = 0
    for name, code in gradient_kernels(kernels).items():
        adding += any("UBLKRED" in line for line in code)
        assert not any(re.search(r"\b(RED|ATOM|ATOMG)\b", line) for line in code), name
    assert adding == 4
