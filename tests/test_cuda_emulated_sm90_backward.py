"""The Hopper backward kernels in the emulator of tests/cuda_emulator. What a forward pass leaves for them is made in fp64."""

from __future__ import annotations

import ctypes
import math
import mmap

import pytest
import torch
from harness import BF16, FP16, FP32, FP64, Result, _repeated, _scale_and_band, attend, compare, expect, problem
from torch import Tensor

from fastattn.backends import cuda
from fastattn.masks.plan import plan_from_dense
from fastattn.params import SoftmaxParams, SoftmaxTensors
from fastattn.testing import Case, Inputs, cast, make

LOG2E = math.log2(math.e)
ALL = (True, True, True)
both_passes = pytest.mark.parametrize("deterministic", (True, False), ids=("two-pass", "single-pass"))


@pytest.fixture(scope="module", autouse=True)
def emulator(cuda_emulator):
    """Backend "cuda" is the emulator and takes the Hopper kernels alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTATTN_CUDA_EMULATOR", str(cuda_emulator))
        patch.setenv("FASTATTN_CUDA_KERNELS", "hopper")
        assert cuda.status() is None
        yield ctypes.CDLL(str(cuda_emulator))


def visible(inputs: Inputs, case: Case) -> Tensor:
    Lq, Lk = inputs.q.shape[2], inputs.k.shape[2]
    lo, hi = _scale_and_band(inputs, case)[1]
    offset = torch.arange(Lk) - torch.arange(Lq)[:, None]
    seen = (offset >= (-torch.inf if lo is None else lo)) & (offset <= (torch.inf if hi is None else hi))
    return seen if inputs.mask is None else seen & inputs.mask


def saved(inputs: Inputs, case: Case) -> tuple[Tensor, Tensor]:
    """out and lse_parts; exponents rounded where the forward kernels round them, so that large ones mean the same."""
    q, k, v = cast(inputs, FP64)[:3]
    scale, _ = _scale_and_band(inputs, case)
    x = q @ _repeated(k, q).mT
    if case.softcap:
        x = case.softcap * LOG2E * torch.tanh(x * scale / case.softcap)
    else:
        x = (x.to(FP32) * torch.tensor(scale * LOG2E, dtype=FP32)).double()
    x = torch.where(visible(inputs, case), x, -torch.inf)
    if inputs.sinks is not None:
        x = torch.cat((x, inputs.sinks.double()[:, None, None].expand(*x.shape[:3], 1) * LOG2E), -1)
    top = x.amax(-1).to(FP32)
    top = torch.where(top == -torch.inf, 0, top)
    weights = torch.exp2(x - top[..., None])
    total = weights.sum(-1)
    out = weights[..., : k.shape[2]] / torch.where(total == 0, 1, total)[..., None] @ _repeated(v, q)
    return out.to(inputs.q.dtype), torch.stack((top, total.log2().to(FP32)), -1)


def gradients(
    inputs: Inputs, case: Case, deterministic: bool, needs: tuple[bool, ...] = ALL, clean: Inputs | None = None
) -> list[Tensor | None]:
    """dq, dk, dv of the kernels; `clean`: inputs with numbers where nobody sees."""
    out, parts = saved(clean or inputs, case)
    left, right = case.window or (None, None)
    causal = "bottom_right" if case.causal is True else case.causal or "none"
    params = SoftmaxParams(_scale_and_band(inputs, case)[0], causal, left, right, case.softcap or 0.0)
    plan = None if inputs.mask is None else plan_from_dense(inputs.mask, inputs.q.shape[2], inputs.k.shape[2])
    x = SoftmaxTensors(*inputs[:3], sinks=inputs.sinks, plan=plan)
    launch = (cuda.FAMILIES["hopper"], 0, -1, 2, deterministic)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_launch", lambda x, params: launch)
        found = cuda.softmax_backward(inputs.dout, inputs.dlse, x, out, parts, params, (*needs, False, False))
    return list(found[:3])


def check_inputs(inputs: Inputs, case: Case, deterministic: bool, clean: Inputs | None = None) -> list[Tensor | None]:
    found = gradients(inputs, case, deterministic, clean=clean)
    compare(Result(None, None, *found, None), expect(clean or inputs, case), inputs.q.dtype)
    return found


def check(case: Case, deterministic: bool, dtype: torch.dtype = BF16) -> None:
    inputs, expected = problem(case, dtype)
    compare(Result(None, None, *gradients(inputs, case, deterministic), None), expected, dtype)


# Tiles of 64 and 128 rows that are full, cut, and of one row; rings of up to 8 tiles that turn over.
LENGTHS = [(1, 1), (1, 200), (65, 64), (128, 128), (129, 257), (460, 70), (64, 600)]


@both_passes
@pytest.mark.parametrize("D", (64, 128, 256))
@pytest.mark.parametrize(("Lq", "Lk"), LENGTHS, ids=str)
def test_lengths(Lq, Lk, D, deterministic):
    check(Case(B=1, Hq=2, Hk=1, Lq=Lq, Lk=Lk, D=D), deterministic, FP16 if Lq % 2 else BF16)


OPTIONS = [
    Case(B=1, Hq=4, Hk=2, Lq=200, Lk=330, D=64, causal=True),
    Case(B=2, Hq=2, Hk=2, Lq=300, Lk=140, D=64, causal="top_left"),
    Case(B=1, Hq=2, Hk=1, Lq=150, Lk=270, D=128, causal=True, softcap=2.0),
    Case(B=1, Hq=2, Hk=1, Lq=330, Lk=330, D=128, window=(90, 20), sinks=True),
    Case(B=1, Hq=1, Hk=1, Lq=140, Lk=400, D=256, causal=True, window=(130, None)),
    Case(B=1, Hq=2, Hk=1, Lq=200, Lk=130, D=256, softcap=1.5),
    Case(B=1, Hq=1, Hk=1, Lq=260, Lk=100, D=64, causal=True),  # rows that see nothing
    Case(B=1, Hq=2, Hk=1, Lq=260, Lk=100, D=64, causal=True, sinks=True),
    Case(B=1, Hq=1, Hk=1, Lq=100, Lk=400, D=128, causal="top_left"),  # keys that nobody sees
    Case(B=1, Hq=1, Hk=1, Lq=300, Lk=100, D=64, window=(-120, 130)),
    Case(B=1, Hq=1, Hk=1, Lq=70, Lk=70, D=64, window=(-100, 130)),  # nobody sees anything
    Case(B=1, Hq=2, Hk=2, Lq=150, Lk=200, D=128, scale=-0.2),
    Case(B=1, Hq=2, Hk=2, Lq=150, Lk=200, D=64, scale=0.0, causal=True),
    Case(B=2, Hq=2, Hk=2, Lq=100, Lk=200, D=64, layout="expanded"),
    Case(B=2, Hq=2, Hk=1, Lq=150, Lk=100, D=128, layout="blhd", causal=True),
    Case(B=2, Hq=2, Hk=1, Lq=150, Lk=100, D=64, layout="sliced"),
    Case(B=1, Hq=2, Hk=1, Lq=70, Lk=90, D=40, Dv=96),
    Case(B=1, Hq=2, Hk=1, Lq=70, Lk=90, D=200, Dv=8, causal=True),
]  # fmt: skip


@both_passes
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case, deterministic):
    check(case, deterministic, FP16 if case.softcap else BF16)


@both_passes
@pytest.mark.parametrize("case", [
    Case(B=1, Hq=2, Hk=1, Lq=200, Lk=330, D=64, mask="1hqk"),
    Case(B=2, Hq=2, Hk=1, Lq=150, Lk=200, D=128, mask="b1qk", causal=True),
    Case(B=1, Hq=1, Hk=1, Lq=130, Lk=200, D=256, mask="11qk"),
], ids=str)  # fmt: skip
def test_plans(case, deterministic):
    check(case, deterministic)


@both_passes
@pytest.mark.parametrize("D", (64, 256))
def test_plans_of_blocks(D, deterministic):
    """Runs of full tiles, tiles that one of two neighbours lacks, rows and keys without any."""
    case = Case(B=1, Hq=2, Hk=1, Lq=330, Lk=400, D=D, mask="1hqk")
    inputs = make(case, BF16)
    block = torch.rand(2, 6, 7) < 0.5
    block[0, :2], block[:, 5], block[0, :, 3], block[:, :, 6] = True, False, True, False
    mask = block.repeat_interleave(64, 1).repeat_interleave(64, 2)[:, : case.Lq, : case.Lk].clone()
    mask[:, 70:75] ^= True
    check_inputs(inputs._replace(mask=mask[None]), case, deterministic)


@both_passes
def test_a_plan_and_a_band_with_nothing_in_common(deterministic):
    case = Case(B=1, Hq=1, Hk=1, Lq=150, Lk=150, D=64, causal=True)
    mask = torch.ones(1, 1, 150, 150, dtype=torch.bool).triu(1)
    found = check_inputs(make(case, BF16)._replace(mask=mask), case, deterministic)
    assert not any(x.any() for x in found)


@both_passes
@pytest.mark.parametrize("D", (64, 128, 256))
def test_hidden_keys_may_hold_anything(D, deterministic):
    """By the band before and after what is seen, and by a plan in the middle."""
    for case in (
        Case(B=1, Hq=2, Hk=1, Lq=70, Lk=400, D=D, causal="top_left"),
        Case(B=1, Hq=2, Hk=1, Lq=70, Lk=300, D=D, window=(20, -10)),
        Case(B=1, Hq=2, Hk=1, Lq=140, Lk=200, D=D, mask="11qk"),
    ):
        inputs = make(case, BF16)
        if case.mask:
            inputs.mask[..., 60:75], inputs.mask[..., 150] = False, False
        hidden = ~visible(inputs, case).flatten(0, -2).any(0)
        k, v = inputs.k.clone(), inputs.v.clone()
        k[..., hidden, :], v[..., hidden, :] = torch.nan, torch.inf
        found = check_inputs(inputs._replace(k=k, v=v), case, deterministic, clean=inputs)
        assert hidden.any() and not found[1][..., hidden, :].any() and not found[2][..., hidden, :].any()


@both_passes
def test_large_exponents(deterministic):
    """Many keys share the largest logit, 2^22: one float cannot hold it and the log of their number."""
    case = Case(B=1, Hq=1, Hk=1, Lq=100, Lk=150, D=64, scale=1.0)
    inputs = make(case, BF16)
    q, k = torch.zeros_like(inputs.q), torch.zeros_like(inputs.k)
    q[..., 0], k[..., 0, ::2, 0] = 2048, 2048
    inputs = inputs._replace(q=q, k=k)
    _, _, dv = gradients(inputs, case, deterministic)
    expected = inputs.dout.double().sum(2, keepdim=True) / 75
    torch.testing.assert_close(dv[..., ::2, :].double(), expected.expand_as(dv[..., ::2, :]), rtol=0.01, atol=0.004)
    assert not dv[..., 1::2, :].any()


@both_passes
@pytest.mark.parametrize("D", (64, 128, 256))
def test_rows_past_the_end_weigh_nothing(D, deterministic):
    """Every logit is -256: a key past the last, all zeros, would weigh 2^369."""
    case = Case(B=1, Hq=1, Hk=1, Lq=256, Lk=100, D=D, scale=1.0)
    inputs = make(case, BF16)
    q, k = torch.zeros_like(inputs.q), torch.zeros_like(inputs.k)
    q[..., 0], k[..., 0] = 16, -16
    check_inputs(inputs._replace(q=q, k=k), case, deterministic)


@pytest.mark.parametrize("D", (64, 256))
def test_some_gradients(D):
    """Each alone is bitwise what it is among others, whatever pass makes it."""
    case = Case(B=1, Hq=2, Hk=1, Lq=150, Lk=200, D=D, causal=True)
    inputs = make(case, BF16)
    together = gradients(inputs, case, True)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        for found, expected, needed in zip(gradients(inputs, case, False, needs), together, needs):
            assert torch.equal(found, expected) if needed else found is None


def test_the_order_of_threads_changes_nothing(emulator):
    for case in (
        Case(B=1, Hq=2, Hk=1, Lq=330, Lk=300, D=64, causal=True, mask="1hqk"),
        Case(B=1, Hq=2, Hk=1, Lq=330, Lk=300, D=128, causal=True),
    ):
        inputs = make(case, BF16)
        for deterministic in (True, False):
            first = gradients(inputs, case, deterministic)
            emulator.emulator_set_order(1)
            try:
                second = gradients(inputs, case, deterministic)
            finally:
                emulator.emulator_set_order(0)
            assert all(torch.equal(a, b) for a, b in zip(first, second))


@both_passes
def test_far_apart_in_memory(deterministic):
    """Batch elements over 2^31 elements apart, in memory that is mostly never touched."""
    case = Case(B=2, Hq=1, Hk=1, Lq=20, Lk=30, D=64, causal=True)
    inputs = make(case, BF16)
    step = 2**31 + 64

    def spread(x: Tensor) -> Tensor:
        untouched = torch.frombuffer(mmap.mmap(-1, 2 * (step + x[0].numel())), dtype=x.dtype)
        return untouched.as_strided(x.shape, (step, *x.stride()[1:])).copy_(x)

    far, needs = inputs._replace(k=spread(inputs.k), dout=spread(inputs.dout)), (True, False, True)
    found = gradients(far, case, deterministic, needs, clean=inputs)
    expected = gradients(inputs, case, deterministic, needs)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])


def test_rows_of_dout_that_are_one(emulator):
    """As the gradient of a sum over queries is."""
    case = Case(B=1, Hq=2, Hk=1, Lq=70, Lk=90, D=64)
    inputs = make(case, BF16)
    check_inputs(inputs._replace(dout=inputs.dout[:, :, :1].expand(inputs.dout.shape)), case, False)


@pytest.mark.parametrize("D", (64, 128, 256))
def test_after_the_forward_kernels(D):
    """The whole op: what the Hopper forward pass saves is what these read."""
    case = Case(B=1, Hq=2, Hk=1, Lq=150, Lk=200, D=D, causal=True, sinks=True)
    inputs, expected = problem(case, BF16)
    compare(attend(inputs, "cuda", **case.options()), expected, BF16)
