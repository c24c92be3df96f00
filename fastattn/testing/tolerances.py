"""How wrong a result may be, decided by data: a multiple of the reference's own error in the same precision."""

from __future__ import annotations

import torch
from torch import Tensor

OUT_FACTOR = 2.0
GRAD_FACTOR = 3.0
EPS_FP32 = torch.finfo(torch.float32).eps
# lse of half inputs: weights come from polynomials this close to exp, and lse is off by as much.
HALF_LSE = 3e-6
RMS_LIMIT = {torch.float32: 6e-7, torch.float16: 4e-4, torch.bfloat16: 3e-3}  # softmax attention against fp64


def max_error(actual: Tensor, golden: Tensor) -> float:
    """Largest absolute difference; equal infinities differ by 0, a NaN or an unmatched infinity by inf."""
    if actual.shape != golden.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(golden.shape)}")
    a, g = actual.detach().double().cpu(), golden.detach().double().cpu()
    difference = (a - g).abs().nan_to_num_(float("inf"), float("inf")).masked_fill_(a == g, 0.0)
    return float(difference.max()) if difference.numel() else 0.0


def _largest(x: Tensor) -> float:
    return float(x.detach().nan_to_num(0.0, 0.0, 0.0).abs().max()) if x.numel() else 0.0


def rounding(golden: Tensor, dtype: torch.dtype) -> float:
    """Two roundings to `dtype` at the scale of the values (not below 0.3)."""
    g = golden.detach().to(dtype).cpu()
    # Infinities make NaN of themselves.
    return 2.0 * float(((g + 0.3) - 0.3 - g).abs().nan_to_num(0.0).max()) if g.numel() else 0.0


def bound(golden: Tensor, low: Tensor, magnitude: Tensor, dtype: torch.dtype, factor: float) -> float:
    """Allowed max error: `factor` times that of `low`, the reference in the precision under test, and roundings.

    `magnitude` is the result with every term taken by its absolute value (golden itself where nothing cancels):
    a sum in fp32 cannot be known better than two ulp of what went through its accumulator.
    """
    if dtype == torch.float64:  # golden has the same precision: 16 digits less what a few hundred additions lose
        return 1e-12 * max(1.0, _largest(magnitude))
    return factor * max_error(low, golden) + rounding(golden, dtype) + 2.0 * EPS_FP32 * _largest(magnitude)


def assert_close(
    name: str, actual: Tensor, golden: Tensor, low: Tensor, magnitude: Tensor, dtype: torch.dtype, factor: float
) -> None:
    error, limit = max_error(actual, golden), bound(golden, low, magnitude, dtype, factor)
    if not error <= limit:
        a, g = actual.detach().double().cpu(), golden.detach().double().cpu()
        worst = (a - g).abs().nan_to_num(float("inf"), float("inf")).masked_fill(a == g, 0.0)
        at = tuple(int(i) for i in torch.unravel_index(worst.argmax(), worst.shape))
        raise AssertionError(
            f"{name}: max error {error:.3e} > {limit:.3e}; worst at {at}: {a[at]:.9g}, expected {g[at]:.9g}"
        )


def rms_ratio(actual: Tensor, golden: Tensor) -> float:
    """RMS of the error over RMS of the golden values."""
    a, g = actual.detach().double().cpu(), golden.detach().double().cpu()
    return float((a - g).pow(2).mean().sqrt() / g.pow(2).mean().sqrt())
