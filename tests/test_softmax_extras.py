"""Softcap, ALiBi and attention sinks: alone, in pairs and with every other option, forward and all gradients."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from harness import (
    BF16,
    DEVICE,
    DIFFERENTIABLE,
    FP32,
    FP64,
    all_backends,
    all_dtypes,
    assert_equal,
    attend,
    check,
    check_inputs,
    check_seeds,
    compare,
    expect,
    need,
    problem,
    textbook,
)

import fastattn
from fastattn.ops.softmax_autograd import attend as attend_tensors
from fastattn.params import SoftmaxParams, SoftmaxTensors
from fastattn.reference.softmax import softmax
from fastattn.testing import Case, cast, dropout_mask, make, max_error, next_rng

EXTRAS = [{"softcap": 0.9}, {"alibi": "h"}, {"alibi": "bh"}, {"sinks": True}]
PARTNERS = [
    {},
    {"bias": "1hqk"},
    {"mask": "bhqk"},
    {"Hk": 2},
    {"causal": "top_left"},
    {"causal": "bottom_right"},
    {"window": (9, 3)},
    {"D": 24, "Dv": 8},
    {"scale": -0.4},
]
TOGETHER = [
    {"softcap": 2.0, "alibi": "h"},
    {"softcap": 2.0, "sinks": True},
    {"alibi": "bh", "sinks": True},
    {"softcap": 1.5, "alibi": "bh", "sinks": True, "mask": "1h1k", "bias": "b1q1", "Hk": 1, "Lq": 130, "Lk": 150},
    {"softcap": 1.5, "alibi": "h", "sinks": True, "causal": True, "bias": "1h1k", "Hk": 2, "Lq": 150, "Lk": 70},
]
CASES = [Case(**extra, **partner) for extra, partner in itertools.product(EXTRAS, PARTNERS)]
CASES += [Case(**fields) for fields in TOGETHER]
RICH = Case(softcap=1.5, alibi="bh", sinks=True, bias="1h1k", mask="b11k", causal=True, Hk=2, Lq=40, Lk=70, D=24, Dv=16)


@all_backends
@all_dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_extra_with_every_option(case, dtype, backend):
    check(case, dtype, backend)


@all_backends
@all_dtypes
@pytest.mark.parametrize("extra", EXTRAS + TOGETHER, ids=str)
def test_extra_with_dropout(extra, dtype, backend):
    case = Case(dropout_p=0.3, **extra)
    inputs = make(case, dtype, device=DEVICE)
    keep = dropout_mask(next_rng(DEVICE), case.dropout_p, case.B, case.Hq, case.Lq, case.Lk)
    check_inputs(inputs, case, backend, keep)


DECODE = [
    Case(B=1, Hq=8, Hk=2, Lq=1, Lk=1100, D=32),
    Case(B=2, Hq=2, Hk=2, Lq=1, Lk=1100, D=64, causal=True),
    Case(B=1, Hq=8, Hk=1, Lq=3, Lk=1300, D=40, Dv=24, causal=True, bias="1h1k", mask="b11k"),
]


@all_backends
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("shape", DECODE, ids=str)
@pytest.mark.parametrize("extra", EXTRAS + [{"softcap": 2.0, "alibi": "bh", "sinks": True}], ids=str)
def test_extra_with_few_queries(extra, shape, dtype, backend):
    """Split keys, a sink counted once; without a gradient the scores come from unpacked keys."""
    case = replace(shape, **extra)
    check_seeds(case, dtype, backend, 4 if case.alibi else 1)
    inputs, expected = problem(case, dtype)
    compare(attend(inputs, backend, grad=False, **case.options()), expected, dtype)


@all_backends
@pytest.mark.parametrize("case", [CASES[0], *CASES[-5:]], ids=str)
def test_extra_in_fp64(case, backend):
    check(case, FP64, backend)


def scalar_attention(x: SoftmaxTensors, keep, scale, band, softcap, p):
    """(out, lse) by the definition, one number at a time."""
    B, Hq, Lq, _ = x.q.shape
    Lk, Dv, group = x.k.shape[2], x.v.shape[3], Hq // x.k.shape[1]
    out, lse = torch.zeros(B, Hq, Lq, Dv, dtype=FP64), torch.zeros(B, Hq, Lq, dtype=FP64)
    for b, h, i in itertools.product(range(B), range(Hq), range(Lq)):
        weights = {}
        for j in range(Lk):
            if band[0] <= j - i <= band[1] and bool(x.mask[b, 0, i, j]):
                z = scale * sum(float(a) * float(c) for a, c in zip(x.q[b, h, i], x.k[b, h // group, j]))
                z = softcap * math.tanh(z / softcap) + float(x.bias[0, h, i, j])
                zero = Lk - Lq if x.diagonal is None else int(x.diagonal[i])
                weights[j] = math.exp(z - float(x.slopes[b % len(x.slopes), h]) * abs(i + zero - j))
        total = sum(weights.values()) + (0 if x.sinks is None else math.exp(float(x.sinks[h])))
        lse[b, h, i] = math.log(total) if total else -math.inf
        for d in range(Dv):
            terms = (w * float(keep[b, h, i, j]) * float(x.v[b, h // group, j, d]) for j, w in weights.items())
            out[b, h, i, d] = sum(terms) / total / (1 - p) if total else 0.0
    return out, lse


@pytest.mark.parametrize("sinks", (False, True))
@pytest.mark.parametrize(
    "diagonal", (None, torch.tensor([4, -3, 0, 9, 2], dtype=torch.int32)), ids=("ends", "diagonal")
)
@pytest.mark.parametrize("alibi", ("1h", "bh"))
def test_reference_agrees_with_a_loop(alibi, diagonal, sinks):
    inputs = make(Case(Hk=2, Lq=5, Lk=7, D=3, Dv=2, mask="b1qk", bias="1hqk", alibi=alibi, sinks=sinks), FP64)
    keep = torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(3)) < 0.7
    x = SoftmaxTensors(*inputs[:3], inputs.bias, inputs.slopes, inputs.sinks, inputs.mask, diagonal)
    out, lse = softmax(*x[:8], keep, scale=0.7, band=(-2, 4), softcap=0.6, dropout_p=0.3)
    expected = scalar_attention(x, keep, 0.7, (-2, 4), 0.6, 0.3)
    assert max_error(out, expected[0]) < 1e-12 and max_error(lse, expected[1]) < 1e-12


@all_backends
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("shape", [(70, 150), (3, 1300), (1, 600)], ids=str)
def test_diagonal(shape, dtype, backend):
    """Packed sequences count ALiBi's distance from a zero of every row's own."""
    Lq, Lk = shape
    case = Case(Hk=2, Lq=Lq, Lk=Lk, alibi="bh", sinks=True, softcap=2.0)
    inputs = make(case, dtype, device=DEVICE)
    need(backend, inputs, **case.options())
    diagonal = torch.randint(-20, Lk, (Lq,), generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.int32)
    params = SoftmaxParams(0.25, softcap=2.0)
    found = []
    for x, name in ((inputs, backend), (cast(inputs, FP64), "eager")):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (getattr(x, n) for n in DIFFERENTIABLE)]
        out, lse = attend_tensors(SoftmaxTensors(*leaves, None, diagonal), params, name)
        grads = torch.autograd.grad((out, lse), [t for t in leaves if t is not None], (x.dout, x.dlse))
        found.append((out.detach(), lse.detach(), *grads))
        if x is not inputs:
            plain = {"scale": 0.25, "softcap": 2.0}
            dense = softmax(x.q, x.k, x.v, None, x.slopes, x.sinks, None, diagonal, **plain)
            assert max_error(out, dense[0]) < 1e-12 and max_error(lse, dense[1]) < 1e-12
    for actual, golden in zip(*found):
        limit = {FP32: 1e-5, BF16: 2e-2}[dtype] * max(1.0, float(golden.abs().max()))
        assert max_error(actual, golden) < limit


@all_backends
@pytest.mark.parametrize(
    "wanted", list(itertools.product((False, True), repeat=6)), ids=lambda w: "".join("01"[x] for x in w)
)
def test_every_subset_of_requires_grad(wanted, backend):
    """Only what is asked for, bit for bit what the full backward gives."""
    inputs, _ = problem(RICH, FP32)
    need(backend, inputs, **RICH.options())
    full = attend(inputs, backend, **RICH.options())
    x = {name: getattr(inputs, name).detach().requires_grad_(w) for name, w in zip(DIFFERENTIABLE, wanted)}
    out, lse = fastattn.attention(
        x["q"], x["k"], x["v"], mask=inputs.mask, bias=x["bias"], alibi_slopes=x["slopes"], sinks=x["sinks"],
        return_lse=True, backend=backend, **RICH.options(),
    )  # fmt: skip
    assert torch.equal(out, full.out) and torch.equal(lse, full.lse) and out.requires_grad == any(wanted)
    if not any(wanted):
        return
    upstream = [(out, inputs.dout)] + ([(lse, inputs.dlse)] if lse.requires_grad else [])
    torch.autograd.backward([y for y, _ in upstream], [dy for _, dy in upstream])
    for (name, leaf), want in zip(x.items(), wanted):
        assert (leaf.grad is not None) == want, name
        if want:
            limit = 0.0 if backend != "reference" else 1e-5 * max(1.0, float(leaf.grad.abs().max()))
            assert max_error(leaf.grad, getattr(full, "d" + name)) <= limit, name


@all_backends
@pytest.mark.parametrize("sinks", (False, True))
@pytest.mark.parametrize("shape", [(70, 150), (1, 1300), (5, 0)], ids=str)
def test_rows_that_see_nothing(shape, sinks, backend):
    """out 0, lse -inf or the sink, no gradient but the sink's own from lse."""
    Lq, Lk = shape
    case = Case(Hk=2, Lq=Lq, Lk=Lk, alibi="bh", softcap=2.0, sinks=sinks, mask="bhqk")
    inputs = make(case, FP32, device=DEVICE)
    blind = torch.arange(Lq, device=DEVICE) % 3 == 0
    inputs = inputs._replace(mask=inputs.mask & ~blind[:, None])
    result = check_inputs(inputs, case, backend)
    blind = blind if Lk else torch.ones_like(blind)
    lse = inputs.sinks[:, None].expand(case.B, -1, Lq) if sinks else torch.full_like(result.lse, -torch.inf)
    assert not result.out[:, :, blind].any() and not result.dq[:, :, blind].any()
    assert torch.equal(result.lse[:, :, blind], lse[:, :, blind])


