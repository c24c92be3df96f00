"""Numbers: big logits, hidden first tiles, tiny lse, RMS promises, and bitwise repeatability."""

import math

import pytest
import torch
from harness import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    FP64,
    all_backends,
    all_dtypes,
    assert_equal,
    attend,
    check_exact,
    check_inputs,
    need,
    problem,
    tied_scores,
)

import fastattn
from fastattn.testing import RMS_LIMIT, Case, cast, make, max_error, rms_ratio, variants

TAILS = (1, 2, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 192, 193)


def constant_logits(case, dtype, value):
    """Every logit is exactly `value` (times whatever rounding `dtype` gives its root), with random values v."""
    inputs = make(case, dtype, device=DEVICE)
    q, k = torch.zeros_like(inputs.q), torch.zeros_like(inputs.k)
    root = math.sqrt(abs(value))
    q[..., 0], k[..., 0] = root, math.copysign(root, value)
    return inputs._replace(q=q, k=k)


# fp16 holds roots up to 65504, hence logits up to 4e9.
BIG = [
    (v, d)
    for v in (1e2, -1e2, 90.0, -90.0, -2.45e5, 1e30, -1e30)
    for d in (FP32, BF16, FP16)
    if d != FP16 or abs(v) < 1e9
]


@all_backends
@pytest.mark.parametrize("value, dtype", BIG, ids=lambda x: str(x).removeprefix("torch."))
def test_equal_logits_of_any_size_average_the_values(value, dtype, backend):
    """All logits equal: P = 1 / n however large they are (a finite -inf sentinel or a zero row max gives 0 here)."""
    for L in TAILS:
        case = Case(B=1, Hq=2, Hk=2, Lq=L, Lk=L, D=8, scale=1.0, causal=True)
        inputs = constant_logits(case, dtype, value)
        need(backend, inputs, **case.options())
        result = check_exact(inputs, case, backend)
        mean = inputs.v.double().cumsum(2) / torch.arange(1, L + 1, device=DEVICE)[:, None]
        assert max_error(result.out, mean) < {FP32: 5e-6, FP16: 2e-3, BF16: 2e-2}[dtype], L


# Scores are exact; logits only where no scale rounds them before a bias is added.
TIED = [
    *variants(Case(B=1, Hq=2, Hk=2, Lq=70, Lk=200, D=8, causal=True), scale=(1.0, 0.3, -0.3)),
    *variants(Case(B=1, Hq=4, Hk=2, Lq=70, Lk=150, D=8, mask="1h1k", window=(90, 40)), scale=(1.0, 0.3)),
    *variants(Case(B=2, Hq=4, Hk=2, Lq=1, Lk=1100, D=8), scale=(1.0, 0.3, -0.3)),
    *variants(Case(B=1, Hq=8, Hk=1, Lq=3, Lk=1100, D=8), scale=(1.0, 0.3)),
    *variants(Case(B=1, Hq=4, Hk=2, Lq=20, Lk=130, D=8, bias="1hqk"), scale=(1.0, -0.5)),
    Case(B=2, Hq=2, Hk=1, Lq=33, Lk=70, D=8, mask="k", bias="b1q1", scale=1.0),
    Case(B=1, Hq=2, Hk=2, Lq=1, Lk=1100, D=8, bias="k", scale=-0.5),
]


@all_backends
@all_dtypes
@pytest.mark.parametrize("case", TIED, ids=str)
def test_ties_among_large_logits(case, dtype, backend):
    """Weights of keys that tie or nearly tie at +-2.6e5 or +-1.3e30, in tiles and split keys: gradients as of small logits."""
    if backend == "reference" and abs(case.scale) == 0.3:
        pytest.skip("the reference rounds scaled scores before it takes differences")
    for root in (512.0, -512.0, 2.0**50, -(2.0**50)):
        if dtype == FP16 and abs(root) > 6e4:
            continue
        inputs = tied_scores(case, dtype, root)
        if inputs.bias is not None:
            inputs = inputs._replace(bias=(inputs.bias * 32).round() / 32)
        need(backend, inputs, **case.options())
        check_exact(inputs, case, backend)


