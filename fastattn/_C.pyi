from torch import Tensor

def isa() -> str: ...
def best_isa() -> str: ...
def is_decode(Lq: int, group: int, Lk: int) -> bool: ...
def softmax_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_parts: Tensor | None,
    scale: float,
    lo: int | None,
    hi: int | None,
    dropout_p: float,
    threads: int,
    /,
) -> None: ...
def softmax_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    out: Tensor,
    lse_parts: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dbias: Tensor | None,
    scale: float,
    lo: int | None,
    hi: int | None,
    dropout_p: float,
    threads: int,
    /,
) -> None: ...
def peak_fma(threads: int, seconds: float) -> float: ...
def peak_bf16_dot(threads: int, seconds: float) -> float: ...
def read_bandwidth(threads: int, bytes: int) -> float: ...
