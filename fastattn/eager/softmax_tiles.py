"""One call of softmax attention cut into tiles of torch tensors: what is visible, logits, and their derivative."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ..params import SoftmaxParams, SoftmaxTensors, accumulate_dtype
from ..philox import keep_mask

TILE_ELEMENTS = 1 << 21
TILE_K = 512
BAND_ROWS = 256


class Logits(NamedTuple):
    z: Tensor  # logits over `Problem.factor`, -inf where hidden
    visible: Optional[Tensor]  # None: everything is
    damp: Optional[Tensor]  # derivative of the softcap; None: 1


class Problem:
    """Tensors of one call in the accumulation dtype, cut into tiles."""

    def __init__(self, x: SoftmaxTensors, params: SoftmaxParams):
        self.x, self.params = x, params
        self.B, self.Hq, self.Lq, self.D = x.q.shape
        self.Hk, self.Lk, self.Dv = x.k.shape[1], x.k.shape[2], x.v.shape[3]
        self.wide = accumulate_dtype(x.q.dtype)
        self.lo, self.hi = params.band(self.Lq, self.Lk)
        # Scaled after the largest score is taken off, large scores that are nearly equal keep their differences. Not by a
        # scale that rounds to 0: hidden scores are -inf.
        late = x.bias is None and x.slopes is None and x.sinks is None and not params.softcap
        late = late and abs(params.scale) >= torch.finfo(self.wide).tiny
        self.before: float = math.copysign(1.0, params.scale) if late else params.scale
        self.factor: float = abs(params.scale) if late else 1.0
        self.empty = x.q.numel() == 0 and 0 in x.q.shape[:3] or self.Lk == 0
        # Where tiles are skipped, short ones: fewer are touched in part.
        skips = self.lo is not None or self.hi is not None or x.plan is not None
        most_rows = min(max(self.Lq, 1), BAND_ROWS) if skips else max(self.Lq, 1)
        self.rows = self._whole_tiles(min(most_rows, self._rows_of(min(TILE_K, self.Lk))))
        self.columns = self._whole_tiles(TILE_K)
        self._planned: tuple[int, Optional[Tensor]] = (-1, None)
        self.seen = None if self.empty else self._seen_keys()

    def _rows_of(self, keys: int) -> int:
        """As many rows as make a tile of these keys."""
        return max(16, TILE_ELEMENTS // (max(1, self.B * self.Hq) * max(1, keys)))

    def _whole_tiles(self, n: int) -> int:
        """n rounded down to tiles of the plan, at least one."""
        tile = 1 if self.x.plan is None else self.x.plan.tile
        return max(tile, n // tile * tile)

    def take_all_keys(self) -> None:
        """From here on q_tiles are so short that the whole key_range of each makes one tile."""
        widest = max((j1 - j0 for j0, j1 in (self.key_range(*ends) for ends in self.q_tiles())), default=1)
        self.rows = self._whole_tiles(min(self.rows, self._rows_of(widest)))
        self._planned = (-1, None)

    def q_tiles(self) -> Iterator[tuple[int, int]]:
        return ((i, min(i + self.rows, self.Lq)) for i in range(0, self.Lq, self.rows))

    def key_range(self, i0: int, i1: int) -> tuple[int, int]:
        """Keys the band leaves to queries i0 .. i1 - 1, from the start of a tile of the plan on."""
        first = 0 if self.lo is None else min(max(0, i0 + self.lo), self.Lk)
        last = self.Lk if self.hi is None else max(min(self.Lk, i1 + self.hi), 0)
        return (first if self.x.plan is None else first // self.x.plan.tile * self.x.plan.tile), last

    def k_tiles(self, i0: int, i1: int) -> Iterator[tuple[int, int]]:
        first, last = self.key_range(i0, i1)
        for j in range(first, last, self.columns):
            end = min(j + self.columns, last)
            if self.x.plan is None or bool((self._tiles(i0, i1, j, end) != -2).any()):
                yield j, end

    def _tiles(self, i0: int, i1: int, j0: int, j1: int) -> Tensor:
        """int32 [B|1, Hq|1, query tiles, key tiles] of the plan; i0 and j0 are multiples of its tile."""
        plan = self.x.plan
        assert plan is not None
        first, rows = self._planned
        if rows is None or first != i0:
            rows = plan.tiles(i0 // plan.tile, -(-i1 // plan.tile))
            self._planned = (i0, rows)
        return rows[..., j0 // plan.tile : -(-j1 // plan.tile)]

    def visible(self, i0: int, i1: int, j0: int, j1: int) -> Optional[Tensor]:
        """bool, broadcastable to [B, Hq, i1 - i0, j1 - j0]; None when everything is visible."""
        found = None
        if (self.lo is not None and j0 - (i1 - 1) < self.lo) or (self.hi is not None and j1 - 1 - i0 > self.hi):
            offset = self._arange(j0, j1) - self._arange(i0, i1)[:, None]
            found = torch.ones_like(offset, dtype=torch.bool)
            if self.lo is not None:
                found &= offset >= self.lo
            if self.hi is not None:
                found &= offset <= self.hi
            found = found[None, None]
        sources = []
        if self.x.mask is not None:
            sources.append(cut(self.x.mask, i0, i1, j0, j1))
        if self.x.plan is not None:
            tiles = self._tiles(i0, i1, j0, j1)
            if bool((tiles != -1).any()):
                sources.append(self.x.plan.bits_of(tiles)[:, :, : i1 - i0, : j1 - j0])
        if self.x.bias is not None:
            sources.append(cut(self.x.bias, i0, i1, j0, j1) != -torch.inf)
        for source in sources:
            found = source if found is None else found & source
        return found

    def _arange(self, start: int, end: int) -> Tensor:
        return torch.arange(start, end, device=self.x.q.device)

    def _seen_keys(self) -> Optional[Tensor]:
        """bool [B|1, Hk|1, Lk, 1]: keys some query sees; the others may hold NaN and are read as zero."""
        plan, sources = self.x.plan, [t for t in (self.x.mask, self.x.bias) if t is not None]
        if not sources and plan is None and self.lo is None and self.hi is None:
            return None
        B = max([t.shape[0] for t in sources] + [1 if plan is None else plan.batches])
        H = max([t.shape[1] for t in sources] + [1 if plan is None else plan.heads])
        seen = torch.zeros(B, H, self.Lk, dtype=torch.bool, device=self.x.q.device)
        for i0, i1 in self.q_tiles():
            for j0, j1 in self.k_tiles(i0, i1):
                found = self.visible(i0, i1, j0, j1)
                seen[:, :, j0:j1] |= True if found is None else found.any(2).expand(B, H, j1 - j0)
        if H > 1:
            seen = seen.view(B, self.Hk, H // self.Hk, self.Lk).any(2)
        return seen[..., None]

    def keys(self, x: Tensor, j0: int, j1: int) -> Tensor:
        part = x[:, :, j0:j1].to(self.wide)
        return part if self.seen is None else part.masked_fill(~self.seen[:, :, j0:j1], 0)

    def logits(self, q: Tensor, k: Tensor, i0: int, i1: int, j0: int, j1: int) -> Logits:
        z = times(self.heads_by(q, k.transpose(-1, -2)), self.before)
        z, damp = self.cap(z)
        visible = self.visible(i0, i1, j0, j1)
        if self.x.bias is not None:
            z = z + cut(self.x.bias, i0, i1, j0, j1).to(self.wide)
        if self.x.slopes is not None:
            z = z - self.x.slopes[:, :, None, None] * self.distance(i0, i1, j0, j1)
        return Logits(z if visible is None else z.masked_fill(~visible, -torch.inf), visible, damp)

    def cap(self, z: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        """(softcap of z, its derivative)."""
        if not self.params.softcap:
            return z, None
        limits = torch.finfo(self.wide)
        c = min(max(self.params.softcap, limits.tiny), limits.max)
        t = torch.tanh(z / c)
        return c * t, 1 - t * t

    def distance(self, i0: int, i1: int, j0: int, j1: int) -> Tensor:
        """|i + diagonal[i] - j| [i1 - i0, j1 - j0]."""
        shift = self.Lk - self.Lq if self.x.diagonal is None else self.x.diagonal[i0:i1, None]
        return (self._arange(i0, i1)[:, None] + shift - self._arange(j0, j1)).abs().to(self.wide)

    def start(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(top, total) of the online softmax before the first key: a sink is a key that comes before all others."""
        shape = (*rows.shape[:3], 1)
        if self.x.sinks is None:
            return rows.new_full(shape, -torch.inf), rows.new_zeros(shape)
        sinks = self.x.sinks[:, None, None].expand(shape)
        return sinks, (sinks != -torch.inf).to(rows.dtype)

    def heads_by(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, Hq, m, n] times y [B, Hk, n, p], query head h with kv head h // (Hq / Hk)."""
        B, Hq, m, n = x.shape
        return (x.reshape(B, self.Hk, Hq // self.Hk * m, n) @ y).view(B, Hq, m, y.shape[-1])

    def heads_reduce(self, x: Tensor, y: Tensor) -> Tensor:
        """sum over the group of x^T y: x [B, Hq, m, n], y [B, Hq, m, p] -> [B, Hk, n, p]."""
        B, Hq, m, n = x.shape
        shape = (B, self.Hk, Hq // self.Hk * m)
        return x.reshape(*shape, n).transpose(-1, -2) @ y.reshape(*shape, y.shape[-1])

    def keep(self, i0: int, i1: int, j0: int, j1: int) -> Optional[Tensor]:
        p = self.params.dropout_p
        if p == 0:
            return None
        kept = keep_mask(self.x.rng, p, self.B, self.Hq, (i0, i1), (j0, j1))
        return kept.to(self.wide) * (0.0 if p == 1 else 1 / (1 - p))


def times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def cut(t: Tensor, i0: int, i1: int, j0: int, j1: int) -> Tensor:
    """The tile of a [B|1, H|1, Lq|1, Lk|1] tensor."""
    rows = t if t.shape[2] == 1 else t[:, :, i0:i1]
    return rows if t.shape[3] == 1 else rows[..., j0:j1]
