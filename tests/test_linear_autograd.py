"""Linear attention inside torch: opcheck, compile, export, vmap, checkpoint, autocast, leaks, FLOPs."""

import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32, FP64, all_backends
from linear_harness import DELTA, LinearCase, arguments, attend, fast_backends, leaves, make, need
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.params import LinearParams, LinearState, LinearTensors
from fastattn.testing import max_error

SMALL = {"B": 2, "Hq": 4, "Hk": 2, "Hv": 2, "L": 9, "D": 8, "Dv": 6, "state": True}
CASES = [
    LinearCase(**{**SMALL, **options})
    for options in (
        {}, {"decay": "bhl"}, {"decay": "bhld", "feature_map": "identity"}, {"decay": "h", "feature_map": "taylor1"},
        {"feature_map": "taylor2", "D": 3}, {"feature_map": "relu", "normalize": False, "state": False}, DELTA, {**DELTA, "decay": "bhl", "Hv": 4},
        {"causal": False, "Lk": 13, "key_mask": True}, {"B": 1, "lengths": (4, 0, 5), "decay": "bhl"},
        {"B": 1, "lengths": (4, 0, 5), **DELTA}, {"layout": "blhd", "decay": "bhl"}, {"layout": "lbhd", **DELTA}, {"layout": "last_strided", "Hk": 4},
    )
]  # fmt: skip
STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")
UTILS = (*STATIC, "test_aot_dispatch_dynamic")  # most of the time: once for each operator


def op_arguments(case, dtype):
    x = make(case, dtype)
    decay = x.decay
    if decay is not None and decay.dim() == 1:
        decay = decay[None, :, None].expand(case.B, len(decay), case.L)
    tensors = LinearTensors(*x[:3], decay, *x[4:9])
    params = LinearParams(case.feature_map, case.causal, case.normalized, 0.3)
    return x, tensors, params


@fast_backends
@pytest.mark.parametrize("case", [CASES[i] for i in (1, 3, 7, 8, 10, 11, 13)], ids=str)
def test_opcheck(case, backend):
    """Schema, registration, exact fake strides, dynamic shapes. The public autograd sits above the ops: no grad here."""
    dtype = BF16 if case is CASES[11] else FP32
    x, tensors, params = op_arguments(case, dtype)
    need(backend, x, **case.options())
    values = (*tensors, *params, True, backend)
    torch.library.opcheck(torch.ops.fastattn.linear_forward.default, values, test_utils=UTILS)
    out, _, _, saved = torch.ops.fastattn.linear_forward(*values)
    given = [t is not None for t in tensors[:7]]
    one = [False, True, *(False,) * 5]
    for needs, dkv, dz, utils in ((given, x.dkv, x.dz, UTILS), (one, None, None, STATIC)):
        values = (x.dout, dkv, dz, *tensors, out, saved, *params, needs, backend)
        torch.library.opcheck(torch.ops.fastattn.linear_backward.default, values, test_utils=utils)


def loss(x, options, backend):
    out, (kv, z) = fastattn.linear_attention(*x[:3], **arguments(x), return_state=True, backend=backend, **options)
    return out.square().sum() + kv.sin().sum() + (0 if z is None else z.square().sum()), out


@all_backends
@pytest.mark.parametrize("case", [CASES[i] for i in (1, 4, 7, 8)], ids=str)
def test_compile_fullgraph(case, backend):
    """Forward and backward in one graph, equal to eager mode, on first and further shapes (dynamic)."""
    if backend == "reference" and case is not CASES[7]:
        pytest.skip("plain torch: one case of it is enough")
    torch._dynamo.reset()
    dynamic = backend != "reference"  # its loop over tokens unrolls
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for L in (9, 17) if dynamic else (9,):
        shape = LinearCase(**{**case.__dict__, "L": L})
        inputs = make(shape, FP32)
        need(backend, inputs, **shape.options())
        found = []
        for function in (compiled, loss):
            x = leaves(inputs)
            value, out = function(x, shape.options(), backend)
            value.backward()
            found.append([out.detach(), *(t.grad for t in x[:7] if t is not None)])
        for a, b in zip(*found, strict=True):
            assert max_error(a, b) <= 1e-5 * max(1.0, float(b.abs().max())) and a.stride() == b.stride()


class Module(torch.nn.Module):
    def __init__(self, backend, **options):
        super().__init__()
        self.backend, self.options = backend, options

    def forward(self, q, k, v, decay):
        return fastattn.linear_attention(q, k, v, decay=decay, backend=self.backend, **self.options)


