"""The Triton backend against fp64. Run by test_triton.py in processes of its own: in Triton's interpreter, and on a GPU.

By hand: TRITON_INTERPRET=1 pytest tests/triton_cases.py, or FASTATTN_TEST_DEVICE=cuda pytest tests/triton_cases.py.
"""

from __future__ import annotations

import threading
from functools import partial

import harness
import pytest
import torch
from harness import (
    BF16,
    DEVICE,
    DTYPES,
    FP16,
    FP32,
    all_dtypes,
    assert_equal,
    attend,
    check_exact,
    check_inputs,
    tied_scores,
)

from fastattn.backends import triton as backend
from fastattn.params import SoftmaxTensors
from fastattn.testing import LAYOUTS, Case, dropout_mask, make, max_error, next_rng, random_mask, relayout

check = partial(harness.check, backend="triton")
run = partial(attend, backend="triton")
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="about the interpreter")

# Two heads and lengths off every tile size; small, because the interpreter runs one numpy call per operation.
SMALL = Case(B=1, Hq=2, Hk=2, Lq=37, Lk=53)
BOTH = Case(B=2, Hq=2, Hk=2, Lq=19, Lk=37)


def vary(case: Case, **changes) -> Case:
    return Case(**{**case.__dict__, **changes})


OPTIONS = [
    SMALL,
    vary(SMALL, causal="top_left"),
    vary(SMALL, causal="bottom_right", Hk=1),
    vary(SMALL, window=(5, 3)),
    vary(SMALL, window=(None, 2), Lq=53, Lk=37),
    vary(SMALL, window=(4, None), D=17, Dv=33),
    vary(SMALL, scale=-0.3, D=40, Dv=8),
    vary(SMALL, scale=0.0, causal=True),
    vary(SMALL, mask="bhqk", bias="bhqk", Hk=1),
    vary(SMALL, mask="b11k", bias="1hq1", causal=True, fp32_bias=True),
    vary(SMALL, mask="qk", window=(20, 0), scale=-0.2, bias="k"),
]


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("case", OPTIONS[::4], ids=str)
def test_options_in_fp16(case):
    check(case, FP16)


@pytest.mark.parametrize("D, Dv", [(1, 1), (16, 200), (65, 128), (256, 255)])
def test_head_dimensions(D, Dv):
    check(vary(SMALL, Hq=1, Hk=1, Lq=18, Lk=33, D=D, Dv=Dv, causal=True), BF16)


LENGTHS = [(1, 1), (1, 40), (15, 16), (16, 17), (31, 32), (32, 33), (33, 15), (64, 65), (65, 31), (97, 1)]


@pytest.mark.parametrize("Lq, Lk", LENGTHS)
def test_tails(Lq, Lk):
    for causal in (False, "top_left", "bottom_right"):
        check(vary(SMALL, Hq=1, Hk=1, Lq=Lq, Lk=Lk, causal=causal), FP32)


SHAPES = ("bhqk", "1hqk", "b1qk", "11qk", "bh1k", "b11k", "1h1k", "111k", "bhq1", "b1q1", "11q1", "1111")


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_of_every_broadcast_shape(shape):
    check(vary(BOTH, mask=shape), FP32)


