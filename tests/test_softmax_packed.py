"""Packed sequences: every option means in each sequence what it means in a call of its own."""

import subprocess
import sys
import textwrap

import pytest
import torch
from harness import BF16, FP32, FP64, all_backends

import fastattn
from fastattn import masks
from fastattn.backends import native
from fastattn.testing import dropout_mask, max_error, next_rng, randn

LENGTHS = {
    "self": ([70, 0, 1, 130, 9], None),
    "cross": ([70, 0, 20, 30, 9], [90, 5, 0, 140, 3]),
    "decode": ([1, 1, 1], [300, 0, 77]),
}


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(kind, dtype=FP32, Hq=4, Hk=2, D=8, Dv=6):
    """(q, k, v, cu_q, cu_k, dout, dlse)"""
    lengths_q, lengths_k = LENGTHS[kind]
    Lq, Lk = sum(lengths_q), sum(lengths_k or lengths_q)
    q, k, v = (randn((1, *shape), dtype, seed) for seed, shape in enumerate(((Hq, Lq, D), (Hk, Lk, D), (Hk, Lk, Dv))))
    dout, dlse = randn((1, Hq, Lq, Dv), dtype, 5), randn((1, Hq, Lq), FP64 if dtype == FP64 else FP32, 6)
    return q, k, v, offsets(lengths_q), None if lengths_k is None else offsets(lengths_k), dout, dlse


def one_by_one(q, k, v, cu_q, cu_k, bias=None, mask=None, **options):
    """The meaning: a call of the dense reference per sequence."""
    cu_k = cu_q if cu_k is None else cu_k
    outs, lses = [], []
    for i0, i1, j0, j1 in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist()):
        cut = [None if t is None else t[..., i0:i1, j0:j1] for t in (bias, mask)]
        out, lse = fastattn.attention(
            q[:, :, i0:i1], k[:, :, j0:j1], v[:, :, j0:j1], bias=cut[0], mask=cut[1], return_lse=True, backend="reference",
            **options,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def compare(kind, backend, dtype=FP32, tolerance=2e-5, bias=None, mask=None, **options):
    q, k, v, cu_q, cu_k, dout, dlse = packed(kind, dtype)

    def both(call, wide, **how):
        leaves = [t.detach().to(wide).requires_grad_() for t in (q, k, v)]
        named = {n: t.detach().to(wide).requires_grad_() for n, t in options.items() if isinstance(t, torch.Tensor)}
        wide_bias = None if bias is None else bias.detach().to(wide).requires_grad_()
        rest = {n: t for n, t in options.items() if n not in named}
        out, lse = call(*leaves, bias=wide_bias, mask=mask, **named, **rest, **how)
        wanted = [*leaves, *named.values(), *([] if bias is None else [wide_bias])]
        lse_or_zero = lse.masked_fill(lse == -torch.inf, 0)
        grads = torch.autograd.grad((out, lse_or_zero), wanted, (dout.to(out.dtype), dlse.to(lse.dtype)))
        return [out.detach(), lse.detach(), *grads]

    def ours(*leaves, **o):
        try:
            return fastattn.attention(
                *leaves, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, backend=backend, **o
            )
        except fastattn.UnsupportedError as refusal:
            pytest.skip(str(refusal).splitlines()[0])

    def oracle(q, k, v, **o):
        return one_by_one(q, k, v, cu_q, cu_k, **o)

    for i, (a, b) in enumerate(zip(both(ours, dtype), both(oracle, FP64))):
        a, b = (x.double().nan_to_num(neginf=-1e3) for x in (a, b))
        assert max_error(a, b) < tolerance * max(1.0, float(b.abs().max())), i


@all_backends
@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("options", ({}, {"causal": True}, {"causal": "top_left"}, {"window": (20, 3)},
                                     {"causal": True, "window": (None, 0)}, {"causal": "top_left", "window": (9, None)}, {"scale": -0.4},
                                     {"softcap": 2.0}, {"softcap": 2.0, "causal": True}), ids=str)  # fmt: skip
def test_options_count_from_the_ends_of_a_sequence(options, kind, backend):
    compare(kind, backend, **options)


@all_backends
@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("causal", (False, True))
def test_alibi_and_sinks_in_packed_sequences(causal, kind, backend):
    slopes, sinks = torch.tensor([0.5, 0.1, 0.02, -0.01]), torch.tensor([0.3, -1.0, 2.0, 0.0])
    compare(kind, backend, alibi_slopes=slopes, causal=causal)
    compare(kind, backend, sinks=sinks, causal=causal)
    compare(kind, backend, alibi_slopes=slopes, sinks=sinks, softcap=3.0, causal=causal)


@all_backends
@pytest.mark.parametrize("kind", LENGTHS)
def test_bias_and_masks_are_indexed_by_the_place_in_the_whole(kind, backend):
    q, k = packed(kind)[:2]
    Lq, Lk = q.shape[2], k.shape[2]
    visible = torch.rand(1, 4, Lq, Lk, generator=torch.Generator().manual_seed(1)) < 0.7
    compare(kind, backend, bias=randn((1, 1, Lq, Lk), FP32, 9), causal=True)
    compare(kind, backend, mask=visible)


@all_backends
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 1, 1, 210), (1, 4, 210, 1), (210, 1)])
def test_masks_that_broadcast(shape, backend):
    q, k, v, cu_q, _, _, _ = packed("self")
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    whole = mask.expand(1, 4, 210, 210)
    expected = one_by_one(q, k, v, cu_q, None, mask=whole, causal=True)[0]
    for each in (mask, whole, whole.contiguous()):
        found = fastattn.attention(q, k, v, mask=each, cu_seqlens_q=cu_q, causal=True, backend=backend)
        assert max_error(found, expected) < 2e-6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of /proc/self/status")
