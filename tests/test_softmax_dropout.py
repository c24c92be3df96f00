"""Dropout: the bits are Philox4x32-10 as defined, the same on every backend, and the gradient is that of those bits."""

import pytest
import torch
from harness import BACKENDS, BF16, DEVICE, FP32, all_backends, all_dtypes, assert_equal, attend, check_inputs, need

import fastattn
from fastattn.testing import Case, dropout_mask, make, max_error, next_rng

MASK32 = 0xFFFFFFFF


def philox_scalar(counter, key):
    """Philox4x32-10 in Python integers, straight from Salmon et al., SC 2011."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(product1 >> 32) ^ c[1] ^ k[0], product1 & MASK32, (product0 >> 32) ^ c[3] ^ k[1], product0 & MASK32]
        k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
    return c


KNOWN_ANSWERS = [  # Random123, kat_vectors, philox4x32 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK32,) * 4, (MASK32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    from fastattn.philox import philox4x32

    words = philox4x32(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in words) == expected == tuple(philox_scalar(counter, key))


@pytest.mark.parametrize(
    "seed, offset", [(0, 0), (1, 2), (0x0123456789ABCDEF, 7), (2**63 + 5, 2**32 - 1), (-1, 2**40 + 3)]
)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_mask_follows_the_definition(seed, offset, p):
    """counter (j // 4, i, b * Hq + h, offset), key = seed, lane j % 4, keep iff u32 >= p * 2^32."""
    B, Hq, Lq, Lk = 2, 3, 4, 11
    mask = dropout_mask((seed, offset), p, B, Hq, Lq, Lk)
    assert mask.shape == (B, Hq, Lq, Lk) and mask.dtype == torch.bool
    key = (seed & MASK32, seed >> 32 & MASK32)
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape)).tolist():
        word = philox_scalar((j // 4, i, b * Hq + h, offset & MASK32), key)[j % 4]
        assert bool(mask[b, h, i, j]) == (word >= p * 2**32), (b, h, i, j)


def observed_mask(backend, B, Hq, Lq, Lk, p, dtype=FP32, Hk=None):
    """Uniform weights and v = identity turn out into the mask itself."""
    q = torch.zeros(B, Hq, Lq, 8, dtype=dtype, device=DEVICE)
    k = torch.zeros(B, Hk or Hq, Lk, 8, dtype=dtype, device=DEVICE)
    v = torch.eye(Lk, dtype=dtype, device=DEVICE).expand(B, Hk or Hq, Lk, Lk)
    need(backend, make(Case(), dtype, device=DEVICE)._replace(q=q, k=k, v=v, mask=None, bias=None), dropout_p=p)
    out = fastattn.attention(q, k, v, dropout_p=p, backend=backend)
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / (Lk * (1 - p))), rtol=1e-2, atol=0)
    return out != 0


@all_backends
@all_dtypes
@pytest.mark.parametrize(
    "B, Hq, Hk, Lq, Lk", [(1, 1, 1, 1, 1), (2, 4, 2, 70, 131), (3, 2, 1, 5, 64), (1, 8, 2, 1, 400)]
)
def test_bits_are_the_exported_mask(B, Hq, Hk, Lq, Lk, dtype, backend):
    """Every backend, tiling and dtype drops exactly the weights that dropout_mask names."""
    for p, seed in ((0.1, 3), (0.5, 4), (0.9, 5)):
        torch.manual_seed(seed)
        rng = next_rng(DEVICE)
        observed = observed_mask(backend, B, Hq, Lq, Lk, p, dtype, Hk)
        assert torch.equal(observed, dropout_mask(rng, p, B, Hq, Lq, Lk))


DROPPED = [
    Case(dropout_p=0.1),
    Case(dropout_p=0.5, Hk=2, causal=True, bias="1hqk", D=40, Dv=24),
    Case(dropout_p=0.3, Hk=1, mask="b11k", window=(20, 5), Lq=100, Lk=70),
    Case(dropout_p=0.25, B=1, Hq=8, Hk=2, Lq=2, Lk=600, D=32),
    Case(dropout_p=0.2, Lq=129, Lk=65, bias="bhqk", layout="blhd"),
]


@all_backends
@all_dtypes
@pytest.mark.parametrize("case", DROPPED, ids=str)
def test_forward_and_gradients_given_the_mask(case, dtype, backend):
    torch.manual_seed(11)
    keep = dropout_mask(next_rng(DEVICE), case.dropout_p, case.B, case.Hq, case.Lq, case.Lk)
    check_inputs(make(case, dtype, device=DEVICE), case, backend, keep)


