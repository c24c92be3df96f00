"""Tile plans of sparse masks: which runs of tiles a program visits, and the bits of those seen in part."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Plans are made of tiles of 64 x 64; BM and BN of a kernel that follows one divide it.
TILE = tl.constexpr(64)


class Walk(NamedTuple):
    """One direction of a plan: for each slice (batch, head) and tile of one side, the runs of tiles of the other."""

    start: Any  # int32 [slices * tiles + 1]: where the runs of a tile start
    runs: Any  # int32 [n, 3]: first tile, number of tiles, index of the words or -1 for full tiles
    order: Any  # int32 [slices * tiles]: tiles with most to visit first


@triton.jit
def planned_block(n, walk, i_slice, L, BLOCK: tl.constexpr):
    """First index of the n-th block in [0, L), those of the heaviest tiles first."""
    PER_TILE: tl.constexpr = TILE // BLOCK
    at = tl.cast(i_slice, tl.int64) * tl.cdiv(L, TILE) + n // PER_TILE
    return tl.multiple_of(tl.load(walk.order + at) * TILE + n % PER_TILE * BLOCK, BLOCK)


@triton.jit
def runs_of(walk, i_slice, first, L):
    """The range of runs that the block at `first` visits: none from L on, one of all tiles where walk is None."""
    start, end = 0, 1
    if walk is not None:
        p = walk.start + tl.cast(i_slice, tl.int64) * tl.cdiv(L, TILE) + first // TILE
        start = tl.load(p, mask=first < L, other=0)
        end = tl.load(p + 1, mask=first < L, other=0)
    return start, end


@triton.jit
def run_at(walk, n, L):
    """(begin, full_begin, end, bits): run n is [begin, end) below L, full from full_begin on; bits is -1 or its words."""
    begin, full_begin, end, bits = 0, 0, L, -1
    if walk is not None:
        p = walk.runs + tl.cast(n, tl.int64) * 3
        begin = tl.multiple_of(tl.load(p) * TILE, TILE)
        stop = tl.multiple_of(begin + tl.load(p + 1) * TILE, TILE)
        bits = tl.load(p + 2)
        full_begin = tl.where(bits < 0, begin, stop)
        end = min(stop, L)
    return begin, full_begin, end, bits


@triton.jit
def bits_at(walk, i_slice, i_first, j_first, Lq):
    """The words of the tile at (i_first, j_first): -1 where it is full, -2 where it is empty."""
    bits = -1
    if walk is not None:
        first, end = runs_of(walk, i_slice, i_first, Lq)
        tile = j_first // TILE
        low, high = first, end
        while low < high:
            middle = (low + high) // 2
            passed = tl.load(walk.runs + tl.cast(middle, tl.int64) * 3) > tile
            high = tl.where(passed, middle, high)
            low = tl.where(passed, low, middle + 1)
        # The last run that starts at the tile or before it.
        p = walk.runs + (tl.cast(low, tl.int64) - 1) * 3
        stop = tl.load(p, mask=low > first, other=0) + tl.load(p + 1, mask=low > first, other=0)
        bits = tl.where(tile < stop, tl.load(p + 2, mask=low > first, other=0), -2)
    return bits


@triton.jit
def seen_in_tile(words, bits, i, j):
    """int1, i and j broadcast against each other: bit j of the word of row i, True where bits is -1."""
    word = tl.load(words + tl.cast(bits, tl.int64) * TILE + i % TILE, mask=(i >= 0) & (bits >= 0), other=-1)
    # 32-bit halves: a tile of 64-bit values would take twice the registers.
    half = tl.where(j % TILE < 32, word.to(tl.int32), (word >> 32).to(tl.int32))
    return ((half >> (j % 32)) & 1) != 0
