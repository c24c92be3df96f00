"""Argument checks shared by the public functions. Each error names the argument, the shapes, and the way out."""

from __future__ import annotations

import numbers
import sys
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from .params import CAUSAL_BOTTOM_RIGHT, CAUSAL_NONE, CAUSAL_TOP_LEFT

if TYPE_CHECKING:
    from .masks.plan import TilePlan

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST = sys.float_info.max
FAR = 2**62  # a window side from here on is unbounded: it fits no tensor, and int64 no longer holds sums of it
Window = Optional[tuple[Optional[int], Optional[int]]]


def shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())


def _is_dense(t: Tensor) -> bool:
    return t.dim() == 4 and t.layout is torch.strided and not t.is_nested


def refuse_layout(name: str, t: Tensor, error: type[Exception] = TypeError) -> None:
    if t.is_nested:
        raise error(
            f"{name} must be a dense strided tensor, got a nested one; pad it with torch.nested.to_padded_tensor, or lay its "
            "sequences end to end and pass cu_seqlens"
        )
    if t.layout != torch.strided:
        raise error(f"{name} must be a dense strided tensor, got layout {t.layout}; convert it with .to_dense()")


def _refuse_type(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        refuse_layout(name, t)
        if t.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [batch, heads, length, head_dim], got {name} {list(t.shape)}; "
                "add the missing ones with unsqueeze (fastattn.scaled_dot_product_attention takes 2 to 5)"
            )


def qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B, Hq, Lq, D], k [B, Hk, Lk, D], v [B, Hk, Lk, Dv], one dtype, one device, Hq a multiple of Hk."""
    dense_floats(q, k, v)
    same_sizes(q, k, v)
    Hq, Hk, Hv = q.shape[1], k.shape[1], v.shape[1]
    if Hk != Hv:
        raise ValueError(f"k and v must have the same number of heads: {shapes(k=k, v=v)}")
    if (Hk == 0) != (Hq == 0) or (Hk != 0 and Hq % Hk != 0):
        raise ValueError(
            f"the {Hq} heads of q must be a multiple of the {Hk} heads of k and v (grouped queries): {shapes(q=q, k=k)}"
        )


def dense_floats(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Tensors of four dimensions, of one floating dtype, on one device."""
    tensors = isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    if not tensors or not (_is_dense(q) and _is_dense(k) and _is_dense(v)):
        _refuse_type(q, k, v)
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(
            f"q, k and v must share one dtype, got q {q.dtype}, k {k.dtype}, v {v.dtype}; cast them or use autocast"
        )
    if q.dtype not in FLOAT_DTYPES:
        raise TypeError(f"q, k, v dtype {q.dtype} is not supported; use float32, bfloat16, float16 or float64")
    if q.device != k.device or q.device != v.device:
        raise ValueError(f"q, k and v must be on one device, got q {q.device}, k {k.device}, v {v.device}")


def same_sizes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """One batch; k and v of one length; q and k of one head dimension."""
    B, _, _, D = q.shape
    Bk, _, Lk, Dk = k.shape
    Bv, _, Lv, _ = v.shape
    if B != Bk or B != Bv:
        raise ValueError(f"batch sizes differ: {shapes(q=q, k=k, v=v)}; expand the smaller one")
    if Lk != Lv:
        raise ValueError(f"k and v must have the same length: {shapes(k=k, v=v)}")
    if D != Dk:
        raise ValueError(f"q and k must have the same head dimension: {shapes(q=q, k=k)}")


