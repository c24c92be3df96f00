"""What the build left beside the package, its record and its libraries: loaded where whole, else named with cause and remedy."""

from __future__ import annotations

import importlib.util
import json
import struct
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ._version import __version__

PACKAGE = Path(__file__).parent
RECORD = PACKAGE / "_build_info.json"


def rebuild(mode: str = "cpu", archs: str = "") -> str:
    targets = f" FASTATTN_CUDA_ARCHS={archs}" if archs else ""
    return f"in the source tree: FASTATTN_BUILD={mode}{targets} pip install --force-reinstall --no-deps ."


def with_remedy(problem: str, remedy: str) -> str:
    """A library that names its own remedy, after a semicolon, knows better."""
    return problem if "; " in problem else f"{problem}; {remedy}"


def cut_off(path: Path | str) -> str | None:
    """What is wrong with an ELF file shorter than its header says: mapping one ends the process with SIGBUS."""
    with open(path, "rb") as file:
        header = file.read(64)
        size = file.seek(0, 2)
    if header[:5] != b"\x7fELF\x02" or len(header) < 64:  # not of 64 bits, or so short that the loader says so
        return None
    sections_at, entry_size, entries = struct.unpack_from("<40xQ10xHH", header)
    needed = sections_at + entry_size * entries
    return f"{path} is cut off: {size} bytes of {needed}" if size < needed else None


def record() -> dict[str, Any]:
    """What setup.py wrote about the build, or, as the reason of mode "none" or "unknown", why there is nothing to read."""
    try:
        found = json.loads(RECORD.read_text())
        return {"mode": found["mode"], "reason": found["reason"], **found}
    except FileNotFoundError:
        return {"mode": "none", "reason": "never built"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {"mode": "unknown", "reason": f"the record {RECORD} is broken ({error!r}); {rebuild()}"}


@cache
def native() -> tuple[ModuleType | None, str | None]:
    """(fastattn._C, None), or (None, why there is none and what to do). Whatever is there, it does not raise."""
    try:
        spec = importlib.util.find_spec("fastattn._C")
        if spec is None or spec.origin is None or Path(spec.origin).parent != PACKAGE:  # not that of another install
            return None, _why_absent()
        problem = cut_off(spec.origin)
        if problem:
            return None, f"the native library {problem}; {rebuild()}"
        import fastattn._C as library
    except Exception as error:
        return None, with_remedy(f"the native library does not load: {error}", rebuild())
    found = getattr(library, "version", None)
    if found != __version__:
        problem = f"the native library {library.__file__} is of version {found}, the package of {__version__}"
        return None, f"{problem}; {rebuild()}"
    return library, None


def _why_absent() -> str:
    build = record()
    mode, reason = build["mode"], build["reason"]
    others = ", ".join(sorted(path.name for path in PACKAGE.glob("_C.*.so")))
    if others:
        return f"the native library is there for another Python alone ({others}); with this one, {rebuild()}"
    if mode == "unknown":
        return reason
    if mode != "none":
        return f"the install in {PACKAGE} is half-built: its record says {mode}, but there is no _C; {rebuild()}"
    if not RECORD.exists():
        problem = f"{PACKAGE} was never built"
        return f"{problem}; if it is a source tree in front of an install, leave its folder or mend PYTHONPATH, else {rebuild()}"
    compiler = "" if reason == "FASTATTN_BUILD=none" else "install a C++17 compiler with OpenMP, then "
    return f"the package was built without the native library ({reason}); {compiler}{rebuild()}"
