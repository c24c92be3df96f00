"""`python -m fastattn.info [--json|--check]`: what is installed, which backends run here and why, ready to paste."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch

import fastattn

from . import libraries
from .dispatch import BACKENDS, UnsupportedError

ISA_FLAGS = {
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512_bf16": ("avx512_bf16",),
    "amx": ("amx_tile", "amx_bf16"),
}
CHECK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native() -> ModuleType | None:
    return BACKENDS["native"]._C


def installs() -> list[str]:
    """Folders of every fastattn that this Python could import, that in use first: of installs, and on sys.path."""
    found = [libraries.PACKAGE]
    for distribution in importlib.metadata.distributions(name="fastattn"):
        direct = json.loads(distribution.read_text("direct_url.json") or "{}")
        editable = direct.get("dir_info", {}).get("editable")
        source = Path(url2pathname(urlparse(direct["url"]).path)) if editable else distribution.locate_file("")
        found.append(Path(str(source), "fastattn"))
    found += [Path(folder, "fastattn") for folder in sys.path]
    return list(dict.fromkeys(str(path.resolve()) for path in found if (path / "__init__.py").exists()))


def _cpu() -> dict[str, Any]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
    have = set(flags.group(1).split()) if flags else set()
    isas = ["scalar"]
    for isa, needed in ISA_FLAGS.items():
        if not have.issuperset(needed):
            break
        isas.append(isa)
    return {
        "model": model.group(1) if model else platform.processor() or platform.machine(),
        "logical cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "isas": isas,
    }


def openmp_runtimes() -> list[str]:
    """OpenMP libraries loaded into this process; two of them oversubscribe the cores."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if re.match(r"lib(g|i)?omp\d*[-.]", Path(path).name))


def backends(uncovered: str | None = None) -> list[dict[str, Any]]:
    """`uncovered`: what is wrong with the CUDA library for this GPU."""
    rows = []
    for name, backend in BACKENDS.items():
        status = backend.status() or (uncovered if name == "cuda" else None)
        reason, remedy = _split(status or "")
        rows.append({"backend": name, "available": status is None, "reason": reason, "remedy": remedy})
    return rows


def _split(status: str) -> tuple[str, str]:
    """(reason, remedy) of "reason; remedy" or "reason: remedy"."""
    for separator in ("; ", ": "):
        reason, found, remedy = status.partition(separator)
        if found:
            return reason, remedy
    return status, ""


def collect() -> dict[str, Any]:
    native = _native()
    record = libraries.record()
    local = record.get("version", "").partition("+")[2]
    cuda = None
    library: dict[str, Any] = {"archs": BACKENDS["cuda"].built_archs(), "missing": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        cuda = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}, CUDA {torch.version.cuda}"
        library["missing"] = BACKENDS["cuda"].uncovered((properties.major, properties.minor))
    return {
        "versions": {
            "fastattn": fastattn.__version__ + (f"+{local}" if local else ""),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "platform": platform.platform(),
        },
        "installs": installs(),
        "cpu": _cpu(),
        "cuda": cuda,
        "cuda library": library,
        "native": {
            "path": None if native is None else native.__file__,
            "isa": None if native is None else native.isa(),
            "build": record,
        },
        "openmp": openmp_runtimes(),
        "backends": backends(library["missing"]),
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith("FASTATTN_")},
    }


