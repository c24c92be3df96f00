"""Results as text: a rich table on a terminal, aligned plain lines anywhere else."""

from __future__ import annotations

import sys
from typing import Any

from .case import Case
from .gpt import EARLY_STEPS
from .peaks import Peaks
from .runner import Outcome, Result

RED, GREEN = "red", "green"
Cell = tuple[str, str]  # text, colour or ""


def show(title: str, header: list[str], rows: list[list[Cell]]) -> None:
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        except ImportError:
            pass
        else:
            table = Table(title=title, title_justify="left")
            for i, name in enumerate(header):
                table.add_column(name, justify="right" if 0 < i < len(header) - 1 else "left")
            for row in rows:
                table.add_row(*(Text(text, style=colour) for text, colour in row))
            Console().print(table)
            return
    widths = [max(len(name), *(len(row[i][0]) for row in rows)) for i, name in enumerate(header)] if rows else []

    def line(cells: list[str]) -> str:
        last = len(cells) - 1
        padded = (c.rjust(w) if 0 < i < last else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths)))
        return "  ".join(padded).rstrip()

    print(f"\n{title}")
    print(line(header))
    for row in rows:
        print(line([text for text, _ in row]))


def speed(results: list[Result], peaks: Peaks) -> None:
    """Ours beside the baseline, with goals; one row per implementation where there are more than two."""
    show_peaks(peaks)
    pairs = [r for r in results if len(r.outcomes) == 2]
    if pairs:
        header = "case|baseline ms|ours ms|ratio|goal|met|GFLOP/s or GB/s|% of peak|goal %|met|kernel".split("|")
        show(
            "Speed, medians of interleaved rounds; ratio = baseline (torch, where nothing else is named) / ours",
            header,
            [_pair(r) for r in pairs],
        )
    many = [r for r in results if len(r.outcomes) > 2]
    if many:
        header = "case|implementation|ms (p20-p80)|GFLOP/s|% of peak|vs torch|error vs torch|kernel".split("|")
        rows = [row for result in many for row in _peers(result)]
        show("Speed, medians of interleaved rounds; vs torch = torch / this", header, rows)
    wrong = [(r.case.name, n, o.reason) for r in results for n, o in r.outcomes.items() if o.status == "wrong"]
    for case, name, reason in wrong:
        print(f"WRONG, not timed: {case}: {name}: {reason}")
    judged = [met for r in results for met in (r.ratio_met(), r.peak_met()) if met is not None]
    if judged:
        print(f"goals met: {sum(judged)} of {len(judged)}")


def show_peaks(peaks: Peaks) -> None:
    units = (("fp32 FMA", peaks.fp32, "GFLOP/s"), ("bf16", peaks.bf16, "GFLOP/s"), ("read", peaks.read, "GB/s"))
    found = ", ".join(f"{name} {value:.0f} {unit}" for name, value, unit in units if value is not None)
    print(f"\nPeaks of this run: {found} ({peaks.source})" if found else f"\nPeaks of this run: {peaks.source}")


def _ms(outcome: Outcome) -> Cell:
    if outcome.samples is None:
        return (
            outcome.status.upper() if outcome.status == "wrong" else "n/a",
            RED if outcome.status == "wrong" else "",
        )
    return (f"{outcome.samples.median * 1e3:.{3 if outcome.samples.median < 1e-2 else 1}f}", "")


def _met(met: bool | None) -> Cell:
    return {None: ("", ""), True: ("met", GREEN), False: ("MISSED", RED)}[met]


def _percent(share: float | None) -> Cell:
    return ("" if share is None else f"{share:.0%}", "")


def _pair(result: Result) -> list[Cell]:
    goal, ratios, rate = result.case.goal, result.ratio(), result.rate(result.ours)
    base, ours = result.base.samples, result.ours.samples
    speedup = "" if ratios is None else f"{ratios.median:.2f}x"
    wanted = "" if goal.ratio is None else f"{goal.ratio:g}x"
    if goal.slower_by_us is not None:
        wanted = f"<= +{goal.slower_by_us:g} us"
        speedup = "" if base is None or ours is None else f"{(ours.median - base.median) * 1e6:+.1f} us"
    note = result.ours.kernel if result.ours.status == "ok" else f"{result.ours.status}: {result.ours.reason}"
    return [
        (result.case.name, ""),
        _ms(result.base),
        _ms(result.ours),
        (speedup, ""),
        (wanted, ""),
        _met(result.ratio_met()),
        ("" if rate is None else f"{rate:.1f}", ""),
        _percent(result.of_peak(result.ours)),
        _percent(goal.of_peak),
        _met(result.peak_met()),
        (note, ""),
    ]


def _peers(result: Result) -> list[list[Cell]]:
    rows = []
    for name, outcome in result.outcomes.items():
        samples, rate = outcome.samples, result.rate(outcome)
        spread, speedup = "", ""
        if samples is not None:
            spread = f" ({samples.quantile(0.2) * 1e3:.3f}-{samples.quantile(0.8) * 1e3:.3f})"
            if result.base.samples is not None:
                speedup = f"{result.base.samples.median / samples.median:.2f}x"
        error = "" if outcome.error_vs_baseline is None else f"{outcome.error_vs_baseline:.2f}x"
        text, colour = _ms(outcome)
        rows.append(
            [
                (result.case.name if name == result.baseline else "", ""),
                (name, ""),
                (text + spread, colour),
                ("" if rate is None else f"{rate:.0f}", ""),
                _percent(result.of_peak(outcome)),
                (speedup, ""),
                (error, ""),
                (outcome.kernel if outcome.status == "ok" else f"{outcome.status}: {outcome.reason}", ""),
            ]
        )
    return rows


