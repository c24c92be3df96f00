"""Runs one case: first right or wrong, then how fast. What is wrong gets no number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fastattn import UnsupportedError
from fastattn.testing import tolerances
from fastattn.testing.timing import CallFailed, Samples, captured, interleave, ratio

from . import memory
from .case import Case, Goal, Implementation, NotAvailable
from .cases import OPS

SEQUENCES = ("q", "k", "v", "dout", "decay", "beta")  # [B, H, L, ...]
RMS_SLACK = 10  # a result is wrong, whoever made it, beyond this multiple of the RMS error the project promises


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
    extra_bytes: int | None = None  # at the peak of one call, results included; backward cases: with the forward

    @property
    def unchecked(self) -> bool:
        """It computes something else and is there for its time."""
        return self.status == "ok" and self.rms_error is None


@dataclass
class Result:
    case: Case
    outcomes: dict[str, Outcome]
    roof: float | None = None  # GFLOP/s or GB/s that limit this case
    baseline: str = field(init=False)

    def __post_init__(self) -> None:
        self.baseline = next(iter(self.outcomes))

    @property
    def ours(self) -> Outcome:
        return self.outcomes["fastattn"]

    def faster_than(self, name: str) -> Samples | None:
        """How many times faster fastattn is than that implementation, per round."""
        theirs = self.outcomes[name].samples if name in self.outcomes else None
        return None if theirs is None or self.ours.samples is None else ratio(theirs, self.ours.samples)

    def rate(self, outcome: Outcome) -> float | None:
        """GFLOP/s, or GB/s where memory is the bound."""
        if outcome.samples is None:
            return None
        work = self.case.flops if self.case.bound == "compute" else self.case.bytes
        return work / outcome.samples.median * 1e-9

    def of_peak(self, outcome: Outcome) -> float | None:
        rate = self.rate(outcome)
        return None if rate is None or not self.roof else rate / self.roof

    def ratio_met(self, goal: Goal) -> bool | None:
        """A ratio to another, or a difference to the baseline; None where none is asked for, or it cannot be judged."""
        if goal.ratio is None and goal.slower_by_us is None:
            return None
        ours, other = self.ours.samples, goal.against or self.baseline
        if ours is None:
            return self._untimed()
        theirs = self.outcomes[other].samples if other in self.outcomes else None
        if theirs is None:
            return None
        if goal.slower_by_us is not None:
            return (ours.median - theirs.median) * 1e6 <= goal.slower_by_us
        assert goal.ratio is not None
        return ratio(theirs, ours).median >= goal.ratio

    def peak_met(self, goal: Goal) -> bool | None:
        if goal.of_peak is None:
            return None
        share = self.of_peak(self.ours)
        return share >= goal.of_peak if share is not None else self._untimed()

    def _untimed(self) -> bool | None:
        """What is wrong or n/a has missed its goals; what is right and has no time, or no roof, is not judged."""
        return None if self.ours.status == "ok" else False

    def must_met(self) -> bool | None:
        """Both parts of the least that is accepted; None where there is no such least."""
        judged = [met for met in (self.ratio_met(self.case.must), self.peak_met(self.case.must)) if met is not None]
        return all(judged) if judged else None


def check(case: Case, implementations: dict[str, Implementation]) -> dict[str, Outcome]:
    """Every implementation against fp64; all but the baseline also against the baseline's own error."""
    module = OPS[case.op]
    try:
        inputs = module.checked(case, module.make(case)[0])
        golden = module.golden(case, inputs)
    except Exception as error:  # too large for this machine
        return {name: Outcome("n/a", f"cannot be checked here: {first_line(error)}") for name in implementations}
    limit = RMS_SLACK * tolerances.RMS_LIMIT[module.DTYPES[case.dtype]]
    factor = tolerances.GRAD_FACTOR if case.backward else tolerances.OUT_FACTOR
    baseline: dict[str, Tensor] | None = None
    outcomes = {}
    for i, (name, implementation) in enumerate(implementations.items()):
        outcomes[name] = outcome = Outcome("ok")
        results = _once_checked(case, implementation, inputs, outcome)
        if results is None:
            continue
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
            if implementation.peer and outcome.status == "wrong":  # no worse than promised: less exact, and shown so
                outcome.status, outcome.reason = "ok", ""
    return outcomes


def _once_checked(
    case: Case, implementation: Implementation, inputs: Any, outcome: Outcome
) -> dict[str, Tensor] | None:
    """Its results; None where it fails, or computes something else."""
    try:
        with _threads(implementation.threads):
            outcome.kernel = implementation.kernel(inputs)
            if not implementation.other:
                return _results(case, implementation, inputs)
            with torch.no_grad():
                implementation.call(_laid_out(implementation, inputs))
    except Exception as error:
        excused = implementation.peer or implementation.other or isinstance(error, UnsupportedError)
        outcome.status, outcome.reason, outcome.kernel = "n/a" if excused else "wrong", first_line(error), ""
    return None


