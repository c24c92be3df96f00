"""What a bench case is: a problem, the work it takes, and the goals it is held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Goal:
    """None: no goal of that kind."""

    ratio: float | None = None  # at least this many times as fast as `against`
    of_peak: float | None = None  # at least this share of the peak measured in the same run
    slower_by_us: float | None = None  # at most this much slower than the baseline
    against: str = ""  # the implementation that the ratio is against; "": the baseline


@dataclass(frozen=True)
class Case:
    name: str
    op: str  # the module of bench/cases that makes inputs and implementations
    problem: Any  # shapes and options, in the terms of that module
    dtype: str
    backward: bool = False
    with_forward: bool = False  # of a backward case: the forward pass is inside the clock as well
    count: Callable[[], float] = float  # its FLOPs, asked for when first needed: a long mask takes seconds to count
    bytes: float = 0.0
    bound: str = "compute"  # or "memory" (read), "update" (read and written): which peak limits it
    goal: Goal = Goal()
    must: Goal = Goal()  # the least that is accepted, where the goal has two steps
    presets: tuple[str, ...] = ("cpu",)
    device: str = "cpu"
    peers: tuple[str, ...] = ()  # implementations that always run, next to the baseline and fastattn
    describe: Callable[[], dict[str, Any]] = dict  # shapes and options as plain data, for the JSON
    extra: str = ""  # what the op module has to know beyond the problem

    @cached_property
    def flops(self) -> float:
        return self.count()

    @cached_property
    def details(self) -> dict[str, Any]:
        return self.describe()


@dataclass(frozen=True)
class Implementation:
    """`call(inputs)` returns the output; the first implementation of a case is its baseline."""

    call: Callable[[Any], Any]
    kernel: Callable[[Any], str] = lambda inputs: ""  # which kernel runs, in words
    threads: int | None = None  # None: as many as the run has
    peer: bool = False  # someone else's code: whatever it raises means "n/a", not "broken"
    other: bool = False  # a yardstick of time that computes something else: it is not checked
    blhd: bool = False  # its tensors are [B, L, H, D]: they are laid out so before the clock starts
    timed: Callable[[Any], object] | None = None  # what the clock sees, where the case does not say it


class NotAvailable(Exception):
    """An implementation that cannot take a case here; the message is what the report says."""


def installed(package: str) -> Any:
    """The module, or NotAvailable."""
    try:
        return import_module(package)
    except ImportError as error:
        raise NotAvailable(f"{package.partition('.')[0]} is not installed ({error})") from error