@all_backends
def test_against_torch_math_with_the_same_mask(backend):
    """An oracle outside this project: aten's math op takes a keep mask."""
    case = Case(dropout_p=0.4, Lq=40, Lk=60, causal="top_left")
    inputs = make(case, FP32, device=DEVICE)
    torch.manual_seed(5)
    keep = dropout_mask(next_rng(DEVICE), 0.4, 2, 4, 40, 60)
    result = attend(inputs, backend, **case.options())
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    expected = torch.ops.aten._scaled_dot_product_attention_math(q, k, v, None, 0.4, True, keep)[0]
    assert max_error(result.out, expected) < 2e-6
    dv = torch.autograd.grad(expected, v, inputs.dout)[0]
    assert max_error(result.dv, dv) < 5e-6


@all_backends
def test_lse_ignores_dropout(backend):
    inputs = make(Case(Hk=2, causal=True), FP32, device=DEVICE)
    plain = attend(inputs, backend, causal=True)
    dropped = attend(inputs, backend, causal=True, dropout_p=0.5)
    assert max_error(dropped.lse, plain.lse) < 1e-6
    assert max_error(dropped.out, plain.out) > 1e-2


@all_backends
def test_keep_rate_within_five_sigma(backend):
    """Overall, per row, per column and per lane; neighbours uncorrelated."""
    B, H, Lq, Lk, p = 2, 4, 256, 256, 0.3
    torch.manual_seed(0)
    keep = observed_mask(backend, B, H, Lq, Lk, p).double()
    sigma = (p * (1 - p)) ** 0.5

    def within(sample, count):
        assert ((sample - (1 - p)).abs() <= 5 * sigma / count**0.5).all()

    within(keep.mean(), keep.numel())
    within(keep.mean((0, 1, 2)), B * H * Lq)
    within(keep.mean((0, 1, 3)), B * H * Lk)
    within(keep.mean((2, 3)), Lq * Lk)
    within(keep.unflatten(3, (-1, 4)).mean((0, 1, 2, 3)), keep.numel() // 4)
    centred = keep - (1 - p)
    for a, b in (
        (centred[..., 1:], centred[..., :-1]),
        (centred[:, :, 1:], centred[:, :, :-1]),
        (centred[:, 1:], centred[:, :-1]),
    ):
        assert abs(float((a * b).mean())) <= 5 * sigma**2 / a.numel() ** 0.5


@all_backends
def test_seeds(backend):
    """FA#2088: torch.manual_seed repeats a call, two calls in a row differ, and the generator advances."""
    inputs = make(Case(Hk=2), FP32, device=DEVICE)
    torch.manual_seed(1)
    first, second = (attend(inputs, backend, dropout_p=0.3) for _ in range(2))
    assert not torch.equal(first.out, second.out)
    torch.manual_seed(1)
    assert_equal(attend(inputs, backend, dropout_p=0.3), first, "same seed")
    torch.manual_seed(2)
    assert not torch.equal(attend(inputs, backend, dropout_p=0.3).out, first.out)


@all_backends
def test_no_dropout_leaves_the_generator_alone(backend):
    inputs = make(Case(), FP32, device=DEVICE)
    before = torch.get_rng_state()
    attend(inputs, backend)
    assert torch.equal(torch.get_rng_state(), before)


@all_backends
def test_all_dropped(backend):
    """p = 1: out 0, no NaN from 1 / (1 - p), gradients 0 but for lse's own."""
    inputs = make(Case(Hk=2, dropout_p=1.0), FP32, device=DEVICE)
    inputs = inputs._replace(dlse=torch.zeros_like(inputs.dlse))
    result = attend(inputs, backend, dropout_p=1.0)
    assert not any(x.any() for x in (result.out, result.dq, result.dk, result.dv))
    assert result.lse.isfinite().all()


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
def test_backends_agree_on_one_seed(dtype):
    case = Case(Hk=2, causal=True, dropout_p=0.35, Lq=100, Lk=140)
    inputs = make(case, dtype, device=DEVICE)
    results = {}
    for backend in BACKENDS:
        torch.manual_seed(8)
        try:
            results[backend] = attend(inputs, backend, **case.options())
        except pytest.skip.Exception:
            continue
    assert len(results) >= 2
    base = results.pop("reference")
    for backend, result in results.items():
        assert max_error(result.out, base.out) < {FP32: 2e-6, BF16: 6e-2}[dtype], backend
        assert max_error(result.dk, base.dk) < {FP32: 1e-5, BF16: 1.5e-1}[dtype], backend
