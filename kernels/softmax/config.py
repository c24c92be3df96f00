"""Launch choices of softmax attention as pure functions: tile sizes, work order, band clean-up. Chosen from compiled code, untuned."""

import math
from typing import NamedTuple, Optional

import torch

from ..common.plans import TILE, Walk
from ..common.scores import Terms
from ..common.sizes import block_dim, ceil_div, dot_precision, wide

# K and V of the heads in flight should stay in L2 (40 MB on A100, 50 MB on H100).
L2_BYTES = 32 << 20

# Scalars whose values kernels are not compiled for.
UNSPECIALIZED = ["Hq", "Lq", "Lk", "lo", "hi", "threshold", "n_tiles", "n_heads", "section", "slice_b", "slice_h"]


class LaunchConfig(NamedTuple):
    """Tile of BM queries x BN keys, and how Triton compiles it."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


class BackwardConfig(NamedTuple):
    """One launch per kernel of the backward pass."""

    keys: LaunchConfig  # dK and dV: one program owns BN keys
    queries: LaunchConfig  # dQ and dbias: one program owns BM queries


# Row statistics are padded to a multiple of this, and of every BM, so that kernels read them without a mask.
STATS_PADDING = 128
STATS_ROWS = 32

# Small enough that short tests have several tiles, unequal so that a swap of BM and BN shows.
INTERPRETER = LaunchConfig(32, 16, 1, 1), BackwardConfig(LaunchConfig(16, 32, 1, 1), LaunchConfig(32, 16, 1, 1))


def _backward(keys, queries) -> BackwardConfig:
    return BackwardConfig(LaunchConfig(*keys), LaunchConfig(*queries))


# By architecture and padded head dimension, for 16-bit inputs. sm_90: wgmma needs 64 rows per 4 warps.
FORWARD = {
    80: {64: (128, 64, 8, 3), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
    90: {64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
}
BACKWARD = {
    80: {
        64: _backward((32, 128, 8, 3), (128, 64, 8, 3)),
        128: _backward((32, 64, 4, 2), (64, 32, 4, 2)),
        256: _backward((32, 32, 4, 2), (32, 32, 8, 2)),
    },
    90: {
        64: _backward((32, 128, 8, 3), (128, 128, 8, 2)),
        128: _backward((32, 128, 8, 2), (128, 64, 8, 2)),
        256: _backward((32, 32, 8, 2), (128, 32, 8, 2)),
    },
}
# Masks, biases and dropout take registers: smaller tiles on every architecture.
FORWARD_EXTRA = {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)}
BACKWARD_EXTRA = {
    64: _backward((32, 64, 8, 1), (64, 32, 4, 2)),
    128: _backward((32, 32, 4, 1), (64, 32, 8, 1)),
    256: _backward((32, 32, 8, 2), (32, 32, 8, 1)),
}
# fp32 products run unrolled on the scalar units: small tiles on every architecture.
FORWARD_FP32 = {64: (32, 32, 4, 2), 128: (16, 32, 4, 1), 256: (16, 32, 8, 1)}
BACKWARD_FP32 = {
    64: _backward((32, 16, 4, 1), (32, 32, 4, 2)),
    128: _backward((16, 16, 8, 1), (16, 16, 8, 1)),
    256: _backward((16, 16, 8, 1), (16, 16, 8, 1)),
}
# Few queries, as in generation: a tall tile would be mostly padding.
FORWARD_SHORT = {64: (16, 64, 4, 2), 128: (16, 64, 4, 2), 256: (16, 32, 4, 2)}


def _column(D: int, Dv: int) -> int:
    return max(64, block_dim(D), block_dim(Dv))


def pick_forward(
    D: int, Dv: int, dtype: torch.dtype, arch: int, Lq: int, extra: bool, plan: bool = False
) -> LaunchConfig:
    """arch: 80, 86 (99 KB of shared memory), 90 or 100; 0 is the interpreter. extra: see `has_extras`."""
    if arch == 0:
        tile = INTERPRETER[0]
    elif dtype == torch.float32:
        tile = LaunchConfig(*FORWARD_FP32[_column(D, Dv)])
    elif Lq <= 16:
        tile = LaunchConfig(*FORWARD_SHORT[_column(D, Dv)])
    else:
        table = FORWARD_EXTRA if extra else FORWARD[80 if arch < 90 else 90]
        tile = LaunchConfig(*table[_column(D, Dv)])
    return _inside_tiles(tile) if plan else tile


def pick_backward(D: int, Dv: int, dtype: torch.dtype, arch: int, extra: bool, plan: bool = False) -> BackwardConfig:
    if arch == 0:
        tiles = INTERPRETER[1]
    elif dtype == torch.float32:
        tiles = BACKWARD_FP32[_column(D, Dv)]
    else:
        tiles = (BACKWARD_EXTRA if extra else BACKWARD[80 if arch < 90 else 90])[_column(D, Dv)]
    return BackwardConfig(*map(_inside_tiles, tiles)) if plan else tiles


def _inside_tiles(tile: LaunchConfig) -> LaunchConfig:
    """The same with blocks that do not cross the tiles of a plan."""
    return tile._replace(BM=min(tile.BM, TILE.value), BN=min(tile.BN, TILE.value))


def has_extras(x, params) -> bool:
    """Options that take registers in every tile."""
    return uses_logits(x, params) or x.mask is not None or x.plan is not None or x.rng is not None


def uses_logits(x, params) -> bool:
    """Whether kernels compare logits; else they compare q.k and scale differences of those."""
    return bool(params.softcap) or x.bias is not None or x.slopes is not None or x.sinks is not None


def terms_of(x, params) -> Terms:
    B, Hq = x.q.shape[:2]
    return Terms(
        float(params.softcap) if params.softcap else None,
        x.bias,
        score_strides(x.bias),
        None if x.slopes is None else x.slopes.expand(B, Hq).contiguous(),
        x.diagonal,
        x.mask,
        score_strides(x.mask),
        None if x.plan is None else x.plan.words,
    )


def rows_of(plan) -> Optional[Walk]:
    """Runs of key tiles by query tile."""
    return None if plan is None else Walk(plan.row_start, plan.rows, plan.row_order)


def columns_of(plan) -> Optional[Walk]:
    """Runs of query tiles by key tile."""
    return None if plan is None else Walk(plan.column_start, plan.columns, plan.column_order)


def slice_strides(plan) -> tuple[int, int]:
    """(slice_b, slice_h): batch b and query head h follow slice b * slice_b + h * slice_h of a plan."""
    if plan is None:
        return 0, 0
    return 0 if plan.batches == 1 else plan.heads, 0 if plan.heads == 1 else 1


def count_blocks(L: int, block: int, plan) -> int:
    """Blocks of [0, L); of whole tiles where there is a plan."""
    return ceil_div(L, block) if plan is None else ceil_div(L, TILE.value) * (TILE.value // block)


def useful_band(lo: Optional[int], hi: Optional[int], Lq: int, Lk: int) -> tuple[Optional[int], Optional[int]]:
    """The same band with bounds that hide nothing dropped and all others inside 32 bits."""
    if lo is not None:
        lo = None if lo <= 1 - Lq else min(lo, Lk)
    if hi is not None:
        hi = None if hi >= Lk - 1 else max(hi, -Lq)
    return lo, hi


def heads_per_section(n_heads: int, group: int, bytes_per_kv_head: int) -> int:
    """Query heads whose K and V fit L2 together: a multiple of the GQA group, so no kv head is split."""
    fit = max(1, L2_BYTES // max(1, bytes_per_kv_head)) * group
    return max(1, min(n_heads, fit))


def score_strides(x: Optional[torch.Tensor]) -> Optional[tuple[int, ...]]:
    """Strides of a mask or bias with 0 where a dimension is broadcast."""
    return None if x is None else tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride()))


def has_rows(x: Optional[torch.Tensor]) -> bool:
    """Whether a mask or bias depends on the query."""
    return x is not None and x.shape[2] > 1


def dropout_scalars(p: float) -> tuple[int, float]:
    """(threshold, factor): keep iff u32 >= threshold, and kept weights times factor."""
    return min(math.ceil(p * 2**32), 2**32 - 1), 0.0 if p >= 1 else 1 / (1 - p)


def compile_options(tile: LaunchConfig, tensors, x, params, interpreted) -> dict:
    """Compile-time arguments that all kernels of this op share; tensors: those read in row blocks, v last."""
    q, v = tensors[0], tensors[-1]
    D, Dv = q.shape[3], v.shape[3]
    return {
        **tile._asdict(),
        "D": D,
        "DV": Dv,
        "BD": block_dim(D),
        "BDV": block_dim(Dv),
        "LOGITS": uses_logits(x, params),
        "MASK_ROWS": has_rows(x.mask),
        "BIAS_ROWS": has_rows(x.bias),
        "PRECISION": dot_precision(q.dtype),
        "WIDE": wide(*tensors),
        # The interpreter's bf16 arithmetic is wrong (numpy has no bf16).
        "UPCAST": interpreted and q.dtype == torch.bfloat16,
    }
