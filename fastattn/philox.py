"""Dropout bits: Philox4x32-10 (Salmon et al., SC 2011) in plain torch, the definition every backend reproduces."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _high_low(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    # int64 holds a 32 x 16 bit product; split b to get the 64-bit product without overflow.
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds; every word is an int64 tensor holding an unsigned 32-bit value."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _high_low(_MULTIPLY[0], c0)
        high1, low1 = _high_low(_MULTIPLY[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def keep_mask(
    rng: Optional[Tensor],
    p: float,
    B: int,
    Hq: int,
    rows: tuple[int, int],
    cols: tuple[int, int],
    heads: Optional[Tensor] = None,
) -> Tensor:
    """bool [B, Hq, rows, cols]: True where dropout keeps the weight of query i in `rows` and key j in `cols`.

    Counter (j // 4, i, b * Hq + h, offset), key = seed, lane j % 4, keep iff u32 >= p * 2^32. rng is int64 [2]:
    seed (64 bits) and offset (its low 32 bits). `heads` replaces the default b * Hq + h, shape [B, Hq].
    """
    if rng is None:
        raise ValueError("rng is required with dropout")
    device = rng.device
    first_group, last_group = cols[0] // 4, -(-cols[1] // 4)
    group = torch.arange(first_group, last_group, device=device, dtype=torch.int64)
    row = torch.arange(rows[0], rows[1], device=device, dtype=torch.int64)
    if heads is None:
        heads = torch.arange(B * Hq, device=device, dtype=torch.int64).view(B, Hq)
    shape = (B, Hq, row.numel(), group.numel())
    counter = (
        group.expand(shape),
        row[:, None].expand(shape),
        heads[:, :, None, None].expand(shape),
        (rng[1] & _LOW).expand(shape),
    )
    words = torch.stack(philox4x32(counter, (rng[0] & _LOW, (rng[0] >> 32) & _LOW)), dim=-1)
    words = words.flatten(-2)[..., cols[0] - 4 * first_group :][..., : cols[1] - cols[0]]
    return words >= p * 2.0**32
