"""Gradients: subsets of requires_grad, upstream gradients of any stride, lse's own gradient, broadcast bias."""

import itertools

import pytest
import torch
from harness import (
    BF16,
    DEVICE,
    FP32,
    FP64,
    all_backends,
    all_dtypes,
    attend,
    check,
    check_inputs,
    check_seeds,
    need,
    problem,
    why_not,
)

import fastattn
from fastattn.dispatch import BACKENDS
from fastattn.testing import Case, cast, make, max_error, relayout

FULL = Case(Hk=2, Lq=40, Lk=70, D=24, Dv=16, causal=True, mask="b11k", bias="1h1k")


@all_backends
@pytest.mark.parametrize(
    "wanted", itertools.product((False, True), repeat=4), ids=lambda w: "".join("01"[x] for x in w)
)
def test_every_subset_of_requires_grad(wanted, backend):
    """Only what is asked for, bit for bit what the full backward gives (only bias: torch reads a null lse, #148476)."""
    inputs, _ = problem(FULL, FP32)
    need(backend, inputs, **FULL.options())
    full = attend(inputs, backend, **FULL.options())
    leaves = [x.detach().requires_grad_(w) for x, w in zip((inputs.q, inputs.k, inputs.v, inputs.bias), wanted)]
    out, lse = fastattn.attention(
        *leaves[:3], mask=inputs.mask, bias=leaves[3], return_lse=True, backend=backend, **FULL.options()
    )
    assert torch.equal(out, full.out) and torch.equal(lse, full.lse)
    assert out.requires_grad == any(wanted)
    if not any(wanted):
        return
    upstream = [(out, inputs.dout)] + ([(lse, inputs.dlse)] if lse.requires_grad else [])
    torch.autograd.backward([y for y, _ in upstream], [dy for _, dy in upstream])
    for leaf, want, name in zip(leaves, wanted, ("dq", "dk", "dv", "dbias")):
        assert (leaf.grad is not None) == want, name
        if want:
            assert max_error(leaf.grad, getattr(full, name)) <= (1e-5 if backend == "reference" else 0.0), name


@all_backends
@all_dtypes
def test_gradient_of_lse_alone(dtype, backend):
    """d lse / d z = P: no term of out, dv exactly 0."""
    case = Case(Hk=2, causal=True, bias="1hqk")
    inputs = make(case, dtype, device=DEVICE)
    inputs = inputs._replace(dout=torch.zeros_like(inputs.dout))
    result = check_inputs(inputs, case, backend)
    assert not result.dv.any()


@all_backends
def test_backward_through_lse_only(backend):
    """out unused: its cotangent is absent, not zeros."""
    case = Case(Hk=1, window=(9, 9))
    inputs = make(case, FP32, device=DEVICE)
    need(backend, inputs, **case.options())
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    _, lse = fastattn.attention(q, k, v, return_lse=True, backend=backend, **case.options())
    dq, dk = torch.autograd.grad(lse, (q, k), inputs.dlse)
    expected = attend(inputs._replace(dout=torch.zeros_like(inputs.dout)), backend, **case.options())
    assert max_error(dq, expected.dq) < 1e-6 and max_error(dk, expected.dk) < 1e-6


@all_backends
def test_backward_without_return_lse(backend):
    inputs = make(Case(Hk=2), FP32, device=DEVICE)
    need(backend, inputs)
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    grads = torch.autograd.grad(fastattn.attention(q, k, v, backend=backend), (q, k, v), inputs.dout)
    expected = attend(inputs._replace(dlse=torch.zeros_like(inputs.dlse)), backend)
    for name, grad in zip(("dq", "dk", "dv"), grads):
        assert max_error(grad, getattr(expected, name)) < 1e-6, name


@all_backends
@pytest.mark.parametrize("layout", ["contiguous", "blhd", "lbhd", "bhdl", "last_strided", "sliced", "expanded"])
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
def test_upstream_gradient_of_any_stride(layout, dtype, backend):
    case = Case(B=2, Hk=2, D=32, Dv=24)
    inputs = make(case, dtype, device=DEVICE)
    dlse = relayout(inputs.dlse[..., None], layout)[..., 0]
    check_inputs(inputs._replace(dout=relayout(inputs.dout, layout), dlse=dlse), case, backend)


@all_backends
def test_sum_backward_is_stride_zero(backend):
    """out.sum().backward() hands down an expanded scalar."""
    inputs = make(Case(Hk=2), FP32, device=DEVICE)
    need(backend, inputs)
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    fastattn.attention(q, k, v, backend=backend).sum().backward()
    ones = inputs._replace(dout=torch.ones_like(inputs.dout), dlse=torch.zeros_like(inputs.dlse))
    expected = attend(ones, backend)
    for x, name in ((q, "dq"), (k, "dk"), (v, "dv")):
        assert max_error(x.grad, getattr(expected, name)) < 1e-5, name


