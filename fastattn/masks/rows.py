"""What each query row sees: sorted key intervals while they are few, else one bit per key. Closed under and, or, not."""

from __future__ import annotations

from typing import NamedTuple, Union

import torch
from torch import Tensor

TILE = 64  # also the bits of a word
_PACK = 0x0102040810204080  # collects the low bits of 8 bytes in the top byte of their product


class Intervals(NamedTuple):
    """Row i sees the keys of [lo, hi), sorted, disjoint, not touching; unused slots come last and hold Lk in both.

    lo, hi: int32 [B|1, H|1, rows|1, R]; a dimension of size 1 holds for all.
    """

    lo: Tensor
    hi: Tensor
    Lk: int


class Words(NamedTuple):
    """Row i sees key 64 w + j where bit j of its word w is set; bits past Lk are 0.

    words: int64 [B|1, H|1, rows|1, ceil(Lk / 64)].
    """

    words: Tensor
    Lk: int


Rows = Union[Intervals, Words]


class Lists(NamedTuple):
    """Row i sees the intervals start[i] .. end[i] - 1 of lo and hi, so that rows which see the same keys share them.

    start, end: int32 [B|1, H|1, rows|1, 1]; lo, hi: int32 [n], sorted and disjoint within a row.
    """

    start: Tensor
    end: Tensor
    lo: Tensor
    hi: Tensor
    Lk: int


class Multiples(NamedTuple):
    """Row i sees the keys j where j - i - shift is a multiple of step."""

    step: int
    shift: int
    Lk: int


# What the native builder takes: rows, and "intersect", "unite" or "complement" of the last two or one before (postfix).
Step = Union[Intervals, Words, Lists, Multiples, str]


