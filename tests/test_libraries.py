"""Libraries and records that are cut off, of another make or not there: `import fastattn` works, and one message names the remedy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_build
import pytest

from fastattn import libraries
from fastattn.backends import cuda

REBUILD = "in the source tree: FASTATTN_BUILD="
# The package without its __init__.py, which imports torch.
ALONE = "import sys, types; package = types.ModuleType('fastattn'); package.__path__ = [{!r}]; sys.modules['fastattn'] = package\n"


def run(*command, **environment) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FASTATTN_")}
    arguments = [sys.executable, *command]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd="/", env={**clean, **environment})
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def alone(package: Path, code: str, **environment) -> str:
    return run("-c", ALONE.format(str(package)) + code, **environment)


def native_file() -> Path:
    if libraries.native()[0] is None:
        pytest.skip(libraries.native()[1])
    return Path(libraries.native()[0].__file__)


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package without what a build leaves in it."""
    leave = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    return Path(shutil.copytree(libraries.PACKAGE, tmp_path / "fastattn", ignore=leave))


def info(package: Path, **environment) -> str:
    return run("-m", "fastattn.info", PYTHONPATH=str(package.parent), **environment)


@pytest.mark.parametrize("share", [0, 1e-5, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_a_native_library_that_is_cut_off(package, share):
    whole = native_file().read_bytes()
    (package / native_file().name).write_bytes(whole[: int(len(whole) * share)])
    problem = alone(package, "import fastattn.libraries as l; print(*l.native())")
    assert problem.startswith("None the native library") and problem.count(REBUILD) == 1


def test_a_native_library_that_raises(package):
    (package / "_C.py").write_text("raise RuntimeError('no such device')")
    problem = alone(package, "import fastattn.libraries as l; print(*l.native())")
    assert problem.startswith("None the native library does not load: no such device; ") and REBUILD in problem


@pytest.mark.parametrize(("native", "cause"), [("", "is of version None"), (None, "was never built")])
def test_the_package_is_imported_without_its_native_library(package, native, cause):
    if native is not None:
        (package / "_C.py").write_text(native)
    report = info(package)
    assert "!!! PURE PYTHON" in report and cause in report and report.count("!!! Remedy: ") == 1


@pytest.mark.parametrize("record", ["", '{"mode": "cu', "[]", '{"mode": "cpu"}'])
def test_a_record_that_is_broken(package, record, monkeypatch):
    monkeypatch.setattr(libraries, "RECORD", package / "_build_info.json")
    libraries.RECORD.write_text(record)
    found = libraries.record()
    assert found["mode"] == "unknown" and "_build_info.json is broken" in found["reason"] and REBUILD in found["reason"]
    assert cuda._record_problem.__wrapped__().count("FASTATTN_BUILD=cuda") == 1


def test_info_names_a_broken_record(package):
    shutil.copy(native_file(), package)
    (package / "_build_info.json").write_text('{"mode": "cu')
    report = info(package)
    assert report.count("_build_info.json is broken") == 1 and "PURE PYTHON" not in report


@pytest.mark.parametrize(
    ("mode", "reason", "cause", "remedy"),
    [
        (
            "none",
            "no C++ compiler found",
            "without the native library (no C++ compiler found)",
            "install a C++17 compiler",
        ),
        ("none", "FASTATTN_BUILD=none", "without the native library (FASTATTN_BUILD=none)", REBUILD),
        ("cpu", "FASTATTN_BUILD=cpu", "half-built", REBUILD),
    ],
)
def test_why_there_is_no_native_library(package, monkeypatch, mode, reason, cause, remedy):
    monkeypatch.setattr(libraries, "PACKAGE", package)
    monkeypatch.setattr(libraries, "RECORD", package / "_build_info.json")
    libraries.RECORD.write_text(f'{{"mode": "{mode}", "reason": "{reason}"}}')
    before, _, after = libraries._why_absent().partition("; ")
    assert cause in before and after.startswith(remedy)


def test_a_library_for_another_python_is_named(package, monkeypatch):
    monkeypatch.setattr(libraries, "PACKAGE", package)
    (package / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    assert "for another Python alone (_C.cpython-399" in libraries._why_absent()


def test_an_instruction_set_that_is_not_there(package):
    shutil.copy(native_file(), package)
    problem = alone(package, "import fastattn.libraries as l; print(l.native()[1])", FASTATTN_ISA="avx1024")
    assert "this CPU has: scalar" in problem and "; unset it or name one of these" in problem
    assert "compiler" not in problem and REBUILD not in problem


def test_a_cuda_library_that_is_not_there(monkeypatch, tmp_path):
    native_file()
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "libfastattn_cuda.so")
    load = cuda._load.__wrapped__
    monkeypatch.setattr(cuda, "built_archs", lambda: [])
    assert load(str(cuda.LIBRARY)) == f"the package was built without CUDA kernels; {cuda.REBUILD}"
    monkeypatch.setattr(cuda, "built_archs", lambda: ["80", "90a"])
    assert load(str(cuda.LIBRARY)).startswith("half-built: the record names targets 80, 90a, but ")
    assert load("/no/such/file") == "/no/such/file does not exist; mend FASTATTN_CUDA_EMULATOR"


FAMILY = """
#include "cuda/kernels.h"
namespace fastattn::cuda::sm80 {
const char* why_not(const SoftmaxParams&, const SoftmaxGradients*) { return "nothing runs here"; }
int64_t workspace(const SoftmaxParams&, const SoftmaxGradients*, const CudaCall&) { return 0; }
void forward(const SoftmaxParams&, const CudaCall&) {}
void backward(const SoftmaxParams&, const SoftmaxGradients&, const CudaCall&) {}
}
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> Path:
    """The CUDA library's interface without a kernel, on the emulator's driver, whose version can be set."""
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("stub") / "libfastattn_cuda.so"
    source = library.with_name("family.cpp")
    source.write_text(FAMILY)
    sources = [str(source), str(cuda_build.ROOT / "csrc" / "cuda" / "api.cpp")]
    subprocess.run([compiler, *cuda_build.FLAGS, "-shared", *sources, "-o", str(library)], check=True)
    return library


def test_a_driver_that_is_too_old_is_not_mended_by_a_rebuild(stub, monkeypatch):
    native_file()
    monkeypatch.setenv("FASTATTN_EMULATED_DRIVER", "12040")
    problem = cuda._load.__wrapped__(str(stub))
    assert "the driver knows CUDA 12.4, the library was built with CUDA 13.0; update the driver" in problem
    assert "pip install" not in problem


@pytest.mark.parametrize("driver", ["0", "13000", "14010"])
def test_any_other_driver_will_do(stub, package, driver):
    shutil.copy(native_file(), package)
    code = f"import fastattn._C as C; C.cuda_load({str(stub)!r}); print('loaded')"
    assert alone(package, code, FASTATTN_EMULATED_DRIVER=driver) == "loaded\n"


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_cuda_library_that_is_cut_off(stub, tmp_path, share):
    native_file()
    part = tmp_path / "libfastattn_cuda.so"
    part.write_bytes(stub.read_bytes()[: int(stub.stat().st_size * share)])
    code = f"from fastattn.backends import cuda; print(cuda._load({str(part)!r}))"
    folder = str(libraries.PACKAGE.parent)
    problem = run("-c", code, PYTHONPATH=folder) if share == 0.5 else cuda._load.__wrapped__(str(part))
    assert problem.startswith("the CUDA library does not load: ") and cuda.REBUILD in problem


@pytest.mark.parametrize("symbol", ["fastattn_cuda_abi", "another"])
def test_a_cuda_library_of_another_make_is_rebuilt(stub, tmp_path, symbol):
    native_file()
    library = tmp_path / "libfastattn_cuda.so"
    source = f'extern "C" int {symbol}() {{ return 99; }}'
    command = [os.environ.get("CXX", "c++"), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    problem = cuda._load.__wrapped__(str(library))
    assert (
        "another version (interface 99" in problem or "lacks fastattn_cuda_abi" in problem
    ) and cuda.REBUILD in problem
