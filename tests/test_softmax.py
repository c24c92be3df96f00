"""Softmax attention against fp64, every option alone and combined, forward and all gradients, on every backend."""

import itertools
import math
import sys

import pytest
import torch
from harness import (
    BACKENDS,
    BF16,
    DEVICE,
    DTYPES,
    FP32,
    FP64,
    all_backends,
    all_dtypes,
    assert_equal,
    attend,
    check,
    need,
    why_not,
)

import fastattn
from fastattn.reference.softmax import softmax
from fastattn.testing import Case, make, max_error, variants

OPTIONS = [
    Case(),
    Case(causal="top_left"),
    Case(causal="bottom_right"),
    Case(causal=True),
    Case(window=(5, 3)),
    Case(window=(0, 0)),
    Case(window=(None, 2)),
    Case(window=(4, None)),
    Case(scale=0.3),
    Case(mask="bhqk"),
    Case(bias="bhqk"),
    Case(mask="1h1k", bias="b1qk"),
    Case(Hk=2),
    Case(Hk=1),
    Case(D=24, Dv=8),
    Case(D=8, Dv=40),
    Case(bias="hqk", fp32_bias=True),
]


@all_backends
@all_dtypes
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_every_option(case, dtype, backend):
    check(case, dtype, backend)


COMBINED = [
    Case(Hk=2, causal="bottom_right", window=(9, None), mask="b11k", bias="hqk", scale=0.2, D=40, Dv=24, Lq=70, Lk=130),
    Case(Hk=1, causal="top_left", window=(11, 7), mask="bhqk", bias="1hq1", scale=-0.25, Lq=130, Lk=67),
    Case(Hk=2, causal="top_left", mask="qk", Lq=129, Lk=129, layout="blhd"),
    Case(Hk=4, window=(3, 90), bias="k", Dv=80, Lq=65, Lk=200, layout="last_strided"),
    Case(Hq=6, Hk=3, causal=True, bias="bhqk", fp32_bias=True, D=17, Dv=3, Lq=40, Lk=300, layout="sliced"),
    Case(B=1, Hq=8, Hk=2, Lq=1, Lk=257, causal=True, mask="b11k", bias="h1k", D=64),
    Case(B=3, Hq=2, Hk=2, Lq=257, Lk=33, causal=True, window=(40, None), bias="b1q1"),
]


@all_backends
@all_dtypes
@pytest.mark.parametrize("case", COMBINED, ids=str)
def test_options_combined(case, dtype, backend):
    check(case, dtype, backend)


@all_backends
@pytest.mark.parametrize("case", OPTIONS[1:4] + COMBINED[:3], ids=str)
def test_fp64(case, backend):
    check(case, FP64, backend)


LENGTHS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 95, 96, 127, 128, 129, 191, 255, 256, 257)


@all_backends
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("L", LENGTHS)
def test_every_tail_length(L, dtype, backend):
    """Each length as Lq and as Lk, causal and not: partial tiles on both sides."""
    for case in (
        Case(B=1, Hq=2, Hk=1, Lq=L, Lk=100),
        Case(B=1, Hq=2, Hk=1, Lq=21, Lk=L, causal=True),
        Case(B=1, Hq=2, Hk=2, Lq=L, Lk=L, causal="top_left"),
    ):
        check(case, dtype, backend)


HEAD_DIMS = (1, 3, 8, 16, 17, 32, 40, 64, 72, 80, 96, 111, 128, 256)


@all_backends
@all_dtypes
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_head_dims(D, dtype, backend):
    """D alone, Dv alone, and both; odd ones included."""
    for d, dv in ((D, D), (D, 20), (20, D)):
        check(Case(B=1, Hq=2, Hk=1, Lq=37, Lk=70, D=d, Dv=dv, causal=True), dtype, backend)


@all_backends
@all_dtypes
@pytest.mark.parametrize("D, Dv", [(512, 512), (384, 16), (16, 500)])
def test_head_dims_up_to_512(D, Dv, dtype, backend):
    check(Case(B=1, Hq=2, Hk=1, Lq=40, Lk=75, D=D, Dv=Dv), dtype, backend)


@all_backends
@pytest.mark.parametrize("Hq, Hk", [(1, 1), (2, 1), (6, 2), (6, 3), (8, 8), (12, 4), (5, 1)])
def test_grouped_query_heads(Hq, Hk, backend):
    for Lq in (1, 5, 70):
        check(Case(B=2, Hq=Hq, Hk=Hk, Lq=Lq, Lk=90, causal=True), FP32, backend)


