"""Gradients of linear attention: gradcheck, subsets of requires_grad, upstream gradients of any stride, states."""

import itertools

import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32, FP64, all_backends
from linear_harness import (
    DELTA,
    LEAVES,
    LinearCase,
    arguments,
    attend,
    call,
    cast,
    check_inputs,
    fast_backends,
    leaves,
    make,
    need,
    problem,
)

import fastattn
from fastattn.dispatch import BACKENDS
from fastattn.params import LinearState
from fastattn.reference.linear import features
from fastattn.testing import LAYOUTS, max_error, relayout

TINY = {"B": 1, "Hq": 2, "Hk": 1, "Hv": 2, "L": 4, "D": 3, "Dv": 2}
VARIANTS = [
    LinearCase(**{**TINY, **options}, state=state)
    for options, state in (
        ({"feature_map": "identity"}, False), ({"feature_map": "relu", "decay": "bhl"}, True), ({"decay": "h"}, True),
        ({"decay": "bhld"}, True), ({"feature_map": "identity", "decay": "bhld"}, True), ({"normalize": False}, False),
        ({"feature_map": "taylor1", "decay": "bhl"}, True), ({"feature_map": "taylor2", "D": 2}, True),
        ({"feature_map": "taylor2", "D": 2, "normalize": False, "decay": "h"}, True),
        ({"feature_map": "taylor1", "normalize": False}, False),
        (DELTA, False), ({**DELTA, "decay": "h"}, True), ({**DELTA, "decay": "bhl"}, True), ({**DELTA, "decay": "bhld"}, True),
        ({"causal": False, "Lk": 6, "key_mask": True}, True), ({"causal": False, "feature_map": "taylor1"}, True),
        ({"causal": False, "feature_map": "identity", "Lk": 2}, False), ({"lengths": (2, 0, 3), "decay": "bhl"}, True),
        ({"lengths": (2, 0, 3), **DELTA}, True), ({"lengths": (3, 1), "causal": False}, True),
    )
]  # fmt: skip


def as_function(inputs, case, backend):
    """(function, leaves): out and final state as a function of every tensor there is."""
    names = [name for name, x in zip(LEAVES, inputs) if x is not None]

    def function(*tensors):
        out, (kv, z) = call(inputs._replace(**dict(zip(names, tensors))), backend, **case.options())
        return (out, kv) if z is None else (out, kv, z)

    return function, [getattr(inputs, name).clone().requires_grad_() for name in names]


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_gradcheck(case, backend):
    """relu has a corner and taylor1 a pole at 0: no input is near."""
    inputs = make(case, FP64)
    inputs = inputs._replace(q=inputs.q + 0.1 * inputs.q.sign(), k=inputs.k + 0.1 * inputs.k.sign())
    function, tensors = as_function(inputs, case, backend)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=case.features > 6 or case.lengths is not None)


@pytest.mark.parametrize("options", [{"decay": "bhl"}, {"decay": "bhld"}, {**DELTA, "decay": "bhl"}, DELTA], ids=str)
def test_gradcheck_across_chunks(options):
    case = LinearCase(**{**TINY, "L": 35}, state=True, chunk_size=16, **options)
    function, tensors = as_function(make(case, FP64), case, "eager")
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("case", [VARIANTS[2], VARIANTS[6], VARIANTS[12], VARIANTS[14]], ids=str)
def test_second_derivative_of_the_reference(case):
    inputs = make(case, FP64)
    function, tensors = as_function(inputs, case, "reference")
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


SUBSETS = [
    (LinearCase(L=20, D=8, state=True, decay="bhl"), ("q", "k", "v", "decay", "kv", "z")),
    (LinearCase(L=20, D=8, state=True, decay="bhl", **DELTA), ("q", "k", "v", "decay", "beta", "kv")),
]


