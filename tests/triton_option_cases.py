"""Softcap, ALiBi, sinks and tile plans of the Triton backend against fp64. Run by test_triton.py, as triton_cases.py."""

from __future__ import annotations

import math
from functools import partial

import harness
import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32, FP64, all_dtypes, assert_equal, attend, compare, expect
from triton_cases import BOTH, SMALL, interpreted, vary

import fastattn
from fastattn import masks
from fastattn.backends import triton as backend
from fastattn.kernels.softmax import config
from fastattn.params import SoftmaxTensors
from fastattn.testing import cast, dropout_mask, make, max_error, next_rng

check = partial(harness.check, backend="triton")
SOFTCAP, ALIBI, SINKS = {"softcap": 2.0}, {"alibi": "h"}, {"sinks": True}

OPTIONS = [
    vary(SMALL, **SOFTCAP),
    vary(SMALL, **ALIBI),
    vary(SMALL, **SINKS),
    vary(SMALL, **SOFTCAP, bias="bhqk", Hk=1),
    vary(SMALL, **ALIBI, bias="1hqk", causal=True),
    vary(BOTH, alibi="bh", bias="11qk", D=17, Dv=33),
    vary(SMALL, **SINKS, bias="k", fp32_bias=True),
    vary(BOTH, **SINKS, bias="b1q1"),
    vary(SMALL, **SOFTCAP, mask="bhqk", scale=-0.3),
    vary(SMALL, **ALIBI, mask="qk", Hk=1),
    vary(SMALL, **SINKS, mask="b11k"),
    vary(SMALL, **SOFTCAP, causal="top_left", D=40, Dv=8),
    vary(SMALL, **ALIBI, window=(5, 3), Lq=53, Lk=37),
    vary(SMALL, **SINKS, causal="bottom_right", Lq=53, Lk=37),
    vary(SMALL, **SOFTCAP, **ALIBI, window=(20, None)),
    vary(SMALL, **SOFTCAP, **SINKS, Hk=1),
    vary(SMALL, **ALIBI, **SINKS, scale=0.0),
    vary(SMALL, **SOFTCAP, **ALIBI, **SINKS, causal=True, mask="11qk", bias="bhqk", Hk=1),
]


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case):
    check(case, FP32)


LOW_PRECISION = [*zip(OPTIONS[::4], (BF16, FP16) * len(OPTIONS)), (OPTIONS[-1], BF16), (OPTIONS[-1], FP16)]


@pytest.mark.parametrize("case, dtype", LOW_PRECISION, ids=str)
def test_options_in_low_precision(case, dtype):
    """Gradients of a few numbers need more than one draw of the yardstick."""
    harness.check_seeds(case, dtype, "triton", seeds=4 if case.alibi or case.sinks else 1)


@pytest.mark.parametrize("option", (SOFTCAP, ALIBI, SINKS), ids=str)
def test_options_at_every_tail(option):
    for Lq, Lk in ((1, 1), (1, 40), (16, 17), (33, 15), (65, 1)):
        for causal in (False, "top_left", "bottom_right"):
            check(vary(SMALL, Hq=1, Hk=1, Lq=Lq, Lk=Lk, causal=causal, **option), FP32)


def with_dropout(case, inputs, dtype, dense=None):
    """`harness.check_inputs` given the mask that the seed stands for; `dense`: what a mask object means."""
    torch.manual_seed(11)
    keep = dropout_mask(next_rng(DEVICE), case.dropout_p, case.B, case.Hq, case.Lq, case.Lk)
    torch.manual_seed(11)
    result = attend(inputs, "triton", **case.options())
    compare(result, expect(inputs if dense is None else inputs._replace(mask=dense), case, keep), dtype)


@all_dtypes
@pytest.mark.parametrize("option", (SOFTCAP, ALIBI, SINKS), ids=str)
def test_options_with_dropout(option, dtype):
    case = vary(SMALL, dropout_p=0.3, Hk=1, causal=True, bias="1hq1", **option)
    with_dropout(case, make(case, dtype, device=DEVICE), dtype)


