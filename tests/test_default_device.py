"""CPU calls under torch.set_default_device: "meta" stands in for "cuda", and holds no data that could go unnoticed."""

import json

import pytest
import torch
from harness import FP32, all_backends, need

import fastattn
from fastattn import masks
from fastattn.testing import Case, make

q, k, v = make(Case(B=1, Hq=2, Hk=2, Lq=64, Lk=64, D=16), FP32)[:3]
CAUSAL = torch.ones(64, 64, dtype=torch.bool).tril()
DECAY, BETA, STATE = -torch.rand(1, 2, 64), torch.rand(1, 2, 64), fastattn.LinearState.zeros(1, 2, 16, 16)
PACKED = torch.tensor([0, 30, 64], dtype=torch.int32)
SLOPES = torch.rand(2)


@pytest.fixture
def default_device():
    yield torch.set_default_device
    torch.set_default_device(None)


def results(function, *tensors):
    out = function(*tensors)
    leaves = [t.clone().requires_grad_() for t in tensors]
    return [out, *torch.autograd.grad(function(*leaves), leaves, torch.ones_like(out))]


SOFTMAX = {
    "plain": {},
    "window": {"window": (3, 3)},
    "mask": {"mask": CAUSAL},
    "mask object": {"mask": masks.causal() & masks.documents([0] * 20 + [1] * 44)},
    "slopes and sinks": {"alibi_slopes": SLOPES, "sinks": SLOPES},
    "packed": {"cu_seqlens_q": PACKED, "causal": True, "alibi_slopes": SLOPES},
    "dropout": {"dropout_p": 1.0},
}
LINEAR = {
    "plain": {},
    "decay": {"decay": DECAY},
    "delta rule": {"beta": BETA, "decay": DECAY, "feature_map": "identity"},
    "taylor2": {"feature_map": "taylor2"},
    "state": {"initial_state": STATE},
    "key mask": {"causal": False, "key_mask": torch.ones(1, 64, dtype=torch.bool)},
    "packed": {"cu_seqlens": PACKED},
}


@all_backends
@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax(name, backend, default_device):
    need(backend, make(Case(), FP32))
    expected = results(lambda *x: fastattn.attention(*x, **SOFTMAX[name], backend=backend), q, k, v)
    default_device("meta")
    found = results(lambda *x: fastattn.attention(*x, **SOFTMAX[name], backend=backend), q, k, v)
    torch.testing.assert_close(found, expected)


@all_backends
@pytest.mark.parametrize("name", LINEAR)
def test_linear(name, backend, default_device):
    need(backend, make(Case(), FP32))
    expected = results(lambda *x: fastattn.linear_attention(*x, **LINEAR[name], backend=backend), q, k, v)
    default_device("meta")
    found = results(lambda *x: fastattn.linear_attention(*x, **LINEAR[name], backend=backend), q, k, v)
    torch.testing.assert_close(found, expected)
    one = [x[:, :, :1] for x in (q, k, v)]
    state = fastattn.LinearState.zeros(1, 2, 16, 16, device="cpu")
    assert fastattn.linear_attention_step(*one, state, backend=backend).is_cpu


MASKS = {
    "full": masks.full,
    "prefix": lambda: masks.prefix([3]),
    "documents": lambda: masks.documents([0] * 30 + [1] * 34),
    "global_tokens": lambda: masks.global_tokens([0, 5]),
    "dilated": lambda: masks.dilated(2, 8),
    "strided": lambda: masks.strided(4),
    "blocks": lambda: masks.blocks([[True, False], [True, True]], 32),
    "bigbird": lambda: masks.bigbird(16, 1, 1, 1),
    "longformer": lambda: masks.longformer(8, [0]),
    "neighborhood": lambda: masks.neighborhood((8, 8), 3),
    "key_padding": lambda: masks.key_padding([50]),
    "tree": lambda: masks.tree([-1] + [0] * 63),
    "dense": lambda: masks.dense(CAUSAL),
    "from_dense": lambda: masks.from_dense(CAUSAL)[0],
    "combined": lambda: ~masks.causal() & masks.window(3, 3) | masks.prefix(2),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, default_device):
    default_device("meta")
    mask = MASKS[name]()
    dense, density = mask.to_dense(64, 64), mask.density(64, 64)
    assert dense.is_cpu and density == dense.sum().item() / dense.numel()
    assert masks.from_dict(json.loads(json.dumps(mask.to_dict()))) == mask
    assert mask.plan(64, 64).rows.is_cpu and len(mask.picture(64, 64).splitlines()) == 64
    found = [fastattn.attention(q, k, v, mask=mask, backend=backend) for backend in ("auto", "eager", "reference")]
    expected = fastattn.attention(q, k, v, mask=dense, backend="reference")
    for out in found:
        torch.testing.assert_close(out, expected)