def most_intervals(Lk: int) -> int:
    """Rows of more intervals than this are kept as bits, which cost less from there on."""
    return max(16, Lk // 256)


def interval(lo: Tensor, hi: Tensor, Lk: int) -> Intervals:
    """One interval per row, clamped to the keys there are; empty where hi <= lo. Shapes [B|1, H|1, rows|1]."""
    lo, hi = torch.broadcast_tensors(lo.clamp(0, Lk), hi.clamp(0, Lk))
    return compact(lo[..., None], hi[..., None], Lk)


def compact(lo: Tensor, hi: Tensor, Lk: int) -> Intervals:
    """Canonical form of sorted, disjoint, not touching intervals, some of them empty."""
    empty = lo >= hi
    lo, hi = lo.masked_fill(empty, Lk), hi.masked_fill(empty, Lk)
    if lo.shape[-1] > 1:
        lo, hi = lo.sort(-1).values, hi.sort(-1).values
        used = int((lo < Lk).any(dim=(0, 1, 2)).sum()) if lo.numel() else 0
        lo, hi = lo[..., : max(used, 1)], hi[..., : max(used, 1)]
    return Intervals(lo.to(torch.int32).contiguous(), hi.to(torch.int32).contiguous(), Lk)


def settle(lo: Tensor, hi: Tensor, Lk: int) -> Rows:
    """Canonical form of any intervals (unsorted, overlapping, touching, empty): bits where they are too many."""
    return _settled(sweep(lo, hi, Lk))


def _settled(rows: Intervals) -> Rows:
    return to_words(rows) if rows.lo.shape[-1] > most_intervals(rows.Lk) else rows


def sweep(lo: Tensor, hi: Tensor, Lk: int, depth: int = 1) -> Intervals:
    """Keys that at least `depth` of the intervals hold."""
    # Starts come before ends at the same key, so that touching intervals become one.
    at = torch.cat((2 * lo.long(), 2 * hi.long() + 1), -1).sort(-1).values
    is_end = at & 1
    inside = (1 - 2 * is_end).cumsum(-1) >= depth
    before = torch.cat((torch.zeros_like(inside[..., :1]), inside[..., :-1]), -1)
    key, n = at >> 1, lo.shape[-1]
    first = key.masked_fill(~inside | before, Lk).sort(-1).values[..., :n]
    last = key.masked_fill(inside | ~before, Lk).sort(-1).values[..., :n]
    return compact(first, last, Lk)


def _together(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a and b with their first three dimensions broadcast."""
    # torch.broadcast_shapes imports sympy, which takes as long as many plans.
    shape = [y if x == 1 else x for x, y in zip(a.shape[:3], b.shape[:3])]
    return a.expand(*shape, -1), b.expand(*shape, -1)


def table_of(visible: Tensor) -> Rows:
    """Canonical rows of a bool tensor [B|1, H|1, rows|1, Lk]."""
    change, most = _changes(visible)
    return pack(visible) if most > most_intervals(visible.shape[-1]) else _between(change, most)


def intervals_of(visible: Tensor) -> Intervals:
    """The same, however many intervals it takes."""
    return _between(*_changes(visible))


def _changes(visible: Tensor) -> tuple[Tensor, int]:
    """Where intervals begin and end, bool [B|1, H|1, rows|1, Lk + 1], and how many a row has at most."""
    nothing = visible.new_zeros((*visible.shape[:-1], 1))
    change = torch.cat((nothing, visible), -1) != torch.cat((visible, nothing), -1)
    return change, int(change.sum(-1).max()) // 2 if change.numel() else 0


def _between(change: Tensor, most: int) -> Intervals:
    Lk = change.shape[-1] - 1
    row, key = change.flatten(0, 2).nonzero().unbind(1)  # begin, end, begin, end, ... of each row
    rows = change.shape[:3].numel()
    before = torch.bincount(row, minlength=rows).cumsum(0).roll(1)
    before[:1] = 0
    ends = torch.full((rows, 2 * max(most, 1)), Lk, dtype=torch.int32)
    ends[row, torch.arange(len(row)) - before[row]] = key.to(torch.int32)
    ends = ends.view(*change.shape[:3], -1, 2)
    return Intervals(ends[..., 0].contiguous(), ends[..., 1].contiguous(), Lk)


def take(a: Rows, index: Tensor) -> Rows:
    """Row index[i] of `a` as row i. index: int64 [rows]."""
    if isinstance(a, Words):
        return Words(a.words[:, :, index], a.Lk)
    return Intervals(a.lo[:, :, index], a.hi[:, :, index], a.Lk)


def lists_of(table: Intervals, index: Tensor) -> Lists:
    """Row index[i] of `table` as row i, not copied. index: int64 [rows]."""
    R = table.lo.shape[-1]
    start = torch.arange(0, table.lo.numel(), R, dtype=torch.int32).view(*table.lo.shape[:3], 1)[:, :, index]
    return Lists(start, start + R, table.lo.flatten(), table.hi.flatten(), table.Lk)


def join(stretches: list[Rows]) -> Rows:
    """Rows given a stretch at a time (at least one) as one; a single stretch may hold one row for all."""
    if len(stretches) == 1:
        return stretches[0]
    Lk = stretches[0].Lk
    few = [rows for rows in stretches if isinstance(rows, Intervals)]
    if len(few) == len(stretches):
        few = [_wider(rows, max(r.lo.shape[-1] for r in few)) for rows in few]
        return Intervals(torch.cat([rows.lo for rows in few], 2), torch.cat([rows.hi for rows in few], 2), Lk)
    return Words(torch.cat([to_words(rows).words for rows in stretches], 2), Lk)


def same_rows(a: Rows, b: Rows) -> bool:
    """Whether both see the same pairs, dimensions of 1 broadcast."""
    if isinstance(a, Intervals) and isinstance(b, Intervals):
        most = max(a.lo.shape[-1], b.lo.shape[-1])
        pairs = zip(_wider(a, most)[:2], _wider(b, most)[:2])
    else:
        pairs = zip(to_words(a)[:1], to_words(b)[:1])
    return all(bool((x == y).all()) for x, y in pairs)


def _wider(rows: Intervals, R: int) -> Intervals:
    """With unused slots up to R."""
    pad = (0, R - rows.lo.shape[-1])
    lo, hi = (torch.nn.functional.pad(ends, pad, value=rows.Lk) for ends in (rows.lo, rows.hi))
    return Intervals(lo, hi, rows.Lk)


def intersect(a: Rows, b: Rows) -> Rows:
    if isinstance(a, Words) or isinstance(b, Words):
        return Words(to_words(a).words & to_words(b).words, a.Lk)
    if min(a.lo.shape[-1], b.lo.shape[-1]) == 1:
        return compact(torch.maximum(a.lo, b.lo), torch.minimum(a.hi, b.hi), a.Lk)
    lo, hi = (torch.cat(_together(x, y), -1) for x, y in zip(a[:2], b[:2]))
    return _settled(sweep(lo, hi, a.Lk, depth=2))


def unite(a: Rows, b: Rows) -> Rows:
    if isinstance(a, Words) or isinstance(b, Words):
        return Words(to_words(a).words | to_words(b).words, a.Lk)
    lo, hi = (torch.cat(_together(x, y), -1) for x, y in zip(a[:2], b[:2]))
    return _settled(sweep(lo, hi, a.Lk))


def complement(a: Rows) -> Rows:
    if isinstance(a, Words):
        return Words(~a.words & all_keys(a.Lk), a.Lk)
    zero, end = torch.zeros_like(a.lo[..., :1]), torch.full_like(a.lo[..., :1], a.Lk)
    return _settled(compact(torch.cat((zero, a.hi), -1), torch.cat((a.lo, end), -1), a.Lk))


def low_bits(n: Tensor) -> Tensor:
    """int64 with the n lowest bits set, n in 0 .. 64."""
    return torch.where(n >= 64, -1, (1 << n.clamp(max=63)) - 1)


def all_keys(Lk: int) -> Tensor:
    """Words of a row that sees every key: int64 [ceil(Lk / 64)]."""
    return low_bits((Lk - 64 * torch.arange(-(-Lk // 64), device="cpu")).clamp(max=64))


def to_words(a: Rows) -> Words:
    if isinstance(a, Words):
        return a
    begin = 64 * torch.arange(-(-a.Lk // 64))
    words = torch.zeros((*a.lo.shape[:3], len(begin)), dtype=torch.int64)
    for lo, hi in zip(a.lo.long().unbind(-1), a.hi.long().unbind(-1)):
        words |= low_bits((hi[..., None] - begin).clamp(0, 64)) & ~low_bits((lo[..., None] - begin).clamp(0, 64))
    return Words(words, a.Lk)


def pack(visible: Tensor) -> Words:
    """Words of a bool tensor [B|1, H|1, rows|1, Lk]."""
    Lk = visible.shape[-1]
    if Lk == 0:
        return Words(visible.long(), 0)
    padded = torch.nn.functional.pad(visible, (0, -Lk % 64)).contiguous()
    # Multiplication wraps around, which torch's int64 does; the arithmetic shift is masked.
    eighths = (padded.view(torch.uint8).view(torch.int64) * _PACK >> 56) & 255
    return Words(eighths.to(torch.uint8).view(torch.int64), Lk)


def unpack(words: Tensor, Lk: int) -> Tensor:
    """bool [..., Lk] of words int64 [..., ceil(Lk / 64)]."""
    eighths = words.contiguous().view(torch.uint8)[..., None]
    bits = (eighths >> torch.arange(8, dtype=torch.uint8, device=words.device)) & 1
    return bits.flatten(-2)[..., :Lk].bool()


def to_bool(a: Rows) -> Tensor:
    """bool [B|1, H|1, rows|1, Lk]."""
    return unpack(to_words(a).words, a.Lk)


def text(visible: Tensor) -> str:
    """bool [Lq, Lk] as one line per query: '#' visible, '.' hidden."""
    return "\n".join("".join("#" if seen else "." for seen in row) for row in visible.tolist())


def visible_keys(a: Rows) -> int:
    """How many (row, key) pairs are visible."""
    if isinstance(a, Intervals):
        return int((a.hi.long() - a.lo).sum())
    # Sums of 2, 4 and 8 bits side by side; masks drop what the arithmetic shifts pull in.
    n = a.words - ((a.words >> 1) & 0x5555555555555555)
    n = (n & 0x3333333333333333) + ((n >> 2) & 0x3333333333333333)
    n = (n + (n >> 4)) & 0x0F0F0F0F0F0F0F0F
    return int(((n * 0x0101010101010101 >> 56) & 255).sum())