def broadcastable(name: str, t: Tensor, target: tuple[int, ...], device: torch.device) -> Tensor:
    """t with leading 1s added up to four dimensions, each 1 or that of target [B, Hq, Lq, Lk]."""
    refuse_layout(name, t)
    if t.device != device:
        raise ValueError(f"{name} is on {t.device} but q is on {device}; move it with .to(q.device)")
    if t.dim() > 4:
        raise ValueError(f"{name} {list(t.shape)} has more than 4 dimensions; it must broadcast to {list(target)}")
    full = t[(None,) * (4 - t.dim())] if t.dim() < 4 else t
    for size, wanted in zip(full.shape, target):
        if size != wanted and size != 1:
            raise ValueError(
                f"{name} {list(t.shape)} does not broadcast to [B, Hq, Lq, Lk] = {list(target)}: "
                "each dimension must be 1 or equal"
            )
    return full


def causal_bias(value: Any) -> Optional[str]:
    """The alignment of torch's CausalBias, a tensor whose memory was never written; None for anything else."""
    bias = None if type(value) is Tensor else sys.modules.get("torch.nn.attention.bias")
    if bias is None or not isinstance(value, bias.CausalBias):
        return None
    return CAUSAL_BOTTOM_RIGHT if value.variant == bias.CausalVariant.LOWER_RIGHT else CAUSAL_TOP_LEFT


def _refuse_causal_bias(name: str, value: Tensor) -> None:
    if causal_bias(value):
        raise TypeError(
            f"{name} is a torch.nn.attention.bias.CausalBias, which holds no numbers; "
            "pass mask=fastattn.masks.from_causal_bias(...), or causal="
        )


def bool_mask(mask: Tensor, target: tuple[int, ...], device: torch.device) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor, a mask of fastattn.masks or its plan, got {type(mask).__name__}")
    _refuse_causal_bias("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be a bool tensor (True = visible), got {mask.dtype} {list(mask.shape)}; "
            "pass additive float masks as bias="
        )
    return broadcastable("mask", mask, target, device)


def slices(found: tuple[int, int], target: tuple[int, ...]) -> None:
    """The batches and heads of a mask are 1 or those of the call."""
    if any(n not in (1, wanted) for n, wanted in zip(found, target)):
        raise ValueError(
            f"mask has {found[0]} batches and {found[1]} heads, which does not broadcast to B {target[0]}, Hq {target[1]}"
        )


def tile_plan(plan: TilePlan, target: tuple[int, ...], device: torch.device) -> TilePlan:
    """The plan on `device`; its lengths are those of the call, its batches and heads 1 or those of the call."""
    if (plan.Lq, plan.Lk) != target[2:]:
        raise ValueError(
            f"mask is a plan for Lq {plan.Lq}, Lk {plan.Lk}, but q and k have Lq {target[2]}, Lk {target[3]}"
        )
    slices((plan.batches, plan.heads), target)
    if plan.rows.is_meta and device.type != "meta":
        raise ValueError("mask is a plan on the meta device, which holds no data")
    return plan if plan.rows.device == device else plan.to(device)


