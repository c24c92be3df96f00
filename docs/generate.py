"""Rewrites what is generated: in README.md and docs/*.md the support matrix and every figure, and docs/charts/*.svg.

Figures come from bench/results/*.json and nowhere else. `--check` writes nothing and fails if anything would change.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fastattn.bench import schema
from fastattn.bench.report import charts, page
from fastattn.support import matrix

ROOT = Path(__file__).resolve().parent.parent
README, BENCHMARKING = ROOT / "README.md", ROOT / "docs" / "benchmarking.md"
CHARTS = ROOT / "docs" / "charts"
RESULTS = ROOT / "bench" / "results"
SPEED = ROOT / "docs" / "speed.md"
SHOWN = {  # file: where its figures are
    "cpu-amx": "README, Speed, AMX",
    "cpu": "README, Speed, AVX-512",
    "masks": "README, Speed, masks",
    "linear": "README, Speed, linear attention",
    "masks-amx": "docs/speed.md, masks",
    "linear-amx": "docs/speed.md, linear attention",
}


def goal_text(goal: dict) -> str:
    if goal["slower_by_us"] is not None:
        return f"<= +{goal['slower_by_us']:g} us"
    return "" if goal["ratio"] is None else f"{goal['ratio']:g}x"


def speed_table(report: dict) -> str:
    lines = ["| case | torch ms | fastattn ms | torch / fastattn | goal | | of peak | goal | |", "|" + "---|" * 9]
    marks = {True: "met", False: "missed", None: ""}
    for row in report["results"]:
        base, ours = (row["implementations"][name] for name in (row["baseline"], "fastattn"))
        times = [one["ms"]["median"] if one.get("ms") else None for one in (base, ours)]
        cells = [row["case"], *("n/a" if t is None else f"{t:.3g}" for t in times)]
        if row["goal"]["slower_by_us"] is not None and None not in times:
            cells.append(f"{(times[1] - times[0]) * 1e3:+.1f} us")
        else:
            cells.append(f"{row['ratio']['median']:.2f}x" if row.get("ratio") else "")
        cells += [goal_text(row["goal"]), marks[row["ratio_met"]]]
        cells.append("" if ours.get("of_peak") is None or row["goal"]["of_peak"] is None else f"{ours['of_peak']:.0%}")
        cells.append("" if row["goal"]["of_peak"] is None else f"{row['goal']['of_peak']:.0%}")
        cells.append(marks[row["peak_met"]])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figures(report: dict) -> str:
    env, peaks = report["environment"], report["peaks"]
    parts = [
        f"{env['cpu']['model']}, {env['threads']} threads, {env['cpu']['isa']}, torch {env['versions']['torch']}, "
        f"{env['time'][:10]}. Peaks of the same run: {peaks['fp32']:.0f} GFLOP/s fp32 FMA, {peaks['bf16']:.0f} bf16 {'tiles' if env['cpu']['isa'] == 'amx' else 'dot'}, "
        f"{peaks['read']:.0f} GB/s read.",
        "",
        speed_table(report),
    ]
    parts += warnings_of(report)
    for run in report.get("gpt") or []:
        speed, written = run["tokens_per_second"], run["generated"]
        parts += [
            "",
            f"GPT ({run['parameters'] / 1e6:.2f} M parameters, {run['precision']}, {run['config']['steps']} steps on real text): "
            f"loss {run['loss']['torch'][-1]:.3f} with torch, {run['loss']['fastattn'][-1]:.3f} with fastattn; training "
            f"{speed['torch']:.0f} and {speed['fastattn']:.0f} tokens/s ({run['speedup']:.2f}x); {written['tokens']} greedy "
            f"tokens with a KV cache {'agree' if written['agree'] else 'differ'}.",
        ]
    memory = report.get("memory")
    if memory and memory["status"] == "ok":
        extra, scores = memory["extra_bytes"] / 2**20, memory["scores_bytes"] / 2**20
        parts += [
            "",
            f"Memory, {memory['case']}: {extra:.0f} MiB peak extra, results included; one Lq x Lk matrix would be {scores:.0f} MiB.",
        ]
    return "\n".join(parts)


def against_table(report: dict, with_peak: bool) -> list[str]:
    """One row per case, whose baseline is named."""
    marks = {True: "met", False: "missed", None: ""}
    header = "| case | against | its ms | fastattn ms | ratio | goal | |" + " of peak | goal | |" * with_peak
    lines = [header, "|" + "---|" * (header.count("|") - 1)]
    for row in report["results"]:
        base, ours = (row["implementations"][name] for name in (row["baseline"], "fastattn"))
        times = ["n/a" if one.get("ms") is None else f"{one['ms']['median']:.3g}" for one in (base, ours)]
        speedup = f"{row['ratio']['median']:.2f}x" if row.get("ratio") else base["reason"] or ours["reason"]
        cells = [row["case"], row["baseline"], *times, speedup, goal_text(row["goal"]), marks[row["ratio_met"]]]
        if with_peak:
            wanted, share = row["goal"]["of_peak"], ours.get("of_peak")
            cells += ["" if share is None else f"{share:.0%}", "" if wanted is None else f"{wanted:.0%}"]
            cells.append(marks[row["peak_met"]])
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def warnings_of(report: dict) -> list[str]:
    warnings = report["environment"].get("warnings") or []
    return ["", "Warnings of that run: " + "; ".join(warnings) + "."] if warnings else []


def linear_figures(report: dict) -> str:
    return "\n".join(against_table(report, True) + language_figures(report) + warnings_of(report))


def language_figures(report: dict) -> list[str]:
    """One sentence on each mixer of the language model."""
    run = report.get("lm")
    if run is None:
        return []
    found = "; ".join(
        f"{name} ({size / 1e6:.2f} M parameters) held-out loss {run['held_out_loss'][name]:.3f}, trained at "
        f"{run['tokens_per_second'][name]:.0f} tokens/s, cache {run['generated'][name]['cache_bytes'] / 2**10:.0f} KiB"
        for name, size in run["parameters"].items()
    )
    config = run["config"]
    return ["", f"Language model, {run['precision']}, {config['steps']} steps, context {config['context']}: {found}."]


def mask_figures(report: dict) -> str:
    lines = against_table(report, False)
    lines += ["", "Building causal & documents & window(4096), 100 documents, one thread:", ""]
    lines += ["| tokens | fastattn ms | create_block_mask ms | plan MiB |", "|" + "---|" * 4]
    for entry in report["mask_building"]:
        ms = entry["ms"]
        flex = f"{ms['flex']:.0f}" if "flex" in ms else ""
        lines.append(f"| {entry['length']} | {ms['fastattn']:.2f} | {flex} | {entry['plan_bytes'] / 2**20:.2f} |")
    return "\n".join(lines + warnings_of(report))


def replaced(text: str, name: str, content: str) -> str:
    begin, end = f"<!-- {name}: generated by docs/generate.py -->", f"<!-- end of {name} -->"
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    return f"{head}{begin}\n{content}\n{end}{tail}"


def in_history(commit: str) -> bool | None:
    """None where git cannot tell: this is no checkout, or a shallow one."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)

    try:
        whole = git("rev-parse", "--show-toplevel", "--is-shallow-repository").stdout.split("\n")[:2]
    except OSError:
        return None
    if whole != [str(ROOT), "false"]:
        return None
    return git("merge-base", "--is-ancestor", commit, "HEAD").returncode == 0


