"""The plan builder in plain torch: the oracle of the native one, and what runs without it. O((Lq / 64) (Lk / 64)) memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .rows import TILE, Intervals, Rows, Words, all_keys, low_bits

EMPTY, FULL = -2, -1  # else the index of the tile's words


def plan_tensors(
    stretches: Iterable[tuple[int, int, Rows]], batches: int, heads: int, Lq: int, Lk: int
) -> tuple[Tensor, ...]:
    """The seven tensors of a TilePlan."""
    q_tiles, k_tiles = -(-Lq // TILE), -(-Lk // TILE)
    kinds = torch.full((batches * heads, q_tiles, k_tiles), EMPTY, dtype=torch.int32)
    known: dict[tuple[int, ...], int] = {}
    for i0, i1, rows in stretches:
        for s in range(batches * heads):
            for i in range(i0, i1, TILE):
                own = of_slice(rows, s // heads, s % heads, i - i0, min(i1, i + TILE) - i0)
                full, partial, words = _tiles_of_intervals(own) if isinstance(own, Intervals) else _tiles_of_words(own)
                kinds[s, i // TILE, full] = FULL
                repeated = words[torch.arange(TILE).clamp(max=len(words) - 1)]
                for k, tile in zip(partial.tolist(), repeated.T.tolist()):
                    kinds[s, i // TILE, k] = known.setdefault(tuple(tile), len(known))
    words = torch.tensor(list(known), dtype=torch.int64).view(-1, TILE)
    first_seen = torch.tensor(list(dict.fromkeys(kinds[kinds >= 0].tolist())), dtype=torch.int64)
    number = torch.empty_like(first_seen)
    number[first_seen] = torch.arange(len(first_seen))
    kinds[kinds >= 0] = number[kinds[kinds >= 0].long()].to(torch.int32)
    row_start, rows_, row_order = _runs(kinds)
    column_start, columns, column_order = _runs(kinds.transpose(1, 2))
    return row_start, rows_, column_start, columns, words[first_seen], row_order, column_order


def of_slice(rows: Rows, b: int, h: int, r0: int, r1: int) -> Rows:
    """Rows r0 .. r1 - 1 of one batch and head, without leading dimensions; one row where all are equal."""

    def cut(t: Tensor) -> Tensor:
        t = t[min(b, t.shape[0] - 1), min(h, t.shape[1] - 1)]
        return t if len(t) == 1 else t[r0:r1]

    return (
        Words(cut(rows.words), rows.Lk) if isinstance(rows, Words) else Intervals(cut(rows.lo), cut(rows.hi), rows.Lk)
    )


def _tiles_of_intervals(rows: Intervals) -> tuple[Tensor, Tensor, Tensor]:
    """(full: bool [k_tiles], partial: indices [p], words of the partial tiles: int64 [rows, p])."""
    lo, hi, Lk = rows.lo.long(), rows.hi.long(), rows.Lk
    k_tiles = -(-Lk // TILE)
    used = lo < hi

    def rows_over(begin: Tensor, end: Tensor) -> Tensor:
        """How many intervals hold each tile of [begin, end)."""
        change = torch.zeros(k_tiles + 1, dtype=torch.int64)
        valid = used & (begin < end)
        change += torch.bincount(begin[valid], minlength=k_tiles + 1)
        change -= torch.bincount(end[valid], minlength=k_tiles + 1)
        return change.cumsum(0)[:-1]

    touched = rows_over(lo // TILE, -(-hi // TILE))
    covered = rows_over(-(-lo // TILE), torch.where(hi == Lk, k_tiles, hi // TILE))
    full = covered == len(lo)
    partial = ((touched > 0) & ~full).nonzero()[:, 0]
    words = torch.zeros(len(lo), len(partial), dtype=torch.int64)
    for first, last in zip(lo.unbind(1), hi.unbind(1)):
        before, until = ((x[:, None] - TILE * partial).clamp(0, TILE) for x in (first, last))
        words |= low_bits(until) & ~low_bits(before)
    return full, partial, words


def _tiles_of_words(rows: Words) -> tuple[Tensor, Tensor, Tensor]:
    full = (rows.words == all_keys(rows.Lk)).all(0)
    partial = ((rows.words != 0).any(0) & ~full).nonzero()[:, 0]
    return full, partial, rows.words[:, partial]


def _runs(kinds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(start, runs, order) of kinds [slices, lists, tiles]: neighbouring full tiles are one entry."""
    slices, lists, tiles = kinds.shape
    visited = kinds != EMPTY
    continues = torch.zeros_like(visited)
    continues[..., 1:] = (kinds[..., 1:] == FULL) & (kinds[..., :-1] == FULL)
    begins = visited & ~continues
    entry = begins.flatten().cumsum(0) - 1
    count = torch.bincount(entry[visited.flatten()], minlength=int(begins.sum()))
    first = begins.nonzero()[:, 2]
    start = torch.cat((torch.zeros(1, dtype=torch.int64), begins.sum(-1).flatten().cumsum(0)))
    order = visited.sum(-1).argsort(dim=-1, descending=True, stable=True)
    runs = torch.stack((first, count, kinds[begins].long()), 1)
    return start.to(torch.int32), runs.to(torch.int32), order.to(torch.int32)
