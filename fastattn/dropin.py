"""`fastattn.scaled_dot_product_attention` and the opt-in patch that puts it in torch's place."""

from __future__ import annotations

import numbers
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .autograd import autocast
from .checks import causal_bias, refuse_layout, shapes
from .dispatch import check_name
from .ops.softmax import attention
from .ops.softmax_plain import plain_attention

_torch_sdpa: Callable = F.scaled_dot_product_attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with the same arguments and meaning, on fastattn's kernels.

    query [..., Hq, Lq, D], key [..., Hk, Lk, D], value [..., Hk, Lk, Dv], two to five dimensions, batch dimensions
    broadcast. attn_mask broadcasts to [..., Hq, Lq, Lk]: bool (True takes part) or float (added; dtype of query or
    float32; differentiable); or it is a CausalBias of torch.nn.attention.bias for Lq and Lk. is_causal is aligned
    top-left, as in torch. With enable_gqa, Hq may be a multiple of Hk.

    Raises RuntimeError with the shapes where the arguments do not fit; attn_mask together with is_causal is refused:
    `fastattn.attention(mask=..., causal=...)` combines them.
    """
    function = scaled_dot_product_attention
    return _sdpa(function, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, "auto")


def _sdpa(function, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend) -> Tensor:
    """`function`: what was called, for subclasses and modes that override it."""
    if type(dropout_p) is not float:
        dropout_p = _number("dropout_p", dropout_p)
    if scale is not None and type(scale) is not float:
        scale = _number("scale", scale)
    flags = (is_causal is False or is_causal is True) and (enable_gqa is False or enable_gqa is True)
    observed = torch._C._is_torch_function_mode_enabled()
    if dropout_p == 0 and backend == "auto" and flags and not observed and (attn_mask is None or not is_causal):
        causal = "top_left" if is_causal else False
        quick = plain_attention(query, key, value, attn_mask, scale, causal, enable_gqa)
        if quick is not None:
            return quick
    if any(isinstance(t, Tensor) and t.is_nested for t in (query, key, value)):
        # Ragged batches are torch's own; fastattn takes them packed, not nested.
        return _torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    causal = "top_left" if is_causal is True else causal_bias(attn_mask) or False
    # A causal bias is a subclass for torch's own function; here it is a word.
    tensors = (query, key, value, None if causal else attn_mask)
    if has_torch_function(tensors):
        return handle_torch_function(
            function, tensors, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    _check_types(query, key, value, attn_mask, is_causal, enable_gqa)
    query, key, value = autocast(query, key, value)
    _check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    lead, q, k, v = _four_dimensions(query, key, value, enable_gqa)
    mask, bias = _split_mask(None if causal else attn_mask, q, k, lead)
    out = attention(q, k, v, mask=mask, bias=bias, causal=causal, dropout_p=dropout_p, scale=scale, backend=backend)
    rank = max(query.dim(), key.dim(), value.dim())
    return out if rank == 4 else out.reshape(*lead, *out.shape[1 if rank > 2 else 2 :])


def _number(name: str, x):
    """As torch takes a float: also a bool, a number of NumPy, or a tensor that holds one and needs no gradient."""
    if type(x) is int or isinstance(x, (torch.SymInt, torch.SymFloat)):
        return x
    if isinstance(x, numbers.Real) or isinstance(x, Tensor) and x.dim() == 0 and not x.requires_grad:
        return float(x)
    raise TypeError(f"{name} must be a float, got {type(x).__name__} {x!r}")


def _check_types(query, key, value, attn_mask, is_causal, enable_gqa) -> None:
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {type(flag).__name__} {flag!r}")
    for name, t in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if name == "attn_mask" and t is None:
            continue
        if not isinstance(t, Tensor):
            hint = "; masks and plans are taken by fastattn.attention(mask=...)" if name == "attn_mask" else ""
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}{hint}")
        refuse_layout(name, t, RuntimeError)


def _sizes(query, key, value) -> str:
    return shapes(query=query, key=key, value=value)


def _check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa) -> None:
    ranks = (query.dim(), key.dim(), value.dim())
    if min(ranks) < 2 or max(ranks) > 5:
        raise RuntimeError(f"query, key and value must have 2 to 5 dimensions: {_sizes(query, key, value)}")
    if query.dtype != key.dtype or query.dtype != value.dtype:
        raise RuntimeError(
            f"query, key and value must share one dtype: {query.dtype}, {key.dtype}, {value.dtype} ({_sizes(query, key, value)})"
        )
    if not query.is_floating_point():
        raise RuntimeError(
            f"query, key and value must be floating point, got {query.dtype} ({_sizes(query, key, value)})"
        )
    if query.device != key.device or query.device != value.device:
        raise RuntimeError(f"query, key and value must be on one device: {query.device}, {key.device}, {value.device}")
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(f"query and key must have the same last dimension: {_sizes(query, key, value)}")
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(f"key and value must have the same length: {_sizes(query, key, value)}")
    if attn_mask is not None and attn_mask.device != query.device:
        raise RuntimeError(f"attn_mask is on {attn_mask.device} but query is on {query.device}; move it with .to()")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p!r}")
    if attn_mask is not None and is_causal:
        raise RuntimeError(
            f"attn_mask {list(attn_mask.shape)} and is_causal are both set ({_sizes(query, key, value)}); "
            "combine them with fastattn.attention(mask=..., causal='top_left')"
        )
    if causal_bias(attn_mask) and (attn_mask.seq_len_q, attn_mask.seq_len_kv) != (query.shape[-2], key.shape[-2]):
        raise RuntimeError(
            f"attn_mask is a CausalBias of {attn_mask.seq_len_q} x {attn_mask.seq_len_kv}: {_sizes(query, key, value)}"
        )
    if enable_gqa:
        if min(ranks) < 3:
            raise RuntimeError(f"enable_gqa needs a head dimension: {_sizes(query, key, value)}")
        Hq, Hk, Hv = query.shape[-3], key.shape[-3], value.shape[-3]
        if Hk != Hv or (Hk == 0) != (Hq == 0) or (Hk and Hq % Hk):
            raise RuntimeError(
                f"enable_gqa needs the heads of query to be a multiple of those of key and value: {_sizes(query, key, value)}"
            )


def _four_dimensions(query, key, value, enable_gqa):
    """(leading batch shape, q, k, v) with q, k, v [batch, heads, L, D]; heads that broadcast stay unexpanded in k, v."""
    rank = max(query.dim(), key.dim(), value.dim())
    if rank == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return query.shape[:1], query, key, value
    tensors = [t[(None,) * (max(rank, 3) - t.dim())] if t.dim() < max(rank, 3) else t for t in (query, key, value)]
    try:
        lead = torch.broadcast_shapes(*(t.shape[:-3] for t in tensors))
    except RuntimeError as error:
        raise RuntimeError(
            f"batch dimensions of query, key and value do not broadcast: {_sizes(query, key, value)}"
        ) from error
    Hq, Hk, Hv = (t.shape[-3] for t in tensors)
    if Hk != Hv:
        if 1 not in (Hk, Hv):
            raise RuntimeError(f"key and value must have the same number of heads: {_sizes(query, key, value)}")
        Hk = max(Hk, Hv)
    if Hq == 1 and Hk > 1:
        Hq = Hk
    if Hk not in (1, Hq) and not enable_gqa:
        raise RuntimeError(
            f"query has {Hq} heads, key and value {Hk}; set enable_gqa=True to group them: {_sizes(query, key, value)}"
        )
    heads = (Hq, Hk, Hk)
    full = []
    for t, H in zip(tensors, heads):
        shape = (*lead, H, *t.shape[-2:])
        t = t if t.shape == shape else t.expand(shape)
        full.append(t.unsqueeze(0) if t.dim() == 3 else t if t.dim() == 4 else t.flatten(0, -4))
    return lead, *full


def _split_mask(attn_mask, q, k, lead):
    """(mask, bias): the bool or float attn_mask in four dimensions, broadcast only where folding the batch needs it."""
    if attn_mask is None:
        return None, None
    if attn_mask.dtype not in (torch.bool, torch.float32):
        (attn_mask,) = autocast(attn_mask)
        if attn_mask.dtype != q.dtype:
            raise RuntimeError(
                f"attn_mask must be bool, {q.dtype} or float32, got {attn_mask.dtype} {list(attn_mask.shape)}"
            )
    elif attn_mask.dtype == torch.float32 and q.dtype == torch.float64:
        attn_mask = attn_mask.double()
    scores = (*lead, q.shape[1], q.shape[2], k.shape[2])
    fits = attn_mask.dim() <= len(scores) and all(m in (1, s) for m, s in zip(attn_mask.shape[::-1], scores[::-1]))
    if not fits:
        raise RuntimeError(f"attn_mask {list(attn_mask.shape)} does not broadcast to {list(scores)}")
    if len(lead) > 1 and attn_mask.dim() > 3:
        attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4)
    return (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)


@dataclass(frozen=True)
class PatchReport:
    """What `enable` changed in torch. Prints as text."""

    active: bool
    depth: int
    backend: str
    patched: tuple[str, ...]

    def __str__(self) -> str:
        if not self.active:
            return "fastattn is not patched into torch"
        changes = "\n".join(f"  {line}" for line in self.patched)
        return f"fastattn is patched into torch (depth {self.depth}, backend {self.backend!r}):\n{changes}"

    __repr__ = __str__


@dataclass(eq=False)
class _Entry:
    backend: str
    thread: int


_lock = threading.RLock()
_entries: list[_Entry] = []
_sdpa_before = _torch_sdpa
_fastpath_before = True


def _current() -> Optional[_Entry]:
    """The newest entry of this thread, else the newest of all: a patch is process-wide, its backend the thread's own."""
    if len(_entries) < 2 or torch.compiler.is_compiling():
        return _entries[-1] if _entries else None
    me = threading.get_ident()
    return next((e for e in reversed(_entries) if e.thread == me), _entries[-1] if _entries else None)


