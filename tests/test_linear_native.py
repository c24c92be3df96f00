"""Linear attention on the native backend: what only its kernels can get wrong."""

import pytest
import torch

import fastattn
from fastattn import LinearState, linear_attention, linear_attention_step
from fastattn.params import LinearTensors
from fastattn.testing import LAYOUTS, relayout

native_status = fastattn.backends.native.status()
pytestmark = pytest.mark.skipif(native_status is not None, reason=f"native: {native_status}")

FP32_RATIO, HALF_RATIO = 2e-6, 5e-3  # of RMS error to RMS: what the package promises against fp64
NAMES = ("out", "kv", "dq", "dk", "dv", "ddecay")


def inputs(H, L, D, Dv, decay=None, dtype=torch.float32, B=1, Hk=None, Hv=None, seed=0):
    """q, k, v and log decays (None, or a number for the slowest)."""
    g = torch.Generator().manual_seed(seed)
    Hk, Hv = Hk or H, Hv or H
    q, k, v = (torch.randn(B, h, L, d, generator=g).to(dtype) for h, d in ((H, D), (Hk, D), (Hv, Dv)))
    shape = {"scalar": (B, max(Hk, Hv), L), "vector": (B, max(Hk, Hv), L, D)}
    return q, k, v, None if decay is None else -torch.rand(shape[decay], generator=g)


def run(tensors, backend="native", wide=False, **options):
    """(out, kv, gradients) under a fixed cotangent."""
    leaves = [None if t is None else (t.double() if wide else t).detach().requires_grad_() for t in tensors]
    q, k, v, decay = leaves
    out, state = linear_attention(q, k, v, decay=decay, return_state=True, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    dout, dkv = (torch.randn(t.shape, generator=generator).to(t.dtype) for t in (out, state.kv))
    wanted = [t for t in leaves if t is not None]
    return [t.detach() for t in (out, state.kv, *torch.autograd.grad((out, state.kv), wanted, (dout, dkv)))]


def ratio(found, expected):
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def check(tensors, limit=FP32_RATIO, golden="reference", **options):
    for name, found, expected in zip(NAMES, run(tensors, **options), run(tensors, golden, wide=True, **options)):
        # The gradient of a decay is a running sum of differences.
        allowed = 2 * limit if name == "ddecay" else limit
        assert ratio(found, expected) <= allowed, (name, ratio(found, expected))


@pytest.mark.parametrize("decay", (None, "scalar", "vector"))
@pytest.mark.parametrize("D, Dv", [(1, 3), (5, 17), (16, 64), (33, 8), (40, 100), (130, 31)])
def test_every_lane_and_tail(D, Dv, decay):
    """Head dimensions around whole vectors, lengths around whole groups and blocks."""
    for L in (1, 4, 5, 33):
        check(inputs(2, L, D, Dv, decay, seed=L), feature_map="identity")


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("feature_map, D", [("relu", 24), ("elu1", 24), ("taylor1", 24), ("taylor2", 9)])
def test_every_feature_map(feature_map, D, causal):
    # The denominator of taylor1 and relu may be near 0, where any rounding is large.
    check(inputs(2, 45, D, 20), feature_map=feature_map, normalize=feature_map in ("elu1", "taylor2"), causal=causal)


@pytest.mark.parametrize("decay", (None, "scalar", "vector"))
def test_values_of_one_come_out_as_one(decay):
    """The denominators are rounded as their numerators are, so that each divides out."""
    q, k, _, gate = inputs(2, 1000, 16, 16, decay)  # a scale of 1/4, which does not round
    out = linear_attention(q, k, torch.ones(1, 2, 1000, 16), decay=gate, feature_map="elu1", backend="native")
    assert (out - 1).abs().max() <= 2**-24


@pytest.mark.parametrize("feature_map", ("elu1", "relu", "taylor1", "taylor2"))
def test_every_feature_map_keeps_nan(feature_map):
    """A row of nothing but NaN is no zero row, in whichever vectors of a row it lies."""
    q, k, v, _ = inputs(1, 20, 9 if feature_map == "taylor2" else 20, 16)
    q[0, 0, 7] = float("nan")
    out = linear_attention(q, k, v, feature_map=feature_map, backend="native")
    assert out[0, 0, 7].isnan().all() and out[0, 0, :7].isfinite().all() and out[0, 0, 8:].isfinite().all()


@pytest.mark.parametrize("decay", (None, "scalar", "vector"))
@pytest.mark.parametrize("feature_map", ("elu1", "identity"))
@pytest.mark.parametrize("H, Hk, Hv", [(1, 1, 1), (4, 2, 1), (5, 5, 5)])
def test_bits_are_the_same_for_any_threads_and_batch(H, Hk, Hv, feature_map, decay):
    """One head is cut into lanes for several threads, its gradients into tasks; five heads are not."""
    tensors = inputs(H, 300, 48, 80, decay, B=2, Hk=Hk, Hv=Hv)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(run(tensors, feature_map=feature_map))
        alone = linear_attention(*(t[1:] for t in tensors[:3]), decay=None if decay is None else tensors[3][1:],
                                 feature_map=feature_map, backend="native")  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0]))
    assert torch.equal(alone, results[0][0][1:])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_strides_change_no_bit(dtype):
    q, k, v, decay = inputs(3, 37, 20, 24, "vector", dtype)
    expected = run((q, k, v, decay))
    heads_inside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    every_other = [torch.stack((t, t), -1).flatten(-2)[..., ::2] for t in (q, k, v)]
    columns = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    for strided in (heads_inside, every_other, columns):
        assert all(torch.equal(a, b) for a, b in zip(run((*strided, decay)), expected))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("beta", [False, True])
