"""The CUDA backend on a GPU: the whole softmax suite on each family of kernels, and what only a device can show."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import BF16, FP16, assert_equal, attend, check, check_inputs

import fastattn
from fastattn import masks
from fastattn.testing import Case, make

pytestmark = pytest.mark.gpu
FAMILIES = ("portable", "hopper")
SUITE = "softmax softmax_gradients softmax_numerics softmax_layouts softmax_masks softmax_sparse softmax_sinks softmax_dropout softmax_packed softmax_extras"
SMALL = Case(Hq=4, Hk=2, Lq=130, Lk=300, D=64, causal=True)


@pytest.fixture(params=FAMILIES)
def family(request, monkeypatch):
    """One family of kernels alone, whichever the backend would choose; skipped in its own words."""
    monkeypatch.setenv("FASTATTN_CUDA_KERNELS", request.param)
    inputs = make(SMALL, BF16, device="cuda")
    reasons = next(row.reasons for row in fastattn.explain(*inputs[:3], backend="cuda").rows if row.backend == "cuda")
    if reasons:
        pytest.skip("; ".join(reasons))
    return request.param


def run_python(*arguments: str, **environment: str) -> str:
    command = [sys.executable, *arguments]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[1], env={**os.environ, **environment}, text=True, capture_output=True
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    return result.stdout


def test_the_softmax_suite(family):
    """Every test of every option: those the kernels lack are skipped with the backend's reason."""
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in SUITE.split()]
    environment = {"FASTATTN_TEST_BACKENDS": "cuda", "FASTATTN_TEST_DEVICE": "cuda", "FASTATTN_CUDA_KERNELS": family}
    print(
        run_python("-m", "pytest", "-q", "--no-header", "-W", "ignore", "-p", "no:cacheprovider", *files, **environment)
    )


@pytest.mark.parametrize("D", (64, 128, 256))
@pytest.mark.parametrize("dtype", (BF16, FP16), ids=str)
def test_long_sequences(family, D, dtype):
    for case in (
        Case(B=2, Hq=8, Hk=2, Lq=1000, Lk=1500, D=D, causal=True),
        Case(Lq=777, Lk=513, D=D, window=(200, 100)),
        Case(Lq=2048, Lk=2048, D=D),
        Case(B=3, Hq=32, Hk=8, Lq=1, Lk=4100, D=D, causal=True),
    ):
        check(case, dtype, "cuda")


def test_more_heads_than_a_grid_has_rows(family):
    check_inputs(make(Case(B=8193, Hq=8, Hk=8, Lq=1, Lk=2, D=64), BF16, device="cuda"), Case(), "cuda")
    check_inputs(make(Case(B=65537, Hq=1, Hk=1, Lq=20, Lk=20, D=64), BF16, device="cuda"), Case(), "cuda")


def test_more_elements_than_32_bits_count(family):
    """The last head of a tensor of over 2^31 elements is what it is alone."""
    B, L, D = 130, 2048, 128
    q, k, v = (torch.randn(B, 64, L, D, device="cuda", dtype=BF16) for _ in range(3))
    out = fastattn.attention(q, k, v, causal=True, backend="cuda")
    alone = fastattn.attention(*(x[-1:, -1:].clone() for x in (q, k, v)), causal=True, backend="cuda")
    assert q.numel() > 2**31 and torch.equal(out[-1:, -1:], alone)


@pytest.mark.parametrize("case", [SMALL, Case(Lq=700, Lk=700, D=128)], ids=str)
def test_a_thousand_runs_give_the_same_bits(family, case):
    inputs = make(case, BF16, device="cuda")
    first = attend(inputs, "cuda", deterministic=True, **case.options())
    for i in range(1000):
        assert_equal(attend(inputs, "cuda", deterministic=True, **case.options()), first, f"run {i}")


def test_on_a_second_stream(family):
    inputs = make(SMALL, BF16, device="cuda")
    expected = attend(inputs, "cuda", causal=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        result = attend(inputs, "cuda", causal=True)
    stream.synchronize()
    assert_equal(result, expected, "second stream")


@pytest.mark.parametrize("mask", [None, "documents"])
def test_a_captured_graph_replays_with_new_values(family, mask):
    inputs = make(SMALL, BF16, device="cuda")
    ids = torch.arange(SMALL.Lk) // 70
    chosen = None if mask is None else masks.documents(ids[-SMALL.Lq :], ids)
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]

    def step():
        out = fastattn.attention(*leaves, mask=chosen, causal=True, backend="cuda")
        return out, *torch.autograd.grad(out, leaves, inputs.dout)

    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(torch.randn_like(leaf))
        graph.replay()
        for actual, expected in zip(captured, step()):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("tool", ("memcheck", "initcheck"))
def test_compute_sanitizer_finds_nothing(family, tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    code = """
import torch, fastattn
for Lq, Lk, D, options in ((70, 190, 64, {"causal": True}), (1, 700, 128, {}), (33, 20, 256, {"window": (9, 3)})):
    x = [torch.randn(1, h, n, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h, n in ((4, Lq), (2, Lk), (2, Lk))]
    fastattn.attention(*x, backend="cuda", **options).sum().backward()
torch.cuda.synchronize()
"""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
