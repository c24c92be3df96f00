"""`report`: one page that needs no network, light and dark, made of a run's JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from ..compare import interval
from ..environment import lines as environment_lines
from . import charts, extras, style, svg
from .charts import Bar, Dot, Line
from .markup import Row, cards, section, table


class Colours:
    """Each implementation has one colour in all charts of a page, fastattn the first."""

    def __init__(self, results: Sequence[dict[str, Any]]):
        found = dict.fromkeys(n for result in results for n, one in result["implementations"].items() if one["ms"])
        first = [name for name in ("fastattn", "torch") if name in found]
        self.of = {name: i for i, name in enumerate(dict.fromkeys((*first, *found)))}


def _length(result: dict[str, Any]) -> int:
    return result["shape"].get("Lk") or result["shape"]["L"]


def _family(result: dict[str, Any]) -> tuple[str, str]:
    """(title, what else must be equal) of the cases that differ in length only; the batch may shrink as it grows."""
    shape = result["shape"]
    sizes = {name.replace("Hq", "H"): size for name, size in shape.items() if name not in ("B", "L", "Lq", "Lk")}
    sizes = {name: n for name, n in sizes.items() if n != {"Hk": sizes.get("H"), "Dv": sizes["D"]}.get(name)}
    options = {name: value for name, value in result["options"].items() if value not in (None, False)}
    square = shape.get("Lq") == shape.get("Lk")
    words = [result["op"], result["dtype"], result["direction"], *(f"{name}{size}" for name, size in sizes.items())]
    words += [name if value in (True, "top_left") else f"{name} {value}" for name, value in options.items()]
    words += [] if square else [f"Lq{shape['Lq']}"]
    return " ".join(words), json.dumps([result["device"], result["baseline"], square])


def families(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Cases at several lengths, by what they have in common, shortest first."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for result in results:
        found.setdefault(_family(result), {}).setdefault(_length(result), result)
    return {key[0]: [group[n] for n in sorted(group)] for key, group in found.items() if len(group) > 1}


def _series(group: Sequence[dict[str, Any]], colours: Colours, value: str) -> list[Line]:
    """One line per implementation that has `value` at two lengths: "rate", "ms" or "extra_bytes" (in MiB)."""
    names = {name for result in group for name in result["implementations"]}
    found = []
    for name in sorted(names & colours.of.keys(), key=lambda name: colours.of[name]):
        points = []
        for result in group:
            one = result["implementations"].get(name) or {}
            y = one.get(value)
            y = y["median"] if isinstance(y, dict) else y
            if y:
                points.append((float(_length(result)), y / 2**20 if value == "extra_bytes" else y))
        if len(points) > 1:
            found.append(Line(name, colours.of[name], tuple(points)))
    return found


def _same_work(group: Sequence[dict[str, Any]]) -> bool:
    """Whether everyone timed computes the same, so that rates say who is faster: what was checked has an error."""
    every = [one for result in group for one in result["implementations"].values() if one["ms"]]
    return all(one["rms_error"] is not None for one in every)


def speed_chart(title: str, group: Sequence[dict[str, Any]], colours: Colours, alone: bool = False) -> str | None:
    if not _same_work(group):
        series = _series(group, colours, "ms")
        return charts.lines(title, series, "ms", log=True, alone=alone) if series else None
    series = _series(group, colours, "rate")
    if not series:
        return None
    most = max(y for line in series for _, y in line.points)
    shown, unit = svg.rate(most, group[0]["unit"])
    scaled = [replace(line, points=tuple((x, y * shown / most) for x, y in line.points)) for line in series]
    return charts.lines(title, scaled, unit, alone=alone)


def bars(results: Sequence[dict[str, Any]]) -> list[Bar]:
    """fastattn against whom its goal names in each case, else against the baseline."""
    found = []
    for result in results:
        against = result["goal"]["against"] or result["baseline"]
        ratio = (result["implementations"].get(against) or {}).get("ours_faster")
        if ratio is not None and result["goal"]["slower_by_us"] is None:
            low, high = interval(ratio)
            label = result["case"] if ", vs " in result["case"] else f"{result['case']}, vs {against}"
            found.append(Bar(label, ratio["median"], max(low, 1e-3), high, result["goal"]["ratio"]))
    return found


def roofline(report: dict[str, Any], colours: Colours) -> str | None:
    peaks = report["peaks"]
    if peaks is None or not peaks["read"]:
        return None
    dots, baselines = [], {}
    for result in report["results"]:
        for name in (result["baseline"], "fastattn"):
            one = result["implementations"].get(name)
            if not one or not one["ms"] or one["rms_error"] is None or not result["flops"]:
                continue
            rate = result["flops"] / one["ms"]["median"] * 1e-6
            intensity = result["flops"] / result["bytes"]
            dots.append(Dot(f"{name}, {result['case']}", intensity, rate, colours.of[name], name != "fastattn"))
            baselines[name] = colours.of[name]
    roofs = [(name, peaks[name]) for name in ("fp32", "bf16") if peaks[name]]
    if not dots or not roofs:
        return None
    return charts.roofline(
        "Roofline of this run", dots, roofs, peaks["read"], sorted(baselines.items(), key=lambda x: x[1])
    )


def _implementations(report: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, dict[str, Any], bool]]:
    for result in report["results"]:
        for i, (name, one) in enumerate(result["implementations"].items()):
            yield result, name, one, i == 0


def _status(one: dict[str, Any]) -> tuple[str, str]:
    return {"ok": ("right", "good"), "wrong": ("WRONG", "bad"), "n/a": ("n/a", "muted")}[one["status"]]


def _errors(report: dict[str, Any]) -> Iterator[Row]:
    for result, name, one, new in _implementations(report):
        unchecked = one["status"] == "ok" and one["rms_error"] is None
        status = ("not checked", "muted") if unchecked else _status(one)
        reason = "it computes something else" if unchecked else one["reason"]
        numbers = ["" if one[key] is None else f"{one[key]:.1e}" for key in ("rms_error", "max_error")]
        relative = "" if one["error_vs_baseline"] is None else f"{one['error_vs_baseline']:.2f}x {result['baseline']}"
        cells = [(result["case"] if new else "", "case"), (name, ""), (numbers[0], "n"), (numbers[1], "n")]
        yield new, [*cells, (relative, "n"), status, (reason, "why")]


def _goals(result: dict[str, Any]) -> tuple[str, str]:
    judged = [met for met in (result["ratio_met"], result["peak_met"]) if met is not None]
    if result["must_met"] is False:
        return "must missed", "bad"
    if not judged:
        return "", ""
    missed = ("missed, must met", "") if result["must_met"] else ("missed", "bad")
    return ("met", "good") if all(judged) else missed


def goal_words(goal: dict[str, Any]) -> str:
    parts = [] if goal["ratio"] is None else [f"{goal['ratio']:g}x {goal['against']}".strip()]
    parts += [] if goal["of_peak"] is None else [f"{goal['of_peak']:.0%}"]
    parts += [] if goal["slower_by_us"] is None else [f"<= +{goal['slower_by_us']:g} us"]
    return ", ".join(parts)


def _speeds(report: dict[str, Any]) -> Iterator[Row]:
    for result, name, one, new in _implementations(report):
        ms, faster, ours = one["ms"], one["ours_faster"], name == "fastattn"
        time = "" if ms is None else f"{ms['median']:.4g} ({ms['p20']:.4g}-{ms['p80']:.4g})"
        yield (
            new,
            [
                (result["case"] if new else "", "case"),
                (name, ""),
                (
                    time if ms else _status(one)[0] if one["status"] != "ok" else "-",
                    "n" if ms else "n " + _status(one)[1],
                ),
                ("" if one["rate"] is None else "{:.4g} {}".format(*svg.rate(one["rate"], result["unit"])), "n"),
                ("" if one["of_peak"] is None else f"{one['of_peak']:.0%}", "n"),
                ("" if faster is None else f"{faster['median']:.2f}x", "n"),
                ("" if one["extra_bytes"] is None else f"{one['extra_bytes'] / 2**20:.1f}", "n"),
                (goal_words(result["goal"]) if ours else "", "goal"),
                _goals(result) if ours else ("", ""),
                (one["reason"] or one["kernel"], "why"),
            ],
        )


def _tiles(report: dict[str, Any]) -> str:
    results = report["results"]
    statuses = [one["status"] for result in results for one in result["implementations"].values()]
    judged = [met for r in results for met in (r["ratio_met"], r["peak_met"]) if met is not None]
    wrong = statuses.count("wrong")
    tiles = [
        (str(len(results)), "cases", ""),
        (str(wrong) if wrong else "none", "wrong", "bad" if wrong else "good"),
        (f"{sum(judged)} of {len(judged)}" if judged else "none set", "goals met", ""),
        (f"{report['seconds']:.0f} s", "interrupted after" if report["interrupted"] else "run", ""),
    ]
    inside = "".join(
        f'<div class="tile"><b class="{c}">{escape(v)}</b><span>{escape(w)}</span></div>' for v, w, c in tiles
    )
    return f'<div class="tiles">{inside}</div>'


def _environment(report: dict[str, Any], name: str) -> str:
    facts = environment_lines(report["environment"])
    arguments = " ".join(
        f"{key}={value}" for key, value in report["arguments"].items() if value not in (None, [], False)
    )
    lines = "".join(f"<div>{escape(fact)}</div>" for fact in facts)
    peaks = (report["peaks"] or {}).get("source", "not measured")
    return (
        f'<div class="card wide"><dl><dt>machine</dt><dd>{lines}</dd><dt>denominators</dt><dd>{escape(peaks)}</dd>'
        f"<dt>arguments</dt><dd>{escape(arguments)}</dd><dt>file</dt><dd>{escape(name)}</dd></dl></div>"
    )


def html(report: dict[str, Any], name: str) -> str:
    """The page. `report` is of the current version (see schema.load), `name` where it came from."""
    results, colours = report["results"], Colours(report["results"])
    groups = families(results)
    memory = [(title, _series(group, colours, "extra_bytes")) for title, group in groups.items()]
    found_bars, roof = bars(results), roofline(report, colours)
    sections = [
        section(
            "Speed against length",
            "Medians. Rates count what a mask leaves visible; milliseconds where implementations compute different things.",
            cards([speed_chart(title, group, colours) for title, group in groups.items()]),
        ),
        section(
            "How many times faster",
            "fastattn against the baseline of each case, or whom its goal names, paired round by round.",
            f'<div class="card">{charts.ratios("Times as fast", found_bars)}</div>' if found_bars else "",
        ),
        section(
            "Roofline",
            "Filled: fastattn. Hollow: the baseline. Work that stays in a cache can lie above the slope of memory.",
            f'<div class="card">{roof}</div>' if roof else "",
        ),
        section(
            "Memory against length",
            "Peak of one call beyond its inputs, results included; gradients with their forward pass.",
            cards([charts.lines(title, series, "MiB", log=True) for title, series in memory if series]),
        ),
        section(
            "Every time",
            "Milliseconds are median (p20-p80); the roof is what the machine reached in the same run.",
            table(
                [
                    "case",
                    "implementation",
                    "ms",
                    "rate",
                    "of roof",
                    "ours is",
                    "extra MiB",
                    "goal: ratio, of roof",
                    "",
                    "kernel",
                ],
                _speeds(report),
            )
            if results
            else "",
        ),
        section(
            "Errors",
            "Against fp64: RMS relative to the RMS of the values, the largest, and that over the largest of the one named.",
            table(["case", "implementation", "rms", "max", "relative", "", ""], _errors(report)) if results else "",
        ),
        *extras.sections(report),
        section("Environment", "", _environment(report, name)),
    ]
    env = report["environment"]
    machine = (env["gpu"] or {}).get("name") or f"{env['cpu'].get('model')}, {env['threads']} threads"
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>fastattn benchmark, {escape(env['time'][:10])}</title><link rel=icon href='data:,'>"
        f"<style>{style.THEMES}{style.CHART}{style.PAGE}</style></head><body><main>"
        f"<h1>fastattn benchmark</h1><div class=muted>{escape(machine)}, {escape(env['time'])}</div>"
        f"{_tiles(report)}{''.join(sections)}</main></body></html>\n"
    )
