from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

version: str

def isa() -> str: ...
def best_isa() -> str: ...

class PlanBuilder:
    def __init__(self, batches: int, heads: int, Lq: int, Lk: int) -> None: ...
    def add_rows(self, steps: Sequence[tuple[Any, ...]], i0: int, i1: int, /) -> None: ...
    def count_pairs(self, steps: Sequence[tuple[Any, ...]], i0: int, i1: int, /) -> int: ...
    def add_mask(self, mask: Tensor, threads: int, /) -> None: ...
    def finish(self) -> tuple[int, int, int]: ...
    def write(self, tensors: tuple[Tensor, ...], /) -> None: ...

def check_plan(plan: tuple[Tensor | int, ...], /) -> None: ...
def is_decode(Lq: int, group: int, Lk: int) -> bool: ...
def softmax_forward(
    tensors: tuple,
    out: Tensor,
    lse: Tensor,
    lse_parts: Tensor | None,
    scale: float,
    lo: int | None,
    hi: int | None,
    softcap: float,
    dropout_p: float,
    threads: int,
    /,
) -> None: ...
def softmax_plain_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: int,
    grouped: bool,
    grad_enabled: bool,
    threads: int,
    /,
) -> Tensor | tuple[Tensor, Tensor] | None: ...
def softmax_plain_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse_parts: Tensor,
    needs: tuple[bool, bool, bool],
    scale: float | None,
    causal: int,
    threads: int,
    /,
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None: ...
def softmax_backward(
    dout: Tensor,
    dlse: Tensor | None,
    tensors: tuple,
    out: Tensor,
    lse_parts: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dbias: Tensor | None,
    dslopes: Tensor | None,
    scale: float,
    lo: int | None,
    hi: int | None,
    softcap: float,
    dropout_p: float,
    threads: int,
    /,
) -> None: ...
def linear_forward(
    tensors: tuple,
    out: Tensor,
    kv: Tensor,
    z: Tensor | None,
    saved: Tensor | None,
    feature_map: str,
    causal: bool,
    normalize: bool,
    scale: float,
    threads: int,
    /,
) -> None: ...
def linear_backward(
    dout: Tensor,
    dkv: Tensor | None,
    dz: Tensor | None,
    tensors: tuple,
    out: Tensor,
    saved: Tensor | None,
    gradients: tuple[Tensor | None, ...],
    feature_map: str,
    causal: bool,
    normalize: bool,
    scale: float,
    threads: int,
    /,
) -> None: ...
def linear_step(
    tensors: tuple, out: Tensor, feature_map: str, normalize: bool, scale: float, threads: int, /
) -> None: ...
def linear_plain_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    feature_map: str,
    causal: bool,
    normalize: bool,
    scale: float | None,
    grad_enabled: bool,
    threads: int,
    /,
) -> Tensor | tuple[Tensor, Tensor | None] | None: ...
def linear_plain_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    out: Tensor,
    saved: Tensor | None,
    needs: Sequence[bool],
    feature_map: str,
    causal: bool,
    normalize: bool,
    scale: float | None,
    threads: int,
    /,
) -> tuple[Tensor | None, ...] | None: ...
def linear_plain_step(
    tensors: tuple, feature_map: str, normalize: bool, scale: float | None, grad_enabled: bool, threads: int, /
) -> Tensor | None: ...
def peak_fma(threads: int, seconds: float) -> float: ...
def peak_bf16_dot(threads: int, seconds: float) -> float: ...
def read_bandwidth(threads: int, bytes: int) -> float: ...
def cuda_load(path: str, /) -> None: ...
def cuda_softmax_why_not(
    tensors: tuple,
    out: Tensor,
    scale: float,
    lo: int | None,
    hi: int | None,
    softcap: float,
    dropout_p: float,
    launch: tuple[int, int, int, int, bool],
    /,
) -> str | None: ...
def cuda_softmax_forward(
    tensors: tuple,
    out: Tensor,
    lse: Tensor,
    lse_parts: Tensor | None,
    scale: float,
    lo: int | None,
    hi: int | None,
    softcap: float,
    dropout_p: float,
    launch: tuple[int, int, int, int, bool],
    allocate: Callable[[int], Tensor],
    /,
) -> None: ...
def cuda_softmax_backward(
    dout: Tensor,
    dlse: Tensor | None,
    tensors: tuple,
    out: Tensor,
    lse_parts: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dbias: Tensor | None,
    scale: float,
    lo: int | None,
    hi: int | None,
    softcap: float,
    dropout_p: float,
    launch: tuple[int, int, int, int, bool],
    allocate: Callable[[int], Tensor],
    /,
) -> None: ...
