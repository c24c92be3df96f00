"""The cases of a preset under pytest-benchmark: `pytest bench/ --benchmark-only [--preset ci] [--impl torch,math]`.

One group per case, one test per implementation. What is wrong fails and is not timed; what is not available is skipped.
"""

from __future__ import annotations

from argparse import Namespace
from functools import cache

import pytest
import torch

from fastattn.bench import runner
from fastattn.bench.__main__ import check_names, select
from fastattn.bench.case import Case, Implementation
from fastattn.bench.cases import OPS

CASES: dict[str, Case] = {}  # of this session, by name
NAMES: list[str] = []  # implementations that were asked for


def pytest_generate_tests(metafunc) -> None:
    option = metafunc.config.getoption
    free = {"shape": None, "dtype": None, "causal": None, "mask": None, "backward": False}
    cases = select(Namespace(command="run", preset=option("--preset"), case=None, device=None, **free))
    CASES.update({case.name: case for case in cases})
    NAMES[:] = [name for name in option("--impl").split(",") if name]
    check_names(NAMES)
    found = [(case.name, name) for case in cases for name in OPS[case.op].implementations(case, "auto", tuple(NAMES))]
    metafunc.parametrize(("case_name", "name"), found, ids=[f"{case}-{name}" for case, name in found])


@cache
def checked(case_name: str) -> tuple[runner.Result, dict[str, Implementation]]:
    case = CASES[case_name]
    every = OPS[case.op].implementations(case, "auto", tuple(NAMES))
    return runner.Result(case, runner.check(case, every)), every


def test_speed(benchmark, case_name, name):
    result, every = checked(case_name)
    case, outcome = result.case, result.outcomes[name]
    with runner.calls_of(result, {name: every[name]}) as calls:
        if outcome.status == "n/a":
            pytest.skip(f"n/a: {outcome.reason}")
        assert outcome.status == "ok", outcome.reason
        benchmark.group = case_name
        benchmark(_synchronised(calls[name]) if case.device == "cuda" else calls[name])
    benchmark.extra_info |= {
        "op": case.op,
        "kernel": outcome.kernel,
        "flops": case.flops,
        "bytes": case.bytes,
        "rms_error": outcome.rms_error,
        "error_vs_baseline": outcome.error_vs_baseline,
    }
    if benchmark.stats is not None:  # not with --benchmark-disable
        median = benchmark.stats.stats.median
        benchmark.extra_info |= {"FLOP/s": case.flops / median, "bytes/s": case.bytes / median}


def _synchronised(call):
    """The clock of pytest-benchmark is the CPU's: it has to wait for the GPU."""

    def wait() -> None:
        call()
        torch.cuda.synchronize()

    return wait
