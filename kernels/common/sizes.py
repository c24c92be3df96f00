"""Numbers that launch choices of every op need."""

import torch


def block_dim(D: int) -> int:
    """Head dimensions are padded to a power of two that tl.dot accepts."""
    return max(16, 1 << (D - 1).bit_length()) if D else 16


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products are exact fp32 unless the user allows tf32, as in torch's own matmul."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def wide(*tensors: torch.Tensor) -> bool:
    """Whether element offsets inside one tile may pass 2^31."""
    return any(abs(stride) * 256 >= 2**31 for x in tensors for stride in x.stride()[2:])
