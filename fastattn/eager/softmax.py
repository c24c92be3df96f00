"""Tiled online softmax (Milakov & Gimelshein 2018, Dao et al. 2022) in plain torch; backward recomputes the weights.

Memory beyond inputs and outputs is O(L): a tile holds at most TILE_ELEMENTS scores.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from ..params import SoftmaxParams, SoftmaxTensors, empty_like_layout
from .softmax_tiles import Problem, cut, times


def softmax_forward(
    x: SoftmaxTensors, params: SoftmaxParams, with_parts: bool
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    problem = Problem(x, params)
    q, k, v = x.q, x.k, x.v
    out = empty_like_layout(q, v.shape[3])
    lse = torch.full(q.shape[:3], -torch.inf, dtype=problem.wide, device=q.device)
    if x.sinks is not None:
        lse.copy_(x.sinks[:, None])
    parts = torch.stack((torch.zeros_like(lse), lse), -1) if with_parts else None
    if problem.empty:
        return out.zero_(), lse, parts
    for i0, i1 in problem.q_tiles():
        rows = q[:, :, i0:i1].to(problem.wide)
        top, total = problem.start(rows)
        acc = rows.new_zeros(*rows.shape[:3], v.shape[3])
        for j0, j1 in problem.k_tiles(i0, i1):
            z = problem.logits(rows, problem.keys(k, j0, j1), i0, i1, j0, j1).z
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


def softmax_backward(dout, dlse, x: SoftmaxTensors, out, parts, params: SoftmaxParams, needs):
    problem = Problem(x, params)
    q, k, v, bias = x.differentiable()[:4]
    wide = problem.wide
    dq, dk, dv = (empty_like_layout(t, t.shape[3], wide).zero_() if need else None for t, need in zip((q, k, v), needs))
    dbias, dslopes = (
        torch.zeros(t.shape, dtype=wide, device=q.device) if need else None
        for t, need in zip(x.differentiable()[3:5], needs[3:])
    )
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
            z, visible, damp = problem.logits(rows, keys, i0, i1, j0, j1)
            p = torch.exp(times(z - top, problem.factor) - log_total)
            dp = problem.heads_by(drows, problem.keys(v, j0, j1).transpose(-1, -2))
            keep = problem.keep(i0, i1, j0, j1)
            if dv is not None:
                dv[:, :, j0:j1] += problem.heads_reduce(p if keep is None else p * keep, drows)
            dz = p * ((dp if keep is None else dp * keep) - delta)
            if visible is not None:
                dz = dz.masked_fill(~visible, 0)
            if dbias is not None:
                part = cut(dbias, i0, i1, j0, j1)
                part += dz.sum_to_size(part.shape)
            if dslopes is not None:
                dslopes -= (dz * problem.distance(i0, i1, j0, j1)).sum((2, 3)).sum_to_size(dslopes.shape)
            if damp is not None:
                dz = dz * damp
            if dq is not None:
                dq[:, :, i0:i1] += problem.heads_by(dz, keys) * params.scale
            if dk is not None:
                dk[:, :, j0:j1] += problem.heads_reduce(dz, rows) * params.scale
    cast = (None if g is None else g.to(q.dtype) for g in (dq, dk, dv))
    return (*cast, None if dbias is None else dbias.to(bias.dtype), dslopes)


def softmax_double_backward(cotangents, dout, dlse, x: SoftmaxTensors, params: SoftmaxParams):
    """Cotangents of (dout, dlse, *x.differentiable()) given those of the six gradients.

    Each block of query rows is differentiated twice by autograd on its own, over all its keys at once.
    """
    problem = Problem(x, params)
    problem.take_all_keys()
    wide = problem.wide
    inputs: list[Any] = [t if t is None else t.detach() for t in (dout, dlse, *x.differentiable())]
    grads = [None if t is None else torch.zeros_like(t, dtype=wide) for t in inputs]
    if problem.empty and cotangents[5] is not None and grads[1] is not None:
        grads[1] += cotangents[5][:, None]  # lse is the sink, whose gradient is the sum of dlse
    for i0, i1 in () if problem.empty else problem.q_tiles():
        j0, j1 = problem.key_range(i0, i1)
        if j0 >= j1:
            if x.sinks is None:
                continue
            j0, j1 = 0, 1

        def rows(t):
            return t[:, :, i0:i1]  # noqa: B023 used inside this iteration only

        def keys(t):
            return t[:, :, j0:j1]  # noqa: B023 used inside this iteration only

        def tile(t):
            return cut(t, i0, i1, j0, j1)  # noqa: B023 used inside this iteration only

        views = [rows, rows, rows, keys, keys, tile, whole, whole]
        with torch.enable_grad():
            leaves: list[Any] = [
                None if t is None else view(t).to(wide, copy=True).requires_grad_() for t, view in zip(inputs, views)
            ]
            block = _dense_block(problem, leaves[2:], i0, i1, j0, j1)
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


def whole(t: Tensor) -> Tensor:
    return t


def _spread(values, leaves):
    """Puts one value per present leaf back at the places of the leaves."""
    source = iter(values)
    return [None if leaf is None else next(source) for leaf in leaves]


def _dense_block(problem: Problem, leaves, i0: int, i1: int, j0: int, j1: int) -> tuple[Tensor, Tensor]:
    """(out, lse) of query rows i0..i1 by differentiable torch operations."""
    q, k, v, bias, slopes, sinks = leaves
    hidden = None if problem.seen is None else ~problem.seen[:, :, j0:j1]
    k, v = (t if hidden is None else t.masked_fill(hidden, 0) for t in (k, v))
    z, _ = problem.cap(problem.heads_by(q, k.transpose(-1, -2)) * problem.params.scale)
    visible = problem.visible(i0, i1, j0, j1)
    if bias is not None:
        z = z + bias.masked_fill(bias == -torch.inf, 0)
    if slopes is not None:
        z = z - slopes[:, :, None, None] * problem.distance(i0, i1, j0, j1)
    if visible is not None:
        z = z.masked_fill(~visible, -torch.inf)
    top = z.detach().amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks.detach()[:, None, None])
    base = top.masked_fill(top == -torch.inf, 0)
    p = torch.exp(z - base)
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks[:, None, None] - base)
    nothing = total == 0
    total = total.masked_fill(nothing, 1)
    keep = problem.keep(i0, i1, j0, j1)
    p = p / total
    out = problem.heads_by(p if keep is None else p * keep, v)
    return out, (base + total.log()).masked_fill(nothing, -torch.inf).squeeze(-1)