@all_backends
@pytest.mark.parametrize(
    "wanted", list(itertools.product((False, True), repeat=6)), ids=lambda w: "".join("01"[x] for x in w)
)
def test_every_subset_of_requires_grad(wanted, backend):
    """Only what is asked for, bit for bit what the full backward gives."""
    for case, names in SUBSETS:
        inputs, _ = problem(case, FP32)
        need(backend, inputs, **case.options())
        full = attend(inputs, backend, **case.options())
        x = inputs._replace(**{n: getattr(inputs, n).detach().requires_grad_(w) for n, w in zip(names, wanted)})
        out, (kv, z) = call(x, backend, **case.options())
        assert torch.equal(out, full.out) and torch.equal(kv, full.kv)
        assert out.requires_grad == any(wanted)
        pairs = [(y, dy) for y, dy in ((out, x.dout), (kv, x.dkv), (z, x.dz)) if y is not None and y.requires_grad]
        if pairs:
            torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
        for name, want in zip(names, wanted):
            grad, expected = getattr(x, name).grad, getattr(full, "d" + name)
            assert (grad is not None) == want, name
            limit = 1e-5 * float(expected.abs().max()) if backend == "reference" else 0.0
            assert not want or max_error(grad, expected) <= limit, name


@fast_backends
@pytest.mark.parametrize("part", ["out", "kv", "z"])
@pytest.mark.parametrize(
    "options", [{"decay": "bhl"}, {"decay": "bhld"}, {"causal": False, "Lk": 9}, {**DELTA, "decay": "bhl"}], ids=str
)
def test_backward_through_one_output(options, part, backend):
    """The others' cotangents are absent, not zeros; gradients are those with zeros."""
    case = LinearCase(state=True, L=20, D=8, **options)
    if part == "z" and not case.normalized:
        pytest.skip("no z")
    inputs = make(case, FP32)
    others = [n for n in ("dout", "dkv", "dz") if n != "d" + part and getattr(inputs, n) is not None]
    inputs = inputs._replace(**{n: 0 * getattr(inputs, n) for n in others})
    expected = check_inputs(inputs, case, backend)
    x = leaves(inputs)
    out, (kv, z) = call(x, backend, **case.options())
    y, dy = {"out": (out, x.dout), "kv": (kv, x.dkv), "z": (z, x.dz)}[part]
    wanted = [(n, leaf) for n, leaf in zip(LEAVES, x) if leaf is not None]
    found = torch.autograd.grad(y, [leaf for _, leaf in wanted], dy, materialize_grads=True)
    for (name, _), grad in zip(wanted, found):
        assert max_error(grad, getattr(expected, "d" + name)) <= 1e-5 * max(1.0, float(grad.abs().max())), name


@all_backends
@pytest.mark.parametrize("options", [{"decay": "bhl"}, DELTA, {"causal": False}], ids=str)
def test_without_return_state(options, backend):
    case = LinearCase(state=True, L=20, D=8, **options)
    inputs = make(case, FP32)
    need(backend, inputs, **case.options())
    x = leaves(inputs)
    out = fastattn.linear_attention(*x[:3], **arguments(x), **case.options(), backend=backend)
    wanted = [leaf for leaf in x[:7] if leaf is not None]
    found = torch.autograd.grad(out, wanted, x.dout)
    zeros = inputs._replace(dkv=0 * inputs.dkv, dz=None if inputs.dz is None else 0 * inputs.dz)
    expected = [g for g in attend(zeros, backend, **case.options())[3:] if g is not None]
    for a, b in zip(found, expected, strict=True):
        assert max_error(a, b) <= 1e-5 * max(1.0, float(b.abs().max()))


@fast_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
def test_upstream_gradients_of_any_stride(layout, dtype, backend):
    for options in ({"decay": "bhl"}, DELTA, {"causal": False}):
        case = LinearCase(L=18, D=8, Dv=6, state=True, **options)
        inputs = make(case, dtype)
        dz = None if inputs.dz is None else relayout(inputs.dz[..., None], layout)[..., 0]
        strided = inputs._replace(dout=relayout(inputs.dout, layout), dkv=relayout(inputs.dkv, layout), dz=dz)
        check_inputs(strided, case, backend)


