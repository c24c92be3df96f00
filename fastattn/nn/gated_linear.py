"""Gated linear attention: a decay of every key channel that depends on the token (Yang et al. 2023)."""

from __future__ import annotations

from typing import Optional

import torch.nn.functional as F
from torch import Tensor, nn

from .recurrent import Cache, Recurrent, Tokens, normed, positive, split, wide


class GatedLinearAttention(Recurrent):
    """GLA (Yang et al. 2023, arXiv 2312.06635).

        a_t = sigmoid(x_t W_1 W_2 + b)^(1 / temperature)                   per channel of the key
        S_t = Diag(a_t) S_{t-1} + k_t v_t^T,  o_t = D^-0.5 q_t^T S_t       per head
        y_t = (swish(x_t W_r + b_r) * RMSNorm(o_t, head by head)) W_o

    Args:
        embed_dim: E.
        num_heads: H, 4 in the paper; divides key_dim and value_dim.
        key_dim, value_dim: sizes of q, k and a, and of v and the gate, all heads together; default E // 2 and E.
        gate_rank: columns of W_1.
        temperature: gates are near 1 at first, and forget slowly.
        norm_eps: of the RMSNorm, whose weight the heads share.
        backend: of the op.
    """

    def __init__(
        self, embed_dim: int, num_heads: int = 4, *,
        key_dim: Optional[int] = None, value_dim: Optional[int] = None, gate_rank: int = 16, temperature: float = 16.0,
        norm_eps: float = 1e-5, backend: str = "auto", device=None, dtype=None,
    ):  # fmt: skip
        key_dim = embed_dim // 2 if key_dim is None else key_dim
        value_dim = embed_dim if value_dim is None else value_dim
        super().__init__(embed_dim, num_heads, key_dim, value_dim, backend)
        positive(gate_rank=gate_rank)
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature!r}")
        self.temperature = temperature
        self.q_proj = nn.Linear(embed_dim, key_dim, False, device, dtype)
        self.k_proj = nn.Linear(embed_dim, key_dim, False, device, dtype)
        self.v_proj = nn.Linear(embed_dim, value_dim, False, device, dtype)
        self.decay_proj = nn.Sequential(
            nn.Linear(embed_dim, gate_rank, False, device, dtype), nn.Linear(gate_rank, key_dim, True, device, dtype)
        )
        self.gate_proj = nn.Linear(embed_dim, value_dim, True, device, dtype)
        self.norm = nn.RMSNorm(self.value_head_dim, norm_eps, device=device, dtype=dtype)
        self.out_proj = nn.Linear(value_dim, embed_dim, False, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small projections, as the authors train with."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight, gain=2**-2.5)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        self.norm.reset_parameters()

    def _tokens(self, x: Tensor, cache: Optional[Cache]) -> Tokens:
        q, k, v = (split(projection(x), self.num_heads) for projection in (self.q_proj, self.k_proj, self.v_proj))
        decay = F.logsigmoid(wide(self.decay_proj(x))) / self.temperature
        return Tokens(q, k, v, split(decay, self.num_heads))

    def _output(self, x: Tensor, out: Tensor) -> Tensor:
        return self.out_proj(F.silu(self.gate_proj(x)) * normed(self.norm, out))