def test_softcap_of_scores_of_any_size():
    """One key makes lse the logit and dq its derivative: as exact as fp32, from 1e-30 to infinity."""
    scores = torch.cat((torch.logspace(-30, 38, 400), torch.linspace(0, 30, 400), torch.tensor([0.0, 3e38])))
    q = torch.cat((scores, -scores)).to(DEVICE)[None, None, :, None]
    one, cap = torch.ones(1, 1, 1, 1, device=DEVICE), 3.0

    def run(dtype, backend):
        leaf = q.to(dtype, copy=True).requires_grad_()
        options = {"scale": 2.0, "softcap": cap, "return_lse": True, "backend": backend}
        _, lse = fastattn.attention(leaf, one.to(dtype), one.to(dtype), **options)
        return lse.detach().double(), torch.autograd.grad(lse.sum(), leaf)[0].double()

    (lse, dq), (golden, exact) = run(FP32, "triton"), run(FP64, "reference")
    eps = torch.finfo(FP32).eps
    assert ((lse - golden).abs() <= 4 * eps * golden.abs() + 1e-37).all()
    # cosh ** -2 knows its argument x to eps, and so itself to eps * x.
    x = (q.double().squeeze() * 2 / cap).abs().clamp(max=300)
    derivative = 2 * torch.cosh(x) ** -2
    assert ((dq.squeeze() - derivative).abs() <= 8 * eps * x.clamp(min=1) * derivative + 1e-37).all()
    assert max_error(dq, exact) < 1e-6


@pytest.mark.parametrize("dtype", (FP32, FP16), ids=str)
def test_sinks_of_any_size(dtype):
    """-inf is no sink; a huge one takes all the weight; rows that see nothing have lse = sink."""
    case = vary(SMALL, Hq=4, Hk=2, mask="bhqk", causal="bottom_right", Lq=40, Lk=37, sinks=True)
    inputs = make(case, dtype, device=DEVICE)
    inputs.mask[0, :, 20:22] = False
    inputs = inputs._replace(sinks=torch.tensor([-math.inf, 0.0, 80.0, -200.0], device=DEVICE))
    result = attend(inputs, "triton", **case.options())
    without = attend(inputs._replace(sinks=None), "triton", **case.options())
    assert torch.equal(result.lse[:, 0], without.lse[:, 0])
    # The first rows of a causal mask with Lq > Lk, and the masked ones of the first batch.
    assert (result.lse[0, :, [0, 1, 2, 20, 21]] == inputs.sinks[:, None]).all()
    assert not result.out[0, :, [0, 1, 2, 20, 21]].any() and not result.dq[0, :, [0, 1, 2, 20, 21]].any()
    golden = attend(cast(inputs, FP64), "reference", **case.options())
    for name in ("out", "dq", "dk", "dv", "dsinks"):
        assert max_error(getattr(result, name), getattr(golden, name)) < (3e-5 if dtype == FP32 else 3e-2), name


@pytest.mark.parametrize("dtype", (FP32, FP16), ids=str)
def test_packed_sequences_have_their_own_zero(dtype):
    """`diagonal`: distances of ALiBi count from the end of each sequence."""
    q, k, v = (make(vary(BOTH, B=1, Lq=90, Lk=140), dtype, device=DEVICE)[n] for n in range(3))
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 70, 70, 71, 90], [0, 5, 30, 120, 140]))
    dout, slopes = torch.randn(q.shape, device=DEVICE), torch.tensor([0.3, -0.05], device=DEVICE)

    def run(dtype, backend):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        wide = slopes.to(FP64 if dtype == FP64 else FP32).requires_grad_()
        options = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "causal": True}
        out = fastattn.attention(*leaves, alibi_slopes=wide, backend=backend, **options)
        return out, *torch.autograd.grad(out, [*leaves, wide], dout.to(dtype))

    for a, b in zip(run(dtype, "triton"), run(FP64, "reference")):
        assert max_error(a, b) < (2e-5 if dtype == FP32 else 2e-2) * max(1, float(b.detach().abs().max()))


