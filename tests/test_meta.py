"""Meta tensors: every call gives outputs and gradients of the right shape, dtype and strides, and computes nothing."""

import pytest
import torch
from harness import BF16, FP32
from linear_harness import DELTA, LinearCase, arguments, leaves, make

import fastattn
from fastattn import masks
from fastattn.params import LinearState

backends = pytest.mark.parametrize("backend", ["auto", "eager", "reference"])


def described(tensors):
    return [(tuple(t.shape), t.dtype, t.stride()) for t in tensors]


def on_meta(inputs):
    return type(inputs)(*(None if t is None else t.to("meta") for t in inputs))


def linear(inputs, case, backend):
    """out, the final state and all gradients."""
    x = leaves(inputs)
    out, state = fastattn.linear_attention(*x[:3], **arguments(x), **case.options(), return_state=True, backend=backend)
    results = [out, *(t for t in state if t is not None)]
    wanted = [t for t in x[:7] if t is not None]
    return [*results, *torch.autograd.grad(sum(t.sum() for t in results), wanted)]


@backends
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize(
    "options",
    [{"decay": "bhl", "Hq": 4}, {"feature_map": "taylor2", "D": 4}, {**DELTA, "decay": "bhld"}, {"causal": False, "key_mask": True},
     {"B": 1, "lengths": (4, 0, 5), "decay": "h"}],
    ids=str,
)  # fmt: skip
def test_linear_attention(options, dtype, backend):
    case = LinearCase(**{"L": 9, "state": True, **options})
    if backend == "reference" and case.lengths is not None:
        pytest.skip("plain torch: it reads where sequences end")
    inputs = make(case, dtype, device="cpu")
    found = linear(on_meta(inputs), case, backend)
    assert all(t.is_meta for t in found)
    assert [d[:2] for d in described(found)] == [d[:2] for d in described(linear(inputs, case, backend))]
    q, k, v, *_ = on_meta(inputs)
    with torch.no_grad():
        bare = fastattn.linear_attention(q, k, v, feature_map=case.feature_map, causal=case.causal, backend=backend)
    assert described([bare])[0][:2] == described(found)[0][:2]


@backends
def test_linear_attention_step(backend):
    inputs = on_meta(make(LinearCase(L=1, state=True, decay="bhl", Hq=4), FP32, device="cpu"))
    state = LinearState(inputs.kv, inputs.z)
    out = fastattn.linear_attention_step(*inputs[:3], state, decay=inputs.decay, backend=backend)
    assert out.is_meta and out.shape == (2, 4, 1, 8) and out.dtype == FP32


@pytest.mark.parametrize(
    "name", ["LinearAttention", "TaylorLinearAttention", "Retention", "GatedLinearAttention", "GatedDeltaNet"]
)
def test_layers(name):
    """As when a model is laid out before its weights are loaded."""
    layer = getattr(fastattn.nn, name)(16, 2).to("meta")
    x = torch.empty(2, 5, 16, device="meta")
    out = layer(x)
    out.sum().backward()
    assert out.is_meta and out.shape == x.shape
    assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())


@backends
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"mask": masks.causal()}, {"dropout_p": 0.5}, {"softcap": 5.0}], ids=str
)
def test_softmax_attention(options, backend):
    if backend == "reference" and "mask" in options:
        pytest.skip("plain torch: it reads the plan of the mask")

    def run(device):
        q, k, v = (torch.zeros(2, heads, 9, 8, device=device, requires_grad=True) for heads in (4, 2, 2))
        out, lse = fastattn.attention(q, k, v, return_lse=True, backend=backend, **options)
        with torch.no_grad():
            bare = fastattn.attention(q, k, v, backend=backend, **options)
        return [out, lse, bare, *torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))]

    found = run("meta")
    assert all(t.is_meta for t in found) and described(found) == described(run("cpu"))


def test_the_drop_in():
    q = torch.zeros(2, 4, 9, 8, device="meta", requires_grad=True)
    mask = torch.ones(9, 9, dtype=torch.bool, device="meta")
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask.float()}, {"dropout_p": 0.5}):
        out = fastattn.scaled_dot_product_attention(q, q, q, **options)
        assert out.is_meta and out.shape == q.shape
        assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape
    with pytest.raises(RuntimeError, match="attn_mask must be bool"):
        fastattn.scaled_dot_product_attention(q, q, q, attn_mask=mask.int())
