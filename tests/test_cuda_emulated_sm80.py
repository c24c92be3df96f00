"""The portable CUDA kernels in the emulator of tests/cuda_emulator, which knows cp.async, ldmatrix and mma.sync from the PTX ISA."""

from __future__ import annotations

import ctypes
import random

import mask_cases
import pytest
import torch
from harness import (
    BF16,
    FP16,
    Result,
    assert_equal,
    attend,
    check_exact,
    compare,
    expect,
    problem,
    tied_scores,
    why_not,
)

import fastattn
from fastattn.backends import cuda
from fastattn.testing import Case, Inputs, dropout_mask, make, max_error, next_rng

both_halves = pytest.mark.parametrize("dtype", (BF16, FP16), ids=("bfloat16", "float16"))
SMALL_DEVICE, LARGE_DEVICE = 100 << 10, 228 << 10  # bytes of shared memory: sm_86, sm_89 and sm_120; sm_90


@pytest.fixture(scope="module", autouse=True)
def emulator(cuda_emulator):
    """Backend "cuda" is the emulator and takes the portable kernels alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTATTN_CUDA_EMULATOR", str(cuda_emulator))
        patch.setenv("FASTATTN_CUDA_KERNELS", "portable")
        assert cuda.status() is None
        yield ctypes.CDLL(str(cuda_emulator))


@pytest.fixture(params=(LARGE_DEVICE, SMALL_DEVICE), ids=("large", "small"))
def device(request, emulator):
    """Devices for which the kernels choose other tiles."""
    emulator.emulator_set_shared_memory(request.param)
    yield
    emulator.emulator_set_shared_memory(LARGE_DEVICE)


def run(inputs: Inputs, case: Case) -> Result:
    assert why_not("cuda", inputs, **case.options()) == []
    return attend(inputs, "cuda", **case.options())


def check(case: Case, dtype: torch.dtype) -> Result:
    inputs, expected = problem(case, dtype)
    result = run(inputs, case)
    compare(result, expected, dtype)
    return result


# Tiles of 64 and 128 queries and of 16, 32 and 64 keys that are full, cut, or of one row; every head size class.
SHAPES = [
    Case(B=1, Hq=1, Hk=1, Lq=1, Lk=1, D=8),
    Case(B=1, Hq=2, Hk=1, Lq=1, Lk=200, D=64),
    Case(B=2, Hq=8, Hk=2, Lq=1, Lk=100, D=64, causal=True, layout="blhd"),
    Case(B=1, Hq=4, Hk=1, Lq=1, Lk=100, D=64, window=(30, 0), sinks=True),
    Case(B=1, Hq=2, Hk=2, Lq=63, Lk=65, D=16),
    Case(B=1, Hq=4, Hk=2, Lq=129, Lk=191, D=64),
    Case(B=1, Hq=1, Hk=1, Lq=64, Lk=128, D=128),
    Case(B=2, Hq=4, Hk=2, Lq=130, Lk=70, D=128),
    Case(B=1, Hq=2, Hk=2, Lq=65, Lk=33, D=256),
    Case(B=1, Hq=2, Hk=1, Lq=70, Lk=90, D=72, Dv=40),
    Case(B=1, Hq=2, Hk=1, Lq=40, Lk=50, D=24, Dv=136),
    Case(B=1, Hq=1, Hk=1, Lq=40, Lk=50, D=192, Dv=128),
    Case(B=1, Hq=2, Hk=2, Lq=200, Lk=0, D=64),
]


@both_halves
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case, dtype, device):
    check(case, dtype)


SQUARE = Case(B=1, Hq=4, Hk=2, Lq=150, Lk=150, D=64)
BANDS = [
    Case(B=1, Hq=4, Hk=2, Lq=150, Lk=200, D=64, causal=True),
    Case(B=1, Hq=4, Hk=2, Lq=200, Lk=100, D=64, causal=True),  # the first 100 queries see nothing
    Case(B=1, Hq=4, Hk=2, Lq=100, Lk=170, D=128, causal="top_left"),  # nobody sees the last 70 keys
    Case(B=1, Hq=1, Hk=1, Lq=130, Lk=200, D=64, window=(20, 10)),
    Case(B=1, Hq=2, Hk=1, Lq=60, Lk=130, D=256, window=(0, 5)),  # nobody sees the first 70 keys
    Case(B=1, Hq=2, Hk=1, Lq=130, Lk=60, D=32, window=(5, 0)),
    Case(B=1, Hq=2, Hk=1, Lq=130, Lk=200, D=32, window=(3, None)),
]


@both_halves
@pytest.mark.parametrize("case", BANDS, ids=str)
def test_bands(case, dtype):
    check(case, dtype)


OPTIONS = [
    Case(B=1, Hq=2, Hk=2, Lq=70, Lk=90, D=32, scale=-0.3),
    Case(B=1, Hq=2, Hk=1, Lq=200, Lk=70, D=32, scale=-0.3, causal=True),  # tiles that see nothing
    Case(B=1, Hq=2, Hk=2, Lq=70, Lk=90, D=32, scale=0.0, causal=True),
    Case(B=1, Hq=2, Hk=1, Lq=70, Lk=90, D=64, softcap=1.5, causal=True),
    Case(B=1, Hq=2, Hk=1, Lq=70, Lk=90, D=64, softcap=0.5, scale=-0.2, sinks=True),
    Case(B=1, Hq=4, Hk=2, Lq=100, Lk=90, D=64, sinks=True, causal=True),
    Case(B=1, Hq=4, Hk=2, Lq=70, Lk=90, D=128, softcap=2.0, bias="1h1k"),
    Case(B=1, Hq=2, Hk=1, Lq=70, Lk=70, D=200, softcap=2.0, bias="hqk"),
]


@both_halves
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case, dtype, device):
    check(case, dtype)


@pytest.mark.parametrize("fp32_bias", (False, True), ids=("half", "fp32"))
@pytest.mark.parametrize("shape", ("bhqk", "1hqk", "b1qk", "11qk", "bh1k", "1h1k", "k", "bhq1", "b111", "1111"))
def test_bias_and_its_gradient_in_the_shape_it_came(shape, fp32_bias):
    check(Case(B=2, Hq=2, Hk=1, Lq=66, Lk=70, D=16, bias=shape, fp32_bias=fp32_bias, causal="top_left"), BF16)


@both_halves
def test_bias_of_minus_infinity_hides(dtype):
    case = Case(B=2, Hq=2, Hk=1, Lq=70, Lk=100, D=32, bias="b11k")
    inputs = make(case, dtype)
    hidden = torch.rand(inputs.bias.shape) < 0.4
    bias = inputs.bias.masked_fill(hidden, -torch.inf)
    unseen = hidden[:, 0, 0, :, None].unsqueeze(1)
    inputs = inputs._replace(bias=bias)
    nans = inputs._replace(k=inputs.k.masked_fill(unseen, torch.nan), v=inputs.v.masked_fill(unseen, torch.nan))
    expected = expect(inputs, case)
    for x in (inputs, nans):
        result = run(x, case)
        compare(result, expected, dtype)
        assert not result.dk.masked_select(unseen).any() and not result.dv.masked_select(unseen).any()


@both_halves
@pytest.mark.parametrize("D", (64, 128, 256))
def test_dropout_keeps_what_the_definition_says(D, dtype):
    case = Case(B=2, Hq=2, Hk=1, Lq=70, Lk=90, D=D, causal=True, dropout_p=0.3)
    inputs = make(case, dtype)
    torch.manual_seed(3)
    keep = dropout_mask(next_rng("cpu"), 0.3, case.B, case.Hq, case.Lq, case.Lk)
    torch.manual_seed(3)
    result = run(inputs, case)
    compare(result, expect(inputs, case, keep), dtype)


# Partial and full tiles, per batch and head, queries and keys nobody pairs with, several runs in a row of tiles.
@pytest.mark.parametrize(
    "name",
    (
        "documents_self",
        "documents_pieces",
        "bigbird",
        "dilated",
        "key_padding_bool",
        "prefix_batched",
        "dense",
        "empty",
    ),
)
@pytest.mark.parametrize("D", (64, 128, 256))
def test_plans(name, D):
    L = 200 if D == 64 else 100
    mask, visible = mask_cases.PATTERNS[name](random.Random(3), L, L)
    case = Case(B=mask_cases.BATCHES, Hq=mask_cases.HEADS, Hk=1, Lq=L, Lk=L, D=D)
    inputs = make(case, BF16)
    expected = expect(inputs._replace(mask=visible), case)
    unseen = ~visible.expand(case.B, case.Hq, L, L).any(dim=(1, 2))[:, None, :, None]
    nans = inputs._replace(k=inputs.k.masked_fill(unseen, torch.nan), v=inputs.v.masked_fill(unseen, torch.nan))
    for x in (inputs, nans):
        compare(run(x._replace(mask=mask), case), expected, BF16)


def test_plan_with_band_and_options():
    mask, visible = mask_cases.PATTERNS["documents_self"](random.Random(3), 130, 130)
    case = Case(B=2, Hq=3, Hk=1, Lq=130, Lk=130, D=32, window=(40, 20), softcap=2.0, bias="1hqk", sinks=True)
    inputs = make(case, BF16)
    compare(run(inputs._replace(mask=mask), case), expect(inputs._replace(mask=visible), case), BF16)


@both_halves
@pytest.mark.parametrize("packed", (False, True), ids=("whole", "packed"))
@pytest.mark.parametrize("batch", (1, 2))
def test_alibi_with_fixed_slopes(batch, packed, dtype):
    """Packed sequences are a plan, and a place of distance 0 for every query."""
    B, L = (1, 130) if packed else (2, 130)
    q, k, v, dout = (torch.randn(B, 2, L, 32).to(dtype) for _ in range(4))
    slopes = torch.rand(B, 2) if batch == 2 else torch.rand(2)
    starts = torch.tensor([0, 50, 120, 130], dtype=torch.int32)
    options = {"cu_seqlens_q": starts, "cu_seqlens_k": starts} if packed else {}
    found, golden = [], []
    for results, backend, width in ((found, "cuda", dtype), (golden, "reference", torch.float64)):
        leaves = [x.to(width).requires_grad_() for x in (q, k, v)]
        out = fastattn.attention(*leaves, causal=True, alibi_slopes=slopes, backend=backend, **options)
        results += [out, *torch.autograd.grad(out, leaves, dout.to(width))]
    for x, exact in zip(found, golden):
        assert max_error(x, exact) < 4 * torch.finfo(dtype).eps * max(1.0, float(exact.detach().abs().max()))


def test_gradient_of_slopes_is_refused():
    inputs = make(Case(alibi="h"), BF16)
    assert why_not("cuda", inputs) == []
    assert why_not("cuda", inputs._replace(slopes=inputs.slopes.requires_grad_())) == ["a gradient of ALiBi slopes"]


@both_halves
@pytest.mark.parametrize("layout", ("blhd", "expanded", "sliced", "last_strided"))
def test_layouts(layout, dtype):
    check(Case(B=2, Hq=2, Hk=2, Lq=70, Lk=90, D=24, Dv=16, layout=layout, causal=True), dtype)


@both_halves
@pytest.mark.parametrize("scale", (1.0, 0.3, -0.3))
def test_ties_among_large_logits(scale, dtype):
    """Beside rows that see nothing and rows with small logits; forward and backward must weigh alike."""
    case = Case(B=1, Hq=2, Hk=2, Lq=70, Lk=60, D=8, causal=True, scale=scale)
    for root in (512.0, -512.0, 2.0**50, -(2.0**50)):
        if dtype == BF16 or abs(root) < 6e4:
            check_exact(tied_scores(case, dtype, root), case, "cuda")


@pytest.mark.parametrize("D", (64, 128, 256))
def test_scores_that_rise_with_the_keys(D):
    """What was summed before a higher score came is scaled down to it, in weights and in values."""
    case = Case(B=1, Hq=1, Hk=1, Lq=70, Lk=250, D=D, scale=1.0)
    inputs = make(case, FP16)
    inputs.q[..., 0] = 2.0
    inputs.k[..., 0] = torch.arange(250) // 50 * 4.0
    inputs.q[..., 1:] /= D
    compare(run(inputs, case), expect(inputs, case), FP16)


def test_ties_with_a_bias():
    case = Case(B=1, Hq=4, Hk=2, Lq=20, Lk=130, D=8, bias="1hqk", scale=-0.5)
    inputs = tied_scores(case, FP16, 512.0)
    check_exact(inputs._replace(bias=(inputs.bias * 32).round() / 32), case, "cuda")


def test_most_negative_finite_bias_hides_nothing():
    case = Case(B=1, Hq=1, Hk=1, Lq=3, Lk=70, D=16, bias="1111", fp32_bias=True)
    inputs = make(case, BF16)
    inputs = inputs._replace(bias=torch.full_like(inputs.bias, torch.finfo(torch.float32).min))
    out = run(inputs, case).out
    assert max_error(out, inputs.v.double().mean(2, keepdim=True).expand_as(out)) < 4e-3


@both_halves
def test_repeats_and_order_of_threads(emulator, dtype):
    """Bitwise the same whichever thread runs first, and every time: no atomics, no race."""
    cases = (
        SQUARE,
        Case(B=1, Hq=4, Hk=2, Lq=150, Lk=200, D=128, causal=True),
        Case(B=1, Hq=2, Hk=1, Lq=70, Lk=70, D=256, window=(30, 5)),
        Case(B=2, Hq=2, Hk=1, Lq=70, Lk=90, D=32, bias="1h1k", softcap=2.0, dropout_p=0.3),
    )
    for case in cases:
        inputs, results = make(case, dtype), []
        for highest_first in (0, 1, 0):
            emulator.emulator_set_order(highest_first)
            torch.manual_seed(0)
            results.append(run(inputs, case))
        emulator.emulator_set_order(0)
        for other in results[1:]:
            assert_equal(results[0], other, str(case))


def test_shared_memory_is_read_without_bank_conflicts(emulator):
    emulator.emulator_bank_conflicts.restype = ctypes.c_int64
    for D in (64, 128, 256):
        run(make(Case(B=1, Hq=1, Hk=1, Lq=70, Lk=70, D=D), BF16), Case(B=1, Hq=1, Hk=1, Lq=70, Lk=70, D=D))
    assert emulator.emulator_bank_conflicts() == 0


def test_parts_of_lse_count_in_powers_of_two():
    """The parts belong to base 2 whichever family wrote them, with (0, -inf) for a row that sees nothing."""
    case = Case(B=1, Hq=2, Hk=1, Lq=100, Lk=70, D=64, causal=True)
    inputs = make(case, FP16)
    from fastattn.params import SoftmaxParams, SoftmaxTensors

    _, lse, parts = cuda.softmax_forward(SoftmaxTensors(*inputs[:3]), SoftmaxParams(0.125, "bottom_right"), True)
    assert torch.equal(parts[:, :, :30], torch.tensor([0.0, -torch.inf]).expand(1, 2, 30, 2))
    assert (lse[:, :, :30] == -torch.inf).all()
    torch.testing.assert_close(parts[:, :, 30:].sum(-1), lse[:, :, 30:] / 0.6931471805599453, rtol=1e-6, atol=1e-5)


def test_only_the_gradients_asked_for():
    case = Case(B=1, Hq=2, Hk=1, Lq=70, Lk=90, D=136, causal=True)
    inputs = make(case, BF16)
    whole = run(inputs, case)
    for wanted in ("q", "k", "v"):
        x = {name: getattr(inputs, name).detach().requires_grad_(name == wanted) for name in ("q", "k", "v")}
        out = fastattn.attention(**x, causal=True, backend="cuda")
        (gradient,) = torch.autograd.grad(out, x[wanted], inputs.dout)
        again = attend(inputs._replace(dlse=torch.zeros_like(inputs.dlse)), "cuda", causal=True)
        assert torch.equal(gradient, getattr(again, f"d{wanted}"))
    assert torch.equal(whole.out, again.out)
