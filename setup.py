"""Builds the native libraries with CMake and maps kernels/ and bench/ into the package. No network, no torch."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
RECORD = "_build_info.json"
CUDA_LIBRARY = "libfastattn_cuda.so"
COMPILER_REMEDY = "install a C++17 compiler with OpenMP (Debian: apt install g++ python3-dev)"
CUDA_ARCHS = ("80", "86", "89", "90a", "100", "120")


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
    """("cpu" | "cuda" | "none", reason) from FASTATTN_BUILD and what the machine has."""
    wanted = os.environ.get("FASTATTN_BUILD", "auto")
    if wanted not in MODES:
        raise SystemExit(f"FASTATTN_BUILD={wanted} is not known; unset it or take one of {', '.join(MODES)}")
    if wanted == "none":
        return "none", "FASTATTN_BUILD=none"
    compiler, problem = find_compiler()
    if compiler is None:
        if wanted != "auto":
            raise SystemExit(f"FASTATTN_BUILD={wanted}: {problem}; {COMPILER_REMEDY}, or set FASTATTN_BUILD=none")
        return "none", problem
    shared = os.environ.get("FASTATTN_CUDA_LIBRARY")
    if shared and wanted == "cuda" and "build_cuda" not in sys.argv:
        missing = [str(path) for path in (Path(shared), Path(shared).with_suffix(".json")) if not path.exists()]
        if missing:
            remedy = "make it by: FASTATTN_BUILD=cuda python setup.py build_cuda --build-dir FOLDER"
            raise SystemExit(f"FASTATTN_CUDA_LIBRARY: {' and '.join(missing)} not found; {remedy}")
        return "cuda", "FASTATTN_BUILD=cuda, the library of FASTATTN_CUDA_LIBRARY"
    if wanted == "cuda" and find_nvcc() is None:
        raise SystemExit(
            "FASTATTN_BUILD=cuda: no nvcc found (looked at CUDACXX, else nvcc on PATH and in /usr/local/cuda/bin); "
            "install the CUDA toolkit or set CUDACXX, or build without it: FASTATTN_BUILD=cpu"
        )
    if wanted == "cuda" or (wanted == "auto" and find_nvcc() and device_archs()):
        return "cuda", f"FASTATTN_BUILD={wanted}"
    return "cpu", f"FASTATTN_BUILD={wanted}"


def cuda_options() -> dict[str, object]:
    return {"CMAKE_CUDA_COMPILER": find_nvcc(), "FASTATTN_CUDA_ARCHS": ";".join(cuda_archs())}


def find_nvcc() -> str | None:
    names = [os.environ["CUDACXX"]] if os.environ.get("CUDACXX") else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, names)), None)


def device_archs() -> list[str]:
    """Targets of the GPUs of this machine: ["90a"]."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return []
    answer = subprocess.run(query, capture_output=True, text=True)
    found = {line.strip().replace(".", "") for line in answer.stdout.splitlines()} if answer.returncode == 0 else set()
    return sorted("90a" if arch == "90" else arch for arch in found if arch.isdigit() and int(arch) >= 80)


