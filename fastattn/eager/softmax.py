"""Tiled online softmax (Milakov & Gimelshein 2018, Dao et al. 2022) in plain torch; backward recomputes the weights.

Memory beyond inputs and outputs is O(L): a tile holds at most TILE_ELEMENTS scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor

from ..params import SoftmaxParams, accumulate_dtype, empty_like_layout
from ..philox import keep_mask

TILE_ELEMENTS = 1 << 21
TILE_K = 512
BAND_ROWS = 256


class _Problem:
    """Tensors of one call in the accumulation dtype, cut into tiles."""

    def __init__(self, q, k, v, mask, bias, rng, params: SoftmaxParams):
        self.q, self.k, self.v, self.mask, self.bias, self.rng, self.params = q, k, v, mask, bias, rng, params
        self.B, self.Hq, self.Lq, self.D = q.shape
        self.Hk, self.Lk, self.Dv = k.shape[1], k.shape[2], v.shape[3]
        self.wide = accumulate_dtype(q.dtype)
        self.lo, self.hi = params.band(self.Lq, self.Lk)
        # Scaled after the largest score is taken off, large scores that are nearly equal keep their differences. Not by a
        # scale that rounds to 0: hidden scores are -inf.
        late = bias is None and abs(params.scale) >= torch.finfo(self.wide).tiny
        self.before: float = math.copysign(1.0, params.scale) if late else params.scale
        self.factor: float = abs(params.scale) if late else 1.0
        self.empty = q.numel() == 0 and 0 in q.shape[:3] or self.Lk == 0
        heads = max(1, self.B * self.Hq)
        # Under a band, short tiles: what lies outside is skipped by whole tiles.
        most_rows = max(self.Lq, 1) if self.lo is None and self.hi is None else min(max(self.Lq, 1), BAND_ROWS)
        self.rows = max(16, min(most_rows, TILE_ELEMENTS // (heads * min(TILE_K, max(self.Lk, 1)))))
        self.seen = None if self.empty else self._seen_keys()

    def q_tiles(self) -> Iterator[tuple[int, int]]:
        return ((i, min(i + self.rows, self.Lq)) for i in range(0, self.Lq, self.rows))

    def key_range(self, i0: int, i1: int) -> tuple[int, int]:
        first = 0 if self.lo is None else max(0, i0 + self.lo)
        last = self.Lk if self.hi is None else min(self.Lk, i1 + self.hi)
        return min(first, self.Lk), max(last, 0)

    def k_tiles(self, i0: int, i1: int) -> Iterator[tuple[int, int]]:
        first, last = self.key_range(i0, i1)
        return ((j, min(j + TILE_K, last)) for j in range(first, last, TILE_K))

    def visible(self, i0: int, i1: int, j0: int, j1: int) -> Optional[Tensor]:
        """bool, broadcastable to [B, Hq, i1 - i0, j1 - j0]; None when everything is visible."""
        found = None
        if (self.lo is not None and j0 - (i1 - 1) < self.lo) or (self.hi is not None and j1 - 1 - i0 > self.hi):
            offset = torch.arange(j0, j1, device=self.q.device) - torch.arange(i0, i1, device=self.q.device)[:, None]
            found = torch.ones_like(offset, dtype=torch.bool)
            if self.lo is not None:
                found &= offset >= self.lo
            if self.hi is not None:
                found &= offset <= self.hi
            found = found[None, None]
        if self.mask is not None:
            mask = cut(self.mask, i0, i1, j0, j1)
            found = mask if found is None else found & mask
        if self.bias is not None:
            finite = cut(self.bias, i0, i1, j0, j1) != -torch.inf
            found = finite if found is None else found & finite
        return found

    def _seen_keys(self) -> Optional[Tensor]:
        """bool [B|1, Hk|1, Lk, 1]: keys some query sees; the others may hold NaN and are read as zero."""
        if self.mask is None and self.bias is None and self.lo is None and self.hi is None:
            return None
        sources = [t for t in (self.mask, self.bias) if t is not None]
        B = max([t.shape[0] for t in sources], default=1)
        H = max([t.shape[1] for t in sources], default=1)
        seen = torch.zeros(B, H, self.Lk, dtype=torch.bool, device=self.q.device)
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

    def scores(self, q: Tensor, k: Tensor, i0: int, i1: int, j0: int, j1: int) -> tuple[Tensor, Optional[Tensor]]:
        """z / factor of one tile with hidden entries -inf, and the visibility that was applied."""
        z = times(self.heads_by(q, k.transpose(-1, -2)), self.before)
        visible = self.visible(i0, i1, j0, j1)
        if self.bias is not None:
            z = z + cut(self.bias, i0, i1, j0, j1).to(self.wide)
        return (z if visible is None else z.masked_fill(~visible, -torch.inf)), visible

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
        kept = keep_mask(self.rng, p, self.B, self.Hq, (i0, i1), (j0, j1))
        return kept.to(self.wide) * (0.0 if p == 1 else 1 / (1 - p))


def times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def cut(t: Tensor, i0: int, i1: int, j0: int, j1: int) -> Tensor:
    """The tile of a [B|1, H|1, Lq|1, Lk|1] tensor."""
    rows = t if t.shape[2] == 1 else t[:, :, i0:i1]
    return rows if t.shape[3] == 1 else rows[..., j0:j1]


def softmax_forward(
    q, k, v, mask, bias, rng, params: SoftmaxParams, with_parts: bool
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    problem = _Problem(q, k, v, mask, bias, rng, params)
    out = empty_like_layout(q, v.shape[3])
    lse = torch.full(q.shape[:3], -torch.inf, dtype=problem.wide, device=q.device)
    parts = None
    if with_parts:
        parts = torch.stack((torch.zeros_like(lse), lse), -1)
    if problem.empty:
        return out.zero_(), lse, parts
    for i0, i1 in problem.q_tiles():
        rows = q[:, :, i0:i1].to(problem.wide)
        total = rows.new_zeros(*rows.shape[:3], 1)
        top = torch.full_like(total, -torch.inf)
        acc = rows.new_zeros(*rows.shape[:3], v.shape[3])
        for j0, j1 in problem.k_tiles(i0, i1):
            z, _ = problem.scores(rows, problem.keys(k, j0, j1), i0, i1, j0, j1)
            new_top = torch.maximum(top, z.amax(-1, keepdim=True))
            base = new_top.masked_fill(new_top == -torch.inf, 0)
            p = torch.exp(times(z - base, problem.factor))
            decay = torch.exp(times(top - base, problem.factor))
            total = total * decay + p.sum(-1, keepdim=True)
            keep = problem.keep(i0, i1, j0, j1)
            acc = acc * decay + problem.heads_by(p if keep is None else p * keep, problem.keys(v, j0, j1))
            top = new_top
        nothing = top == -torch.inf
        out[:, :, i0:i1] = torch.where(nothing, 0, acc / total)
        top, log_total = top.masked_fill(nothing, 0), total.log()
        lse[:, :, i0:i1] = (times(top, problem.factor) + log_total).squeeze(-1)
        if parts is not None:
            parts[:, :, i0:i1] = torch.cat((top, log_total), -1)
    return out, lse, parts


def softmax_backward(dout, dlse, q, k, v, mask, bias, rng, out, parts, params: SoftmaxParams, needs):
    problem = _Problem(q, k, v, mask, bias, rng, params)
    wide = problem.wide
    dq, dk, dv = (empty_like_layout(t, t.shape[3], wide).zero_() if need else None for t, need in zip((q, k, v), needs))
    dbias = torch.zeros(bias.shape, dtype=wide, device=q.device) if needs[3] else None
    for i0, i1 in () if problem.empty else problem.q_tiles():
        rows, drows = q[:, :, i0:i1].to(wide), dout[:, :, i0:i1].to(wide)
        delta = (drows * out[:, :, i0:i1].to(wide)).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - dlse[:, :, i0:i1, None]
        top, log_total = parts[:, :, i0:i1].split(1, -1)
        nothing = log_total == -torch.inf
        log_total = log_total.masked_fill(nothing, torch.inf)
        delta = delta.masked_fill(nothing, 0)
        for j0, j1 in problem.k_tiles(i0, i1):
            keys = problem.keys(k, j0, j1)
            z, visible = problem.scores(rows, keys, i0, i1, j0, j1)
            p = torch.exp(times(z - top, problem.factor) - log_total)
            dp = problem.heads_by(drows, problem.keys(v, j0, j1).transpose(-1, -2))
            keep = problem.keep(i0, i1, j0, j1)
            if dv is not None:
                dv[:, :, j0:j1] += problem.heads_reduce(p if keep is None else p * keep, drows)
            dz = p * ((dp if keep is None else dp * keep) - delta)
            if visible is not None:
                dz = dz.masked_fill(~visible, 0)
            if dq is not None:
                dq[:, :, i0:i1] += problem.heads_by(dz, keys) * params.scale
            if dk is not None:
                dk[:, :, j0:j1] += problem.heads_reduce(dz, rows) * params.scale
            if dbias is not None:
                part = cut(dbias, i0, i1, j0, j1)
                part += dz.sum_to_size(part.shape)
    cast = (None if g is None else g.to(q.dtype) for g in (dq, dk, dv))
    return (*cast, None if dbias is None else dbias.to(bias.dtype))


def softmax_double_backward(ddq, ddk, ddv, ddbias, dout, dlse, q, k, v, mask, bias, rng, params: SoftmaxParams):
    """Cotangents of (dout, dlse, q, k, v, bias) given those of (dq, dk, dv, dbias).

    Each block of query rows is differentiated twice by autograd on its own, so memory stays O(rows * Lk).
    """
    problem = _Problem(q, k, v, mask, bias, rng, params)
    wide = problem.wide
    inputs: list[Any] = [t if t is None else t.detach() for t in (dout, dlse, q, k, v, bias)]
    grads = [None if t is None else torch.zeros_like(t, dtype=wide) for t in inputs]
    cotangents = (ddq, ddk, ddv, ddbias)
    for i0, i1 in () if problem.empty else problem.q_tiles():
        j0, j1 = problem.key_range(i0, i1)
        if j0 >= j1:
            continue

        def rows(t):
            return t[:, :, i0:i1]  # noqa: B023 used inside this iteration only

        def keys(t):
            return t[:, :, j0:j1]  # noqa: B023 used inside this iteration only

        views = [rows, rows, rows, keys, keys, lambda t: cut(t, i0, i1, j0, j1)]  # noqa: B023
        with torch.enable_grad():
            leaves: list[Any] = [
                None if t is None else view(t).to(wide, copy=True).requires_grad_() for t, view in zip(inputs, views)
            ]
            rows_q, keys_k, keys_v, block_bias = leaves[2:]
            block = _dense_block(problem, rows_q, keys_k, keys_v, block_bias, i0, i1, j0, j1)
            wanted = [t for t in leaves[2:] if t is not None]
            outputs = [(o, g) for o, g in zip(block, leaves[:2]) if g is not None]
            first: Any = torch.autograd.grad(
                [o for o, _ in outputs], wanted, [g for _, g in outputs], create_graph=True, allow_unused=True
            )
        seeds = [view(t).to(wide) for t, view in zip(cotangents, views[2:]) if t is not None]
        first = [g for g, leaf, t in zip(_spread(first, leaves[2:]), leaves[2:], cotangents) if t is not None]
        pairs = [(g, s) for g, s in zip(first, seeds) if g is not None and g.requires_grad]
        present = [t for t in leaves if t is not None]
        second = torch.autograd.grad([g for g, _ in pairs], present, [s for _, s in pairs], allow_unused=True)
        for total, view, part in zip(grads, views, _spread(second, leaves)):
            if part is not None:
                view(total).add_(part)
    return [g if g is None else g.to(t.dtype) for g, t in zip(grads, inputs)]


def _spread(values, leaves):
    """Puts one value per present leaf back at the places of the leaves."""
    source = iter(values)
    return [None if leaf is None else next(source) for leaf in leaves]


def _dense_block(problem: _Problem, q, k, v, bias, i0: int, i1: int, j0: int, j1: int) -> tuple[Tensor, Tensor]:
    """(out, lse) of query rows i0..i1 by differentiable torch operations."""
    hidden = None if problem.seen is None else ~problem.seen[:, :, j0:j1]
    k, v = (t if hidden is None else t.masked_fill(hidden, 0) for t in (k, v))
    z = problem.heads_by(q, k.transpose(-1, -2)) * problem.params.scale
    visible = problem.visible(i0, i1, j0, j1)
    if bias is not None:
        z = z + bias.masked_fill(bias == -torch.inf, 0)
    if visible is not None:
        z = z.masked_fill(~visible, -torch.inf)
    top = z.detach().amax(-1, keepdim=True)
    p = torch.exp(z - top.masked_fill(top == -torch.inf, 0))
    total = p.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1)
    keep = problem.keep(i0, i1, j0, j1)
    p = p / total
    out = problem.heads_by(p if keep is None else p * keep, v)
    return out, (top.masked_fill(nothing, 0) + total.log()).masked_fill(nothing, -torch.inf).squeeze(-1)
