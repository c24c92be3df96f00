"""Retention: linear attention with a constant decay per head (Sun et al. 2023)."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..params import accumulate_dtype
from .recurrent import Cache, Recurrent, Tokens, split, wide


class Retention(Recurrent):
    """Multi-scale retention of RetNet (Sun et al. 2023, arXiv 2307.08621).

        o_t = D^-0.5 sum_{s <= t} gamma_h^(t - s) (q_t e^(i t theta)) . (k_s e^(i s theta)) v_s,  gamma_h = 1 - 2^(-5 - h)
        y   = (swish(x W_g) * GroupNorm(o_1, .., o_H)) W_o

    Pairs of channels (2j, 2j + 1) of q and k are rotated by t theta_j, theta_j = 10000^(-2j / D): with the decay this
    is xPos, and tells relative positions. GroupNorm has one group per head and token. The paper divides scores by
    sums of themselves for 16-bit range; GroupNorm cancels that, and sums are float32 here.

    Args:
        embed_dim: E.
        num_heads: H; divides key_dim and value_dim.
        key_dim, value_dim: sizes of q and k, and of v and the gate, all heads together; default E and 2 E, as in the paper.
        rotary: the rotation; without it decay alone tells positions.
        norm_eps: of the GroupNorm.
        backend: of the op.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, *,
        key_dim: Optional[int] = None, value_dim: Optional[int] = None, rotary: bool = True, norm_eps: float = 1e-6,
        backend: str = "auto", device=None, dtype=None,
    ):  # fmt: skip
        key_dim = embed_dim if key_dim is None else key_dim
        value_dim = 2 * embed_dim if value_dim is None else value_dim
        super().__init__(embed_dim, num_heads, key_dim, value_dim, backend)
        if rotary and self.key_head_dim % 2:
            raise ValueError(f"rotary turns pairs of channels: key_dim {key_dim} / num_heads {num_heads} must be even")
        self.counts_tokens = rotary
        self.q_proj = nn.Linear(embed_dim, key_dim, False, device, dtype)
        self.k_proj = nn.Linear(embed_dim, key_dim, False, device, dtype)
        self.v_proj = nn.Linear(embed_dim, value_dim, False, device, dtype)
        self.gate_proj = nn.Linear(embed_dim, value_dim, False, device, dtype)
        self.norm = nn.GroupNorm(num_heads, value_dim, norm_eps, device=device, dtype=dtype)
        self.out_proj = nn.Linear(value_dim, embed_dim, False, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small projections, as the authors train with."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight)
        self.norm.reset_parameters()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rotary={self.counts_tokens}"

    def _tokens(self, x: Tensor, cache: Optional[Cache]) -> Tokens:
        q, k, v = (split(projection(x), self.num_heads) for projection in (self.q_proj, self.k_proj, self.v_proj))
        heads = torch.arange(self.num_heads, device=x.device, dtype=accumulate_dtype(x.dtype))
        decay = torch.log1p(-torch.exp2(-5 - heads))
        if not self.counts_tokens:
            return Tokens(q, k, v, decay)
        start = x.new_zeros((), dtype=torch.int64) if cache is None or cache.position is None else cache.position
        turn = rotation(start + torch.arange(x.shape[1], device=x.device), self.key_head_dim)
        return Tokens(rotate(q, *turn), rotate(k, *turn), v, decay, position=start + x.shape[1])

    def _output(self, x: Tensor, out: Tensor) -> Tensor:
        out = out.transpose(1, 2).flatten(2)
        out = self.norm(out.flatten(0, 1)).view_as(out)
        return self.out_proj(F.silu(self.gate_proj(x)) * out)


def rotation(at: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """cos and sin [L, D / 2] of positions at [L]; float64, since angles grow with the position."""
    frequency = 10000 ** (-torch.arange(0, D, 2, device=at.device, dtype=torch.float64) / D)
    angle = at[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [.., L, D] with its pairs of channels turned."""
    a, b = wide(x).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.to(a.dtype), sin.to(a.dtype)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
