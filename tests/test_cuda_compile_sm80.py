"""The portable CUDA kernels compiled by nvcc without a GPU: no spills, and products on tensor cores, on every architecture."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_build import ROOT, compile_cuda

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed"),
]
KERNELS = {"forward": 18, "backward": 44}
# The source is the same for all; the backward pass, most of the time it takes, on the oldest and the newest.
CASES = [("forward", arch) for arch in ("80", "86", "89", "90", "100", "120")] + [
    ("backward", "80"),
    ("backward", "120"),
]
REPORT = re.compile(r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", re.DOTALL)


def nvdisasm() -> Path:
    triton = pytest.importorskip("triton")
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


@pytest.mark.parametrize(("which", "arch"), CASES)
def test_registers_suffice(which, arch, tmp_path):
    cubin = tmp_path / "kernels.cubin"
    command = ["nvcc", "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "-cubin"]
    paths = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", "-o", str(cubin)]
    source = str(ROOT / "csrc" / "cuda" / f"softmax_{which}_sm80.cu")
    found = REPORT.findall(compile_cuda(*command, *paths, source))
    assert len(found) == KERNELS[which]
    assert [name for name, stores, loads in found if int(stores) + int(loads)] == []

    code = subprocess.run([str(nvdisasm()), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"\n\t\.section\t\.text\.", code)[1:]
    assert len(sections) == KERNELS[which]
    for section in sections:
        assert "row_stats" in section.split(",")[0] or ("HMMA" in section and "LDGSTS" in section and "LDSM" in section)
