"""Accuracy of linear attention against fp64 by RMS, gates from 1 to e^-50, long sequences, clamped denominators."""

import itertools
from functools import lru_cache

import numpy as np
import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32, FP64, all_backends
from linear_harness import (
    DELTA,
    EPS,
    LEAVES,
    LinearCase,
    attend,
    cast,
    check_inputs,
    compare,
    expect,
    fast_backends,
    make,
    need,
    problem,
)

import fastattn
from fastattn.testing import max_error, randn, rms_ratio

RMS = {FP32: 2e-6, FP16: 8e-4, BF16: 5e-3}
ACCURATE = [
    LinearCase(**{"B": 1, "L": 200, "D": 32, "Dv": 32, "state": True, **options})
    for options in (
        {}, {"decay": "bhl"}, {"decay": "bhld", "feature_map": "identity"}, {"feature_map": "taylor2", "D": 8}, {"feature_map": "taylor1"},
        DELTA, {**DELTA, "decay": "bhl"}, {**DELTA, "decay": "bhld"}, {"causal": False, "Lk": 300, "key_mask": True},
    )
]  # fmt: skip


@fast_backends
@pytest.mark.parametrize("dtype", RMS, ids=("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("case", ACCURATE, ids=str)
def test_rms_against_fp64(case, dtype, backend):
    inputs, (golden, low, _) = problem(case, dtype)
    result = attend(inputs, backend, **case.options())
    for name, found, exact, reference in zip(result._fields, result, golden, low):
        if found is not None:
            assert rms_ratio(found, exact) <= max(RMS[dtype], 1.5 * rms_ratio(reference, exact)), name
    assert rms_ratio(result.out, golden.out) <= RMS[dtype]


GATES = {
    "0": (0.0,), "-1e-4": (-1e-4,), "-5": (-5.0,), "-50": (-50.0,), "-700": (-700.0,), "-1e30": (-1e30,),
    "mixed": (0.0, -1e-4, -5.0, -50.0), "rare": (*(0.0,) * 20, -50.0), "reset": (*(-1e-4,) * 30, -1e4), "masked": (-0.1, -5.0, -0.1, torch.finfo(FP32).min),
}  # fmt: skip


def gated(case, values, dtype=FP32):
    """Inputs whose decay takes `values` in an order that meets every chunk border with every value."""
    inputs = make(case, dtype)
    g = torch.tensor(values, device=DEVICE, dtype=inputs.decay.dtype)
    order = torch.randint(len(values), inputs.decay.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    return inputs._replace(decay=g[order])


@lru_cache(maxsize=256)
def gated_problem(case, values):
    inputs = gated(case, values)
    return inputs, expect(inputs, case)


@fast_backends
@pytest.mark.parametrize("values", GATES.values(), ids=GATES)
@pytest.mark.parametrize("decay", ["bhl", "bhld"])
@pytest.mark.parametrize("options", [{}, {"feature_map": "identity"}, DELTA], ids=("elu1", "identity", "delta"))
def test_gates(options, decay, values, backend):
    """Exponents are differences <= 0: nothing overflows, nothing of a closed gate comes back."""
    case = LinearCase(B=1, L=70, D=8, Dv=4, decay=decay, state=True, **options)
    inputs, expected = gated_problem(case, values)
    result = attend(inputs, backend, **case.options())
    assert all(x is None or x.isfinite().all() for x in result)
    compare(result, expected, FP32)


@fast_backends
@pytest.mark.parametrize("values", [(0.0,), (-1e-4,), (-5.0,), (-50.0,)], ids=str)
def test_constant_gates(values, backend):
    for options in ({}, DELTA):
        case = LinearCase(B=1, L=70, D=8, Dv=4, decay="h", state=True, **options)
        inputs, expected = gated_problem(case, values)
        compare(attend(inputs, backend, **case.options()), expected, FP32)


@all_backends
@pytest.mark.parametrize("options", [{}, DELTA], ids=("elu1", "delta"))
def test_a_gate_of_one_is_no_gate(options, backend):
    case = LinearCase(B=1, L=70, D=8, state=True, **options)
    inputs = make(case, FP32)
    plain = attend(inputs, backend, **case.options())
    for shape in ((2,), (1, 2, 70), (1, 2, 70, 8)):
        result = attend(inputs._replace(decay=torch.zeros(shape, device=DEVICE)), backend, **case.options())
        for name, a, b in zip(plain._fields, plain, result):
            assert a is None or name == "ddecay" or max_error(a, b) <= 1e-5 * max(1.0, float(a.abs().max())), name


@all_backends
def test_equal_gates_of_channels_are_a_scalar_gate(backend):
    for options in ({"feature_map": "identity"}, DELTA):
        case = LinearCase(B=1, L=70, D=8, decay="bhl", state=True, **options)
        inputs = make(case, FP32)
        scalar = attend(inputs, backend, **case.options())
        vector = attend(inputs._replace(decay=inputs.decay[..., None].expand(1, 2, 70, 8)), backend, **case.options())
        for name, a, b in zip(scalar._fields, scalar, vector):
            b = b.sum(-1) if name == "ddecay" else b
            assert a is None or max_error(a, b) <= 2e-5 * max(1.0, float(a.abs().max())), name


LONG = {"B": 1, "Hq": 1, "Hk": 1, "Hv": 1, "D": 8, "Dv": 4, "chunk_size": 64}
SLOW, MIXED, BURSTS = (-1e-4,), (0.0, -1e-4, -5.0, -50.0), (*(-1e-4,) * 500, -5.0)


@lru_cache(maxsize=8)
def long_problem(case, values):
    inputs = gated(case, values)
    return inputs, attend(cast(inputs, FP64), "eager", **case.options())


@fast_backends
@pytest.mark.parametrize(
    "options, values",
    [
        ({"decay": "bhl"}, SLOW), ({"decay": "bhl"}, MIXED), ({"decay": "bhl", "feature_map": "identity"}, BURSTS),
        ({"decay": "bhld", "feature_map": "identity", "chunk_size": 16}, BURSTS), ({**DELTA, "decay": "bhl"}, SLOW), ({**DELTA, "decay": "bhl"}, MIXED),
    ],
    ids=("elu1-slow", "elu1-mixed", "identity-bursts", "vector-bursts", "delta-slow", "delta-mixed"),
)  # fmt: skip
def test_eight_thousand_tokens(options, values, backend):
    """Against eager in fp64: out, state and every gradient; decay's gradient is a sum over all later tokens."""
    case = LinearCase(**{**LONG, "L": 8192, "state": True, **options})
    inputs, golden = long_problem(case, values)
    result = attend(inputs, backend, **case.options())
    for name, found, exact in zip(result._fields, result, golden):
        assert found is None or rms_ratio(found, exact) <= (2e-5 if name == "ddecay" else 4e-6), name


def recurrence(gate, x):
    """y_t = e^g_t y_{t-1} + x_t, one fp32 rounding after the other."""
    y, ys = np.float32(0), []
    for a, b in zip(np.exp(gate.numpy()), x.numpy()):
        y = a * y + b
        ys.append(y)
    return torch.tensor(np.array(ys))


@fast_backends
@pytest.mark.parametrize("values", ["ones", "noise"])
def test_131072_tokens_in_closed_form(values, backend):
    """k = q = scale = 1: out is e^G cumsum(e^-G v) in fp64. No worse than a recurrence in fp32, nor than the promised ratio."""
    L = 131072
    gate = (
        -1e-4 * torch.rand(L, generator=torch.Generator().manual_seed(1))
        if values == "noise"
        else torch.full((L,), -1e-4)
    )
    v, dout = (torch.ones(L) if values == "ones" else randn((L,), FP32, seed) for seed in (3, 4))
    need(backend, make(LinearCase(), FP32))
    G = gate.double().cumsum(0)
    y = G.exp() * ((-G).exp() * v.double()).cumsum(0)
    dv = (-G).exp() * (G.exp() * dout.double()).flip(0).cumsum(0).flip(0)
    dgate = gate.double().exp() * torch.cat((torch.zeros(1), y[:-1])) * dv
    low = recurrence(gate, v), recurrence(torch.cat((gate[1:], gate[:1])).flip(0), dout.flip(0)).flip(0)
    x = [t.to(DEVICE)[None, None].requires_grad_() for t in (v[:, None], gate)]
    ones = torch.ones(1, 1, L, 1, device=DEVICE)
    options = {"feature_map": "identity", "scale": 1.0, "chunk_size": 256, "backend": backend}
    out, state = fastattn.linear_attention(ones, ones, x[0], decay=x[1], return_state=True, **options)
    found = [out, *torch.autograd.grad(out, x, dout.to(DEVICE)[None, None, :, None])]
    limits = [max(2e-6, 1.5 * rms_ratio(a, b)) for a, b in zip(low, (y, dv))]
    for name, a, b, limit in zip(("out", "dv", "ddecay"), found, (y, dv, dgate), (*limits, sum(limits))):
        assert rms_ratio(a.flatten(), b) <= limit, name
    assert torch.equal(state.kv.flatten(), out[0, 0, -1]) or max_error(state.kv.flatten(), out[0, 0, -1]) < 1e-2
    divided = fastattn.linear_attention(ones, ones, ones, normalize=True, decay=gate.to(DEVICE)[None, None], **options)
    assert max_error(divided, torch.ones_like(divided)) <= 1e-6


@fast_backends
@pytest.mark.parametrize("feature_map", ["identity", "elu1"])
def test_the_promise_at_131072_tokens_without_decay(feature_map, backend):
    """RMS error <= 2e-6 of fp64, out and gradients, however long the sum."""
    tensors = [randn((1, 1, 131072, 8), FP32, seed).to(DEVICE) for seed in range(4)]

    def run(backend, dtype):
        q, k, v, dout = (t.to(dtype).requires_grad_() for t in tensors)
        out = fastattn.linear_attention(q, k, v, feature_map=feature_map, chunk_size=256, backend=backend)
        return [out, *torch.autograd.grad(out, (q, k, v), dout)]

    need(backend, make(LinearCase(), FP32))
    for found, exact in zip(run(backend, FP32), run("eager", FP64)):
        assert rms_ratio(found, exact) <= RMS[FP32]


@fast_backends
def test_running_mean_of_131072_tokens(backend):
    """relu(1) keys, one feature: normalised out is the mean of v so far; its gradient the tail of 1 / t."""
    L = 131072
    ones, v = torch.ones(1, 1, L, 1, device=DEVICE), randn((1, 1, L, 2), FP32, 3, DEVICE)
    need(backend, make(LinearCase(feature_map="relu"), FP32), feature_map="relu")
    v.requires_grad_()
    out = fastattn.linear_attention(ones, ones, v, feature_map="relu", chunk_size=256, backend=backend)
    t = torch.arange(1, L + 1, dtype=FP64, device=DEVICE)[:, None]
    mean = v.detach().double().cumsum(2) / t
    assert max_error(out, mean) <= 1e-5
    (dv,) = torch.autograd.grad(out.sum(), v)
    tail = (1 / t).flip(0).cumsum(0).flip(0).expand(1, 1, L, 2)
    assert max_error(dv, tail) <= 1e-5 * float(tail.max())


@all_backends
@pytest.mark.parametrize("name", ["relu", "taylor1", "identity"])
def test_denominators_are_clamped(name, backend):
    """No weight at all, weights that cancel, a negative sum: finite, divided by 1e-6, no gradient through the denominator."""
    case = LinearCase(B=1, Hq=1, Hk=1, Hv=1, L=6, D=2, Dv=3, feature_map=name, normalize=True, scale=1.0)
    inputs = make(case, FP32)
    q = torch.tensor([[-1.0, -1.0], [1, 0], [1, 0], [-1, 0], [0, 1], [-1, -1]], device=DEVICE)[None, None]
    k = torch.tensor([[1.0, 1.0], [-1, 0], [0, -1], [1, 0], [0, -1], [1, 1]], device=DEVICE)[None, None]
    result = check_inputs(inputs._replace(q=q, k=k), case, backend)
    assert all(x is None or x.isfinite().all() for x in result)
    if name == "relu":
        assert not result.out[0, 0, 0].any() and not result.out[0, 0, 5].any()
    if name == "identity":  # q.z = -2, 0 ...: out = q.S / 1e-6
        assert torch.allclose(result.out[0, 0, 0], -2 * inputs.v[0, 0, 0] / EPS, rtol=1e-5)


@all_backends
def test_a_state_without_weight_divides_by_eps(backend):
    """kv without z (a state of 0 keys): out = scale phi(q).kv / eps while nothing else is seen; exactly eps is clamped."""
    case = LinearCase(B=1, Hq=1, Hk=1, Hv=1, L=3, D=2, Dv=2, feature_map="relu", scale=1.0, state=True)
    inputs = make(case, FP32)
    zero = torch.zeros_like(inputs.z)
    inputs = inputs._replace(q=inputs.q.abs(), k=-inputs.k.abs(), z=zero)
    result = check_inputs(inputs, case, backend)
    expected = (inputs.q.double() @ inputs.kv.double()) / EPS
    assert max_error(result.out, expected) <= 1e-5 * float(expected.abs().max())
    assert not result.dk.any() and torch.equal(result.dz, inputs.dz)


@all_backends
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6, 1e12], ids=str)
def test_taylor1_sees_directions_only(size, backend):
    case = LinearCase(feature_map="taylor1", L=20, D=6)
    inputs = make(case, FP32)
    plain = attend(inputs, backend, grad=False, **case.options())
    scaled = inputs._replace(q=inputs.q * size, k=inputs.k * size)
    assert max_error(attend(scaled, backend, grad=False, **case.options()).out, plain.out) < 1e-3 * float(
        plain.out.abs().max()
    )


@all_backends
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
def test_zero_rows(dtype, backend):
    """q, k or v all zero, one token or all: finite everywhere."""
    for name, divided in itertools.product(("identity", "relu", "elu1", "taylor1", "taylor2"), (False, True)):
        if name == "identity" and divided:
            continue  # weights of any sign: denominators near 0 by themselves
        case = LinearCase(B=1, L=9, D=6, feature_map=name, normalize=divided, decay="bhl")
        inputs = make(case, dtype)
        for which in ("q", "k", "v"):
            rows = getattr(inputs, which).clone()
            rows[:, :, 4] = 0
            for x in (rows, torch.zeros_like(rows)):
                result = attend(inputs._replace(**{which: x}), backend, **case.options())
                assert all(t is None or t.isfinite().all() for t in result), (name, divided, which)


@fast_backends
@pytest.mark.parametrize("value", [-12.0, -100.0, -1e4, 80.0, 1e4], ids=str)
def test_elu1_far_from_zero(value, backend):
    """e^-12 keeps its digits, which elu(x) + 1 loses; e^x underflows to 0 and does not overflow where it is not taken."""
    case = LinearCase(L=9, D=4)
    inputs = make(case, FP32)
    for q, k in ((inputs.q + value, inputs.k), (inputs.q, inputs.k + value)):
        result = check_inputs(inputs._replace(q=q, k=k), case, backend)
        assert all(x is None or x.isfinite().all() for x in result)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"feature_map": "taylor1"}, {"feature_map": "taylor2"}, {"decay": "bhl"}, {"feature_map": "identity", "decay": "bhld"},
     DELTA, {**DELTA, "decay": "bhl"}, {**DELTA, "decay": "bhld"}],
    ids=str,
)  # fmt: skip
def test_no_row_reads_a_later_token(options, value, backend):
    """Whatever it holds: padding may be NaN. Eager and triton multiply later tokens by 0."""
    case = LinearCase(L=70, D=8, state=True, **options)
    inputs = make(case, FP32)
    padded = inputs._replace(**{n: getattr(inputs, n).clone() for n in "qkv"})
    for t in padded[:3]:
        t[:, :, 37:] = value
    need(backend, inputs, **case.options())
    expected, found = (attend(x, backend, grad=False, **case.options()).out for x in (inputs, padded))
    assert torch.equal(found[:, :, :37], expected[:, :, :37])