def _patched_sdpa(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor:
    entry = _current()
    if entry is None:  # someone's own patch still calls this one
        return _torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    function = _patched_sdpa
    return _sdpa(function, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, entry.backend)


def report() -> PatchReport:
    """What is patched at this moment."""
    with _lock:
        changes = (
            "torch.nn.functional.scaled_dot_product_attention -> fastattn.scaled_dot_product_attention",
            "torch.backends.mha fast path -> off (nn.MultiheadAttention then calls the function above)",
            "not covered: names bound earlier by `from torch.nn.functional import ...`",
        )
        entry = _current()
        if entry is None:
            return PatchReport(False, 0, "auto", ())
        return PatchReport(True, len(_entries), entry.backend, changes)


def _push(backend: str) -> _Entry:
    global _sdpa_before, _fastpath_before
    check_name(backend)
    entry = _Entry(backend, threading.get_ident())
    with _lock:
        if not _entries:
            _fastpath_before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            _sdpa_before = F.scaled_dot_product_attention
            F.scaled_dot_product_attention = _patched_sdpa
        _entries.append(entry)
    return entry


def _remove(entry: _Entry) -> None:
    with _lock:
        if entry in _entries:
            _entries.remove(entry)
            if not _entries:
                if F.scaled_dot_product_attention is _patched_sdpa:
                    F.scaled_dot_product_attention = _sdpa_before
                torch.backends.mha.set_fastpath_enabled(_fastpath_before)


def enable(backend: str = "auto") -> PatchReport:
    """Replaces torch's scaled_dot_product_attention in this process until `disable`. Calls nest."""
    _push(backend)
    return report()


def disable() -> PatchReport:
    """Undoes the newest `enable`; the last one puts back the function that was there, unless someone replaced ours."""
    with _lock:
        entry = _current()
        if entry is not None:
            _remove(entry)
        return report()


@contextmanager
def patched(backend: str = "auto") -> Iterator[PatchReport]:
    """`with fastattn.patched():` enable inside, restore outside. The patch is process-wide while any thread is inside."""
    entry = _push(backend)
    try:
        yield report()
    finally:
        _remove(entry)