def first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or ["no message"])[0]
    if isinstance(error, (NotAvailable, UnsupportedError)):
        return line.partition(" does not take this call: ")[2] or line
    return f"{type(error).__name__}: {line}"


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
    laid_out = _laid_out(implementation, inputs)
    with torch.set_grad_enabled(case.backward):
        out = implementation.call(laid_out)
    if not case.backward:
        results = {"out": out}
    else:
        leaves = module.leaves(laid_out)
        results = dict(zip(leaves, torch.autograd.grad(out, tuple(leaves.values()), laid_out.dout)))
    return {
        name: module.pick(case, name, t.transpose(1, 2) if implementation.blhd else t) for name, t in results.items()
    }


def _laid_out(implementation: Implementation, inputs: Any) -> Any:
    """The inputs as it wants them: [B, H, L, D], or copies as [B, L, H, D]."""
    if not implementation.blhd:
        return inputs
    given = {name: getattr(inputs, name, None) for name in SEQUENCES}
    return inputs._replace(
        **{
            name: t.detach().transpose(1, 2).contiguous().requires_grad_(t.requires_grad)
            for name, t in given.items()
            if t is not None
        }
    )


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
    result: Result,
    implementations: dict[str, Implementation],
    rounds: int | None = None,
    budget: float = 2.0,
    graph: bool = False,
) -> None:
    """Interleaved rounds of what is right, then its peak memory. Backward: only the backward is inside the clock."""
    case = result.case
    with calls_of(result, implementations, graph) as calls:
        for name, samples in _interleave_what_runs(result, calls, rounds, budget).items():
            result.outcomes[name].samples = samples
    if not any(outcome.samples for outcome in result.outcomes.values()):
        return
    with suppress(RuntimeError, MemoryError), torch.set_grad_enabled(case.backward):  # no room: not known
        inputs = OPS[case.op].make(case)[0]
        for name, outcome in result.outcomes.items():
            if outcome.samples is not None:
                call = _once(case, implementations[name], _laid_out(implementations[name], inputs))
                outcome.extra_bytes = memory.peak_extra(call, case.device)


def _interleave_what_runs(
    result: Result, calls: dict[str, Callable[[], object]], rounds: int | None, budget: float
) -> dict[str, Samples]:
    """Starts again without the one that has failed, which becomes n/a."""
    while calls:
        try:
            return interleave(calls, device=result.case.device, rounds=rounds, budget=budget)
        except CallFailed as failure:
            assert failure.__cause__ is not None
            _give_up(result.outcomes[failure.name], failure.__cause__)
            del calls[failure.name]
    return {}


def _give_up(outcome: Outcome, error: BaseException) -> None:
    outcome.status, outcome.reason = "n/a", first_line(error)


@contextmanager
def calls_of(
    result: Result, implementations: dict[str, Implementation], graph: bool = False
) -> Iterator[dict[str, Callable[[], object]]]:
    """What the clock sees of each that is right, called once; gradients are on where they are part of it.

    `graph`: replays of CUDA graphs. What fails here becomes n/a.
    """
    case, turn = result.case, count()
    calls: dict[str, Callable[[], object]] = {}
    right = {name: one for name, one in implementations.items() if result.outcomes[name].status == "ok"}
    if case.device == "cpu":
        memory.keep_freed()
    try:
        copies = OPS[case.op].make(case) if right else []
    except Exception as error:
        for name in right:
            _give_up(result.outcomes[name], error)
        right = {}
    with torch.set_grad_enabled(case.backward):
        for name, implementation in right.items():
            try:
                call = _timed(case, implementation, copies, turn)
                call = captured(call) if graph else call
                call()
            except Exception as error:  # out of memory: here the graphs of all implementations are alive at once
                _give_up(result.outcomes[name], error)
            else:
                calls[name] = call
        yield calls


def _timed(case: Case, implementation: Implementation, copies: list[Any], turn: Iterator[int]) -> Callable[[], object]:
    """What the clock sees."""
    copies = [_laid_out(implementation, inputs) for inputs in copies]
    if case.backward and implementation.timed is None:
        run = _backward(case, implementation, copies[0])
    else:
        run = _forward(implementation, copies, turn)
    return _on_threads(implementation, run)


def _on_threads(implementation: Implementation, run: Callable[[], object]) -> Callable[[], object]:
    if implementation.threads is None:
        return run

    def with_threads() -> object:
        with _threads(implementation.threads):
            return run()

    return with_threads


def _once(case: Case, implementation: Implementation, inputs: Any) -> Callable[[], object]:
    """One call from inputs to what is asked for, gradients included."""
    if implementation.timed is not None:
        timed = implementation.timed
        return _on_threads(implementation, lambda: timed(inputs))
    if not case.backward:
        return _on_threads(implementation, lambda: implementation.call(inputs))
    leaves = tuple(OPS[case.op].leaves(inputs).values())
    return _on_threads(implementation, lambda: torch.autograd.grad(implementation.call(inputs), leaves, inputs.dout))


def _forward(implementation: Implementation, copies: list[Any], turn: Iterator[int]) -> Callable[[], object]:
    call = implementation.timed or implementation.call
    if len(copies) == 1:
        return lambda: call(copies[0])
    return lambda: call(copies[next(turn) % len(copies)])


def _backward(case: Case, implementation: Implementation, inputs: Any) -> Callable[[], object]:
    if case.with_forward:
        return _once(case, implementation, inputs)
    leaves = tuple(OPS[case.op].leaves(inputs).values())
    with _threads(implementation.threads):
        out = implementation.call(inputs)
    return lambda: torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)
