"""Tile arithmetic of linear attention: chunks of sequences, features of rows, decay between rows."""

from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl

# Rows of a block inside a chunk.
BLOCK = tl.constexpr(16)


class Rows(NamedTuple):
    """Rows of [B, heads, L, width]; head n of whoever reads reads head n // share, times factor[b, n, row].

    Factors enter after products, so that what is multiplied is the caller's own, unrounded.

    Flat: Triton 3.6 forgets the ones in tuples of tuples inside loops.
    """

    x: torch.Tensor
    stride_b: int
    stride_h: int
    stride_t: int
    stride_d: int
    share: int = 1
    factor: Optional[torch.Tensor] = None  # fp32
    factor_b: int = 0
    factor_h: int = 0
    factor_t: int = 0


def rows_of(t: torch.Tensor, heads: int, factor: Optional[torch.Tensor] = None) -> Rows:
    """t [B, n, L, width] as `heads` heads read it; factor fp32 [B, heads, L]."""
    share = max(1, heads // max(1, t.shape[1]))
    return Rows(t, *t.stride(), share, factor, *(() if factor is None else factor.stride()))


class Packing(NamedTuple):
    """Where packed sequences lie, in chunks of BT tokens counted through."""

    cu_seqlens: torch.Tensor  # int32 [N + 1]
    first_chunk: torch.Tensor  # int32 [N + 1]
    sequence: torch.Tensor  # int32 [n_chunks], N beyond the last chunk


@triton.jit
def chunk_at(i_chunk, packing, L, N, per_sequence, BT: tl.constexpr):
    """(sequence, batch, first token, end of the sequence) of a chunk."""
    if packing is None:
        n = i_chunk // per_sequence
        b = n
        first = (i_chunk - n * per_sequence) * BT
        end = L
    else:
        found = tl.load(packing.sequence + i_chunk)
        n = tl.minimum(found, N - 1)
        b = 0
        first = tl.load(packing.cu_seqlens + n) + (i_chunk - tl.load(packing.first_chunk + n)) * BT
        end = tl.where(found < N, tl.load(packing.cu_seqlens + n + 1), first)
    return n, b, first, end


@triton.jit
def feature(x, MAP: tl.constexpr):
    """phi of the maps that work on each number alone."""
    if MAP == "relu":
        return tl.where(x < 0, 0.0, x)
    if MAP == "elu1":
        return tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    return x


@triton.jit
def feature_gradient(phi, dphi, MAP: tl.constexpr):
    """dphi times the derivative of phi, which phi itself tells; left as it is for maps of whole rows."""
    if MAP == "relu":
        return tl.where(phi > 0, dphi, 0.0)
    if MAP == "elu1":
        return dphi * tl.minimum(phi, 1.0)
    return dphi


@triton.jit
def head_rows(rows, b, head):
    """Where the rows of a head start."""
    return rows.x + tl.cast(b, tl.int64) * rows.stride_b + tl.cast(head // rows.share, tl.int64) * rows.stride_h


@triton.jit
def load_factor(rows, b, head, row, wanted):
    """[BR] fp32 factor of some rows; 0 where not wanted."""
    p = rows.factor + tl.cast(b, tl.int64) * rows.factor_b + tl.cast(head, tl.int64) * rows.factor_h
    return tl.load(p + row.to(tl.int64) * rows.factor_t, mask=wanted, other=0.0)


@triton.jit
def scale_pairs(b_p, c, a, b, head, row, other, j, inside, present):
    """[BR, BC] products of rows of c and a, times their factors."""
    if c.factor is not None:
        b_p *= load_factor(c, b, head, row, inside)[:, None]
    if a.factor is not None:
        b_p *= load_factor(a, b, other, j, present)[None, :]
    return b_p


@triton.jit
def _columns(p, f, stride, wanted, WIDTH: tl.constexpr):
    """[BR, BF] fp32 at columns f of rows p; 0 outside."""
    inside = wanted[:, None] & ((f >= 0) & (f < WIDTH))[None, :]
    return tl.load(p[:, None] + f.to(tl.int64)[None, :] * stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_tile(
    rows,
    b,
    head,
    first,
    wanted,
    start,
    D: tl.constexpr,
    F: tl.constexpr,
    MAP: tl.constexpr,
    BR: tl.constexpr,
    BF: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """[BR, BF] features start.. of the rows first..; zero beyond F and where not wanted."""
    base = head_rows(rows, b, head) + tl.cast(first, tl.int64) * rows.stride_t
    row = tl.arange(0, BR)
    f = start + tl.arange(0, BF)
    if MAP == "taylor1":
        p = base + row.to(tl.int64) * rows.stride_t
        b_full = _columns(p, tl.arange(0, BD), rows.stride_d, wanted, D)
        square = tl.sum(b_full * b_full, 1)
        norm = tl.where(square == 0, 0.0, 1 / tl.sqrt(tl.where(square == 0, 1.0, square)))
        b_x = _columns(p, f - 1, rows.stride_d, wanted, D) * norm[:, None]
        b_x = tl.where((f == 0)[None, :] & wanted[:, None], 1.0, b_x)
    elif MAP == "taylor2":
        p = base + row.to(tl.int64) * rows.stride_t
        LINEAR: tl.constexpr = D**-0.25
        pair = tl.maximum(f - 1 - D, 0)
        single = (f <= D)[None, :]
        left = tl.where(f <= D, f - 1, tl.where(f < F, pair // D, D))
        b_x = _columns(p, left, rows.stride_d, wanted, D) * LINEAR
        b_right = _columns(p, tl.where(f <= D, D, pair % D), rows.stride_d, wanted, D) * (LINEAR * 0.5**0.5)
        b_x = tl.where(single, b_x, b_x * b_right)
        b_x = tl.where((f == 0)[None, :] & wanted[:, None], 1.0, b_x)
    else:
        if WIDE:
            row = row.to(tl.int64)
            f = f.to(tl.int64)
        inside = wanted[:, None]
        if F % BF != 0:
            inside = inside & (f < F)[None, :]
        b_x = tl.load(base + row[:, None] * rows.stride_t + f[None, :] * rows.stride_d, mask=inside, other=0.0)
        if MAP != "identity":
            b_x = tl.where(inside, feature(b_x.to(tl.float32), MAP), 0.0)
    return b_x.to(DTYPE)


@triton.jit
def row_gates(gates, plane, b, s, heads, L, row, wanted):
    """(high, low) [BR] of the decay per head; 0 where not wanted."""
    p = gates + (tl.cast(b, tl.int64) * heads + s) * L + row
    return tl.load(p, mask=wanted, other=0.0), tl.load(p + plane, mask=wanted, other=0.0)


@triton.jit
def channel_gates(gates, plane, b, s, heads, L, row, wanted, start, F: tl.constexpr, BF: tl.constexpr):
    """(high, low) [BR, BF] of the decay per channel; 0 where not wanted or beyond F."""
    f = start + tl.arange(0, BF)
    p = gates + ((tl.cast(b, tl.int64) * heads + s) * L + row)[:, None] * F + f[None, :]
    inside = wanted[:, None] & (f < F)[None, :]
    return tl.load(p, mask=inside, other=0.0), tl.load(p + plane, mask=inside, other=0.0)


@triton.jit
def state_at(states, i, heads, s, F: tl.constexpr, V: tl.constexpr):
    """Where state i of head s starts in [.., heads, F, V]."""
    return states + (tl.cast(i, tl.int64) * heads + s) * (F * V)


@triton.jit
def state_offsets(f, v, F: tl.constexpr, V: tl.constexpr):
    """(offsets, mask) [len(f), len(v)] in a state."""
    return f[:, None] * V + v[None, :], (f < F)[:, None] & (v < V)[None, :]