@fast_backends
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("decay", [None, "bhl", "bhld"])
def test_beta_at_its_bounds(decay, beta, backend):
    """0 writes nothing; 1 replaces: reading a key just written gives its value; 2 reflects."""
    case = LinearCase(**DELTA, L=70, D=8, decay=decay, state=True)
    inputs = make(case, FP32)
    inputs = inputs._replace(beta=torch.full_like(inputs.beta, beta))
    result = check_inputs(inputs, case, backend)
    if beta == 0 and decay is None:
        assert max_error(result.kv, inputs.kv) < 1e-6 and not result.dk.any() and not result.dv.any()
    if beta == 1:
        read = attend(inputs._replace(q=inputs.k), backend, grad=False, **case.options(), scale=1.0)
        assert max_error(read.out, inputs.v) < 1e-5
    if beta == 2 and decay is None:
        no_values = inputs._replace(v=torch.zeros_like(inputs.v))
        kept = attend(no_values, backend, grad=False, **case.options()).kv
        assert max_error(kept.norm(dim=-2), inputs.kv.norm(dim=-2)) < 1e-5


@fast_backends
def test_the_same_key_over_and_over(backend):
    """The worst triangle: all k equal, beta 1 (each token replaces the last) and 2 (each reflects)."""
    for beta in (1.0, 2.0):
        case = LinearCase(**DELTA, L=130, D=8, state=True)
        inputs = make(case, FP32)
        inputs = inputs._replace(k=inputs.k[:, :, :1].expand_as(inputs.k), beta=torch.full_like(inputs.beta, beta))
        check_inputs(inputs, case, backend)