def cases(listed: list[Case]) -> None:
    rows: list[list[Cell]] = []
    for case in listed:
        goal = case.goal
        ratio = f"{goal.ratio:g}x" if goal.ratio else f"<= +{goal.slower_by_us:g} us" if goal.slower_by_us else ""
        shape = " ".join(f"{name}{value}" for name, value in case.details["shape"].items())
        of_peak = f"{goal.of_peak:.0%}" if goal.of_peak else ""
        cells = [case.name, shape, f"{case.flops * 1e-9:.2f}", ratio, of_peak, ",".join(case.presets)]
        rows.append([(cell, "") for cell in cells])
    show("Cases", ["case", "shape", "GFLOP", "goal vs torch", "goal of peak", "presets"], rows)


def memory(report: dict[str, Any]) -> None:
    print(f"\nMemory: {report['case']}")
    if report["status"] != "ok":
        print(f"  {report['status']}: {report['reason']}")
        return
    extra, results, scores = (report[n] / 2**20 for n in ("extra_bytes", "results_bytes", "scores_bytes"))
    print(
        f"  peak extra {extra:.1f} MiB, of which results {results:.1f} MiB; one Lq x Lk matrix would be {scores:.0f} MiB"
    )
    print(f"  {report['seconds']:.1f} s")


def mask_building(report: list[dict[str, Any]]) -> None:
    rows: list[list[Cell]] = []
    for entry in report:
        ours, flex = entry["ms"]["fastattn"], entry["ms"].get("flex")
        cells = [
            f"{entry['length']} tokens",
            f"{ours:.2f}",
            "n/a" if flex is None else f"{flex:.1f}",
            f"{entry['plan_bytes'] / 2**20:.2f}",
            f"{entry['runs']} runs, {entry['bit_tiles']} bit tiles",
        ]
        rows.append([(cell, "") for cell in cells])
    header = ["causal & documents & window", "ours ms", "flex ms", "plan MiB", "plan"]
    show("Building a mask, one thread; flex = create_block_mask without compiling", header, rows)


def gpt(report: dict[str, Any]) -> None:
    config, loss, speed, written = (report[name] for name in ("config", "loss", "tokens_per_second", "generated"))
    curves = "agree" if report["loss_agrees"] else "DISAGREE"
    apart, early, smooth = (report[f"loss_max_difference{kind}"] for kind in ("", "_early", "_smooth"))
    writing = written["tokens_per_second"]
    tokens = "the same" if written["agree"] else "DIFFERENT"
    steps, millions = config["steps"], report["parameters"] / 1e6
    lines = [
        f"\nGPT on real text, {report['precision']}: {steps} steps, {millions:.2f} M parameters, context {config['context']}",
        *(f"  loss {n:<9} {loss[n][0]:.4f} -> {loss[n][-1]:.4f}" for n in ("torch", "fastattn")),
        f"  curves {curves}: apart by at most {apart:.1e}; first {EARLY_STEPS} steps {early:.1e}, running means {smooth:.1e}",
        f"  training   torch {speed['torch']:.0f}, fastattn {speed['fastattn']:.0f} tokens/s ({report['speedup']:.2f}x)",
        f"  generation torch {writing['torch']:.0f}, fastattn {writing['fastattn']:.0f} tokens/s with a KV cache",
        f"  {written['tokens']} greedy tokens are {tokens}: {written['text']!r}",
    ]
    print("\n".join(lines))


def lm(report: dict[str, Any]) -> None:
    config, loss, held_out = report["config"], report["loss"], report["held_out_loss"]
    rows: list[list[Cell]] = []
    for name, parameters in report["parameters"].items():
        written = report["generated"][name]
        cells = [
            name,
            f"{parameters / 1e6:.2f} M",
            f"{loss[name][0]:.4f} -> {loss[name][-1]:.4f}",
            f"{held_out[name]:.4f}",
            f"{report['tokens_per_second'][name]:.0f}",
            f"{written['tokens_per_second']:.0f}",
            f"{written['cache_bytes'] / 2**10:.0f}",
            "the same" if written["agree"] else "DIFFERENT",
        ]
        rows.append([(cell, "") for cell in cells])
    header = "mixer|parameters|training loss|held-out loss|trained tokens/s|written tokens/s|cache KiB|from cache and full pass"
    title = (
        f"A language model on real text, {report['precision']}: {config['steps']} steps, context {config['context']}"
    )
    show(title, header.split("|"), rows)
    state = "both learned" if report["learned"] else "NOT LEARNED"
    print(f"  {state}; held-out loss of character frequencies alone: {held_out['character frequencies']:.4f}")
    for name, written in report["generated"].items():
        print(f"  {name}: {written['text']!r}")
