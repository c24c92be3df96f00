"""Bitwise equal results of linear attention: over repeats, thread counts, positions in the batch and in a packed call."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from harness import BF16, DEVICE, FP32
from linear_harness import DELTA, LinearCase, Result, assert_equal, attend, fast_backends, make, need

from fastattn.testing import max_error

CASES = [
    LinearCase(**{"B": 2, "Hq": 4, "L": 130, "D": 24, "Dv": 40, "state": True, **options})
    for options in (
        {"decay": "bhl"}, {"decay": "bhld", "feature_map": "identity", "D": 8}, {"feature_map": "taylor2", "D": 5}, {"feature_map": "taylor1", "Hv": 4},
        {**DELTA, "decay": "bhl"}, {**DELTA, "Hk": 1}, {"causal": False, "Lk": 200, "key_mask": True}, {"B": 1, "lengths": (60, 0, 70), "decay": "bhl"},
    )
]  # fmt: skip


@fast_backends
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_repeats_and_threads(case, dtype, backend):
    inputs = make(case, dtype)
    need(backend, inputs, **case.options())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once = attend(inputs, backend, **case.options())
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for _ in range(2):
                assert_equal(attend(inputs, backend, **case.options()), once, f"{threads} threads")
    finally:
        torch.set_num_threads(before)


@fast_backends
@pytest.mark.parametrize("case", [c for c in CASES if c.lengths is None], ids=str)
def test_a_batch_of_one_and_of_eight(case, backend):
    """Each element of eight is what it is alone."""
    case = LinearCase(**{**case.__dict__, "B": 8, "L": 70})
    inputs = make(case, FP32)
    need(backend, inputs, **case.options())
    if backend == "eager":
        pytest.skip("torch's batched products may differ between batch sizes; values are compared elsewhere")
    whole = attend(inputs, backend, **case.options())
    for b in (0, 3, 7):
        alone = attend(
            type(inputs)(*(t if t is None or t.dim() < 2 else t[b : b + 1] for t in inputs)), backend, **case.options()
        )
        assert_equal(alone, Result(*(None if t is None else t[b : b + 1] for t in whole)), f"element {b}")


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.lengths is not None] + [LinearCase(B=1, lengths=(9, 0, 33), **DELTA, state=True)],
    ids=str,
)
def test_a_packed_sequence_and_a_call_of_its_own(case):
    """On native to the bit: nothing of a neighbour, not even its length, enters."""
    inputs = make(case, FP32)
    need("native", inputs, **case.options())
    whole = attend(inputs, "native", grad=False, **case.options())
    for n, (i, j) in enumerate(itertools.pairwise(inputs.cu_seqlens.tolist())):
        cut = {
            t: getattr(inputs, t)[:, :, i:j] for t in ("q", "k", "v", "decay", "beta") if getattr(inputs, t) is not None
        }
        part = inputs._replace(
            **cut, kv=inputs.kv[n, None], z=None if inputs.z is None else inputs.z[n, None], cu_seqlens=None
        )
        alone = attend(part, "native", grad=False, **case.options())
        assert torch.equal(whole.out[:, :, i:j], alone.out) and torch.equal(whole.kv[n, None], alone.kv)


@fast_backends
def test_layout_does_not_change_values(backend):
    """fp32 sums in one order whatever the strides are."""
    for options in ({"decay": "bhl"}, {**DELTA, "decay": "bhl"}):
        case = LinearCase(L=70, D=24, Dv=40, **options)
        need(backend, make(case, FP32), **case.options())
        plain = attend(make(case, FP32), backend, **case.options())
        for layout in ("blhd", "sliced", "last_strided"):
            other = attend(make(LinearCase(**{**case.__dict__, "layout": layout}), FP32), backend, **case.options())
            for name, a, b in zip(plain._fields, plain, other):
                assert a is None or (torch.equal(a, b) if backend == "native" else max_error(a, b) < 1e-4), name


@fast_backends
def test_from_many_python_threads(backend):
    """Calls side by side share no scratch."""
    if DEVICE != "cpu":
        pytest.skip("threads of the cpu")
    problems = [(case, make(case, FP32)) for case in CASES[:6]]
    for case, inputs in problems:
        need(backend, inputs, **case.options())
    alone = [attend(inputs, backend, **case.options()) for case, inputs in problems]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            found = pool.map(lambda p: attend(p[1], backend, **p[0].options()), problems)
            for a, b in zip(found, alone):
                assert_equal(a, b, "side by side")


@pytest.mark.parametrize("Dv", [64, 72])
@pytest.mark.parametrize("options", [{}, {"decay": "bhl"}, {**DELTA, "decay": "bhl"}], ids=("elu1", "decay", "delta"))
def test_a_call_larger_than_caches(options, Dv):
    """Its results are written past them; those of its heads in smaller calls are not."""
    H = 9
    case = LinearCase(B=1, Hq=H, Hk=H, Hv=H, L=4096, D=64, Dv=Dv, **options)
    inputs = make(case, FP32)
    whole = attend(inputs, "native", **case.options())
    for first in range(0, H, 3):
        heads = inputs._replace(**{
            name: x[:, first : first + 3] for name, x in zip(inputs._fields, inputs) if isinstance(x, torch.Tensor) and x.dim() > 2
        })  # fmt: skip
        part = attend(heads, "native", **case.options())
        cut = whole._replace(**{
            name: x[:, first : first + 3] for name, x in zip(whole._fields, whole) if x is not None and x.dim() > 2
        })  # fmt: skip
        assert_equal(part, cut, f"heads from {first}")


def test_kept_scratch_from_many_python_threads():
    """Pieces of scratch memory that are large enough to be kept, of many sizes, wanted at once."""
    if DEVICE != "cpu":
        pytest.skip("threads of the cpu")
    cases = [LinearCase(B=1, Hq=2, Hk=2, Hv=2, L=L, D=D, Dv=D, **options)
             for L, D in ((300, 64), (1100, 32), (2100, 16)) for options in ({}, {"decay": "h"}, {**DELTA, "decay": "bhl"})]  # fmt: skip
    problems = [(case, make(case, FP32)) for case in cases]
    alone = [attend(inputs, "native", **case.options()) for case, inputs in problems]
    with ThreadPoolExecutor(9) as pool:
        for _ in range(5):
            found = pool.map(lambda p: attend(p[1], "native", **p[0].options()), problems)
            for a, b in zip(found, alone):
                assert_equal(a, b, "side by side")
