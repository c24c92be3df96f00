"""Patterns over several sequences in one: documents, packed sequences, and trees of drafts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Union

import torch
from torch import Tensor

from ..checks import Window, causal_mode, window_sides
from ..params import CAUSAL_NONE, CAUSAL_TOP_LEFT
from . import data
from .algebra import Mask
from .patterns import refuse_length
from .rows import Lists, Rows, Step, compact, interval, most_intervals, pack


@dataclass(frozen=True, eq=False, repr=False)
class documents(Mask):
    """Key j is visible to query i iff ids_q[i] == ids_k[j].

    ids_q, ids_k: int [L], [B, L] or [B, H, L]; ids in any order, a document may come in several pieces. Without ids_k
    the keys have the ids of the queries. Fixes both lengths. Errors: TypeError for a dtype that is not integer;
    ValueError for shapes that do not broadcast.
    """

    ids_q: data.Ints
    ids_k: data.Ints = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids_q", data.integers("ids_q", self.ids_q, (1, 2, 3)))
        if self.ids_k is not None:
            object.__setattr__(self, "ids_k", data.integers("ids_k", self.ids_k, (1, 2, 3)))
            sizes = (data.batch_heads(ids, 1) for ids in (self.ids_q, self.ids_k))
            if any(a != b and 1 not in (a, b) for a, b in zip(*sizes)):
                raise ValueError(
                    f"ids_q {list(self.ids_q.shape)} and ids_k {list(self.ids_k.shape)} must agree but for the length"
                )

    @property
    def _ids(self) -> tuple[Tensor, Tensor]:
        """[B, H, Lq] and [B, H, Lk]."""
        q = data.leading(self.ids_q, 1)
        k = q if self.ids_k is None else data.leading(self.ids_k, 1)
        B, H = (k.shape[d] if q.shape[d] == 1 else q.shape[d] for d in (0, 1))
        return q.expand(B, H, -1), k.expand(B, H, -1)

    @property
    def shape(self) -> tuple[int, int]:
        batches, heads = self._ids[0].shape[:2]
        return batches, heads

    def refuse_lengths(self, Lq: int, Lk: int) -> None:
        q, k = self._ids
        refuse_length(self, "Lq", Lq, q.shape[-1])
        refuse_length(self, "Lk", Lk, k.shape[-1])

    def interval_bound(self, Lq: int, Lk: int) -> int:
        return max([1, *(int(pieces.many.max()) for pieces in self._pieces if len(pieces.many))])

    @cached_property
    def _pieces(self) -> list[_Pieces]:
        """Of each slice."""
        q, k = self._ids
        return [_pieces(ids_q, ids_k) for ids_q, ids_k in zip(q.flatten(0, 1), k.flatten(0, 1))]

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        q, k = self._ids
        most = self.interval_bound(Lq, Lk)
        if most > most_intervals(Lk):
            return pack(q[:, :, i0:i1, None] == k[:, :, None])
        i = torch.arange(i0, i1)
        bounds = torch.full((2, len(self._pieces), len(i), most), Lk, dtype=torch.int32)
        for s, pieces in enumerate(self._pieces):
            run = torch.searchsorted(pieces.starts, i, right=True) - 1
            place = torch.arange(most)
            used = place < pieces.many[run, None]
            bounds[:, s, used] = pieces.bounds[:, (pieces.first[run, None] + place)[used]]
        lo, hi = bounds.view(2, *q.shape[:2], len(i), most)
        return compact(lo, hi, Lk)

    def program_width(self, Lq: int, Lk: int) -> int:
        return len(self._pieces)

    def program(self, Lq: int, Lk: int, i0: int, i1: int) -> list[Step]:
        q, i, before = self._ids[0], torch.arange(i0, i1), 0
        lists = torch.empty(2, len(self._pieces), len(i), dtype=torch.int32)
        for s, pieces in enumerate(self._pieces):
            run = torch.searchsorted(pieces.starts, i, right=True) - 1
            lists[0, s] = pieces.first[run] + before
            lists[1, s] = lists[0, s] + pieces.many[run]
            before += pieces.bounds.shape[1]
        start, end = lists.view(2, *q.shape[:2], len(i), 1)
        lo, hi = self._bounds
        return [Lists(start, end, lo, hi, Lk)]

    @cached_property
    def _bounds(self) -> Tensor:
        nothing = torch.zeros(2, 0, dtype=torch.int32)
        return torch.cat([nothing, *(pieces.bounds for pieces in self._pieces)], 1)


def _runs(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where runs of equal ids start, and their ids."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    torch.ne(ids[1:], ids[:-1], out=begins[1:])
    starts = begins.nonzero()[:, 0]
    return starts, ids[starts]


class _Pieces(NamedTuple):
    """Run r of equal query ids begins at starts[r] and sees many[r] key intervals, from bounds[:, first[r]] on."""

    starts: Tensor
    first: Tensor
    many: Tensor
    bounds: Tensor  # int32 [2, pieces]: lo, hi


def _pieces(ids_q: Tensor, ids_k: Tensor) -> _Pieces:
    starts_q, of_q = _runs(ids_q)
    starts_k, of_k = _runs(ids_k)
    ends_k = torch.cat((starts_k[1:], torch.tensor([len(ids_k)])))[: len(starts_k)]
    of_k, order = of_k.sort(stable=True)
    first = torch.searchsorted(of_k, of_q)
    many = torch.searchsorted(of_k, of_q, right=True) - first
    return _Pieces(starts_q, first, many, torch.stack((starts_k, ends_k)).to(torch.int32)[:, order])


@dataclass(frozen=True, eq=False, repr=False)
class from_cu_seqlens(Mask):
    """Packed sequences: sequence s holds queries cu_q[s] <= i < cu_q[s + 1] and keys cu_k[s] <= j < cu_k[s + 1].

    Queries see keys of their own sequence; `causal` and `window` mean the same as in attention, inside each sequence.
    cu_q, cu_k: int [S + 1] from 0 to Lq and Lk, not decreasing (empty sequences are legal); cu_k defaults to cu_q.
    causal: False, True ("bottom_right"), "top_left" or "bottom_right". window: None or (left, right).
    Fixes both lengths. Errors: TypeError for a dtype that is not integer; ValueError for offsets that do not start
    with 0, decrease, or differ in number.
    """

    cu_q: data.Ints
    cu_k: data.Ints = None
    causal: Union[bool, str] = False
    window: Window = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cu_q", _offsets("cu_q", self.cu_q))
        if self.cu_k is not None:
            object.__setattr__(self, "cu_k", _offsets("cu_k", self.cu_k))
            if len(self.cu_q) != len(self.cu_k):
                raise ValueError(
                    f"cu_q and cu_k must hold equally many sequences: {len(self.cu_q)} and {len(self.cu_k)}"
                )
        mode, sides = causal_mode(self.causal), window_sides(self.window)
        object.__setattr__(self, "causal", False if mode == CAUSAL_NONE else mode)
        object.__setattr__(self, "window", None if sides == (None, None) else sides)

    def refuse_lengths(self, Lq: int, Lk: int) -> None:
        refuse_length(self, "Lq", Lq, int(self.cu_q[-1]))
        refuse_length(self, "Lk", Lk, int((self.cu_q if self.cu_k is None else self.cu_k)[-1]))

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        cu_q = self.cu_q.long()
        cu_k = cu_q if self.cu_k is None else self.cu_k.long()
        i = torch.arange(i0, i1)
        s = torch.searchsorted(cu_q, i, right=True) - 1
        lo, hi = cu_k[s], cu_k[s + 1]
        top_left = i - cu_q[s] + cu_k[s]  # the key in the same place of the sequence
        diagonal = top_left + cu_k.diff()[s] - cu_q.diff()[s]
        if self.window is not None:
            left, right = self.window
            lo = lo if left is None else torch.maximum(lo, diagonal - left)
            hi = hi if right is None else torch.minimum(hi, diagonal + right + 1)
        if self.causal:
            hi = torch.minimum(hi, (top_left if self.causal == CAUSAL_TOP_LEFT else diagonal) + 1)
        return interval(lo[None, None], hi[None, None], Lk)

    def __repr__(self) -> str:
        parts = [data.show(self.cu_q)] + ([] if self.cu_k is None else [data.show(self.cu_k)])
        parts += [f"causal={self.causal!r}"] if self.causal else []
        parts += [f"window={self.window!r}"] if self.window else []
        return f"from_cu_seqlens({', '.join(parts)})"


def _offsets(name: str, value: data.Ints) -> Tensor:
    cu = data.integers(name, value, (1,))
    if len(cu) == 0 or int(cu[0]) != 0:
        raise ValueError(f"{name} must start with 0, got {data.show(cu)}")
    if bool((cu.diff() < 0).any()):
        raise ValueError(f"{name} must not decrease, got {data.show(cu)}")
    return cu


@dataclass(frozen=True, eq=False, repr=False)
class tree(Mask):
    """Speculative decoding: each node of a tree of draft tokens sees itself, its ancestors and the context before them.

    parents: int [n], the parent of each node, -1 for a root; nodes in any order. context: the keys before the tree.
    Query i is node i, key context + j is node j: fixes Lq = n and Lk = context + n.
    Errors: TypeError; ValueError for parents out of range or in a cycle.
    """

    parents: data.Ints
    context: int = 0

    def __post_init__(self) -> None:
        parents = data.integers("parents", self.parents, (1,))
        object.__setattr__(self, "parents", parents)
        data.whole("context", self.context, 0)
        if bool((parents < -1).any()) or bool((parents >= len(parents)).any()):
            raise ValueError(f"parents must be -1 or a node from 0 to {len(parents) - 1}, got {data.show(parents)}")
        if bool((self._visits < 0).any()):
            raise ValueError(f"parents have a cycle: {data.show(parents)}")

    @cached_property
    def _visits(self) -> Tensor:
        """int32 [2, n]: when a walk in depth enters each node and leaves it; -1 where no root leads to it."""
        children: list[list[int]] = [[] for _ in range(len(self.parents) + 1)]
        for node, parent in enumerate(self.parents.tolist()):
            children[parent].append(node)  # -1 is the last list
        enter, leave = ([-1] * len(self.parents) for _ in range(2))
        stack, clock = list(children[-1]), 0
        while stack:
            node = stack.pop()
            if node < 0:
                leave[~node] = clock
                continue
            enter[node], clock = clock, clock + 1
            stack.append(~node)
            stack += children[node]
        return torch.tensor([enter, leave], dtype=torch.int32, device="cpu")

    def refuse_lengths(self, Lq: int, Lk: int) -> None:
        refuse_length(self, "Lq", Lq, len(self.parents))
        refuse_length(self, "Lk", Lk, self.context + len(self.parents))

    def interval_bound(self, Lq: int, Lk: int) -> int:
        return most_intervals(Lk) + 1

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        enter, leave = self._visits
        at = enter[i0:i1, None]
        ancestor = (enter <= at) & (at < leave)
        return pack(torch.nn.functional.pad(ancestor, (self.context, 0), value=True)[None, None])