@all_backends
def test_export(backend):
    inputs = make(LinearCase(decay="bhl", Hq=4), FP32)
    need(backend, inputs)
    if backend == "reference":
        pytest.skip("plain torch: its loop over tokens unrolls")
    L = {2: torch.export.Dim("length", min=2, max=1000)}
    program = torch.export.export(Module(backend), inputs[:4], dynamic_shapes=(L, L, L, L), strict=False)
    for length in (37, 20):
        x = [t[:, :, :length] for t in inputs[:4]]
        torch.testing.assert_close(program.module()(*x), Module(backend)(*x), atol=1e-6, rtol=0)
    assert any("fastattn.linear_forward" in str(node.target) for node in program.graph.nodes)


VMAPPED = [
    (LinearCase(L=7, D=6, Dv=4, state=True, decay="bhl"), (0, 0, 0, 0, None, 0, 0)), (LinearCase(L=7, D=6, decay="h"), (0, None, None, None) + (None,) * 3),
    (LinearCase(L=7, D=6, state=True, **DELTA), (None, 1, 0, None, 0, None, None)), (LinearCase(L=7, D=6, causal=False), (2, 0, 1) + (None,) * 4),
    (LinearCase(B=1, lengths=(3, 0, 4), D=6, decay="bhl", state=True), (0, 0, None, 0, None, 0, 0)),
    (LinearCase(L=7, D=4, feature_map="taylor2", normalize=False), (0, 0, 0) + (None,) * 4),
]  # fmt: skip


@all_backends
@pytest.mark.parametrize("case, dims", VMAPPED, ids=lambda x: str(x))
def test_vmap(case, dims, backend):
    """One call over the folded batch, equal to a loop; with gradients of every element."""
    need(backend, make(case, FP32), **case.options())
    several = [make(case, FP32, seed) for seed in (0, 20, 40)]
    used = [i for i in range(7) if several[0][i] is not None]
    dims = [dims[i] for i in used]
    tensors = [several[0][i] if d is None else torch.stack([x[i] for x in several], d) for i, d in zip(used, dims)]

    def run(*values):
        x = several[0]._replace(**{several[0]._fields[i]: t for i, t in zip(used, values)})
        out, (kv, z) = fastattn.linear_attention(
            *x[:3], **arguments(x), return_state=True, backend=backend, **case.options()
        )
        return (out, kv) if z is None else (out, kv, z)

    def total(*values):
        return sum(y.square().sum() for y in run(*values))

    places = tuple(range(len(used)))
    found = torch.func.vmap(run, tuple(dims))(*tensors)
    grads = torch.func.vmap(torch.func.grad(total, places), tuple(dims))(*tensors)
    for n in range(3):
        one = [t if d is None else t.select(d, n) for t, d in zip(tensors, dims)]
        for a, b in zip(found, run(*one), strict=True):
            assert max_error(a[n], b) <= 1e-5 * max(1.0, float(b.abs().max()))
        x = [t.clone().requires_grad_() for t in one]
        for a, b in zip(grads, torch.autograd.grad(total(*x), x), strict=True):
            assert max_error(a[n], b) <= 2e-5 * max(1.0, float(b.abs().max()))


@all_backends
def test_vmap_of_key_masks(backend):
    case = LinearCase(causal=False, Lk=11, key_mask=True)
    several = [make(case, FP32, seed) for seed in (0, 20)]
    need(backend, several[0], **case.options())
    q, k, v, masks = (torch.stack([x[i] for x in several]) for i in (0, 1, 2, 7))

    def run(q, k, v, mask):
        return fastattn.linear_attention(q, k, v, causal=False, key_mask=mask, backend=backend)

    for n, out in enumerate(torch.func.vmap(run)(q, k, v, masks)):
        assert max_error(out, run(q[n], k[n], v[n], masks[n])) < 1e-6


@all_backends
def test_gradients_through_vmap(backend):
    """Leaves outside of vmap get their gradient."""
    inputs = make(LinearCase(B=3, L=7, decay="bhl"), FP32)
    need(backend, inputs)
    x = [t[:, None].clone().requires_grad_() for t in inputs[:4]]

    def run(q, k, v, decay):
        return fastattn.linear_attention(q, k, v, decay=decay, backend=backend)

    found = torch.autograd.grad(torch.func.vmap(run)(*x).square().sum(), x)
    folded = torch.autograd.grad(run(*(t[:, 0] for t in x)).square().sum(), x)
    for a, b in zip(found, folded):
        assert max_error(a, b) <= 2e-5 * max(1.0, float(b.abs().max()))


@fast_backends
def test_batched_gradients(backend):
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    out, douts = fastattn.linear_attention(q, k, v, backend=backend), torch.randn(3, 1, 2, 5, 8)
    found = torch.autograd.grad(out, (q, k, v), douts, retain_graph=True, is_grads_batched=True)
    one_by_one = zip(*(torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for dout in douts))
    assert all(torch.equal(batch, torch.stack(each)) for batch, each in zip(found, one_by_one))


