"""The CUDA library is built once and goes into the wheels of all Pythons; what it links is the user's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
from packaging_tools import BIN, ROOT, run, unpacked, wheel_names

import fastattn

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
# setup.py as it is, except that what CMake would compile is there already: PREBUILT FILE COMMAND...
PREBUILT = """
import runpy, shutil, subprocess, sys, sysconfig
from pathlib import Path

def run(command, **options):
    if "--build" not in command:
        return really(command, **options)
    lines = Path(command[2], "CMakeCache.txt").read_text().splitlines()
    assert "FASTATTN_CUDA_ARCHS:STRING=" in lines, "the CUDA library is compiled once more"
    (folder,) = [line.partition("=")[2] for line in lines if line.startswith("CMAKE_LIBRARY_OUTPUT_DIRECTORY:")]
    Path(folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(prebuilt, Path(folder, "_C" + sysconfig.get_config_var("EXT_SUFFIX")))

really, subprocess.run = subprocess.run, run
prebuilt = sys.argv.pop(1)
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


def without_network() -> list[str]:
    """How to run a command without a network, or nothing where that is not permitted."""
    command = ["unshare", "--map-root-user", "--net"]
    permitted = shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if permitted else []


def pythons() -> list[str]:
    """This Python and another that can build, or this one twice."""
    names = [shutil.which(f"python3.{minor}") for minor in range(10, 15)]
    names += map(str, Path(sys.base_prefix).parent.glob("*/bin/python3.1[0-4]"))
    code = "import os, sys, sysconfig; print(sys.version_info[1], os.path.exists(sysconfig.get_path('include') + '/Python.h'))"
    for name in filter(None, names):
        minor, _, headers = run(name, "-c", code, check=False).stdout.strip().partition(" ")
        if headers == "True" and minor != str(sys.version_info[1]):
            return [sys.executable, name]
    return [sys.executable, sys.executable]


@pytest.fixture(scope="module")
def cuda_wheels(checkout, tmp_path_factory) -> list[Path]:
    """Of two Pythons, without a network, around one library that needs the driver and an OpenMP runtime."""
    native = fastattn.backends.native._C
    if native is None or sys.platform != "linux" or not shutil.which("c++"):
        pytest.skip("needs Linux, a compiler and a native library")
    folder = tmp_path_factory.mktemp("shared")
    link = ["c++", "-shared", "-fPIC", "-x", "c++", "/dev/null", "-o"]
    run(*link, folder / "libcuda.so.1", "-Wl,-soname,libcuda.so.1")
    library = folder / "libfastattn_cuda.so"
    run(*link, library, "-Wl,--no-as-needed", "-x", "none", folder / "libcuda.so.1", "-lgomp")
    library.with_suffix(".json").write_text('{"cuda_archs": "80;120", "cuda_compiler": "13.0.88"}')
    wheels = []
    for i, python in enumerate(pythons()):
        command = [
            *without_network(),
            python,
            "-c",
            PREBUILT,
            native.__file__,
            "-q",
            "bdist_wheel",
            "-d",
            folder / str(i),
        ]
        path = os.pathsep.join((BIN, os.environ["PATH"]))
        tools = str(Path(setuptools.__file__).parents[1])  # pure Python or programs: any Python runs them
        environment = {
            "FASTATTN_BUILD": "cuda",
            "FASTATTN_CUDA_LIBRARY": str(library),
            "FASTATTN_LOCAL_VERSION": "cu130",
        }
        run(*command, cwd=checkout, PATH=path, PYTHONPATH=tools, **environment)
        wheels += (folder / str(i)).glob("*.whl")
    return wheels


def test_setup_uses_no_network(cuda_wheels):
    if not without_network():
        pytest.skip("no permission to run a process without a network")
    assert len(cuda_wheels) == 2


def test_the_cuda_library_is_shared_by_the_wheels_of_all_pythons(cuda_wheels, checkout):
    first, second = (zipfile.ZipFile(wheel) for wheel in cuda_wheels)
    name = "fastattn/libfastattn_cuda.so"
    assert first.read(name) == second.read(name)
    for wheel, archive in zip(cuda_wheels, (first, second)):
        extra = {n for n in archive.namelist() if ".dist-info/" not in n} - wheel_names(checkout)
        (module,) = {n for n in extra if n.startswith("fastattn/_C.cpython-")}
        assert extra == {name, module, "fastattn/py.typed", "fastattn/_C.pyi", "fastattn/_build_info.json"}
        assert "+cu130-cp3" in wheel.name and "+cu130" in wheel.name and wheel.stat().st_size <= 25 * 2**20
        record = json.loads(archive.read("fastattn/_build_info.json"))
        assert (record["mode"], record["cuda_archs"], record["cuda_compiler"]) == ("cuda", "80;120", "13.0.88")
        assert record["version"].endswith("+cu130")


@pytest.mark.skipif(shutil.which("auditwheel", path=BIN) is None, reason="auditwheel is not installed")
def test_repair_leaves_the_driver_and_openmp_to_others(cuda_wheels, checkout, tmp_path):
    """Both are there to be found: without the exclusions they would be grafted."""
    wheel = cuda_wheels[0]
    path, found = os.pathsep.join((BIN, os.environ["PATH"])), str(wheel.parents[1])
    run(checkout / ".ci" / "repair", wheel, tmp_path, PATH=path, LD_LIBRARY_PATH=found)
    (repaired,) = tmp_path.glob("*.whl")
    assert {name for name in unpacked(repaired) if not name.endswith("/")} == unpacked(wheel)
