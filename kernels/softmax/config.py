"""Launch choices of softmax attention as pure functions: tile sizes, work order, band clean-up. Tuned offline."""

import math
from typing import NamedTuple, Optional

import torch

# K and V of the heads in flight should stay in L2 (40 MB on A100, 50 MB on H100).
L2_BYTES = 32 << 20


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


# Row statistics are padded to this many rows: a multiple of every BM, so that kernels read them without a mask.
STATS_ROWS = 128

INTERPRETER = LaunchConfig(32, 16, 1, 1)


def pick_forward(D, Dv, dtype, arch, Lq=1 << 20) -> LaunchConfig:
    return LaunchConfig(64, 64, 4, 2) if arch else INTERPRETER


def pick_backward(D, Dv, dtype, arch) -> BackwardConfig:
    c = LaunchConfig(64, 64, 4, 2) if arch else INTERPRETER
    return BackwardConfig(c, c)


def block_dim(D: int) -> int:
    """Head dimensions are padded to a power of two that tl.dot accepts."""
    return max(16, 1 << (D - 1).bit_length()) if D else 16


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


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


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products are exact fp32 unless the user allows tf32, as in torch's own matmul."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def score_strides(x: Optional[torch.Tensor]) -> Optional[tuple[int, ...]]:
    """Strides of a mask or bias with 0 where a dimension is broadcast."""
    return None if x is None else tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride()))


def has_rows(x: Optional[torch.Tensor]) -> bool:
    """Whether a mask or bias depends on the query."""
    return x is not None and x.shape[2] > 1


def dropout_scalars(p: float) -> tuple[int, float]:
    """(threshold, factor): keep iff u32 >= threshold, and kept weights times factor."""
    return min(math.ceil(p * 2**32), 2**32 - 1), 0.0 if p >= 1 else 1 / (1 - p)


def wide(*tensors: torch.Tensor) -> bool:
    """Whether element offsets inside one tile may pass 2^31."""
    return any(abs(stride) * 256 >= 2**31 for x in tensors for stride in x.stride()[2:])


def compile_options(tile: LaunchConfig, tensors, mask, bias, interpreted) -> dict:
    """Compile-time arguments that all kernels of this op share; tensors: those read in row blocks, v last."""
    q, v = tensors[0], tensors[-1]
    D, Dv = q.shape[3], v.shape[3]
    return {
        **tile._asdict(),
        "D": D,
        "DV": Dv,
        "BD": block_dim(D),
        "BDV": block_dim(Dv),
        "MASK_ROWS": has_rows(mask),
        "BIAS_ROWS": has_rows(bias),
        "PRECISION": dot_precision(q.dtype),
        "WIDE": wide(*tensors),
        # The interpreter's bf16 arithmetic is wrong (numpy has no bf16).
        "UPCAST": interpreted and q.dtype == torch.bfloat16,
    }
