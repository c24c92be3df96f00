"""Tile arithmetic: which work a program takes, which tiles a band reaches, loads and stores of row blocks."""

import triton
import triton.language as tl


@triton.jit
def work_item(pid, n_tiles, n_heads, section, REVERSE: tl.constexpr):
    """(tile, head) of program `pid`. Heads of one section share L2; inside it the heaviest tiles of all heads go first."""
    first_head = pid // (n_tiles * section) * section
    width = min(section, n_heads - first_head)
    rest = pid - first_head * n_tiles
    tile = rest // width
    if REVERSE:
        tile = n_tiles - 1 - tile
    return tile, first_head + rest % width


@triton.jit
def head_of(x, b, h, strides):
    """Where batch b and head h of a [B, H, ..] tensor start."""
    return x + tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]


@triton.jit
def span(first, last, lo, hi, begin, full_begin, end, BLOCK: tl.constexpr):
    """Tiles of x in [begin, end) with lo <= x - y <= hi for some y in first..last.

    (start, full_start, full_end, n_partial, n_full): tiles in [full_start, full_end) lie inside the band for every y,
    start at full_begin or later and end before `end`; the others need care. begin and full_begin are multiples of BLOCK.
    """
    start = begin
    full_start = full_begin
    full_end = end // BLOCK * BLOCK
    if lo is not None:
        start = max(start, max(first + lo, 0) // BLOCK * BLOCK)
        full_start = max(full_start, (max(last + lo, 0) + BLOCK - 1) // BLOCK * BLOCK)
    if hi is not None:
        end = min(end, max(last + hi + 1, 0))
        full_end = min(full_end, max(first + hi + 1, 0) // BLOCK * BLOCK)
    full_start = min(full_start, (end + BLOCK - 1) // BLOCK * BLOCK)
    full_end = max(full_end, full_start)
    n_partial = max(full_start - start, 0) // BLOCK + max(end - full_end + BLOCK - 1, 0) // BLOCK
    return start, full_start, full_end, n_partial, (full_end - full_start) // BLOCK


@triton.jit
def tile_start(n, start, full_start, full_end, BLOCK: tl.constexpr, PARTIAL: tl.constexpr):
    """First index of the n-th tile of one kind in a span."""
    if PARTIAL:
        x = start + n * BLOCK
        return tl.multiple_of(tl.where(x < full_start, x, x + full_end - full_start), BLOCK)
    return tl.multiple_of(full_start + n * BLOCK, BLOCK)


@triton.jit
def keys_in_reach(j, first, last, Lk, lo, hi):
    """True for the keys that at least one query of first..last sees through the band."""
    reach = j < Lk
    if lo is not None:
        reach = reach & (j >= first + lo)
    if hi is not None:
        reach = reach & (j <= last + hi)
    return reach


@triton.jit
def _row_offsets(strides, BD: tl.constexpr, BR: tl.constexpr, WIDE: tl.constexpr):
    """[BR, BD] element offsets inside a block of rows; WIDE where they can pass 2^31."""
    row = tl.arange(0, BR)[:, None]
    d = tl.arange(0, BD)[None, :]
    if WIDE:
        row = row.to(tl.int64)
        d = d.to(tl.int64)
    return row * strides[2] + d * strides[3]


@triton.jit
def load_rows(
    base,
    first,
    wanted,
    strides,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """[BR, BD] rows first.. of a [.., L, D] tensor at `base`; zero beyond D and where `wanted` [BR] (or None) is False."""
    # The start of the block is a scalar and always 64-bit; the offsets inside it cost registers.
    p = base + tl.cast(first, tl.int64) * strides[2] + _row_offsets(strides, BD, BR, WIDE)
    inside = (tl.arange(0, BD) < D)[None, :]
    if wanted is not None:
        if BD == D:
            x = tl.load(p, mask=wanted[:, None], other=0.0)
        else:
            x = tl.load(p, mask=wanted[:, None] & inside, other=0.0)
    elif BD == D:
        x = tl.load(p)
    else:
        x = tl.load(p, mask=inside, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_rows(base, first, x, L, strides, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr):
    """Store [BR, BD] as rows first.. of a [.., L, D] tensor at `base`, in its dtype."""
    wanted = (first + tl.arange(0, BR) < L)[:, None] & (tl.arange(0, BD) < D)[None, :]
    p = base + tl.cast(first, tl.int64) * strides[2] + _row_offsets(strides, BD, BR, True)
    tl.store(p, x.to(base.dtype.element_ty), mask=wanted)
