"""Results in words and tables."""

from __future__ import annotations

from typing import Any

from .case import Case, Goal
from .columns import GREEN, RED, Cell, show
from .gpt import EARLY_STEPS
from .runner import Outcome, Result

LONGEST_REASON = 100  # characters; the JSON has all


def speed(results: list[Result], peaks: dict[str, Any] | None) -> None:
    """One row per implementation of each case; `ours is` says how many times faster fastattn is than that one."""
    if peaks is not None:
        show_peaks(peaks)
    header = "case|who|ms (p20-p80)|rate|of roof|ours is|MiB|error|goal||kernel".split("|")
    title = (
        "Speed, medians of interleaved rounds; rate in GFLOP/s, or GB/s where memory is the bound; MiB at the peak of a call\n"
        "Error: the largest over that of the case's first row, or the RMS where the first row has none"
    )
    show(title, header, [row for result in results for row in _rows(result)], (0, 1, -3, -2, -1), below=3)
    judged = [met for r in results for met in (r.ratio_met(r.case.goal), r.peak_met(r.case.goal)) if met is not None]
    if judged:
        print(f"goals met: {sum(judged)} of {len(judged)}")


def show_peaks(peaks: dict[str, Any]) -> None:
    units = {"fp32": "GFLOP/s", "bf16": "GFLOP/s", "fp16": "GFLOP/s", "read": "GB/s"}
    found = ", ".join(f"{name} {peaks[name]:.0f} {unit}" for name, unit in units.items() if peaks.get(name) is not None)
    print(f"\nPeaks of this run: {found} ({peaks['source']})" if found else f"\nPeaks of this run: {peaks['source']}")


def verdicts(result: Result) -> str:
    """Every implementation of a case in words: right or not, and how far off."""
    return "; ".join(_verdict(name, outcome, result.baseline) for name, outcome in result.outcomes.items())


def _verdict(name: str, outcome: Outcome, baseline: str) -> str:
    if outcome.unchecked:
        return f"{name} not checked: it computes something else"
    text = f"{name} {outcome.status}"
    if outcome.rms_error is not None:
        text += f", rms {outcome.rms_error:.0e}"
    if outcome.error_vs_baseline is not None:
        text += f", max {outcome.error_vs_baseline:.2f}x {baseline}'s"
    return f"{text}: {outcome.reason}" if outcome.reason else text


def times(result: Result) -> str:
    found = "  ".join(f"{n} {o.samples.median * 1e3:.3f} ms" for n, o in result.outcomes.items() if o.samples)
    ratios = result.faster_than(result.baseline)
    return found + (f"  {ratios.median:.2f}x" if ratios else "")


def wrong(results: list[Result]) -> list[str]:
    return [
        f"WRONG, not timed: {result.case.name}: {name}: {outcome.reason}"
        for result in results
        for name, outcome in result.outcomes.items()
        if outcome.status == "wrong"
    ]


def goal_text(goal: Goal) -> str:
    """As "1.2x cudnn, 85%", "<= +5 us"; empty where there is no goal."""
    parts = [] if goal.ratio is None else [f"{goal.ratio:g}x {goal.against}".strip()]
    parts += [] if goal.of_peak is None else [f"{goal.of_peak:.0%}"]
    parts += [] if goal.slower_by_us is None else [f"<= +{goal.slower_by_us:g} us"]
    return ", ".join(parts)


def _met(result: Result) -> Cell:
    case = result.case
    judged = [met for met in (result.ratio_met(case.goal), result.peak_met(case.goal)) if met is not None]
    must = result.must_met()
    if must is False or (judged and not all(judged) and must is None):
        return ("MISSED", RED)
    if judged and all(judged):
        return ("met", GREEN)
    return ("must met", GREEN) if must else ("", "")


