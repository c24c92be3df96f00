"""Masks as expressions: frozen nodes, closed under &, | and ~, that know what each query row sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
from torch import Tensor

from . import data
from .plan import TilePlan, build_plan, visible_pairs
from .rows import TILE, Rows, Step, complement, intersect, most_intervals, to_bool, unite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.nn.attention.flex_attention import BlockMask

MAX_LENGTH = 2**31 - 65
_PLANS = 16  # plans kept by a mask: a few lengths on a few devices
_DEPTH = 100  # of nested &, | and ~, which are worked on by recursion
_STRETCH = 2**16  # intervals or words that are in memory at once

_kinds: dict[str, type[Mask]] = {}


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """Which keys each query may see. Combine masks with `&`, `|` and `~`; they are values: equal data, equal mask.

    A mask has no lengths of its own unless its pattern fixes them; `to_dense`, `density`, `plan` and `plot` take them.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # A pattern of a user cannot take the name of one of ours, whichever is loaded first.
        ours = cls.__module__.startswith(f"{__package__}.")
        if not cls.__name__.startswith("_") and (ours or cls.__name__ not in _kinds):
            _kinds[cls.__name__] = cls

    _depth = 0

    # What a pattern defines.

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        """What queries i0 .. i1 - 1 see; Lq and Lk have passed `refuse_lengths`."""
        raise NotImplementedError

    def interval_bound(self, Lq: int, Lk: int) -> int:
        """An upper bound of intervals per row; over most_intervals(Lk), rows may come as bits."""
        return 1

    def program(self, Lq: int, Lk: int, i0: int, i1: int) -> list[Step]:
        """The same for the native builder, in whatever form is short: it combines tiles, not rows."""
        return [self.rows(Lq, Lk, i0, i1)]

    def program_width(self, Lq: int, Lk: int) -> int:
        """About how many intervals or words `program` takes for each query."""
        return self._row_width(Lq, Lk)

    def refuse_lengths(self, Lq: int, Lk: int) -> None:
        """ValueError, naming both, if the pattern fixes other lengths."""

    @property
    def shape(self) -> tuple[int, int]:
        """(batches, heads); 1 holds for all."""
        return 1, 1

    # What all masks can do.

    def __and__(self, other: Mask) -> Mask:
        return And(_joined(And, self, other)) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Or(_joined(Or, self, other)) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return self.mask if isinstance(self, Not) else Not(self)

    def to_dense(self, Lq: int, Lk: int, rows: Optional[Tensor] = None) -> Tensor:
        """bool [batches, heads, Lq, Lk], True = visible; of some queries alone where int `rows` [n] names them.

        O(Lq Lk) or O(n Lk) memory: for tests and small sizes. Errors: ValueError for rows that are not there.
        """
        self._refuse(Lq, Lk)
        with data.plainly():
            if rows is None:
                dense = torch.empty((*self.shape, Lq, Lk), dtype=torch.bool)
                for i0, i1, seen in self._stretches(Lq, Lk):
                    dense[:, :, i0:i1] = to_bool(seen)
                return dense
            dense = torch.empty((*self.shape, len(rows), Lk), dtype=torch.bool)
            for n, i in enumerate(rows.tolist()):
                if not 0 <= i < Lq:
                    raise ValueError(f"rows must be from 0 to {Lq - 1}, got {i}")
                dense[:, :, n : n + 1] = to_bool(self.rows(Lq, Lk, i, i + 1))
        return dense

    def density(self, Lq: int, Lk: int) -> float:
        """The visible share of all (query, key) pairs, over batches and heads; 0 where there is no pair."""
        self._refuse(Lq, Lk)
        pairs = self.shape[0] * self.shape[1] * Lq * Lk
        if not pairs:
            return 0.0
        with data.plainly():
            return visible_pairs(self, Lq, Lk) / pairs

    def plan(self, Lq: int, Lk: int, tile: int = TILE, device: Union[str, torch.device] = "cpu") -> TilePlan:
        """The tiles a kernel visits (see `TilePlan`), kept for the lengths and devices used last. tile is 64.

        Errors: ValueError for lengths that the pattern does not allow, or another tile.
        """
        if tile != TILE:
            raise ValueError(f"tile must be {TILE}, got {tile!r}")
        plan = self.__dict__.get("_plans", {}).get((Lq, Lk, str(device)))
        return data.uncompiled(Mask._new_plan)(self, Lq, Lk, device) if plan is None else plan

    def _new_plan(self, Lq: int, Lk: int, device: Union[str, torch.device]) -> TilePlan:
        self._refuse(Lq, Lk)
        plans = self._plans
        with data.plainly():
            plan = plans.get((Lq, Lk, "cpu")) or build_plan(self, Lq, Lk)
            plan = plan.to(device)
        for oldest in list(plans)[: 1 + len(plans) - _PLANS]:
            plans.pop(oldest, None)
        plans[Lq, Lk, str(device)] = plan
        return plan

    def picture(self, Lq: int, Lk: int, batch: int = 0, head: int = 0) -> str:
        """Text, one line per query: '#' visible, '.' hidden. For lengths up to 128; `plot` has no limit."""
        from .plot import picture

        return picture(self, Lq, Lk, batch, head)

    def plot(self, Lq: int, Lk: int, batch: int = 0, head: int = 0, ax: Optional[Axes] = None) -> Axes:
        """Draws full, partial and empty tiles, and this slice's density. Needs matplotlib: pip install fastattn[plot]."""
        from .plot import plot

        return plot(self, Lq, Lk, batch, head, ax)

    def to_flex(self, Lq: int, Lk: int, block_size: int = 128, device: Union[str, torch.device] = "cpu") -> BlockMask:
        """torch.nn.attention.flex_attention.BlockMask of the same pairs; block_size is a multiple of 64."""
        from .flex import to_flex

        return to_flex(self, Lq, Lk, block_size, device)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: {"kind": name, field: value, ...}, nested for &, | and ~. `from_dict` reads it back."""
        return {"kind": type(self).__name__, **{f.name: _encode(getattr(self, f.name)) for f in fields(self)}}

    @staticmethod
    def from_dict(stored: dict[str, Any]) -> Mask:
        """The mask of `to_dict`. Every value is checked as by the constructor: ValueError or TypeError if it is malformed."""
        if not isinstance(stored, dict) or not isinstance(stored.get("kind"), str):
            raise ValueError(f'a stored mask is a dict with the key "kind", got {type(stored).__name__}')
        from . import grids, patterns, sequences  # noqa: F401  # their patterns can be read from here on

        cls = _kinds.get(stored["kind"])
        if cls is None:
            raise ValueError(f"unknown mask {stored['kind']!r}; known: {', '.join(sorted(_kinds))}")
        names = {f.name for f in fields(cls)}
        if set(stored) != {"kind", *names}:
            raise ValueError(f"{stored['kind']} is stored with the keys {sorted(names)}, got {sorted(stored)}")
        try:
            with data.plainly():
                return cls(**{name: _decode(stored[name]) for name in names})
        except RecursionError:
            raise ValueError(f"a stored mask nests up to {_DEPTH} deep") from None

    def __eq__(self, other: object) -> bool:
        """Equal expressions with equal data. Two expressions of the same pairs may differ."""
        if not isinstance(other, Mask):
            return NotImplemented
        return type(self) is type(other) and all(
            data.same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)
        )

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        values = [(getattr(self, f.name), f.default) for f in fields(self)]
        while values and data.same(*values[-1]):
            values.pop()
        parts = [data.show(value) for value, _ in values]
        return f"{type(self).__name__}({', '.join(parts)})"

    @cached_property
    def slices(self) -> tuple[int, int]:
        """`shape`, worked out once."""
        return self.shape

    @cached_property
    def _plans(self) -> dict[tuple[int, int, str], TilePlan]:
        return {}

    def _refuse(self, Lq: int, Lk: int) -> None:
        for name, length in (("Lq", Lq), ("Lk", Lk)):
            if isinstance(length, bool) or not isinstance(length, int):
                raise TypeError(f"{name} must be an int, got {length!r}")
            if not 0 <= length <= MAX_LENGTH:
                raise ValueError(f"{name} must be in 0 .. {MAX_LENGTH}, got {length}")
        self.refuse_lengths(Lq, Lk)

    def _stretches(self, Lq: int, Lk: int) -> Iterator[tuple[int, int, Rows]]:
        """(i0, i1, rows) for whole tiles of queries, as many at once as fit a small piece of memory."""
        for i0, i1 in _cuts(Lq, self._row_width(Lq, Lk)):
            yield i0, i1, self.rows(Lq, Lk, i0, i1)

    def _programs(self, Lq: int, Lk: int) -> Iterator[tuple[int, int, list[Step]]]:
        for i0, i1 in _cuts(Lq, self.program_width(Lq, Lk)):
            yield i0, i1, self.program(Lq, Lk, i0, i1)

    def _row_width(self, Lq: int, Lk: int) -> int:
        bound = self.interval_bound(Lq, Lk)
        return self.shape[0] * self.shape[1] * (bound if bound <= most_intervals(Lk) else -(-Lk // 64))


def _cuts(Lq: int, width: int) -> Iterator[tuple[int, int]]:
    step = TILE * max(1, _STRETCH // max(width, 1) // TILE)
    for i0 in range(0, Lq, step):
        yield i0, min(i0 + step, Lq)


def _joined(kind: type[Union[And, Or]], a: Mask, b: Mask) -> tuple[Mask, ...]:
    """The operands of a flat conjunction or disjunction."""
    return (*(a.masks if isinstance(a, kind) else (a,)), *(b.masks if isinstance(b, kind) else (b,)))


def _nest(mask: Mask, inner: tuple[Mask, ...]) -> None:
    depth = 1 + max(m._depth for m in inner)
    if depth > _DEPTH:
        raise ValueError(
            f"masks nest up to {_DEPTH} deep, each change between &, | and ~ counted; use dense or intervals"
        )
    object.__setattr__(mask, "_depth", depth)


@dataclass(frozen=True, eq=False, repr=False)
class _Combined(Mask):
    """Of `masks`, whose batches and heads broadcast."""

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.masks, tuple) or not self.masks or not all(isinstance(m, Mask) for m in self.masks):
            raise TypeError(f"{type(self).__name__} takes masks, got {self.masks!r}")
        _nest(self, self.masks)
        for sizes, name in zip(zip(*(mask.slices for mask in self.masks)), ("batches", "heads")):
            found = sorted(set(sizes) - {1})
            if len(found) > 1:
                raise ValueError(f"masks of {' and '.join(map(str, found))} {name} do not broadcast: {self!r}")

    @property
    def shape(self) -> tuple[int, int]:
        batches, heads = (next((n for n in sizes if n != 1), 1) for sizes in zip(*(m.slices for m in self.masks)))
        return batches, heads

    def refuse_lengths(self, Lq: int, Lk: int) -> None:
        for mask in self.masks:
            mask.refuse_lengths(Lq, Lk)

    def program_width(self, Lq: int, Lk: int) -> int:
        return sum(mask.program_width(Lq, Lk) for mask in self.masks)

    def _combined(self, how: str, Lq: int, Lk: int, i0: int, i1: int) -> list[Step]:
        first, *others = (mask.program(Lq, Lk, i0, i1) for mask in self.masks)
        return first + [step for other in others for step in (*other, how)]

    def _grouped(self, group: type[_Combined]) -> list[str]:
        return [f"({mask!r})" if isinstance(mask, group) else repr(mask) for mask in self.masks]


@dataclass(frozen=True, eq=False, repr=False)
class And(_Combined):
    """Visible in every one of `masks`."""

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        first, *others = (mask.rows(Lq, Lk, i0, i1) for mask in self.masks)
        for rows in others:
            first = intersect(first, rows)
        return first

    def program(self, Lq: int, Lk: int, i0: int, i1: int) -> list[Step]:
        return self._combined("intersect", Lq, Lk, i0, i1)

    def interval_bound(self, Lq: int, Lk: int) -> int:
        return sum(mask.interval_bound(Lq, Lk) - 1 for mask in self.masks) + 1

    def __repr__(self) -> str:
        return " & ".join(self._grouped(Or))


@dataclass(frozen=True, eq=False, repr=False)
class Or(_Combined):
    """Visible in at least one of `masks`."""

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        first, *others = (mask.rows(Lq, Lk, i0, i1) for mask in self.masks)
        for rows in others:
            first = unite(first, rows)
        return first

    def program(self, Lq: int, Lk: int, i0: int, i1: int) -> list[Step]:
        return self._combined("unite", Lq, Lk, i0, i1)

    def interval_bound(self, Lq: int, Lk: int) -> int:
        return sum(mask.interval_bound(Lq, Lk) for mask in self.masks)

    def __repr__(self) -> str:
        return " | ".join(self._grouped(And))


@dataclass(frozen=True, eq=False, repr=False)
class Not(Mask):
    """Visible where `mask` hides."""

    mask: Mask

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Mask):
            raise TypeError(f"Not takes a mask, got {self.mask!r}")
        _nest(self, (self.mask,))

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape

    def refuse_lengths(self, Lq: int, Lk: int) -> None:
        self.mask.refuse_lengths(Lq, Lk)

    def interval_bound(self, Lq: int, Lk: int) -> int:
        return self.mask.interval_bound(Lq, Lk) + 1

    def rows(self, Lq: int, Lk: int, i0: int, i1: int) -> Rows:
        return complement(self.mask.rows(Lq, Lk, i0, i1))

    def program(self, Lq: int, Lk: int, i0: int, i1: int) -> list[Step]:
        return [*self.mask.program(Lq, Lk, i0, i1), "complement"]

    def program_width(self, Lq: int, Lk: int) -> int:
        return self.mask.program_width(Lq, Lk)

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, _Combined) else f"~{self.mask!r}"


def _encode(value: Any) -> Any:
    if isinstance(value, Mask):
        return value.to_dict()
    if isinstance(value, tuple) and any(isinstance(v, Mask) for v in value):
        return [v.to_dict() for v in value]
    return data.encode(value)


def _decode(value: Any) -> Any:
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        return tuple(Mask.from_dict(v) for v in value)
    return Mask.from_dict(value) if isinstance(value, dict) and "kind" in value else data.decode(value)
