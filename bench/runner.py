"""Runs cases: first right or wrong, then how fast. What is wrong gets no number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fastattn import UnsupportedError
from fastattn.testing import tolerances
from fastattn.testing.timing import Samples, interleave, ratio

from . import peaks
from .case import Case, Implementation
from .cases import OPS
from .peaks import Peaks

SCHEMA_VERSION = 1
RMS_SLACK = 10  # a result is wrong, whoever made it, beyond this multiple of the RMS error the project promises
Progress = Callable[[str], None]


@dataclass
class Outcome:
    """One implementation on one case."""

    status: str  # "ok", "wrong" or "n/a"
    reason: str = ""
    kernel: str = ""
    rms_error: float | None = None  # relative to the RMS of fp64
    max_error: float | None = None
    error_vs_baseline: float | None = None  # max error over the baseline's
    samples: Samples | None = None


@dataclass
class Result:
    case: Case
    outcomes: dict[str, Outcome]
    roof: float | None = None  # GFLOP/s or GB/s that limit this case
    baseline: str = field(init=False)

    def __post_init__(self) -> None:
        self.baseline = next(iter(self.outcomes))

    @property
    def base(self) -> Outcome:
        return self.outcomes[self.baseline]

    @property
    def ours(self) -> Outcome:
        return self.outcomes["fastattn"]

    def ratio(self) -> Samples | None:
        """How many times faster than the baseline, per round."""
        if self.base.samples is None or self.ours.samples is None:
            return None
        return ratio(self.base.samples, self.ours.samples)

    def rate(self, outcome: Outcome) -> float | None:
        """GFLOP/s, or GB/s where memory is the bound."""
        if outcome.samples is None:
            return None
        work = self.case.flops if self.case.bound == "compute" else self.case.bytes
        return work / outcome.samples.median * 1e-9

    def of_peak(self, outcome: Outcome) -> float | None:
        rate = self.rate(outcome)
        return None if rate is None or not self.roof else rate / self.roof

    def ratio_met(self) -> bool | None:
        """Of the goal against the baseline, as a ratio or as a difference; None where there is none."""
        ratios, goal = self.ratio(), self.case.goal
        if ratios is None or self.base.samples is None or self.ours.samples is None:
            return None if goal.ratio is None and goal.slower_by_us is None else False
        if goal.slower_by_us is not None:
            return (self.ours.samples.median - self.base.samples.median) * 1e6 <= goal.slower_by_us
        return None if goal.ratio is None else ratios.median >= goal.ratio

    def peak_met(self) -> bool | None:
        if self.case.goal.of_peak is None:
            return None
        share = self.of_peak(self.ours)
        return share is not None and share >= self.case.goal.of_peak


def check(case: Case, implementations: dict[str, Implementation]) -> dict[str, Outcome]:
    """Every implementation against fp64; all but the baseline also against the baseline's own error."""
    module = OPS[case.op]
    inputs = module.make(case)[0]
    golden = module.golden(case, inputs)
    limit = RMS_SLACK * tolerances.RMS_LIMIT[module.DTYPES[case.dtype]]
    factor = tolerances.GRAD_FACTOR if case.backward else tolerances.OUT_FACTOR
    baseline: dict[str, Tensor] | None = None
    outcomes = {}
    for i, (name, implementation) in enumerate(implementations.items()):
        if implementation.other:
            outcomes[name] = Outcome("ok", kernel=implementation.kernel(inputs))
            continue
        try:
            with _threads(implementation.threads):
                results = _results(case, implementation, inputs)
                kernel = implementation.kernel(inputs)
        except Exception as error:
            excused = implementation.peer or isinstance(error, UnsupportedError)
            outcomes[name] = Outcome("n/a" if excused else "wrong", _first_line(error))
            continue
        outcomes[name] = outcome = Outcome("ok", kernel=kernel)
        try:
            outcome.rms_error = max(tolerances.rms_ratio(results[n], golden[n]) for n in golden)
            outcome.max_error = max(tolerances.max_error(results[n], golden[n]) for n in golden)
        except (AssertionError, RuntimeError) as error:  # shapes differ
            outcome.status, outcome.reason = "wrong", str(error)
            continue
        if not outcome.rms_error <= limit:
            outcome.status, outcome.reason = (
                "wrong",
                f"RMS error {outcome.rms_error:.1e} of the values, limit {limit:.1e}",
            )
        elif i == 0:
            baseline = results
        elif baseline is not None:
            _against_baseline(outcome, results, baseline, golden, module.DTYPES[case.dtype], factor)
    return outcomes


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


def _against_baseline(outcome: Outcome, results, baseline, golden, dtype: torch.dtype, factor: float) -> None:
    worst = 0.0
    for name, exact in golden.items():
        error, theirs = (tolerances.max_error(r[name], exact) for r in (results, baseline))
        worst = max(worst, error / max(theirs, tolerances.rounding(exact, dtype), 1e-30))
        allowed = tolerances.bound(exact, baseline[name], exact, dtype, factor)
        if not error <= allowed:
            outcome.status, outcome.reason = "wrong", f"{name}: max error {error:.1e}, allowed {allowed:.1e}"
    outcome.error_vs_baseline = worst


def _results(case: Case, implementation: Implementation, inputs: Any) -> dict[str, Tensor]:
    """What one implementation computes, cut to what the golden run covers."""
    module = OPS[case.op]
    with torch.set_grad_enabled(case.backward):
        out = implementation.call(inputs)
    if not case.backward:
        return {"out": module.pick(case, "out", out)}
    leaves = module.leaves(inputs)
    grads = torch.autograd.grad(out, tuple(leaves.values()), inputs.dout)
    return {name: module.pick(case, name, grad) for name, grad in zip(leaves, grads)}


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        if wanted is not None:
            torch.set_num_threads(before)


