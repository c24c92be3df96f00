"""Patterns of few intervals per row: bands, prefixes, padding, explicit intervals, and the dense escape."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Optional

import torch
from torch import Tensor

from ..checks import window_sides
from ..params import CAUSAL_BOTTOM_RIGHT, CAUSAL_TOP_LEFT
from . import data
from .algebra import Mask
from .rows import TILE, Rows, Words, all_keys, interval, most_intervals, pack, settle, table_of, visible_keys


def queries(i0: int, i1: int) -> Tensor:
    """int64 [1, 1, i1 - i0]."""
    return torch.arange(i0, i1)[None, None]


def refuse_length(pattern: Mask, name: str, length: int, fixed: int) -> None:
    if length != fixed:
        raise ValueError(f"{pattern!r} fixes {name} = {fixed}, it cannot be used with {name} = {length}")


@dataclass(frozen=True, eq=False, repr=False)
class full(Mask):
    """Every query sees every key."""

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        end = torch.full((1, 1, 1), Lk)
        return interval(torch.zeros_like(end), end, Lk)


@dataclass(frozen=True, eq=False, repr=False)
class empty(Mask):
    """No query sees any key: legal, attention gives zeros."""

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        end = torch.zeros(1, 1, 1, dtype=torch.int64)
        return interval(end, end, Lk)


@dataclass(frozen=True, eq=False, repr=False)
class causal(Mask):
    """Key j is visible to query i iff j <= i + Lk - Lq ("bottom_right", the convention of decoding) or j <= i ("top_left").

    Both are the same where Lq == Lk. Errors: ValueError for another alignment.
    """

    alignment: str = CAUSAL_BOTTOM_RIGHT

    def __post_init__(self) -> None:
        if self.alignment not in (CAUSAL_BOTTOM_RIGHT, CAUSAL_TOP_LEFT):
            raise ValueError(f'alignment must be "bottom_right" or "top_left", got {self.alignment!r}')

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        end = queries(i0, i1) + 1 + (Lk - Lq if self.alignment == CAUSAL_BOTTOM_RIGHT else 0)
        return interval(torch.zeros_like(end), end, Lk)


@dataclass(frozen=True, eq=False, repr=False)
class window(Mask):
    """Key j is visible to query i iff -left <= j - (i + Lk - Lq) <= right.

    left, right: ints >= 0, or None for unbounded. Errors: TypeError, ValueError for anything else.
    """

    left: Optional[int]
    right: Optional[int] = None

    def __post_init__(self) -> None:
        for name, side in zip(("left", "right"), window_sides((self.left, self.right))):
            object.__setattr__(self, name, side)

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        at = queries(i0, i1) + Lk - Lq
        first = torch.zeros_like(at) if self.left is None else at - self.left
        end = torch.full_like(at, Lk) if self.right is None else at + 1 + self.right
        return interval(first, end, Lk)


@dataclass(frozen=True, eq=False, repr=False)
class prefix(Mask):
    """Keys j < n are visible to every query; `causal() | prefix(n)` is the prefix-LM mask.

    n: int, or int tensor [B] or [B, H]. Errors: TypeError; ValueError for n < 0, or n > Lk once lengths are known.
    """

    n: data.Ints

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", _lengths("n", self.n, (0, 1, 2)))

    @property
    def shape(self) -> tuple[int, int]:
        return data.batch_heads(self.n, 0)

    def refuse_lengths(self, Lq: int, Lk: int) -> None:
        _refuse_beyond(self, self.n, Lk)

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        n = data.leading(self.n, 0)[..., None]
        return interval(torch.zeros_like(n), n, Lk)


@dataclass(frozen=True, eq=False, repr=False)
class key_padding(Mask):
    """Hides padding keys from every query of their sequence.

    keys: int [B] or [B, H], the number of keys that are real, from key 0 on; or bool [Lk], [B, Lk] or [B, H, Lk], True
    for real keys, which fixes Lk. Errors: TypeError for other dtypes; ValueError for lengths outside 0 .. Lk.
    """

    keys: data.Ints

    def __post_init__(self) -> None:
        keys = data.owned("keys", self.keys, (1, 2, 3))
        if keys.dtype != torch.bool:
            keys = _lengths("keys", keys, (1, 2))
        object.__setattr__(self, "keys", keys)

    @property
    def shape(self) -> tuple[int, int]:
        return data.batch_heads(self.keys, 1 if self.keys.dtype == torch.bool else 0)

    def refuse_lengths(self, Lq: int, Lk: int) -> None:
        if self.keys.dtype == torch.bool:
            refuse_length(self, "Lk", Lk, self.keys.shape[-1])
        else:
            _refuse_beyond(self, self.keys, Lk)

    def interval_bound(self, Lq: int, Lk: int) -> int:
        return self.rows(Lq, Lk, 0, 1)[0].shape[-1] if self.keys.dtype == torch.bool else 1

    def program_width(self, Lq: int, Lk: int) -> int:
        return self.slices[0] * self.slices[1]

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        if self.keys.dtype == torch.bool:
            return self._row
        end = data.leading(self.keys, 0)[..., None]
        return interval(torch.zeros_like(end), end, Lk)

    @cached_property
    def _row(self) -> Rows:
        return table_of(data.leading(self.keys, 1)[:, :, None])


@dataclass(frozen=True, eq=False, repr=False)
class intervals(Mask):
    """Query i sees the keys of lo[i, r] <= j < hi[i, r] for any r: the explicit form of any mask of few intervals.

    lo, hi: int [Lq, R], [B, Lq, R] or [B, H, Lq, R], in any order, overlapping or empty; Lq may be 1 for "all queries".
    Errors: TypeError; ValueError for shapes that differ, lo < 0, hi < lo, or hi > Lk once lengths are known.
    """

    lo: data.Ints
    hi: data.Ints

    def __post_init__(self) -> None:
        lo, hi = data.integers("lo", self.lo, (2, 3, 4)), data.integers("hi", self.hi, (2, 3, 4))
        if lo.shape != hi.shape or lo.shape[-1] == 0:
            raise ValueError(
                f"lo and hi must have one shape [.., Lq, R], R >= 1: lo {list(lo.shape)}, hi {list(hi.shape)}"
            )
        if bool((lo < 0).any()) or bool((hi < lo).any()):
            raise ValueError("intervals need 0 <= lo <= hi")
        object.__setattr__(self, "lo", lo)
        object.__setattr__(self, "hi", hi)

    @property
    def shape(self) -> tuple[int, int]:
        return data.batch_heads(self.lo, 2)

    def refuse_lengths(self, Lq: int, Lk: int) -> None:
        if self.lo.shape[-2] != 1:
            refuse_length(self, "Lq", Lq, self.lo.shape[-2])
        _refuse_beyond(self, self.hi, Lk)

    def interval_bound(self, Lq: int, Lk: int) -> int:
        return self.lo.shape[-1]

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        lo, hi = (data.leading(t, 2) for t in (self.lo, self.hi))
        if lo.shape[2] > 1:
            lo, hi = lo[:, :, i0:i1], hi[:, :, i0:i1]
        return settle(lo, hi, Lk)


@dataclass(frozen=True, eq=False, repr=False)
class packed_bits(Mask):
    """What `dense` makes: a bool tensor with 64 keys a word. words: int64 [B|1, H|1, Lq|1, ceil(Lk / 64)]."""

    words: Tensor
    Lk: int

    def __post_init__(self) -> None:
        words, Lk = data.owned("words", self.words, (4,)), data.whole("Lk", self.Lk, 0)
        if words.dtype != torch.int64 or words.shape[-1] != -(-Lk // TILE):
            raise ValueError(f"words must be int64 [B, H, Lq, {-(-Lk // TILE)}], got {words.dtype} {list(words.shape)}")
        if bool((words & ~all_keys(Lk)).any()):
            raise ValueError(f"words have bits past key {Lk}")
        object.__setattr__(self, "words", words)

    @property
    def shape(self) -> tuple[int, int]:
        return data.batch_heads(self.words, 2)

    def refuse_lengths(self, Lq: int, Lk: int) -> None:
        if self.words.shape[2] != 1:
            refuse_length(self, "Lq", Lq, self.words.shape[2])
        refuse_length(self, "Lk", Lk, self.Lk)

    def interval_bound(self, Lq: int, Lk: int) -> int:
        return most_intervals(Lk) + 1

    def program_width(self, Lq: int, Lk: int) -> int:
        return 1  # nothing is copied

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        return Words(self.words if self.words.shape[2] == 1 else self.words[:, :, i0:i1], Lk)

    def __repr__(self) -> str:
        B, H, Lq, _ = self.words.shape
        return f"dense(<bool {B}x{H}x{Lq}x{self.Lk}, {self._visible} visible>)"

    @cached_property
    def _visible(self) -> int:
        return visible_keys(Words(self.words, self.Lk))


def dense(visible: Tensor) -> Mask:
    """Any pattern at all, one bit a pair: bool [Lq, Lk], [B, Lq, Lk] or [B, H, Lq, Lk]; Lq may be 1 for "all queries".

    It fixes the lengths. `from_dense` looks for structure first. Errors: TypeError for other dtypes, ValueError.
    """
    visible = data.leading(data.bools("visible", visible, (2, 3, 4)), 2)
    with data.plainly():
        return packed_bits(pack(visible).words, visible.shape[-1])


def _lengths(name: str, value: Any, dims: tuple[int, ...]) -> Tensor:
    lengths = data.integers(name, value, dims)
    if bool((lengths < 0).any()):
        raise ValueError(f"{name} must be at least 0, got {int(lengths.min())}")
    return lengths


def _refuse_beyond(pattern: Mask, ends: Tensor, Lk: int) -> None:
    longest = int(ends.max()) if ends.numel() else 0
    if longest > Lk:
        raise ValueError(f"{pattern!r} reaches key {longest}, it cannot be used with Lk = {Lk}")
