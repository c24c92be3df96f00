"""What one call asks for: the only objects that travel from the public function to a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

if TYPE_CHECKING:
    from .masks.plan import TilePlan

CAUSAL_NONE, CAUSAL_TOP_LEFT, CAUSAL_BOTTOM_RIGHT = "none", "top_left", "bottom_right"


class SoftmaxParams(NamedTuple):
    """Options of one softmax attention call, normalised (see `fastattn.attention` for their meaning)."""

    scale: float
    causal: str = CAUSAL_NONE
    window_left: Optional[int] = None
    window_right: Optional[int] = None
    softcap: float = 0.0  # 0: none
    dropout_p: float = 0.0
    deterministic: bool = False  # asks for the same bits every time where a kernel has a faster way without

    def band(self, Lq: int, Lk: int) -> tuple[Optional[int], Optional[int]]:
        """(lo, hi): key j is visible to query i only if lo <= j - i <= hi; None is unbounded."""
        shift = Lk - Lq
        lo = None if self.window_left is None else shift - self.window_left
        hi = None if self.window_right is None else shift + self.window_right
        if self.causal != CAUSAL_NONE:
            diagonal = 0 if self.causal == CAUSAL_TOP_LEFT else shift
            hi = diagonal if hi is None else min(hi, diagonal)
        return lo, hi


class SoftmaxTensors(NamedTuple):
    """The tensors of one call. The first six are differentiable; `wide` is float32, or float64 for float64 inputs."""

    q: Tensor  # [B, Hq, Lq, D]
    k: Tensor  # [B, Hk, Lk, D]
    v: Tensor  # [B, Hk, Lk, Dv]
    bias: Optional[Tensor] = None  # dtype of q or float32 [B|1, Hq|1, Lq|1, Lk|1]
    slopes: Optional[Tensor] = None  # wide [B|1, Hq]: subtracts slopes * |i + diagonal[i] - j| from a logit
    sinks: Optional[Tensor] = None  # wide [Hq]: exp(sinks) enters the denominator
    mask: Optional[Tensor] = None  # bool [B|1, Hq|1, Lq|1, Lk|1]; not together with a plan
    diagonal: Optional[Tensor] = None  # int32 [Lq]; None is Lk - Lq in every row
    rng: Optional[Tensor] = None  # int64 [2]: seed and offset of the dropout bits
    plan: Optional[TilePlan] = None

    # Unpacked, not sliced: Dynamo of torch 2.8 fails on slices of a NamedTuple.
    def differentiable(self) -> tuple[Any, ...]:
        q, k, v, bias, slopes, sinks, *_ = self
        return q, k, v, bias, slopes, sinks


DIFFERENTIABLE: tuple[str, ...] = SoftmaxTensors._fields[:6]


class SoftmaxCall(NamedTuple):
    """One call as dispatch sees it: tensors, options, and whether a gradient will be asked for."""

    x: SoftmaxTensors
    params: SoftmaxParams
    needs_grad: bool

    @property
    def op(self) -> str:
        return "softmax"

    def __str__(self) -> str:
        x, params, needs_grad = self
        words = _words(x)
        if params.causal != "none":
            words.append(f"causal {params.causal}")
        if params.window_left is not None or params.window_right is not None:
            words.append(f"window ({params.window_left}, {params.window_right})")
        options = {"bias": x.bias, "alibi_slopes": x.slopes, "sinks": x.sinks, "mask": x.mask}
        words += [f"{name} {list(t.shape)}" for name, t in options.items() if t is not None]
        if x.plan is not None:
            words.append(f"mask plan of {len(x.plan.rows)} runs")
        if params.softcap:
            words.append(f"softcap {params.softcap}")
        if params.dropout_p:
            words.append(f"dropout {params.dropout_p}")
        return ", ".join([*words, "with gradient" if needs_grad else "no gradient"])


FEATURE_MAPS = ("identity", "relu", "elu1", "taylor1", "taylor2")
LINEAR_EPS = 1e-6  # the least denominator of a normalised output


def known_map(feature_map: Any) -> None:
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(map(repr, FEATURE_MAPS))}, got {feature_map!r}")


def feature_rows(feature_map: str, D: int) -> int:
    """F, the features of a key of D numbers."""
    return {"taylor1": 1 + D, "taylor2": 1 + D + D * D}.get(feature_map, D)


class LinearState(NamedTuple):
    """What linear attention keeps of the tokens it has seen, in float32 (float64 for float64 inputs).

    kv: [N, H, F, Dv], the sum of phi(k_t) v_t^T with decays; F = D, or 1 + D (taylor1), or 1 + D + D^2 (taylor2).
    z: [N, H, F], the sum of phi(k_t), where outputs are normalised; else None.
    N is the batch, or the number of packed sequences; H the larger number of heads of k and v.
    """

    kv: Tensor
    z: Optional[Tensor] = None

    @staticmethod
    def zeros(
        N: int, H: int, D: int, Dv: int, *,
        feature_map: str = "elu1", normalize: Optional[bool] = None, dtype: torch.dtype = torch.float32, device=None,
    ) -> LinearState:  # fmt: skip
        """The state before the first token of a call with these options."""
        known_map(feature_map)
        kv = torch.zeros(N, H, feature_rows(feature_map, D), Dv, dtype=dtype, device=device)
        return LinearState(kv, kv.new_zeros(kv.shape[:3]) if normalized(feature_map, normalize) else None)


def normalized(feature_map: str, normalize: Optional[bool]) -> bool:
    """None: every feature map but the identity, whose sums have no sign."""
    return feature_map != "identity" if normalize is None else normalize


class LinearParams(NamedTuple):
    """Options of one linear attention call, normalised (see `fastattn.linear_attention` for their meaning)."""

    feature_map: str
    causal: bool
    normalize: bool
    scale: float
    chunk_size: Optional[int] = None  # a hint, which changes no meaning; None: the backend's choice


class LinearTensors(NamedTuple):
    """The tensors of one call, Hs = max(Hk, Hv) heads of state. The first seven are differentiable; `wide` as above."""

    q: Tensor  # [B, Hq, Lq, D]
    k: Tensor  # [B, Hk, Lk, D]
    v: Tensor  # [B, Hv, Lk, Dv]
    decay: Optional[Tensor] = None  # wide [B, Hs, L] (stride 0 where it is constant) or [B, Hs, L, D], <= 0
    beta: Optional[Tensor] = None  # wide [B, Hs, L]: the delta rule
    kv: Optional[Tensor] = None  # wide [N, Hs, F, Dv]: state before the first token; N is B or the packed sequences
    z: Optional[Tensor] = None  # wide [N, Hs, F], with kv where the output is normalised
    key_mask: Optional[Tensor] = None  # bool [B, Lk], not causal
    cu_seqlens: Optional[Tensor] = None  # int32 [N + 1], B = 1

    def differentiable(self) -> tuple[Any, ...]:
        q, k, v, decay, beta, kv, z, *_ = self
        return q, k, v, decay, beta, kv, z

    @property
    def heads(self) -> int:
        """H, the heads of out."""
        return max(self.q.shape[1], self.state_heads)

    @property
    def state_heads(self) -> int:
        """Hs."""
        return max(self.k.shape[1], self.v.shape[1])

    @property
    def sequences(self) -> int:
        """N."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def empty_out(self) -> Tensor:
        """Uninitialised [B, H, Lq, Dv]; it lies in memory as q does where it has q's heads."""
        q, Dv = self.q, self.v.shape[3]
        if q.shape[1] == self.heads:
            return empty_like_layout(q, Dv)
        return q.new_empty(q.shape[0], self.heads, q.shape[2], Dv)

    def state_shape(self, feature_map: str) -> tuple[int, int, int, int]:
        """[N, Hs, F, Dv]."""
        return self.sequences, self.state_heads, feature_rows(feature_map, self.k.shape[3]), self.v.shape[3]

    def state_was_written(self) -> None:
        """Tells autograd, which does not see what a kernel writes: whoever saved the state before may not use it now."""
        for t in (self.kv, self.z):
            if t is not None:
                increment_version(t)


