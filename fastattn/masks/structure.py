"""Finds the structure of given rows: the first pattern that sees exactly the same pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from . import data
from .algebra import Mask
from .grids import blocks
from .patterns import causal, empty, full, intervals, key_padding, packed_bits, prefix, window
from .rows import Intervals, Rows, Words, join, same_rows, take, to_bool, visible_keys
from .sequences import documents

BLOCK_SIZES = (128, 64, 32, 16)
NOBODY, NOTHING = -1, -2  # documents of keys that no query sees, and of queries that see no key


class Report(NamedTuple):
    """What a conversion found."""

    structure: str  # "causal", "documents", ..., or "intervals" and "dense" where no pattern fits
    density: float  # visible share of the pairs
    intervals_per_row: Optional[int]  # None where rows have too many and are kept as bits

    def __str__(self) -> str:
        rows = "bits" if self.intervals_per_row is None else f"key intervals a row: {self.intervals_per_row}"
        return f"{self.structure}, density {self.density:.4g}, {rows}"


def recognise(stretches: Iterable[Rows], Lq: int, Lk: int) -> tuple[Mask, Report]:
    """The mask of rows given in order for all queries (Lq >= 1), under the name of the first pattern that fits."""
    stretches = list(stretches)
    with data.plainly():
        return _recognised(_collapsed(join(stretches)), Lq, Lk)


def _recognised(rows: Rows, Lq: int, Lk: int) -> tuple[Mask, Report]:
    pairs = rows[0].shape[:3].numel() * Lk
    density = visible_keys(rows) / pairs if pairs else 0.0
    most = rows.lo.shape[-1] if isinstance(rows, Intervals) else None
    for structure, mask in _candidates(rows, Lq, Lk):
        if same_rows(join([found for _, _, found in mask._stretches(Lq, Lk)]), rows):
            return mask, Report(structure, density, most)
    if isinstance(rows, Intervals):
        return intervals(rows.lo, rows.hi), Report("intervals", density, most)
    return packed_bits(rows.words, Lk), Report("dense", density, most)


def _collapsed(rows: Rows) -> Rows:
    """Batches, heads and queries that are all equal become one."""
    tensors = [t for t in rows if isinstance(t, Tensor)]
    for dim in range(3):
        if all(bool((t == t.narrow(dim, 0, 1)).all()) for t in tensors):
            tensors = [t.narrow(dim, 0, 1) for t in tensors]
    return Words(tensors[0], rows.Lk) if isinstance(rows, Words) else Intervals(tensors[0], tensors[1], rows.Lk)


def _candidates(rows: Rows, Lq: int, Lk: int) -> Iterator[tuple[str, Mask]]:
    """Patterns to try, simple ones first; each is compared exactly, so a wrong guess costs time only."""
    yield "full", full()
    yield "empty", empty()
    bases: list[tuple[str, Mask]] = [("causal", causal()), ("causal top-left", causal("top_left"))]
    yield from bases
    if rows[0].shape[2] == 1 and Lk:
        yield "key padding", key_padding(_short(to_bool(rows)[:, :, 0], 1))
    if isinstance(rows, Intervals):
        # Of patterns with one interval per row: where it begins and ends.
        first, last = (ends.long().expand(-1, -1, Lq, -1)[..., 0] for ends in (rows.lo, rows.hi))
        for name, base in bases:
            yield f"{name} or prefix", base | prefix(_short(last[..., 0], 0))
        if rows.lo.shape[-1] == 1:
            bases += _window(first, last, rows.Lk)
            yield from bases[2:]
            yield from _documents(first, last, _seen(rows))
        for name, base in bases:
            yield f"{name} & key padding", base & key_padding(_short(_seen(rows), 1))
    for size in BLOCK_SIZES if rows[0].shape[2] > 1 else ():
        if min(Lq, Lk) > size:
            visible = to_bool(take(rows, torch.arange(0, Lq, size)))[..., ::size]
            yield f"blocks of {size}", blocks(_short(visible, 2), size)


def _short(t: Tensor, rest: int) -> Tensor:
    """t [B, H, ...] without a batch and head of 1."""
    for _ in range(2):
        if t.dim() > rest and t.shape[t.dim() - rest - 1] == 1:
            t = t.squeeze(t.dim() - rest - 1)
        else:
            break
    return t


def _seen(rows: Intervals) -> Tensor:
    """bool [B, H, Lk]: keys that some query sees."""
    change = torch.zeros(*rows.lo.shape[:2], rows.Lk + 1, dtype=torch.int64)
    for ends, sign in ((rows.lo, 1), (rows.hi, -1)):
        at = ends.flatten(2).long()
        change.scatter_add_(-1, at, torch.full_like(at, sign))
    return change.cumsum(-1)[..., :-1] > 0


def _window(first: Tensor, last: Tensor, Lk: int) -> list[tuple[str, Mask]]:
    """The window these rows are cut from, measured where it ends before the keys do."""
    at = torch.arange(first.shape[-1]) + Lk - first.shape[-1]
    some = first < last
    last = last.masked_fill(~some, 0)
    left_ends, right_ends = some & (first > first.amin(-1, True)), some & (last < last.amax(-1, True))
    left = int((at - first)[left_ends].max()) if bool(left_ends.any()) else None
    right = int((last - 1 - at)[right_ends].max()) if bool(right_ends.any()) else None
    return [("window", window(left, right))] if min(left or 0, right or 0) >= 0 else []


def _documents(first: Tensor, last: Tensor, seen: Tensor) -> Iterator[tuple[str, Mask]]:
    """A document is named by its first key."""
    ids_q = first.masked_fill(first >= last, NOTHING)
    starts = torch.zeros_like(seen, dtype=torch.int64).scatter_(-1, first.clamp(max=seen.shape[-1] - 1), first)
    ids_k = starts.cummax(-1).values.masked_fill(~seen, NOBODY)
    if torch.equal(ids_q, ids_k):
        yield "documents", documents(_short(ids_q, 1))
    yield "documents", documents(_short(ids_q, 1), _short(ids_k, 1))
    if first.shape[-1] == seen.shape[-1]:
        yield "causal & documents", causal() & documents(_short(first, 1))