@all_backends
def test_sum_backward_is_stride_zero(backend):
    """out.sum().backward() hands down an expanded scalar."""
    for options in ({}, DELTA):
        case = LinearCase(L=20, D=8, **options)
        inputs = make(case, FP32)
        need(backend, inputs, **case.options())
        x = leaves(inputs)
        out, _ = call(x, backend, **case.options())
        out.sum().backward()
        zeros = {"dkv": 0 * inputs.dkv, "dz": None if inputs.dz is None else 0 * inputs.dz}
        expected = attend(inputs._replace(dout=torch.ones_like(inputs.dout), **zeros), backend, **case.options())
        for name in ("q", "k", "v"):
            assert max_error(getattr(x, name).grad, getattr(expected, "d" + name)) < 1e-5, name


@all_backends
@pytest.mark.parametrize("options", [{"decay": "bhld"}, {**DELTA, "decay": "bhl"}, {"causal": False}], ids=str)
def test_gradients_are_linear_in_the_upstream_gradient(options, backend):
    """A power of two: exact. Catches an upstream gradient that is ignored (fla PR#963)."""
    case = LinearCase(L=20, D=8, state=True, **options)
    inputs = make(case, FP32)
    once = attend(inputs, backend, **case.options())
    scaled = inputs._replace(
        **{n: None if getattr(inputs, n) is None else -4 * getattr(inputs, n) for n in ("dout", "dkv", "dz")}
    )
    four = attend(scaled, backend, **case.options())
    for name, a, b in zip(once._fields[3:], once[3:], four[3:]):
        assert a is None or (torch.equal(-4 * a, b) and float(a.abs().max()) > 1e-3), name


@fast_backends
@pytest.mark.parametrize("options", [{"feature_map": "identity"}, DELTA], ids=str)
def test_gradients_of_shared_heads_are_summed_in_fp32(options, backend):
    """64 heads of q (then of v) on one of k, in bf16: a bf16 running sum would lose what one head adds."""
    for heads in ({"Hq": 64, "Hk": 1, "Hv": 1}, {"Hq": 64, "Hk": 1, "Hv": 64}):
        case = LinearCase(B=1, L=16, D=16, **heads, **options)
        inputs = make(case, BF16)
        result = attend(inputs, backend, **case.options())
        golden = attend(cast(inputs, FP64), "reference", **case.options())
        for name in ("dk", "dv"):
            g = getattr(golden, name)
            assert max_error(getattr(result, name), g) <= 2**-7 * float(g.abs().max()), name


@fast_backends
@pytest.mark.parametrize("case", [c for c in VARIANTS if c.feature_map != "taylor1"], ids=str)
def test_gradients_by_finite_differences(case, backend):
    """An oracle that shares no formula: central differences of the fp64 reference along random directions."""
    exact = cast(make(case, FP32), FP64)
    inputs = cast(exact, FP32)
    result = attend(inputs, backend, **case.options())

    def loss(**changed):
        point = attend(exact._replace(**changed), "reference", grad=False, **case.options())
        total = (point.out * exact.dout).sum() + (point.kv * exact.dkv).sum()
        return float(total if point.z is None else total + (point.z * exact.dz).sum())

    step = 1e-5
    for name in LEAVES:
        x = getattr(exact, name)
        if x is None:
            continue
        direction = torch.randn(x.shape, dtype=FP64, generator=torch.Generator().manual_seed(5)).to(DEVICE)
        if case.feature_map == "relu":
            direction *= x.abs() > 2 * step
        slope = (loss(**{name: x + step * direction}) - loss(**{name: x - step * direction})) / (2 * step)
        found = float((getattr(result, "d" + name).double() * direction).sum())
        assert found == pytest.approx(slope, rel=1e-4, abs=1e-4), name


