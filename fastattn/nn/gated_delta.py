"""Gated DeltaNet: the delta rule with a decay per token (Yang et al. 2024)."""

from __future__ import annotations

from math import log
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recurrent import Cache, Recurrent, Tokens, normed, positive, split, wide

NORM_EPS = 1e-6  # under the root of |q|^2 and |k|^2
DT_MIN, DT_MAX = 1e-3, 0.1


class GatedDeltaNet(Recurrent):
    """Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464).

        q, k, v = swish(conv(x W_qkv));  q, k <- q / |q|, k / |k|                       conv: causal, per channel
        g_t = -exp(A_log) softplus(x_t W_a + dt_bias),  b_t = sigmoid(x_t W_b)          per head
        S_t = (I - b_t k_t k_t^T) e^(g_t) S_{t-1} + b_t k_t v_t^T,  o_t = D^-0.5 q_t^T S_t
        y_t = (swish(x_t W_g) * RMSNorm(o_t, head by head)) W_o

    Each token replaces a share b_t of the value that the state, decayed as in Mamba-2, holds for its key.

    Args:
        embed_dim: E.
        num_heads: heads of q and k; divides key_dim.
        num_value_heads: heads of v, of the gates and of the state; a multiple of num_heads, default num_heads.
        key_dim, value_dim: sizes of q and k, and of v and the output gate, all heads together; default 3 E / 4 and
            3 E / 2, as in the paper.
        conv_width: taps of the convolution.
        negative_eigenvalues: b_t = 2 sigmoid(..), so that a token can also reflect the state (arXiv 2411.12537).
        norm_eps: of the RMSNorm, whose weight the heads share.
        backend: of the op.

    Train A_log and dt_bias without weight decay, as is the custom for Mamba-2's.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, *,
        num_value_heads: Optional[int] = None, key_dim: Optional[int] = None, value_dim: Optional[int] = None,
        conv_width: int = 4, negative_eigenvalues: bool = False, norm_eps: float = 1e-5, backend: str = "auto",
        device=None, dtype=None,
    ):  # fmt: skip
        key_dim = embed_dim * 3 // 4 if key_dim is None else key_dim
        value_dim = embed_dim * 3 // 2 if value_dim is None else value_dim
        super().__init__(embed_dim, num_heads, key_dim, value_dim, backend, num_value_heads)
        positive(conv_width=conv_width)
        self.conv_width, self.negative_eigenvalues = conv_width, negative_eigenvalues
        channels = 2 * key_dim + value_dim
        self.conv_shape = (channels, conv_width - 1) if conv_width > 1 else None
        self.qkv_proj = nn.Linear(embed_dim, channels, False, device, dtype)
        self.conv = nn.Conv1d(channels, channels, conv_width, groups=channels, bias=False, device=device, dtype=dtype)
        self.decay_proj = nn.Linear(embed_dim, self.value_heads, False, device, dtype)
        self.beta_proj = nn.Linear(embed_dim, self.value_heads, False, device, dtype)
        self.A_log = nn.Parameter(torch.empty(self.value_heads, device=device, dtype=dtype))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads, device=device, dtype=dtype))
        self.gate_proj = nn.Linear(embed_dim, value_dim, False, device, dtype)
        self.norm = nn.RMSNorm(self.value_head_dim, norm_eps, device=device, dtype=dtype)
        self.out_proj = nn.Linear(value_dim, embed_dim, False, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba-2's gates: exp(A_log) uniform in [1, 16], softplus(dt_bias) log-uniform in [0.001, 0.1]."""
        for part in self.children():
            part.reset_parameters()  # type: ignore[operator]
        self.A_log.uniform_(1, 16).log_()
        dt = torch.empty_like(self.dt_bias).uniform_(log(DT_MIN), log(DT_MAX)).exp_()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def extra_repr(self) -> str:
        more = f"num_value_heads={self.value_heads}, conv_width={self.conv_width}"
        return f"{super().extra_repr()}, {more}, negative_eigenvalues={self.negative_eigenvalues}"

    def _tokens(self, x: Tensor, cache: Optional[Cache]) -> Tokens:
        qkv, tail = self._convolved(self.qkv_proj(x).mT, None if cache is None else cache.conv)
        q, k, v = qkv.split((self.key_dim, self.key_dim, self.value_dim), -1)
        q, k = (unit(split(t, self.num_heads)) for t in (q, k))
        # -softplus(z) = logsigmoid(-z); torch compiles the gradient of softplus with strides that it does not have.
        negative_dt = F.logsigmoid(-(wide(self.decay_proj(x)) + self.dt_bias))
        beta = wide(self.beta_proj(x)).sigmoid() * (2 if self.negative_eigenvalues else 1)
        decay = wide(self.A_log).exp() * negative_dt
        return Tokens(q, k, split(v, self.value_heads), decay.mT, beta.mT, tail)

    def _convolved(self, x: Tensor, before: Optional[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
        """x [B, C, L] after convolution and swish, [B, L, C], and its last inputs, which the next token needs."""
        kept = self.conv_width - 1
        if before is None:
            x = F.pad(x, (kept, 0))
        elif kept:
            x = torch.cat((before.to(x.dtype), x), -1)
        y = self.conv(x) if x.shape[-1] > kept else x[..., :0]  # torch's convolution refuses no tokens
        return F.silu(y.mT.contiguous()), x[..., x.shape[-1] - kept :].contiguous() if kept else None

    def _output(self, x: Tensor, out: Tensor) -> Tensor:
        return self.out_proj(F.silu(self.gate_proj(x)) * normed(self.norm, out))


def unit(x: Tensor) -> Tensor:
    """Rows of length 1."""
    y = wide(x)
    return (y * (y.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()).to(x.dtype)
