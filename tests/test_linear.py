"""Values, final states and gradients of linear attention on every backend."""

import itertools

import pytest
import torch
from harness import BACKENDS, BF16, DTYPES, FP16, FP32, FP64, all_backends
from linear_cases import GROUPED, LENGTHS, MAPS, PACKED, SCALED, SIZES, VALUES
from linear_harness import DELTA, LinearCase, attend, check, check_inputs, ends, fast_backends, make, need, why_not

import fastattn
from fastattn.testing import LAYOUTS, max_error, relayout, variants


@all_backends
@pytest.mark.parametrize("case", VALUES, ids=str)
def test_every_option(case, backend):
    check(case, FP32, backend)


@all_backends
@pytest.mark.parametrize("dtype", (BF16, FP16, FP64), ids=("bfloat16", "float16", "float64"))
@pytest.mark.parametrize(
    "case",
    [
        LinearCase(decay="bhl", state=True), LinearCase(feature_map="identity", decay="bhld", Hq=4), LinearCase(feature_map="taylor1"),
        LinearCase(feature_map="taylor2", D=8, state=True), LinearCase(feature_map="relu", decay="h"), LinearCase(**DELTA, state=True),
        LinearCase(**DELTA, decay="bhl", Hv=4), LinearCase(causal=False, key_mask=True, Lk=50), PACKED[0], PACKED[4], PACKED[5],
    ],
    ids=str,
)  # fmt: skip
def test_dtypes(case, dtype, backend):
    check(case, dtype, backend)


@fast_backends
@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_head_groups(case, backend):
    check(case, FP32, backend)


@fast_backends
@pytest.mark.parametrize("case", LENGTHS, ids=str)
def test_lengths(case, backend):
    check(case, FP32, backend)


@fast_backends
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_head_dimensions(case, backend):
    check(case, FP32, backend)


@fast_backends
@pytest.mark.parametrize("case", SCALED, ids=str)
def test_scales(case, backend):
    check(case, FP32, backend)


@fast_backends
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_chunk_size_changes_no_meaning(size, backend):
    for options in (
        {"decay": "bhl", "state": True},
        {"decay": "bhld", "feature_map": "identity"},
        {**DELTA, "decay": "bhl"},
    ):
        check(LinearCase(B=1, L=70, D=8, chunk_size=size, **options), FP32, backend)


@fast_backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend):
    """Every tensor strided, what lies between its elements is NaN; the last: each in a layout of its own."""
    for options in ({"decay": "bhld", "feature_map": "relu"}, {**DELTA, "decay": "bhl"}, {"causal": False}):
        check(LinearCase(L=18, D=8, state=True, layout=layout, **options), FP32, backend)
    case = LinearCase(**DELTA, L=18, D=8, state=True, decay="bhl")
    inputs, names = make(case, FP32), list(LAYOUTS)
    shift = names.index(layout)
    mixed = [relayout(x, names[(i + shift) % len(names)]) for i, x in enumerate(inputs[:3])]
    check_inputs(inputs._replace(q=mixed[0], k=mixed[1], v=mixed[2]), case, backend)


@all_backends
def test_out_lies_in_memory_as_q(backend):
    inputs = make(LinearCase(layout="blhd"), FP32)
    assert attend(inputs, backend, grad=False).out.transpose(1, 2).is_contiguous()


EMPTY = [
    {"B": 0}, {"Hq": 0, "Hk": 0, "Hv": 0}, {"L": 0}, {"D": 0}, {"Dv": 0}, {"B": 0, "L": 0}, {"L": 0, "D": 0, "Dv": 0},
    {"causal": False, "L": 0, "Lk": 5}, {"causal": False, "L": 5, "Lk": 0}, {"B": 1, "lengths": (0, 0)}, {"B": 1, "lengths": ()},
]  # fmt: skip


@all_backends
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("dims", EMPTY, ids=str)
def test_empty_dimensions(dims, dtype, backend):
    """Right shapes, no NaN, gradients of the right shape, and the state passes through."""
    for options in ({}, {"feature_map": "identity"}, {"feature_map": "taylor1"}, {"feature_map": "taylor2"}, DELTA):
        if options is DELTA and not dims.get("causal", True):
            continue
        for state in (False, True):
            case = LinearCase(**{"L": 5, "D": 4, **dims}, **options, state=state)
            inputs = make(case, dtype)
            result = attend(inputs, backend, scale=0.5, **case.options())
            H = max(case.Hq, case.Hv)
            assert result.out.shape == (case.B, H, inputs.q.shape[2], case.Dv)
            assert result.kv.shape == inputs.dkv.shape and (result.z is None) == (inputs.dz is None)
            assert all(x is None or x.isfinite().all() for x in result)
            assert all(dx is None or dx.shape == x.shape for x, dx in zip(inputs, result[3:]))
            if inputs.k.shape[2] == 0:
                assert torch.equal(result.kv, torch.zeros_like(result.kv) if inputs.kv is None else inputs.kv)


@all_backends
def test_zero_length_sequences_hand_their_state_on(backend):
    case = LinearCase(B=1, lengths=(3, 0, 4, 0), state=True, decay="bhl")
    inputs = make(case, FP32)
    result = attend(inputs, backend, **case.options())
    for n in (1, 3):
        assert torch.equal(result.kv[n], inputs.kv[n]) and torch.equal(result.z[n], inputs.z[n])
        assert torch.equal(result.dkv[n], inputs.dkv[n]) and torch.equal(result.dz[n], inputs.dz[n])