@fast_backends
def test_key_of_other_lengths_under_the_delta_rule(backend):
    """|k|^2 beta up to 4 makes a state grow: right while it fits."""
    case = LinearCase(**DELTA, L=12, D=8, state=True)
    inputs = make(case, FP32)
    check_inputs(inputs._replace(k=1.4 * inputs.k), case, backend)


@all_backends
def test_fp16_sums_do_not_overflow_inside(backend):
    """Sums of 3000 products of size 64 pass 65504; divided, they are small again."""
    case = LinearCase(B=1, L=300, D=8, scale=1.0)
    inputs = make(case, FP16)
    inputs = inputs._replace(q=20 * inputs.q.abs(), k=20 * inputs.k.abs(), v=30 * inputs.v)
    result = attend(inputs, backend, **case.options())
    golden = attend(cast(inputs, FP64), "reference", **case.options())
    assert result.out.isfinite().all() and rms_ratio(result.out, golden.out) <= RMS[FP16]


@all_backends
def test_inputs_are_left_as_they_were(backend):
    """The saved inputs of a call are read, never written: leaves are bit for bit what they were."""
    case = LinearCase(**DELTA, L=33, decay="bhl", state=True)
    inputs = make(case, FP32)
    before = [None if t is None else t.clone() for t in inputs]
    attend(inputs, backend, **case.options())
    for name, a, b in zip((*LEAVES, *inputs._fields[7:]), before, inputs):
        assert a is None or torch.equal(a, b), name