@all_backends
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("size", (1e5, 1e10, 1e30))
def test_backward_has_the_scores_of_the_forward(size, dtype, backend):
    """Random logits of any size: summed in another order in backward, a score is off by many units: weights of 0 or inf."""
    for Lq, Hq in ((1, 1), (1, 4), (4, 2), (40, 1)):
        case = Case(B=1, Hq=Hq, Hk=1, Lq=Lq, Lk=300, D=64, scale=1.0)
        inputs = make(case, dtype, device=DEVICE)
        inputs = inputs._replace(q=inputs.q * math.sqrt(size), k=inputs.k * math.sqrt(size))
        need(backend, inputs, **case.options())
        check_exact(inputs, case, backend)


@all_backends
@pytest.mark.parametrize("magnitude", (1e2, 2.45e5, 1e30))
def test_one_key_towers_over_the_rest(magnitude, backend):
    """Logits +m for one key and -m for the others: the softmax is one-hot, at every place of the winner."""
    for L, winner in ((1, 0), (64, 63), (65, 64), (130, 0), (130, 70), (200, 199)):
        case = Case(B=1, Hq=1, Hk=1, Lq=9, Lk=L, D=4, scale=1.0)
        inputs = constant_logits(case, FP32, -magnitude)
        k = inputs.k.clone()
        k[:, :, winner] *= -1
        inputs = inputs._replace(k=k)
        need(backend, inputs, **case.options())
        result = attend(inputs, backend, **case.options())
        assert torch.equal(result.out, inputs.v[:, :, winner : winner + 1].expand_as(result.out)), (L, winner)
        assert result.lse[0, 0, 0] == pytest.approx(magnitude, rel=1e-6)
        assert all(x.isfinite().all() for x in (result.dq, result.dk, result.dv))


@all_backends
@all_dtypes
@pytest.mark.parametrize("hidden", (1, 16, 64, 65, 128, 150))
def test_first_tiles_hidden_and_logits_all_negative(hidden, dtype, backend):
    """FA#2082: a row max started at 0 by hidden tiles turns rows of strongly negative logits to zero."""
    for value in (-200.0, -1e3):
        case = Case(B=1, Hq=2, Hk=1, Lq=20, Lk=170, D=8, scale=1.0, mask="k")
        inputs = constant_logits(case, dtype, value)._replace(mask=torch.arange(170, device=DEVICE) >= hidden)
        need(backend, inputs, **case.options())
        result = attend(inputs, backend, **case.options())
        mean = inputs.v[:, :, hidden:].double().mean(2, keepdim=True).expand_as(result.out)
        assert max_error(result.out, mean) < {FP32: 1e-6, FP16: 1e-3, BF16: 8e-3}[dtype]
        expected_lse = float(inputs.q[0, 0, 0, 0].double() * inputs.k[0, 0, 0, 0].double()) + math.log(170 - hidden)
        assert max_error(result.lse, torch.full_like(result.lse, expected_lse)) < (
            2e-4 if backend != "reference" else 5
        )