@pytest.mark.skipif(native._C is None, reason=f"native: {native.status()}")
def test_a_mask_of_keys_stays_one():
    """Nothing of size Lq x Lk exists: that would be 256 MiB."""
    code = """
        import torch, fastattn

        def call(L):
            q = torch.zeros(1, 1, L, 8)
            offsets = torch.arange(0, L + 1, 512, dtype=torch.int32)
            fastattn.attention(q, q, q, mask=torch.arange(L) % 7 > 0, cu_seqlens_q=offsets)

        def peak():
            return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

        torch.set_num_threads(1)
        call(512)
        open("/proc/self/clear_refs", "w").write("5")
        before = peak()
        call(2**14)
        print((peak() - before) / 1024)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 64


@all_backends
def test_mask_objects_and_sequences_combine(backend):
    q, k, v, cu_q, _, dout, _ = packed("self")
    mask = masks.window(9, 9) | masks.global_tokens([0, 100])
    dense = mask.to_dense(q.shape[2], k.shape[2])
    expected = one_by_one(q, k, v, cu_q, None, mask=dense, causal=True)[0]
    found = fastattn.attention(q, k, v, mask=mask, cu_seqlens_q=cu_q, causal=True, backend=backend)
    assert max_error(found, expected) < 2e-6


@all_backends
def test_dropout_bits_are_those_of_the_whole(backend):
    q, k, v, cu_q, _, _, _ = packed("self")
    rng = next_rng()
    found = fastattn.attention(q, k, v, cu_seqlens_q=cu_q, dropout_p=0.4, backend=backend)
    keep = dropout_mask(rng, 0.4, 1, 4, q.shape[2], k.shape[2])
    ids = torch.repeat_interleave(torch.arange(len(cu_q) - 1), cu_q.diff())
    scores = (q.double() @ k.double().repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(ids[:, None] != ids, -torch.inf)
    expected = (scores.softmax(-1) * keep / 0.6) @ v.double().repeat_interleave(2, 1)
    assert max_error(found, expected) < 2e-6


@all_backends
def test_packed_in_bf16(backend):
    compare("self", backend, dtype=BF16, tolerance=4e-2, causal=True)


@all_backends
def test_nothing_packed(backend):
    """No sequence at all, and sequences of length 0 only."""
    q = torch.zeros(1, 2, 0, 8)
    for cu in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        assert fastattn.attention(q, q, q, cu_seqlens_q=cu.int(), backend=backend).shape == (1, 2, 0, 8)


Q = torch.zeros(1, 2, 10, 8)


@pytest.mark.parametrize(
    "match, options",
    (
        (r"cu_seqlens_q.*10", {"cu_seqlens_q": torch.tensor([0, 9]).int()}),
        (r"cu_seqlens_q.*falling", {"cu_seqlens_q": torch.tensor([0, 7, 5, 10]).int()}),
        (r"cu_seqlens_q.*from 0", {"cu_seqlens_q": torch.tensor([1, 10]).int()}),
        (r"cu_seqlens_q.*int32.*float32", {"cu_seqlens_q": torch.tensor([0.0, 10.0])}),
        (r"cu_seqlens_q.*list", {"cu_seqlens_q": [0, 10]}),
        (r"cu_seqlens_q.*\[1, 2\]", {"cu_seqlens_q": torch.tensor([[0, 10]]).int()}),
        (r"cu_seqlens_q.*\[0\]", {"cu_seqlens_q": torch.zeros(0).int()}),
        (r"cu_seqlens_k.*without cu_seqlens_q", {"cu_seqlens_k": torch.tensor([0, 10]).int()}),
        (
            r"as many sequences",
            {"cu_seqlens_q": torch.tensor([0, 10]).int(), "cu_seqlens_k": torch.tensor([0, 4, 10]).int()},
        ),
        (r"plan.*cu_seqlens", {"cu_seqlens_q": torch.tensor([0, 10]).int(), "mask": masks.causal().plan(10, 10)}),
    ),
)
def test_wrong_offsets_are_refused(match, options):
    with pytest.raises((TypeError, ValueError), match=match):
        fastattn.attention(Q, Q, Q, **options)


def test_packed_needs_one_batch():
    with pytest.raises(ValueError, match=r"B must be 1.*\[2, 2, 10, 8\]"):
        fastattn.attention(*(Q.expand(2, -1, -1, -1),) * 3, cu_seqlens_q=torch.tensor([0, 10]).int())