def test_strides_of_gates_change_no_bit(beta, layout):
    """Gates of each channel, more of them than a vector holds."""
    q, k, v, decay = inputs(2, 21, 40, 24, "vector")
    k, decay = torch.nn.functional.normalize(k, dim=-1), relayout(decay, layout)
    beta = relayout(torch.rand(1, 2, 21, 1), layout)[..., 0] if beta else None
    found = run((q, k, v, decay), feature_map="identity", beta=beta)
    dense = [None if t is None else t.contiguous() for t in (decay, beta)]
    expected = run((q, k, v, dense[0]), feature_map="identity", beta=dense[1])
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", ("scalar", "vector"))
def test_a_slow_decay_does_not_drift(kind):
    """e^-1e-4 as one float, 20000 times over: the state, and the gradient of the first values."""
    q, k, v, decay = inputs(1, 20000, 8, 8, kind)
    decay, v = torch.full_like(decay, -1e-4), v.requires_grad_()
    _, state = linear_attention(q, k, v, feature_map="identity", decay=decay, return_state=True, backend="native")
    dkv = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    (dv,) = torch.autograd.grad((state.kv * dkv).sum(), v)
    left = k.double() * (-1e-4 * torch.arange(19999, -1, -1, dtype=torch.float64)).exp()[:, None]
    assert ratio(state.kv.detach(), left.transpose(2, 3) @ v.detach().double()) <= 4e-6
    assert ratio(dv, left @ dkv.double()) <= 4e-6