def climbing(dtype, step):
    """The logit of key j is j * step, exactly: the largest so far is not the largest for long."""
    inputs = make(Case(B=1, Hq=1, Hk=1, Lq=70, Lk=900, D=32, scale=1.0), dtype, device=DEVICE)
    q, k, j = torch.zeros_like(inputs.q), inputs.k.clone(), torch.arange(900, device=DEVICE)
    q[..., :2] = 1.0
    k[..., 0], k[..., 1] = (j // 64 * 64 * step).to(dtype), (j % 64 * step).to(dtype)
    return inputs._replace(q=q, k=k)


@all_backends
@all_dtypes
@pytest.mark.parametrize("step", (0.03125, 0.125, 1.0, 16.0, -0.125))
def test_rows_that_climb(step, dtype, backend):
    inputs, options = climbing(dtype, step), {"scale": 1.0, "causal": "bottom_right"}
    need(backend, inputs, **options)
    exact = attend(cast(inputs, FP64), "reference", **options)
    result = attend(inputs, backend, **options)
    for got, want in ((result.out, exact.out), (result.dv, exact.dv)):
        assert rms_ratio(got, want) < RMS_LIMIT[dtype]
    # dq and dk are differences of what is left of rounded outputs, by weights that an ulp of such logits changes.
    largest = float(exact.lse.abs().max())
    for got, want in ((result.dq, exact.dq), (result.dk, exact.dk)):
        assert rms_ratio(got, want) < 3 * RMS_LIMIT[dtype] + largest * torch.finfo(FP32).eps
    torch.testing.assert_close(result.lse.double(), exact.lse.double(), rtol=1e-6, atol=1e-4 if dtype != FP32 else 2e-6)


@pytest.mark.parametrize("dtype", (FP32, FP16, BF16), ids=("float32", "float16", "bfloat16"))
def test_rows_that_climb_leave_their_neighbours_alone(dtype):
    inputs = make(Case(B=1, Hq=1, Hk=1, Lq=96, Lk=800, D=64), dtype, device=DEVICE)
    need("native", inputs)
    q = inputs.q.clone()
    q[:, :, 37] *= 100
    out, other = (attend(x, "native", grad=False).out for x in (inputs, inputs._replace(q=q)))
    assert not torch.equal(out[:, :, 37], other[:, :, 37])
    out[:, :, 37] = other[:, :, 37]
    assert torch.equal(out, other)


@all_backends
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("L", TAILS)
def test_backward_with_lse_far_below_zero(L, dtype, backend):
    """pytorch#196678: padded keys scored 0 give exp(0 - lse) = inf when lse < -88.7, at partial tiles."""
    for Lq, mask in ((1, None), (L, "k"), (33, "qk")):
        case = Case(B=8, Hq=2, Hk=1, Lq=Lq, Lk=L, D=8, scale=1.0, mask=mask)
        inputs = constant_logits(case, dtype, -120.0)
        result = check_inputs(inputs, case, backend)
        assert all(x.isfinite().all() for x in (result.out, result.dq, result.dk, result.dv))


@all_backends
@all_dtypes
def test_random_logits_of_a_hundred(dtype, backend):
    """Spread of about 1e2: sharp softmax, exponents from 0 to underflow. fp32 bound: ulp(100) enters the exponent."""
    case = Case(B=1, Hq=2, Hk=1, Lq=70, Lk=150, D=16, scale=25.0)
    inputs = make(case, dtype, device=DEVICE)
    need(backend, inputs, **case.options())
    if backend == "reference" and dtype != FP32:
        pytest.skip("the reference rounds its logits to the input precision")
    result = attend(inputs, backend, **case.options())
    golden = attend(cast(inputs, FP64), "reference", **case.options())
    assert golden.lse.abs().max() > 100
    limit = {FP32: 5e-5, FP16: 2e-3, BF16: 2e-2}[dtype]
    for name in ("out", "dq", "dk", "dv"):
        expected = getattr(golden, name)
        assert max_error(getattr(result, name), expected) < limit * max(1.0, float(expected.abs().max())), name


@all_backends
def test_equal_large_rows_in_bf16(backend):
    """pytorch#121558: fused scale and subtract rounds past the row max; entries of 133120 gave NaN."""
    case = Case(B=1, Hq=2, Hk=2, Lq=40, Lk=72, D=64)
    inputs = make(case, BF16, device=DEVICE)
    inputs = inputs._replace(q=torch.full_like(inputs.q, 133120.0), k=torch.full_like(inputs.k, 133120.0))
    need(backend, inputs)
    result = attend(inputs, backend)
    mean = inputs.v.double().mean(2, keepdim=True).expand_as(result.out)
    assert max_error(result.out, mean) < 1e-2
    assert result.dv.isfinite().all() and result.lse.isfinite().all()


@all_backends
def test_subnormal_and_tiny_values(backend):
    for size in (1e-20, 1e-38, 1e-42):
        case = Case(B=1, Hq=2, Hk=1, Lq=20, Lk=40, D=8)
        inputs = make(case, FP32, device=DEVICE)
        inputs = inputs._replace(q=inputs.q * size, k=inputs.k * size)
        check_inputs(inputs, case, backend)


@all_backends
@all_dtypes
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", (64, 128))
def test_rms_promises(D, causal, dtype, backend):
    """Section 5 of the semantics: RMS error over RMS of the result, at a length where sums are long."""
    if backend == "reference":
        pytest.skip("the promise is the fast backends'")
    case = Case(B=1, Hq=2, Hk=2, Lq=1024, Lk=1024, D=D, causal=causal)
    inputs, (golden, *_) = problem(case, dtype)
    need(backend, inputs, **case.options())
    result = attend(inputs, backend, **case.options())
    assert rms_ratio(result.out, golden.out) <= RMS_LIMIT[dtype]
    for name in ("dq", "dk", "dv"):
        assert rms_ratio(getattr(result, name), getattr(golden, name)) <= 3 * RMS_LIMIT[dtype], name


REPEATED = [
    Case(B=2, Hk=2, Lq=150, Lk=200, D=40, causal=True),
    Case(B=1, Hq=8, Hk=2, Lq=1, Lk=1300, D=64),
    Case(B=1, Hq=1, Hk=1, Lq=300, Lk=300, D=32, bias="1hqk", window=(70, 10)),
    Case(B=2, Hk=1, Lq=130, Lk=70, mask="bhqk", bias="k"),
]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@all_backends
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_bitwise_over_repeats_and_threads(case, dtype, backend, threads):
    """Native promises the same bits for any thread count; the torch-made backends over repeats."""
    inputs, _ = problem(case, dtype)
    need(backend, inputs, **case.options())
    first = attend(inputs, backend, **case.options())
    for repeat in range(30 if backend == "native" else 3):
        assert_equal(attend(inputs, backend, **case.options()), first, f"repeat {repeat}")
    if backend == "native":
        for count in (1, 2, 3, 4):
            threads(count)
            assert_equal(attend(inputs, backend, **case.options()), first, f"{count} threads")


@all_backends
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("case", REPEATED[:3], ids=str)
def test_batch_of_one_and_of_eight(case, dtype, backend):
    """Batch invariance: each element alone gives the bits it has among eight."""
    if backend != "native":
        pytest.skip(f"{backend}: its products are torch.matmul, whose bits depend on the batch")
    whole = make(Case(**{**case.__dict__, "B": 8}), dtype, device=DEVICE)
    need(backend, whole, **case.options())
    together = attend(whole._replace(bias=None), backend, **case.options())
    for b in range(8):
        picked = [x[b : b + 1] if x is not None and x.dim() > 1 else x for x in whole._replace(mask=None, bias=None)]
        alone = attend(type(whole)(*picked), backend, **case.options())
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[b]), (b, name)


@all_backends
def test_upstream_values_do_not_overflow_in_fp16(backend):
    """Backward sums in fp32: a long sum of fp16 products past 65504 in between is not lost."""
    case = Case(B=1, Hq=1, Hk=1, Lq=4, Lk=64, D=8, Dv=256, scale=1e-4)
    inputs = make(case, FP16, device=DEVICE)
    v = torch.full_like(inputs.v, 30.0)
    dout = torch.full_like(inputs.dout, 30.0)
    v[..., 128:] *= -1
    inputs = inputs._replace(v=v, dout=dout)
    need(backend, inputs, **case.options())
    if backend == "reference":
        pytest.skip("the reference works in fp16")
    result = attend(inputs, backend, **case.options())
    golden = attend(cast(inputs, FP64), "reference", **case.options())
    assert max_error(result.dv, golden.dv) < 2e-2 and result.dq.isfinite().all()


def test_auto_is_the_chosen_backend_bit_for_bit():
    inputs = make(Case(Hk=2, causal=True), FP32, device=DEVICE)
    chosen = fastattn.explain(*inputs[:3], causal=True).chosen
    assert_equal(attend(inputs, "auto", causal=True), attend(inputs, chosen, causal=True), "auto")