def _ms(outcome: Outcome) -> Cell:
    if outcome.samples is None:
        return ("WRONG", RED) if outcome.status == "wrong" else ("n/a", "") if outcome.status == "n/a" else ("-", "")
    median, p20, p80 = (x * 1e3 for x in (outcome.samples.median, *map(outcome.samples.quantile, (0.2, 0.8))))
    digits = 3 if median < 10 else 1
    return (f"{median:.{digits}f} ({p20:.{digits}f}-{p80:.{digits}f})", "")


def _error(outcome: Outcome) -> str:
    if outcome.error_vs_baseline is not None:
        return f"{outcome.error_vs_baseline:.2f}x"
    if outcome.unchecked:
        return "unchecked"
    return "" if outcome.rms_error is None else f"rms {outcome.rms_error:.0e}"


def _ours_is(result: Result, name: str, outcome: Outcome) -> str:
    ratios = result.faster_than(name)
    if name == "fastattn" or ratios is None:
        return ""
    if result.case.goal.slower_by_us is not None and outcome.samples and result.ours.samples:
        return f"{(result.ours.samples.median - outcome.samples.median) * 1e6:+.1f} us"
    return f"{ratios.median:.2f}x"


def _rows(result: Result) -> list[list[Cell]]:
    rows = []
    for name, outcome in result.outcomes.items():
        rate, share = result.rate(outcome), result.of_peak(outcome)
        ours = name == "fastattn"
        cells = [
            (result.case.name if name == result.baseline else "", ""),
            (name, ""),
            _ms(outcome),
            ("" if rate is None else f"{rate:.{1 if rate < 100 else 0}f}", ""),
            ("" if share is None else f"{share:.0%}", ""),
            (_ours_is(result, name, outcome), ""),
            ("" if outcome.extra_bytes is None else f"{outcome.extra_bytes / 2**20:.1f}", ""),
            (_error(outcome), ""),
            (goal_text(result.case.goal) if ours else "", ""),
            _met(result) if ours else ("", ""),
            (f"{outcome.status}: {outcome.reason}"[:LONGEST_REASON] if outcome.reason else outcome.kernel, ""),
        ]
        rows.append(cells)
    return rows


def cases(listed: list[Case]) -> None:
    rows: list[list[Cell]] = []
    for case in listed:
        shape = " ".join(f"{name}{value}" for name, value in case.details["shape"].items())
        cells = [
            case.name,
            shape,
            f"{case.flops * 1e-9:.2f}",
            goal_text(case.goal),
            case.device,
            ",".join(case.presets),
        ]
        rows.append([(cell, "") for cell in cells])
    show("Cases", ["case", "shape", "GFLOP", "goal", "device", "presets"], rows, (0, 1, 3, 4, 5))


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


def mask_building_table(report: list[dict[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """Header and rows."""
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
    return ["causal & documents & window", "ours ms", "flex ms", "plan MiB", "plan"], rows


def mask_building(report: list[dict[str, Any]]) -> None:
    show("Building a mask, one thread; flex = create_block_mask without compiling", *mask_building_table(report))


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


def lm_table(report: dict[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Header and rows."""
    loss, held_out = report["loss"], report["held_out_loss"]
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
        ]
        verdict = ("the same", "") if written["agree"] else ("DIFFERENT", RED)
        rows.append([*((cell, "") for cell in cells), verdict])
    header = "mixer|parameters|training loss|held-out loss|trained tokens/s|written tokens/s|cache KiB|from cache and full pass"
    return header.split("|"), rows


def lm(report: dict[str, Any]) -> None:
    config, unigram = report["config"], report["held_out_loss"]["character frequencies"]
    show(
        f"A language model on real text, {report['precision']}: {config['steps']} steps, context {config['context']}",
        *lm_table(report),
    )
    state = "both learned" if report["learned"] else "NOT LEARNED"
    print(f"  {state}; held-out loss of character frequencies alone: {unigram:.4f}")
    for name, written in report["generated"].items():
        print(f"  {name}: {written['text']!r}")