def runs(reports: dict[str, dict]) -> str:
    """Where each committed file came from, and the command that makes it again."""
    shown = BENCHMARKING.read_text()
    lines = ["| file | shown in | command | commit | in the history | machine | took |", "|" + "---|" * 7]
    for name, report in reports.items():
        env, git = report["environment"], report["environment"]["git"]
        commit = "not recorded" if git is None else git["commit"][:12] + " with local changes" * git["dirty"]
        found = None if git is None else in_history(git["commit"])
        if found is None:  # as the page has it
            found = f"| {commit} | yes |" in shown
        given = {key: value for key, value in report["arguments"].items() if value not in (None, [], False, "auto")}
        options = " ".join(f"--{key} {value}" for key, value in given.items())
        machine = (
            f"{env['cpu']['model']}, {env['threads']} threads, {env['cpu']['isa']}, torch {env['versions']['torch']}"
        )
        cells = [
            f"`{name}.json`",
            SHOWN[name],
            f"`python -m fastattn.bench run {options} --json {name}.json`",
            commit,
            "yes" if found else "no",
            machine,
        ]
        lines.append("| " + " | ".join([*cells, f"{report['seconds']:.0f} s"]) + " |")
    return "\n".join(lines)


def drawn(reports: dict[str, dict]) -> dict[str, str]:
    """Charts of the README by name."""
    sweep = [row for row in reports["linear"]["results"] if row["baseline"] == "torch"]
    ((_, family),) = page.families(sweep).items()
    colours = page.Colours(sweep)
    title = "linear attention, elu1, fp32 forward: time against length"
    linear = page.speed_chart(title, family, colours, alone=True)
    assert linear is not None
    found = {"linear": linear}
    whose = {
        "cpu-amx": "torch's own attention",
        "cpu": "torch's own attention",
        "masks": "the same without a mask, or another's",
    }
    for name, what in whose.items():
        found[name] = charts.ratios(
            f"fastattn: times as fast as {what}", page.bars(reports[name]["results"]), alone=True
        )
    return found


def generated() -> dict[Path, str]:
    """Every generated file with what it should hold."""
    reports = {name: schema.load(RESULTS / f"{name}.json") for name in SHOWN}
    text = replaced(README.read_text(), "support", matrix("softmax"))
    text = replaced(text, "linear support", matrix("linear"))
    text = replaced(text, "speed on amx", figures(reports["cpu-amx"]))
    text = replaced(text, "speed", figures(reports["cpu"]))
    text = replaced(text, "linear", linear_figures(reports["linear"]))
    text = replaced(text, "masks", mask_figures(reports["masks"]))
    speed = replaced(SPEED.read_text(), "masks", mask_figures(reports["masks-amx"]))
    speed = replaced(speed, "linear", linear_figures(reports["linear-amx"]))
    pages = {README: text, SPEED: speed, BENCHMARKING: replaced(BENCHMARKING.read_text(), "runs", runs(reports))}
    return pages | {CHARTS / f"{name}.svg": image + "\n" for name, image in drawn(reports).items()}


if __name__ == "__main__":
    wanted = generated()
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        sys.exit(f"out of date: {', '.join(str(path.relative_to(ROOT)) for path in stale)}" if stale else 0)
    CHARTS.mkdir(exist_ok=True)
    for path in stale:
        path.write_text(wanted[path])
