"""Linear attention with a feature map: Katharopoulos et al. 2020, and the first-order Taylor form of Li et al. 2020."""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor, nn

from ..ops import linear_attention
from ..ops.linear import FeatureMap
from ..params import LINEAR_EPS
from .recurrent import Cache, Recurrent, Tokens, check_tokens, per_head, split, wide


class MappedAttention(Recurrent):
    """Normalised attention with a feature map, over earlier tokens or over all."""

    causal: bool
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        cache: Optional[Cache] = None,
        return_cache: bool = False,
        *,
        context: Optional[Tensor] = None,
        key_mask: Optional[Tensor] = None,
    ) -> Union[Tensor, tuple[Tensor, Cache]]:
        """x [B, L, E] -> out [B, L, E].

        causal: out_t depends on tokens up to t, and on those of `cache`; return_cache: (out, cache after the last token).
        Else: context [B, Lk, E] is what keys and values are made of, in place of x (cross attention); key_mask bool
        [B, Lk], True = takes part.
        """
        if self.causal:
            for name, t in (("context", context), ("key_mask", key_mask)):
                if t is not None:
                    raise ValueError(f"{name} goes with causal=False; in a causal batch let the padding come last")
            return super().forward(x, cache, return_cache)
        if cache is not None or return_cache:
            self._needs_order()
        self._check(x, None)
        if context is not None:
            check_tokens("context", context, self.embed_dim)
        return self._output(x, self._over_all(x, x if context is None else context, key_mask))

    def _over_all(self, x: Tensor, context: Tensor, key_mask: Optional[Tensor]) -> Tensor:
        q, k, v = (split(t, self.num_heads) for t in (self.q_proj(x), self.k_proj(context), self.v_proj(context)))
        return linear_attention(
            q, k, v, feature_map=self.feature_map, causal=False, key_mask=key_mask, backend=self.backend
        )

    def empty_cache(self, batch: int) -> Cache:
        self._needs_order()
        return super().empty_cache(batch)

    def step(self, x: Tensor, cache: Cache) -> Tensor:
        self._needs_order()
        return super().step(x, cache)

    def _needs_order(self) -> None:
        if not self.causal:
            raise ValueError("a cache needs causal=True: here every token sees those after it as well")

    def _tokens(self, x: Tensor, cache: Optional[Cache]) -> Tokens:
        return Tokens(*(split(projection(x), self.num_heads) for projection in (self.q_proj, self.k_proj, self.v_proj)))


