"""Fused attention for every machine: a drop-in for torch's attention calls that says which kernel ran, and why."""

from . import masks
from ._version import __version__
from .dispatch import Explanation, UnsupportedError
from .dropin import disable, enable, patched, scaled_dot_product_attention
from .ops import attention, explain, explain_linear, linear_attention, linear_attention_step
from .params import LinearState

__all__ = [
    "Explanation",
    "LinearState",
    "UnsupportedError",
    "__version__",
    "attention",
    "disable",
    "enable",
    "explain",
    "explain_linear",
    "linear_attention",
    "linear_attention_step",
    "masks",
    "patched",
    "scaled_dot_product_attention",
]
