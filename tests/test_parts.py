"""Numbers that the kernels on matrix tiles take apart into bf16 parts, and blocks that share a second-level cache.

Other instruction sets do neither; the same must hold there."""

import os

import pytest
import torch
from harness import FP16, FP32, FP64, need

import fastattn
from fastattn.testing import max_error, rms_ratio

LARGEST = torch.finfo(FP32).max


def qkv(*shape, dtype=FP32):
    return [torch.randn(shape, dtype=FP64).to(dtype) for _ in range(3)]


@pytest.fixture(autouse=True)
def native():
    need("native", fastattn.testing.make(fastattn.testing.Case(), FP32))


def test_forced_isa_is_used():
    """Once more in each of the processes of test_isa.py."""
    assert fastattn._C.isa() == os.environ.get("FASTATTN_ISA", fastattn._C.best_isa())


@pytest.mark.parametrize("value", (LARGEST, -LARGEST, 3.3961776e38, 3.3895314e38))
def test_values_past_the_largest_bf16(value):
    """Rounded to bf16 they would be infinite."""
    q, _, _ = qkv(1, 1, 40, 16)
    v = torch.full((1, 1, 1, 16), value)
    assert torch.equal(fastattn.attention(q, q[:, :, :1], v, backend="native"), v.expand(1, 1, 40, 16))
    # As keys: equal logits, and so far apart from the other key's that it has no weight.
    k, q, v = torch.zeros(1, 1, 3, 16), torch.ones(1, 1, 40, 16), torch.randn(1, 1, 3, 16)
    k[..., 7] = torch.tensor([value, -value, value])
    seen = v[:, :, ::2] if value > 0 else v[:, :, 1:2]
    out = fastattn.attention(q, k, v, scale=1 / 64, backend="native")
    assert max_error(out, seen.mean(2, keepdim=True).expand_as(out)) < 1e-6


@pytest.mark.parametrize("value", (float("inf"), -float("inf"), float("nan")))
@pytest.mark.parametrize("dtype", (FP32, FP16), ids=str)
def test_values_that_are_not_finite(value, dtype):
    """They reach their own column, and no other."""
    q, k, v = qkv(1, 1, 50, 16, dtype=dtype)
    clean = v.clone()
    v[0, 0, 30, 5] = value
    out, same = (fastattn.attention(q, k, x, backend="native") for x in (v, clean))
    assert torch.equal(out[..., 5], torch.full_like(out[..., 5], value)) or (
        value != value and out[..., 5].isnan().all()
    )
    others = torch.arange(16) != 5
    assert max_error(out[..., others], same[..., others].double()) < (1e-6 if dtype == FP32 else 2e-3)


@pytest.mark.parametrize("rows", (4, 40), ids=lambda n: f"{n}rows")
@pytest.mark.parametrize(
    "query, key, dtype", ((1, -float("inf"), FP32), (1, -float("inf"), FP16), (1.5e3, -3e38, FP32)), ids=str
)
def test_scores_of_minus_infinity_have_no_weight(query, key, dtype, rows):
    """Products of parts would be infinities of both signs. Gradients of the others are as without that key."""
    q, k, v = qkv(1, 2, 40, 16, dtype=dtype)
    q = q[:, :, :rows].clone()
    q[..., 0], k[..., 0] = query, 0
    k[:, :, 7, 0] = key
    dout = torch.randn(1, 2, rows, 16).to(dtype)
    keep = torch.arange(40) != 7

    def run(k, v):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = fastattn.attention(*leaves, backend="native")
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    out, dq, dk, dv = run(k, v)
    expected = run(k[:, :, keep], v[:, :, keep])
    limit = 2e-6 if dtype == FP32 else 2e-3
    for a, b in zip(
        (out, dq[..., 1:], dk[:, :, keep], dv[:, :, keep]), (expected[0], expected[1][..., 1:], *expected[2:])
    ):
        assert rms_ratio(a, b.double()) < limit
    assert not dv[:, :, 7].any()


@pytest.mark.parametrize("power", (-115, -100, -60, 60, 100, 120))
def test_numbers_of_any_size(power):
    """Down to about 2^-105 values and gradients are as exact as near 1; below, parts end at the smallest normal number."""
    q, k, v = qkv(1, 2, 70, 32)
    v *= 2.0**power
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    leaves = [t.requires_grad_() for t in (q, k, v)]
    expected = fastattn.attention(*wide, backend="reference")
    out = fastattn.attention(*leaves, backend="native")
    limit = 6e-7 if power > -105 else 8 * 2.0**-126 / 2.0**power
    assert rms_ratio(out, expected) < limit
    dout = torch.randn(out.shape) * 2.0 ** -max(power, 0)
    found = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    for a, b in zip(found, torch.autograd.grad(expected, wide, dout.double(), retain_graph=True)):
        assert rms_ratio(a, b) < 3 * limit
    (dv,) = torch.autograd.grad(out, leaves[2:], dout * 2.0 ** min(power, 0))
    (golden,) = torch.autograd.grad(expected, wide[2:], dout.double() * 2.0 ** min(power, 0))
    assert rms_ratio(dv, golden) < 3 * limit


