"""Masks that are long, and of many intervals a row: exact, the same from both builders, and few numbers to build from."""

from __future__ import annotations

import functools
import operator

import pytest
import torch
from test_masks import BUILDERS, assert_same_plan

from fastattn import masks
from fastattn.backends import native
from fastattn.masks.plan import build_plan, visible_pairs

LONG = {
    "causal": lambda L: masks.causal(),
    "causal documents": lambda L: masks.causal() & masks.documents(torch.arange(L) // 50) & masks.window(300, None),
    "prefix of a batch": lambda L: masks.causal("top_left") | masks.prefix([70, 0, 4000]),
    "global tokens": lambda L: masks.longformer(70, torch.arange(0, L, 41)),
    "dilated global tokens": lambda L: masks.longformer(300, [3, 4, 5, 4000], 3) & masks.causal(),
    "multiples": lambda L: masks.dilated(1) & masks.dilated(48) | masks.dilated(200),
    "strided": lambda L: masks.strided(37) & masks.causal() & ~masks.prefix(100),
    "not strided": lambda L: ~masks.strided(64),
    "not all multiples": lambda L: ~(masks.dilated(2) | masks.dilated(3, (500, 90))),
    "interleaved documents": lambda L: masks.documents(torch.arange(L) % 5 * (torch.arange(L) > 99)),
    "documents of heads": lambda L: masks.documents(torch.stack([torch.arange(L) // n % 7 for n in (1, 64)])[None]),
    "bigbird of heads": lambda L: masks.bigbird(16, heads=2) & masks.key_padding([90, L]),
    "blocks of a batch": lambda L: masks.blocks(torch.rand(2, 1, -(-L // 24), -(-L // 16)) < 0.3, (24, 16)),
    "few intervals": lambda L: masks.intervals(*torch.randint(0, L, (2, L, 1)).sort(0).values),
    "many intervals": lambda L: masks.intervals(*torch.randint(0, L, (2, L, 6)).sort(0).values) & masks.window(900, 9),
    "keys at random": lambda L: masks.key_padding(torch.rand(L) < 0.5) & masks.causal(),
    "many": lambda L: functools.reduce(operator.or_, (masks.dilated(n, n * n) for n in range(2, 60))),
}


@pytest.mark.parametrize("name", LONG)
def test_long_masks(name):
    """Where a row of tiles has more of them than intervals, and tiles are those of others: both builders, next to rows."""
    torch.manual_seed(0)
    L = 4483
    mask = LONG[name](L)
    plans = [build_plan(mask, L, L, native=own) for own in BUILDERS]
    for plan in plans[1:]:
        assert_same_plan(plans[0], plan)
    assert torch.equal(plans[0].to_dense(), mask.to_dense(L, L))


@pytest.mark.parametrize("Lq, Lk", [(70, 4483), (4483, 70), (129, 4160)])
@pytest.mark.parametrize("mask", [
    masks.strided(37) & masks.causal(), ~masks.dilated(64) | masks.causal("top_left"), masks.dilated(3, (90, None)),
    masks.longformer(9, [0, 5, 6, 69], 2), masks.bigbird(7, heads=3), masks.dilated(500) | masks.dilated(7, (5, 0)),
    masks.dilated(2**62) & masks.causal(),
], ids=str)  # fmt: skip
def test_long_masks_of_two_lengths(mask, Lq, Lk):
    plans = [build_plan(mask, Lq, Lk, native=own) for own in BUILDERS]
    for plan in plans[1:]:
        assert_same_plan(plans[0], plan)
    assert torch.equal(plans[0].to_dense(), mask.to_dense(Lq, Lk))
    assert visible_pairs(mask, Lq, Lk) == int(mask.to_dense(Lq, Lk).sum())


def numbers(value) -> int:
    """In all tensors of nested arguments."""
    if isinstance(value, (list, tuple)):
        return sum(map(numbers, value))
    return value.numel() if isinstance(value, torch.Tensor) else 0


@pytest.mark.skipif(native._C is None, reason=f"native: {native.status()}")
@pytest.mark.parametrize("name", [
    "causal documents", "global tokens", "dilated global tokens", "multiples", "strided", "not strided", "not all multiples",
    "interleaved documents", "documents of heads", "bigbird of heads", "blocks of a batch", "keys at random",
])  # fmt: skip
def test_the_builder_is_given_few_numbers(monkeypatch, name):
    """As many as tokens, not as intervals: a row of these masks has up to thousands."""
    given = 0

    class Counting(native._C.PlanBuilder):
        def __getattribute__(self, method):
            found = super().__getattribute__(method)

            def call(*arguments):
                nonlocal given
                given += numbers(arguments)
                return found(*arguments)

            return call if method.startswith("add") else found

    monkeypatch.setattr(native._C, "PlanBuilder", Counting)
    L = 4096
    LONG[name](L).plan(L, L)
    assert 0 < given <= 20 * L


@pytest.mark.skipif(native._C is None, reason=f"native: {native.status()}")
def test_a_dilated_window_of_millions_of_tokens():
    """Its multiples are made in the band alone."""
    L, seen = 2**21, 257
    assert masks.dilated(2, (512, 0)).density(L, L) * L * L == seen * L - 2 * sum(range(seen))
