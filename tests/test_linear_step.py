"""linear_attention_step: token by token it is the whole call, in place, without a gradient."""

import contextlib

import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32, FP64, all_backends
from linear_harness import DELTA, LinearCase, attend, expect, make, need, problem
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn
from fastattn.ops.linear_plain import plain_step
from fastattn.params import LinearState
from fastattn.testing import LAYOUTS, max_error, relayout

INF, NAN = float("inf"), float("nan")
UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
CASES = [
    LinearCase(**{"L": 21, "D": 8, "state": True, **options})
    for options in (
        {}, {"decay": "h"}, {"decay": "bhl"}, {"decay": "bhld"}, {"normalize": False, "decay": "bhl"}, {"feature_map": "relu", "decay": "bhld"},
        {"feature_map": "identity"}, {"feature_map": "identity", "decay": "h"}, {"feature_map": "identity", "decay": "bhld", "scale": -0.3},
        {"feature_map": "taylor1", "decay": "h"}, {"feature_map": "taylor2", "D": 5}, DELTA, {**DELTA, "decay": "h"},
        {**DELTA, "decay": "bhl"}, {**DELTA, "decay": "bhld"}, {"Hq": 4, "Hk": 1, "Hv": 2, "decay": "bhl"}, {**DELTA, "Hk": 1, "Hv": 4},
        {"D": 33, "Dv": 17, "decay": "bhl"}, {"D": 128, "Dv": 130, "decay": "bhl", "L": 6}, {**DELTA, "D": 128, "Dv": 128, "L": 6}, {"state": False},
    )
]  # fmt: skip


def state_of(inputs, case):
    """A copy that a step may overwrite."""
    if inputs.kv is not None:
        return LinearState(inputs.kv.clone(), None if inputs.z is None else inputs.z.clone())
    N, Hs, F, Dv = inputs.dkv.shape
    wide = inputs.dkv.dtype
    state = LinearState.zeros(
        N, Hs, case.D, Dv, feature_map=case.feature_map, normalize=case.normalize, dtype=wide, device=DEVICE
    )
    assert state.kv.shape == (N, Hs, F, Dv)
    return state


def steps(inputs, case, backend, state):
    """out of all tokens, one step at a time, or a skip with the backend's refusal."""
    options = {name: value for name, value in case.options().items() if name not in ("causal", "chunk_size")}
    outs = []
    for t in range(inputs.q.shape[2]):
        gates = {"decay": inputs.decay, "beta": inputs.beta}
        gates = {n: g if g.dim() == 1 else g[:, :, t : t + 1] for n, g in gates.items() if g is not None}
        token = (x[:, :, t : t + 1] for x in inputs[:3])
        try:
            outs.append(fastattn.linear_attention_step(*token, state, **gates, **options, backend=backend))
        except fastattn.UnsupportedError as refusal:
            pytest.skip(str(refusal).splitlines()[0])
    return torch.cat(outs, 2)


def close(found, golden, low, magnitude, what):
    """Another order of additions: a few times what the token-by-token reference itself is off, and roundings."""
    eps = {FP16: 2**-11, BF16: 2**-8}.get(found.dtype, torch.finfo(FP32).eps)
    limit = 4 * max_error(low, golden) + 2e-6 * float(magnitude.abs().max()) + eps * float(golden.abs().max())
    assert max_error(found, golden) <= limit, what


@all_backends
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_are_the_whole(case, backend):
    inputs, (golden, low, magnitude) = problem(case, FP32)
    state = state_of(inputs, case)
    pointers = state.kv.data_ptr(), None if state.z is None else state.z.data_ptr()
    out = steps(inputs, case, backend, state)
    assert (state.kv.data_ptr(), None if state.z is None else state.z.data_ptr()) == pointers
    close(out, golden.out, low.out, magnitude.out, "out")
    close(state.kv, golden.kv, low.kv, magnitude.kv, "kv")
    if state.z is not None:
        close(state.z, golden.z, low.z, magnitude.z, "z")


@all_backends
@pytest.mark.parametrize("dtype", (BF16, FP16, FP64), ids=("bfloat16", "float16", "float64"))
@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[10], CASES[13], CASES[15]], ids=str)
def test_dtypes(case, dtype, backend):
    inputs, (golden, low, magnitude) = problem(case, dtype)
    state = state_of(inputs, case)
    out = steps(inputs, case, backend, state)
    assert out.dtype == dtype and state.kv.dtype == (FP64 if dtype == FP64 else FP32)
    if dtype == FP64:
        assert max_error(out, golden.out) < 1e-11 and max_error(state.kv, golden.kv) < 1e-11
        return
    close(out, golden.out, low.out, magnitude.out, "out")
    close(state.kv, golden.kv, low.kv, magnitude.kv, "kv")