def test_every_bit_of_an_fp32_counts():
    """One key, weight 1: the value comes back bit for bit, whatever its 24 bits are."""
    q, k, v = qkv(1, 1, 33, 8)
    v = torch.randint(1 << 23, 1 << 24, (1, 1, 1, 64)).float() * 2.0 ** torch.randint(-30, 30, (64,)).float()
    assert torch.equal(fastattn.attention(q, k[:, :, :1], v, backend="native"), v.expand(1, 1, 33, 64))


@pytest.mark.parametrize("dtype", (FP32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("masked", (False, True))
def test_blocks_that_share_a_cache_change_no_bit(dtype, masked):
    """A head over a megabyte: with few threads for its rows, several blocks of queries go through the keys together."""
    q, k, v = qkv(1, 2, 1100, 128, dtype=dtype)
    k, v = torch.cat([k, v], 2), torch.cat([v, k], 2)
    mask = fastattn.masks.blocks(torch.rand(18, 35) < 0.3, 64) if masked else None
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            results.append(fastattn.attention(q, k, v, mask=mask, causal="top_left", backend="native"))
            results.append(
                fastattn.attention(q[:, :1], k[:, :1], v[:, :1], mask=mask, causal="top_left", backend="native")
            )
    finally:
        torch.set_num_threads(threads)
    for whole, half in zip(results[::2], results[1::2]):
        assert torch.equal(whole, results[0]) and torch.equal(half, results[0][:, :1])


@pytest.mark.parametrize("heads", (1, 2, 3, 5, 7))
@pytest.mark.parametrize("dtype", (FP32, FP16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("masked", (False, True))
def test_heads_of_one_thread_or_shared_change_no_bit(masked, dtype, heads):
    """A thread packs a head for itself, but not those left over, nor where a mask differs by head."""
    q, k, v = qkv(2, heads, 130, 40, dtype=dtype)
    mask = torch.rand(2, heads, 130, 130) < 0.3 if masked else None
    alone = [
        fastattn.attention(
            q[:, h : h + 1],
            k[:, h : h + 1],
            v[:, h : h + 1],
            mask=mask[:, h : h + 1] if masked else None,
            backend="native",
        )
        for h in range(heads)
    ]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            out = fastattn.attention(q, k, v, mask=mask, backend="native")
            assert torch.equal(out, torch.cat(alone, 1)), count
            one = fastattn.attention(q[:1], k[:1], v[:1], mask=mask[:1] if masked else None, backend="native")
            assert torch.equal(one, out[:1]), count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("D, Dv", ((1, 1), (15, 33), (31, 17), (33, 1), (100, 72), (512, 8)))
@pytest.mark.parametrize("dtype", (FP32, FP16, torch.bfloat16), ids=str)
def test_odd_widths_with_gradients(D, Dv, dtype):
    """Steps come in 16 pairs: what pads them is zero even where scratch memory held NaN."""
    q, k, v = qkv(1, 2, 37, D, dtype=dtype)
    v = torch.randn(1, 2, 37, Dv).to(dtype)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    dout = torch.randn(1, 2, 37, Dv)
    found = fastattn.attention(*leaves, causal=True, backend="native")
    expected = fastattn.attention(*wide, causal=True, backend="reference")
    limit = {FP32: 1e-6, FP16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert rms_ratio(found, expected) < limit
    for a, b in zip(
        torch.autograd.grad(found, leaves, dout.to(dtype)), torch.autograd.grad(expected, wide, dout.to(dtype).double())
    ):
        assert rms_ratio(a, b) < limit


@pytest.mark.parametrize("pad", (0, 1, 2, 33))
@pytest.mark.parametrize("rows, Lq", ((3, 1), (16, 1), (17, 1), (40, 1), (8, 5)))
def test_few_queries_read_keys_where_they_lie(rows, Lq, pad):
    """Rows of keys at any distance, from any address, between numbers that are not theirs."""
    q, _, _ = qkv(2, rows // Lq, Lq, 64, dtype=torch.bfloat16)
    room = torch.full((2, 1, 701, 64 + pad), float("nan"), dtype=torch.bfloat16)
    k = room.flatten()[1 : 1 + 2 * 700 * (64 + pad)].view(2, 1, 700, 64 + pad)[..., :64]
    k.copy_(torch.randn(k.shape))
    v = torch.randn(2, 1, 700, 48).bfloat16()
    found = fastattn.attention(q, k, v, causal="bottom_right", backend="native")
    assert torch.equal(found, fastattn.attention(q, k.contiguous(), v, causal="bottom_right", backend="native"))
    wide = [t.double() for t in (q, k, v)]
    assert rms_ratio(found, fastattn.attention(*wide, causal="bottom_right", backend="reference")) < 8e-3