def cuda_archs() -> list[str]:
    """FASTATTN_CUDA_ARCHS ("80;90a", "native"); without it those of this machine's GPUs, or all that nvcc knows."""
    wanted = os.environ.get("FASTATTN_CUDA_ARCHS", "native" if device_archs() else "")
    command = [find_nvcc() or "nvcc", "--list-gpu-arch"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    known = [name.removeprefix("compute_") for name in listed]
    if not wanted:
        return [arch for arch in CUDA_ARCHS if arch.removesuffix("a") in known]
    archs = device_archs() if wanted == "native" else wanted.split(";")
    problem = "" if archs else "nvidia-smi lists no GPU of compute capability 8.0 or newer; name targets, as in 80;90a"
    for arch in archs:
        number = arch.removesuffix("a")
        if number.isdigit() and int(number) < 80:
            problem = f"the kernels need compute capability 8.0, {arch!r} is below it; leave it out"
        elif not number.isdigit() or number not in known:
            problem = f"this nvcc does not know {arch!r}; take some of {' '.join(known)}, or another CUDA toolkit"
    if problem:
        raise SystemExit(f"FASTATTN_CUDA_ARCHS={wanted}: {problem}")
    return archs


def announce_pure_python(reason: str) -> None:
    """pip swallows a build's output unless it runs with -v, so the terminal itself is told as well."""
    lines = [
        "fastattn is being installed WITHOUT its native library: pure Python only.",
        f"Reason: {reason}",
        "Every call still works, but CPU attention will be slower than torch's own.",
        f"Remedy: {COMPILER_REMEDY}, then, in the source tree:",
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


def configure(build: Path, options: dict[str, object]) -> None:
    options = {"CMAKE_BUILD_TYPE": "Release", "CMAKE_MAKE_PROGRAM": tool("ninja"), **options}
    defines = [f"-D{key}={value}" for key, value in options.items()]
    extra = os.environ.get("CMAKE_ARGS", "").split()
    build.mkdir(parents=True, exist_ok=True)
    subprocess.run([tool("cmake"), "-G", "Ninja", "-S", ROOT, "-B", build, *defines, *extra], check=True)


def run_cmake(build: Path, options: dict[str, object]) -> None:
    configure(build, options)
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    subprocess.run([tool("cmake"), "--build", build, "-j", jobs], check=True)


def copy_whole(source: Path | str, target: Path) -> None:
    """Under another name first: a build that is cut off leaves the old file, and who has it open keeps it."""
    partial = target.with_name(f"partial-{target.name}")
    shutil.copy2(source, partial)
    os.replace(partial, target)


def build_folder(kind: str) -> Path:
    return ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{kind}"


def sanitized() -> bool:
    return os.environ.get("FASTATTN_SANITIZE") == "1"


def native_options(output: Path) -> dict[str, object]:
    without_cuda = MODE != "cuda" or os.environ.get("FASTATTN_CUDA_LIBRARY")
    return {
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": importlib.import_module("pybind11").get_cmake_dir(),
        "FASTATTN_MODULE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        "FASTATTN_SANITIZE": "ON" if sanitized() else "OFF",
        **({"FASTATTN_CUDA_ARCHS": ""} if without_cuda else cuda_options()),
    }


class BuildExtension(build_ext):
    def run(self) -> None:
        super().run()
        write_record(self.package_folder(), self.record)

    def package_folder(self) -> Path:
        return (ROOT if self.editable_mode else Path(self.build_lib)) / "fastattn"

    def copy_file(self, infile, outfile, *arguments, **options):
        copy_whole(infile, Path(outfile))
        return outfile, 1

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        shared = os.environ.get("FASTATTN_CUDA_LIBRARY")
        kind = "editable" if self.editable_mode else "sanitize" if sanitized() else "wheel"
        build = build_folder(kind)
        if kind == "wheel":  # an isolated build leaves a cache full of paths that are gone
            shutil.rmtree(build, ignore_errors=True)
        run_cmake(build, native_options(target.parent))
        folder = self.package_folder()
        record = json.loads((build / "build_info.json").read_text())
        if self.editable_mode and MODE != "cuda":
            (folder / CUDA_LIBRARY).unlink(missing_ok=True)
        if MODE == "cuda" and (shared or self.editable_mode):  # setuptools copies the extension modules it knows of
            copy_whole(shared or target.parent / CUDA_LIBRARY, folder / CUDA_LIBRARY)
        if MODE == "cuda" and shared:
            record |= json.loads(Path(shared).with_suffix(".json").read_text())
        self.record = record


class BuildCuda(Command):
    """The CUDA library alone, which FASTATTN_CUDA_LIBRARY puts into the wheels of all Pythons."""

    user_options = [("build-dir=", "b", "where to build it")]

    def initialize_options(self) -> None:
        self.build_dir = "build/cuda"

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        folder = Path(self.build_dir).resolve()
        run_cmake(folder, {**cuda_options(), "FASTATTN_CUDA_ONLY": "ON", "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder})


class BuildObjects(Command):
    """All that an editable install would compile."""

    user_options: list[tuple[str, str, str]] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        if MODE != "none":
            folder = build_folder("editable")
            run_cmake(folder, native_options(folder))


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


class SourceDistribution(sdist):
    """The same bytes from the same sources: entries sorted, without owners, dated by SOURCE_DATE_EPOCH or 1980."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        date = int(os.environ.get("SOURCE_DATE_EPOCH", "315532800"))

        def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = date
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            return entry

        path = f"{base_name}.tar.gz"
        folder = Path(root_dir or ".", base_dir)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file, gzip.GzipFile("", "wb", mtime=date, fileobj=file) as packed:
            with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
                for entry in sorted([folder, *folder.rglob("*")]):
                    archive.add(
                        entry, str(Path(base_dir, entry.relative_to(folder))), recursive=False, filter=anonymous
                    )
        return path


def version() -> str:
    """The number in fastattn/_version.py and, of a build for an index of its own, a local part such as cu130."""
    number = (ROOT / "fastattn" / "_version.py").read_text().split('"')[1]
    local = os.environ.get("FASTATTN_LOCAL_VERSION")
    return number + (f"+{local}" if local else "")


def write_record(folder: Path, record: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"mode": MODE, "reason": REASON, "version": version(), **record}, indent=1)
    partial = folder / f"partial-{RECORD}"
    partial.write_text(text + "\n")
    os.replace(partial, folder / RECORD)


MODE, REASON = choose_mode()
if MODE == "none" and {"bdist_wheel", "editable_wheel", "build_ext", "install", "develop"} & set(sys.argv):
    announce_pure_python(REASON)

# kernels/ has no __init__.py of its own: as a regular package it would shadow Hugging Face's `kernels` in a checkout.
kernels = find_packages("kernels")
bench = ["fastattn.bench", *(f"fastattn.bench.{name}" for name in find_packages("bench"))]

setup(
    version=version(),
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
    cmdclass={
        "build_cuda": BuildCuda,
        "build_ext": BuildExtension,
        "build_objects": BuildObjects,
        "build_py": BuildPython,
        "sdist": SourceDistribution,
    },
)
