"""Tile plans: which 64 x 64 tiles of the scores a kernel visits, as tensors that pass through torch.compile."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, Optional, Union

import torch
from torch import Tensor

from . import data
from .plan_torch import plan_tensors
from .rows import TILE, Rows, pack, text, unpack, visible_keys

if TYPE_CHECKING:
    from .algebra import Mask

REPR_LIMIT = 32  # lengths up to which a plan prints what the first batch and head see


class TilePlan(NamedTuple):
    """For each slice (batch, head) and query tile the key tiles to visit, and the transpose. Empty tiles do not exist.

    A list of tiles is a range of entries (first tile, count, bits): bits = -1 is `count` neighbouring full tiles,
    bits >= 0 one partial tile whose rows are words[bits]. Entries are sorted by tile. Query tile t of slice s has the
    entries row_start[s * q_tiles + t] to row_start[s * q_tiles + t + 1] of `rows`; columns hold query tiles likewise.
    Bit j of a word is key j of the tile. Keys past Lk are 0 there and make no tile partial; rows past Lq repeat the
    last one. Equal partial tiles are stored once, numbered as they first appear in `rows`.
    """

    row_start: Tensor  # int32 [slices * q_tiles + 1]
    rows: Tensor  # int32 [n, 3]
    column_start: Tensor  # int32 [slices * k_tiles + 1]
    columns: Tensor  # int32 [m, 3]
    words: Tensor  # int64 [partial tiles, 64]
    row_order: Tensor  # int32 [slices, q_tiles]: tiles with most to visit first, equal ones in order
    column_order: Tensor  # int32 [slices, k_tiles]
    batches: int
    heads: int
    Lq: int
    Lk: int
    tile: int

    def to(self, device: Union[str, torch.device]) -> TilePlan:
        """The same plan with its tensors on `device`."""
        return _plan(tuple(field.to(device) for field in self if isinstance(field, Tensor)), *self[7:11])

    @property
    def nbytes(self) -> int:
        return sum(field.nbytes for field in self if isinstance(field, Tensor))

    def tensors(self) -> list[Tensor]:
        """The seven tensors, the orders as [batches, heads, tiles]: `of` makes the same plan of them."""
        row_start, rows, column_start, columns, words, *orders = self[:7]
        row_order, column_order = (x.view(self.batches, self.heads, x.shape[1]) for x in orders)
        return [row_start, rows, column_start, columns, words, row_order, column_order]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], Lq: int, Lk: int) -> TilePlan:
        row_start, rows, column_start, columns, words, row_order, column_order = tensors
        batches, heads = row_order.shape[:2]
        orders = row_order.flatten(0, 1), column_order.flatten(0, 1)
        return cls(row_start, rows, column_start, columns, words, *orders, batches, heads, Lq, Lk, TILE)

    def tiles(self, t0: int = 0, t1: Optional[int] = None) -> Tensor:
        """int32 [batches, heads, t1 - t0, k_tiles] of query tiles t0 to t1: -2 empty, -1 full, else the index of the words."""
        slices, q_tiles = self.row_order.shape
        k_tiles = self.column_order.shape[1]
        t1 = q_tiles if t1 is None else t1
        starts, ends = (
            x.long().view(slices, q_tiles)[:, t0:t1].flatten() for x in (self.row_start[:-1], self.row_start[1:])
        )
        list_of_entry, at = _spread(ends - starts)
        first, count, bits = self.rows[starts[list_of_entry] + at].long().unbind(1)
        entry, at = _spread(count)
        tiles = torch.full((len(starts), k_tiles), -2, device=entry.device, dtype=torch.int32)
        tiles[list_of_entry[entry], first[entry] + at] = bits[entry].to(torch.int32)
        return tiles.view(self.batches, self.heads, t1 - t0, k_tiles)

    def bits_of(self, tiles: Tensor) -> Tensor:
        """bool [batches, heads, 64 * query tiles, 64 * key tiles] of some of `tiles`."""
        B, H, q_tiles, k_tiles = tiles.shape
        ones = torch.full((1, TILE), -1, dtype=torch.int64, device=tiles.device)
        # Indices -2 and -1, empty and full, count from the end.
        table = torch.cat((self.words, torch.zeros_like(ones), ones))
        bits = unpack(table[tiles.long()][..., None], TILE)  # [B, H, q_tiles, k_tiles, 64, 64]
        return bits.transpose(3, 4).reshape(B, H, q_tiles * TILE, k_tiles * TILE)

    def to_dense(self) -> Tensor:
        """bool [batches, heads, Lq, Lk], from the plan's tensors alone."""
        return self.bits_of(self.tiles())[:, :, : self.Lq, : self.Lk].contiguous()

    def __repr__(self) -> str:
        sizes = (
            f"TilePlan({self.batches} x {self.heads}, Lq {self.Lq}, Lk {self.Lk}: {len(self.rows)} runs, "
            f"{len(self.words)} bit tiles, {self.nbytes} bytes on {self.rows.device})"
        )
        small = max(self.Lq, self.Lk) <= REPR_LIMIT and type(self.rows) is Tensor and self.rows.is_cpu
        return f"{sizes}\n{text(self.to_dense()[:1, :1].flatten(0, 2))}".rstrip() if small else sizes


