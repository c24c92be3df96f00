"""Builds the native library with CMake and maps kernels/ and bench/ into the package. No network, no torch."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
RECORD = "_build_info.json"


def find_compiler() -> tuple[str | None, str]:
    """(C++17 compiler, "") or (None, why this machine cannot build)."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = [path for path in (shutil.which(name.split()[0]) for name in names) if path]
    if not found:
        return None, f"no C++ compiler found (looked for {', '.join(names)})"
    probe = [found[0], "-std=c++17", "-fopenmp", "-x", "c++", "-fsyntax-only", "-"]
    source = "#include <omp.h>\n#include <optional>\nint main() { return omp_get_max_threads() == 0; }\n"
    result = subprocess.run(probe, input=source, capture_output=True, text=True)
    if result.returncode:
        first_line = (result.stderr.strip().splitlines() or ["no message"])[0]
        return None, f"{found[0]} does not compile C++17 with OpenMP: {first_line}"
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        return None, f"Python.h is not in {include} (install the development package of this Python)"
    return found[0], ""


def choose_mode() -> tuple[str, str]:
    """("cpu" | "none", reason) from FASTATTN_BUILD and what the machine has."""
    wanted = os.environ.get("FASTATTN_BUILD", "auto")
    if wanted not in MODES:
        raise SystemExit(f"FASTATTN_BUILD must be one of {', '.join(MODES)}, got {wanted!r}")
    if wanted == "cuda":
        raise SystemExit("FASTATTN_BUILD=cuda: there are no CUDA kernels in this version; use auto, cpu or none")
    if wanted == "none":
        return "none", "FASTATTN_BUILD=none"
    compiler, problem = find_compiler()
    if compiler:
        return "cpu", f"FASTATTN_BUILD={wanted}"
    if wanted == "cpu":
        raise SystemExit(f"FASTATTN_BUILD=cpu: {problem}")
    return "none", problem


def announce_pure_python(reason: str) -> None:
    """pip swallows a build's output unless it runs with -v, so the terminal itself is told as well."""
    lines = [
        "fastattn is being installed WITHOUT its native library: pure Python only.",
        f"Reason: {reason}",
        "Every call still works, but CPU attention will be slower than torch's own.",
        "Remedy: install a C++17 compiler with OpenMP (Debian: apt install g++ python3-dev), then, in the source tree:",
        "        FASTATTN_BUILD=cpu pip install --force-reinstall --no-deps .",
    ]
    width = max(map(len, lines))
    box = "\n".join(["", "#" * (width + 4), *(f"# {line:<{width}} #" for line in lines), "#" * (width + 4), ""])
    print(box, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        try:
            with open("/dev/tty", "w") as terminal:
                print(box, file=terminal)
        except OSError:
            pass  # no terminal: stderr has it


def tool(name: str) -> str:
    """The program of a build requirement; a venv that is not activated does not have it on PATH."""
    folder = os.path.dirname(sys.executable)
    if name == "cmake" and importlib.util.find_spec("cmake"):
        folder = importlib.import_module("cmake").CMAKE_BIN_DIR
    path = shutil.which(name, path=folder) or shutil.which(name)
    if path is None:
        raise SystemExit(f"{name} not found: pip install {name}, or build without --no-build-isolation")
    return path


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class BuildExtension(build_ext):
    def build_extension(self, ext: Extension) -> None:
        pybind11 = importlib.import_module("pybind11")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        sanitize = os.environ.get("FASTATTN_SANITIZE") == "1"
        kind = "editable" if self.editable_mode else "sanitize" if sanitize else "wheel"
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{kind}"
        if kind == "wheel":  # an isolated build leaves a cache full of paths that are gone
            shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target.parent),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "FASTATTN_MODULE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "FASTATTN_SANITIZE": "ON" if sanitize else "OFF",
        }
        defines = [f"-D{key}={value}" for key, value in options.items()]
        extra = os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run([tool("cmake"), "-G", "Ninja", "-S", ROOT, "-B", build, *defines, *extra], check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([tool("cmake"), "--build", build, "-j", jobs], check=True)
        folder = ROOT / "fastattn" if self.editable_mode else target.parent
        record = json.loads((build / "build_info.json").read_text())
        write_record(folder, {"mode": "cpu", "reason": REASON, **record})


class BuildPython(build_py):
    def run(self) -> None:
        if not self.editable_mode:  # build/lib of an earlier build may hold modules that no longer exist
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if MODE == "none":
            if self.editable_mode:
                stale = ROOT / "fastattn" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
                stale.unlink(missing_ok=True)
            write_record(ROOT / "fastattn" if self.editable_mode else Path(self.build_lib) / "fastattn", {})


def write_record(folder: Path, record: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"mode": MODE, "reason": REASON, **record}, indent=1)
    (folder / RECORD).write_text(text + "\n")


MODE, REASON = choose_mode()
if MODE == "none" and {"bdist_wheel", "editable_wheel", "build_ext", "install", "develop"} & set(sys.argv):
    announce_pure_python(REASON)

# kernels/ has no __init__.py of its own: as a regular package it would shadow Hugging Face's `kernels` in a checkout.
kernels = find_packages("kernels")
bench = ["fastattn.bench", *(f"fastattn.bench.{name}" for name in find_packages("bench"))]

setup(
    packages=[
        *find_packages(include=["fastattn", "fastattn.*"]),
        *(f"fastattn.kernels.{name}" for name in kernels),
        *bench,
    ],
    package_dir={
        "fastattn.bench": "bench",
        **{f"fastattn.kernels.{name}": f"kernels/{name}" for name in kernels if "." not in name},
    },
    package_data={"fastattn": ["py.typed", "_C.pyi"]},
    include_package_data=False,
    ext_modules=[] if MODE == "none" else [CMakeExtension("fastattn._C")],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
