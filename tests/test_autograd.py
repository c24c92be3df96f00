"""How the op behaves inside torch: opcheck, gradcheck, compile, export, vmap, checkpoint, autocast, leaks."""

import gc
import weakref
from functools import partial

import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32, FP64, all_backends, attend, need
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.params import SoftmaxParams, SoftmaxTensors
from fastattn.testing import Case, make, max_error, next_rng, relayout

OPTIONS = {
    "plain": {},
    "causal_top_left": {"causal": "top_left"},
    "causal_bottom_right": {"causal": "bottom_right"},
    "window": {"window": (1, 2)},
    "scale": {"scale": -0.7},
    "mask": {"mask": torch.tensor([[True, False, True, True, True], [True] * 5, [False] * 5])},
    "dropout": {"dropout_p": 0.4},
    "gqa": {},
}


def tiny(name, dtype=FP64, biased=True):
    """(q, k, v, bias) of the smallest shapes that show an error."""
    Hk = 1 if name == "gqa" else 2
    shapes = [(1, 2, 3, 4), (1, Hk, 5, 4), (1, Hk, 5, 3), (2, 1, 5)]
    g = torch.Generator().manual_seed(7)
    tensors = [torch.randn(s, generator=g, dtype=FP64).to(DEVICE, dtype).requires_grad_() for s in shapes]
    return tensors if biased else tensors[:3]


def seeded(backend, **options):
    """attention as a deterministic function of (q, k, v, bias): gradcheck evaluates it many times."""

    def call(q, k, v, bias=None):
        torch.manual_seed(3)
        out, lse = fastattn.attention(q, k, v, bias=bias, return_lse=True, backend=backend, **options)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    return call


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name, backend):
    assert torch.autograd.gradcheck(seeded(backend, **OPTIONS[name]), tiny(name), fast_mode=False)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradgradcheck(name, backend):
    assert torch.autograd.gradgradcheck(seeded(backend, **OPTIONS[name]), tiny(name), fast_mode=False)


@all_backends
@pytest.mark.parametrize("name", OPTIONS)
def test_double_backward_in_fp32(name, backend):
    """Every backend, native too: second derivatives equal those of the fp64 reference."""

    def second(dtype, backend):
        inputs = tiny(name, dtype)
        torch.manual_seed(3)
        out = fastattn.attention(*inputs[:3], bias=inputs[3], backend=backend, **OPTIONS[name])
        grads = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    need(backend, make(Case(), FP32))
    for found, expected in zip(second(FP32, backend), second(FP64, "reference")):
        assert max_error(found, expected) < 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("power", [1, 2])
def test_third_derivative_is_refused(power):
    """Never silently wrong, also where the cotangents themselves are constants (power 1)."""
    inputs = tiny("plain")
    q = inputs[0]
    out = fastattn.attention(*inputs[:3], bias=inputs[3], backend="eager")
    first = torch.autograd.grad(out.pow(power).sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="third derivative"):
        second = torch.autograd.grad(first.pow(power).sum(), q, create_graph=True)[0]
        torch.autograd.grad((second * q).sum(), q)


def op_arguments(backend, layout="contiguous", dtype=FP32, dropout_p=0.0, **fields):
    case = Case(B=2, Hq=4, Hk=2, Lq=9, Lk=13, D=8, Dv=6, dropout_p=dropout_p, **fields)
    inputs = make(case, dtype, device=DEVICE)
    q, k, v = (relayout(x, layout).requires_grad_() for x in inputs[:3])
    bias = None if inputs.bias is None else inputs.bias[(None,) * (4 - inputs.bias.dim())].requires_grad_()
    rng = next_rng(DEVICE) if dropout_p else None
    window = case.window or (None, None)
    params = SoftmaxParams(0.3, {False: "none"}.get(case.causal, case.causal), *window, case.softcap or 0.0, dropout_p)
    x = SoftmaxTensors(q, k, v, bias, inputs.slopes, inputs.sinks, inputs.mask, rng=rng, plan=[])
    return x, (*params, backend)