def measure(
    case: Case, implementations: dict[str, Implementation], rounds: int | None, budget: float
) -> dict[str, Samples]:
    """Interleaved rounds of all given implementations. Backward: only the backward is inside the clock."""
    copies = OPS[case.op].make(case)
    turn = count()

    def timed(implementation: Implementation) -> Callable[[], object]:
        if case.backward and implementation.timed is None:
            run = _backward(case, implementation, copies[0])
        else:
            run = _forward(implementation, copies, turn)
        if implementation.threads is None:
            return run

        def with_threads() -> object:
            with _threads(implementation.threads):
                return run()

        return with_threads

    with torch.set_grad_enabled(case.backward):
        calls = {name: timed(implementation) for name, implementation in implementations.items()}
        return interleave(calls, device=case.device, rounds=rounds, budget=budget)


def _forward(implementation: Implementation, copies: list[Any], turn: Iterator[int]) -> Callable[[], object]:
    call = implementation.timed or implementation.call
    if len(copies) == 1:
        return lambda: call(copies[0])
    return lambda: call(copies[next(turn) % len(copies)])


def _backward(case: Case, implementation: Implementation, inputs: Any) -> Callable[[], object]:
    leaves = tuple(OPS[case.op].leaves(inputs).values())
    if case.with_forward:
        return lambda: torch.autograd.grad(implementation.call(inputs), leaves, inputs.dout)
    with _threads(implementation.threads):
        out = implementation.call(inputs)
    return lambda: torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)


def check_all(cases: list[Case], backend: str, progress: Progress) -> Iterator[Result]:
    for i, case in enumerate(cases, 1):
        result = Result(case, check(case, OPS[case.op].implementations(case, backend)))
        notes = "; ".join(_verdict(name, outcome, result.baseline) for name, outcome in result.outcomes.items())
        progress(f"[{i:2d}/{len(cases)}] {case.name}: {notes}")
        yield result


def _verdict(name: str, outcome: Outcome, baseline: str) -> str:
    text = f"{name} {outcome.status}"
    if outcome.rms_error is not None:
        text += f", rms {outcome.rms_error:.0e}"
    if outcome.error_vs_baseline is not None:
        text += f", max {outcome.error_vs_baseline:.2f}x {baseline}'s"
    return f"{text}: {outcome.reason}" if outcome.reason else text


def time_all(
    results: list[Result], backend: str, threads: int, rounds: int | None, budget: float, progress: Progress
) -> Peaks:
    """Fills in samples and roofs. The peaks are the best of before and after."""
    device = results[0].case.device
    best = peaks.measure(device, threads)
    for i, result in enumerate(results, 1):
        case = result.case
        # Only what is next to it in time says what the memory of a shared machine could have given.
        moves = case.bound != "compute" and device == "cpu"
        found = [peaks.bandwidth(case.bound, threads)] if moves else []
        _time(result, backend, rounds, budget)
        found += [peaks.bandwidth(case.bound, threads)] if moves else []
        result.roof = max((rate for rate in found if rate is not None), default=None)
        times = "  ".join(f"{n} {o.samples.median * 1e3:.3f} ms" for n, o in result.outcomes.items() if o.samples)
        ratios = result.ratio()
        progress(f"[{i:2d}/{len(results)}] {case.name}: {times}" + (f"  {ratios.median:.2f}x" if ratios else ""))
    best = best.best(peaks.measure(device, threads))
    for result in results:
        result.roof = result.roof or best.of(result.case.dtype, result.case.bound)
    return best


def _time(result: Result, backend: str, rounds: int | None, budget: float) -> None:
    """Fills in the samples of what is right."""
    every = OPS[result.case.op].implementations(result.case, backend)
    right = {name: every[name] for name, outcome in result.outcomes.items() if outcome.status == "ok"}
    if not right:
        return
    try:
        for name, samples in measure(result.case, right, rounds, budget).items():
            result.outcomes[name].samples = samples
    except RuntimeError as error:  # out of memory: here the graphs of all implementations are alive at once
        for name in right:
            result.outcomes[name].status, result.outcomes[name].reason = "n/a", _first_line(error)


def as_json(result: Result) -> dict[str, Any]:
    case = result.case
    ratios = result.ratio()

    def implementation(outcome: Outcome) -> dict[str, Any]:
        data = {k: _finite(v) for k, v in asdict(outcome).items() if k != "samples"}
        samples = outcome.samples
        data["ms"] = samples and _quantiles(samples, 1e3)
        return data | {"rate": result.rate(outcome), "of_peak": result.of_peak(outcome)}

    return {
        "case": case.name,
        "op": case.op,
        "direction": "forward" + "+backward" * case.backward
        if case.with_forward
        else "backward"
        if case.backward
        else "forward",
        "dtype": case.dtype,
        "device": case.device,
        **case.details,
        "flops": case.flops,
        "bytes": case.bytes,
        "bound": case.bound,
        "unit": "GFLOP/s" if case.bound == "compute" else "GB/s",
        "goal": asdict(case.goal),
        "baseline": result.baseline,
        "roof": result.roof,
        "implementations": {name: implementation(outcome) for name, outcome in result.outcomes.items()},
        "ratio": ratios and _quantiles(ratios, 1.0),
        "ratio_met": result.ratio_met(),
        "peak_met": result.peak_met(),
    }


def _quantiles(samples: Samples, scale: float) -> dict[str, float]:
    return {
        "median": samples.median * scale,
        "p20": samples.quantile(0.2) * scale,
        "p80": samples.quantile(0.8) * scale,
        "iqr": samples.iqr * scale,
        "rounds": len(samples.seconds),
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
