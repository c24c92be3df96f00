"""Masks are values: what they refuse, how they print and compare, what they store, how they look."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from mask_cases import expressions

from fastattn import masks
from fastattn.masks import Mask

T = torch.tensor
BOOLS = torch.ones(5, dtype=torch.bool)

REFUSED = {  # name: (call, what the message names)
    "alignment": (lambda: masks.causal("middle"), ValueError, "bottom_right.*middle"),
    "alignment True": (lambda: masks.causal(True), ValueError, "alignment"),
    "window side negative": (lambda: masks.window(-1, 0), ValueError, ">= 0"),
    "window side float": (lambda: masks.window(1.0, 0), TypeError, "ints or None"),
    "prefix negative": (lambda: masks.prefix(-1), ValueError, "at least 0, got -1"),
    "prefix float": (lambda: masks.prefix(1.5), TypeError, "integers"),
    "prefix of three dimensions": (lambda: masks.prefix(T([[[1]]])), ValueError, "dimensions"),
    "prefix on another device": (lambda: masks.prefix(T([1]).to("meta")), ValueError, "lives on the CPU"),
    "documents float": (lambda: masks.documents(T([0.0, 1.0])), TypeError, "ids_q must hold integers.*float32"),
    "documents bool": (lambda: masks.documents(BOOLS), TypeError, "bool"),
    "documents text": (lambda: masks.documents("ab"), TypeError, "ids_q"),
    "documents ragged": (lambda: masks.documents([[1], [1, 2]]), (TypeError, ValueError), "ids_q"),
    "documents on another device": (lambda: masks.documents(T([1]).to("meta")), ValueError, "meta.*lives on the CPU"),
    "documents sparse": (lambda: masks.documents(T([1]).to_sparse()), TypeError, "strided"),
    "documents batches": (lambda: masks.documents(T([[1], [1]]), T([[1]] * 3)), ValueError, "must agree"),
    "cu_q from 1": (lambda: masks.from_cu_seqlens([1, 5]), ValueError, "cu_q must start with 0"),
    "cu_q empty": (lambda: masks.from_cu_seqlens([]), ValueError, "start with 0"),
    "cu_q decreasing": (lambda: masks.from_cu_seqlens([0, 5, 3]), ValueError, "not decrease"),
    "cu_q negative": (lambda: masks.from_cu_seqlens([0, -5]), ValueError, "not decrease"),
    "cu_q float": (lambda: masks.from_cu_seqlens(T([0.0, 5.0])), TypeError, "integers"),
    "cu_q of two dimensions": (lambda: masks.from_cu_seqlens([[0, 5]]), ValueError, "dimensions"),
    "cu_k of another number": (lambda: masks.from_cu_seqlens([0, 5], [0, 2, 5]), ValueError, "2 and 3"),
    "cu causal": (lambda: masks.from_cu_seqlens([0, 5], causal="left"), ValueError, "causal"),
    "cu window": (lambda: masks.from_cu_seqlens([0, 5], window=3), TypeError, "window"),
    "global token negative": (lambda: masks.global_tokens([-1]), ValueError, "at least 0"),
    "step 0": (lambda: masks.dilated(0), ValueError, "step"),
    "dilated within": (lambda: masks.dilated(2, (1, -1)), ValueError, ">= 0"),
    "dilated within text": (lambda: masks.dilated(2, "ab"), TypeError, "window"),
    "blocks of ints": (lambda: masks.blocks(T([[1]]), 16), TypeError, "bool"),
    "blocks of a vector": (lambda: masks.blocks(BOOLS, 16), ValueError, "dimensions"),
    "block_size 0": (lambda: masks.blocks(BOOLS[None], 0), ValueError, "block_size"),
    "block_size of three": (lambda: masks.blocks(BOOLS[None], (1, 2, 3)), TypeError, "block_size"),
    "bigbird block": (lambda: masks.bigbird(0), ValueError, "block_size"),
    "bigbird seed": (lambda: masks.bigbird(8, seed=-1), ValueError, "seed"),
    "bigbird seed of 65 bits": (lambda: masks.bigbird(8, seed=2**64), ValueError, "seed must be at most"),
    "bigbird heads": (lambda: masks.bigbird(1, heads=10**22), ValueError, "heads must be at most"),
    "step past int64": (lambda: masks.dilated(2**70), ValueError, "step must be at most"),
    "blocks past int64": (lambda: masks.blocks(BOOLS[None], 2**70), ValueError, "block_size must be at most"),
    "tokens of an int": (lambda: masks.longformer(3, 2), ValueError, "tokens must have 1 dim"),
    "tokens of nothing": (lambda: masks.longformer(3, None), TypeError, "tokens"),
    "grid": (lambda: masks.neighborhood((1, 2, 3, 4), 1), TypeError, "grid"),
    "grid of nothing": (lambda: masks.neighborhood((0, 4), 1), ValueError, "at least 1"),
    "kernel over the grid": (lambda: masks.neighborhood((4, 4), 5), ValueError, "does not fit"),
    "dilated kernel over the grid": (lambda: masks.neighborhood((9,), 5, 2), ValueError, "10 does not fit"),
    "kernel of two for three": (lambda: masks.neighborhood((4, 4, 4), (1, 1)), TypeError, "3 ints"),
    "padding of floats": (lambda: masks.key_padding(T([1.0])), TypeError, "integers"),
    "padding negative": (lambda: masks.key_padding(T([-1])), ValueError, "at least 0"),
    "parent past the tree": (lambda: masks.tree([-1, 5]), ValueError, "from 0 to 1"),
    "parent -2": (lambda: masks.tree([-2]), ValueError, "-1 or a node"),
    "parents in a cycle": (lambda: masks.tree([-1, 2, 1]), ValueError, "cycle"),
    "parent of itself": (lambda: masks.tree([0]), ValueError, "cycle"),
    "context negative": (lambda: masks.tree([-1], -1), ValueError, "context"),
    "dense of floats": (lambda: masks.dense(torch.ones(3, 3)), TypeError, "bool"),
    "dense of a vector": (lambda: masks.dense(BOOLS), ValueError, "dimensions"),
    "from_dense of floats": (lambda: masks.from_dense(torch.ones(3, 3)), TypeError, "bool"),
    "from_dense elsewhere": (lambda: masks.from_dense(torch.ones(3, 3).bool().to("meta")), ValueError, "CPU"),
    "intervals reversed": (lambda: masks.intervals([[5]], [[3]]), ValueError, "0 <= lo <= hi"),
    "intervals negative": (lambda: masks.intervals([[-1]], [[3]]), ValueError, "0 <= lo <= hi"),
    "intervals of two shapes": (lambda: masks.intervals([[1]], [[3, 4]]), ValueError, "one shape"),
    "batches": (lambda: masks.prefix(T([1, 2])) & masks.prefix(T([1, 2, 3])), ValueError, "2 and 3 batches"),
    "heads": (lambda: masks.bigbird(8, heads=2) | masks.bigbird(8, heads=4), ValueError, "2 and 4 heads"),
    "mask & tensor": (lambda: masks.causal() & BOOLS, TypeError, "unsupported operand"),
    "mask | None": (lambda: masks.causal() | None, TypeError, "unsupported operand"),
}

LENGTHS_REFUSED = {  # name: (mask, Lq, Lk)
    "documents, Lq": (masks.documents([0, 0, 1]), 4, 3, "Lq = 3.*Lq = 4"),
    "documents, Lk": (masks.documents([0, 0, 1]), 3, 4, "Lk = 3.*Lk = 4"),
    "cu_seqlens": (masks.from_cu_seqlens([0, 3], [0, 5]), 3, 4, "Lk = 5.*Lk = 4"),
    "tree": (masks.tree([-1, 0], context=3), 2, 4, "Lk = 5.*Lk = 4"),
    "blocks": (masks.blocks(torch.ones(2, 3).bool(), 16), 32, 49, r"\[2, 4\]"),
    "neighborhood": (masks.neighborhood((3, 4), 3), 12, 13, "Lk = 12.*Lk = 13"),
    "padding bool": (masks.key_padding(BOOLS), 5, 6, "Lk = 5.*Lk = 6"),
    "padding": (masks.key_padding([3, 7]), 5, 6, "key 7.*Lk = 6"),
    "prefix": (masks.prefix(7), 5, 6, "key 7.*Lk = 6"),
    "global tokens": (masks.global_tokens([6]), 5, 6, "token 6.*Lk = 6"),
    "intervals": (masks.intervals([[0], [1]], [[3], [7]]), 2, 6, "key 7.*Lk = 6"),
    "intervals, Lq": (masks.intervals([[0], [1]], [[3], [7]]), 3, 7, "Lq = 2.*Lq = 3"),
    "dense": (masks.dense(torch.ones(3, 4).bool()), 3, 5, "Lk = 4.*Lk = 5"),
    "dense, Lq": (masks.dense(torch.ones(3, 4).bool()), 2, 4, "Lq = 3.*Lq = 2"),
    "inside an expression": (~(masks.causal() & masks.documents([0, 0, 1])), 4, 4, "Lq = 3.*Lq = 4"),
    "neighborhood past int64": (masks.neighborhood((2**40, 2**40), 3), 12, 12, f"Lq = {2**80}.*Lq = 12"),
    "negative": (masks.causal(), -1, 4, "Lq must be in 0"),
    "past int32": (masks.causal(), 4, 2**31, "Lk must be in 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_constructors_refuse(name):
    call, error, says = REFUSED[name]
    with pytest.raises(error, match=says):
        call()


def test_rows_that_are_not_there():
    assert masks.causal().to_dense(3, 4, torch.tensor([2, 0, 2])).sum(-1).tolist() == [[[4, 2, 4]]]
    assert masks.prefix([1, 2]).to_dense(3, 4, torch.zeros(0, dtype=torch.int64)).shape == (2, 1, 0, 4)
    for row in (-1, 3):
        with pytest.raises(ValueError, match=f"rows must be from 0 to 2, got {row}"):
            masks.causal().to_dense(3, 4, torch.tensor([0, row]))


@pytest.mark.parametrize("use", ["to_dense", "density", "plan", "plot", "to_flex"])
@pytest.mark.parametrize("name", LENGTHS_REFUSED)
def test_lengths_are_refused(name, use):
    mask, Lq, Lk, says = LENGTHS_REFUSED[name]
    with pytest.raises(ValueError, match=says):
        getattr(mask, use)(Lq, Lk)


def test_lengths_must_be_ints():
    for wrong in (1.0, True, "3", None):
        with pytest.raises(TypeError, match="must be an int"):
            masks.causal().to_dense(3, wrong)
    with pytest.raises(ValueError, match="tile must be 64"):
        masks.causal().plan(3, 3, tile=128)


def test_masks_cannot_be_changed():
    ids = torch.tensor([0, 0, 1])
    mask = masks.documents(ids)
    ids[0] = 1
    assert mask == masks.documents([0, 0, 1])
    with pytest.raises(AttributeError):
        mask.ids_q = ids


def test_the_default_device_is_of_no_concern():
    """Nor is the default dtype. The meta device stands for any other."""
    for mask, _, Lq, Lk in expressions(40, seed=7):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16)
        try:
            with torch.device("meta"):
                made = Mask.from_dict(mask.to_dict())
                plan, again = made.plan(Lq, Lk), made.to_dense(Lq, Lk)
                found, report = masks.from_dense(again)
                scanned = masks.plan_from_dense(again, Lq, Lk, native=False)
                flex = made.to_flex(Lq, Lk)
                back = masks.from_flex(flex) if min(Lq, Lk) > 0 and again.numel() else made
        finally:
            torch.set_default_dtype(before)
        assert made == mask and torch.equal(again, mask.to_dense(Lq, Lk)) and report.density == found.density(Lq, Lk)
        assert torch.equal(plan.to_dense(), again) and torch.equal(scanned.to_dense(), again)
        for other in (found, back):
            assert torch.equal(other.to_dense(Lq, Lk).expand(again.shape), again)
    with torch.device("meta"):
        assert masks.tree([-1, 0, 0]).density(3, 3) == 5 / 9 and masks.prefix(2).density(1, 5) == 0.4


REPRS = [
    masks.full(),
    masks.causal(),
    masks.causal("top_left"),
    masks.window(5, None),
    masks.prefix(3),
    masks.prefix(T([3, 4])),
    masks.documents([0, 0, 1]),
    masks.from_cu_seqlens([0, 3, 5], causal=True, window=(2, None)),
    masks.tree([-1, 0, 0], context=4),
    masks.key_padding([3, 4]),
    masks.global_tokens([0, 7]),
    masks.dilated(3),
    masks.strided(4),
    masks.bigbird(16, random_blocks=2),
    masks.neighborhood((4, 5), 3),
    masks.neighborhood((4, 5), (3, 1), 1),
    masks.causal() & masks.window(4, None) | masks.prefix(2),
    masks.causal() & (masks.window(4, None) | masks.prefix(2)),
    ~masks.causal() & ~(masks.prefix(1) | masks.window(1, 1)) & ~(masks.prefix(1) & masks.window(1, 1)),
    ~(~masks.causal() | masks.prefix(2)) & masks.full() & masks.empty(),
]


@pytest.mark.parametrize("mask", REPRS, ids=repr)
def test_repr_is_the_expression(mask):
    names = {name: getattr(masks, name) for name in masks.__all__}
    # A generated text of our own, read back to show that it says all.
    read = eval(repr(mask).replace("tensor", ""), names)
    assert read == mask and hash(read) == hash(mask)


def test_repr_of_large_data_is_short():
    mask = masks.documents(torch.arange(10000) // 7) & masks.key_padding(torch.rand(3, 10000) < 0.5)
    assert len(repr(mask)) < 120 and "int32 10000" in repr(mask)
    assert "bool 1x1x300x200" in repr(masks.dense(torch.ones(300, 200).bool()))


def test_equality():
    assert masks.causal() == masks.causal() != masks.causal("top_left")
    assert masks.documents(T([1, 2], dtype=torch.int16)) == masks.documents([1, 2]) != masks.documents([1, 3])
    assert masks.documents([2**40]) == masks.documents([2**40]) != masks.documents([2**40 + 1])
    assert masks.prefix(1) & masks.causal() != masks.causal() & masks.prefix(1), "expressions, not what they mean"
    a, b, c = masks.causal(), masks.prefix(1), masks.window(1, 2)
    assert (a & b) & c == a & (b & c) and (a | b) | c == a | (b | c) and ~~a == a
    assert a != "causal()" and a != None  # noqa: E711
    assert len({masks.causal(), masks.causal(), masks.prefix(1), masks.prefix(1)}) == 2
    assert masks.neighborhood((4, 5), (3, 3)) == masks.neighborhood((4, 5), 3)
    assert masks.global_tokens([3, 1, 1]) == masks.global_tokens([1, 3])


def test_copies():
    mask = masks.causal() & masks.documents([0, 0, 1])
    mask.plan(3, 3)
    assert copy.deepcopy(mask) == mask == copy.copy(mask)
    assert pickle.loads(pickle.dumps(mask)) == mask


STORED = (masks.causal() & masks.key_padding(BOOLS) | ~masks.documents([0, 1, 1, 2, 2])).to_dict()


def with_change(*path_and_value):
    *path, last, value = path_and_value
    stored = inner = json.loads(json.dumps(STORED))
    for key in path:
        inner = inner[key]
    inner[last] = value
    return stored


BOOLS_AT = ("masks", 0, "masks", 1, "keys")
NOT_STORED = {
    "a list": [],
    "a number": 3,
    "no kind": {"masks": []},
    "an unknown kind": with_change("kind", "os.system"),
    "a private kind": with_change("kind", "_Combined"),
    "the base": {"kind": "Mask"},
    "a missing field": {"kind": "window", "left": 3},
    "a field too many": {"kind": "window", "left": 3, "right": 3, "more": 1},
    "a wrong value": {"kind": "window", "left": -3, "right": 3},
    "masks that are numbers": {"kind": "And", "masks": [1, 2]},
    "no masks": {"kind": "And", "masks": []},
    "a mask that is none": {"kind": "Not", "mask": 3},
    "a tensor of another kind": with_change(*BOOLS_AT, "dtype", "float32"),
    "a dtype that is an attribute": with_change(*BOOLS_AT, "dtype", "load"),
    "not base64": with_change(*BOOLS_AT, "data", "@@"),
    "data too short": with_change(*BOOLS_AT, "data", ""),
    "data of no text": with_change(*BOOLS_AT, "data", 5),
    "a shape too large": with_change(*BOOLS_AT, "shape", [2**40]),
    "a shape that is negative": with_change(*BOOLS_AT, "shape", [-5]),
    "a shape of text": with_change(*BOOLS_AT, "shape", "5"),
    "a shape of bools": with_change(*BOOLS_AT, "shape", [True]),
    "keys of a tensor missing": with_change(*BOOLS_AT, {"dtype": "bool"}),
    "a number for a tensor": with_change(*BOOLS_AT, 7),
}


@pytest.mark.parametrize("name", NOT_STORED)
def test_malformed_json_is_refused(name):
    Mask.from_dict(STORED)
    with pytest.raises((ValueError, TypeError)) as refusal:
        Mask.from_dict(NOT_STORED[name])
    assert str(refusal.value)


def nested(depth: int) -> Mask:
    mask = masks.causal()
    for _ in range(depth // 2):
        mask = mask & masks.window(9) | masks.prefix(1)
    return mask


def test_how_deep_masks_nest():
    deepest = nested(100)
    assert deepest.plan(9, 9).to_dense().equal(deepest.to_dense(9, 9)) and deepest.density(9, 9) > 0
    for copied in (Mask.from_dict(deepest.to_dict()), copy.deepcopy(deepest), pickle.loads(pickle.dumps(deepest))):
        assert copied == deepest and hash(copied) == hash(deepest)
    for deeper in (lambda: ~deepest, lambda: nested(102)):
        with pytest.raises(ValueError, match="100 deep"):
            deeper()
    stored = deepest.to_dict()
    for _ in range(5000):
        stored = {"kind": "Not", "mask": stored}
    with pytest.raises(ValueError, match="100 deep"):
        Mask.from_dict(stored)


def test_long_disjunctions_cost_little():
    """Each mask is asked once for its batches and heads, however often the disjunction grows."""
    asked = []

    class _Counted(Mask):
        @property
        def shape(self):
            asked.append(self)
            return 1, 1

    mask = _Counted()
    for _ in range(100):
        mask = mask | _Counted()
    assert len(mask.masks) == len(asked) == 101


def test_a_user_cannot_take_the_name_of_a_pattern():
    stored = masks.full().to_dict()
    assert type("full", (Mask,), {})().to_dict() == stored
    assert Mask.from_dict(stored) == masks.full()


def test_picture():
    mask = masks.causal() & masks.window(1, None) | masks.prefix(1)
    assert mask.picture(3, 4) == "##..\n###.\n#.##"
    assert mask.picture(4, 4).splitlines() == ["#...", "##..", "###.", "#.##"]
    assert masks.prefix(T([0, 2])).picture(1, 3, batch=1) == "##."
    with pytest.raises(ValueError, match="up to 128"):
        mask.picture(129, 4)
    with pytest.raises(ValueError, match=r"batch must be in 0 .. 0"):
        mask.picture(3, 3, batch=1)
    with pytest.raises(TypeError, match="batch must be an int"):
        mask.picture(3, 3, batch="a")
    with pytest.raises(ValueError, match="no batch"):
        masks.documents(torch.zeros(0, 4, dtype=torch.int64)).picture(4, 4)


def test_small_plans_are_printed():
    mask = masks.causal() & masks.window(1, None) | masks.prefix(T([1, 2]))
    sizes, picture = repr(mask.plan(32, 20)).split("\n", 1)
    assert sizes.startswith("TilePlan(2 x 1, Lq 32, Lk 20:") and picture == mask.picture(32, 20)
    for plan in (mask.plan(33, 20), mask.plan(3, 3, device="meta"), masks.full().plan(0, 3), masks.full().plan(3, 0)):
        assert "\n" not in repr(plan)


def test_plot(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    mask = masks.causal() & masks.window(100, None)
    for Lq, Lk in ((300, 300), (64, 200), (4096, 4096)):
        axes = mask.plot(Lq, Lk)
        assert f"density {mask.density(Lq, Lk):.3g}" in axes.get_title() and repr(mask) in axes.get_title()
        colours = set(axes.images[0].get_array().ravel().tolist())
        assert colours <= {0, 1, 2, 3} and (max(Lq, Lk) > 512 or 2 in colours)
        axes.figure.savefig(tmp_path / "mask.png")
        pyplot.close(axes.figure)
    figure, axes = pyplot.subplots()
    assert masks.causal().plot(100, 100, ax=axes) is axes
    drawn = axes.images[0].get_array()
    assert (
        drawn.shape == (100, 100)
        and drawn[10, 5] == 2
        and drawn[5, 10] == 1
        and drawn[90, 5] == 3
        and drawn[5, 90] == 0
    )
    pyplot.close(figure)
    of_slices = [masks.prefix(T([[0, 100], [30, 40]])).plot(100, 100, b, h).get_title() for b in (0, 1) for h in (0, 1)]
    assert [title.split()[-1] for title in of_slices] == ["0", "1", "0.3", "0.4"]
    for Lq, Lk in ((0, 5), (5, 0)):
        axes = masks.causal().plot(Lq, Lk)
        axes.figure.canvas.draw()
        assert "density 0" in axes.get_title()
    pyplot.close("all")
    with pytest.raises(ValueError, match="lengths up to"):
        masks.causal().plot(2**20, 5)


def test_plot_without_matplotlib():
    code = """
        import sys
        sys.modules["matplotlib"] = None
        from fastattn import masks
        masks.causal().plan(9, 9), masks.causal().picture(3, 3)
        try:
            masks.causal().plot(9, 9)
        except ImportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", "if True:" + code], capture_output=True, text=True, timeout=120)
    assert "pip install 'fastattn[plot]'" in done.stdout, done.stderr
