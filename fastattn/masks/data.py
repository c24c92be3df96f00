"""Tensors inside masks: checked, kept on the CPU, compared by value, shown short, and stored in JSON."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..checks import FAR

F = TypeVar("F", bound=Callable[..., Any])
Ints = Any  # a field given as an int tensor or a nested list of ints, a tensor from the constructor on


@contextmanager
def plainly() -> Iterator[None]:
    """Tensors made inside are ordinary ones, on the CPU by default: masks and plans outlive modes and transforms."""
    with torch.inference_mode(False), torch._C._DisableFuncTorch(), _disable_current_modes():
        with torch._C.DisableTorchFunction():  # a default device is a mode too
            yield


def uncompiled(function: F) -> F:
    """`function`, which torch.compile does not trace but calls, breaking its graph: how a mask is built is no graph."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def owned(name: str, value: Any, dims: Sequence[int]) -> Tensor:
    """A CPU copy of a tensor (or nested list) that nobody else can write; its number of dimensions is one of `dims`."""
    if not isinstance(value, Tensor):
        try:
            value = torch.tensor(value, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must be a tensor or a list of numbers: {error}") from None
        if value.numel() == 0 and value.dtype == torch.float32:
            value = value.long()
    refuse_foreign(name, value, dims)
    return value.detach().clone(memory_format=torch.contiguous_format)


def refuse_foreign(name: str, value: Any, dims: Sequence[int]) -> None:
    """Unless it is a dense CPU tensor with one of these numbers of dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.device.type != "cpu":
        raise ValueError(f"{name} is on {value.device}; mask data lives on the CPU: pass {name}.cpu(), and move plans")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense strided tensor, got layout {value.layout}")
    if value.dim() not in dims:
        wanted = " or ".join(map(str, dims))
        raise ValueError(f"{name} must have {wanted} dimensions, got shape {list(value.shape)}")


def integers(name: str, value: Any, dims: Sequence[int]) -> Tensor:
    """`owned` for integers, as int32 where they fit: masks of equal numbers are equal."""
    tensor = owned(name, value, dims)
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} must hold integers, got {tensor.dtype}")
    wide = tensor.long()
    narrow = wide.to(torch.int32)
    return narrow if bool((narrow == wide).all()) else wide


def bools(name: str, value: Any, dims: Sequence[int]) -> Tensor:
    tensor = owned(name, value, dims)
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor (True = visible), got {tensor.dtype}")
    return tensor


def whole(name: str, value: Any, least: int, most: int = FAR) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    return value


def leading(tensor: Tensor, rest: int) -> Tensor:
    """tensor [(B, (H,)) ...], whose last `rest` dimensions are not batch or head, as [B|1, H|1, ...]."""
    if tensor.dim() == rest:
        return tensor[None, None]
    return tensor if tensor.dim() == rest + 2 else tensor.unsqueeze(1)


def batch_heads(tensor: Tensor, rest: int) -> tuple[int, int]:
    batches, heads = leading(tensor, rest).shape[:2]
    return batches, heads


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def show(value: Any) -> str:
    """Short enough for a repr, and different for most different values."""
    if not isinstance(value, Tensor):
        return repr(value)
    if value.numel() <= 16 and value.dtype != torch.bool:
        return str(value.tolist())
    kind = str(value.dtype).removeprefix("torch.")
    return f"<{kind} {'x'.join(map(str, value.shape))}, sum {int(value.sum())}>"


def encode(value: Any) -> Any:
    """JSON of a field: tensors as {"dtype", "shape", "data"}, the data in base64."""
    if isinstance(value, Tensor):
        # Eight bools a byte.
        flat = _pack_bools(value) if value.dtype == torch.bool else value.reshape(-1).view(torch.uint8)
        text = base64.b64encode(bytes(flat.tolist())).decode()
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "data": text}
    return list(value) if isinstance(value, tuple) else value


def decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    if set(value) != {"dtype", "shape", "data"} or value["dtype"] not in ("bool", "int32", "int64"):
        raise ValueError(f"not a tensor of a mask: keys {sorted(value)}, dtype {value.get('dtype')!r}")
    dtype, shape = getattr(torch, value["dtype"]), value["shape"]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"not a shape: {shape!r}")
    try:
        data = base64.b64decode(value["data"], validate=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"not base64 data of a tensor: {error}") from None
    size = 1
    for n in shape:
        size *= n
    if len(data) != (-(-size // 8) if dtype == torch.bool else size * dtype.itemsize):
        raise ValueError(f"{len(data)} bytes do not fill a {value['dtype']} tensor of shape {shape}")
    empty = torch.empty(0, dtype=torch.uint8, device="cpu")
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else empty
    if dtype == torch.bool:
        return ((flat[:, None] >> _bit_numbers()) & 1).flatten()[:size].bool().view(shape)
    return flat.view(dtype).view(shape)


def _pack_bools(value: Tensor) -> Tensor:
    flat = torch.nn.functional.pad(value.reshape(-1), (0, -value.numel() % 8)).view(-1, 8)
    return (flat.to(torch.uint8) << _bit_numbers()).sum(-1, dtype=torch.uint8)


def _bit_numbers() -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device="cpu")
