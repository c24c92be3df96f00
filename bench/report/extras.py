"""What a report holds besides its cases: language models, the memory of one long call, what a mask costs to build."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..table import lm_table, mask_building_table
from . import charts
from .markup import Cell, Row, cards, of_text, section, table


def sections(report: dict[str, Any]) -> list[str]:
    """Those that the run has measured."""
    gpts, lm, memory, masks = (report[name] for name in ("gpt", "lm", "memory", "mask_building"))
    found = []
    if gpts:
        text = "Trained twice from one seed, with torch's attention and with fastattn in its place; then both write."
        header = "precision|attention|loss|trained tokens/s|written tokens/s|curves|tokens".split("|")
        drawn = [_losses(f"GPT, {run['precision']}", run["loss"], ("fastattn", "torch")) for run in gpts]
        found.append(section("A GPT on real text", text, cards(drawn) + table(header, _gpt_rows(gpts))))
    if lm:
        unigram = lm["held_out_loss"]["character frequencies"]
        text = f"Two mixers in the same model. Held-out loss of character frequencies alone: {unigram:.4f}."
        drawn = [_losses(f"Language model, {lm['precision']}", lm["loss"], tuple(lm["parameters"]))]
        found.append(section("A language model on real text", text, cards(drawn) + of_text(*lm_table(lm))))
    if memory:
        header = ["case", "", "peak extra MiB", "results MiB", "one Lq x Lk MiB", "s", ""]
        text = "In a process of its own; the peak includes the results."
        found.append(section("Memory of one long call", text, table(header, [(True, _memory_row(memory))])))
    if masks:
        text = "Expression and plan on one thread; flex is create_block_mask without compiling."
        found.append(section("Building a mask", text, of_text(*mask_building_table(masks))))
    return found


def _losses(title: str, loss: dict[str, list[float]], names: tuple[str, ...]) -> str:
    series = [charts.Line(n, i, tuple(zip(map(float, loss["step"]), loss[n]))) for i, n in enumerate(names)]
    return charts.curves(title, series, "training loss")


def _gpt_rows(runs: list[dict[str, Any]]) -> Iterator[Row]:
    for run in runs:
        written = run["generated"]
        apart = f"apart by at most {run['loss_max_difference']:.1e}"
        curves = (f"agree, {apart}", "good") if run["loss_agrees"] else (f"DISAGREE, {apart}", "bad")
        tokens = ("the same", "good") if written["agree"] else ("DIFFERENT", "bad")
        for name in ("torch", "fastattn"):
            loss, ours = run["loss"][name], name == "fastattn"
            cells: list[Cell] = [
                ("" if ours else run["precision"], ""),
                (name, ""),
                (f"{loss[0]:.4f} -> {loss[-1]:.4f}", "n"),
                (f"{run['tokens_per_second'][name]:.0f}", "n"),
                (f"{written['tokens_per_second'][name]:.0f}", "n"),
            ]
            yield not ours, [*cells, *((curves, tokens) if ours else (("", ""), ("", "")))]


def _memory_row(memory: dict[str, Any]) -> list[Cell]:
    if memory["status"] != "ok":
        status = ("WRONG", "bad") if memory["status"] == "wrong" else ("n/a", "muted")
        return [(memory["case"], "case"), status, *[("", "n")] * 4, (memory["reason"], "why")]
    sizes = [(f"{memory[name] / 2**20:.1f}", "n") for name in ("extra_bytes", "results_bytes", "scores_bytes")]
    return [(memory["case"], "case"), ("right", "good"), *sizes, (f"{memory['seconds']:.1f}", "n"), ("", "")]