OP_CASES = [
    {},
    {"causal": "top_left"},
    {"causal": "bottom_right", "window": (4, 0)},
    {"window": (3, 2)},
    {"mask": "bhqk"},
    {"mask": "b11k", "bias": "1hqk"},
    {"bias": "bhqk"},
    {"bias": "1h1k", "layout": "blhd"},
    {"dropout_p": 0.3},
    {"layout": "blhd"},
    {"layout": "lbhd"},
    {"layout": "last_strided"},
    {"dtype": BF16, "bias": "1hqk"},
    {"dtype": FP16, "causal": "top_left", "mask": "bhqk"},
    {"softcap": 2.0},
    {"alibi": "1h"},
    {"alibi": "bh", "sinks": True, "causal": "bottom_right"},
    {"sinks": True, "softcap": 2.0, "alibi": "bh", "bias": "1h1k", "dtype": BF16},
]
STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")
UTILS = (*STATIC, "test_aot_dispatch_dynamic")  # most of the time: once for each operator


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_opcheck(case, backend):
    """Schema, registration, exact fake strides, dynamic shapes. The public autograd sits above the ops: no grad here."""
    tensors, options = op_arguments(backend, **case)
    need(backend, make(Case(), case.get("dtype", FP32)))
    tensors = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in tensors)
    *params, _ = options
    for with_parts, utils in ((False, STATIC), (True, UTILS)):
        arguments = (*tensors, *params, with_parts, backend)
        torch.library.opcheck(torch.ops.fastattn.softmax_forward.default, arguments, test_utils=utils)
    out, lse, parts = torch.ops.fastattn.softmax_forward(*arguments)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    given = [x is not None for x in tensors[:6]]
    for needs, utils in ((given, UTILS), ([False, True, False, False, False, False], STATIC)):
        arguments = (dout, dlse, *tensors, out, parts, *params, needs, backend)
        torch.library.opcheck(torch.ops.fastattn.softmax_backward.default, arguments, test_utils=utils)
    needs = [True, True, True, False, False, False]
    arguments = (dout, None, *tensors, out, parts, *params, needs, backend)
    torch.library.opcheck(torch.ops.fastattn.softmax_backward.default, arguments, test_utils=STATIC)


@all_backends
@pytest.mark.parametrize("case", OP_CASES[:6] + OP_CASES[8:10], ids=str)
def test_compile_fullgraph(case, backend):
    """Forward and backward in one graph, equal to eager mode, on first and further shapes (dynamic)."""
    fields = {key: value for key, value in case.items() if key not in ("layout", "dtype")}
    if backend == "reference" and case is not OP_CASES[5]:
        pytest.skip("plain torch: the case with a mask and a bias is enough")
    torch._dynamo.reset()

    def loss(q, k, v, mask, bias, options):
        out, lse = fastattn.attention(q, k, v, mask=mask, bias=bias, return_lse=True, backend=backend, **options)
        return out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum(), out

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for Lq, Lk in ((9, 13), (17, 30)):
        shape = Case(B=2, Hq=4, Hk=2, Lq=Lq, Lk=Lk, D=8, **fields)
        inputs = make(shape, FP32, device=DEVICE)
        need(backend, inputs)
        found = []
        for function in (compiled, loss):
            leaves = [x if x is None else x.clone().requires_grad_() for x in (*inputs[:3], inputs.bias)]
            torch.manual_seed(0)
            value, out = function(*leaves[:3], inputs.mask, leaves[3], shape.options())
            value.backward()
            found.append([out.detach(), *(x.grad for x in leaves if x is not None)])
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("backend", ["auto"])
def test_compile_inductor(backend):
    """The default compiler, once, forward and backward around other ops."""
    torch._dynamo.reset()
    inputs = make(Case(Hk=2), FP32, device=DEVICE)

    def block(q, k, v):
        return fastattn.attention(q * 2, k, v.relu(), causal=True, backend=backend).transpose(1, 2).flatten(2).sin()

    found = []
    for function in (torch.compile(block, fullgraph=True), block):
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        y = function(*leaves)
        y.square().sum().backward()
        found.append([y.detach(), *(x.grad for x in leaves)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


class Module(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, q, k, v, mask):
        return fastattn.attention(q, k, v, mask=mask, causal=True, backend=self.backend)


@all_backends
def test_export(backend):
    inputs = make(Case(mask="b11k", Hk=2), FP32, device=DEVICE)
    need(backend, inputs)
    length = torch.export.Dim("length", min=2, max=1000)
    shapes = ({2: length}, None, None, None)
    program = torch.export.export(Module(backend), inputs[:4], dynamic_shapes=shapes, strict=False)
    for Lq in (33, 20):
        arguments = (inputs.q[:, :, :Lq], *inputs[1:4])
        torch.testing.assert_close(program.module()(*arguments), Module(backend)(*arguments), atol=1e-6, rtol=0)
    if backend != "reference":
        assert any("fastattn.softmax_forward" in str(node.target) for node in program.graph.nodes)


@all_backends
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, 1), (2, 0, None), (0, 0, 3)], ids=str)
def test_vmap(in_dims, backend):
    """One call over the folded batch, equal to a loop; with gradients of every element."""
    base = [
        torch.randn(3, 2, 4, L, d, generator=torch.Generator().manual_seed(L)) for L, d in ((9, 8), (11, 8), (11, 6))
    ]
    tensors = [(x[0] if d is None else x.movedim(0, d)).to(DEVICE) for x, d in zip(base, in_dims)]
    mask = torch.rand(3, 2, 1, 9, 11, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.7
    need(backend, make(Case(), FP32))

    def call(q, k, v, m):
        return fastattn.attention(q, k, v, mask=m, return_lse=True, backend=backend)

    out, lse = torch.func.vmap(call, (*in_dims, 0))(*tensors, mask)
    gradient = torch.func.vmap(torch.func.grad(lambda *a: call(*a)[0].square().sum(), (0, 1, 2)), (*in_dims, 0))
    grads = gradient(*tensors, mask)
    for n in range(3):
        one = [x if d is None else x.select(d, n) for x, d in zip(tensors, in_dims)]
        expected = call(*one, mask[n])
        torch.testing.assert_close((out[n], lse[n]), expected, atol=1e-5, rtol=0)
        leaves = [x.clone().requires_grad_() for x in one]
        loss = call(*leaves, mask[n])[0].square().sum()
        for found, wanted in zip(grads, torch.autograd.grad(loss, leaves)):
            torch.testing.assert_close(found[n], wanted, atol=2e-5, rtol=0)


@all_backends
def test_gradients_through_vmap_and_dropout(backend):
    """Leaves outside of vmap get their gradient; with dropout, out is linear in v whatever was dropped."""
    inputs = make(Case(B=3, Hq=2, Hk=1, Lq=5, Lk=7), FP32, device=DEVICE)
    need(backend, inputs)
    leaves = [x[:, None].clone().requires_grad_() for x in inputs[:3]]
    call = partial(fastattn.attention, backend=backend)
    found = torch.autograd.grad(torch.func.vmap(call)(*leaves).square().sum(), leaves)
    folded = torch.autograd.grad(call(*(x[:, 0] for x in leaves)).square().sum(), leaves)
    for x, y in zip(found, folded):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=0)
    dropped = torch.func.grad_and_value(lambda q, k, v: call(q, k, v, dropout_p=0.4).sum(), 2)
    dv, total = torch.func.vmap(dropped, randomness="different")(*(x.detach() for x in leaves))
    torch.testing.assert_close((dv * leaves[2].detach()).sum((1, 2, 3, 4)), total, atol=2e-5, rtol=1e-5)
    assert not torch.isclose(total, torch.func.vmap(call)(*leaves).sum((1, 2, 3, 4))).any()  # something was dropped


