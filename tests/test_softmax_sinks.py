"""Sinks at the edges: logits as large as fp32 allows, sinks of -inf, no keys at all."""

import math

import pytest
import torch
from harness import BACKENDS

import fastattn


@pytest.mark.parametrize("backend", [b for b in ("native", "eager") if b in BACKENDS])
@pytest.mark.parametrize("logit", (2.0, 1e5, 1e8, 1e28))
def test_gradient_of_a_sink_at_large_logits(logit, backend):
    """One key whose logit is the sink: P is one half, which lse alone cannot tell from 1e5 on."""
    root = 2.0 ** round(math.log2(logit) / 2)
    q, k = (torch.zeros(1, 1, 1, 8).index_fill_(3, torch.tensor([0]), root) for _ in range(2))
    v, sink = torch.ones(1, 1, 1, 8), torch.tensor([root * root], requires_grad=True)
    out = fastattn.attention(q, k, v, sinks=sink, scale=1.0, backend=backend)
    assert torch.allclose(out, torch.full_like(out, 0.5))
    assert float(torch.autograd.grad(out.sum(), sink)[0]) == pytest.approx(-2.0, rel=1e-5)


def test_a_sink_of_minus_infinity_is_no_sink():
    q, k = torch.zeros(1, 1, 600, 8), torch.zeros(1, 1, 2, 8)
    for backend in BACKENDS:
        lse = fastattn.attention(
            q, k, k, causal=True, sinks=torch.tensor([-torch.inf]), return_lse=True, backend=backend
        )[1]
        assert (lse[0, 0, :598] == -torch.inf).all(), backend


def test_double_backward_of_sinks_without_keys():
    q, k = torch.zeros(1, 2, 3, 4, dtype=torch.float64), torch.zeros(1, 2, 0, 4, dtype=torch.float64)
    sinks, dlse = torch.zeros(2, dtype=torch.float64, requires_grad=True), torch.ones(1, 2, 3, requires_grad=True)
    for backend in ("eager", "reference"):
        lse = fastattn.attention(q, k, k, sinks=sinks, return_lse=True, backend=backend)[1]
        dsinks = torch.autograd.grad(lse, sinks, dlse.double(), create_graph=True)[0]
        assert (torch.autograd.grad(dsinks.sum(), dlse)[0] == 1).all(), backend
