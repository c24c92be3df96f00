"""Calls with a mask or a bias at most take a shorter way to the native kernels: it must be the same attention, and know its limits."""

import gc
import weakref
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from harness import BF16, FP16, FP32
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.backends import native
from fastattn.ops.softmax_plain import plain_attention
from fastattn.testing import LAYOUTS, Case, make, relayout

pytestmark = pytest.mark.skipif(
    fastattn.backends.native.status() is not None, reason=f"native: {fastattn.backends.native.status()}"
)
SUBSETS = [needs for needs in product((False, True), repeat=3) if any(needs)]
CASES = {
    "one query": Case(B=2, Hq=4, Hk=2, Lq=1, Lk=75, D=24),
    "few": Case(B=1, Hq=4, Hk=4, Lq=7, Lk=130, D=40, causal="bottom_right"),
    "square": Case(B=2, Hq=3, Hk=3, Lq=70, Lk=70, D=32, causal="top_left"),
    "large": Case(B=1, Hq=8, Hk=2, Lq=150, Lk=200, D=64),
}


def inputs(case, dtype, layout="contiguous", needs=(True, True, True)):
    made = make(case, dtype)
    return [relayout(t, layout).detach().requires_grad_(need) for t, need in zip(made[:3], needs)], made.dout


def general(q, k, v, case, scale=None):
    return fastattn.attention(q, k, v, causal=case.causal, scale=scale, backend="native")


def strides(t):
    return [stride for stride, size in zip(t.stride(), t.shape) if size > 1]