@all_backends
def test_vmap_of_a_shared_bias(backend):
    """Gradient of an unbatched bias inside vmap(grad) is per element; in_dims 0 too."""
    inputs = make(Case(B=3, Hq=2, Hk=2, Lq=5, Lk=7, bias="qk"), FP32, device=DEVICE)
    need(backend, inputs)
    q, k, v = (x[:, None] for x in inputs[:3])

    def loss(q, k, v, bias):
        return fastattn.attention(q, k, v, bias=bias, backend=backend).square().sum()

    for bias, dim in ((inputs.bias, None), (torch.stack([inputs.bias * i for i in range(3)]), 0)):
        found = torch.func.vmap(torch.func.grad(loss, 3), (0, 0, 0, dim))(q, k, v, bias)
        for n in range(3):
            leaf = (bias if dim is None else bias[n]).clone().requires_grad_()
            expected = torch.autograd.grad(loss(q[n], k[n], v[n], leaf), leaf)[0]
            torch.testing.assert_close(found[n], expected, atol=1e-5, rtol=0)


@all_backends
@pytest.mark.parametrize("dropout_p", (0.0, 0.4))
def test_checkpoint_without_reentry(dropout_p, backend):
    inputs = make(Case(Hk=2), FP32, device=DEVICE)
    need(backend, inputs)
    grads = []
    for wrap in (lambda f, *a: f(*a), partial(checkpoint, use_reentrant=False)):
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        torch.manual_seed(4)
        function = partial(fastattn.attention, causal=True, dropout_p=dropout_p, backend=backend)
        wrap(function, *leaves).backward(inputs.dout)
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