class LinearAttention(MappedAttention):
    """Attention with weights phi(q_t) . phi(k_s) in place of exp(q_t . k_s) (Katharopoulos et al. 2020, arXiv 2006.16236).

        y_t = sum_s (phi(q_t) . phi(k_s)) v_s / sum_s phi(q_t) . phi(k_s),  phi(x) = elu(x) + 1

    per head, over s <= t where causal; q, k and v are projections of x, and the heads go through one more. Time O(L);
    decoding keeps D x Dv + D numbers per head.

    Args:
        embed_dim: E, also the size of q, k and v, all heads together.
        num_heads: divides embed_dim.
        feature_map: "elu1", "relu", "taylor1" or "taylor2", as in `fastattn.linear_attention`.
        causal: False: every token sees all; then forward takes context and key_mask, and there is no cache.
        bias: of the four projections.
        backend: of the op.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, *,
        feature_map: FeatureMap = "elu1", causal: bool = True, bias: bool = True, backend: str = "auto",
        device=None, dtype=None,
    ):  # fmt: skip
        if feature_map not in ("elu1", "relu", "taylor1", "taylor2"):
            raise ValueError(f'feature_map must be "elu1", "relu", "taylor1" or "taylor2", got {feature_map!r}')
        per_head("embed_dim", embed_dim, "num_heads", num_heads)
        super().__init__(embed_dim, num_heads, embed_dim, embed_dim, backend)
        self.feature_map, self.causal = feature_map, causal
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)

    def reset_parameters(self) -> None:
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            projection.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, feature_map={self.feature_map!r}, causal={self.causal}"

    def _output(self, x: Tensor, out: Tensor) -> Tensor:
        return self.out_proj(out.transpose(1, 2).flatten(2))


class TaylorLinearAttention(MappedAttention):
    """Attention by the first-order Taylor expansion of the softmax (Li et al. 2020, arXiv 2007.14902).

        y_t = x_t + gamma * (sum_s v_s + q^_t . sum_s k^_s v_s^T) / (N + q^_t . sum_s k^_s),  q^ = q / |q|

    over all N tokens, weights 1 + cos(q_t, k_s) >= 0; a row of zeros has cosine 0. As in the authors' layer q and k
    are projections to few channels, v one to E, and gamma starts at 0: the layer is the identity until it learns.

    channel=True swaps channels and positions: x is q, k and v, and its E channels attend to each other, each a vector
    of L positions: y = x + gamma * (1 + X^ X^^T) x, rows divided by their sums, from E x E weights. Time O(L E^2).

    Args:
        embed_dim: E.
        num_heads: 1 in the paper; divides key_dim and embed_dim. Unused with channel=True.
        key_dim: size of q and k, all heads together; default E // 8. Unused with channel=True.
        channel: the channel form, which has no projection, no order and no context.
        causal: True: over s <= t, for decoding; not in the paper, which is about images.
        backend: of the op.
    """

    feature_map = "taylor1"

    def __init__(
        self, embed_dim: int, num_heads: int = 1, *,
        key_dim: Optional[int] = None, channel: bool = False, causal: bool = False, backend: str = "auto",
        device=None, dtype=None,
    ):  # fmt: skip
        if channel and causal:
            raise ValueError("causal needs an order of tokens, which channel=True has not: pass one of them")
        key_dim = max(embed_dim // 8, 1) if key_dim is None else key_dim
        super().__init__(embed_dim, num_heads, key_dim, embed_dim, backend)
        self.channel, self.causal = channel, causal
        if not channel:
            self.q_proj = nn.Linear(embed_dim, key_dim, True, device, dtype)
            self.k_proj = nn.Linear(embed_dim, key_dim, True, device, dtype)
            self.v_proj = nn.Linear(embed_dim, embed_dim, True, device, dtype)
        self.gamma = nn.Parameter(torch.zeros((), device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        if not self.channel:
            for projection in (self.q_proj, self.k_proj, self.v_proj):
                projection.reset_parameters()
        nn.init.zeros_(self.gamma)

    def extra_repr(self) -> str:
        size = "channel=True" if self.channel else f"{self.num_heads}, key_dim={self.key_dim}, causal={self.causal}"
        return f"{self.embed_dim}, {size}"

    def _over_all(self, x: Tensor, context: Tensor, key_mask: Optional[Tensor]) -> Tensor:
        if not self.channel:
            return super()._over_all(x, context, key_mask)
        if context is not x:
            raise ValueError("context does not go with channel=True: channels of x attend to each other")
        return channel_attention(x, key_mask)

    def _output(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.gamma * out.transpose(1, 2).flatten(2)


def channel_attention(x: Tensor, key_mask: Optional[Tensor]) -> Tensor:
    """[B, L, C] -> [B, 1, L, C]: channels with weights 1 + cos, cosines over the positions that take part."""
    rows = wide(x.mT)
    if key_mask is not None:
        if key_mask.dtype != torch.bool or key_mask.shape != x.shape[:2]:
            raise ValueError(
                f"key_mask must be bool [B, L] = {list(x.shape[:2])}, got {key_mask.dtype} {list(key_mask.shape)}"
            )
        rows = rows.masked_fill(~key_mask[:, None], 0)
    square = rows.square().sum(-1, keepdim=True)
    nothing = square == 0
    unit = (rows * square.masked_fill(nothing, 1).rsqrt()).masked_fill(nothing, 0)
    weights = 1 + unit @ unit.mT
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=LINEAR_EPS)
    return (weights.to(x.dtype) @ x.mT).mT[:, None]
