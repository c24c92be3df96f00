"""Fused attention for every machine: a drop-in for torch's attention calls that says which kernel ran, and why."""

from . import masks
from ._version import __version__
from .dispatch import Explanation, UnsupportedError
from .dropin import disable, enable, patched, scaled_dot_product_attention
from .ops import attention, explain

__all__ = [
    "Explanation",
    "UnsupportedError",
    "__version__",
    "attention",
    "disable",
    "enable",
    "explain",
    "masks",
    "patched",
    "scaled_dot_product_attention",
]
