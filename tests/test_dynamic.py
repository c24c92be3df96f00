"""torch.compile(fullgraph=True) and torch.export where numbers and sizes vary from call to call."""

import math

import pytest
import torch

import fastattn
from fastattn import scaled_dot_product_attention as sdpa


def x(B=2, H=2, L=8, D=16):
    return torch.randn(B, H, L, D)


def decay(B, H, L=8):
    return -torch.rand(B, H, L)


def same_compiled(function, calls, **options):
    """Outputs and gradients of one compiled function equal those of eager mode, call after call."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", **options)
    for arguments in calls:
        for wanted in (False, True):
            results = []
            for f in (compiled, function):
                leaves = [a.clone().requires_grad_(wanted) if isinstance(a, torch.Tensor) else a for a in arguments]
                out = f(*leaves)
                leaves = [a for a in leaves if isinstance(a, torch.Tensor)]
                results.append([out, *torch.autograd.grad(out.square().sum(), leaves)] if wanted else [out])
            torch.testing.assert_close(*results, atol=1e-5, rtol=0)


NUMBERS = {
    "scale": (lambda q, n: fastattn.attention(q, q, q, scale=n), (0.1, 0.2, 0.3)),
    "scale of the drop-in": (lambda q, n: sdpa(q, q, q, scale=n), (0.1, 0.2, 0.3)),
    "scale of linear attention": (lambda q, n: fastattn.linear_attention(q, q, q, scale=n), (0.1, 0.2, 0.3)),
    "softcap": (lambda q, n: fastattn.attention(q, q, q, softcap=n), (1.5, 2.5, 3.5)),
    "window": (lambda q, n: fastattn.attention(q, q, q, window=(n, 0)), (2, 3, 4)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_varies(name):
    function, numbers = NUMBERS[name]
    same_compiled(function, [(x(), n) for n in numbers])


@pytest.mark.parametrize("scale", [lambda q: 0.3, lambda q: q.shape[-1] ** -0.5, lambda q: 1 / math.sqrt(q.shape[-1])])
def test_an_explicit_scale_where_head_dimensions_vary(scale):
    same_compiled(lambda q: sdpa(q, q, q, scale=scale(q)), [(x(),), (x(D=8),)], dynamic=True)


SIZES = {
    "slopes per head": (
        lambda q, t: fastattn.attention(q, q, q, alibi_slopes=t),
        [(x(H=H), torch.rand(H)) for H in (2, 3, 5)],
    ),
    "slopes per batch": (
        lambda q, t: fastattn.attention(q, q, q, alibi_slopes=t),
        [(x(B), torch.rand(B, 2)) for B in (1, 3, 4)],
    ),
    "sinks": (lambda q, t: fastattn.attention(q, q, q, sinks=t), [(x(H=H), torch.rand(H)) for H in (2, 3, 5)]),
    "decay": (lambda q, t: fastattn.linear_attention(q, q, q, decay=t), [(x(B), decay(B, 2)) for B in (2, 3, 4)]),
}


@pytest.mark.parametrize("name", SIZES)
def test_small_tensors_of_sizes_that_vary(name):
    same_compiled(*SIZES[name])


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


EXPORTS = {
    "window": (lambda q: fastattn.attention(q, q, q, window=(q.shape[2] - 1, 0)), [(x(),), (x(L=5),)], {2: "L"}),
    "slopes": (*SIZES["slopes per batch"][:1], SIZES["slopes per batch"][1][1:], {0: "B"}),
    "decay": (*SIZES["decay"], {0: "B"}),
    "beta": (
        lambda q, t: fastattn.linear_attention(q, q, q, beta=t, feature_map="identity"),
        [(x(B), torch.rand(B, 2, 8)) for B in (3, 2, 4)],
        {0: "B"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTS)
def test_export_with_sizes_that_vary(name):
    function, (first, *others), dims = EXPORTS[name]
    dims = {i: torch.export.Dim(dim, min=2, max=100) for i, dim in dims.items()}
    # "*tensors" of the module is one argument, a tuple.
    program = torch.export.export(Module(function), first, dynamic_shapes=((dims,) * len(first),), strict=False)
    for arguments in others:
        torch.testing.assert_close(program.module()(*arguments), function(*arguments), atol=1e-6, rtol=0)


def test_a_scale_that_varies_with_the_program_is_a_number():
    """Non-strict export hands in a SymFloat: torch fixes it, as in its own function."""
    program = torch.export.export(
        Module(lambda q: sdpa(q, q, q, scale=q.shape[3] ** -0.5)),
        (x(),),
        dynamic_shapes=(({3: torch.export.Dim.AUTO},),),
        strict=False,
    )
    y = x()
    torch.testing.assert_close(program.module()(y), sdpa(y, y, y), atol=1e-6, rtol=0)
