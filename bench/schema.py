"""The JSON of a run: how it is written, what it must hold, and how older versions are read."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.testing.timing import Samples

if TYPE_CHECKING:
    from .runner import Outcome, Result

VERSION = 2  # 2: intervals, peak memory and ratios of each implementation; the least that must be met

NUMBER, TEXT, FLAG = (int, float), (str,), (bool,)
MAYBE_NUMBER, MAYBE_TEXT, MAYBE_FLAG = (int, float, type(None)), (str, type(None)), (bool, type(None))
STATUS = {"ok", "wrong", "n/a"}


class Maybe:
    """null, or what `spec` says."""

    def __init__(self, spec: Any):
        self.spec = spec


class Each:
    """An object with any keys, whose values are what `spec` says."""

    def __init__(self, spec: Any):
        self.spec = spec


QUANTILES = {
    "median": NUMBER,
    "p20": NUMBER,
    "p80": NUMBER,
    "iqr": NUMBER,
    "low": MAYBE_NUMBER,  # ends of the 95% confidence interval of the median
    "high": MAYBE_NUMBER,
    "rounds": (int,),
}
GOAL = {"ratio": MAYBE_NUMBER, "of_peak": MAYBE_NUMBER, "slower_by_us": MAYBE_NUMBER, "against": TEXT}
IMPLEMENTATION = {
    "status": STATUS,
    "reason": TEXT,
    "kernel": TEXT,
    "rms_error": MAYBE_NUMBER,
    "max_error": MAYBE_NUMBER,
    "error_vs_baseline": MAYBE_NUMBER,
    "ms": Maybe(QUANTILES),
    "rate": MAYBE_NUMBER,  # in the unit of the result
    "of_peak": MAYBE_NUMBER,
    "extra_bytes": MAYBE_NUMBER,
    "ours_faster": Maybe(QUANTILES),  # how many times faster fastattn is than this one
}
RESULT = {
    "case": TEXT,
    "op": TEXT,
    "direction": {"forward", "backward", "forward+backward"},
    "dtype": TEXT,
    "device": TEXT,
    "shape": Each((int,)),
    "options": (dict,),
    "flops": NUMBER,
    "bytes": NUMBER,
    "bound": {"compute", "memory", "update"},
    "unit": {"GFLOP/s", "GB/s"},
    "goal": GOAL,
    "must": GOAL,
    "baseline": TEXT,
    "roof": MAYBE_NUMBER,
    "implementations": Each(IMPLEMENTATION),
    "ratio": Maybe(QUANTILES),  # of the baseline
    "ratio_met": MAYBE_FLAG,
    "peak_met": MAYBE_FLAG,
    "must_met": MAYBE_FLAG,
}
PEAKS = {"fp32": MAYBE_NUMBER, "bf16": MAYBE_NUMBER, "read": MAYBE_NUMBER, "source": TEXT}
ENVIRONMENT = {
    "time": TEXT,
    "versions": Each(MAYBE_TEXT),
    "os": TEXT,
    "cpu": (dict,),
    "threads": (int,),
    "pinned": MAYBE_FLAG,
    "variables": Each(TEXT),
    "gpu": (dict, type(None)),
    "git": Maybe({"commit": MAYBE_TEXT, "dirty": FLAG}),
    "warnings": [TEXT],
}
REPORT = {
    "schema_version": (int,),
    "arguments": (dict,),
    "environment": ENVIRONMENT,
    "peaks": Maybe(PEAKS),
    "results": [RESULT],
    "memory": (dict, type(None)),
    "gpt": [(dict,)],
    "lm": (dict, type(None)),
    "mask_building": [(dict,)],
    "interrupted": FLAG,
    "seconds": NUMBER,
}


def problems(report: Any) -> list[str]:
    """What is missing or of the wrong kind in a report of this version; empty when it is valid. More keys are legal."""
    found = list(_problems(report, REPORT, "report"))
    if not found and report["schema_version"] != VERSION:
        found.append(f"report.schema_version is {report['schema_version']}, not {VERSION}")
    return found


def _problems(value: Any, spec: Any, at: str) -> Iterator[str]:
    if isinstance(spec, Maybe):
        if value is not None:
            yield from _problems(value, spec.spec, at)
    elif isinstance(spec, tuple):
        if not isinstance(value, spec) or (isinstance(value, bool) and bool not in spec):
            yield f"{at} is {type(value).__name__}, not {' or '.join(kind.__name__ for kind in spec)}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{at} is {value}"
    elif isinstance(spec, set):
        if value not in spec:
            yield f"{at} is {value!r}, not one of {sorted(spec)}"
    elif isinstance(spec, list):
        yield from _problems(value, (list,), at)
        for i, item in enumerate(value if isinstance(value, list) else ()):
            yield from _problems(item, spec[0], f"{at}[{i}]")
    elif not isinstance(value, dict):
        yield f"{at} is {type(value).__name__}, not an object"
    elif isinstance(spec, Each):
        for name, item in value.items():
            yield from _problems(item, spec.spec, f"{at}.{name}")
    else:
        for name, inner in spec.items():
            if name in value:
                yield from _problems(value[name], inner, f"{at}.{name}")
            else:
                yield f"{at}.{name} is missing"


def load(path: str | Path) -> dict[str, Any]:
    """A report of any version, in the form of this one; what an old run did not record is null.

    Errors: ValueError for what is no report; OSError.
    """
    try:
        report = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if isinstance(report, dict) and report.get("schema_version") == 1:
        try:
            _upgrade(report)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a report of fastattn.bench: {error!r} in version 1") from error
    wrong = problems(report)
    if wrong:
        raise ValueError(f"{path}: not a report of fastattn.bench: {'; '.join(wrong[:3])}")
    return report


def _upgrade(report: dict[str, Any]) -> None:
    """Version 1 to 2. Runs before the linear ops had no "lm" and no "mask_building"."""
    report["schema_version"] = VERSION
    for name, nothing in (("lm", None), ("mask_building", []), ("gpt", []), ("memory", None)):
        report.setdefault(name, nothing)
    report["environment"].setdefault("pinned", None)
    no_goal = {"ratio": None, "of_peak": None, "slower_by_us": None, "against": ""}
    no_interval = {"low": None, "high": None}
    for result in report.get("results", []):
        result["goal"] = no_goal | result["goal"]
        result |= {"must": no_goal, "must_met": None}
        result["ratio"] = result["ratio"] and no_interval | result["ratio"]
        for name, one in result["implementations"].items():
            one["ms"] = one["ms"] and no_interval | one["ms"]
            one |= {"extra_bytes": None, "ours_faster": result["ratio"] if name == result["baseline"] else None}


def save(report: dict[str, Any], path: str | Path) -> None:
    """Whole or not at all: a reader, or a run that is killed, never leaves half a file."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(report, file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def as_json(result: Result) -> dict[str, Any]:
    case = result.case
    ratios = result.faster_than(result.baseline)
    directions = {(False, False): "forward", (True, False): "backward", (True, True): "forward+backward"}
    return {
        "case": case.name,
        "op": case.op,
        "direction": directions[case.backward, case.with_forward],
        "dtype": case.dtype,
        "device": case.device,
        **case.details,
        "flops": case.flops,
        "bytes": case.bytes,
        "bound": case.bound,
        "unit": "GFLOP/s" if case.bound == "compute" else "GB/s",
        "goal": asdict(case.goal),
        "must": asdict(case.must),
        "baseline": result.baseline,
        "roof": result.roof,
        "implementations": {name: _implementation(result, name, outcome) for name, outcome in result.outcomes.items()},
        "ratio": ratios and quantiles(ratios, 1.0),
        "ratio_met": result.ratio_met(case.goal),
        "peak_met": result.peak_met(case.goal),
        "must_met": result.must_met(),
    }


def _implementation(result: Result, name: str, outcome: Outcome) -> dict[str, Any]:
    samples, ratios = outcome.samples, result.faster_than(name) if name != "fastattn" else None
    return {
        "status": outcome.status,
        "reason": outcome.reason,
        "kernel": outcome.kernel,
        "rms_error": _finite(outcome.rms_error),
        "max_error": _finite(outcome.max_error),
        "error_vs_baseline": _finite(outcome.error_vs_baseline),
        "ms": samples and quantiles(samples, 1e3),
        "rate": result.rate(outcome),
        "of_peak": result.of_peak(outcome),
        "extra_bytes": outcome.extra_bytes,
        "ours_faster": ratios and quantiles(ratios, 1.0),
    }


def quantiles(samples: Samples, scale: float) -> dict[str, float]:
    low, high = samples.interval
    return {
        "median": samples.median * scale,
        "p20": samples.quantile(0.2) * scale,
        "p80": samples.quantile(0.8) * scale,
        "iqr": samples.iqr * scale,
        "low": low * scale,
        "high": high * scale,
        "rounds": len(samples.seconds),
    }


def _finite(value: float | None) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if value is None or math.isfinite(value) else None