@all_backends
@all_dtypes
@pytest.mark.parametrize("sink", (1e4, -1e4, -math.inf))
def test_huge_sinks(sink, dtype, backend):
    """A sink that takes all weight: out 0, lse the sink; one that takes none: as without it."""
    for Lq, Lk in ((40, 70), (1, 1300)):
        inputs = make(Case(Hk=2, Lq=Lq, Lk=Lk), dtype, device=DEVICE)
        huge = inputs._replace(sinks=torch.full((4,), sink, device=DEVICE))
        need(backend, huge)
        result = attend(huge, backend)
        assert all(x is None or x.isfinite().all() for x in result)
        if sink > 0:
            assert not result.out.any() and not result.dq.any() and (result.lse == sink).all()
            assert max_error(result.dsinks, inputs.dlse.sum((0, 2))) < 1e-4
            continue
        plain = attend(inputs, backend)
        assert not result.dsinks.any()
        for name in ("out", "lse", "dq", "dk", "dv"):
            error, size = max_error(getattr(result, name), getattr(plain, name)), getattr(plain, name).abs().max()
            assert error <= {FP32: 2e-6}.get(dtype, 2e-2) * max(1.0, float(size)), name


@all_backends
@all_dtypes
@pytest.mark.parametrize("softcap", (1e-3, 1e6))
def test_softcap_of_any_size(softcap, dtype, backend):
    """A tiny cap makes all weights equal, a huge one changes nothing."""
    case = Case(Hk=2, causal=True, softcap=softcap)
    result = check(case, dtype, backend)
    limits_of_softcap(result, make(case, dtype, device=DEVICE), case, dtype, backend)


