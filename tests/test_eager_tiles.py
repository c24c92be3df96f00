"""The eager backend with tiles so small that ordinary cases need many: its default tile holds most of them whole."""

import pytest
import torch
from harness import BF16, DEVICE, FP32, FP64, assert_equal, attend, check, check_inputs
from test_softmax import COMBINED, OPTIONS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastattn
import fastattn.eager.softmax_tiles as eager
from fastattn import masks
from fastattn.testing import Case, dropout_mask, make, next_rng


@pytest.fixture(params=[(1, 16), (1 << 12, 64)], ids=["tiles_16x16", "tiles_4096"], autouse=True)
def small_tiles(request, monkeypatch):
    elements, columns = request.param
    monkeypatch.setattr(eager, "TILE_ELEMENTS", elements)
    monkeypatch.setattr(eager, "TILE_K", columns)
    return elements


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("case", OPTIONS + COMBINED, ids=str)
def test_options_over_many_tiles(case, dtype):
    check(case, dtype, "eager")


@pytest.mark.parametrize("case", [Case(mask=m, bias=b, Hk=2, Lq=70, Lk=90) for m, b in
                                  (("b1q1", "1h1k"), ("1111", "bhqk"), ("1h1k", "q1"), ("qk", "1"))], ids=str)  # fmt: skip
def test_broadcast_masks_over_many_tiles(case):
    check(case, FP32, "eager")


def test_dropout_over_many_tiles():
    case = Case(Hk=2, Lq=70, Lk=90, causal=True, dropout_p=0.3, bias="1hqk")
    keep = dropout_mask(next_rng(DEVICE), 0.3, case.B, case.Hq, case.Lq, case.Lk)
    check_inputs(make(case, FP32, device=DEVICE), case, "eager", keep)


def test_hidden_tiles_in_every_place():
    """Rows whose first, middle, last or all tiles are hidden, and NaN in the keys nobody sees."""
    case = Case(B=1, Hq=2, Hk=1, Lq=64, Lk=96, mask="qk", D=8)
    inputs = make(case, FP32, device=DEVICE)
    i, j = torch.arange(64, device=DEVICE)[:, None], torch.arange(96, device=DEVICE)
    mask = ((j // 16 + i // 8) % 3 == 0) & (j < 80) & (i % 7 != 0)
    check_inputs(inputs._replace(mask=mask), case, "eager")
    expected = attend(inputs._replace(mask=mask), "eager")
    hidden = (j >= 80)[:, None]
    dirty = {name: getattr(inputs, name).masked_fill(hidden, torch.nan) for name in ("k", "v")}
    assert_equal(attend(inputs._replace(mask=mask, **dirty), "eager"), expected, "NaN in hidden keys")


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (9, 4)}, {"dropout_p": 0.3}], ids=str)
def test_second_derivatives_over_many_tiles(options):
    inputs = make(Case(B=1, Hq=2, Hk=1, Lq=40, Lk=50, D=4, bias="1hqk"), FP64)

    def second(backend):
        torch.manual_seed(3)
        leaves = [x.clone().requires_grad_() for x in (*inputs[:3], inputs.bias)]
        out = fastattn.attention(*leaves[:3], bias=leaves[3], backend=backend, **options)
        grads = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for found, expected in zip(second("eager"), second("reference")):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": masks.documents([0] * 100 + [1] * 156)}], ids=str)
def test_second_derivatives_hold_no_tensor_of_size_Lq_by_Lk(options, monkeypatch):
    L = 256
    monkeypatch.setattr(eager, "TILE_ELEMENTS", 64 * L)
    monkeypatch.setattr(eager, "TILE_K", 16)
    leaves = [x.requires_grad_() for x in make(Case(B=1, Hq=1, Hk=1, Lq=L, Lk=L, D=4), FP32)[:3]]
    out = fastattn.attention(*leaves, backend="eager", **options)
    grads = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
    with Largest() as largest:
        torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    assert L * 4 <= largest.elements <= L * L / 4
