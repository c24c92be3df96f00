"""Patterns on a grid: blocks, BigBird, dilated windows, global tokens, neighbourhoods of images and volumes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Optional, Union

import torch
from torch import Tensor

from ..checks import window_sides
from ..philox import philox4x32
from . import data
from .algebra import Mask
from .patterns import refuse_length, window
from .rows import (
    Intervals,
    Lists,
    Multiples,
    Rows,
    Step,
    Words,
    compact,
    intersect,
    intervals_of,
    lists_of,
    most_intervals,
    pack,
    settle,
    sweep,
    table_of,
    take,
)

Side = Optional[int]


@dataclass(frozen=True, eq=False, repr=False)
class global_tokens(Mask):
    """Key j is visible if it is a global token, and to every query that is one; query i is token i + Lk - Lq.

    tokens: ints >= 0. Errors: TypeError; ValueError for negative tokens, or tokens >= Lk once lengths are known.
    """

    tokens: data.Ints

    def __post_init__(self) -> None:
        tokens = data.integers("tokens", self.tokens, (1,)).unique()
        if len(tokens) and int(tokens[0]) < 0:
            raise ValueError(f"tokens must be at least 0, got {int(tokens[0])}")
        object.__setattr__(self, "tokens", tokens)

    def refuse_lengths(self, Lq: int, Lk: int) -> None:
        if len(self.tokens) and int(self.tokens[-1]) >= Lk:
            raise ValueError(f"{self!r} has token {int(self.tokens[-1])}, it cannot be used with Lk = {Lk}")

    def interval_bound(self, Lq: int, Lk: int) -> int:
        return int((self.tokens.diff() > 1).sum()) + 1

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        table = self._tables.get(Lk)
        if table is None:
            visible = torch.stack((torch.zeros(Lk, dtype=torch.bool), torch.ones(Lk, dtype=torch.bool)))
            visible[0, self.tokens.long()] = True
            table = table_of(visible[None, None])
            self._tables.clear()
            self._tables[Lk] = table
        is_global = torch.isin(torch.arange(i0, i1) + Lk - Lq, self.tokens)
        return take(table, is_global.long())

    def program_width(self, Lq: int, Lk: int) -> int:
        return 1

    def program(self, Lq: int, Lk: int, i0: int, i1: int) -> list[Step]:
        gap = self.tokens.diff() > 1
        lo = torch.cat((self.tokens[:1], self.tokens[1:][gap], torch.tensor([0])))
        hi = torch.cat((self.tokens[:-1][gap] + 1, self.tokens[-1:] + 1, torch.tensor([Lk])))
        is_global = torch.isin(torch.arange(i0, i1) + Lk - Lq, self.tokens)
        others = len(lo) - 1
        start = (is_global * others).to(torch.int32).view(1, 1, -1, 1)
        end = (is_global + others).to(torch.int32).view(1, 1, -1, 1)
        return [Lists(start, end, lo.to(torch.int32), hi.to(torch.int32), Lk)]

    @cached_property
    def _tables(self) -> dict[int, Rows]:
        """For the length used last, what other and what global tokens see."""
        return {}


@dataclass(frozen=True, eq=False, repr=False)
class dilated(Mask):
    """Key j is visible iff d = j - (i + Lk - Lq) is a multiple of `step` and -left <= d <= right.

    within: (left, right) in tokens, an int for both, or None for no limit. Errors: TypeError, ValueError for step < 1.
    """

    step: int
    within: Union[int, tuple[Side, Side], None] = None

    def __post_init__(self) -> None:
        data.whole("step", self.step, 1)
        sides = self._sides
        object.__setattr__(self, "within", None if sides == (None, None) else sides)

    @property
    def _sides(self) -> tuple[Side, Side]:
        return window_sides((self.within, self.within) if isinstance(self.within, int) else self.within)

    def interval_bound(self, Lq: int, Lk: int) -> int:
        left, right = self._sides
        reach = Lk if left is None or right is None else min(Lk, left + right + 1)
        return 1 if self.step == 1 else reach // self.step + 1

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        band = window(*self._sides).rows(Lq, Lk, i0, i1)
        assert isinstance(band, Intervals)
        if self.step == 1:
            return band
        at, most = torch.arange(i0, i1) + Lk - Lq, self.interval_bound(Lq, Lk)
        if most <= most_intervals(Lk):
            first = band.lo + (at[:, None] - band.lo) % self.step
            keys = first + self.step * torch.arange(most)
            return compact(keys, torch.where(keys < band.hi, keys + 1, keys), Lk)
        # The keys of a row depend on its place modulo step alone.
        residues, index = (at % self.step).unique(return_inverse=True)
        multiples = pack((torch.arange(Lk) % self.step == residues[:, None])[None, None])
        return intersect(take(multiples, index), band)

    def program_width(self, Lq: int, Lk: int) -> int:
        return 1

    def program(self, Lq: int, Lk: int, i0: int, i1: int) -> list[Step]:
        step = min(self.step, Lq + Lk + 1)  # longer ones reach no other key either
        multiples: list[Step] = [] if self.step == 1 else [Multiples(step, Lk - Lq, Lk)]
        if multiples and self.within is None:
            return multiples
        return [window(*self._sides).rows(Lq, Lk, i0, i1), *multiples, *(["intersect"] if multiples else [])]


def strided(step: int) -> Mask:
    """The strided pattern of Sparse Transformers (Child et al. 2019): |d| <= step, or d a multiple of step.

    d = j - (i + Lk - Lq). Theirs is `strided(step) & causal()`; for the columns alone take `dilated(step)`.
    """
    return window(step, step) | dilated(step)


def longformer(left_right: Union[int, tuple[Side, Side]], tokens: data.Ints = (), step: int = 1) -> Mask:
    """A sliding window, dilated by `step`, and global tokens (Beltagy et al. 2020)."""
    local = dilated(step, left_right)
    band = window(*local._sides) if step == 1 else local
    tokens = data.integers("tokens", tokens, (1,))
    return band | global_tokens(tokens) if len(tokens) else band


def _scaled(table: Rows, visible: Tensor, size: int, Lk: int) -> Rows:
    """Rows over blocks of `size` keys as rows over keys."""
    if isinstance(table, Intervals):
        return _scaled_intervals(table, size, Lk)
    return pack(visible.repeat_interleave(size, -1)[..., :Lk])


def _scaled_intervals(table: Intervals, size: int, Lk: int) -> Intervals:
    lo, hi = ((ends.long() * size).clamp(max=Lk).to(torch.int32) for ends in (table.lo, table.hi))
    return Intervals(lo, hi, Lk)


@dataclass(frozen=True, eq=False, repr=False)
class blocks(Mask):
    """Key j is visible to query i iff visible[.., i // block_q, j // block_k].

    visible: bool [nq, nk], [B, nq, nk] or [B, H, nq, nk]. block_size: int, or (block_q, block_k). Lengths must need
    exactly nq and nk blocks. Errors: TypeError, ValueError.
    """

    visible: Tensor
    block_size: Union[int, tuple[int, int]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "visible", data.bools("visible", self.visible, (2, 3, 4)))
        sizes = (self.block_size,) * 2 if isinstance(self.block_size, int) else self.block_size
        if not isinstance(sizes, (tuple, list)) or len(sizes) != 2:
            raise TypeError(f"block_size must be an int or (block_q, block_k), got {self.block_size!r}")
        bq, bk = (data.whole("block_size", size, 1) for size in sizes)
        object.__setattr__(self, "block_size", bq if bq == bk else (bq, bk))

    @property
    def _sizes(self) -> tuple[int, int]:
        return (self.block_size, self.block_size) if isinstance(self.block_size, int) else self.block_size

    @property
    def shape(self) -> tuple[int, int]:
        return data.batch_heads(self.visible, 2)

    def refuse_lengths(self, Lq: int, Lk: int) -> None:
        needed = [-(-length // size) for length, size in zip((Lq, Lk), self._sizes)]
        if needed != list(self.visible.shape[-2:]):
            raise ValueError(
                f"{self!r} has {list(self.visible.shape[-2:])} blocks of {self._sizes}, but Lq = {Lq} and Lk = {Lk} "
                f"need {needed}"
            )

    def interval_bound(self, Lq: int, Lk: int) -> int:
        changes = (self.visible[..., 1:] & ~self.visible[..., :-1]).sum(-1)
        return int(changes.max()) + 1 if changes.numel() else 1

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        bq, bk = self._sizes
        visible = data.leading(self.visible, 2)[:, :, i0 // bq : -(-i1 // bq)]
        table = _scaled(table_of(visible), visible, bk, Lk)
        return take(table, torch.arange(i0, i1) // bq - i0 // bq)

    def program_width(self, Lq: int, Lk: int) -> int:
        return self.slices[0] * self.slices[1] * -(-self.visible.shape[-1] // self._sizes[0])

    def program(self, Lq: int, Lk: int, i0: int, i1: int) -> list[Step]:
        bq, bk = self._sizes
        table = intervals_of(data.leading(self.visible, 2)[:, :, i0 // bq : -(-i1 // bq)])
        return [lists_of(_scaled_intervals(table, bk, Lk), torch.arange(i0, i1) // bq - i0 // bq)]


@dataclass(frozen=True, eq=False, repr=False)
class bigbird(Mask):
    """Blocks near the diagonal, global blocks and random ones (Zaheer et al. 2020), on blocks of `block_size` tokens.

    With query i at token i + Lk - Lq, block I of queries sees block J of keys iff |I - J| <= near, or I or J is below
    global_blocks, or J is one of random_blocks different blocks drawn for (head, I) from `seed` by Philox: the same
    on every machine. heads: how many heads draw blocks of their own. Errors: TypeError, ValueError.
    """

    block_size: int
    near: int = 1
    global_blocks: int = 2
    random_blocks: int = 3
    seed: int = 0
    heads: int = 1

    def __post_init__(self) -> None:
        for name, least in (("block_size", 1), ("near", 0), ("global_blocks", 0), ("random_blocks", 0), ("heads", 1)):
            data.whole(name, getattr(self, name), least)
        data.whole("seed", self.seed, 0, 2**64 - 1)

    @property
    def shape(self) -> tuple[int, int]:
        return 1, self.heads

    def interval_bound(self, Lq: int, Lk: int) -> int:
        return 2 + self.random_blocks

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        lo, hi, index = self._blocks(Lq, Lk, i0, i1)
        return take(settle(lo, hi, Lk), index)

    def program_width(self, Lq: int, Lk: int) -> int:
        return self.heads * -(-self.interval_bound(Lq, Lk) // self.block_size)

    def program(self, Lq: int, Lk: int, i0: int, i1: int) -> list[Step]:
        lo, hi, index = self._blocks(Lq, Lk, i0, i1)
        return [lists_of(sweep(lo, hi, Lk), index)]

    def _blocks(self, Lq: int, Lk: int, i0: int, i1: int) -> tuple[Tensor, Tensor, Tensor]:
        """Intervals lo, hi of blocks of queries, [1, heads, n, 2 + random blocks], and each query's block among them."""
        block = (torch.arange(i0, i1) + Lk - Lq) // self.block_size  # rounded down, also below 0
        I, n = torch.arange(int(block[0]), int(block[-1]) + 1), -(-Lk // self.block_size)
        fixed = torch.where((I >= 0) & (I < self.global_blocks), n, self.global_blocks)
        ends = torch.stack((I - self.near, I + 1 + self.near, torch.zeros_like(I), fixed), -1)
        lo, hi = ends.expand(self.heads, -1, -1).unflatten(-1, (2, 2)).unbind(-1)
        drawn = self._drawn(I, n)
        lo, hi = (
            (torch.cat(parts, -1).clamp(0, n) * self.block_size).clamp(max=Lk)[None]
            for parts in ((lo, drawn), (hi, drawn + 1))
        )
        return lo, hi, block - block[0]

    def _drawn(self, I: Tensor, n: int) -> Tensor:
        """Different blocks of 0 .. n - 1 for each head and query block: int64 [heads, len(I), min(random_blocks, n)]."""
        count = min(self.random_blocks, n)
        shape = (self.heads, len(I), count)
        at = [
            x.expand(shape)
            for x in (I[:, None] & 0xFFFFFFFF, torch.arange(count), torch.arange(self.heads)[:, None, None])
        ]
        low, high = (torch.tensor(self.seed >> shift & 0xFFFFFFFF) for shift in (0, 32))
        uniform = philox4x32((at[0], at[1], at[2], torch.zeros(shape, dtype=torch.int64)), (low, high))[0]
        drawn = torch.empty(shape, dtype=torch.int64)
        # Floyd's way: the last candidate stands in for one that is taken, so every subset is equally likely.
        for draw, last in enumerate(range(n - count, n)):
            found = uniform[..., draw] * (last + 1) >> 32
            taken = (drawn[..., :draw] == found[..., None]).any(-1)
            drawn[..., draw] = torch.where(taken, last, found)
        return drawn


@dataclass(frozen=True, eq=False, repr=False)
class neighborhood(Mask):
    """Neighbourhood attention (Hassani et al. 2023) over tokens that are the points of a grid, last dimension fastest.

    In each dimension a point sees `kernel` points at distances that are multiples of `dilation`, itself in the middle
    (one more before than after for an even kernel); near a border the window is moved inside, so that every point
    sees as many. shape: (L,), (H, W) or (T, H, W). kernel, dilation: int, or one for each dimension.
    Fixes Lq = Lk = the number of points. Errors: TypeError; ValueError where kernel * dilation exceeds a dimension.
    """

    grid: tuple[int, ...]
    kernel: Union[int, tuple[int, ...]]
    dilation: Union[int, tuple[int, ...]] = 1

    def __post_init__(self) -> None:
        if not isinstance(self.grid, (tuple, list)) or not 1 <= len(self.grid) <= 3:
            raise TypeError(f"grid must be (L,), (H, W) or (T, H, W), got {self.grid!r}")
        object.__setattr__(self, "grid", self._each("grid", self.grid))
        for name in ("kernel", "dilation"):
            values = self._each(name, getattr(self, name))
            object.__setattr__(self, name, values[0] if len(set(values)) == 1 else values)
        for size, kernel, dilation in self._dimensions:
            if kernel * dilation > size:
                raise ValueError(
                    f"{self!r}: kernel * dilation = {kernel * dilation} does not fit a dimension of {size}"
                )

    def _each(self, name: str, value: Any) -> tuple[int, ...]:
        values = (value,) * len(self.grid) if isinstance(value, int) else value
        if not isinstance(values, (tuple, list)) or len(values) != len(self.grid):
            raise TypeError(f"{name} must be an int or {len(self.grid)} ints, got {value!r}")
        return tuple(data.whole(name, v, 1) for v in values)

    @property
    def _dimensions(self) -> list[tuple[int, int, int]]:
        """(size, kernel, dilation) of each dimension."""
        return list(zip(self.grid, self._each("kernel", self.kernel), self._each("dilation", self.dilation)))

    @property
    def _points(self) -> int:
        return math.prod(self.grid)

    def refuse_lengths(self, Lq: int, Lk: int) -> None:
        refuse_length(self, "Lq", Lq, self._points)
        refuse_length(self, "Lk", Lk, self._points)

    def interval_bound(self, Lq: int, Lk: int) -> int:
        *outer, (_, kernel, dilation) = self._dimensions
        bound = kernel if dilation > 1 else 1
        for _, k, _ in outer:
            bound *= k
        return bound

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        if self.interval_bound(Lq, Lk) > most_intervals(Lk):
            return self._bits(i0, i1)
        first = torch.zeros(i1 - i0, 1, dtype=torch.int64)
        width, _, dilation = self._dimensions[-1]
        length = self._dimensions[-1][1] if dilation == 1 else 1  # of an interval
        for d, (at, (size, kernel, dilation)) in enumerate(zip(self._places(i0, i1), self._dimensions), 1):
            some = torch.arange(0, kernel, length if d == len(self.grid) else 1) * dilation
            reached = _nearest(at, size, kernel, dilation)[:, None] + some
            first = (first[:, :, None] * size + reached[:, None]).flatten(1)
        lo = first[None, None]
        hi = lo + length
        # In order; they touch only where the last dimension is seen whole.
        return settle(lo, hi, Lk) if length == width else Intervals(lo.to(torch.int32), hi.to(torch.int32), Lk)

    def _places(self, i0: int, i1: int) -> list[Tensor]:
        """The coordinates of tokens i0 .. i1 - 1."""
        i, places = torch.arange(i0, i1), []
        for size in reversed(self.grid):
            places.append(i % size)
            i = i // size
        return places[::-1]

    def _bits(self, i0: int, i1: int) -> Words:
        visible = torch.ones(i1 - i0, 1, dtype=torch.bool)
        for at, (size, kernel, dilation) in zip(self._places(i0, i1), self._dimensions):
            nearest = _nearest(at, size, kernel, dilation)[:, None]
            away = torch.arange(size) - nearest
            near = (away >= 0) & (away < kernel * dilation) & (away % dilation == 0)
            visible = (visible[:, :, None] & near[:, None]).flatten(1)
        return pack(visible[None, None])


def _nearest(at: Tensor, size: int, kernel: int, dilation: int) -> Tensor:
    """The first of the `kernel` points that each point of one dimension sees."""
    residue, place = at % dilation, at // dilation
    points = (size - residue + dilation - 1) // dilation  # of the same residue
    return torch.minimum((place - kernel // 2).clamp(min=0), points - kernel) * dilation + residue
