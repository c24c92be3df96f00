"""Uninitialised memory holds NaN, every test starts from the same seed, and tests for a GPU skip without one."""

from __future__ import annotations

import functools

import pytest
import torch

from fastattn.backends import native


def _filled(allocate):
    @functools.wraps(allocate)
    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        # While a graph is traced, an extra fill would end up in the graph.
        plain = not torch.compiler.is_compiling() and type(tensor) is torch.Tensor and tensor.device.type != "meta"
        if plain and tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return allocate_nan


@pytest.fixture(scope="session", autouse=True)
def nan_in_uninitialised_memory():
    """For the whole session: torch.compile remembers functions by identity, so they must not change between tests."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            patch.setattr(owner, name, _filled(getattr(owner, name)))
        if native._C is not None:
            native._C.poison_scratch(True)
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