@all_dtypes
@pytest.mark.parametrize("softcap", (1e-42, 1e300))
def test_softcap_that_fp32_does_not_hold(softcap, dtype):
    case = Case(Hk=2, causal=True, softcap=softcap)
    inputs = make(case, dtype, device=DEVICE)
    limits_of_softcap(attend(inputs, "native", **case.options()), inputs, case, dtype, "native")


def limits_of_softcap(result, inputs, case, dtype, backend):
    if case.softcap > 1:
        plain = attend(inputs, backend, causal=True)
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert max_error(getattr(result, name), getattr(plain, name)) < {FP32: 1e-5}.get(dtype, 2e-2), name
    else:
        seen = torch.arange(case.Lq, device=DEVICE) + case.Lk - case.Lq + 1
        assert max_error(result.lse, seen.log().expand_as(result.lse)) < 1.1e-3


@all_backends
def test_softcap_is_accurate(backend):
    """One key: lse is the logit itself. Within an ulp or two of c, and of itself where it is small; so its derivative."""
    c = 30.0
    size = torch.logspace(-30, 4, 2000, dtype=FP64)
    x = torch.cat((size, -size, torch.linspace(-60, 60, 2000, dtype=FP64))).float()
    q = x[None, None, :, None].to(DEVICE).requires_grad_()
    one = torch.ones(1, 1, 1, 1, device=DEVICE)
    options = {"scale": 1.0, "softcap": c, "return_lse": True, "backend": backend}
    _, z = fastattn.attention(q, one, one, **options)
    (damp,) = torch.autograd.grad(z.sum(), q)
    y = x.double() / c
    golden, eps = c * y.tanh(), torch.finfo(FP32).eps
    error = (z.detach().flatten().cpu().double() - golden).abs()
    assert (error <= 2 * eps * c).all() and (error <= 4 * eps * golden.abs()).all()
    assert max_error(damp.flatten(), 1 / y.cosh().clamp(max=1e100) ** 2) <= 4 * eps


