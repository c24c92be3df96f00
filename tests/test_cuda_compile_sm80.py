"""The portable CUDA kernels compiled by nvcc without a GPU: no spills, and products on tensor cores, on every architecture.

The library as it goes into wheels has those of the oldest and the newest; the rest is compiled from the same source here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_build import ROOT, compile_cuda
from packaging_tools import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed"),
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
]
FORWARD, BACKWARD = 18, 44  # kernels
REPORT = re.compile(
    r"entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", re.DOTALL
)


def tool(name: str) -> Path:
    triton = pytest.importorskip("triton")
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def check(kernels: int, report: str, arch: str, *cubins: Path) -> None:
    found = [(name, int(stores) + int(loads)) for name, of, stores, loads in REPORT.findall(report) if of == arch]
    assert len(found) == kernels
    assert [name for name, spilled in found if spilled] == []

    sections = []
    for cubin in cubins:
        code = subprocess.run([tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True).stdout
        sections += re.split(r"\n\t\.section\t\.text\.", code)[1:]
    assert len(sections) == kernels
    for section in sections:
        assert "row_stats" in section.split(",")[0] or ("HMMA" in section and "LDGSTS" in section and "LDSM" in section)


@pytest.fixture(scope="module")
def library(checkout, tmp_path_factory) -> tuple[Path, str]:
    """Path of the library and what ptxas says of its kernels."""
    folder = tmp_path_factory.mktemp("cuda")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTATTN_")}
    environment |= {"FASTATTN_BUILD": "cuda", "FASTATTN_CUDA_ARCHS": "80;120", "CUDAFLAGS": "-Xptxas -v"}
    command = (sys.executable, "setup.py", "-q", "build_cuda", "--build-dir", folder)
    return folder / "libfastattn_cuda.so", compile_cuda(*command, cwd=checkout, env=environment)


def test_the_library_loads_without_a_gpu_and_knows_no_torch(library):
    """As CMake links it for wheels: cudart is inside."""
    path, _ = library
    code = path.read_bytes()
    assert not [name for name in (b"libcudart.so", b"libtorch", b"libc10", b"libpython") if name in code]
    run(sys.executable, "-c", f"import torch, fastattn._C as C; C.cuda_load({str(path)!r})")
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["cuda_archs"] == "80;120" and facts["cuda_compiler"]
    assert path.stat().st_size <= 25 * 2**20


@pytest.mark.parametrize("arch", ("80", "120"))
def test_registers_suffice_in_the_library(arch, library, tmp_path):
    path, report = library
    subprocess.run([tool("cuobjdump"), "-xelf", "all", path], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    check(FORWARD + BACKWARD, report, arch, *tmp_path.glob(f"*.sm_{arch}.cubin"))


@pytest.mark.parametrize("arch", ("86", "89", "90", "100"))
def test_registers_suffice(arch, tmp_path):
    """The backward pass, most of the time it takes, is compiled for the library alone."""
    cubin = tmp_path / "kernels.cubin"
    command = ["nvcc", "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "-cubin"]
    paths = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", "-o", cubin]
    check(FORWARD, compile_cuda(*command, *paths, ROOT / "csrc/cuda/softmax_forward_sm80.cu"), arch, cubin)