@all_backends
@pytest.mark.parametrize("Lq", (1, 2, 3, 4, 7, 8, 16))
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
def test_few_queries_many_keys(Lq, dtype, backend):
    """The generation shape: split over keys, a GQA group as rows of one product."""
    check(Case(B=1, Hq=8, Hk=2, Lq=Lq, Lk=1500, D=64, causal=True), dtype, backend)
    check(Case(B=2, Hq=4, Hk=4, Lq=Lq, Lk=1100, D=32, window=(1000, 0), mask="b11k"), dtype, backend)


CAUSAL_LENGTHS = [(1, 9), (9, 1), (5, 64), (64, 5), (64, 65), (65, 64), (100, 300), (300, 100), (128, 128)]


@all_backends
@pytest.mark.parametrize("Lq, Lk", CAUSAL_LENGTHS)
def test_causal_conventions(Lq, Lk, backend):
    """top_left: j <= i. bottom_right and True: j <= i + Lk - Lq. Checked against a mask written out here."""
    case = Case(B=1, Hq=2, Hk=2, Lq=Lq, Lk=Lk)
    inputs = make(case, FP32, device=DEVICE)
    i, j = torch.arange(Lq, device=DEVICE)[:, None], torch.arange(Lk, device=DEVICE)
    for causal, visible in (("top_left", j <= i), ("bottom_right", j <= i + Lk - Lq), (True, j <= i + Lk - Lq)):
        expected = attend(inputs._replace(mask=visible), "reference")
        result = attend(inputs, backend, causal=causal)
        for name in ("out", "dq", "dk", "dv"):
            assert max_error(getattr(result, name), getattr(expected, name)) < 1e-5, (causal, name)
        check(Case(B=1, Hq=2, Hk=1, Lq=Lq, Lk=Lk, causal=causal), FP32, backend)


WINDOWS = [(0, 0), (1, 1), (63, 0), (64, 64), (65, 1), (0, 65), (200, None), (None, 100), (1000, 1000), (None, None)]


@all_backends
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
def test_windows(window, causal, backend):
    """-left <= j - (i + Lk - Lq) <= right, whichever side is longer, composed with causal; mask written out here."""
    for Lq, Lk in ((150, 150), (70, 200), (200, 70)):
        case = Case(B=1, Hq=1, Hk=1, Lq=Lq, Lk=Lk, D=8, causal=causal, window=window)
        inputs = make(case, FP32, device=DEVICE)
        i, j = torch.arange(Lq, device=DEVICE)[:, None], torch.arange(Lk, device=DEVICE)
        offset = j - (i + Lk - Lq)
        visible = torch.ones(Lq, Lk, dtype=torch.bool, device=DEVICE)
        if window[0] is not None:
            visible &= offset >= -window[0]
        if window[1] is not None:
            visible &= offset <= window[1]
        if causal:
            visible &= (j <= i) if causal == "top_left" else (offset <= 0)
        expected = attend(inputs._replace(mask=visible), "reference")
        result = attend(inputs, backend, **case.options())
        assert torch.equal(result.lse == -torch.inf, ~visible.any(1).expand(1, 1, Lq))
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert max_error(getattr(result, name), getattr(expected, name)) < 1e-5, (Lq, Lk, name)


@all_backends
@pytest.mark.parametrize("side", [10**6, 2**31, 2**32 + 1, sys.maxsize, 2**70], ids=str)
def test_window_of_any_int(side, backend):
    """Far beyond the sequence, and beyond what 32 or 64 bits hold: the same as unbounded."""
    inputs = make(Case(Hk=2, Lq=40, Lk=20), FP32, device=DEVICE)
    for window, plain in (((side, 1), (None, 1)), ((1, side), (1, None)), ((side, side), None)):
        assert_equal(attend(inputs, backend, window=window), attend(inputs, backend, window=plain), str(window))


SCALES = (0.0, -0.5, 1e-320, 1e-30, 1.0, 3.7, -1e-3)


@all_backends
@all_dtypes
@pytest.mark.parametrize("scale", SCALES)
def test_scales(scale, dtype, backend):
    for causal in (False, True):
        result = check(Case(scale=scale, causal=causal, Hk=2), dtype, backend)
        if scale == 0 and not causal:
            assert max_error(result.lse, torch.full_like(result.lse, math.log(47))) < 1e-5
            assert not result.dq.any() and not result.dk.any()