def check() -> list[dict[str, Any]]:
    """Output and gradients of each available backend against the fp64 reference, on one small call per dtype."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 67, 40), (2, 2, 131, 40), (2, 2, 131, 24))
    wide = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    rows = []
    for dtype in CHECK_DTYPES:
        qkv = [t.to(dtype) for t in wide]
        golden = _gradients([t.double() for t in qkv], "reference")
        low = [_error(a, g) for a, g in zip(_gradients(qkv, "reference"), golden)]
        for name, backend in BACKENDS.items():
            if backend.status() is not None:
                continue
            row: dict[str, Any] = {"backend": name, "dtype": str(dtype).removeprefix("torch.")}
            on_gpu = name in ("cuda", "triton") and torch.cuda.is_available()
            try:
                results = _gradients([t.cuda() if on_gpu else t for t in qkv], name)
                errors = [_error(a, g) for a, g in zip(results, golden)]
            except UnsupportedError as error:
                rows.append({**row, "ok": None, "note": str(error).splitlines()[0]})
                continue
            # Twice (out) and three times (gradients) the reference's own error, plus two roundings of values near 1.
            limits = [factor * e + 2 * torch.finfo(dtype).eps for factor, e in zip((2, 3, 3, 3), low)]
            ok = all(error <= limit for error, limit in zip(errors, limits))
            parts = zip(("out", "dq", "dk", "dv"), errors)
            rows.append({**row, "ok": ok, "note": "max error " + " ".join(f"{n} {e:.1e}" for n, e in parts)})
    return rows


def _gradients(qkv: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in qkv]
    out = fastattn.attention(*leaves, causal="bottom_right", window=(96, None), backend=backend)
    cotangent = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out))]


def _error(actual: torch.Tensor, golden: torch.Tensor) -> float:
    difference = (actual.cpu().double() - golden).abs().nan_to_num(float("inf"))
    return float(difference.max())


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]


def render(facts: dict[str, Any]) -> str:
    versions, cpu, native = facts["versions"], facts["cpu"], facts["native"]
    build = native["build"]
    lines = [f"{key:<12}{value or 'not installed'}" for key, value in versions.items()]
    used, *others = facts["installs"]
    if others:
        remedy = "pip uninstall the one you do not want, or take its folder off PYTHONPATH"
        lines.append(f"{'installs':<12}more than one: {used} is used, {', '.join(others)} is not; {remedy}")
    lines.append(
        f"{'cpu':<12}{cpu['model']}, {cpu['logical cores']} logical cores, {cpu['torch threads']} torch threads"
    )
    lines.append(f"{'cuda':<12}{facts['cuda'] or 'no device'}")
    library = facts["cuda library"]
    targets = ", ".join(f"sm_{arch}" for arch in library["archs"]) or "not built"
    coverage = "" if facts["cuda"] is None else f": {library['missing'] or 'covers this GPU'}"
    compiler = f" (nvcc {build['cuda_compiler']})" if build.get("cuda_compiler") else ""
    lines.append(f"{'cuda build':<12}{targets}{compiler}{coverage}")
    if native["path"] is None:
        row = next(row for row in facts["backends"] if row["backend"] == "native")
        lines += [
            "",
            "!!! PURE PYTHON: there is no native library, CPU attention runs slower than it could.",
            f"!!! Reason: {row['reason']}",
            f"!!! Remedy: {row['remedy']}",
            "",
        ]
    else:
        sanitized = ", sanitized" if build.get("sanitize") == "ON" else ""
        lines.append(f"{'native':<12}{native['path']}")
        lines.append(f"{'build':<12}{build['mode']} ({build['reason']}), {build.get('compiler', '?')}{sanitized}")
        built = build.get("isas", [])
        usable = [isa for isa in cpu["isas"] if isa in built] or ["scalar"]
        lines.append(f"{'isa':<12}{native['isa']} (usable: {', '.join(usable)}; built: {', '.join(built)})")
    runtimes = facts["openmp"]
    note = "" if len(runtimes) < 2 else "  <- more than one runtime: threads may oversubscribe the cores"
    lines.append(f"{'openmp':<12}{len(runtimes)} in this process{': ' if runtimes else ''}{', '.join(runtimes)}{note}")
    variables = " ".join(f"{key}={value}" for key, value in facts["environment"].items())
    lines.append(f"{'environment':<12}{variables or 'no FASTATTN_* variable set'}")
    cells = [(r["backend"], "yes" if r["available"] else "no", r["reason"], r["remedy"]) for r in facts["backends"]]
    lines += ["", *_table(("backend", "available", "reason", "remedy"), cells)]
    if "check" in facts:
        marks = {True: "ok", False: "WRONG", None: "skipped"}
        cells = [(r["backend"], r["dtype"], marks[r["ok"]], r["note"]) for r in facts["check"]]
        lines += ["", *_table(("check", "dtype", "result", "against the fp64 reference"), cells)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastattn.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.add_argument(
        "--check", action="store_true", help="run every available backend once; exit code 1 if one is wrong"
    )
    options = parser.parse_args(arguments)
    facts = collect()
    if options.check:
        facts["check"] = check()
    print(json.dumps(facts, indent=1) if options.json else render(facts))
    return int(any(row["ok"] is False for row in facts.get("check", [])))


if __name__ == "__main__":
    sys.exit(main())