def _spread(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For counts[i] items each: (i of every item, its number within i)."""
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return owner, torch.arange(len(owner), device=counts.device) - (counts.cumsum(0) - counts)[owner]


def build_plan(mask: Mask, Lq: int, Lk: int, native: bool = True) -> TilePlan:
    """By the native core if there is one, else (or if not `native`) by torch, from rows in place of programs."""
    core, (B, H) = _core() if native else None, mask.slices
    if core is None:
        tensors = plan_tensors(mask._stretches(Lq, Lk), B, H, Lq, Lk)
    else:
        tensors = core.plan_of_programs(mask._programs(Lq, Lk), B, H, Lq, Lk)
    return _plan(tensors, B, H, Lq, Lk)


def visible_pairs(mask: Mask, Lq: int, Lk: int, native: bool = True) -> int:
    """How many (query, key) pairs are visible, over batches and heads."""
    core, (B, H) = _core() if native else None, mask.slices
    if core is not None:
        return core.visible_pairs(mask._programs(Lq, Lk), B, H, Lq, Lk)
    stretches = mask._stretches(Lq, Lk)
    return sum(visible_keys(rows) * (B * H * (i1 - i0) // rows[0].shape[:3].numel()) for i0, i1, rows in stretches)


def plan_from_dense(visible: Tensor, Lq: int, Lk: int, native: bool = True) -> TilePlan:
    """The plan of a CPU bool tensor [B|1, H|1, Lq|1, Lk|1], read once; batches and heads that it expands count as one."""
    B, H = (min(visible.shape[d], 1) if visible.stride(d) == 0 else visible.shape[d] for d in (0, 1))
    visible = visible[:B, :H]
    core = _core() if native else None
    if core is None:
        own_rows = visible.shape[2] > 1

        def rows(i: int) -> Rows:
            return pack((visible[:, :, i : i + TILE] if own_rows else visible).expand(-1, -1, -1, Lk))

        stretches = ((i, min(i + TILE, Lq), rows(i)) for i in range(0, Lq, TILE))
        with data.plainly():
            tensors = plan_tensors(stretches, B, H, Lq, Lk)
    else:
        tensors = core.plan_of_mask(visible, Lq, Lk)
    return _plan(tensors, B, H, Lq, Lk)


def refuse_malformed(plan: TilePlan) -> None:
    """ValueError or TypeError if reading it would go wrong; on other devices, or without a native core, nobody looks."""
    core = _core()
    if core is not None and (not isinstance(plan.rows, Tensor) or plan.rows.is_cpu):
        core._C.check_plan(plan)


def _plan(tensors: tuple[Tensor, ...], batches: int, heads: int, Lq: int, Lk: int) -> TilePlan:
    row_start, rows, column_start, columns, words, row_order, column_order = tensors
    return TilePlan(
        row_start, rows, column_start, columns, words, row_order, column_order, batches, heads, Lq, Lk, TILE
    )


def _core() -> Optional[ModuleType]:
    """The one door to the native library: imported at the first plan, None where it is missing."""
    import fastattn.backends.native as native

    return native if native.status() is None else None