def _per_head(name: str, t: Tensor, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = getattr(t, "dtype", type(t).__name__)
        raise TypeError(f"{name} must be a floating point tensor {_either(shapes)}, got {got}")
    refuse_layout(name, t)
    if t.device != device:
        raise ValueError(f"{name} is on {t.device} but q is on {device}; move it with .to(q.device)")
    if not has_shape(t, shapes):
        raise ValueError(f"{name} {list(t.shape)} must be {_either(shapes)}")
    return t


def has_shape(t: Tensor, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Of as many dimensions first: where sizes are symbols, each that is compared is bound to what it was."""
    return any(t.dim() == len(shape) and t.shape == shape for shape in shapes)


def _either(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " or ".join(str(list(shape)) for shape in shapes)


def alibi_slopes(slopes: Tensor, B: int, Hq: int, device: torch.device) -> Tensor:
    """[B|1, Hq]."""
    slopes = _per_head("alibi_slopes", slopes, ((Hq,), (B, Hq)), device)
    return slopes if slopes.dim() == 2 else slopes[None]


def sinks(sinks: Tensor, Hq: int, device: torch.device) -> Tensor:
    return _per_head("sinks", sinks, ((Hq,),), device)


def cu_seqlens(name: str, starts: Tensor, of: str, L: int) -> Tensor:
    """int64 on the CPU, where masks are built."""
    sequence_ends(name, starts)
    if starts.is_meta:
        raise ValueError(f"{name} is on meta, but its values say what is visible; pass it on the CPU")
    starts = starts.detach().to("cpu", torch.int64)
    rising_ends(name, starts, of, L)
    return starts


def sequence_ends(name: str, starts: Tensor) -> None:
    if not isinstance(starts, Tensor) or starts.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{name} must be an int32 tensor [sequences + 1], got {getattr(starts, 'dtype', type(starts).__name__)}"
        )
    refuse_layout(name, starts)
    if starts.dim() != 1 or len(starts) < 1:
        raise ValueError(f"{name} must be [sequences + 1], got {list(starts.shape)}")


def rising_ends(name: str, starts: Tensor, of: str, L: int) -> None:
    if starts[0] != 0 or starts[-1] != L or (starts.diff() < 0).any():
        raise ValueError(
            f"{name} must rise from 0 to the length of {of}, {L}, got {starts[0].item()} to {starts[-1].item()}"
            + (", falling in between" if (starts.diff() < 0).any() else "")
        )


def softcap_value(softcap: Optional[float]) -> float:
    """0.0 for none."""
    if softcap is None:
        return 0.0
    if not _is_number(softcap):
        raise TypeError(f"softcap must be a float > 0 or None, got {softcap!r}")
    if not 0 < softcap <= LARGEST:
        raise ValueError(f"softcap must be > 0 and finite, or None, got {softcap!r}")
    return float(softcap)


def float_bias(bias: Tensor, q: Tensor, target: tuple[int, ...]) -> Tensor:
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a float tensor, got {type(bias).__name__}")
    _refuse_causal_bias("bias", bias)
    if bias.dtype != q.dtype and not (bias.dtype == torch.float32 and q.dtype != torch.float64):
        raise TypeError(
            f"bias must have the dtype of q ({q.dtype}) or float32, got {bias.dtype} {list(bias.shape)}; "
            "pass bool masks as mask="
        )
    return broadcastable("bias", bias, target, q.device)


def causal_mode(causal) -> str:
    if causal is False or causal is None:
        return CAUSAL_NONE
    if causal is True:
        return CAUSAL_BOTTOM_RIGHT
    if isinstance(causal, str) and causal in (CAUSAL_TOP_LEFT, CAUSAL_BOTTOM_RIGHT):
        return causal
    raise ValueError(f'causal must be False, True, "top_left" or "bottom_right", got {causal!r}')


def window_sides(window: Window) -> tuple[Optional[int], Optional[int]]:
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be (left, right), each an int >= 0 or None for unbounded, got {window!r}")
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, (int, torch.SymInt))):
            raise TypeError(f"window sides must be ints or None, got {window!r}")
        if side is not None and side < 0:
            raise ValueError(f"window sides must be >= 0 or None for unbounded, got {window!r}")
    left, right = (None if side is None or side >= FAR else side for side in window)
    return left, right


def deterministic(value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"deterministic must be True, False or None, got {value!r}")
    return torch.are_deterministic_algorithms_enabled() if value is None else value


def probability(p) -> float:
    if not _is_number(p):
        raise TypeError(f"dropout_p must be a float in [0, 1], got {p!r}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p must be a float in [0, 1], got {p!r}")
    return float(p)


def scale_value(scale, D: int) -> float:
    if scale is None:
        return D**-0.5 if D > 0 else 1.0
    if not _is_number(scale):
        raise TypeError(f"scale must be a float, got {type(scale).__name__} {scale!r}")
    if not -LARGEST <= scale <= LARGEST:  # not isfinite: torch.compile traces comparisons of numbers that vary
        raise ValueError(f"scale must be finite, got {scale!r}")
    return float(scale)


def _is_number(x) -> bool:
    return isinstance(x, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)) and not isinstance(x, bool)
