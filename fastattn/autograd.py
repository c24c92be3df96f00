"""Registration of torch.library ops, and the batching helpers their vmap rules share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .flops import register_flops

LIBRARY = torch.library.Library("fastattn", "DEF")


def register(name: str, schema: str, impl: Callable, fake: Callable, vmap: Callable, flops: Callable) -> Any:
    """Defines fastattn::name for every device. Returns what calls the op, or `impl` itself where nobody looks.

    Dispatching an op written in Python costs as much as a small kernel.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    qualified = f"fastattn::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    torch.library.register_vmap(qualified, vmap, lib=LIBRARY)
    packet = getattr(torch.ops.fastattn, name)
    register_flops(packet, flops)
    op = packet.default

    def call(*args):
        if transformed() or not unobserved(*(a for a in args if isinstance(a, Tensor))):
            return op(*args)
        return impl(*args)

    return call


def fold_batch(t: Optional[Tensor], dim: Optional[int], V: int, B: int) -> Optional[Tensor]:
    """[.., V at dim, ..] or an unbatched tensor -> [V * B, ...]; a batch of 1 is expanded to B."""
    if t is None:
        return None
    t = t.expand(V, *t.shape) if dim is None else t.movedim(dim, 0)
    if t.shape[1] != B:
        t = t.expand(V, B, *t.shape[2:])
    return t.reshape(V * B, *t.shape[2:])


def vmap_by_loop(op: Callable, info, in_dims, args: tuple) -> tuple[tuple, tuple]:
    """One call per vmapped element: for random ops, whose bits depend on the position in the batch."""
    calls = []
    for index in range(info.batch_size):
        picked = [a.select(d, index) if isinstance(d, int) else a for a, d in zip(args, in_dims)]
        calls.append(op(*picked))
    outputs = tuple(torch.stack(results) for results in zip(*calls))
    return outputs, (0,) * len(outputs)


def transformed() -> bool:
    """Whether vmap or another functorch transform is active: inside, a tensor may not tell that it requires grad."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


@cache
def untransformed(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """`function` for calls outside of torch.func's transforms.

    For those it has a setup_context; where there is one, torch binds the arguments of every call by inspection, which
    takes longer than a small kernel.
    """

    def forward(ctx, *args):
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), members)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply, whose refusal of forward mode names the way out (a jvp rule would be refused by torch.compile)."""
    if forward_ad._current_level < 0 and not transformed():
        return (function if torch.compiler.is_compiling() else untransformed(function)).apply(*args)
    try:
        return function.apply(*args)
    except NotImplementedError as error:
        if "jvp" not in str(error):
            raise
        message = "attention has no forward-mode derivative (jvp) on this backend; backend='reference' has one"
        raise NotImplementedError(message) from error


PLAIN = frozenset((Tensor, torch.nn.Parameter))
# Of batched gradients (is_grads_batched), which have the class of any tensor, but no memory.
is_legacy_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda t: False)


def traced() -> bool:
    """Whether calls are recorded, or run on tensors without values: compiling, tracing, a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() != 0
    )


def ordinary() -> bool:
    """Whether calls are neither recorded nor transformed."""
    return not (
        traced()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def unobserved(*tensors: Optional[Tensor]) -> bool:
    """Whether nothing asks for the op, outside of transforms it may be skipped: tracing, mode, profiler, subclass, meta."""
    if traced() or torch.autograd._profiler_enabled():
        return False
    for t in tensors:
        if t is not None and (type(t) not in PLAIN or t.is_neg() or t.is_meta or is_legacy_batched(t)):
            return False
    return True


def autocasts(device: str) -> bool:
    """Whether autocast is on; meta tensors have none, and torch's own question raises there."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts floating tensors to the autocast dtype of their device where autocast is on, as torch's own sdpa does."""
    device = tensors[0].device.type
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


_NOTHING: AbstractContextManager = nullcontext()


def full_precision(t: Tensor) -> AbstractContextManager:
    """Autocast off where it is on: a backend's own products keep the dtype it chose."""
    device = t.device.type
    return torch.autocast(device, enabled=False) if autocasts(device) else _NOTHING


class RefuseGradient(torch.autograd.Function):
    """Passes `count` tensors through; differentiating them with respect to anything they came from raises."""

    @staticmethod
    def forward(ctx, message, count, *tensors):
        ctx.message = message
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(ctx.message)
