"""The dropout bits of a call, for oracles and statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.philox import keep_mask


def dropout_mask(rng: Tensor | tuple[int, int] | int, p: float, B: int, Hq: int, Lq: int, Lk: int) -> Tensor:
    """bool [B, Hq, Lq, Lk], True = weight kept. `rng` is the op's int64 [2] tensor, (seed, offset) or a bare seed."""
    if isinstance(rng, int):
        rng = (rng, 0)
    if not isinstance(rng, Tensor):
        seed = rng[0] - (1 << 64) if rng[0] >= 1 << 63 else rng[0]  # the op keeps 64 unsigned bits in an int64
        rng = torch.tensor([seed, rng[1]], dtype=torch.int64)
    return keep_mask(rng, p, B, Hq, (0, Lq), (0, Lk))


def next_rng(device: str | torch.device = "cpu") -> Tensor:
    """(seed, offset) that the next call with dropout will draw from torch's generator, which is left as it was."""
    device = torch.device(device)
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
    state = generator.get_state()
    rng = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)
    generator.set_state(state)
    return rng
