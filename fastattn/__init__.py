"""Fused attention for every machine: a drop-in for torch's attention calls that says which kernel ran, and why."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import masks
from ._version import __version__
from .dispatch import Explanation, UnsupportedError
from .dropin import disable, enable, patched, scaled_dot_product_attention
from .ops import attention, explain, explain_linear, linear_attention, linear_attention_step
from .params import LinearState

if TYPE_CHECKING:
    from . import nn

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
    "nn",
    "patched",
    "scaled_dot_product_attention",
]


def __getattr__(name: str) -> Any:
    if name == "nn":  # imported when first asked for
        return import_module(".nn", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