@all_backends
@pytest.mark.parametrize("dtype", (BF16, FP16), ids=("bfloat16", "float16"))
def test_autocast(dtype, backend):
    """fp32 (and mixed) inputs are cast to the autocast dtype, gradients come back in the dtype of each input."""
    if DEVICE != "cpu":
        pytest.skip("autocast of the cpu")
    inputs = make(Case(Hk=2), FP32)
    need(backend, make(Case(Hk=2), dtype))
    q, k, v = inputs.q.clone().requires_grad_(), inputs.k.clone().requires_grad_(), inputs.v.to(BF16).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = fastattn.attention(q, k, v, backend=backend)
    expected = fastattn.attention(*(x.detach().to(dtype) for x in (q, k, v)), backend=backend)
    assert out.dtype == dtype and torch.equal(out, expected)
    out.sum().backward()
    assert (q.grad.dtype, k.grad.dtype, v.grad.dtype) == (FP32, FP32, BF16)


@all_backends
def test_forward_mode_and_second_derivatives_of_torch_func_are_refused(backend):
    inputs = make(Case(), FP32, device=DEVICE)
    need(backend, inputs)
    if backend == "reference":
        pytest.skip("plain torch: they work")

    def loss(q):
        return fastattn.attention(q, *inputs[1:3], backend=backend).square().sum()

    with pytest.raises(NotImplementedError, match="forward.*reference"):
        torch.func.jvp(loss, (inputs.q,), (inputs.q,))
    for outer in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="reference.*create_graph"):
            outer(lambda q: torch.func.grad(loss)(q).sum())(inputs.q)


@all_backends
@pytest.mark.parametrize("edited", ["q", "k", "v", "bias", "out"])
def test_edit_in_place_of_a_saved_tensor_raises(edited, backend):
    """pytorch#197887."""
    inputs = make(Case(bias="qk"), FP32, device=DEVICE)
    need(backend, inputs)
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in ("q", "k", "v", "bias")}
    tensors = {name: x * 1 for name, x in leaves.items()}
    out = fastattn.attention(tensors["q"], tensors["k"], tensors["v"], bias=tensors["bias"], backend=backend)
    if backend == "reference" and edited != "q":
        pytest.skip("plain torch: this gradient does not need the edited tensor")
    with torch.no_grad():
        (out if edited == "out" else tensors[edited]).add_(1)
    with pytest.raises(RuntimeError, match="inplace|in-place"):
        out.sum().backward()


@all_backends
@pytest.mark.parametrize("run_backward", [False, True])
def test_nothing_outlives_its_graph(run_backward, backend):
    """pytorch#25340: no reference cycle through ctx; inputs and results die with their last name, without gc."""
    inputs = make(Case(bias="qk"), FP32, device=DEVICE)
    need(backend, inputs)
    gc.collect()
    gc.disable()
    try:
        q, k, v, bias = (x.clone().requires_grad_() for x in (*inputs[:3], inputs.bias))
        out, lse = fastattn.attention(q, k, v, bias=bias, return_lse=True, dropout_p=0.1, backend=backend)
        if run_backward:
            (out.sum() + lse.sum()).backward()
        watched = [weakref.ref(x) for x in (q, k, v, bias, out, lse)]
        del q, k, v, bias, out, lse
        assert [ref() for ref in watched] == [None] * 6
    finally:
        gc.enable()


@all_backends
def test_backward_twice_needs_retain_graph(backend):
    inputs = make(Case(), FP32, device=DEVICE)
    need(backend, inputs)
    q = inputs.q.clone().requires_grad_()
    out = fastattn.attention(q, *inputs[1:3], backend=backend)
    (first,) = torch.autograd.grad(out, q, inputs.dout, retain_graph=True)
    (second,) = torch.autograd.grad(out, q, inputs.dout)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, q, inputs.dout)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    inputs = make(Case(B=2, Hq=4, Hk=4, Lq=32, Lk=64, D=16, Dv=8), FP32, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        attend(inputs, "auto")
    pairs = 2 * 4 * 32 * 64
    assert counter.get_total_flops() == 2 * pairs * (16 + 8) + 2 * pairs * (3 * 16 + 2 * 8)


def test_params_and_explanations_copy_and_pickle():
    import copy
    import pickle

    inputs = make(Case(), FP32)
    for value in (SoftmaxParams(0.5, "top_left", 1, None, 0.1), fastattn.explain(*inputs[:3])):
        assert copy.deepcopy(value) == value == pickle.loads(pickle.dumps(value))
    module = copy.deepcopy(Module("auto"))
    assert torch.equal(module(*inputs[:3], None), Module("auto")(*inputs[:3], None))