@all_backends
def test_default_scale_is_rsqrt_of_D(backend):
    inputs = make(Case(D=40), FP32, device=DEVICE)
    assert torch.equal(attend(inputs, backend).out, attend(inputs, backend, scale=40**-0.5).out)


EMPTY = [dict(zip(("B", "Hq", "Lq", "Lk", "D", "Dv"), dims)) for dims in (
    (0, 4, 5, 7, 8, 8), (2, 0, 5, 7, 8, 8), (2, 4, 0, 7, 8, 8), (2, 4, 5, 0, 8, 8), (2, 4, 5, 7, 0, 8), (2, 4, 5, 7, 8, 0),
    (0, 0, 0, 0, 0, 0), (2, 4, 0, 0, 8, 8), (2, 4, 5, 0, 0, 0), (1, 1, 1, 0, 1, 1),
)]  # fmt: skip


@all_backends
@all_dtypes
@pytest.mark.parametrize("dims", EMPTY, ids=str)
def test_empty_dimensions(dims, dtype, backend):
    """Right shapes; no keys: out 0, lse -inf; all gradients zero, none missing."""
    for extra in ({}, {"causal": True}, {"window": (2, 2)}, {"mask": "bhqk", "bias": "bhqk"}):
        case = Case(**dims, Hk=dims["Hq"], scale=0.5, **extra)
        result = check(case, dtype, backend)
        assert result.out.shape == (case.B, case.Hq, case.Lq, case.head_dim_v)
        if case.Lk == 0:
            assert not result.out.any() and (result.lse == -torch.inf).all()


@all_backends
def test_D_zero_attends_uniformly(backend):
    inputs = make(Case(D=0, Dv=8), FP32, device=DEVICE)
    out = attend(inputs, backend, grad=False, scale=1.0).out
    assert max_error(out, inputs.v.mean(2, keepdim=True).expand_as(out)) < 1e-6


def test_reference_agrees_with_a_loop_over_rows():
    """The oracle itself, against the formulas of the definition in scalar arithmetic."""
    inputs = make(Case(B=2, Hq=4, Hk=2, Lq=5, Lk=7, D=3, Dv=2, mask="b1qk", bias="1hqk"), FP64)
    keep = torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(3)) < 0.7
    lo, hi, scale, p = -2, 4, 0.7, 0.3
    out, lse = softmax(
        inputs.q, inputs.k, inputs.v, inputs.bias, mask=inputs.mask, keep=keep, scale=scale, band=(lo, hi), dropout_p=p
    )
    for b, h, i in itertools.product(range(2), range(4), range(5)):
        kv = h // 2
        weights = {}
        for j in range(7):
            if lo <= j - i <= hi and inputs.mask[b, 0, i, j]:
                z = scale * sum(float(x) * float(y) for x, y in zip(inputs.q[b, h, i], inputs.k[b, kv, j]))
                weights[j] = math.exp(z + float(inputs.bias[0, h, i, j]))
        total = sum(weights.values())
        for d in range(2):
            dropped = sum(w * float(keep[b, h, i, j]) * float(inputs.v[b, kv, j, d]) for j, w in weights.items())
            expected = dropped / total / (1 - p) if weights else 0.0
            assert abs(float(out[b, h, i, d]) - expected) < 1e-12
        assert float(lse[b, h, i]) == pytest.approx(math.log(total) if weights else -math.inf, abs=1e-12)


@pytest.mark.skipif("native" not in BACKENDS, reason="native is not under test")
@all_dtypes
def test_native_takes_every_option(dtype):
    """Guards the skips above: where the library is built, native may refuse fp64 only."""
    if fastattn.backends.native.status() is not None:
        pytest.skip(f"native: {fastattn.backends.native.status()}")
    for case in OPTIONS + COMBINED + variants(Case(), D=HEAD_DIMS + (512,), layout=("blhd", "last_strided", "sliced")):
        assert why_not("native", make(case, dtype), **case.options()) == [], case


@all_backends
def test_lse_only_when_asked(backend):
    inputs = make(Case(), DTYPES[0], device=DEVICE)
    need(backend, inputs)
    out = fastattn.attention(*inputs[:3], backend=backend)
    assert isinstance(out, torch.Tensor)
    assert torch.equal(out, fastattn.attention(*inputs[:3], backend=backend, return_lse=True)[0])
