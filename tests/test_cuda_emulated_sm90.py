"""The Hopper forward kernels in the emulator of tests/cuda_emulator, which knows wgmma, TMA and mbarriers from the PTX ISA."""

from __future__ import annotations

import ctypes

import pytest
import torch
from harness import BF16, FP16, Result, assert_equal, attend, compare, expect, problem
from torch import Tensor

from fastattn import masks
from fastattn.backends import cuda
from fastattn.masks.plan import plan_from_dense
from fastattn.params import SoftmaxParams, SoftmaxTensors
from fastattn.testing import Case, Inputs, make, max_error

both_halves = pytest.mark.parametrize("dtype", (BF16, FP16), ids=("bfloat16", "float16"))


@pytest.fixture(scope="module", autouse=True)
def emulator(cuda_emulator):
    """Backend "cuda" is the emulator and takes the Hopper kernels alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTATTN_CUDA_EMULATOR", str(cuda_emulator))
        patch.setenv("FASTATTN_CUDA_KERNELS", "hopper")
        assert cuda.status() is None
        yield ctypes.CDLL(str(cuda_emulator))


def forward(inputs: Inputs, **options) -> Result:
    return attend(inputs, "cuda", grad=False, **options)


def check(case: Case, dtype: torch.dtype) -> Result:
    inputs, expected = problem(case, dtype)
    result = forward(inputs, **case.options())
    compare(result, expected, dtype)
    return result


def library_forward(inputs: Inputs, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and lse_parts, also of head sizes that the backend gives to other kernels."""
    left, right = case.window or (None, None)
    causal = "bottom_right" if case.causal is True else case.causal or "none"
    scale = case.scale if case.scale is not None else case.D**-0.5
    plan = None if inputs.mask is None else plan_from_dense(inputs.mask, case.Lq, case.Lk)
    x = SoftmaxTensors(*inputs[:3], sinks=inputs.sinks, plan=plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_launch", lambda x, params: (cuda.FAMILIES["hopper"], 0, -1, 2, False))
        return cuda.softmax_forward(x, SoftmaxParams(scale, causal, left, right, softcap=case.softcap or 0.0), True)


# Lk from none to several turns of the rings; tiles of 128 queries that are full, cut, and of one row.
LENGTHS = [(1, 1), (300, 700), (257, 129), (128, 128), (70, 1400), (65, 64), (200, 0)]


@both_halves
@pytest.mark.parametrize(("Lq", "Lk"), LENGTHS, ids=str)
def test_lengths(Lq, Lk, dtype):
    check(Case(B=1, Hq=2, Hk=2, Lq=Lq, Lk=Lk, D=64), dtype)


@both_halves
@pytest.mark.parametrize("D", (64, 128, 256))
@pytest.mark.parametrize("causal", (True, "top_left"))
def test_causal_groups(D, causal, dtype):
    check(Case(B=1, Hq=4, Hk=2, Lq=200, Lk=330, D=D, causal=causal), dtype)


@pytest.mark.parametrize("case", [
    Case(B=1, Hq=2, Hk=1, Lq=300, Lk=600, D=64, window=(70, 20)),
    Case(B=1, Hq=2, Hk=1, Lq=300, Lk=500, D=128, window=(None, 40), sinks=True),
    Case(B=1, Hq=2, Hk=1, Lq=140, Lk=500, D=256, window=(300, None), softcap=1.5),
    Case(B=1, Hq=1, Hk=1, Lq=260, Lk=100, D=64, causal=True),  # rows that see nothing
    Case(B=1, Hq=2, Hk=1, Lq=260, Lk=100, D=64, causal=True, sinks=True),
    Case(B=1, Hq=2, Hk=2, Lq=150, Lk=400, D=128, scale=-0.2),
    Case(B=1, Hq=2, Hk=2, Lq=150, Lk=400, D=64, scale=0.0, causal=True),
    Case(B=2, Hq=2, Hk=2, Lq=150, Lk=200, D=64, layout="expanded"),
    Case(B=2, Hq=2, Hk=1, Lq=150, Lk=200, D=128, layout="blhd"),
    Case(B=2, Hq=2, Hk=1, Lq=150, Lk=200, D=64, layout="sliced", causal=True),
], ids=str)  # fmt: skip
def test_options(case):
    check(case, BF16)


@pytest.mark.parametrize("case", [
    Case(B=2, Hq=4, Hk=2, Lq=1, Lk=700, D=64),
    Case(B=1, Hq=16, Hk=2, Lq=3, Lk=1400, D=128, causal=True, sinks=True),
    Case(B=1, Hq=8, Hk=1, Lq=8, Lk=900, D=256, causal="top_left"),
    Case(B=1, Hq=6, Hk=2, Lq=5, Lk=640, D=128, window=(300, 0), softcap=2.0),
    Case(B=3, Hq=2, Hk=2, Lq=2, Lk=0, D=64),
    Case(B=1, Hq=4, Hk=4, Lq=64, Lk=130, D=64, layout="expanded"),
], ids=str)  # fmt: skip
@both_halves
def test_decoding(case, dtype):
    check(case, dtype)


def masked(case: Case, mask, seed: int = 0) -> tuple[Inputs, Tensor]:
    inputs = make(case, BF16, seed)
    dense = mask.to_dense(case.Lq, case.Lk)
    return inputs, dense.expand(case.B, case.Hq, case.Lq, case.Lk)


MASKS = {
    "documents": masks.documents(torch.arange(300) // 70, torch.arange(500) // 90),
    "dilated": masks.dilated(3, 100),
    "prefix": masks.causal() | masks.prefix(77),
    "global": masks.global_tokens([5, 200]) | masks.window(20, 20),
    "strided": masks.causal() & masks.strided(9),
    "empty": masks.empty(),
    "full": masks.full(),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("D", "causal"), [(64, False), (128, True), (256, False)], ids=str)
def test_plans(name, D, causal):
    case = Case(B=1, Hq=2, Hk=1, Lq=300, Lk=500, D=D, causal=causal)
    inputs, dense = masked(case, MASKS[name])
    result = forward(inputs._replace(mask=MASKS[name]), **case.options())
    compare(result, expect(inputs._replace(mask=dense), case), BF16)


@pytest.mark.parametrize("Lq", (3, 200))
def test_plans_of_every_head(Lq):
    """Also few queries of a group, whose heads may then not share a tile."""
    case = Case(B=2, Hq=2, Hk=1, Lq=Lq, Lk=300, D=64)
    visible = torch.rand(2, 2, Lq, 300) < 0.2
    inputs = make(case, BF16)
    result = forward(inputs._replace(mask=masks.dense(visible)))
    compare(result, expect(inputs._replace(mask=visible), case), BF16)


@pytest.mark.parametrize("Lq", (2, 200))
@pytest.mark.parametrize("options", [{"causal": "top_left"}, {"mask": masks.key_padding(torch.tensor([333]))},
                                     {"window": (40, 30)}], ids=("causal", "padding", "window"))  # fmt: skip
def test_keys_that_no_query_sees_may_hold_anything(options, Lq):
    case = Case(B=1, Hq=2, Hk=1, Lq=Lq, Lk=500, D=64)
    inputs, options = (
        make(case, BF16)._replace(mask=options.get("mask")),
        {k: v for k, v in options.items() if k != "mask"},
    )
    dirty = inputs._replace(k=inputs.k.clone(), v=inputs.v.clone())
    i, j = torch.arange(Lq)[:, None] + 500 - Lq, torch.arange(500)
    hidden = {"causal": j >= Lq, "window": ((j < i - 40) | (j > i + 30)).all(0)}.get(next(iter(options), ""), j >= 333)
    dirty.k[:, :, hidden], dirty.v[:, :, hidden] = torch.nan, torch.inf
    assert_equal(forward(dirty, **options), forward(inputs, **options), "NaN in hidden keys")
    assert not forward(dirty, **options).out.isnan().any()


@pytest.mark.parametrize("case", [
    Case(B=1, Hq=2, Hk=1, Lq=200, Lk=300, D=64, causal=True, sinks=True),
    Case(B=1, Hq=4, Hk=2, Lq=9, Lk=600, D=128),
    Case(B=1, Hq=1, Hk=1, Lq=200, Lk=150, D=64, causal=True),
    Case(B=1, Hq=2, Hk=1, Lq=100, Lk=150, D=40, Dv=96),  # between the widths that are compiled
    Case(B=1, Hq=2, Hk=1, Lq=3, Lk=150, D=200, Dv=8),
], ids=str)  # fmt: skip
def test_parts_of_lse(case):
    """(largest exponent, log2 of the sum relative to it), (0, -inf) for nothing: their sum is lse."""
    inputs, expected = problem(case, FP16)
    out, lse, parts = library_forward(inputs, case)
    compare(Result(out, lse, None, None, None, None), expected, FP16)
    top, log = parts.double().unbind(-1)
    assert max_error((top + log) * torch.log(torch.tensor(2.0)).double(), lse.double()) < 1e-5
    nothing = expected.golden.lse == -torch.inf
    assert (top[nothing] == 0).all() and (log[nothing] == -torch.inf).all() and (log[~nothing] >= 0).all()


@pytest.mark.parametrize("size", (1e2, -2.45e5, 1e30), ids=str)
@pytest.mark.parametrize("Lq", (2, 150))
def test_large_logits(size, Lq):
    """Rows whose keys all tie at logits of this size, and a last key far below."""
    case = Case(B=1, Hq=1, Hk=1, Lq=Lq, Lk=300, D=64, scale=1.0)
    inputs = make(case, BF16)
    q, k = torch.zeros_like(inputs.q), torch.zeros_like(inputs.k)
    q[..., 0], k[..., 0] = abs(size) ** 0.5, abs(size) ** 0.5 * (1 if size > 0 else -1)
    k[..., -1, 0] = -3 * abs(size) ** 0.5
    result = forward(inputs._replace(q=q, k=k), scale=1.0)
    mean = inputs.v[:, :, :-1].double().mean(2, keepdim=True)
    assert max_error(result.out, mean.expand_as(result.out)) < 4e-3
    assert result.lse.isfinite().all()


@pytest.mark.parametrize("Lq", (5, 200))
def test_the_order_of_threads_does_not_matter(emulator, Lq):
    """Bitwise the same whichever thread goes first, and in every repetition."""
    case = Case(B=2, Hq=2, Hk=1, Lq=Lq, Lk=700, D=64, causal=True)
    inputs = make(case, BF16)
    first = forward(inputs, causal=True)
    try:
        for highest in (1, 0):
            emulator.emulator_set_order(highest)
            assert_equal(forward(inputs, causal=True), first, f"order {highest}")
    finally:
        emulator.emulator_set_order(0)


def test_rows_of_other_tensors_are_not_written():
    """out may be part of a larger tensor: what lies behind the last query keeps its values."""
    case = Case(B=1, Hq=1, Hk=1, Lq=70, Lk=90, D=64)
    inputs = make(case, BF16)
    frame = torch.full((1, 1, 200, 64), 7.0, dtype=BF16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "empty_like_layout", lambda q, Dv: frame[:, :, :70])
        library_forward(inputs, case)
    assert (frame[:, :, 70:] == 7).all() and (frame[:, :, :70] != 7).any()


@pytest.mark.parametrize(("case", "reason"), [
    (Case(Hq=2, Hk=2, D=64, bias="bhqk"), "bias"),
    (Case(Hq=2, Hk=2, D=64, alibi="h"), "slopes"),
    (Case(Hq=2, Hk=2, D=264), "256"),
], ids=str)  # fmt: skip
def test_refusals_name_their_reason(case, reason):
    inputs = make(case, BF16)
    x = SoftmaxTensors(*inputs[:3], bias=inputs.bias, slopes=None if inputs.slopes is None else inputs.slopes[None])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_launch", lambda x, params: (cuda.FAMILIES["hopper"], 0, -1, 2, False))
        with pytest.raises(RuntimeError, match=reason):
            cuda.softmax_forward(x, SoftmaxParams(0.1), False)