def test_steps_do_not_drift():
    q, k, v, _ = inputs(1, 1, 8, 8)
    state = LinearState.zeros(1, 1, 8, 8, feature_map="identity")
    state.kv.copy_(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    left = state.kv.double() * torch.tensor(-1e-4, dtype=torch.float32).double().mul(3000).exp()
    decay = torch.full((1,), -1e-4)
    for _ in range(3000):
        linear_attention_step(q, k * 0, v, state, feature_map="identity", decay=decay, backend="native")
    assert ratio(state.kv, left) <= 4e-6


@pytest.mark.parametrize("decay", (-5.0, -50.0))
@pytest.mark.parametrize("kind", ("scalar", "vector"))
def test_gradients_under_a_fast_decay(kind, decay):
    """What a fast decay leaves is far smaller than the numbers it is a difference of, and out is rounded to 16 bits."""
    q, k, v, g = inputs(2, 300, 16, 16, kind)
    g = torch.full_like(g, decay)
    for feature_map in ("identity", "elu1"):
        # In fp64 itself dq and dk of a normalised output are all rounding at -50.
        skip = ("dq", "dk") if feature_map == "elu1" and decay == -50.0 else ()
        for dtype, limit in ((torch.float32, 4e-6), (torch.bfloat16, HALF_RATIO)):
            tensors = *(t.to(dtype) for t in (q, k, v)), g
            expected = run(tensors, "reference", wide=True, feature_map=feature_map)
            for name, a, b in zip(NAMES, run(tensors, feature_map=feature_map), expected):
                assert name in skip or ratio(a, b) <= limit, (feature_map, dtype, name, ratio(a, b))


def test_outputs_are_written_whole_and_nothing_else():
    q, k, v, decay = inputs(2, 19, 20, 21, "vector")
    frame = torch.full((2 * 19 * 21 + 256,), 7.0)
    kv, z = torch.full((2 * 20 * 21 + 256,), 7.0), torch.full((2 * 20 + 256,), 7.0)
    out = frame[128:-128].view(1, 2, 19, 21)
    x = LinearTensors(q, k, v, decay)
    fastattn._C.linear_forward(x, out, kv[128:-128].view(1, 2, 20, 21), z[128:-128].view(1, 2, 20), None,
                               "elu1", True, True, 20**-0.5, 2)  # fmt: skip
    expected, state = linear_attention(q, k, v, decay=decay, return_state=True, backend="native")
    assert torch.equal(out, expected) and torch.equal(kv[128:-128], state.kv.flatten())
    for guard in (frame, kv, z):
        assert (guard[:128] == 7).all() and (guard[-128:] == 7).all()


def malformed():
    """Calls that must be refused before any memory is touched: (words of the message, change of the arguments)."""
    q, k, v, decay = inputs(2, 8, 4, 4, "scalar")
    state = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4)
    good = {"x": LinearTensors(q, k, v), "out": torch.empty(1, 2, 8, 4), "kv": state[0], "z": state[1], "saved": None,
            "map": "elu1", "causal": True, "normalize": True, "scale": 0.5, "threads": 1}  # fmt: skip
    x = good["x"]
    cu = lambda *ends: torch.tensor(ends, dtype=torch.int32)
    return good, {
        "shape": {"x": x._replace(v=v[:, :, :7])},
        "dtype": {"x": x._replace(k=k.bfloat16())},
        "do not divide": {"x": x._replace(q=torch.randn(1, 3, 8, 4))},
        "1 .. 256": {"x": LinearTensors(*(torch.zeros(1, 2, 8, 257),) * 3)},
        "1 .. 64": {"x": LinearTensors(*(torch.zeros(1, 2, 8, 65),) * 2, v), "map": "taylor2"},
        "decay": {"x": x._replace(decay=decay[:, :, :7])},
        "decay must be float32": {"x": x._replace(decay=decay.half())},
        "beta needs": {"x": x._replace(beta=decay)},
        "key_mask": {"x": x._replace(key_mask=torch.ones(1, 8, dtype=torch.bool))},
        "many queries": {"x": x._replace(q=q[:, :, :5]), "out": torch.empty(1, 2, 5, 4)},
        "rise": {"x": x._replace(cu_seqlens=cu(0, 5, 3, 8))},
        "number of tokens": {"x": x._replace(cu_seqlens=cu(0, 9))},
        "final state": {"kv": torch.zeros(1, 2, 4, 5)},
        "needs its z": {"z": None},
        "must be contiguous": {"kv": torch.zeros(1, 2, 4, 8)[..., ::2]},
        "shares memory": {"out": q},
        "expanded": {"out": torch.empty(1, 1, 8, 4).expand(1, 2, 8, 4)},
        "saved": {"saved": torch.empty(1, 2, 7)},
        "unknown feature map": {"map": "elu2"},
        "scale": {"scale": float("nan")},
        "threads": {"threads": 0},
        "LinearTensors": {"x": (q, k, v)},
    }


@pytest.mark.parametrize("message", malformed()[1])
def test_malformed_calls_are_refused(message):
    good, changes = malformed()
    fastattn._C.linear_forward(*good.values())
    with pytest.raises((ValueError, TypeError), match=message):
        fastattn._C.linear_forward(*{**good, **changes[message]}.values())