@all_backends
@pytest.mark.parametrize("case", [c for c in PACKED if c.state], ids=str)
def test_packed_sequences_are_calls_of_their_own(case, backend):
    inputs = make(case, FP32)
    whole = attend(inputs, backend, grad=False, **case.options())
    marks = inputs.cu_seqlens.tolist()
    for n, (i, j) in enumerate(itertools.pairwise(marks)):
        part = inputs._replace(
            **{t: getattr(inputs, t)[:, :, i:j] for t in ("q", "k", "v", "decay", "beta") if getattr(inputs, t) is not None and getattr(inputs, t).dim() > 2},
            kv=inputs.kv[n, None], z=None if inputs.z is None else inputs.z[n, None], cu_seqlens=None,
            key_mask=None if inputs.key_mask is None else inputs.key_mask[:, i:j],
        )  # fmt: skip
        alone = attend(part, backend, grad=False, **case.options())
        assert max_error(whole.out[:, :, i:j], alone.out) < 1e-5
        assert max_error(whole.kv[n], alone.kv[0]) < 1e-5 and (
            whole.z is None or max_error(whole.z[n], alone.z[0]) < 1e-5
        )


@all_backends
def test_defaults(backend):
    """elu1, causal, normalised, scale D^-0.5; identity is not normalised; no state comes back unasked."""
    inputs = make(LinearCase(D=40), FP32)
    need(backend, inputs)
    out = fastattn.linear_attention(*inputs[:3], backend=backend)
    assert isinstance(out, torch.Tensor)
    case = LinearCase(D=40, normalize=True, scale=40**-0.5)
    assert torch.equal(out, attend(inputs, backend, grad=False, **case.options()).out)
    for name in MAPS:
        _, state = fastattn.linear_attention(*inputs[:3], feature_map=name, return_state=True, backend=backend)
        assert (state.z is None) == (name == "identity") and isinstance(state, fastattn.LinearState)


@all_backends
def test_a_bare_tensor_is_a_state_without_normaliser(backend):
    case = LinearCase(feature_map="identity", state=True)
    inputs = make(case, FP32)
    need(backend, inputs, **case.options())
    found = fastattn.linear_attention(*inputs[:3], feature_map="identity", initial_state=inputs.kv, backend=backend)
    assert torch.equal(found, attend(inputs, backend, grad=False, **case.options()).out)


@all_backends
@pytest.mark.parametrize("dtype", (BF16, FP64), ids=("bfloat16", "float64"))
def test_gates_of_another_dtype(dtype, backend):
    """decay and beta are read in the dtype of sums, whatever they come in; gradients go back in theirs."""
    case = LinearCase(**DELTA, decay="bhl", L=12)
    inputs = make(case, FP32)
    inputs = inputs._replace(decay=inputs.decay.to(dtype), beta=inputs.beta.to(dtype))
    found = attend(inputs, backend, **case.options())
    expected = attend(inputs._replace(decay=inputs.decay.float(), beta=inputs.beta.float()), backend, **case.options())
    assert torch.equal(found.out, expected.out) and found.ddecay.dtype == found.dbeta.dtype == dtype
    assert torch.equal(found.ddecay, expected.ddecay.to(dtype)) and torch.equal(found.dbeta, expected.dbeta.to(dtype))


@all_backends
def test_identity_divides_where_asked(backend):
    """Features mapped before the call."""
    case = LinearCase(feature_map="identity", normalize=True, decay="bhl", state=True)
    inputs = make(case, FP32)
    check_inputs(inputs._replace(q=inputs.q.abs(), k=inputs.k.abs()), case, backend)


@pytest.mark.skipif("native" not in BACKENDS, reason="native is not under test")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_takes_every_option(dtype):
    """Guards the skips above: where the library is built, native may refuse fp64 only."""
    if fastattn.backends.native.status() is not None:
        pytest.skip(f"native: {fastattn.backends.native.status()}")
    for case in VALUES + GROUPED + SIZES + variants(LinearCase(), layout=("blhd", "last_strided", "sliced")):
        assert why_not("native", make(case, dtype), **case.options()) == [], case


def test_explain_linear_prints_a_row_for_every_backend():
    inputs = make(LinearCase(decay="bhl"), FP32)
    table = fastattn.explain_linear(*inputs[:3], decay=inputs.decay)
    assert table.op == "linear" and table.chosen is not None and table.kernel
    assert all(name in str(table) for name in ("native", "triton", "eager", "reference"))
    assert "elu1" in str(table) and f"decay {list(inputs.decay.shape)}" in str(table)


def test_cu_seqlens_of_int64_is_refused_or_means_the_same():
    case = LinearCase(B=1, lengths=(5, 7))
    inputs = make(case, FP32)
    try:
        found = fastattn.linear_attention(*inputs[:3], cu_seqlens=ends((5, 7)).long())
    except TypeError as error:
        assert "cu_seqlens" in str(error)
    else:
        assert torch.equal(found, fastattn.linear_attention(*inputs[:3], cu_seqlens=ends((5, 7))))
