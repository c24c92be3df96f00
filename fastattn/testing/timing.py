"""Timing shared by tests and bench: interleaved rounds, so that noise and drift hit every implementation alike."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch

Call = Callable[[], object]
SHORTEST_SAMPLE = 1e-3  # seconds; quicker calls are repeated inside one sample
FEWEST_ROUNDS, MOST_ROUNDS = 5, 200
WARM_UP_BEFORE_CAPTURE = 3  # calls; torch asks for some on the side stream a graph is captured on


@dataclass(frozen=True)
class Samples:
    """Seconds per call, one entry per round."""

    seconds: tuple[float, ...]

    def quantile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        at = q * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        return self.quantile(0.75) - self.quantile(0.25)

    @property
    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the median, from the order of the rounds alone; their range if they are fewer than 6."""
        ordered, n = sorted(self.seconds), len(self.seconds)
        outside, k = 0.0, 0
        while outside + math.comb(n, k) * 0.5**n <= 0.025:
            outside += math.comb(n, k) * 0.5**n
            k += 1
        k = max(k, 1)
        return ordered[k - 1], ordered[n - k]


def ratio(base: Samples, other: Samples) -> Samples:
    """How many times faster `other` is, paired round by round (a slow moment slows both sides of a pair)."""
    return Samples(tuple(b / o for b, o in zip(base.seconds, other.seconds)))


class CallFailed(Exception):
    """One of the timed calls has raised; `name` says which, the cause what."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def interleave(
    calls: Mapping[str, Call], *, device: str = "cpu", rounds: int | None = None, budget: float = 2.0
) -> dict[str, Samples]:
    """Time every call once per round, in an order that turns around from round to round.

    `rounds` fixes their number; otherwise it is what fits into `budget` seconds. Errors: CallFailed.
    """
    clock = _cuda_clock(device) if device.startswith("cuda") else _cpu_seconds

    def timed(name: str, repeats: int) -> float:
        try:
            return clock(calls[name], repeats)
        except Exception as error:
            raise CallFailed(name) from error

    repeats, once = {}, 0.0
    for name in calls:
        timed(name, 1)
        seconds = min(timed(name, 1), timed(name, 1))
        repeats[name] = max(1, round(SHORTEST_SAMPLE / max(seconds, 1e-7))) if clock is _cpu_seconds else 1
        once += seconds * repeats[name]
    if rounds is None:
        rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(budget / max(once, 1e-6))))
    seconds_of: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            for name in list(calls)[:: -1 if i % 2 else 1]:
                seconds_of[name].append(timed(name, repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Samples(tuple(seconds)) for name, seconds in seconds_of.items()}


def _cpu_seconds(call: Call, repeats: int) -> float:
    start = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - start) / repeats


def _cuda_clock(device: str) -> Callable[[Call, int], float]:
    """Events around each call, after a write larger than the L2 cache so that no call finds its inputs there."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)

    def seconds(call: Call, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats

    return seconds


def captured(call: Call) -> Call:
    """A replay of what `call` launches, without the time of Python and the driver.

    The call must not synchronise, and reads its inputs where they lie now.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_BEFORE_CAPTURE):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
