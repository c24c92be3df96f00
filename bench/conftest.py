"""Options of `pytest bench/ --benchmark-only`: which cases, by whom; and the machine as the bench itself describes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import environment
from .__main__ import PRESETS

OF_THE_RUN = ("time", "git", "warnings")  # not of the machine: pytest-benchmark warns where two machines differ


def pytest_addoption(parser) -> None:
    group = parser.getgroup("fastattn")
    group.addoption("--preset", choices=PRESETS, default="ci", help="which cases of fastattn.bench")
    group.addoption("--impl", default="", metavar="NAME,...", help="implementations to measure as well")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info(config) -> dict[str, Any]:
    facts = environment.describe(torch.get_num_threads())
    return {name: fact for name, fact in facts.items() if name not in OF_THE_RUN}
