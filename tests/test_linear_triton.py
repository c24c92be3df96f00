"""Linear attention on the Triton backend: cases in the interpreter and on a GPU, offline compilation, refusals, tables."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_triton_compile import SHARED_LIMIT, compiled

from fastattn.backends import triton as backend
from fastattn.params import LinearCall, LinearParams, LinearTensors

pytest.importorskip("triton", reason="triton is not installed")

TENSOR_CORE_KERNELS = ("states", "read", "pairs", "near", "delta", "inverse")


def run_cases(**environment: str) -> str:
    """Reports of two processes, side by side."""
    command = [sys.executable, *"-m pytest -q --no-header -W ignore -p no:cacheprovider".split()]
    cases = str(Path(__file__).with_name("linear_triton_cases.py"))
    options = {
        "env": {**os.environ, **environment},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    running = [
        subprocess.Popen([*command, cases, "-k", chosen], cwd=Path(__file__).parents[1], **options)
        for chosen in ("test_fp32", "not test_fp32")
    ]
    reports = [process.communicate()[0] for process in running]
    for process, report in zip(running, reports):
        assert process.returncode == 0, report[-8000:]
    return "\n".join(reports)


@pytest.mark.slow
def test_cases_in_the_interpreter():
    """Whatever is skipped must be a test for the GPU."""
    report = run_cases(TRITON_INTERPRET="1", FASTATTN_TEST_DEVICE="cpu", OMP_NUM_THREADS="1")
    reasons = re.findall(r"^SKIPPED .*?: (.*)$", report, re.MULTILINE)
    assert all("no CUDA device" in reason for reason in reasons), reasons


@pytest.mark.gpu
def test_cases_on_a_gpu():
    run_cases(TRITON_INTERPRET="0", FASTATTN_TEST_DEVICE="cuda")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return compiled("linear_triton_offline.py")


@pytest.mark.slow
def test_every_kernel_compiles(rows):
    assert {row["kernel"] for row in rows} == {
        "states", "read", "pairs", "near", "delta", "inverse", "sum_gates", "gate_gradient", "row_factors", "step", "step_z",
    }  # fmt: skip


def test_next_to_nothing_spills(rows):
    assert not [row for row in rows if row["spills"] > 16]  # up to a few cold values


def test_shared_memory_fits(rows):
    assert not [row for row in rows if row["shared"] > SHARED_LIMIT[row["case"]["arch"]]]


def test_products_run_on_tensor_cores(rows):
    """wgmma on sm_90, tcgen05 on sm_100, but for the products of 16 rows."""
    for row in rows:
        arch = row["case"]["arch"]
        if (
            row["case"]["dtype"] != "bfloat16"
            or row["kernel"] not in TENSOR_CORE_KERNELS
            or row["kernel"] in ("pairs", "near")
        ):
            continue
        if arch in (90, 100):
            assert row["wgmma" if arch == 90 else "tcgen05"], row


def test_fp32_is_not_tf32(rows):
    assert not [row for row in rows if row["case"]["dtype"] == "float32" and row["tf32"]]


def call(D=16, dtype=torch.float32, phi="identity", decay=None, beta=False, step=False) -> LinearCall:
    x = torch.zeros(1, 1, 4, D, dtype=dtype)
    betas = torch.zeros(1, 1, 4) if beta else None
    return LinearCall(LinearTensors(x, x, x, decay, betas), LinearParams(phi, True, False, 1.0), False, step)


def test_refusals(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.why_not(call()) == []
    assert "float64" in backend.why_not(call(dtype=torch.float64))[0]
    assert "257 is over 256" in backend.why_not(call(D=257))[0]
    assert "17 is over 16" in backend.why_not(call(D=17, phi="taylor2"))[0]
    channels = torch.zeros(1, 1, 4, 16)
    assert "no chunked kernel" in backend.why_not(call(decay=channels, beta=True))[0]
    assert backend.why_not(call(decay=channels, beta=True, step=True)) == []
    assert "empty" in backend.why_not(call(D=0))[0]
    assert "testing" in backend.why_not_by_default(call())[0]
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "CUDA" in backend.why_not(call())[0]


def test_launch_tables():
    """Pure, for every head dimension, dtype and architecture; chunks are whole blocks, and a wish is met where it fits."""
    from fastattn.kernels.common.launch import ARCHS
    from fastattn.kernels.common.sizes import block_dim
    from fastattn.kernels.linear.config import CHUNKS, pick
    from fastattn.kernels.linear.tiles import BLOCK

    for arch in (0, *ARCHS):
        for dtype in backend.DTYPES:
            for D in (1, 16, 40, 64, 96, 128, 200, 256):
                for delta in (False, True):
                    tiles = pick(dtype, arch, D, delta)
                    assert tiles == pick(dtype, arch, D, delta) and tiles.BT in CHUNKS and tiles.BT % BLOCK.value == 0
                    assert not delta or tiles.delta.rows >= block_dim(D)
                    for wish in (1, 16, 32, 64, 128):
                        BT = pick(dtype, arch, D, delta, wish).BT
                        assert BT == (wish if wish in CHUNKS and (arch == 0 or wish <= tiles.BT) else tiles.BT)
