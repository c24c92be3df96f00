"""Launch choices of linear attention as pure functions: chunk length and tile sizes. Chosen from compiled code, untuned."""

from typing import NamedTuple, Optional

import torch

from ..common.sizes import block_dim, dot_precision

CHUNKS = (16, 32, 64)


class Tile(NamedTuple):
    """A tile of [rows, columns], and how Triton compiles it."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """Tokens per chunk, and one tile per kernel."""

    BT: int
    states: Tile  # features x values
    read: Tile  # columns of the contraction x columns of the result
    channels: Tile  # the same where channels decay each on its own, of 16 rows
    delta: Tile  # delta rule: all features x values
    part: int  # chunks that one program adds up where order does not matter


# Small enough that short tests have several of everything.
INTERPRETER = Tiles(32, Tile(16, 32, 1, 1), Tile(32, 16, 1, 1), Tile(32, 32, 1, 1), Tile(256, 16, 1, 1), 2)
HALF = Tiles(64, Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(16, 16, 4, 1), Tile(64, 32, 4, 1), 16)
# Products of fp32 run unrolled on the scalar units: small tiles.
FP32 = Tiles(32, Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1), Tile(64, 16, 8, 1), 32)
# Delta rule, by padded head dimension: tokens per chunk and tile. A program holds all rows of its columns of the state.
DELTA_HALF = {64: (64, HALF.delta), 128: (64, Tile(128, 16, 8, 1)), 256: (32, Tile(256, 16, 4, 1))}
DELTA_FP32 = {64: (16, FP32.delta), 128: (16, Tile(128, 16, 8, 1)), 256: (16, Tile(256, 16, 8, 1))}


def pick(dtype: torch.dtype, arch: int, D: int, delta: bool, chunk_size: Optional[int] = None) -> Tiles:
    """arch: 80, 86 (99 KB of shared memory), 90 or 100; 0 is the interpreter. chunk_size: a wish, if it is one of CHUNKS."""
    half = dtype == torch.bfloat16
    tiles = INTERPRETER if arch == 0 else HALF if half else FP32
    if delta and arch != 0:
        BT, tile = (DELTA_HALF if half else DELTA_FP32)[max(64, block_dim(D))]
        tiles = tiles._replace(BT=BT, delta=tile)
    if chunk_size in CHUNKS and (arch == 0 or chunk_size < tiles.BT):
        return tiles._replace(BT=chunk_size, part=tiles.part * tiles.BT // chunk_size)
    return tiles


def product_type(dtype: torch.dtype, interpreted: bool) -> torch.dtype:
    """What operands of products are rounded to. fp16 has no room for sums of keys or for gradients over denominators."""
    return dtype if dtype == torch.bfloat16 and not interpreted else torch.float32


def product_precision(dtype: torch.dtype) -> str:
    """tf32 has the digits of fp16."""
    return "tf32" if dtype == torch.float16 else dot_precision(dtype)


def state_type(dtype: torch.dtype, normalize: bool, interpreted: bool) -> torch.dtype:
    """What states before chunks are kept in. Normalised, the gradient of queries is a difference of S and z out."""
    return torch.float32 if normalize else product_type(dtype, interpreted)


def state_precision(dtype: torch.dtype) -> str:
    """Of products with fp32 states."""
    return dot_precision(dtype) if dtype == torch.float32 else "tf32"


def merge_precision(dtype: torch.dtype) -> str:
    """Of products of the delta rule's inverse with itself, whose result is rounded to `product_type`."""
    return {torch.float32: "ieee", torch.float16: "tf32x3"}.get(dtype, "tf32")
