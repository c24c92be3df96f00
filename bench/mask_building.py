"""What a mask costs before the first kernel runs: expression and plan here, create_block_mask of FlexAttention there."""

from __future__ import annotations

from typing import Any

import torch

from fastattn import masks
from fastattn.testing.inputs import generator
from fastattn.testing.timing import interleave

LENGTHS = (8192, 131072, 1048576)
FLEX_LENGTHS = (8192,)  # eager, it forms Lq x Lk
DOCUMENTS = 100


def measure(budget: float = 2.0) -> list[dict[str, Any]]:
    """causal & documents & window(4096), on one thread; ms are medians."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_length(L, budget) for L in LENGTHS]
    finally:
        torch.set_num_threads(before)


def _length(L: int, budget: float) -> dict[str, Any]:
    cuts = torch.randperm(L - 1, generator=generator(2))[: DOCUMENTS - 1] + 1
    ids = torch.isin(torch.arange(L), cuts).cumsum(0)

    def plan() -> masks.TilePlan:
        return (masks.causal() & masks.documents(ids) & masks.window(4096, 0)).plan(L, L)

    calls: dict[str, Any] = {"fastattn": plan}
    if L in FLEX_LENGTHS:
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(b, h, i, j):
            return (j <= i) & (ids[i] == ids[j]) & (i - j <= 4096)

        calls["flex"] = lambda: create_block_mask(visible, None, None, L, L, device="cpu")
    samples = interleave(calls, device="cpu", budget=budget)
    made = plan()
    return {
        "length": L,
        "ms": {name: x.median * 1e3 for name, x in samples.items()},
        "plan_bytes": made.nbytes,
        "runs": len(made.rows),
        "bit_tiles": len(made.words),
    }
