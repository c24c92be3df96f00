"""Uninitialised memory holds NaN, every test starts from the same seed, and tests for a GPU skip without one."""

from __future__ import annotations

import functools
import inspect
import os
import platform
import shutil
from collections import Counter

import cuda_build
import pytest
import torch
from packaging_tools import NOT_SOURCE, ROOT

import fastattn
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


@pytest.fixture(scope="session", autouse=True)
def triton_searched_once():
    """At every call of a device function Triton's interpreter looks through its whole language for what to patch."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1":
            from triton.runtime import interpreter

            is_builtin = interpreter.tl.core.is_builtin
            search = functools.cache(lambda module: [n for n, x in inspect.getmembers(module) if is_builtin(x)])

            def patch_builtin(module, builder, scope):
                for name in search(module):
                    if is_builtin(getattr(module, name)):  # and not patched by a caller
                        interpreter._patch_attr(module, name, getattr(module, name), builder, scope)

            patch.setattr(interpreter, "_patch_builtin", patch_builtin)
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cuda_emulator():
    """Path of the CUDA library for the emulator."""
    if platform.machine() != "x86_64":
        pytest.skip("the emulator switches between threads in x86-64 code")
    if not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("no C++ compiler to build the emulator with")
    return cuda_build.emulated_library()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of the sources, so that no build touches the tree the tests run from."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "fastattn", ignore=NOT_SOURCE)


def pytest_collection_modifyitems(items):
    """Files with slow tests first, then by the number of tests: run last, long ones would leave the other processes idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.path.name == "test_isa.py"}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path], item.path))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """In a run of chosen backends, calls that one of them refuses are skipped in its own words."""
    try:
        return (yield)
    except fastattn.UnsupportedError as refusal:
        if "FASTATTN_TEST_BACKENDS" not in os.environ:
            raise
        pytest.skip(str(refusal).splitlines()[0])


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
