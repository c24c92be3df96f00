"""Linear attention without a state takes a shorter way to the native kernels: it must be the same, and know its limits."""

import gc
import weakref
from itertools import product

import pytest
import torch
from harness import BF16, FP16, FP32
from linear_harness import DELTA, LinearCase, leaves, make
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.backends import native
from fastattn.ops.linear_plain import plain_linear_attention
from fastattn.testing import LAYOUTS, relayout

pytestmark = pytest.mark.skipif(native.status() is not None, reason=f"native: {native.status()}")

SQUARE = {"D": 16, "Dv": 16}
IDENTITY = {"feature_map": "identity", **SQUARE}
CASES = {
    "elu1": LinearCase(**SQUARE),
    "one token": LinearCase(L=1, **SQUARE),
    "relu, few heads": LinearCase(Hq=6, Hk=2, Hv=1, feature_map="relu", scale=0.3, **SQUARE),
    "not causal": LinearCase(L=20, Lk=45, causal=False, **SQUARE),
    "taylor1": LinearCase(feature_map="taylor1", D=7, Dv=7),
    "taylor2": LinearCase(feature_map="taylor2", D=4, Dv=4, normalize=False),
    "per head": LinearCase(decay="h", **SQUARE),
    "per token": LinearCase(decay="bhl", normalize=True, **IDENTITY),
    "per channel": LinearCase(decay="bhld", **IDENTITY),
    "delta": LinearCase(**DELTA, **SQUARE),
    "gated delta": LinearCase(**DELTA, decay="bhl", **SQUARE),
    "constant gated delta": LinearCase(**DELTA, decay="h", **SQUARE),
}
NAMES = "q", "k", "v", "decay", "beta"


def plain(x, case, **changed):
    options = {"feature_map": case.feature_map, "causal": case.causal, "normalize": case.normalize, "scale": case.scale}
    given = {"q": x.q, "k": x.k, "v": x.v, "decay": x.decay, "beta": x.beta, **options, **changed}
    return plain_linear_attention(**given)


def general(x, case):
    given = {name: t for name, t in (("decay", x.decay), ("beta", x.beta)) if t is not None}
    return fastattn.linear_attention(x.q, x.k, x.v, **given, **case.options(), backend="native")


def inputs(case, dtype=FP32, layout="contiguous"):
    """Leaves; what is one number a head has no gradient, which the short way leaves to the general call."""
    x = make(LinearCase(**{**vars(case), "layout": layout}), dtype)
    x = leaves(x)
    return x._replace(decay=x.decay.detach()) if case.decay == "h" else x


def wanted(x):
    return [t for t in (getattr(x, name) for name in NAMES) if t is not None and t.requires_grad]


def gradients(out, x, **options):
    return torch.autograd.grad(out, wanted(x), x.dout, **options)


def strides(t):
    return [stride for stride, size in zip(t.stride(), t.shape) if size > 1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_is_the_general_call(name, dtype, layout):
    """Same values, gradients and layouts; where a layout is unusual, it leaves the call alone."""
    case = CASES[name]
    x = inputs(case, dtype, layout)
    found, expected = plain(x, case), general(x, case)
    if found is None:
        assert layout in ("bhdl", "last_strided", "expanded"), layout
        return
    assert torch.equal(found, expected) and strides(found) == strides(expected)
    for a, b in zip(gradients(found, x), gradients(expected, x), strict=True):
        assert torch.equal(a, b) and strides(a) == strides(b)
    with torch.no_grad():
        assert torch.equal(plain(x, case), general(x, case))


SUBSETS = [needs for needs in product((False, True), repeat=5) if any(needs)]


@pytest.mark.parametrize("needs", SUBSETS, ids=lambda needs: "".join(n[0] for n, need in zip(NAMES, needs) if need))
def test_subsets_of_gradients(needs):
    case = CASES["gated delta"]
    x = make(case, FP32)
    x = x._replace(**{n: getattr(x, n).detach().requires_grad_(need) for n, need in zip(NAMES, needs)})
    out = plain(x, case)
    assert type(out.grad_fn).__name__ == "PlainLinearAttentionBackward"
    expected = gradients(general(x, case), x)
    assert all(map(torch.equal, gradients(out, x, retain_graph=True), expected))
    out.backward(x.dout)
    assert [getattr(x, n).grad is not None for n in NAMES] == list(needs)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["hooks", "checkpoint", "expanded dout", "strided dout", "profiler"])
