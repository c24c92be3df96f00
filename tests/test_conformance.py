"""External conformance: torch's own OpInfo samples and module_db through the patched function, per backend."""

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from harness import BF16, FP16, FP32, FP64, all_backends, expect

import fastattn
import fastattn.dropin
from fastattn.testing import (
    GRAD_FACTOR,
    OUT_FACTOR,
    Case,
    Inputs,
    assert_close,
    dropout_mask,
    make,
    max_error,
    next_rng,
)

pytest.importorskip("expecttest", reason="torch's test suite needs expecttest")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

OP = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
SAMPLES = 25
MODULES = (
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "Transformer",
    "MultiheadAttention",
)


def need_dtype(backend, dtype):
    reasons = next(
        r.reasons for r in fastattn.explain(*make(Case(), dtype)[:3], backend=backend).rows if r.backend == backend
    )
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


@lru_cache
def samples(dtype, noncontiguous):
    found = list(OP.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(found) == SAMPLES
    return [sample.noncontiguous() if noncontiguous else sample for sample in found]


def four(x):
    return x if x.dim() == 4 else x[None]


@all_backends
@pytest.mark.parametrize("noncontiguous", [False, True], ids=("contiguous", "noncontiguous"))
@pytest.mark.parametrize("dtype", (FP64, FP32, FP16, BF16), ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("index", range(SAMPLES))
def test_opinfo_sample(index, dtype, noncontiguous, backend):
    """Forward and gradients of one OpInfo sample; dropout ones with our exported keep mask given to aten."""
    need_dtype(backend, dtype)
    sample = samples(dtype, noncontiguous)[index]
    q, k, v = (x.detach().requires_grad_() for x in (sample.input, *sample.args))
    options = dict(sample.kwargs)
    p = options["dropout_p"]
    rng = next_rng()
    with fastattn.patched(backend=backend):
        out = F.scaled_dot_product_attention(q, k, v, **options)
    rank = max(x.dim() for x in (q, k, v))
    B, H = torch.broadcast_shapes(*(four(x).shape[:2] for x in (q, k, v)))
    keep = dropout_mask(rng, p, B, H, q.shape[-2], k.shape[-2]) if p else None

    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wide = [four(x).expand(B, H, *x.shape[-2:]) for x in leaves]
    bias = options.get("attn_mask")
    golden = torch.ops.aten._scaled_dot_product_attention_math(
        *wide, None if bias is None else bias.double(), p, options["is_causal"], keep
    )[0]
    out = out.view_as(golden)
    assert rank == 4 or B == 1
    dout = torch.linspace(-1, 1, golden.numel(), dtype=FP64).view(golden.shape).to(dtype)
    expected = [golden, *torch.autograd.grad(golden, leaves, dout.double())]
    found = [out, *torch.autograd.grad(out, (q, k, v), dout)]

    # Entries up to +-9 make sharp rows: the yardstick is the dense reference on the same sample in the same precision.
    narrow = [x.detach().to(dtype) for x in wide]
    inputs = Inputs(
        *narrow, None, bias, dout, dout.new_zeros((B, H, q.shape[-2]), dtype=torch.promote_types(dtype, FP32))
    )
    case = Case(causal="top_left" if options["is_causal"] else False, dropout_p=p)
    reference = expect(inputs, case, keep)
    assert max_error(reference.golden.out, golden) < 1e-12
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected):
        low, magnitude = (_summed(getattr(x, name), b) for x in (reference.low, reference.magnitude))
        assert a.dtype == dtype
        assert_close(name, a, b, low, magnitude, dtype, OUT_FACTOR if name == "out" else GRAD_FACTOR)


def _summed(x, like):
    """Gradient of the broadcast tensor -> that of the one it was broadcast from."""
    return x.sum_to_size(like.shape) if x.dim() == like.dim() else x.sum_to_size((1, *like.shape))[0]


def run_module(info, sample, training):
    """Output and gradients of the float inputs, from the same parameters and seed each time."""
    torch.manual_seed(0)
    arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
    module = info.module_cls(*arguments, **options).train(training)
    forward = sample.forward_input
    if isinstance(module, torch.nn.MultiheadAttention):
        forward.kwargs["need_weights"] = False  # with weights it does not call scaled_dot_product_attention
    tensors = [x for x in (*forward.args, *forward.kwargs.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
    torch.manual_seed(1)
    outputs = module(*forward.args, **forward.kwargs)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]
    loss = sum(x.nan_to_num().square().sum() for x in outputs)
    grads = torch.autograd.grad(loss, tensors, allow_unused=True) if tensors and loss.requires_grad else []
    return [*outputs, *(g for g in grads if g is not None)]


@all_backends
@pytest.mark.parametrize("name", MODULES)
def test_module_db(name, backend, monkeypatch):
    """Every module input of torch's own module tests, train and eval: patched equals unpatched."""
    need_dtype(backend, FP32)
    calls = []
    inner = fastattn.dropin.attention
    monkeypatch.setattr(fastattn.dropin, "attention", lambda *a, **k: (calls.append(1), inner(*a, **k))[1])
    info = next(m for m in module_db if m.module_cls.__name__ == name)
    compared = 0
    for training in (False, True):
        for sample in info.module_inputs_func(info, device="cpu", dtype=FP32, requires_grad=True, training=training):
            dropout = sample.constructor_input.kwargs.get("dropout", 0.0 if name == "MultiheadAttention" else 0.1)
            plain = run_module(info, sample, training)
            with fastattn.patched(backend=backend):
                found = run_module(info, sample, training)
            assert len(found) == len(plain)
            if training and dropout:
                continue  # same seed, other dropout bits
            compared += 1
            for a, b in zip(found, plain):
                torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5, equal_nan=True)
    print(f"{name}: {compared} inputs compared, {len(calls)} calls")
    assert compared >= 30 and len(calls) >= 60
