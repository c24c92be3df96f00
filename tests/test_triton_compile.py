"""Offline compilation of the Triton kernels as launched: spills, shared memory, instructions. No GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SHARED_LIMIT = {80: 166912, 86: 101376, 90: 232448, 100: 232448}
PROCESSES = 2


def compiled(script_name: str) -> list[dict]:
    """Rows of a script that compiles, run in fresh processes: here the kernels may be bound to the interpreter."""
    script = Path(__file__).with_name(script_name)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(script), "--slice", str(n), str(PROCESSES)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for n in range(PROCESSES)
    ]  # fmt: skip
    found = []
    for process in running:
        out, error = process.communicate()
        assert process.returncode == 0, error[-4000:]
        found += [json.loads(line) for line in out.splitlines()]
    return found


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Every shipped configuration."""
    return compiled("triton_offline.py")


def select(rows: list[dict], **wanted) -> list[dict]:
    names = (
        "arch", "D", "dtype", "causal", "group", "mask", "bias", "dropout_p", "Lq", "softcap", "slopes", "sinks", "diagonal", "plan",
    )  # fmt: skip
    return [row for row in rows if all(row["case"][names.index(name)] == value for name, value in wanted.items())]


@pytest.mark.slow
def test_every_kernel_compiles(rows):
    assert {row["kernel"] for row in rows} == {"forward", "row_stats", "keys", "queries", "bias"}
    assert {row["case"][0] for row in rows} == set(SHARED_LIMIT)


def test_default_configurations_do_not_spill(rows):
    plain = {
        "group": 1,
        "mask": False,
        "bias": "",
        "dropout_p": 0.0,
        "softcap": 0.0,
        "slopes": False,
        "sinks": False,
        "plan": False,
    }
    spilling = [row for row in select(rows, **plain) if row["spills"]]
    # Triton's fp32 products hold whole rows of both operands in registers; at D = 256 nothing fits.
    spilling = [row for row in spilling if row["case"][1:3] != [256, "float32"]]
    assert not spilling, spilling


def test_optional_features_spill_little(rows):
    """Masks, biases, dropout, GQA, plans and what changes logits: no more than a few cold values."""
    spilling = [row for row in rows if row["spills"] > 256 and row["case"][1:3] != [256, "float32"]]
    assert not spilling, spilling


def test_shared_memory_fits(rows):
    assert not [row for row in rows if row["shared"] > SHARED_LIMIT[row["case"][0]]]


def test_hopper_and_blackwell_use_their_tensor_cores(rows):
    for row in rows:
        arch, D, dtype = row["case"][:3]
        if dtype == "float32" or row["kernel"] not in ("forward", "keys", "queries") or row["tile"][0] == 16:
            continue
        # dK and dV of 64 keys by 256 do not fit the registers: that kernel works on 32 keys with mma.sync.
        if arch == 90 and not (row["kernel"] == "keys" and D == 256) and row["tile"][1] * row["tile"][0] >= 64 * 32:
            assert row["wgmma"], row


def test_fp32_is_not_tf32(rows):
    assert not [row for row in select(rows, dtype="float32") if row["tf32"]]


def test_plans_of_other_lengths_and_contents_are_not_compiled_again():
    script = Path(__file__).with_name("triton_offline.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(script), "--specializations"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, set[str]] = {}
    for line in done.stdout.splitlines():
        kernel, specialization = json.loads(line)
        found.setdefault(kernel, set()).add(specialization)
    for kernel in ("forward_kernel", "keys_kernel", "queries_kernel"):
        assert len(found[kernel]) == 1, kernel
