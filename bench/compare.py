"""Two reports beside each other: what is slower beyond doubt, what is no longer right, what cannot be told."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from .columns import GREEN, Cell, show
from .progress import RED, say

NOTCH = 1.57  # median +- 1.57 iqr / sqrt(n): 95% for reports that hold no interval of their own
DOUBT = 0.05  # what counts as a difference where no limit is given
SAME_MACHINE = (("CPU", ("cpu", "model")), ("ISA", ("cpu", "isa")), ("torch", ("versions", "torch")))


def share(text: str) -> float:
    """5% or 0.05."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a share such as 5% or 0.05, got {text!r}")
    return value


@dataclass(frozen=True)
class Change:
    """new / base of one case: below 1 is faster. The interval is as wide as the two of its parts allow."""

    case: str
    verdict: str  # slower, faster, same, unclear, wrong, lost
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def bad(self) -> bool:
        return self.verdict in ("slower", "wrong", "lost")


def interval(quantiles: dict[str, Any]) -> tuple[float, float]:
    """95% confidence interval of a median."""
    if quantiles["low"] is not None:
        return quantiles["low"], quantiles["high"]
    half = NOTCH * quantiles["iqr"] / math.sqrt(quantiles["rounds"])
    return max(quantiles["median"] - half, 0.0), quantiles["median"] + half


def _time(result: dict[str, Any], relative: bool) -> tuple[float, float, float] | None:
    """Median of fastattn and its interval: milliseconds, or times of the baseline."""
    ours = result["implementations"]["fastattn"]["ms"]
    if not relative:
        return None if ours is None else (ours["median"], *interval(ours))
    ratio = result["ratio"]
    if ratio is None:
        return None
    low, high = interval(ratio)  # of baseline / ours
    return 1 / ratio["median"], 1 / high, math.inf if low == 0 else 1 / low


def change(base: dict[str, Any], new: dict[str, Any], limit: float, relative: bool) -> Change | None:
    """None where the earlier run has no time to compare with."""
    name, ours = new["case"], new["implementations"]["fastattn"]
    if ours["status"] == "wrong":
        return Change(name, "wrong", note=ours["reason"])
    before, after = _time(base, relative), _time(new, relative)
    if before is None:
        return None
    if after is None:
        return Change(name, "lost", note=ours["reason"] or "not timed")
    ratio, low, high = after[0] / before[0], after[1] / before[2], after[2] / max(before[1], 1e-12)
    if low > 1 + limit:
        verdict = "slower"
    elif high < 1 / (1 + limit):
        verdict = "faster"
    else:
        verdict = "same" if 1 / (1 + limit) <= low and high <= 1 + limit else "unclear"
    return Change(name, verdict, ratio, low, high)


def changes(base: dict[str, Any], new: dict[str, Any], limit: float, relative: bool) -> list[Change]:
    earlier = {result["case"]: result for result in base["results"]}
    found = (change(earlier[r["case"]], r, limit, relative) for r in new["results"] if r["case"] in earlier)
    return [one for one in found if one is not None]


def differences(base: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What besides the code may explain a change."""
    before, after = base["environment"], new["environment"]
    found = [
        f"{name}: {before[a].get(b)} before, {after[a].get(b)} now"
        for name, (a, b) in SAME_MACHINE
        if before[a].get(b) != after[a].get(b)
    ]
    gpus = [(env["gpu"] or {}).get("name") for env in (before, after)]
    found += [f"GPU: {gpus[0]} before, {gpus[1]} now"] if gpus[0] != gpus[1] else []
    if before["threads"] != after["threads"]:
        found.append(f"threads: {before['threads']} before, {after['threads']} now")
    return found


def judge(base: dict[str, Any], new: dict[str, Any], fail_if_slower: float | None, relative: bool) -> int:
    """Prints the table. Exit code 1 if `fail_if_slower` is given and a case is slower by more, wrong or lost, or none can be compared."""
    limit = DOUBT if fail_if_slower is None else fail_if_slower
    found = changes(base, new, limit, relative)
    for line in differences(base, new):
        say(f"warning: another machine or setting: {line}")
    rows: list[list[Cell]] = []
    for one in found:
        colour = RED if one.bad else GREEN if one.verdict == "faster" else ""
        ratio = "" if one.ratio is None else f"{one.ratio:.3f} ({one.low:.3f}-{one.high:.3f})"
        rows.append([(one.case, ""), (ratio, ""), (one.verdict, colour), (one.note, "")])
    what = "fastattn over the baseline of its run" if relative else "time of fastattn"
    show(
        f"{what}, new / base with its 95% interval; more than {limit:.0%} counts",
        ["case", "ratio", "", ""],
        rows,
        (0, 2, 3),
    )
    names = [{result["case"] for result in report["results"]} for report in (base, new)]
    for cases, which in ((names[0] - names[1], "base"), (names[1] - names[0], "new")):
        if cases:
            say(f"only in {which}: {', '.join(sorted(cases))}")
    counts = {
        verdict: sum(one.verdict == verdict for one in found) for verdict in dict.fromkeys(o.verdict for o in found)
    }
    say(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "nothing to compare")
    return int(fail_if_slower is not None and (not found or any(one.bad for one in found)))