@pytest.mark.parametrize("shape", SHAPES)
def test_biases_of_every_broadcast_shape(shape):
    check(vary(BOTH, bias=shape, Hk=1, causal=True), FP32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    case = vary(BOTH, D=24, Dv=40, causal=True)
    inputs = make(case, FP16, device=DEVICE)
    moved = {name: relayout(getattr(inputs, name), layout) for name in ("q", "k", "v", "dout")}
    check_inputs(inputs._replace(**moved), case, "triton")


def test_masks_and_biases_of_any_stride():
    case = vary(BOTH, mask="bhqk", bias="bhqk")
    inputs = make(case, FP32, device=DEVICE)
    for strided in (
        lambda x: x[:, :1].expand(x.shape),
        lambda x: x.mT.contiguous().mT,
        lambda x: x.repeat(1, 1, 1, 2)[..., ::2],
    ):
        check_inputs(inputs._replace(mask=strided(inputs.mask), bias=strided(inputs.bias)), case, "triton")


DROPPED = [
    vary(SMALL, dropout_p=0.5, Hk=1, causal=True, bias="1hqk"),
    vary(SMALL, dropout_p=0.1, mask="b11k", window=(20, 5), bias="k"),
    vary(BOTH, dropout_p=0.9, bias="bhqk"),
]


@all_dtypes
@pytest.mark.parametrize("case", DROPPED, ids=str)
def test_dropout_given_the_exported_mask(case, dtype):
    torch.manual_seed(11)
    keep = dropout_mask(next_rng(DEVICE), case.dropout_p, case.B, case.Hq, case.Lq, case.Lk)
    torch.manual_seed(11)
    check_inputs(make(case, dtype, device=DEVICE), case, "triton", keep)


@pytest.mark.parametrize("p", (0.3, 1.0))
def test_dropout_bits(p):
    """Uniform weights and v = identity turn out into the mask itself, in one tile and in many."""
    B, H, Lq, Lk = 2, 2, 35, 41
    q, k = torch.zeros(B, H, Lq, 16, device=DEVICE), torch.zeros(B, H, Lk, 16, device=DEVICE)
    rng = torch.tensor([0x7EDCBA9876543210, 2**40 + 3], device=DEVICE)
    params = harness.SoftmaxParams(1.0, dropout_p=p)
    v = torch.eye(Lk, device=DEVICE).expand(B, H, Lk, Lk)
    out, *_ = backend.softmax_forward(SoftmaxTensors(q, k, v, rng=rng), params, False)
    assert torch.equal(out != 0, dropout_mask(rng, p, B, H, Lq, Lk))


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
def test_rows_that_see_nothing(dtype):
    case = vary(SMALL, mask="bhqk", bias="11qk", causal="bottom_right", Lq=40, Lk=37)
    inputs = make(case, dtype, device=DEVICE)
    inputs.mask[0, :, 20:] = False
    inputs.bias[:, :, 30] = -torch.inf
    result = check_inputs(inputs, case, "triton")
    for row in (0, 30):
        assert not result.out[:, :, row].any() and not result.dq[:, :, row].any()
        assert (result.lse[:, :, row] == -torch.inf).all()


HIDDEN_BY = {
    "mask": {},
    "mask_rows": {"window": (40, None)},
    "bias": {"causal": True},
    "bias_rows": {},
    "band": {"causal": "top_left"},
}


@pytest.mark.parametrize("by", HIDDEN_BY)
@pytest.mark.parametrize("poison, dtype", [(float("nan"), FP32), (float("nan"), BF16), (float("inf"), FP16)], ids=str)
def test_hidden_keys_may_hold_nan(poison, dtype, by):
    """In the middle of a tile and in whole ones, whatever hides them."""
    case = vary(SMALL, Hk=1, Lq=10, Lk=50)
    padding = torch.ones(1, 1, 1, 50, dtype=torch.bool, device=DEVICE)
    padding[..., 33:] = False
    hiding = torch.zeros(1, 1, 1, 50, dtype=dtype, device=DEVICE).masked_fill(~padding, -torch.inf)
    shape = (1, 2, 10, 50) if by.endswith("rows") else padding.shape
    inputs = make(case, dtype, device=DEVICE)
    inputs = inputs._replace(
        mask=padding.expand(shape) if by.startswith("mask") else None,
        bias=hiding.expand(shape) if by.startswith("bias") else None,
    )
    options = HIDDEN_BY[by]
    at = (~padding if by != "band" else torch.arange(50, device=DEVICE) >= 10).view(1, 1, 50, 1)
    expected = run(inputs, **options)
    result = run(inputs._replace(k=inputs.k.masked_fill(at, poison), v=inputs.v.masked_fill(at, poison)), **options)
    assert_equal(result, expected, by)
    assert not result.dk.masked_select(at).any() and not result.dv.masked_select(at).any()


@pytest.mark.parametrize("value, dtype", [(-2.45e5, FP32), (1e30, FP32), (-1e30, BF16), (90.0, FP16)], ids=str)
def test_equal_logits_of_any_size(value, dtype):
    inputs = make(vary(SMALL, D=8, scale=1.0, mask="k"), dtype, device=DEVICE)
    q, k = torch.zeros_like(inputs.q), torch.zeros_like(inputs.k)
    q[..., 0], k[..., 0] = abs(value) ** 0.5, abs(value) ** 0.5 * (1 if value > 0 else -1)
    visible = torch.arange(53, device=DEVICE) >= 20
    result = check_exact(inputs._replace(q=q, k=k, mask=visible), vary(SMALL, scale=1.0), "triton")
    mean = inputs.v[:, :, 20:].double().mean(2, keepdim=True).expand_as(result.out)
    assert max_error(result.out, mean) < {FP32: 1e-6, FP16: 1e-3, BF16: 8e-3}[dtype]


TIED = [
    vary(SMALL, causal=True, scale=0.3),
    vary(SMALL, Hk=1, mask="qk", scale=-0.3),
    vary(SMALL, Lq=1, scale=1.0),
    vary(SMALL, window=(20, 5), bias="1hqk", scale=-0.5),
    vary(SMALL, bias="bh1k", scale=1.0),
]
ROOTS = [(512.0, FP32), (-512.0, FP16), (2.0**50, BF16), (-(2.0**50), FP32)]


# Every case with a small root and a large one, every root with three cases or two.
@pytest.mark.parametrize("n", range(2 * len(TIED)))
def test_ties_among_large_logits(n):
    case, (root, dtype) = TIED[n // 2], ROOTS[(n // 2 + 2 * n) % 4]
    inputs = tied_scores(case, dtype, root)
    if inputs.bias is not None:
        inputs = inputs._replace(bias=(inputs.bias * 32).round() / 32)
    check_exact(inputs, case, "triton")


@pytest.mark.parametrize("size", (1e5, 1e30))
def test_backward_has_the_scores_of_the_forward(size):
    for Lq in (1, 40):
        case = vary(SMALL, Lq=Lq, D=64, scale=1.0)
        inputs = make(case, FP32, device=DEVICE)
        check_exact(inputs._replace(q=inputs.q * size**0.5, k=inputs.k * size**0.5), case, "triton")


def test_lse_far_below_zero_at_every_tail():
    for L in (1, 15, 17, 33):
        case = vary(SMALL, Lq=L, Lk=L, D=8, scale=1.0)
        inputs = make(case, FP32, device=DEVICE)
        q, k = torch.zeros_like(inputs.q), torch.zeros_like(inputs.k)
        q[..., 0], k[..., 0] = 11.0, -11.0
        check_inputs(inputs._replace(q=q, k=k), case, "triton")


@pytest.mark.parametrize("empty", [{"B": 0}, {"Hq": 0, "Hk": 0}, {"Lq": 0}, {"Lk": 0}, {"D": 0}, {"Dv": 0}], ids=str)
def test_empty_dimensions(empty):
    check(vary(BOTH, **empty), FP32)


@pytest.mark.parametrize("bias_shape", ("bhqk", "1hqk", "111k", "b1q1"))
def test_gradients_not_asked_for_are_not_made(bias_shape):
    """One at a time, bit for bit what the full backward gives; no dlse is a dlse of zero."""
    case = vary(SMALL, Hk=1, Lq=17, Lk=18, bias=bias_shape)
    inputs = make(case, FP32, device=DEVICE)
    params = harness.SoftmaxParams(0.25, "bottom_right")
    q, k, v, _, bias, dout, dlse = inputs[:7]
    x = SoftmaxTensors(q, k, v, bias)
    out, _, parts = backend.softmax_forward(x, params, True)

    def gradients(needs, dlse=dlse):
        return backend.softmax_backward(dout, dlse, x, out, parts, params, (*needs, False))[:4]

    full = gradients((True,) * 4)
    for n in range(4):
        alone = gradients(tuple(n == m for m in range(4)))
        assert [x is not None for x in alone] == [n == m for m in range(4)]
        assert torch.equal(alone[n], full[n])
    if bias_shape == "bhqk":
        zero = gradients((True,) * 4, torch.zeros_like(dlse))
        assert all(torch.equal(a, b) for a, b in zip(gradients((True,) * 4, None), zero))


def test_results_are_the_same_bits_every_time():
    case = vary(SMALL, Hk=1, bias="11qk", causal=True, dropout_p=0.2)
    inputs = make(case, FP16, device=DEVICE)
    results = []
    for _ in range(2 if DEVICE == "cpu" else 250):
        torch.manual_seed(3)
        results.append(run(inputs, **case.options()))
    for again in results[1:]:
        assert_equal(again, results[0], "repeat")


@interpreted
@pytest.mark.parametrize("bias", ("bhqk", "11qk", "1h1k"))
def test_programs_do_not_depend_on_their_order(bias, monkeypatch):
    """Two programs that write one address give other results when the grid runs backwards."""
    from triton.runtime.interpreter import interpreter_builder

    case = vary(SMALL, Hk=1, bias=bias, causal=True, Lq=40)
    inputs = make(case, FP32)
    expected = run(inputs, **case.options())
    forwards = interpreter_builder.set_grid_idx
    monkeypatch.setattr(
        interpreter_builder, "set_grid_idx", lambda x, y, z: forwards(interpreter_builder.grid_dim[0] - 1 - x, y, z)
    )
    assert_equal(run(inputs, **case.options()), expected, "reversed grid")


@interpreted
def test_threads_take_turns_in_the_interpreter():
    """Triton's interpreter patches its language globally."""
    case = vary(SMALL, Lq=20, Lk=20, causal=True)
    inputs = make(case, FP32)
    expected = run(inputs, causal=True)
    results: list = []
    threads = [threading.Thread(target=lambda: results.append(run(inputs, causal=True))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        assert_equal(result, expected, "thread")


def _far_apart(x: torch.Tensor, stride: int, dim: int, tmp_path) -> torch.Tensor:
    """The same values with `stride` elements between neighbours of `dim`, in a sparse file."""
    strides = list(x.contiguous().stride())
    strides[dim] = stride
    span = sum((n - 1) * s for n, s in zip(x.shape, strides)) + 1
    path = tmp_path / f"{span}-{dim}"
    flat = torch.from_file(str(path), shared=True, size=span, dtype=x.dtype)
    return flat.as_strided(x.shape, strides).copy_(x)


@interpreted
@pytest.mark.parametrize("dim", (0, 1, 2))
def test_strides_beyond_32_bits(dim, tmp_path, monkeypatch):
    """FA#2611, pytorch#190857: an int32 offset wraps; batch, head and sequence strides past 2^31 elements."""
    # After a launch the interpreter copies every storage back, here onto itself: 4 GB that need not exist.
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *args: None)
    case = vary(BOTH, Lq=3, Lk=5)
    inputs = make(case, FP16)
    expected = run(inputs, **case.options())
    far = {name: _far_apart(getattr(inputs, name), 2**31 + 16, dim, tmp_path) for name in ("k", "dout")}
    assert_equal(run(inputs._replace(**far), **case.options()), expected, f"dimension {dim}")


def test_random_masks_over_many_tiles():
    """Blocks of hidden keys, whole tiles among them, with a row mask and a band at once."""
    case = vary(SMALL, Lq=100, Lk=120, Hk=1, mask="qk", causal="bottom_right", window=(60, None))
    inputs = make(case, FP32, device=DEVICE)
    blocks = random_mask((7, 8), 1, 0.5, DEVICE).repeat_interleave(16, 0).repeat_interleave(16, 1)[:100, :120]
    check_inputs(inputs._replace(mask=blocks), case, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_heads_than_a_grid_has_rows(dtype):
    """B * H over 65535 (xformers#845): the grid has one dimension only."""
    case = Case(B=8192, Hq=9, Hk=9, Lq=1, Lk=2, D=16)
    inputs = make(case, dtype, device=DEVICE)
    check_inputs(inputs, case, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("D", (64, 96, 128, 256))
def test_long_sequences(D):
    """Real tile sizes: full tiles, pipelined loads, several sections of heads."""
    for case in (
        Case(B=2, Hq=8, Hk=2, Lq=1000, Lk=1500, D=D, causal=True),
        Case(Lq=777, Lk=513, D=D, window=(200, 100)),
    ):
        for dtype in DTYPES:
            check(case, dtype)


@pytest.mark.gpu
def test_on_a_second_stream():
    case = Case(Hk=2, Lq=300, Lk=300, D=64, causal=True)
    inputs = make(case, BF16, device=DEVICE)
    expected = run(inputs, causal=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        result = run(inputs, causal=True)
    stream.synchronize()
    assert_equal(result, expected, "second stream")
