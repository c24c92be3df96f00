"""Property test: any legal call agrees on every backend with fp64, up to rounding of what went through the sums."""

import pytest
import torch
from harness import BACKENDS, BF16, DEVICE, FP16, FP32, Result, attend, expect
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastattn.testing import LAYOUTS, Case, dropout_mask, make, max_error, next_rng, relayout
from fastattn.testing.tolerances import EPS_FP32, HALF_LSE

LENGTH = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 140]))
WIDTH = st.one_of(st.integers(1, 24), st.sampled_from([31, 32, 33, 40, 64, 65, 96, 128]))
SIDE = st.one_of(st.none(), st.integers(0, 150))
SHAPE = st.tuples(*(st.sampled_from([letter, "1"]) for letter in "bhqk"), st.integers(0, 3))


@st.composite
def cases(draw):
    Hk = draw(st.integers(1, 3))
    shapes = [None if not draw(st.booleans()) else "".join(s[:4])[s[4] :] for s in (draw(SHAPE), draw(SHAPE))]
    return Case(
        B=draw(st.integers(1, 3)),
        Hq=Hk * draw(st.sampled_from([1, 1, 2, 4])),
        Hk=Hk,
        Lq=draw(LENGTH),
        Lk=draw(LENGTH),
        D=draw(WIDTH),
        Dv=draw(WIDTH),
        causal=draw(st.sampled_from([False, False, "top_left", "bottom_right"])),
        window=draw(st.one_of(st.none(), st.tuples(SIDE, SIDE))),
        scale=draw(st.one_of(st.none(), st.floats(-2, 2, allow_subnormal=False))),
        mask=shapes[0],
        bias=shapes[1],
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.0, 0.2, 0.7])),
        fp32_bias=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, None, 0.3, 5.0])),
        alibi=draw(st.sampled_from([None, None, "h", "bh"])),
        sinks=draw(st.sampled_from([False, False, True])),
    )


def limit(name, magnitude, dtype):
    """A few ulp of the accumulated terms in fp32; in half precision, of the terms each matrix product rounds."""
    finite = magnitude[magnitude.isfinite()]
    terms = max(1.0, float(finite.abs().max()) if finite.numel() else 0.0)
    if name == "lse":
        return 64 * EPS_FP32 * terms + (HALF_LSE if dtype != FP32 else 0.0)
    return (64 if dtype == FP32 else 6) * torch.finfo(dtype).eps * terms


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    case=cases(),
    dtype=st.sampled_from([FP32, FP32, BF16, FP16]),
    layouts=st.tuples(*(st.sampled_from(sorted(LAYOUTS)) for _ in range(4))),
    seed=st.integers(0, 1000),
    hidden=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
)
def test_any_call_agrees_with_fp64(backend, case, dtype, layouts, seed, hidden):
    inputs = make(case, dtype, seed, DEVICE)
    names = ("q", "k", "v", "dout")
    inputs = inputs._replace(**{n: relayout(getattr(inputs, n), layout) for n, layout in zip(names, layouts)})
    if case.bias is not None and hidden:
        drop = torch.rand(inputs.bias.shape, generator=torch.Generator().manual_seed(seed)) < hidden
        inputs = inputs._replace(bias=inputs.bias.masked_fill(drop.to(DEVICE), -torch.inf))
    torch.manual_seed(seed)
    keep = dropout_mask(next_rng(DEVICE), case.dropout_p, case.B, case.Hq, case.Lq, case.Lk) if case.dropout_p else None
    result = attend(inputs, backend, **case.options())
    golden, _, magnitude = expect(inputs, case, keep)
    for name, found, exact, terms in zip(Result._fields, result, golden, magnitude):
        if found is not None:
            assert max_error(found, exact) <= limit(name, terms, dtype), name