@all_backends
@pytest.mark.parametrize("case", [CASES[2], CASES[10], CASES[13]], ids=str)
def test_prefill_then_steps(case, backend):
    """The state a whole call returns is the one a step takes."""
    inputs, (golden, low, magnitude) = problem(case, FP32)
    need(backend, inputs, **case.options())

    def cut(begin, end):
        return inputs._replace(**{
            n: getattr(inputs, n)[:, :, begin:end] for n in ("q", "k", "v", "decay", "beta") if getattr(inputs, n) is not None
        })  # fmt: skip

    first = attend(cut(0, 13), backend, grad=False, **case.options())
    state = LinearState(first.kv, first.z)
    out = torch.cat((first.out, steps(cut(13, 21), case, backend, state)), 2)
    close(out, golden.out, low.out, magnitude.out, "out")
    close(state.kv, golden.kv, low.kv, magnitude.kv, "kv")


@all_backends
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_layouts(layout, backend):
    """q, k, v strided; the state is contiguous, and said to be where it is not."""
    for case in (
        LinearCase(L=3, D=8, state=True, decay="bhld"),
        LinearCase(**DELTA, L=3, D=8, state=True, decay="bhl"),
    ):
        inputs = make(case, FP32)
        expected = expect(inputs, case)
        strided = inputs._replace(**{n: relayout(getattr(inputs, n), layout) for n in ("q", "k", "v")})
        state = state_of(inputs, case)
        out = steps(strided, case, backend, state)
        close(out, expected.golden.out, expected.low.out, expected.magnitude.out, "out")


@all_backends
def test_bare_kv_is_advanced_in_place(backend):
    case = LinearCase(**DELTA, L=4, state=True)
    inputs, (golden, *_) = problem(case, FP32)
    kv = inputs.kv.clone()
    steps(inputs, case, backend, kv)
    assert max_error(kv, golden.kv) < 1e-5


@all_backends
def test_empty_batches_and_heads(backend):
    for dims in ({"B": 0}, {"Hq": 0, "Hk": 0, "Hv": 0}, {"Dv": 0}):
        case = LinearCase(L=1, state=True, **dims)
        inputs = make(case, FP32)
        out = steps(inputs, case, backend, state_of(inputs, case))
        assert out.shape == (case.B, case.Hq, 1, case.Dv)


@all_backends
@pytest.mark.parametrize("name", ["q", "k", "v", "decay", "beta", "kv"])
def test_refuses_gradients(name, backend):
    """Whatever asks for one; under no_grad it runs, and the state it overwrote is right."""
    case = LinearCase(**DELTA, L=1, decay="bhl", state=True)
    inputs = make(case, FP32)
    need(backend, inputs, **case.options())
    x = inputs._replace(kv=inputs.kv.clone())
    x = x._replace(**{name: getattr(x, name).clone().requires_grad_()})
    arguments = {"feature_map": "identity", "decay": x.decay, "beta": x.beta, "backend": backend}
    with pytest.raises(RuntimeError, match="no_grad.*linear_attention"):
        fastattn.linear_attention_step(*x[:3], LinearState(x.kv), **arguments)
    assert torch.equal(x.kv, inputs.kv)
    with torch.no_grad():
        fastattn.linear_attention_step(*x[:3], LinearState(x.kv), **arguments)
    with torch.inference_mode():
        fastattn.linear_attention_step(*x[:3], LinearState(x.kv.detach().clone()), **arguments)
    assert not torch.equal(x.kv, inputs.kv)


@all_backends
@pytest.mark.parametrize("options", [{}, DELTA], ids=str)
def test_autograd_knows_that_the_state_was_written(options, backend):
    """Whoever saved it for a gradient is told, as after any edit in place."""
    case = LinearCase(L=1, state=True, **options)
    inputs = make(case, FP32)
    need(backend, inputs, **case.options())
    for name in ("kv",) if inputs.z is None else ("kv", "z"):
        state = state_of(inputs, case)
        factor = torch.ones((), device=DEVICE, requires_grad=True)
        product = factor * getattr(state, name)
        with torch.no_grad():
            steps(inputs, case, backend, state)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


TRACERS = {
    "compile": lambda f, x: torch.compile(f, fullgraph=True, backend="aot_eager"),
    "make_fx": lambda f, x: make_fx(f)(*x),
    "make_fx of fake tensors": lambda f, x: make_fx(f, tracing_mode="fake")(*x),
    "jit.trace": lambda f, x: torch.jit.trace(f, tuple(x), check_trace=False),
    "export": lambda f, x: torch.export.export(Module(f), tuple(x), strict=False).module(),
}


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *x):
        return self.function(*x)


