"""Every case of every op. One module per op, each with CASES, make, leaves, checked, golden, pick, peers and implementations."""

from __future__ import annotations

from types import ModuleType

from ..case import Case
from . import linear, masks, models, softmax

OPS: dict[str, ModuleType] = {"softmax": softmax, "masks": masks, "linear": linear}


def all_cases() -> list[Case]:
    return [case for module in (*OPS.values(), models) for case in module.CASES]