@all_backends
@pytest.mark.parametrize("case", [CASES[1], CASES[7], CASES[9]], ids=str)
def test_checkpoint_without_reentry(case, backend):
    inputs = make(case, FP32)
    need(backend, inputs, **case.options())
    grads = []
    for wrap in (lambda f, *a: f(*a), partial(checkpoint, use_reentrant=False)):
        x = leaves(inputs)

        def run(*tensors, x=x):
            return loss(x._replace(**dict(zip(x._fields, tensors))), case.options(), backend)[0]

        wrap(run, *x[:7]).backward()
        grads.append([t.grad for t in x[:7] if t is not None])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


@all_backends
@pytest.mark.parametrize("dtype", (BF16, FP16), ids=("bfloat16", "float16"))
def test_autocast(dtype, backend):
    """q, k and v (mixed, even) are cast to the autocast dtype; gates and states stay wide; gradients come back in the dtypes given."""
    if DEVICE != "cpu":
        pytest.skip("autocast of the cpu")
    case = LinearCase(**DELTA, decay="bhl", state=True)
    inputs = make(case, FP32)
    need(backend, inputs._replace(**{n: getattr(inputs, n).to(dtype) for n in "qkv"}), **case.options())
    x = leaves(inputs._replace(v=inputs.v.to(BF16)))
    with torch.autocast("cpu", dtype=dtype):
        out, state = fastattn.linear_attention(
            *x[:3], **arguments(x), feature_map="identity", return_state=True, backend=backend
        )
        out.sum().backward()
    expected = fastattn.linear_attention(
        *(t.detach().to(dtype) for t in x[:3]), **arguments(inputs), feature_map="identity", backend=backend
    )
    assert out.dtype == dtype and state.kv.dtype == FP32 and torch.equal(out, expected)
    assert [x.q.grad.dtype, x.k.grad.dtype, x.v.grad.dtype, x.decay.grad.dtype] == [FP32, FP32, BF16, FP32]


@all_backends
@pytest.mark.parametrize("options", [{"decay": "bhl"}, {**DELTA, "decay": "bhl"}, {"causal": False}], ids=str)
def test_a_second_derivative_is_right_or_refused(options, backend):
    case = LinearCase(L=6, D=4, state=True, **options)
    inputs = make(case, FP32)
    need(backend, inputs, **case.options())

    def second(inputs, backend):
        x = leaves(inputs)
        wanted = [t for t in x[:7] if t is not None]
        grads = torch.autograd.grad(loss(x, case.options(), backend)[0], wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)

    if backend != "reference":
        with pytest.raises(RuntimeError, match="second derivative.*reference"):
            second(inputs, backend)
        return
    exact = [t if t is None or not t.is_floating_point() else t.double() for t in inputs]
    for a, b in zip(second(inputs, backend), second(type(inputs)(*exact), backend)):
        assert max_error(a, b) < 1e-4 * max(1.0, float(b.abs().max()))


@all_backends
@pytest.mark.parametrize("name", ["q", "decay", "kv"])
def test_forward_mode_is_refused(name, backend):
    case = LinearCase(state=True, decay="bhl")
    inputs = make(case, FP32)
    need(backend, inputs)
    if backend == "reference":
        pytest.skip("plain torch: forward mode works")

    def run(t):
        return loss(inputs._replace(**{name: t}), {}, backend)[1]

    tangent = getattr(inputs, name)
    with pytest.raises(NotImplementedError, match="forward.*reference"):
        torch.func.jvp(run, (tangent,), (tangent,))
    with (
        pytest.raises(NotImplementedError, match="forward.*reference"),
        torch.autograd.forward_ad.dual_level(),
        torch.no_grad(),
    ):
        run(torch.autograd.forward_ad.make_dual(tangent, tangent))


@all_backends
@pytest.mark.parametrize("edited", ["q", "k", "v", "decay", "beta", "kv", "out"])
def test_edit_in_place_of_a_saved_tensor_raises(edited, backend):
    """pytorch#197887."""
    case = LinearCase(**DELTA, decay="bhl", state=True)
    inputs = make(case, FP32)
    need(backend, inputs, **case.options())
    x = leaves(inputs)
    x = x._replace(**{n: t * 1 for n, t in zip(x._fields[:7], x) if t is not None})
    if backend == "reference":
        pytest.skip("plain torch: autograd's own check")
    out = fastattn.linear_attention(*x[:3], **arguments(x), **case.options(), backend=backend)
    with torch.no_grad():
        (out if edited == "out" else getattr(x, edited)).add_(1)
    with pytest.raises(RuntimeError, match="inplace|in-place"):
        out.sum().backward()