@fast_backends
@pytest.mark.parametrize("at", [1, 16, 36])
@pytest.mark.parametrize(
    "options",
    [{"decay": "bhl"}, {"feature_map": "identity", "decay": "bhld"}, {"feature_map": "taylor1"}, {"feature_map": "taylor2", "D": 5},
     {"feature_map": "relu", "decay": "h"}, DELTA, {**DELTA, "decay": "bhl"}, {**DELTA, "decay": "bhld"}],
    ids=str,
)  # fmt: skip
def test_a_sequence_in_two_parts_is_the_whole(options, at, backend):
    """The state between them carries values one way and gradients the other."""
    case = LinearCase(**{"D": 8, "L": 37, "state": True, **options})
    inputs, expected = problem(case, FP32)
    need(backend, inputs, **case.options())
    x = leaves(inputs)

    def part(begin, end, state):
        cut = [t if t is None or t.dim() < 3 else t[:, :, begin:end] for t in x[:5]]
        tensors = {n: t for n, t in zip(("decay", "beta"), cut[3:]) if t is not None}
        return fastattn.linear_attention(
            *cut[:3], **tensors, initial_state=state, return_state=True, backend=backend, **case.options()
        )

    first, middle = part(0, at, LinearState(x.kv, x.z))
    second, (kv, z) = part(at, 37, middle)
    out = torch.cat((first, second), 2)
    pairs = [(out, x.dout), (kv, x.dkv)] + ([(z, x.dz)] if z is not None else [])
    wanted = [t for t in x[:7] if t is not None]
    grads = iter(torch.autograd.grad([y for y, _ in pairs], wanted, [dy for _, dy in pairs]))
    found = [out, kv, z, *(None if t is None else next(grads) for t in x[:7])]
    for name, a, golden, low in zip(expected.golden._fields, found, expected.golden, expected.low):
        if a is not None:
            limit = 4 * max_error(low, golden) + 2e-6 * max(1.0, float(golden.abs().max()))
            assert max_error(a, golden) <= limit, name


@all_backends
def test_no_grad_and_inference_mode_keep_nothing(backend, monkeypatch):
    case = LinearCase()
    inputs = make(case, FP32)
    need(backend, inputs)
    forward, with_saved = BACKENDS[backend].linear_forward, []
    monkeypatch.setattr(BACKENDS[backend], "linear_forward", lambda *a: with_saved.append(a[-1]) or forward(*a))
    q = inputs.q.clone().requires_grad_()
    with torch.no_grad():
        assert not fastattn.linear_attention(q, *inputs[1:3], backend=backend).requires_grad
    with torch.inference_mode():
        out, state = fastattn.linear_attention(q, *inputs[1:3], return_state=True, backend=backend)
    assert not out.requires_grad and not state.kv.requires_grad
    assert torch.equal(out, fastattn.linear_attention(q, *inputs[1:3], backend=backend).detach())
    assert with_saved == ([] if backend == "reference" else [False, False, True])


@all_backends
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=("float32", "bfloat16", "float16"))
def test_masked_keys_get_no_gradient_and_leak_nothing(dtype, backend):
    """NaN and infinities in masked keys and values: out, state and all gradients as with zeros there; theirs are 0."""
    for name in ("identity", "relu", "elu1", "taylor1", "taylor2"):
        case = LinearCase(causal=False, key_mask=True, Lk=45, D=6, feature_map=name, state=True)
        inputs = make(case, dtype)
        hidden = ~inputs.key_mask[:, None, :, None]
        bad = torch.tensor([float("nan"), float("inf"), -float("inf")], device=DEVICE, dtype=dtype).repeat(15)[:, None]
        poisoned = inputs._replace(k=torch.where(hidden, bad, inputs.k), v=torch.where(hidden, bad, inputs.v))
        clean = inputs._replace(k=inputs.k.masked_fill(hidden, 0), v=inputs.v.masked_fill(hidden, 0))
        found, expected = (attend(x, backend, **case.options()) for x in (poisoned, clean))
        for field, a, b in zip(found._fields, found, expected):
            assert a is None or torch.equal(a, b), (name, field)
        assert not (found.dk * hidden).any() and not (found.dv * hidden).any()


@all_backends
def test_gradient_of_a_zero_row(backend):
    """taylor1 of a zero row is [1, 0 .. 0]: finite, and no gradient flows to it."""
    case = LinearCase(feature_map="taylor1", L=20, D=6, decay="bhl", state=True)
    inputs = make(case, FP32)
    q, k = inputs.q.clone(), inputs.k.clone()
    q[:, :, 3], k[:, :, 5], k[:, :, 0] = 0, 0, 0
    result = check_inputs(inputs._replace(q=q, k=k), case, backend)
    assert not result.dq[:, :, 3].any() and not result.dk[:, :, 5].any() and not result.dk[:, :, 0].any()
    zeros = features(torch.zeros(4), "taylor1")
    assert torch.equal(zeros, torch.tensor([1.0, 0, 0, 0, 0]))