def gradients(out, leaves, dout, **options):
    return torch.autograd.grad(out, [t for t in leaves if t.requires_grad], dout, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_is_the_general_call(name, dtype, layout):
    """Same values, gradients and layouts; where a layout is unusual, it leaves the call alone."""
    case = CASES[name]
    qkv, dout = inputs(case, dtype, layout)
    plain = plain_attention(*qkv, None, 0.3, case.causal)
    if plain is None:
        assert layout in ("bhdl", "last_strided", "expanded"), layout
        return
    expected = general(*qkv, case, 0.3)
    assert strides(plain) == strides(expected)
    # With a gradient both pack their keys, and give the same bits.
    assert torch.equal(plain, expected)
    for found, wanted in zip(gradients(plain, qkv, dout), gradients(expected, qkv, dout), strict=True):
        assert torch.equal(found, wanted) and strides(found) == strides(wanted)
    with torch.no_grad():
        assert torch.equal(plain_attention(*qkv, None, 0.3, case.causal), general(*qkv, case, 0.3))


@pytest.mark.parametrize("needs", SUBSETS, ids=str)
def test_subsets_of_gradients(needs):
    case = CASES["square"]
    qkv, dout = inputs(case, FP32, needs=needs)
    out = plain_attention(*qkv, None, None, case.causal)
    assert type(out.grad_fn).__name__ == "PlainAttentionBackward"
    expected = gradients(general(*qkv, case), qkv, dout)
    assert all(map(torch.equal, gradients(out, qkv, dout, retain_graph=True), expected))
    out.backward(dout)
    assert [t.grad is not None for t in qkv] == list(needs)


MASKS = {
    "bool": lambda c: torch.rand(c.B, 1, c.Lq, c.Lk) < 0.7,
    "keys": lambda c: (torch.rand(c.Lk) < 0.7)[None],
    "nothing": lambda c: torch.zeros(c.Hq, c.Lq, 1, dtype=torch.bool),
    "bias": lambda c: torch.randn(c.Hq, c.Lq, c.Lk),
    "bias that hides": lambda c: torch.zeros(c.B, 1, c.Lq, c.Lk).masked_fill(MASKS["bool"](c), -torch.inf),
    "bias of keys": lambda c: torch.zeros(c.Lk).masked_fill(torch.arange(c.Lk) > c.Lk // 2, -torch.inf),
    "expanded": lambda c: (torch.rand(1, c.Hq, c.Lq, 1) < 0.8).expand(c.B, c.Hq, c.Lq, c.Lk),
}


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", CASES)
def test_masks_and_biases(name, mask, dtype):
    torch.manual_seed(1)
    case = CASES[name]
    qkv, dout = inputs(case, dtype)
    hide = MASKS[mask](case)
    hide = hide if hide.dtype == torch.bool or dtype == FP32 else hide.to(dtype)
    full = hide[(None,) * (4 - hide.dim())]
    kind = {"mask": full} if hide.dtype == torch.bool else {"bias": full}
    expected = fastattn.attention(*qkv, causal=case.causal, backend="native", **kind)
    plain = plain_attention(*qkv, hide, None, case.causal)
    assert torch.equal(plain, expected)
    for found, wanted in zip(gradients(plain, qkv, dout), gradients(expected, qkv, dout), strict=True):
        assert torch.equal(found, wanted)
    quiet = [t.detach() for t in qkv]
    found = fastattn.attention(*quiet, causal=case.causal, **kind)
    assert torch.equal(found, fastattn.attention(*quiet, causal=case.causal, backend="native", **kind))
    if not case.causal:
        dropin = fastattn.scaled_dot_product_attention(*quiet, attn_mask=hide, enable_gqa=True)
        assert torch.equal(dropin, found)


def test_masks_it_leaves_alone():
    case = CASES["square"]
    (q, k, v), _ = inputs(case, FP32)
    shape = (case.B, case.Hq, case.Lq, case.Lk)
    bias = torch.zeros(shape, requires_grad=True)
    assert plain_attention(q, k, v, bias, None, False) is None
    with torch.no_grad():
        assert plain_attention(q, k, v, bias, None, False) is not None
    for mask in (
        torch.ones(1, *shape) > 0, torch.ones(*shape[:3], 3) > 0, torch.zeros(shape).half(), torch.zeros(shape).double(),
        torch.ones(shape).int(), torch.ones(shape).to_sparse(), torch.ones(shape, device="meta"), [[True]], "causal",
    ):  # fmt: skip
        assert plain_attention(q, k, v, mask, None, False) is None
    # Long ones have a plan that forward and backward share; without a gradient there is nothing to share.
    q, k, v = (t.detach() for t in inputs(Case(B=1, Hq=1, Hk=1, Lq=600, Lk=600, D=8), FP32)[0])
    mask = torch.ones(600, 600, dtype=torch.bool).tril()
    assert plain_attention(q, k, v, mask, None, False) is not None
    assert plain_attention(q.requires_grad_(), k, v, mask, None, False) is None


@pytest.mark.parametrize("mask", [None, "bool", "bias"])
def test_second_derivatives(mask):
    case = Case(B=1, Hq=2, Hk=1, Lq=5, Lk=7, D=8, causal="bottom_right")
    qkv, dout = inputs(case, FP32)
    kind = {} if mask is None else {"mask" if mask == "bool" else "bias": MASKS[mask](case)[(None,) * (mask == "bias")]}
    found = []
    for backend in ("auto", "reference"):
        out = fastattn.attention(*qkv, causal=case.causal, backend=backend, **kind)
        first = gradients(out, qkv, dout, create_graph=True)
        found.append(gradients(sum(g.square().sum() for g in first), qkv, None))
    for plain, expected in zip(*found, strict=True):
        assert (plain - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("how", ["hooks", "checkpoint", "expanded dout", "strided dout"])
def test_backward_in_other_ways(how):
    case = CASES["square"]
    qkv, dout = inputs(case, FP32)
    if how == "expanded dout":
        dout = torch.ones(()).expand_as(dout)
    elif how == "strided dout":
        dout = relayout(dout, "last_strided")
    call = lambda q, k, v: fastattn.attention(q, k, v, causal=case.causal)
    if how == "hooks":
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t.float()):
            out = call(*qkv)
    else:
        out = checkpoint(call, *qkv, use_reentrant=False) if how == "checkpoint" else call(*qkv)
    expected = gradients(general(*qkv, case), qkv, dout)
    for found, wanted in zip(gradients(out, qkv, dout), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("edited", ["q", "out"])
def test_edited_tensors_are_noticed(edited):
    case = CASES["square"]
    qkv, dout = inputs(case, FP32)
    q = qkv[0] * 1
    out = plain_attention(q, *qkv[1:], None, None, case.causal)
    with torch.no_grad():
        (q if edited == "q" else out).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(out, qkv, dout)


def test_memory_of_another_shape_is_not_written():
    """A function mode may answer torch.empty_like with anything."""

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            return found.new_zeros(answer) if function.__name__ == "empty_like" else found

    qkv, dout = inputs(CASES["square"], FP32)
    out, parts = native.softmax_plain_forward(*qkv, None, None, False, True)
    for answer in ((1, 1, 1, 1), tuple(dout.shape), (2, 3, 70, 8)):
        with Mode():
            found = native.softmax_plain_backward(dout, *qkv, None, out, parts, (True,) * 3, None, False)
        assert (found is None) == (answer != dout.shape)


@pytest.mark.parametrize("run_backward", [False, True])
def test_nothing_outlives_its_graph(run_backward):
    """No reference cycle through ctx: inputs and results die with their last name, without gc."""
    qkv, dout = inputs(CASES["square"], FP32)
    gc.collect()
    gc.disable()
    try:
        out = plain_attention(*qkv, None, None, False)
        if run_backward:
            out.backward(dout)
        watched = [weakref.ref(t) for t in (*qkv, out)]
        del qkv, out
        assert [ref() for ref in watched] == [None] * 4
    finally:
        gc.enable()


def test_autocast():
    """Tensors that autocast would cast are left to the general call; those it would not are taken."""
    case = CASES["square"]
    qkv, _ = inputs(case, FP32)
    low = [t.detach().bfloat16().requires_grad_() for t in qkv]
    with torch.autocast("cpu", torch.bfloat16):
        assert plain_attention(*qkv, None, None, case.causal) is None
        out = plain_attention(*low, None, None, case.causal)
        assert out is not None and torch.equal(out, fastattn.attention(*qkv, causal=case.causal))
        found = gradients(out, low, torch.ones_like(out))
    expected = gradients(general(*low, case), low, torch.ones_like(out))
    assert all(map(torch.equal, found, expected))


def test_is_left_alone_where_someone_looks():
    q, k, v = (t.detach() for t in inputs(CASES["square"], FP32)[0])
    assert plain_attention(q, k, v, None, None, False) is not None
    assert plain_attention(q, k, v, None, 1, False) is None  # an int: the general call reads it
    assert plain_attention(q, k, v, None, float("nan"), False) is None
    assert plain_attention(q, k, v, None, None, "left") is None
    assert plain_attention(q, k[:, :1], v[:, :1], None, None, False, False) is None  # groups were not asked for
    assert plain_attention(q, k[:, :, :3], v, None, None, False) is None
    assert plain_attention(q, k, v.double(), None, None, False) is None
    assert plain_attention(q[0], k[0], v[0], None, None, False) is None
    assert plain_attention(q, k, v[..., :8], None, None, False) is None
    assert plain_attention(q, None, v, None, None, False) is None
    assert plain_attention(torch._neg_view(q), k, v, None, None, False) is None
    assert plain_attention(q.to("meta"), k.to("meta"), v.to("meta"), None, None, False) is None
    with torch.profiler.profile():
        assert plain_attention(q, k, v, None, None, False) is None
    seen = []
    torch.func.vmap(lambda x: (seen.append(plain_attention(x, k, v, None, None, False)), x)[1])(q[None])
    torch.func.grad(lambda x: (seen.append(plain_attention(x, k, v, None, None, False)), x.sum())[1])(q)
    assert seen == [None, None]


def test_is_what_training_calls():
    """The public functions and the patch take it, with a gradient and without."""
    (q, k, v), _ = inputs(CASES["square"], FP32)
    with fastattn.patched():
        for call in (fastattn.attention, fastattn.scaled_dot_product_attention, F.scaled_dot_product_attention):
            assert type(call(q, k, v).grad_fn).__name__ == "PlainAttentionBackward", call
    with sdpa_kernel(SDPBackend.MATH):
        assert (fastattn.attention(q, k, v) - F.scaled_dot_product_attention(q, k, v)).abs().max() < 2e-6
