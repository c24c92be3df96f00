"""Every case of every op. One module per op, each with CASES, make, leaves, golden, pick and implementations."""

from __future__ import annotations

from types import ModuleType

from ..case import Case
from . import linear, masks, softmax

OPS: dict[str, ModuleType] = {"softmax": softmax, "masks": masks, "linear": linear}


def all_cases() -> list[Case]:
    return [case for module in OPS.values() for case in module.CASES]
