"""The gradient of a gate that all tokens of a head share: a sum over them."""

import pytest
import torch
from harness import FP32, FP64
from linear_harness import DELTA, LinearCase, attend, cast, fast_backends, make

from fastattn.testing import max_error, rms_ratio


@fast_backends
@pytest.mark.parametrize("through", ["out", "kv"])
@pytest.mark.parametrize("gate", [-0.01, -0.5, -2.0, -5.0])
@pytest.mark.parametrize("options", [{"feature_map": "identity"}, {}, DELTA], ids=("identity", "elu1", "delta"))
def test_the_promise_for_a_constant_gate(options, gate, through, backend):
    """Its gradient sums what every token leaves: an error that tokens share counts once for each."""
    case = LinearCase(B=1, Hq=48, Hk=48, Hv=48, L=128, D=32, Dv=32, decay="h", **options)
    inputs = make(case, FP32)
    unused = {"kv": "dout", "out": "dkv"}[through]
    inputs = inputs._replace(**{"decay": torch.full_like(inputs.decay, gate), unused: 0 * getattr(inputs, unused)})
    golden = attend(cast(inputs, FP64), "eager", **case.options()).ddecay
    plain = attend(inputs, "reference", **case.options()).ddecay
    found = attend(inputs, backend, **case.options()).ddecay
    assert rms_ratio(found, golden) <= 2e-6 and rms_ratio(found, golden) <= 3 * rms_ratio(plain, golden)


@pytest.mark.parametrize("gate", [0.0, -1e-5, -1e-3])
def test_a_slow_constant_gate_over_many_tokens(gate):
    """Against the sum of what each token's gate would have."""
    case = LinearCase(B=1, Hq=8, Hk=8, Hv=8, L=65536, D=16, Dv=16, decay="h", feature_map="identity")
    inputs = make(case, FP32)
    inputs = inputs._replace(decay=torch.full_like(inputs.decay, gate))
    each = inputs._replace(decay=inputs.decay[None, :, None].expand(1, 8, case.L).contiguous())
    found, apart = (attend(x, "native", **case.options()).ddecay for x in (inputs, each))
    assert rms_ratio(found, apart.double().sum((0, 2))) <= 1e-6


@pytest.mark.parametrize("options", [{"feature_map": "identity"}, {}, DELTA], ids=("identity", "elu1", "delta"))
def test_a_constant_gate_given_token_by_token(options):
    """The same numbers without the stride that says so: the gradient is that of each token."""
    case = LinearCase(B=2, L=70, D=8, Dv=20, decay="h", state=True, **options)
    inputs = make(case, FP32)
    each = inputs._replace(decay=inputs.decay[None, :, None].expand(2, -1, 70).contiguous())
    shared = attend(inputs._replace(decay=each.decay[:1, :, :1].expand(2, -1, 70)), "native", **case.options()).ddecay
    apart = attend(each, "native", **case.options()).ddecay
    assert max_error(shared, apart) <= 1e-5 * float(apart.abs().max())
    summed = attend(inputs, "native", **case.options()).ddecay
    assert max_error(summed, apart.sum((0, 2))) <= 1e-4 * float(apart.abs().max())