@all_backends
def test_slopes_and_sinks_of_any_layout_and_dtype(backend):
    """Strided, expanded, in half precision: the gradient comes back in their own dtype and shape."""
    case = Case(B=3, alibi="bh", sinks=True)
    inputs = make(case, FP32, device=DEVICE)
    need(backend, inputs)
    rounded = inputs._replace(slopes=inputs.slopes.bfloat16(), sinks=inputs.sinks.bfloat16())
    golden = attend(rounded._replace(slopes=rounded.slopes.float(), sinks=rounded.sinks.float()), backend)
    result = attend(rounded, backend)
    assert result.dslopes.dtype == result.dsinks.dtype == BF16
    assert torch.equal(result.out, golden.out) and torch.equal(result.dslopes, golden.dslopes.bfloat16())
    strided = inputs._replace(slopes=inputs.slopes.mT.contiguous().mT, sinks=inputs.sinks.repeat_interleave(2)[::2])
    assert_equal(attend(strided, backend), attend(inputs, backend), "strided")
    expanded = inputs._replace(slopes=inputs.slopes[:, :1].expand(3, 4))
    assert_equal(
        attend(expanded, backend), attend(inputs._replace(slopes=expanded.slopes.contiguous()), backend), "expanded"
    )


@all_backends
@pytest.mark.parametrize("dims", [{"B": 0}, {"Lq": 0}, {"Lk": 0}, {"D": 0}, {"Dv": 0}, {"Hq": 0, "Hk": 0}], ids=str)
def test_empty_dimensions(dims, backend):
    for alibi in ("h", "bh"):
        check(Case(**{"softcap": 2.0, "sinks": True, "alibi": alibi, "scale": 0.5, "Hk": 2, **dims}), FP32, backend)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("shape", [{}, {"Lq": 300, "Lk": 700}, {"B": 1, "Lq": 1, "Lk": 1300}], ids=str)
def test_bitwise_over_threads_and_batches(shape, dtype, threads):
    """The sums of the slopes have a fixed order too."""
    case = replace(RICH, bias=None, alibi="h", **shape)
    inputs = make(case, dtype, device=DEVICE)
    need("native", inputs, **case.options())
    first = attend(inputs, "native", **case.options())
    for count in (1, 2, 3, 4):
        threads(count)
        for _ in range(5):
            assert_equal(attend(inputs, "native", **case.options()), first, f"{count} threads")
    alone = [x[:1] if x is not None and x.dim() > 1 else x for x in inputs]
    one = attend(type(inputs)(*alone), "native", **case.options())
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(getattr(one, name)[0], getattr(first, name)[0]), name


