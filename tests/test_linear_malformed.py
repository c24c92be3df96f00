"""Malformed calls of linear attention raise an exception that says what is wrong, and the process survives all of them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from linear_malformed_calls import CALLS

import fastattn

SCRIPT = Path(__file__).parent / "linear_malformed_calls.py"
X = torch.zeros(1, 1, 4, 8)


@pytest.fixture(scope="module")
def outcomes():
    """All calls in one process: a crash shows as a missing line, not as a dead test session."""
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return done, {line["name"]: line for line in lines if "name" in line}, lines


def test_the_process_survives(outcomes):
    done, _, lines = outcomes
    last = lines[-1] if lines else None
    assert done.returncode == 0 and last == {"alive": True}, (
        f"died with {done.returncode} in {last}\n{done.stderr[-2000:]}"
    )


@pytest.mark.parametrize("name", CALLS)
def test_raises(name, outcomes):
    missing = fastattn.explain_linear(X, X, X, backend="native").rows[0].reasons
    if missing and name.startswith("op_native"):
        pytest.skip(f"native: {'; '.join(missing)}")
    found = outcomes[1].get(name)
    assert found is not None, f"the process died before or in {name}"
    assert found["error"] is not None, "no exception"
    assert found["message"], found["error"]
    assert re.search(CALLS[name][0], found["message"], re.DOTALL), f"{found['error']}: {found['message']}"
    if name.startswith(("public", "explain")):
        assert found["error"] in ("TypeError", "ValueError", "UnsupportedError"), found


@pytest.mark.parametrize("transform", ["compile", "vmap", "fake"])
def test_values_that_cannot_be_seen_are_not_looked_at(transform):
    """Shapes are always checked; values of gates only where that neither breaks a graph nor waits for a device."""
    gate = torch.zeros(1, 1, 4)

    def run(decay):
        return fastattn.linear_attention(X, X, X, decay=decay)

    if transform == "compile":
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert compiled(gate).shape == X.shape
        with pytest.raises(Exception, match="decay"):
            compiled(gate[..., :2])
    elif transform == "vmap":
        assert torch.func.vmap(run)(gate[None]).shape == (1, *X.shape)
    else:
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert run(mode.from_tensor(gate)).shape == X.shape


def test_gates_of_an_empty_call_have_no_values():
    nothing = X[:, :, :0]
    out = fastattn.linear_attention(
        nothing, nothing, nothing, feature_map="identity", decay=torch.zeros(1, 1, 0), beta=torch.zeros(1, 1, 0)
    )
    assert out.shape == nothing.shape


def test_bounds_of_gates_are_inside():
    """0 and the most negative float; beta 0 and 2."""
    lowest = torch.full((1, 1, 4), torch.finfo(torch.float32).min)
    for decay in (lowest, torch.zeros(1, 1, 4)):
        for beta in (0.0, 2.0):
            out = fastattn.linear_attention(
                X, X, X, feature_map="identity", decay=decay, beta=torch.full((1, 1, 4), beta)
            )
            assert not out.any()
