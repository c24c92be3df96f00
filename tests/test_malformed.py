"""Malformed calls raise a Python exception that says what is wrong, and the process survives all of them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from malformed_calls import CALLS

import fastattn

SCRIPT = Path(__file__).parent / "malformed_calls.py"
NATIVE_MISSING = fastattn.backends.native.status()


HAS_DLPACK = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
WAYS = ([], ["--without-dlpack"]) if HAS_DLPACK else ([],)


@pytest.fixture(scope="module", params=WAYS, ids=("as_is", "without_dlpack")[: len(WAYS)])
def outcomes(request):
    """All calls in one process: a crash shows as a missing line, not as a dead test session."""
    command = [sys.executable, str(SCRIPT), *request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return done, {line["name"]: line for line in lines if "name" in line}, lines


def test_the_process_survives(outcomes):
    done, _, lines = outcomes
    last = lines[-1] if lines else None
    assert done.returncode == 0 and last == {"alive": True}, (
        f"died with {done.returncode} in {last}\n{done.stderr[-2000:]}"
    )


def test_there_are_enough():
    assert len(CALLS) >= 60


@pytest.mark.parametrize("name", CALLS)
def test_raises(name, outcomes):
    if NATIVE_MISSING and (name.startswith("c_") or "native" in name):
        pytest.skip(NATIVE_MISSING)
    found = outcomes[1].get(name)
    assert found is not None, f"the process died before or in {name}"
    assert found["error"] is not None, "no exception"
    assert found["message"], found["error"]
    assert re.search(CALLS[name][0], found["message"], re.DOTALL), f"{found['error']}: {found['message']}"
    if name.startswith(("public", "explain")):
        assert found["error"] in ("TypeError", "ValueError", "UnsupportedError"), found
    if name.startswith("dropin_type"):
        assert found["error"] == "TypeError", found
    elif name.startswith("dropin"):
        assert found["error"] in ("RuntimeError", "ValueError"), found