@all_backends
@pytest.mark.parametrize("run_backward", [False, True])
@pytest.mark.parametrize("case", [LinearCase(decay="bhl", state=True), LinearCase(**DELTA, state=True)], ids=str)
def test_nothing_outlives_its_graph(case, run_backward, backend):
    """pytorch#25340: no reference cycle through ctx; inputs and results die with their last name, without gc."""
    inputs = make(case, FP32)
    need(backend, inputs, **case.options())
    gc.collect()
    gc.disable()
    try:
        x = leaves(inputs)
        out, state = fastattn.linear_attention(
            *x[:3], **arguments(x), **case.options(), return_state=True, backend=backend
        )
        if run_backward:
            (out.sum() + state.kv.sum()).backward()
        watched = [weakref.ref(t) for t in (*(t for t in x[:7] if t is not None), out, state.kv)]
        del x, out, state
        assert [ref() for ref in watched] == [None] * len(watched)
    finally:
        gc.enable()


@all_backends
@pytest.mark.parametrize("case", [CASES[1], CASES[7], CASES[8]], ids=str)
def test_backward_twice_needs_retain_graph(case, backend):
    inputs = make(case, FP32)
    need(backend, inputs, **case.options())
    x = leaves(inputs)
    out = fastattn.linear_attention(*x[:3], **arguments(x), **case.options(), backend=backend)
    wanted = [t for t in x[:7] if t is not None]
    first = torch.autograd.grad(out, wanted, inputs.dout, retain_graph=True)
    second = torch.autograd.grad(out, wanted, inputs.dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, wanted, inputs.dout)


@pytest.mark.parametrize("options", [{}, {"feature_map": "taylor2", "D": 4}, {"causal": False, "Lk": 64}], ids=str)
def test_flops_are_counted(options):
    """Forward: an update of the state per key and a read-out per query, a multiplication and an addition each."""
    from torch.utils.flop_counter import FlopCounterMode

    case = LinearCase(**{"Hq": 4, "L": 32, "D": 16, "Dv": 8, **options})
    inputs = make(case, FP32)
    with FlopCounterMode(display=False) as counter:
        attend(inputs, "auto", grad=False, **case.options())
    forward = counter.get_total_flops()
    assert forward == 2 * case.B * case.features * case.Dv * (4 * 32 + 2 * inputs.k.shape[2])
    with FlopCounterMode(display=False) as counter:
        attend(inputs, "auto", **case.options())
    assert counter.get_total_flops() >= 3 * forward


@all_backends
def test_under_inference_mode_and_no_grad(backend):
    """Also of tensors made there, and a state made there taken outside."""
    case = LinearCase(decay="bhl", state=True)
    inputs = make(case, FP32)
    need(backend, inputs)
    expected = attend(inputs, backend, grad=False)
    with torch.inference_mode():
        x = make(case, FP32)
        out, state = fastattn.linear_attention(*x[:3], **arguments(x), return_state=True, backend=backend)
        assert torch.equal(out, expected.out) and torch.equal(state.kv, expected.kv)
    again = fastattn.linear_attention(*inputs[:3], decay=inputs.decay, initial_state=state, backend=backend)
    assert again.isfinite().all()


@all_backends
def test_a_final_state_is_memory_of_its_own(backend):
    """A state returned shares nothing with the one given: writing it leaves the caller's alone, also with no token."""
    for L in (0, 5):
        inputs = make(LinearCase(L=L, state=True), FP32)
        need(backend, inputs)
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                state = fastattn.linear_attention(
                    *inputs[:3], initial_state=LinearState(inputs.kv, inputs.z), return_state=True, backend=backend
                )[1]
            assert state.kv.untyped_storage().data_ptr() != inputs.kv.untyped_storage().data_ptr()
            assert state.z.untyped_storage().data_ptr() != inputs.z.untyped_storage().data_ptr()


def test_states_params_and_explanations_copy_and_pickle():
    inputs = make(LinearCase(state=True), FP32)
    for value in (LinearParams("relu", True, True, 0.5), fastattn.explain_linear(*inputs[:3])):
        assert copy.deepcopy(value) == value == pickle.loads(pickle.dumps(value))
    state = LinearState(inputs.kv, inputs.z)
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert isinstance(other, LinearState) and torch.equal(other.kv, state.kv) and torch.equal(other.z, state.z)
    module = copy.deepcopy(Module("auto"))
    assert torch.equal(module(*inputs[:3], None), Module("auto")(*inputs[:3], None))


def test_gradcheck_of_the_compiled_op():
    """aot_eager in fp64, through fake tensors of the right strides and dtypes."""
    torch._dynamo.reset()
    case = LinearCase(B=1, L=4, D=3, Dv=2, decay="bhl", state=True)
    x = leaves(make(case, FP64))
    compiled = torch.compile(lambda *t: loss(x._replace(**dict(zip(names, t))), {}, "eager")[0], backend="aot_eager")
    names = [n for n, t in zip(x._fields[:7], x) if t is not None]
    assert torch.autograd.gradcheck(compiled, [getattr(x, n) for n in names], fast_mode=True)
