"""One run from start to end: environment, correctness of everything, speed of what is right; saved after every case."""

from __future__ import annotations

import argparse
from time import perf_counter
from typing import Any

import torch

import fastattn

from . import environment, gpt, lm, mask_building, memory, peaks, runner, schema, table
from .case import Case, Implementation
from .cases import OPS
from .peaks import Peaks
from .progress import RED, Say, say, steps
from .runner import Result

SECONDS_PER_CASE = {"quick": 0.6, "ci": 0.3, "gpu": 0.5}
USUAL_SECONDS = 2.0
MEMORY_TIMEOUT = 45.0
WITHOUT_CASES = ("model",)  # presets that are a model and nothing else
EXTRAS = {  # what a preset measures besides its cases
    "cpu": ("memory", "gpt"),
    "masks": ("mask_building",),
    "linear": ("lm",),
    "model": ("gpt",),
    "full": ("memory", "mask_building", "lm", "gpt"),
}
NOISY = 0.1
SLOWER_PEAK = 0.9  # of the one before: something changed meanwhile


class Session:
    """The report of one run, and what it takes to go on with it."""

    def __init__(self, args: argparse.Namespace, cases: list[Case]):
        if args.threads:
            torch.set_num_threads(args.threads)
        self.args, self.cases, self.threads = args, cases, torch.get_num_threads()
        self.path: str | None = args.json
        self.results: list[Result] = []
        self.implementations: list[dict[str, Implementation]] = []
        self.start, self.usage = perf_counter(), environment.usage()
        skipped = ("command", "json")
        self.report: dict[str, Any] = {
            "schema_version": schema.VERSION,
            "arguments": {name: value for name, value in vars(args).items() if name not in skipped},
            "environment": environment.describe(self.threads),
            "peaks": None,
            "results": [],
            "memory": None,
            "gpt": [],
            "lm": None,
            "mask_building": [],
            "interrupted": True,  # until the end: a run that is killed cannot say so
            "seconds": 0.0,
        }

    def save(self) -> None:
        self.report["results"] = [schema.as_json(result) for result in self.results]
        self.report["seconds"] = perf_counter() - self.start
        if self.path:
            schema.save(self.report, self.path)

    def run(self, timed: bool = True) -> int:
        """Exit code: 1 if anything is wrong, 130 if it was interrupted."""
        print("\n".join(environment.lines(self.report["environment"])))
        self.save()
        try:
            if self.cases:
                self.check()
            if self.cases and timed:
                try:
                    self.time()
                finally:  # interrupted, too
                    table.speed(self.results, self.report["peaks"])
            if timed and self.args.case is None:
                for name in EXTRAS.get(self.args.preset, ()):
                    getattr(self, f"_{name}")()
                    self.save()
            self.report["interrupted"] = False
        except KeyboardInterrupt:
            say("interrupted: what is done is kept")
        warnings = self.report["environment"]["warnings"]
        warnings += environment.disturbances(self.usage, environment.usage())
        self.save()
        for line in table.wrong(self.results):
            say(line, RED)
        for warning in warnings:
            say(f"warning: {warning}")
        say(f"\n{self.report['seconds']:.0f} s")
        return int(failed(self.report)) or 130 * self.report["interrupted"]

    def check(self) -> None:
        with steps("Correctness against fp64, errors also relative to the baseline's own", len(self.cases)) as done:
            for case in self.cases:
                every = OPS[case.op].implementations(case, self.args.backend, tuple(self.args.impl))
                result = Result(case, runner.check(case, every))
                self.results.append(result)
                self.implementations.append(every)
                wrong = any(outcome.status == "wrong" for outcome in result.outcomes.values())
                done(f"{case.name}: {table.verdicts(result)}", RED if wrong else "")
                self.save()

    def time(self) -> None:
        budget = SECONDS_PER_CASE.get(self.args.preset, USUAL_SECONDS)
        before = self._peaks(None)
        with steps("Timing what is right", len(self.results)) as done:
            for result, every in zip(self.results, self.implementations):
                self._time(result, every, budget, done)
                self.save()
        self._note_noise()
        after = self._peaks(before)
        for name, first, last in (("fp32", before.fp32, after.fp32), ("bf16", before.bf16, after.bf16)):
            if first and last and last < SLOWER_PEAK * first:
                note = f"the {name} peak was {last / first:.0%} after the run of what it was before: clocks or others"
                self.report["environment"]["warnings"].append(note)

    def _note_noise(self) -> None:
        every = [o.samples for result in self.results for o in result.outcomes.values() if o.samples is not None]
        noisy = sum(samples.iqr > NOISY * samples.median for samples in every)
        if noisy:
            note = f"{noisy} of {len(every)} times have an IQR over {NOISY:.0%} of their median: the machine is noisy"
            self.report["environment"]["warnings"].append(note)

    def _peaks(self, before: Peaks | None) -> Peaks:
        """Measures them now; the report has the best of before and after, and so have the roofs of the cases."""
        now = peaks.measure(self.cases[0].device, self.threads)
        best = now if before is None else before.best(now)
        self.report["peaks"] = vars(best)
        for result in self.results:
            if result.case.bound == "compute" or result.case.device == "cuda" or result.roof is None:
                result.roof = best.of(result.case.dtype, result.case.bound)
        return now

    def _time(self, result: Result, every: dict[str, Implementation], budget: float, done: Say) -> None:
        case = result.case
        # Only what is next to it in time says what the memory of a shared machine could have given.
        moves = case.bound != "compute" and case.device == "cpu"
        found = [peaks.bandwidth(case.bound, self.threads)] if moves else []
        runner.measure(result, every, self.args.rounds, budget, self.args.graph)
        found += [peaks.bandwidth(case.bound, self.threads)] if moves else []
        result.roof = max((rate for rate in found if rate is not None), default=result.roof)
        done(f"{case.name}: {table.times(result)}")

    def _memory(self) -> None:
        self.report["memory"] = memory.measure(MEMORY_TIMEOUT, self.threads, self.args.backend)
        table.memory(self.report["memory"])

    def _mask_building(self) -> None:
        self.report["mask_building"] = mask_building.measure()
        table.mask_building(self.report["mask_building"])

    def _lm(self) -> None:
        say("\nTraining a language model on real text, softmax attention and gated delta net")
        self.report["lm"] = lm.compare(gpt.Config(), say)
        table.lm(self.report["lm"])

    def _gpt(self) -> None:
        for config in gpt.CONFIGS:
            say(f"\nTraining a GPT on real text, {gpt.precision(config)}")
            self.report["gpt"].append(gpt.compare(config, fastattn.patched, say))
            table.gpt(self.report["gpt"][-1])


def failed(report: dict[str, Any]) -> bool:
    """Wrong anywhere: an implementation of a case, a long gradient, a loss curve, or the text it leads to."""
    outcomes = (o for result in report["results"] for o in result["implementations"].values())
    wrong = any(outcome["status"] == "wrong" for outcome in outcomes)
    wrong = wrong or (report["memory"] or {}).get("status") == "wrong"
    language = report["lm"]
    if language is not None:
        wrong = wrong or not (language["learned"] and all(w["agree"] for w in language["generated"].values()))
    return wrong or any(not (model["loss_agrees"] and model["generated"]["agree"]) for model in report["gpt"])