def one_step(case, backend):
    """(a function of all tensors, a copy of these)."""
    inputs = make(case, FP32)
    need(backend, inputs, **case.options())
    names = [n for n in inputs._fields[:7] if getattr(inputs, n) is not None]

    def run(*tensors):
        x = inputs._replace(**dict(zip(names, tensors)))
        return fastattn.linear_attention_step(
            *x[:3], LinearState(x.kv, x.z), decay=x.decay, beta=x.beta, feature_map=case.feature_map, backend=backend
        )

    return run, [getattr(inputs, n).clone() for n in names]


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, and warns of every shape that is looked at
@all_backends
@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize(
    "case", [LinearCase(L=1, state=True, decay="bhl"), LinearCase(**DELTA, L=1, state=True)], ids=str
)
def test_a_traced_step_is_the_step(case, tracer, backend):
    """The state is written when the graph runs, each time, and not while it is recorded."""
    torch._dynamo.reset()
    run, tensors = one_step(case, backend)
    traced = TRACERS[tracer](run, [t.clone() for t in tensors])
    others = [t.clone() for t in tensors]
    for _ in range(2):
        assert torch.equal(traced(*others), run(*tensors))
        assert all(torch.equal(a, b) for a, b in zip(others, tensors))


@all_backends
@pytest.mark.parametrize("outside", [False, True])
def test_a_step_of_fake_tensors(outside, backend):
    run, tensors = one_step(LinearCase(L=1, state=True, decay="bhl"), backend)
    mode = torch._subclasses.FakeTensorMode()
    fake = [mode.from_tensor(t) for t in tensors]
    with contextlib.nullcontext() if outside else mode:
        out = run(*fake)
    expected = run(*tensors)
    assert isinstance(out, torch._subclasses.FakeTensor)
    assert (out.shape, out.dtype, out.stride()) == (expected.shape, expected.dtype, expected.stride())


@all_backends
@pytest.mark.parametrize("options", [{"decay": "bhl"}, {**DELTA, "decay": "bhld"}], ids=str)
def test_opcheck(options, backend):
    """What the schema says is written is written, and nothing else."""
    case = LinearCase(L=1, state=True, **options)
    inputs = make(case, FP32)
    need(backend, inputs, **case.options())
    values = (*inputs[:7], case.feature_map, case.normalized, 0.3, backend)
    torch.library.opcheck(torch.ops.fastattn.linear_step.default, values, test_utils=UTILS)


def test_refusals_leave_the_state_alone():
    inputs = make(LinearCase(L=1, state=True), FP32)
    state = LinearState(inputs.kv.clone(), inputs.z.clone())
    two = make(LinearCase(L=2), FP32)
    calls = {
        "one token.*linear_attention": lambda: fastattn.linear_attention_step(*two[:3], state),
        "contiguous": lambda: fastattn.linear_attention_step(*inputs[:3], LinearState(state.kv.mT.contiguous().mT, state.z)),
        "state.kv": lambda: fastattn.linear_attention_step(*inputs[:3], LinearState(state.kv[:, :1], state.z)),
        "float32": lambda: fastattn.linear_attention_step(*inputs[:3], LinearState(state.kv.double(), state.z)),
        " z ": lambda: fastattn.linear_attention_step(*inputs[:3], state.kv),
    }  # fmt: skip
    for message, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda q: fastattn.linear_attention_step(q, *inputs[1:3], state))(inputs.q[None])
    assert torch.equal(state.kv, inputs.kv) and torch.equal(state.z, inputs.z)


@all_backends
@pytest.mark.parametrize(
    "name, value", [("decay", 0.5), ("decay", -INF), ("decay", NAN), ("beta", -0.1), ("beta", 2.1), ("beta", NAN)]
)
def test_values_of_gates_are_looked_at_before_the_state(name, value, backend):
    for case in (LinearCase(**DELTA, L=1, decay="bhl", state=True), LinearCase(**DELTA, L=1, decay="bhld", state=True)):
        inputs = make(case, FP32)
        need(backend, inputs, **case.options())
        state, gates = LinearState(inputs.kv.clone()), {"decay": inputs.decay.clone(), "beta": inputs.beta.clone()}
        gates[name].flatten()[-1] = value
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match=f"{name} .*must be .*pass"):
                fastattn.linear_attention_step(*inputs[:3], state, feature_map="identity", backend=backend, **gates)
            assert torch.equal(state.kv, inputs.kv)