def test_backward_in_other_ways(name, how):
    """What the short backward does not take, the general one does."""
    case = CASES[name]
    x = inputs(case)
    if how == "expanded dout":
        x = x._replace(dout=torch.ones(()).expand_as(x.dout))
    elif how == "strided dout":
        x = x._replace(dout=relayout(x.dout, "last_strided"))
    given = {name: t for name, t in (("decay", x.decay), ("beta", x.beta)) if t is not None}
    call = lambda q, k, v: fastattn.linear_attention(q, k, v, **given, **case.options())
    expected = gradients(general(x, case), x)
    if how == "hooks":
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t.float()):
            out = call(*x[:3])
    else:
        out = checkpoint(call, *x[:3], use_reentrant=False) if how == "checkpoint" else call(*x[:3])
    if how == "profiler":
        with torch.profiler.profile():
            found = gradients(out, x)
    else:
        found = gradients(out, x)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_is_refused(name):
    case = CASES[name]
    x = inputs(case)
    first = gradients(plain(x, case), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(sum(g.square().sum() for g in first), wanted(x))


@pytest.mark.parametrize("edited", ["k", "decay", "out"])
def test_edited_tensors_are_noticed(edited):
    case = CASES["gated delta"]
    x = inputs(case)
    edit = {"k": x.k * 1, "decay": x.decay * 1}
    edit["out"] = out = plain(x._replace(k=edit["k"], decay=edit["decay"]), case)
    with torch.no_grad():
        edit[edited].mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(out, x)


def test_memory_of_another_shape_is_not_written():
    """A function mode may answer torch.empty_like with anything."""

    class Mode(TorchFunctionMode):
        def __init__(self, answer):
            super().__init__()
            self.answer = answer

        def __torch_function__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            return found.new_zeros(self.answer) if function.__name__ == "empty_like" else found

    case = CASES["gated delta"]
    x = inputs(case)
    options = "identity", True, False, None
    out, saved = native.linear_plain_forward(*x[:5], *options)
    for answer in ((1, 1, 1, 1), (2, 2, 37), (2, 2, 37, 8)):
        with Mode(answer):
            assert native.linear_plain_backward(x.dout, *x[:5], out, saved, (True,) * 5, options) is None
            assert native.linear_plain_forward(*x[:5], *options) is None
    wrong = (out[:, :1], saved), (out, saved[:, :1]), (out, saved.double()), (out, None)
    assert all(native.linear_plain_backward(x.dout, *x[:5], *w, (True,) * 5, options) is None for w in wrong)


@pytest.mark.parametrize("run_backward", [False, True])
def test_nothing_outlives_its_graph(run_backward):
    """No reference cycle through ctx: inputs and results die with their last name, without gc."""
    case = CASES["gated delta"]
    x = inputs(case)
    gc.collect()
    gc.disable()
    try:
        out = plain(x, case)
        if run_backward:
            out.backward(x.dout)
        watched = [weakref.ref(t) for t in (*x[:5], out)]
        del x, out
        assert [ref() for ref in watched] == [None] * 6
    finally:
        gc.enable()


def test_autocast():
    """Tensors that autocast would cast are left to the general call; those it would not are taken."""
    case = CASES["per token"]
    x = inputs(case)
    low = x._replace(**{n: getattr(x, n).detach().bfloat16().requires_grad_() for n in "qkv"}, dout=x.dout.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(x, case) is None
        out = plain(low, case)
        assert torch.equal(out, general(low, case))
        found = gradients(out, low)
    assert all(map(torch.equal, found, gradients(general(low, case), low)))


def test_is_left_alone_where_someone_looks():
    case = CASES["gated delta"]
    x = make(case, FP32)
    q, k, v, g, b = x[:5]
    assert plain(x, case) is not None
    long = torch.randn(1, 1, (1 << 16) + 16, 2)
    wrong_gate, wrong_beta = g.clone(), b.clone()
    wrong_gate[1, 1, 17], wrong_beta[1, 1, 17] = 0.1, 2.1
    for what, changed in {
        "int scale": {"scale": 1}, "nan scale": {"scale": float("nan")}, "no bool": {"causal": 1}, "map": {"feature_map": "exp"},
        "normalized delta": {"normalize": True}, "mapped delta": {"feature_map": "elu1"}, "not causal": {"causal": False},
        "keys": {"k": k[:, :, :3]}, "dtype": {"v": v.double()}, "3 dims": {"q": q[0]}, "width": {"v": v[..., :8]}, "none": {"k": None},
        "negative view": {"q": torch._neg_view(q)}, "meta": {n: t.to("meta") for n, t in zip("qkv", x)},
        "gate": {"decay": wrong_gate}, "infinite gate": {"decay": g - torch.inf}, "nan gate": {"decay": g * torch.nan},
        "positive gate of a head": {"decay": torch.tensor([-1.0, 1.0])}, "gates of other heads": {"decay": torch.zeros(3)},
        "wrong gate with strides": {"decay": relayout(wrong_gate[..., None], "blhd")[..., 0]}, "gate dtype": {"decay": g.double()},
        "beta with a channel": {"beta": b[..., None]}, "gate with a channel": {"decay": g[..., None]},
        "gate with a channel, taylor1": {"decay": g[..., None], "beta": None, "feature_map": "taylor1"},
        "beta": {"beta": wrong_beta}, "nan beta": {"beta": b * torch.nan}, "beta's shape": {"beta": b[:1]},
        "gradient of one number": {"decay": torch.zeros(2, requires_grad=True)}, "list": {"decay": [0.0, 0.0]},
        "empty": {"q": q[:0], "k": k[:0], "v": v[:0], "decay": g[:0], "beta": b[:0]},
        "many gates": {"q": long, "k": long, "v": long, "decay": -long[..., 0].abs(), "beta": None},
    }.items():  # fmt: skip
        assert plain(x, case, **changed) is None, what
    with torch.profiler.profile():
        assert plain(x, case) is None
    seen = []
    torch.func.vmap(lambda q: (seen.append(plain(x, case, q=q)), q)[1])(q[None])
    torch.func.grad(lambda q: (seen.append(plain(x, case, q=q)), q.sum())[1])(q)
    assert seen == [None, None]


@pytest.mark.parametrize("L", [1, 5])
def test_the_gradient_of_a_gate_of_a_head(L):
    q, k, v = (torch.randn(1, 3, L, 16) for _ in range(3))
    gate = torch.tensor([-0.1, -0.2, -0.3], requires_grad=True)
    found = [
        torch.autograd.grad(fastattn.linear_attention(q, k, v, decay=gate, backend=backend).sum(), gate)[0]
        for backend in ("auto", "native")
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("attend", [fastattn.linear_attention, fastattn.attention])
def test_no_gradient_comes_back_as_none(attend):
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return None

    q = torch.randn(1, 2, 5, 16, requires_grad=True)
    Stop.apply(attend(q, q, q)).sum().backward()
    assert q.grad is None


def test_is_what_training_calls():
    case = CASES["gated delta"]
    x = inputs(case)
    call = lambda **options: fastattn.linear_attention(*x[:3], **case.options(), decay=x.decay, beta=x.beta, **options)
    assert type(call().grad_fn).__name__ == "PlainLinearAttentionBackward"
    with torch.no_grad():
        state = call(return_state=True)[1]
    for options in ({"return_state": True}, {"initial_state": state}, {"chunk_size": 64}, {"backend": "native"}):
        out = call(**options)
        assert type((out if isinstance(out, torch.Tensor) else out[0]).grad_fn).__name__ == "LinearAttentionBackward"
