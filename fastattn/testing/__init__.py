"""Inputs, tolerances and dropout bits shared by tests and bench."""

from fastattn.testing.dropout import dropout_mask, next_rng
from fastattn.testing.inputs import LAYOUTS, Case, Inputs, cast, make, randn, random_mask, relayout, variants
from fastattn.testing.tolerances import GRAD_FACTOR, OUT_FACTOR, RMS_LIMIT, assert_close, bound, max_error, rms_ratio

__all__ = [
    "GRAD_FACTOR",
    "LAYOUTS",
    "OUT_FACTOR",
    "RMS_LIMIT",
    "Case",
    "Inputs",
    "assert_close",
    "bound",
    "cast",
    "dropout_mask",
    "make",
    "max_error",
    "next_rng",
    "randn",
    "random_mask",
    "relayout",
    "rms_ratio",
    "variants",
]
