"""Masks mean what they say: each pattern and 500 random expressions against dense definitions, and their plans."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
from mask_cases import LENGTHS, PATTERNS, SQUARE, expressions, possible
from torch import Tensor

from fastattn.backends import native
from fastattn.masks import Mask, TilePlan, algebra, plan_from_dense
from fastattn.masks.plan import build_plan, visible_pairs

BUILDERS = [False] if native.status() else [True, False]
SIZES = [(n, n) for n in LENGTHS] + [(64, 200), (200, 65), (1, 127), (127, 1)]


def assert_same_plan(a: TilePlan, b: TilePlan) -> None:
    for name, x, y in zip(TilePlan._fields, a, b):
        same = x.dtype == y.dtype and torch.equal(x, y) if isinstance(x, Tensor) else x == y
        assert same, f"{name} differs: {x} and {y}"


def check_plan(plan: TilePlan, dense: Tensor) -> None:
    """The rules of the format, read off the dense mask."""
    assert torch.equal(plan.to_dense(), dense)
    B, H, Lq, Lk = dense.shape
    assert (plan.batches, plan.heads, plan.Lq, plan.Lk, plan.tile) == (B, H, Lq, Lk, 64)
    q_tiles, k_tiles = -(-Lq // 64), -(-Lk // 64)
    by_tile = {}
    for b, h, t, k in itertools.product(range(B), range(H), range(q_tiles), range(k_tiles)):
        tile = dense[b, h, 64 * t : 64 * t + 64, 64 * k : 64 * k + 64]
        by_tile[b * H + h, t, k] = "empty" if not tile.any() else "full" if tile.all() else "partial"
    rows = entries(plan.row_start, plan.rows, B * H, q_tiles)
    columns = entries(plan.column_start, plan.columns, B * H, k_tiles)
    visited = {(s, t, k): bits for s, t, k, bits in rows}
    assert {at: "full" if bits < 0 else "partial" for at, bits in visited.items()} == {
        at: kind for at, kind in by_tile.items() if kind != "empty"
    }
    assert {(s, t, k): bits for s, k, t, bits in columns} == visited
    used = [bits for _, _, _, bits in rows if bits >= 0]
    assert list(dict.fromkeys(used)) == list(range(len(plan.words))), "numbered as they first appear"
    assert len({tuple(tile) for tile in plan.words.tolist()}) == len(plan.words), "equal tiles are stored once"
    for order, at, n in ((plan.row_order, 1, q_tiles), (plan.column_order, 2, k_tiles)):
        for s in range(B * H):
            weight = [sum(key[0] == s and key[at] == t for key in visited) for t in range(n)]
            assert order[s].tolist() == sorted(range(n), key=lambda t: -weight[t])


def entries(start: Tensor, runs: Tensor, slices: int, lists: int) -> list[tuple[int, int, int, int]]:
    """(slice, list, tile, bits) of every visited tile, after the rules of one list: sorted, full runs maximal."""
    found = []
    assert len(start) == slices * lists + 1 and start[0] == 0 and start[-1] == len(runs)
    for s, t in itertools.product(range(slices), range(lists)):
        end, last_full = -1, False
        for first, count, bits in runs[start[s * lists + t] : start[s * lists + t + 1]].tolist():
            assert first >= end and count >= 1 and (bits < 0 or count == 1)
            assert not (first == end and last_full and bits < 0), "neighbouring full tiles are one entry"
            found += [(s, t, tile, bits) for tile in range(first, first + count)]
            end, last_full = first + count, bits < 0
    return found


def check_mask(mask: Mask, dense: Tensor, Lq: int, Lk: int) -> None:
    B, H = mask.shape
    dense = dense.expand(B, H, Lq, Lk)
    assert torch.equal(mask.to_dense(Lq, Lk), dense)
    assert mask.density(Lq, Lk) == pytest.approx(dense.double().mean().item(), abs=1e-12)
    assert {visible_pairs(mask, Lq, Lk, native=own) for own in BUILDERS} == {int(dense.sum())}
    drawn = torch.randint(0, Lq, (3,))
    assert torch.equal(mask.to_dense(Lq, Lk, drawn), dense[:, :, drawn])
    plans = [build_plan(mask, Lq, Lk, native=own) for own in BUILDERS]
    assert torch.equal(plans[0].to_dense(), dense)
    for plan in plans[1:] + [plan_from_dense(dense.contiguous(), Lq, Lk, native=own) for own in BUILDERS]:
        assert_same_plan(plans[0], plan)
    stored = json.loads(json.dumps(mask.to_dict()))
    back = Mask.from_dict(stored)
    assert back == mask and hash(back) == hash(mask) and repr(back) == repr(mask)
    if native._C is not None:
        native._C.check_plan(mask.plan(Lq, Lk))


@pytest.mark.parametrize(
    "name, Lq, Lk", [(name, Lq, Lk) for name in PATTERNS for Lq, Lk in SIZES if possible(name, Lq, Lk)]
)
def test_pattern_against_its_definition(name, Lq, Lk):
    r = random.Random(f"{name} {Lq} {Lk}")
    for _ in range(1 if name in ("cu_seqlens", "bigbird", *SQUARE) else 3):
        mask, dense = PATTERNS[name](r, Lq, Lk)
        check_mask(mask, dense, Lq, Lk)
        if mask.shape == (1, 1) or max(Lq, Lk) < 130:
            check_plan(mask.plan(Lq, Lk), dense.expand(*mask.shape, Lq, Lk))


@pytest.mark.parametrize("part", range(10))
def test_random_expressions(part):
    for mask, dense, Lq, Lk in expressions(50, seed=part):
        check_mask(mask, dense, Lq, Lk)


def test_stretches_make_the_same_plan(monkeypatch):
    """Rows come a few tiles at a time where there are many: 64 here, all at once in the other tests."""
    made = expressions(60, seed=100)
    whole = [build_plan(mask, Lq, Lk) for mask, _, Lq, Lk in made]
    monkeypatch.setattr(algebra, "_STRETCH", 1)
    for plan, (mask, dense, Lq, Lk) in zip(whole, made):
        assert len(list(mask._stretches(Lq, Lk))) == -(-Lq // 64)
        check_mask(mask, dense, Lq, Lk)
        assert_same_plan(plan, build_plan(mask, Lq, Lk))