def test_shared_memory_of_an_expanded_state_is_refused():
    """A state of stride 0 over the batch cannot be advanced in place."""
    inputs = make(LinearCase(L=1, feature_map="identity", state=True), FP32)
    state = LinearState(inputs.kv[:1].expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="contiguous"):
        fastattn.linear_attention_step(*inputs[:3], state, feature_map="identity")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [CASES[2], CASES[13]], ids=str)
def test_a_step_replays_in_a_cuda_graph(case):
    inputs = make(case, FP32, device="cuda")
    state, expected = (LinearState(inputs.kv.clone(), None if inputs.z is None else inputs.z.clone()) for _ in range(2))
    options = {n: value for n, value in case.options().items() if n != "causal"}
    gates = {"decay": inputs.decay[:, :, :1].contiguous()} | (
        {"beta": inputs.beta[:, :, :1].contiguous()} if case.beta else {}
    )
    token = [x[:, :, :1].contiguous() for x in inputs[:3]]

    def step(state):
        return fastattn.linear_attention_step(*token, state, **gates, **options)

    for _ in range(3):
        step(LinearState(*(None if t is None else t.clone() for t in state)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(state)
    state.kv.copy_(expected.kv)
    if state.z is not None:
        state.z.copy_(expected.z)
    for _ in range(4):
        graph.replay()
        assert torch.equal(out, step(expected)) and torch.equal(state.kv, expected.kv)


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_short_way_is_the_same(case, dtype, monkeypatch):
    """backend="auto" reads an ordinary step's tensors once, in C++; what it does not take, the general call does."""
    inputs = make(case, dtype)
    taken = []
    found = fastattn.backends.native.linear_plain_step
    count = lambda *args: taken.append(found(*args)) or taken[-1]
    monkeypatch.setattr(fastattn.backends.native, "linear_plain_step", count)
    quick, general = state_of(inputs, case), state_of(inputs, case)
    with torch.no_grad():
        outs = steps(inputs, case, "auto", quick), steps(inputs, case, "native", general)
    assert torch.equal(*outs) and torch.equal(quick.kv, general.kv)
    assert quick.z is general.z is None or torch.equal(quick.z, general.z)
    unusual = case.D != inputs.v.shape[3] or inputs.q.shape[1] != inputs.dout.shape[1]
    assert len(taken) == case.L and all((out is None) == unusual for out in taken)


def test_the_short_way_knows_its_limits():
    q, k, v = (torch.randn(1, 2, 1, 8) for _ in range(3))
    kv, gate = torch.zeros(1, 2, 8, 8), torch.full((1, 2, 1), -0.1)
    plain = lambda q=q, k=k, v=v, kv=kv, decay=gate, beta=None, scale=None: plain_step(
        q, k, v, kv, "identity", decay, beta, None, scale
    )
    if fastattn.backends.native.status() is not None:
        pytest.skip(f"native: {fastattn.backends.native.status()}")
    assert plain() is not None
    before = kv.clone()
    for name, options in {
        "gradient": {"q": q.clone().requires_grad_()}, "dtype": {"k": k.half()}, "length": {"q": q.repeat(1, 1, 2, 1)},
        "state": {"kv": torch.zeros(1, 2, 8, 16)[..., ::2]}, "state dtype": {"kv": kv.double()}, "no state": {"kv": None},
        "gate": {"decay": -gate}, "gate dtype": {"decay": gate.half()}, "gate nan": {"decay": gate * NAN}, "beta": {"beta": gate - 1},
        "expanded": {"q": q[:, :1].expand(1, 2, 1, 8)}, "scale": {"scale": NAN}, "int": {"scale": 1}, "meta": {"q": q.to("meta")},
        "list": {"q": [1.0]}, "shared": {"kv": (shared := torch.zeros(1, 2, 8, 8)), "q": shared[:, :, :1]},
    }.items():  # fmt: skip
        assert plain(**options) is None, name
    assert torch.equal(kv, before)  # a step refused has written nothing
    with torch.autocast("cpu", torch.bfloat16):
        assert plain() is None
    with torch.profiler.profile():
        assert plain() is None


def test_the_short_way_tells_autograd():
    q, k, v = (torch.randn(1, 2, 1, 8) for _ in range(3))
    state = torch.randn(1, 2, 8, 8)
    w = torch.randn(1, 2, 8, 8, requires_grad=True)
    product = w * state  # saves the state
    fastattn.linear_attention_step(q, k, v, state, feature_map="identity")
    with pytest.raises(RuntimeError, match="inplace"):
        product.sum().backward()