@all_backends
def test_gradients_are_linear_in_the_upstream_gradient(backend):
    case = Case(Hk=2, causal=True, bias="qk")
    inputs = make(case, FP32, device=DEVICE)
    need(backend, inputs, **case.options())
    once = attend(inputs, backend, **case.options())
    scaled = attend(inputs._replace(dout=-4 * inputs.dout, dlse=-4 * inputs.dlse), backend, **case.options())
    for name in ("dq", "dk", "dv", "dbias"):
        assert max_error(getattr(scaled, name), -4 * getattr(once, name)) < 1e-4, name
        assert getattr(once, name).abs().max() > 1e-3


BIAS_SHAPES = [
    "bhqk",
    "1hqk",
    "b1qk",
    "11qk",
    "hqk",
    "qk",
    "k",
    "1k",
    "q1",
    "b11k",
    "1h1k",
    "1h11",
    "bh1k",
    "bhq1",
    "b111",
    "1111",
    "1",
]


@all_backends
@pytest.mark.parametrize("shape", BIAS_SHAPES)
def test_bias_gradient_in_its_own_shape(shape, backend):
    """Reduced over the broadcast dimensions, in bias's shape and dtype."""
    for dtype, fp32_bias in ((FP32, False), (BF16, False), (BF16, True)):
        case = Case(B=3, Hk=2, Lq=35, Lk=66, bias=shape, fp32_bias=fp32_bias, causal=True)
        bias = problem(case, dtype)[0].bias
        result = check_seeds(case, dtype, backend, 8 if bias.numel() < 500 else 1)
        assert result.dbias.shape == bias.shape and result.dbias.dtype == bias.dtype


@all_backends
@pytest.mark.parametrize("layout", ["blhd", "bhdl", "last_strided", "sliced", "expanded"])
def test_bias_of_any_stride(layout, backend):
    case = Case(Hk=2, bias="bhqk")
    inputs = make(case, FP32, device=DEVICE)
    check_inputs(inputs._replace(bias=relayout(inputs.bias, layout)), case, backend)


@all_backends
def test_key_value_gradients_are_summed_over_the_group_in_fp32(backend):
    """64 query heads on one kv head in bf16: a bf16 running sum would lose what one head adds."""
    case = Case(B=1, Hq=64, Hk=1, Lq=16, Lk=24, D=16)
    inputs = make(case, BF16, device=DEVICE)
    need(backend, inputs)
    if backend == "reference":
        pytest.skip("the dense reference sums in the precision of its inputs")
    result = attend(inputs, backend)
    expected = attend(cast(inputs, FP64), "reference")
    for name in ("dk", "dv"):
        golden = getattr(expected, name)
        assert max_error(getattr(result, name), golden) <= 2**-7 * float(golden.abs().max()), name


@all_backends
def test_gradients_by_finite_differences(backend):
    """An oracle that shares no formula: central differences of the fp64 reference along random directions."""
    case = Case(B=1, Hq=2, Hk=1, Lq=6, Lk=9, D=4, Dv=3, causal=True, bias="1hqk", scale=0.8)
    inputs = make(case, FP64, device=DEVICE)
    takes_fp64 = not why_not(backend, inputs, **case.options())
    result = attend(inputs if takes_fp64 else cast(inputs, FP32), backend, **case.options())

    def loss(**changed):
        point = attend(inputs._replace(**changed), "reference", grad=False, **case.options())
        return float((point.out * inputs.dout).sum() + (point.lse * inputs.dlse).sum())

    step = 1e-5
    for name in ("q", "k", "v", "bias"):
        x = getattr(inputs, name)
        for seed in range(3):
            direction = torch.randn(x.shape, dtype=FP64, generator=torch.Generator().manual_seed(seed)).to(x.device)
            slope = (loss(**{name: x + step * direction}) - loss(**{name: x - step * direction})) / (2 * step)
            found = float((getattr(result, "d" + name).double() * direction).sum())
            assert found == pytest.approx(slope, rel=1e-4, abs=1e-5), name


@all_backends
def test_no_grad_and_inference_mode_save_nothing(backend, monkeypatch):
    inputs = make(Case(), FP32, device=DEVICE)
    need(backend, inputs)
    forward, with_parts = BACKENDS[backend].softmax_forward, []
    monkeypatch.setattr(BACKENDS[backend], "softmax_forward", lambda *a: with_parts.append(a[-1]) or forward(*a))
    q = inputs.q.clone().requires_grad_()
    with torch.no_grad():
        assert not fastattn.attention(q, *inputs[1:3], backend=backend).requires_grad
    with torch.inference_mode():
        out = fastattn.attention(q, *inputs[1:3], backend=backend)
    assert torch.equal(out, fastattn.attention(q, *inputs[1:3], backend=backend).detach())
    assert with_parts == ([] if backend == "reference" else [False, False, True])


@all_backends
@pytest.mark.parametrize("window", [(None, 23), (0, 27)], ids=str)
@all_dtypes
def test_rows_beside_a_tile_that_sees_nothing(window, dtype, backend):
    """Rows 60 .. 63 share a register tile with row 66, which sees keys, and the first 64 see none: 0 times what is read there."""
    check(Case(Hq=1, Hk=1, Lq=100, Lk=6, D=8, window=window), dtype, backend)
