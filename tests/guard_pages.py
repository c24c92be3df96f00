"""Run as a script: native calls whose inputs each end right before a page without access. A read past the end is SIGSEGV."""

import ctypes
import itertools
import math
import mmap

import torch

from fastattn.testing import Case, make

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE
regions = []


def guarded(x, at_end=True):
    """A copy of x whose last byte (or first, for reads before the start) touches a forbidden page."""
    size = x.numel() * x.element_size()
    room = math.ceil(max(size, 1) / PAGE) * PAGE
    base = libc.mmap(
        None, room + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    assert libc.mprotect(base, PAGE, 0) == 0 and libc.mprotect(base + PAGE + room, PAGE, 0) == 0
    regions.append((base, room + 2 * PAGE))
    start = base + PAGE + (room - size if at_end else 0)
    buffer = (ctypes.c_byte * size).from_address(start)
    view = torch.frombuffer(buffer, dtype=torch.uint8).view(x.dtype).view(x.shape)
    return view.copy_(x)


def release():
    while regions:
        base, size = regions.pop()
        libc.munmap(ctypes.c_void_p(base), ctypes.c_size_t(size))


def main():
    import fastattn

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    shapes = [(1, 1), (1, 70), (3, 33), (17, 65), (65, 17), (1, 600), (80, 129)]
    layouts = ("bhqk", "b1q1", "1h1k", "1111")
    for n, (dtype, (Lq, Lk), D) in enumerate(itertools.product(dtypes, shapes, (1, 3, 8, 20, 33, 64))):
        case = Case(
            B=1, Hq=2, Hk=1, Lq=Lq, Lk=Lk, D=D, Dv=(D * 7) % 29 + 1, mask=layouts[n % 4], bias=layouts[(n + 1) % 4],
            alibi="h", sinks=True,
        )  # fmt: skip
        inputs = make(case, dtype, n)
        for at_end in (True, False):
            leaves = (*inputs[:3], inputs.bias, inputs.slopes, inputs.sinks)
            q, k, v, bias, slopes, sinks = leaves = [guarded(x, at_end).requires_grad_() for x in leaves]
            out, lse = fastattn.attention(
                q,
                k,
                v,
                mask=guarded(inputs.mask, at_end),
                bias=bias,
                alibi_slopes=slopes,
                sinks=sinks,
                softcap=2.0 if n % 3 == 0 else None,
                causal=n % 2 == 0,
                return_lse=True,
                backend="native",
            )
            upstream = guarded(inputs.dout.contiguous(), at_end), guarded(inputs.dlse, at_end)
            grads = torch.autograd.grad((out, lse), leaves, upstream)
            assert not any(g.isnan().any() for g in grads), case
            del q, k, v, bias, slopes, sinks, leaves, out, lse, grads, upstream
            release()


def linear():
    import fastattn

    maps = ("identity", "relu", "elu1", "taylor1", "taylor2")
    cases = itertools.product((torch.float32, torch.bfloat16, torch.float16), (1, 5, 33, 70), (1, 3, 8, 20, 33))
    for n, (dtype, L, D) in enumerate(cases):
        feature_map, Dv = maps[n % 5], (D * 7) % 29 + 1
        causal = n % 2 == 0
        shapes = (1, 2, L, D), (1, 1, L, D), (1, 2, L, Dv)
        shapes += ((1, 2, L, D) if n % 5 < 3 and n % 4 == 0 else (1, 2, L),) * causal
        for at_end in (True, False):
            q, k, v, *decay = leaves = [guarded(-torch.rand(s).to(dtype), at_end).requires_grad_() for s in shapes]
            decay = decay[0] if causal else None
            mask = None if causal else guarded(torch.rand(1, L) > 0.3, at_end)
            out = fastattn.linear_attention(
                q, k, v, feature_map=feature_map, causal=causal, decay=decay, key_mask=mask, backend="native"
            )
            torch.autograd.grad(out, leaves, guarded(torch.rand(out.shape).to(dtype), at_end))
            del q, k, v, decay, leaves, mask, out
            release()


main()
linear()
print("done")
