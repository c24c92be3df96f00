"""The reference of linear attention against definitions of its own: loops in numpy, weights L x L, a triangular system."""

import itertools
import math

import numpy as np
import pytest
import torch
from harness import FP64
from linear_cases import DECAYS, GROUPED, MAPS, SCALED, VALUES
from linear_harness import (
    DELTA,
    EPS,
    LinearCase,
    constants_of,
    differentiate,
    leaves,
    make,
    reference,
    reference_arguments,
    triangular,
)

from fastattn.reference.linear import quadratic
from fastattn.testing import max_error


def naive(inputs, case):
    """The definition in numpy, one head, one token, one sum at a time: (out, kv, z)."""
    options = constants_of(case)
    D, scale = case.D, options["scale"]

    def phi(x):
        if case.feature_map == "relu":
            return np.where(x > 0, x, 0)
        if case.feature_map == "elu1":
            return np.array([a + 1 if a > 0 else math.exp(a) for a in x])
        if case.feature_map == "taylor1":
            length = math.sqrt(float(x @ x))
            return np.concatenate([[1.0], x / length if length else 0 * x])
        if case.feature_map == "taylor2":
            pairs = [x[i] * x[j] / math.sqrt(2 * D) for i in range(D) for j in range(D)]
            return np.concatenate([[1.0], x / D**0.25, pairs])
        return x

    q, k, v, decay, beta, kv0, z0, key_mask, cu = (None if t is None else t.numpy() for t in inputs[:9])
    B, Hq, Lq, _ = q.shape
    Hk, Hv, Lk, Dv = k.shape[1], v.shape[1], k.shape[2], v.shape[3]
    Hs = max(Hk, Hv)
    H = max(Hq, Hs)
    spans = [(b, 0, Lk) for b in range(B)] if cu is None else [(0, i, j) for i, j in itertools.pairwise(cu.tolist())]
    out = np.full((B, H, Lq, Dv), np.nan)
    kv, z = np.zeros((len(spans), Hs, case.features, Dv)), np.zeros((len(spans), Hs, case.features))

    def read(t, b, readers, S, total):
        for h in readers:
            query = phi(q[b, h // (H // Hq), t])
            out[b, h, t] = scale * query @ S
            if case.normalized:
                out[b, h, t] /= max(scale * query @ total, EPS)

    for n, (b, first, last) in enumerate(spans):
        for s in range(Hs):
            S = np.zeros((case.features, Dv)) if kv0 is None else kv0[n, s].copy()
            total = np.zeros(case.features) if z0 is None else z0[n, s].copy()
            readers = [h for h in range(H) if h // (H // Hs) == s]

            for t in range(first, last):
                key, value = phi(k[b, s // (Hs // Hk), t]), v[b, s // (Hs // Hv), t]
                if key_mask is not None and not key_mask[b, t]:
                    continue
                if decay is not None:
                    g = decay[s] if decay.ndim == 1 else decay[b, s, t]
                    S = (np.exp(g)[:, None] if np.ndim(g) else math.exp(g)) * S
                    total = np.exp(g) * total
                if beta is None:
                    S = S + np.outer(key, value)
                else:
                    S = (np.eye(D) - beta[b, s, t] * np.outer(key, key)) @ S + beta[b, s, t] * np.outer(key, value)
                total = total + key
                if case.causal:
                    read(t, b, readers, S, total)
            if not case.causal:
                for t in range(first, last) if cu is not None else range(Lq):
                    read(t, b, readers, S, total)
            kv[n, s], z[n, s] = S, total
    return out, kv, z


@pytest.mark.parametrize("case", VALUES + GROUPED + SCALED, ids=str)
def test_reference_is_the_definition(case):
    inputs = make(case, FP64, device="cpu")
    found = reference(inputs, case)
    for name, a, b in zip(("out", "kv", "z"), found, naive(inputs, case)):
        assert a is None or max_error(a, torch.from_numpy(b)) < 1e-11, name


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("name", MAPS)
def test_recurrence_is_the_sum_over_weights(name, decay, divided):
    """The second oracle: out from its L x L weights, and its gradients by autograd."""
    if decay == "bhld" and name.startswith("taylor"):
        pytest.skip("no decay per channel with a taylor map")
    case = LinearCase(feature_map=name, decay=decay, normalize=divided, L=23, D=6)
    inputs = make(case, FP64, device="cpu")
    if name == "identity" and divided:
        inputs = inputs._replace(q=inputs.q.abs(), k=inputs.k.abs())
    inputs = inputs._replace(dkv=0 * inputs.dkv, dz=None if inputs.dz is None else 0 * inputs.dz)
    found = reference(inputs, case)
    x = [None if t is None else t.clone().requires_grad_() for t in inputs[:4]]
    tensors = [
        reference_arguments(inputs._replace(q=x[0], k=x[1], v=x[2], decay=x[3]))[n] for n in ("q", "k", "v", "decay")
    ]
    constants = {key: value for key, value in constants_of(case).items() if key != "causal"}
    out = quadratic(*tensors, normalize=divided, **constants)
    grads = torch.autograd.grad(out, [t for t in x if t is not None], inputs.dout)
    for name, a, b in zip(("out", "dq", "dk", "dv", "ddecay"), (found.out, *found[3:7]), (out, *grads)):
        assert max_error(a, b) < 1e-11 * max(1.0, float(b.detach().abs().max())), name


@pytest.mark.parametrize("heads", [(2, 2, 2), (4, 1, 2)], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_delta_rule_is_a_triangular_system(decay, heads):
    """Values of all tokens solved for at once; out, state and gradients."""
    case = LinearCase(**DELTA, **dict(zip(("Hq", "Hk", "Hv"), heads)), decay=decay, state=True, L=19, D=6)
    x = leaves(make(case, FP64, device="cpu"))
    found, expected = reference(x, case), differentiate(*triangular(x, case), None, x)
    for name, a, b in zip(found._fields, found, expected):
        assert a is None or max_error(a, b) < 1e-11 * max(1.0, float(b.abs().max())), name
