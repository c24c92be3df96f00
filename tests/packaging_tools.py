"""Programs run in a clean environment, and what is in the archives they make."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = os.path.dirname(sys.executable)
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "_build_info.json", "__pycache__", ".*_cache", ".hypothesis"
)


def run(*command, check=True, cwd="/", **environment) -> subprocess.CompletedProcess[str]:
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("FASTATTN_", "PYTHONPATH", "LD_PRELOAD"))
    }
    command = tuple(map(str, command))
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=cwd, env={**clean, **environment})
    assert not check or result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result


def pip(*arguments, **options) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, **options)


def unpacked(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


def wheel_names(sources: Path) -> set[str]:
    names = set()
    for top, package in (("fastattn", "fastattn"), ("kernels", "fastattn/kernels"), ("bench", "fastattn/bench")):
        names |= {f"{package}/{path.relative_to(sources / top)}" for path in (sources / top).rglob("*.py")}
    return names
