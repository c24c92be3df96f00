"""The Triton backend: its cases run in processes of their own, and its launch functions right here.

Kernels are bound to Triton's interpreter or to its compiler at import, so one process cannot test both.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.backends import triton as backend
from fastattn.params import SoftmaxCall, SoftmaxParams, SoftmaxTensors

pytest.importorskip("triton", reason="triton is not installed")

CASES = [str(Path(__file__).with_name(name)) for name in ("triton_cases.py", "triton_option_cases.py")]


def run_cases(**environment: str) -> str:
    """Reports of all files, a process each, side by side."""
    command = [sys.executable, *"-m pytest -q --no-header -W ignore -p no:cacheprovider".split()]
    options = {
        "env": {**os.environ, **environment},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    running = [subprocess.Popen([*command, case], cwd=Path(__file__).parents[1], **options) for case in CASES]
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


def call(dtype=torch.float32, D=16) -> SoftmaxCall:
    x = torch.zeros(1, 1, 4, D, dtype=dtype)
    return SoftmaxCall(SoftmaxTensors(x, x, x), SoftmaxParams(1.0), False)


def test_refusals_name_the_remedy(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "CUDA" in backend.why_not(call())[0]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.why_not(call()) == []
    assert "float64" in backend.why_not(call(torch.float64))[0]
    assert "257 is over 256" in backend.why_not(call(D=257))[0]
    assert "testing" in backend.why_not_by_default(call())[0]
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in backend.why_not(call())[0]


def test_an_explicit_request_does_not_fall_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 1, 4, 16)
    with pytest.raises(fastattn.UnsupportedError, match="triton"):
        fastattn.attention(x, x, x, backend="triton")


def test_importing_fastattn_does_not_import_triton():
    code = "import sys, fastattn; fastattn.explain; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_work_order():
    """Every (tile, head) once; inside a section the heaviest tile of every head comes first; sections follow one another."""
    from fastattn.kernels.common.tiles import work_item

    for n_tiles, n_heads, section in ((1, 1, 1), (5, 7, 3), (4, 6, 6), (3, 8, 1)):
        for reverse in (False, True):
            items = [work_item.fn(pid, n_tiles, n_heads, section, reverse) for pid in range(n_tiles * n_heads)]
            assert sorted(items) == [(tile, head) for tile in range(n_tiles) for head in range(n_heads)]
            first = items[: n_tiles * section]
            tiles = [tile for tile, _ in first]
            assert tiles == sorted(tiles, reverse=reverse)
            assert {head for _, head in first} == set(range(min(section, n_heads)))


def test_sections_fit_the_cache_and_keep_groups_together():
    from fastattn.kernels.softmax.config import L2_BYTES, heads_per_section

    assert heads_per_section(64, 1, 2 * 1024 * 128 * 2) == 64
    assert heads_per_section(64, 8, L2_BYTES // 3) == 24
    assert heads_per_section(64, 8, 2 * L2_BYTES) == 8
    assert heads_per_section(4, 4, 0) == 4


RUNS = ((0, 0, 100), (0, 8, 8), (4, 4, 8), (4, 8, 8), (8, 8, 16))  # begin, full_begin, stop


@pytest.mark.parametrize("begin, full_begin, stop", RUNS)
def test_span_covers_the_band(begin, full_begin, stop):
    """Tiles of each kind against a dense band in one run: none missed, none twice, none outside, full ones full."""
    from fastattn.kernels.common.tiles import span

    BLOCK = 4
    bounds = [(lo, hi) for lo in (None, -30, -5, 0, 3, 30) for hi in (None, -30, -2, 0, 6, 30)]
    for L in (1, 7, 8, 13):
        for first, last in ((0, 3), (4, 6), (12, 12), (20, 23)):
            for lo, hi in bounds:
                found = span.fn(first, last, lo, hi, begin, full_begin, min(stop, L), BLOCK)
                start, full_start, full_end, n_partial, n_full = found
                partial = [start + n * BLOCK for n in range(n_partial)]
                partial = [x if x < full_start else x + full_end - full_start for x in partial]
                full = [full_start + n * BLOCK for n in range(n_full)]
                assert len({*partial, *full}) == len(partial) + len(full)
                assert all(begin <= x < stop for x in (*partial, *full))

                def sees(x, y, lo=lo, hi=hi):
                    return (lo is None or x - y >= lo) and (hi is None or x - y <= hi)

                rows = range(first, last + 1)
                reached = range(begin, min(L, stop))
                needed = {x // BLOCK * BLOCK for x in reached if any(sees(x, y) for y in rows)}
                assert needed <= {*partial, *full}, (L, first, last, lo, hi)
                assert all(full_begin <= x and x + BLOCK <= L for x in full)
                assert all(sees(x + n, y) for x in full for n in range(BLOCK) for y in rows)


def test_useless_bounds_are_dropped():
    from fastattn.kernels.softmax.config import useful_band

    assert useful_band(None, 0, 1, 1) == (None, None)
    assert useful_band(-100, 8, 10, 9) == (None, None)
    assert useful_band(-(2**40), 2**40, 5, 5) == (None, None)
    assert useful_band(2**40, -(2**40), 5, 6) == (6, -5)
    assert useful_band(-3, 2, 8, 8) == (-3, 2)


def test_launch_tables():
    """Pure: the same answer twice, for every head dimension, dtype and architecture; stats padding divides into tiles."""
    from fastattn.kernels.common.launch import ARCHS, table_arch
    from fastattn.kernels.softmax.config import STATS_PADDING, pick_backward, pick_forward

    for arch in (0, *ARCHS):
        for dtype in backend.DTYPES:
            for D in (1, 16, 40, 64, 96, 128, 200, 256):
                for extra in (False, True):
                    for Lq in (1, 4096):
                        assert pick_forward(D, 16, dtype, arch, Lq, extra) == pick_forward(
                            16, D, dtype, arch, Lq, extra
                        )
                        planned = pick_forward(D, 16, dtype, arch, Lq, extra, True)
                        assert 64 % planned.BM == 0 and 64 % planned.BN == 0
                    for tile in pick_backward(D, D, dtype, arch, extra):
                        assert STATS_PADDING % tile.BM == 0
                    for tile in pick_backward(D, D, dtype, arch, extra, True):
                        assert 64 % tile.BM == 0 and 64 % tile.BN == 0
    assert [table_arch(*x) for x in ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))] == [80, 86, 90, 100, 100, 86]