def tiny(dtype=FP64):
    """(q, k, v, bias, slopes, sinks) of the smallest shapes that show an error."""
    shapes = [(2, 2, 3, 2), (2, 1, 4, 2), (2, 1, 4, 2), (2, 1, 4), (2, 2), (2,)]
    g = torch.Generator().manual_seed(7)
    return [torch.randn(s, generator=g, dtype=FP64).to(DEVICE, dtype).requires_grad_() for s in shapes]


SMOOTH = {
    "softcap": {"softcap": 0.8},
    "causal": {"softcap": 1.3, "causal": True},
    "window": {"window": (1, 0)},
    "mask": {"softcap": 0.8, "mask": torch.tensor([[True, False, True, True], [True] * 4, [False] * 4])},
    "dropout": {"softcap": 0.8, "dropout_p": 0.4},
}


def call_of(name, backend):
    def call(q, k, v, bias, slopes, sinks):
        torch.manual_seed(3)
        options = {"bias": bias, "alibi_slopes": slopes, "sinks": sinks, **SMOOTH[name]}
        return fastattn.attention(q, k, v, return_lse=True, backend=backend, **options)

    return call


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck(name, backend):
    assert torch.autograd.gradcheck(call_of(name, backend), tiny(), fast_mode=False)
    assert torch.autograd.gradgradcheck(call_of(name, backend), tiny(), fast_mode=True)


@all_backends
@pytest.mark.parametrize("name", SMOOTH)
def test_double_backward_in_fp32(name, backend):
    def second(dtype, backend):
        leaves = tiny(dtype)
        out, lse = call_of(name, backend)(*leaves)
        grads = torch.autograd.grad(out.sin().sum() + lse.cos().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    need(backend, make(Case(alibi="h", sinks=True), FP32), softcap=1.0)
    for found, expected in zip(second(FP32, backend), second(FP64, "reference")):
        assert max_error(found, expected) < 1e-4 * max(1.0, float(expected.abs().max()))


@all_backends
@pytest.mark.parametrize("dims", [(0, 0, 0), (None, 0, None), (0, None, 0), (0, 1, None), (0, 0, None)], ids=str)
def test_vmap(dims, backend):
    """q by element or shared, slopes and sinks likewise: equal to a loop, with all gradients."""
    inputs = make(Case(B=2, Hk=2, Lq=5, Lk=7, alibi="bh", sinks=True), FP32, device=DEVICE)
    need(backend, inputs, softcap=2.0)
    stacked = [torch.stack([x, -x, x / 2]) for x in (inputs.q, inputs.slopes, inputs.sinks)]
    q, slopes, sinks = (x[0] if d is None else x.movedim(0, d) for x, d in zip(stacked, dims))

    def loss(q, slopes, sinks):
        out, lse = fastattn.attention(
            q, *inputs[1:3], softcap=2.0, alibi_slopes=slopes, sinks=sinks, return_lse=True, backend=backend
        )
        return out.square().sum() + lse.sum()

    found = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), dims)(q, slopes, sinks)
    for n in range(3):
        leaves = [
            (x if d is None else x.select(d, n)).clone().requires_grad_() for x, d in zip((q, slopes, sinks), dims)
        ]
        for grads, expected in zip(found, torch.autograd.grad(loss(*leaves), leaves)):
            torch.testing.assert_close(grads[n], expected, atol=2e-5, rtol=1e-5)


def test_expected_gradients_of_the_yardstick():
    """The harness's own formulas of slopes, sinks and softcap against autograd."""
    inputs = make(RICH, FP64, device=DEVICE)
    golden, _, magnitude = expect(inputs, RICH)
    for name, a, b, m in zip(golden._fields, golden, textbook(inputs, RICH, None, golden.out, golden.lse), magnitude):
        assert max_error(a, b) < 1e-11 and (m >= a.abs() - 1e-9).all(), name
