"""`python -m fastattn.bench run` or `list`. Exit code 1 when an implementation is wrong."""

from __future__ import annotations

import argparse
import json
import sys
from time import perf_counter
from typing import Any

import torch

import fastattn

from . import environment, gpt, lm, mask_building, memory, runner, table
from .case import Case
from .cases import all_cases

PRESETS = ("quick", "cpu", "masks", "linear", "model", "gpu")
SECONDS_PER_CASE = {"quick": 1.0, "cpu": 2.0, "masks": 2.0, "linear": 2.0, "model": 0.0, "gpu": 1.0}
MEMORY_TIMEOUT = 45.0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastattn.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="environment, correctness, speed")
    listing = commands.add_parser("list", help="show the cases of a preset, or all")
    for command in (run, listing):
        command.add_argument("--case", metavar="PATTERN", help="only cases whose name contains this")
    run.add_argument("--preset", choices=PRESETS, default="cpu")
    listing.add_argument("--preset", choices=PRESETS)
    run.add_argument("--json", metavar="FILE", help="write the report there as well")
    run.add_argument("--rounds", type=int, metavar="N", help="rounds per case (default: as many as fit the time)")
    run.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    run.add_argument("--backend", default="auto", help="which backend of fastattn to measure (default: auto)")
    args = parser.parse_args(argv)
    if args.command == "run" and any(n is not None and n < 1 for n in (args.rounds, args.threads)):
        parser.error("--rounds and --threads take a positive number")
    return args


def chosen(preset: str | None, pattern: str | None) -> list[Case]:
    return [
        case
        for case in all_cases()
        if (preset is None or preset in case.presets) and (pattern is None or pattern in case.name)
    ]


def say(line: str) -> None:
    print(line, flush=True)


def run(args: argparse.Namespace) -> int:
    start, before = perf_counter(), environment.usage()
    if args.threads:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()
    report: dict[str, Any] = {
        "schema_version": runner.SCHEMA_VERSION,
        "arguments": {name: value for name, value in vars(args).items() if name not in ("command", "json")},
        "environment": environment.describe(threads),
        "peaks": None,
        "results": [],
        "memory": None,
        "gpt": [],
        "lm": None,
        "mask_building": [],
        "interrupted": False,
    }
    print("\n".join(environment.lines(report["environment"])))
    if args.preset == "gpu" and not torch.cuda.is_available():
        print("n/a: preset gpu needs a CUDA device, and torch sees none")
        return 2
    cases = chosen(args.preset, args.case)
    if not cases and args.preset != "model":
        print(f"no case of preset {args.preset} contains {args.case!r}; see `python -m fastattn.bench list`")
        return 2
    results: list[runner.Result] = []
    try:
        if cases:
            say("\nCorrectness against fp64")
            results.extend(runner.check_all(cases, args.backend, say))
            say("\nTiming what is right")
            budget = SECONDS_PER_CASE[args.preset]
            peaks = runner.time_all(results, args.backend, threads, args.rounds, budget, say)
            report["peaks"] = vars(peaks)
            table.speed(results, peaks)
        if args.case is None and args.preset == "cpu":
            report["memory"] = memory.measure(MEMORY_TIMEOUT, threads, args.backend)
            table.memory(report["memory"])
        if args.case is None and args.preset == "masks":
            report["mask_building"] = mask_building.measure()
            table.mask_building(report["mask_building"])
        if args.case is None and args.preset == "linear":
            say("\nTraining a language model on real text, softmax attention and gated delta net")
            report["lm"] = lm.compare(gpt.Config(), say)
            table.lm(report["lm"])
        if args.case is None and args.preset in ("cpu", "model"):
            for config in gpt.CONFIGS:
                say(f"\nTraining a GPT on real text, {gpt.precision(config)}")
                report["gpt"].append(gpt.compare(config, fastattn.patched, say))
                table.gpt(report["gpt"][-1])
    except KeyboardInterrupt:
        report["interrupted"] = True
        say("interrupted: what is done is kept")
    report["results"] = [runner.as_json(result) for result in results]
    report["environment"]["warnings"] += environment.disturbances(before, environment.usage())
    report["seconds"] = perf_counter() - start
    for warning in report["environment"]["warnings"]:
        print(f"warning: {warning}")
    say(f"\n{report['seconds']:.0f} s")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1, allow_nan=False)
            file.write("\n")
    return int(failed(report))


def failed(report: dict[str, Any]) -> bool:
    """Wrong anywhere: an implementation of a case, a long gradient, a loss curve, or the text it leads to."""
    outcomes = (o for result in report["results"] for o in result["implementations"].values())
    wrong = any(outcome["status"] == "wrong" for outcome in outcomes)
    wrong = wrong or (report["memory"] or {}).get("status") == "wrong"
    language = report["lm"]
    if language is not None:
        wrong = wrong or not (language["learned"] and all(w["agree"] for w in language["generated"].values()))
    return wrong or any(not (model["loss_agrees"] and model["generated"]["agree"]) for model in report["gpt"])


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.command == "list":
        table.cases(chosen(args.preset, args.case))
        return 0
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
