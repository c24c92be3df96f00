"""What the layers of linear attention share: heads, the cache, forward and step."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from ..ops import linear_attention, linear_attention_step
from ..ops.linear import FeatureMap
from ..params import LinearState, accumulate_dtype


class Cache(NamedTuple):
    """What a layer keeps of the tokens it has seen; its size does not depend on how many these are.

    state: the LinearState of the attention, in float32 (float64 for float64 layers).
    conv: [B, C, width - 1], the last inputs of a short convolution, in layers that have one.
    position: int64 [], the number of tokens seen, in layers that rotate by it.
    """

    state: LinearState
    conv: Optional[Tensor] = None
    position: Optional[Tensor] = None


class Tokens(NamedTuple):
    """What the op reads of L tokens, and what the cache keeps of them."""

    q: Tensor  # [B, heads, L, D]
    k: Tensor
    v: Tensor  # [B, heads, L, Dv]
    decay: Optional[Tensor] = None
    beta: Optional[Tensor] = None
    conv: Optional[Tensor] = None
    position: Optional[Tensor] = None


def positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive int, got {size!r}")


def per_head(dim_name: str, dim: int, heads_name: str, heads: int) -> int:
    positive(**{heads_name: heads, dim_name: dim})
    if dim % heads:
        raise ValueError(f"{dim_name} {dim} must be a multiple of {heads_name} {heads}")
    return dim // heads


def check_tokens(name: str, x: Tensor, embed_dim: int) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() != 3 or x.shape[2] != embed_dim:
        raise ValueError(f"{name} must be [B, L, {embed_dim}], got {list(x.shape)}")


def split(x: Tensor, heads: int) -> Tensor:
    """[B, L, heads * D] -> [B, heads, L, D], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def wide(x: Tensor) -> Tensor:
    return x.to(accumulate_dtype(x.dtype))


def normed(norm: nn.RMSNorm, out: Tensor) -> Tensor:
    """out [B, H, L, Dv] of the op -> [B, L, H * Dv]; under autocast the norm keeps the dtype of its weight."""
    return norm(out.transpose(1, 2).to(norm.weight.dtype)).flatten(2)


class Recurrent(nn.Module):
    """A layer around one call of causal linear attention: a subclass says what the call reads and what becomes of its
    output."""

    feature_map: FeatureMap = "identity"
    conv_shape: Optional[tuple[int, int]] = None  # of Cache.conv without the batch
    counts_tokens = False  # whether there is a Cache.position

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        backend: str,
        num_value_heads: int | None = None,
    ):
        super().__init__()
        positive(embed_dim=embed_dim)
        self.embed_dim, self.num_heads, self.backend = embed_dim, num_heads, backend
        self.key_dim, self.value_dim = key_dim, value_dim
        self.key_head_dim = per_head("key_dim", key_dim, "num_heads", num_heads)
        self.value_heads, heads_name = num_heads, "num_heads"
        if num_value_heads is not None:
            self.value_heads, heads_name = num_value_heads, "num_value_heads"
            per_head(heads_name, num_value_heads, "num_heads", num_heads)
        self.value_head_dim = per_head("value_dim", value_dim, heads_name, self.value_heads)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, key_dim={self.key_dim}, value_dim={self.value_dim}"

    def _tokens(self, x: Tensor, cache: Optional[Cache]) -> Tokens:
        """Of x [B, L, E], the tokens after those of the cache."""
        raise NotImplementedError

    def _output(self, x: Tensor, out: Tensor) -> Tensor:
        """Of the layer, [B, L, E], from its input and the output of the op, [B, H, L, Dv]."""
        raise NotImplementedError

    def empty_cache(self, batch: int) -> Cache:
        """The cache before the first token, on the device and for the dtype of the parameters."""
        weight = next(self.parameters())
        state = LinearState.zeros(
            batch,
            self.value_heads,
            self.key_head_dim,
            self.value_head_dim,
            feature_map=self.feature_map,
            dtype=accumulate_dtype(weight.dtype),
            device=weight.device,
        )
        conv = None if self.conv_shape is None else weight.new_zeros(batch, *self.conv_shape)
        position = torch.zeros((), dtype=torch.int64, device=weight.device) if self.counts_tokens else None
        return Cache(state, conv, position)

    def forward(
        self, x: Tensor, cache: Optional[Cache] = None, return_cache: bool = False
    ) -> Union[Tensor, tuple[Tensor, Cache]]:
        """x [B, L, E] -> out [B, L, E]; out_t depends on tokens up to t, and on those of `cache`, which come before.

        return_cache: (out, cache after the last token) instead; the cache that was passed is left as it is.
        """
        self._check(x, cache)
        t = self._tokens(x, cache)
        options: dict[str, Any] = {
            "feature_map": self.feature_map,
            "decay": t.decay,
            "beta": t.beta,
            "initial_state": None if cache is None else cache.state,
            "backend": self.backend,
        }
        if not return_cache:
            return self._output(x, linear_attention(t.q, t.k, t.v, **options))
        out, state = linear_attention(t.q, t.k, t.v, return_state=True, **options)
        return self._output(x, out), Cache(state, t.conv, t.position)

    def step(self, x: Tensor, cache: Cache) -> Tensor:
        """One token x [B, 1, E] -> out [B, 1, E], as the same row of `forward`; advances `cache` in place.

        Raises RuntimeError where a gradient would be recorded: the cache is overwritten.
        """
        self._check(x, cache)
        if x.shape[1] != 1:
            raise ValueError(f"a step takes one token, x [B, 1, {self.embed_dim}], got {list(x.shape)}; use forward")
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            raise RuntimeError(
                "step overwrites its cache and records no gradient: call it under torch.no_grad(), or use "
                "forward(x, cache, return_cache=True)"
            )
        t = self._tokens(x, cache)
        out = linear_attention_step(
            t.q,
            t.k,
            t.v,
            cache.state,
            feature_map=self.feature_map,
            decay=t.decay,
            beta=t.beta,
            backend=self.backend,
        )
        for kept, now in ((cache.conv, t.conv), (cache.position, t.position)):
            if kept is not None and now is not None:
                kept.copy_(now)
        return self._output(x, out)

    def _check(self, x: Tensor, cache: Optional[Cache]) -> None:
        check_tokens("x", x, self.embed_dim)
        if cache is None:
            return
        if not isinstance(cache, Cache):
            raise TypeError(
                f"cache must come from empty_cache(batch) or forward(x, return_cache=True), got {type(cache).__name__}"
            )
        if cache.state.kv.shape[0] != x.shape[0]:
            raise ValueError(f"cache is of a batch of {cache.state.kv.shape[0]}, x {list(x.shape)} of {x.shape[0]}")
        conv_shape = None if cache.conv is None else tuple(cache.conv.shape[1:])
        if (conv_shape, cache.position is not None) != (self.conv_shape, self.counts_tokens):
            raise ValueError(f"cache is of another layer: this is a {type(self).__name__}({self.extra_repr()})")
