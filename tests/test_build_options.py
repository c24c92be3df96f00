"""What setup.py makes of its environment variables, and of a machine without the tools: each refusal names a remedy."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
KNOWN = ("75", "80", "86", "89", "90", "100", "103", "120")
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@pytest.fixture
def setup(monkeypatch) -> dict[str, Any]:
    """The functions of setup.py, which has printed a version and built nothing."""
    for name in (*(key for key in os.environ if key.startswith("FASTATTN_")), "CXX", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    with monkeypatch.context() as patch:
        patch.setenv("FASTATTN_BUILD", "none")
        return runpy.run_path(str(ROOT / "setup.py"))


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """A machine whose nvcc knows KNOWN and whose nvidia-smi lists what the test says."""

    def machine(*capabilities: str) -> None:
        lines = " ".join(f"compute_{arch}" for arch in KNOWN)
        monkeypatch.setenv("CUDACXX", program(tmp_path / "nvcc", f"printf '%s\\n' {lines}"))
        listed = " ".join(capabilities)
        program(tmp_path / "nvidia-smi", f"printf '%s\\n' {listed}" if listed else "exit 9")
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return machine


@pytest.mark.parametrize(
    ("capabilities", "wanted", "archs"),
    [
        ((), None, ["80", "86", "89", "90a", "100", "120"]),
        (("9.0", "9.0"), None, ["90a"]),
        (("8.6", "7.5"), "native", ["86"]),
        (("9.0",), "80;120", ["80", "120"]),
        ((), "103", ["103"]),
    ],
)
def test_targets(setup, gpus, monkeypatch, capabilities, wanted, archs):
    gpus(*capabilities)
    if wanted is not None:
        monkeypatch.setenv("FASTATTN_CUDA_ARCHS", wanted)
    assert setup["cuda_archs"]() == archs


@pytest.mark.parametrize(
    ("capabilities", "wanted", "problem", "remedy"),
    [
        ((), "native", "nvidia-smi lists no GPU of compute capability 8.0 or newer", "name targets"),
        (("7.5",), "native", "nvidia-smi lists no GPU of compute capability 8.0 or newer", "name targets"),
        (("13.0",), "native", "this nvcc does not know '130'", "take some of 75 80"),
        ((), "80;75", "the kernels need compute capability 8.0, '75' is below it", "leave it out"),
        ((), "80;99", "this nvcc does not know '99'", "take some of 75 80"),
        ((), "sm_80", "this nvcc does not know 'sm_80'", "take some of 75 80"),
    ],
)
def test_targets_that_cannot_be_had(setup, gpus, monkeypatch, capabilities, wanted, problem, remedy):
    gpus(*capabilities)
    monkeypatch.setenv("FASTATTN_CUDA_ARCHS", wanted)
    with pytest.raises(SystemExit) as refusal:
        setup["cuda_archs"]()
    assert str(refusal.value).startswith(f"FASTATTN_CUDA_ARCHS={wanted}: {problem}; {remedy}")


@pytest.mark.parametrize(
    ("environment", "problem", "remedy"),
    [
        ({"FASTATTN_BUILD": "fast"}, "FASTATTN_BUILD=fast is not known", "unset it or take one of auto, cpu"),
        ({"FASTATTN_BUILD": "cpu", "CXX": "/no/such/compiler"}, "no C++ compiler found", "install a C++17 compiler"),
        ({"FASTATTN_BUILD": "cuda", "CUDACXX": "/no/such/nvcc"}, "no nvcc found", "install the CUDA toolkit"),
        (
            {"FASTATTN_BUILD": "cuda", "FASTATTN_CUDA_LIBRARY": "/no/lib.so"},
            "/no/lib.so and /no/lib.json not found",
            "make it by: FASTATTN_BUILD=cuda python setup.py build_cuda",
        ),
    ],
)
def test_builds_that_cannot_be_had(setup, monkeypatch, environment, problem, remedy):
    """Before anything is compiled."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as refusal:
        setup["choose_mode"]()
    assert problem in str(refusal.value) and f"; {remedy}" in str(refusal.value)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_machine_code_is_compressed_and_ptx_is_for_the_newest_target_alone(setup, tmp_path, monkeypatch):
    """As CMake is about to compile it."""
    monkeypatch.setenv("CMAKE_ARGS", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DCMAKE_CUDA_COMPILER_FORCED=ON")
    options = {"CMAKE_CUDA_COMPILER": shutil.which("nvcc"), "FASTATTN_CUDA_ARCHS": "120;80;86;90a"}
    setup["configure"](tmp_path, {**options, "FASTATTN_CUDA_ONLY": "ON"})
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    kernels = {Path(c["file"]).stem: c["command"] for c in commands if c["file"].endswith(".cu")}
    assert {name.rpartition("_")[2] for name in kernels} == {"sm80", "sm90"}
    for name, command in kernels.items():
        assert "-compress-all" in command, command
        codes = sorted(code for group in re.findall(r",code=\[?([\w,]+)", command) for code in group.split(","))
        portable = ["compute_120", "sm_120", "sm_80", "sm_86", "sm_90"]
        assert codes == (portable if name.endswith("sm80") else ["sm_90a"]), command