LINEAR_DIFFERENTIABLE: tuple[str, ...] = LinearTensors._fields[:7]


class LinearCall(NamedTuple):
    """One call as dispatch sees it; `step`: one token, whose state is advanced in place."""

    x: LinearTensors
    params: LinearParams
    needs_grad: bool
    step: bool = False

    @property
    def op(self) -> str:
        return "linear"

    def __str__(self) -> str:
        x, params, needs_grad, step = self
        words = [*_words(x), f"feature map {params.feature_map}", "causal" if params.causal else "not causal"]
        options = {"decay": x.decay, "beta": x.beta, "key_mask": x.key_mask, "cu_seqlens": x.cu_seqlens}
        words += [f"{name} {list(t.shape)}" for name, t in options.items() if t is not None]
        words += ["normalised"] * params.normalize + ["one step in place"] * step
        return ", ".join([*words, "with gradient" if needs_grad else "no gradient"])


Call = Union[SoftmaxCall, LinearCall]


def _words(x: Union[SoftmaxTensors, LinearTensors]) -> list[str]:
    words = [f"{name} {list(t.shape)}" for name, t in (("q", x.q), ("k", x.k), ("v", x.v))]
    return [*words, str(x.q.dtype).removeprefix("torch."), str(x.q.device)]


def _memory_order(q: Tensor) -> tuple[int, int, int]:
    """The first three dimensions of q, outermost in memory first; an expanded one stays in its place, as in torch."""
    strides = q.stride()
    if strides[0] >= strides[1] >= strides[2]:
        return 0, 1, 2
    if strides[0] >= strides[2] >= strides[1] > 0:
        return 0, 2, 1
    order = [0, 1, 2]
    for i, j in ((0, 1), (0, 2), (1, 2)):  # not sorted(): torch.compile traces comparisons of sizes that vary
        if 0 < strides[order[i]] < strides[order[j]]:
            order[i], order[j] = order[j], order[i]
    return order[0], order[1], order[2]


def empty_like_layout(q: Tensor, last: int, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Uninitialised [B, H, L, last] whose dimensions lie in memory in the order of q's (out follows q)."""
    if dtype is None and q.shape[3] == last and q.is_contiguous():
        return torch.empty_like(q)  # half the cost of new_empty, which shows where a call takes microseconds
    order = _memory_order(q)
    if order == (0, 1, 2):
        return q.new_empty((*q.shape[:3], last), dtype=dtype)
    inverse = [order.index(dim) for dim in range(3)]
    return q.new_empty([q.shape[dim] for dim in order] + [last], dtype=dtype).permute(*inverse, 3)


def to_layout(out: Tensor, q: Tensor) -> Tensor:
    """out, moved where its dimensions do not lie in memory in the order of q's; differentiable."""
    order = _memory_order(q)
    inverse = [order.index(dim) for dim in range(3)]
    return out.permute(*order, 3).contiguous().permute(*inverse, 3)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax, lse and all sums are kept in this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