def dense(*shape: int, density: float = 0.5, seed: int = 0) -> masks.Mask:
    return masks.dense(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density)


def some_tiles(*shape: int) -> masks.Mask:
    """Whole, mixed and empty tiles in any order, so that runs start and end anywhere."""
    generator = torch.Generator().manual_seed(4)
    kind = torch.randint(0, 4, (*shape[:-2], -(-shape[-2] // 64), -(-shape[-1] // 64)), generator=generator)
    wide = kind.repeat_interleave(64, -2).repeat_interleave(64, -1)[..., : shape[-2], : shape[-1]]
    return masks.dense((wide > 1) | (wide == 1) & (torch.rand(shape, generator=generator) < 0.5))


def documents(L: int) -> masks.Mask:
    return masks.documents(torch.arange(L) // 50)


PLANS = {
    "causal_documents": (masks.causal() & documents(200), 200, 200),
    "window_or_prefix": (masks.causal() & masks.window(20, 0) | masks.prefix(torch.tensor([5, 70])), 130, 200),
    "neighborhood": (masks.neighborhood((13, 10), 5), 130, 130),
    "random": (dense(65, 130), 65, 130),
    "batches_and_heads": (dense(2, 2, 70, 64, density=0.3), 70, 64),
    "heads": (some_tiles(1, 2, 130, 320), 130, 320),
    "batches": (some_tiles(2, 1, 200, 130), 200, 130),
    # The first tile of queries sees nothing, the others begin or end with such rows; nobody sees the last tile of keys.
    "empty_rows": (masks.causal() & ~masks.global_tokens(torch.arange(60, 70)), 150, 70),
    "nothing": (masks.empty(), 64, 65),
    "everything": (masks.full(), 63, 200),
    "causal_long_keys": (masks.causal(), 65, 320),
    "one_query": (masks.window(70, 0) | masks.prefix(3), 1, 200),
    "one_key": (dense(1, 2, 130, 1), 130, 1),
    "one_pair": (masks.full(), 1, 1),
}


@pytest.fixture
def whole_tiles(monkeypatch):
    """Blocks as large as a plan's tiles: an eighth of the interpreter's time."""
    set_blocks(64, 64, monkeypatch)


def set_blocks(BM, BN, monkeypatch):
    tile = config.LaunchConfig(BM, BN, 1, 1)
    monkeypatch.setattr(config, "INTERPRETER", (tile, config.BackwardConfig(tile, tile)))


def check_plan(name, dtype, **changes):
    mask, Lq, Lk = PLANS[name]
    case = vary(SMALL, B=mask.shape[0], Lq=Lq, Lk=Lk, **changes)
    inputs, visible = make(case, dtype, device=DEVICE), mask.to_dense(Lq, Lk).to(DEVICE)
    if case.dropout_p:
        return with_dropout(case, inputs._replace(mask=mask), dtype, visible)
    result = attend(inputs._replace(mask=mask), "triton", **case.options())
    compare(result, expect(inputs._replace(mask=visible), case), dtype)
    return result


@pytest.mark.parametrize("name", PLANS)
def test_plans(name, whole_tiles):
    check_plan(name, FP32)


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=str)
@pytest.mark.parametrize("name", ("causal_documents", "heads"))
def test_plans_in_low_precision(name, dtype, whole_tiles):
    check_plan(name, dtype, Hk=1)


COMPOSED = [
    {"causal": "top_left", "Hk": 1},
    {"causal": "bottom_right", "window": (70, None)},
    {"window": (30, 90), "D": 24, "Dv": 40},
    {"bias": "bhqk", "Hk": 1},
    {"bias": "1hqk", "causal": True},
    {"bias": "b1qk"},
    {"bias": "11qk"},
    {"bias": "1h1k"},
    {"bias": "b1q1", "sinks": True},
    {"dropout_p": 0.2, "Hk": 1},
    {"softcap": 2.0, "Hk": 1},
    {"alibi": "bh"},
    {"sinks": True, "causal": True},
    {"softcap": 2.0, "alibi": "h", "sinks": True, "bias": "k", "dropout_p": 0.1, "causal": "top_left", "Hk": 1},
]


@pytest.mark.parametrize("changes", COMPOSED, ids=str)
def test_plans_compose(changes, whole_tiles):
    for name in ("batches_and_heads", "empty_rows"):
        check_plan(name, FP32, **changes)


@pytest.mark.parametrize("changes", COMPOSED[1::5], ids=str)
def test_plans_compose_in_fp16(changes, whole_tiles):
    check_plan("random", FP16, **changes)


@interpreted
@pytest.mark.parametrize("BM, BN", [(32, 32), (16, 64), (64, 16)])
def test_plans_in_blocks_of_any_size(BM, BN, monkeypatch):
    set_blocks(BM, BN, monkeypatch)
    for name in ("batches_and_heads", "empty_rows"):
        check_plan(name, FP32, bias="11qk", causal="top_left", Hk=1)


def test_plans_visit_only_their_tiles(whole_tiles):
    """Tiles that a plan does not name are not read: NaN there, in keys of the tile's neighbours, stays out."""
    mask, Lq, Lk = masks.causal() & ~masks.global_tokens([3, 64, 65, 131]), 140, 140
    visible = mask.to_dense(Lq, Lk)
    hidden = ~visible.any(2)[0, 0].to(DEVICE)
    case = vary(SMALL, Lq=Lq, Lk=Lk, Hk=1)
    clean = make(case, FP32, device=DEVICE)._replace(mask=mask)
    at = hidden.view(1, 1, -1, 1)
    poisoned = clean._replace(k=clean.k.masked_fill(at, torch.nan), v=clean.v.masked_fill(at, torch.inf))
    for options in ({}, {"window": (100, 0)}, {"softcap": 2.0}):
        expected, result = attend(clean, "triton", **options), attend(poisoned, "triton", **options)
        assert_equal(result, expected, str(options))
        assert not result.dk.masked_select(at).any() and not result.dv.masked_select(at).any()


@interpreted
def test_programs_under_a_plan_do_not_depend_on_their_order(whole_tiles, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    mask, Lq, Lk = PLANS["heads"]
    case = vary(SMALL, Hk=1, bias="11qk", alibi="h", Lq=Lq, Lk=Lk, causal=True)
    inputs = make(case, FP32)._replace(mask=mask)
    expected = attend(inputs, "triton", **case.options())
    forwards = interpreter_builder.set_grid_idx
    monkeypatch.setattr(
        interpreter_builder, "set_grid_idx", lambda x, y, z: forwards(interpreter_builder.grid_dim[0] - 1 - x, y, z)
    )
    assert_equal(attend(inputs, "triton", **case.options()), expected, "reversed grid")


def test_gradients_not_asked_for_are_not_made():
    case = vary(SMALL, Hk=1, Lq=35, Lk=40, bias="1hqk", alibi="bh", sinks=True)
    i = make(case, FP32, device=DEVICE)
    params = harness.SoftmaxParams(0.25, "bottom_right", softcap=3.0)
    plan = masks.prefix(33).plan(35, 40).to(DEVICE)
    x = SoftmaxTensors(i.q, i.k, i.v, i.bias, i.slopes, i.sinks, plan=plan)
    out, _, parts = backend.softmax_forward(x, params, True)

    def gradients(needs):
        return backend.softmax_backward(i.dout, i.dlse, x, out, parts, params, needs)

    full = gradients((True,) * 5)
    for n in range(5):
        alone = gradients(tuple(n == m for m in range(5)))
        assert [g is not None for g in alone] == [n == m for m in range(5)]
        assert torch.equal(alone[n], full[n])


@pytest.mark.parametrize("empty", [{"B": 0}, {"Lq": 0}, {"Lk": 0}, {"Dv": 0}], ids=str)
def test_empty_dimensions(empty):
    check(vary(BOTH, alibi="h", sinks=True, softcap=2.0, **empty), FP32)
