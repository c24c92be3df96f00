"""Faults other attention libraries shipped, for linear attention; docs/faults.md maps every row to its test."""

import os

import pytest
import torch
from harness import DEVICE, FP32
from linear_harness import DELTA, LinearCase, attend, fast_backends, make, need

from fastattn.testing import max_error

WIDE_STRIDES = {  # in elements: past 2^31 by batch, by head, by row, by head dimension
    "batch": (2**31 + 64, 4096, 16, 1), "head": (8192, 2**31 + 64, 16, 1), "row": (64 * 2**20, 2**20, 2**27 + 8, 1),
    "head_dim": (1 << 12, 1 << 11, 1, 306_783_400),
}  # fmt: skip


@pytest.fixture(scope="module")
def sparse_storage(tmp_path_factory):
    """9.5 GB of virtual memory, of which only the pages touched exist."""
    path = tmp_path_factory.mktemp("sparse") / "storage"
    path.touch()
    os.truncate(path, 19 << 29)
    yield torch.from_file(str(path), shared=True, size=(19 << 29) // 4, dtype=FP32)
    path.unlink()


@fast_backends
@pytest.mark.parametrize("tensor", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("strides", WIDE_STRIDES.values(), ids=WIDE_STRIDES)
def test_strides_past_int32(strides, tensor, backend, sparse_storage):
    """fla#1080: an int32 product of offsets reads somewhere else, or nowhere."""
    if DEVICE != "cpu":
        pytest.skip("a file mapped on the cpu")
    for options in ({"decay": "bhl"}, {**DELTA, "decay": "bhl"}, {"causal": False}):
        case = LinearCase(L=17, D=8, Dv=8, **options)
        inputs = make(case, FP32)
        need(backend, inputs, **case.options())
        x = getattr(inputs, tensor)
        wide = sparse_storage.as_strided(x.shape, strides)
        assert sum((n - 1) * s for n, s in zip(x.shape, strides)) > 2**31 - 1
        wide.copy_(x)
        found = attend(inputs._replace(**{tensor: wide}), backend, **case.options())
        for name, a, b in zip(found._fields, found, attend(inputs, backend, **case.options())):
            assert a is None or max_error(a, b) <= 1e-5 * max(1.0, float(b.abs().max())), name


@fast_backends
def test_value_dimension_split(backend):
    """fla PR#941, #1033: a term subtracted once per tile of value channels. Channels in tiles are channels alone."""
    for options in ({"decay": "bhl"}, {**DELTA, "decay": "bhl"}):
        case = LinearCase(B=1, L=20, D=16, Dv=200, state=True, **options)
        inputs = make(case, FP32)
        need(backend, inputs, **case.options())
        whole = attend(inputs, backend, **case.options())
        parts = []
        for begin, end in ((0, 72), (72, 200)):
            cut = {n: getattr(inputs, n)[..., begin:end] for n in ("v", "kv", "dout", "dkv")}
            z = None if inputs.dz is None else inputs.dz * (begin == 0)
            parts.append(attend(inputs._replace(**cut, dz=z), backend, **case.options()))
        for name in ("dq", "dk", "ddecay", "dbeta", "dz"):
            if getattr(whole, name) is not None:
                total = getattr(parts[0], name) + getattr(parts[1], name)
                assert max_error(getattr(whole, name), total) <= 2e-5 * max(1.0, float(total.abs().max())), name
