"""Input makers shared by tests and bench: cases, memory layouts, adversarial values. Torch only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One attention problem. `mask`, `bias` and `alibi` are shapes in letters: "bhqk", "1h1k", "k", "h", ...; "1" broadcasts."""

    B: int = 2
    Hq: int = 4
    Hk: int = 4
    Lq: int = 33
    Lk: int = 47
    D: int = 16
    Dv: int | None = None
    causal: bool | str = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    mask: str | None = None
    bias: str | None = None
    dropout_p: float = 0.0
    layout: str = "contiguous"
    fp32_bias: bool = False
    softcap: float | None = None
    alibi: str | None = None
    sinks: bool = False

    @property
    def head_dim_v(self) -> int:
        return self.D if self.Dv is None else self.Dv

    def sizes(self, letters: str) -> tuple[int, ...]:
        return tuple({"b": self.B, "h": self.Hq, "q": self.Lq, "k": self.Lk, "1": 1}[letter] for letter in letters)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of fastattn.attention that are not tensors and not at their defaults."""
        values = {"causal": self.causal, "window": self.window, "scale": self.scale, "dropout_p": self.dropout_p}
        values["softcap"] = self.softcap
        return {name: value for name, value in values.items() if value not in (None, False, 0.0) or name == "scale"}

    def __str__(self) -> str:
        """Non-default fields only: readable test ids."""
        default = Case()
        fields = [name for name in self.__dataclass_fields__ if getattr(self, name) != getattr(default, name)]
        text = "-".join(f"{name}={getattr(self, name)}" for name in fields) or "default"
        return text.replace(" ", "").replace("/", "_")


class Inputs(NamedTuple):
    """Tensors of one call; `dout` and `dlse` are the cotangents to use in the backward pass."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    dout: Tensor
    dlse: Tensor
    slopes: Tensor | None = None
    sinks: Tensor | None = None


def _permuted(order: tuple[int, int, int, int]) -> Callable[[Tensor], Tensor]:
    def relayout(x: Tensor) -> Tensor:
        inverse = [order.index(i) for i in range(4)]
        return x.permute(order).contiguous().permute(inverse)

    return relayout


def _last_strided(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
    view = wide[..., 1::2] if x.shape[-1] else wide[..., :0]
    return view.copy_(x)


def _sliced(x: Tensor) -> Tensor:
    """A view with a storage offset, padded rows and an odd row stride; what lies between is NaN."""
    frame = x.new_full(tuple(n + 2 for n in x.shape[:-1]) + (x.shape[-1] + 3,), float("nan"))
    view = frame[tuple(slice(1, n + 1) for n in x.shape[:-1])][..., 3:]
    return view.copy_(x)


def _expanded(x: Tensor) -> Tensor:
    """Stride 0 over batch and heads: every head sees the first one's values."""
    return x[:1, :1].contiguous().expand(x.shape) if x.shape[0] and x.shape[1] else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "blhd": _permuted((0, 2, 1, 3)),
    "lbhd": _permuted((2, 0, 1, 3)),
    "bhdl": _permuted((0, 1, 3, 2)),
    "last_strided": _last_strided,
    "sliced": _sliced,
    "expanded": _expanded,
}


def relayout(x: Tensor, layout: str) -> Tensor:
    """The same values (all heads equal for "expanded") behind other strides."""
    return LAYOUTS[layout](x)


def generator(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def randn(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    seed: int = 0,
    device: str | torch.device = "cpu",
    drawn_on: str | torch.device = "cpu",
) -> Tensor:
    """Drawn in fp32 on the CPU whatever the dtype, so that every dtype and device rounds the same numbers.

    `drawn_on` the device itself is quicker for large tensors, and gives other numbers.
    """
    return torch.randn(shape, generator=generator(seed, drawn_on), device=drawn_on).to(device, dtype)


def random_mask(
    shape: tuple[int, ...], seed: int = 0, density: float = 0.6, device: str | torch.device = "cpu"
) -> Tensor:
    return (torch.rand(shape, generator=generator(seed)) < density).to(device)


def make(
    case: Case,
    dtype: torch.dtype,
    seed: int = 0,
    device: str | torch.device = "cpu",
    drawn_on: str | torch.device = "cpu",
) -> Inputs:
    """Random tensors of a case. dout is strided like a transposed projection's gradient, never plain contiguous."""

    def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
        return randn(shape, dtype, seed, device, drawn_on)

    B, Hq, Hk, Lq, Lk, D, Dv = case.B, case.Hq, case.Hk, case.Lq, case.Lk, case.D, case.head_dim_v
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    bias_dtype = torch.float32 if case.fp32_bias else dtype
    return Inputs(
        q=relayout(drawn((B, Hq, Lq, D), dtype, seed + 1), case.layout),
        k=relayout(drawn((B, Hk, Lk, D), dtype, seed + 2), case.layout),
        v=relayout(drawn((B, Hk, Lk, Dv), dtype, seed + 3), case.layout),
        mask=None if case.mask is None else random_mask(case.sizes(case.mask), seed + 4, device=device),
        bias=None if case.bias is None else drawn(case.sizes(case.bias), bias_dtype, seed + 5),
        dout=relayout(drawn((B, Hq, Lq, Dv), dtype, seed + 6), "blhd"),
        dlse=drawn((B, Hq, Lq), lse_dtype, seed + 7),
        slopes=None if case.alibi is None else drawn(case.sizes(case.alibi), lse_dtype, seed + 8) / 10,
        sinks=drawn((Hq,), lse_dtype, seed + 9) if case.sinks else None,
    )


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same numbers in another precision (lossless upwards); the golden run uses fp64."""
    tensors: list[Any] = [x if x is None or x.dtype == torch.bool else x.to(dtype) for x in inputs]
    return Inputs(*tensors)


def variants(case: Case, **axes: tuple) -> list[Case]:
    """One case per value of each axis, all other fields as in `case`: a star, not a grid."""
    return [replace(case, **{name: value}) for name, values in axes.items() for value in values]
