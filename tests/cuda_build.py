"""The CUDA library built for the emulator of tests/cuda_emulator by the host compiler: the kernels' own sources, on CPU tensors."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "cuda_emulator"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
         f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", "-Wno-psabi"]  # fmt: skip
MOST_MEMORY = 3 * 10**9  # bytes: a build with two jobs fits a small machine


def kernel_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def compile_cuda(*command, **options) -> str:
    """What nvcc says, or a build that runs it; no process of it needs more than MOST_MEMORY."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(list(map(str, command)), stdout=said, stderr=said, **options)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    assert process.returncode == 0, text[-8000:]
    assert usage.ru_maxrss * 1024 < MOST_MEMORY, f"{usage.ru_maxrss} KiB"
    return text


def emulated_library() -> Path:
    """Path of the library for the sources as they are; built at most once for each state of them."""
    compiler = os.environ.get("CXX", "c++")
    families = ["-DFASTATTN_CUDA_HOPPER"] if any("sm90" in path.name for path in kernel_sources()) else []
    sources = [*kernel_sources(), ROOT / "csrc" / "cuda" / "api.cpp", EMULATOR / "machine.cpp"]
    read = [
        path for folder in ("csrc/cuda", "csrc/include", "tests/cuda_emulator") for path in (ROOT / folder).rglob("*")
    ]
    digest = hashlib.sha256(" ".join([compiler, *FLAGS, *families]).encode())
    for path in sorted(path for path in read if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "cuda_emulator" / digest.hexdigest()[:16]
    library = folder / "libfastattn_cuda.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)

    def run(*command: str) -> None:
        done = subprocess.run([compiler, *FLAGS, *families, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-8000:]

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.{os.getpid()}.o"
        run("-x", "c++", "-c", str(source), "-o", str(target))
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    linked = folder / f"linked.{os.getpid()}.so"
    run("-shared", *objects, "-o", str(linked))
    linked.rename(library)
    for name in objects:
        Path(name).unlink()
    return library
