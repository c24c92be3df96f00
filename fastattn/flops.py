"""FLOP formulas for torch.utils.flop_counter, handed over when a program imports it: it imports Triton."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

COUNTER = "torch.utils.flop_counter"
FORMULAS: dict[Any, Callable] = {}


def register_flops(packet: Any, formula: Callable) -> None:
    FORMULAS[packet] = formula
    if COUNTER in sys.modules:
        sys.modules[COUNTER].register_flop_formula(packet)(formula)
    elif _Handover not in sys.meta_path:
        sys.meta_path.insert(0, _Handover)


class _Handover:
    """A finder that lets the counter be found as ever, and adds the formulas once it has run."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            for packet, formula in FORMULAS.items():
                module.register_flop_formula(packet)(formula)

        spec.loader.exec_module = exec_module
        return spec
