"""fastattn.scaled_dot_product_attention: every row of the drop-in table."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import BF16, FP16, FP32, FP64
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn import scaled_dot_product_attention as sdpa
from fastattn.testing import max_error, randn

torch_sdpa = F.scaled_dot_product_attention


def qkv(*lead, Lq=9, Lk=13, D=8, Dv=None, dtype=FP32, Hk=None):
    kv = lead if Hk is None else (*lead[:-1], Hk)
    return (randn((*lead, Lq, D), dtype, 1), randn((*kv, Lk, D), dtype, 2), randn((*kv, Lk, Dv or D), dtype, 3))


def torch_math(*args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return torch_sdpa(*args, **kwargs)


def agree(*args, tolerance=2e-6, **kwargs):
    """Same value, shape, dtype and gradients as torch's math backend."""
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    results = []
    for function in (sdpa, torch_math):
        leaves = iter([x.clone().requires_grad_(x.is_floating_point()) for x in tensors])
        used = [next(leaves) if isinstance(x, torch.Tensor) else x for x in args]
        out = function(*used, **kwargs)
        wanted = [x for x in used if isinstance(x, torch.Tensor) and x.requires_grad]
        weights = torch.linspace(-1, 1, out.numel(), dtype=FP64).to(out.dtype).view(out.shape)
        grads = torch.autograd.grad(out, wanted, weights, allow_unused=True, materialize_grads=True)
        results.append((out.detach(), *grads))
    for found, expected in zip(*results):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert max_error(found, expected) <= tolerance * max(
            1.0, float(expected.abs().max()) if expected.numel() else 1.0
        )
    return results[0][0]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)], ids=["rank2", "rank3", "rank4", "rank5"])
def test_ranks(lead):
    agree(*qkv(*lead))
    agree(*qkv(*lead), None, 0.0, True)


@pytest.mark.parametrize("shapes", [
    ((2, 3), (1, 3), (2, 3)), ((1, 3), (5, 3), (5, 3)), ((4, 2, 3), (4, 1, 3), (1, 2, 3)), ((2, 3), (3,), (3,)), ((3,), (2, 3), (2, 3)),
    ((2, 1), (2, 4), (2, 4)), ((2, 4), (2, 4), (2, 1)), ((1, 1), (2, 3), (1, 3)), ((), (4,), (4,)), ((), (1,), (1,)),
    ((), (4,), ()), ((), (), (1,)), ((), (2, 1), (2, 1)), ((), (2, 4), (2, 4)), ((), (3, 2, 4), (3, 2, 4)), ((4,), (), ()),
], ids=str)  # fmt: skip
def test_batch_dimensions_broadcast(shapes):
    q, k, v = (randn((*lead, L, 8), FP32, L) for lead, L in zip(shapes, (9, 13, 13)))
    agree(q, k, v)


def test_one_key_head_broadcasts_without_enable_gqa():
    agree(*qkv(2, 6, Hk=1))
    agree(*qkv(2, 2, 6, Hk=1), None, 0.0, True)


@pytest.mark.parametrize(
    "shape", [(2, 3, 9, 13), (1, 3, 9, 13), (2, 1, 1, 13), (3, 9, 1), (9, 13), (1, 13), (9, 1), (13,), (1,)]
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(shape, kind):
    """bool True = take part; float adds and has a gradient in its own shape. Rank 1 works too."""
    mask = (
        torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.7 if kind == "bool" else randn(shape, FP32, 5)
    )
    agree(*qkv(2, 3), mask)


def test_masks_of_rank_5_and_3():
    for mask_shape in ((2, 2, 3, 9, 13), (2, 1, 1, 1, 13), (1, 2, 1, 9, 1)):
        agree(*qkv(2, 2, 3), randn(mask_shape, FP32, 6))
        agree(*qkv(2, 2, 3), randn(mask_shape, FP32, 7) > -1)
    agree(*qkv(3), randn((3, 9, 13), FP32, 6))
    agree(*qkv(), randn((9, 13), FP32, 6) > -1)


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=("bfloat16", "float16"))
def test_mask_dtypes(dtype):
    """bool, the query's dtype, or fp32; anything else a RuntimeError that names the mask."""
    q, k, v = qkv(2, 3, dtype=dtype)
    for mask in (randn((9, 13), dtype, 4), randn((9, 13), FP32, 4), randn((9, 13), FP32, 4) > 0):
        out = sdpa(q, k, v, mask)
        exact = torch_math(q.double(), k.double(), v.double(), mask if mask.dtype == torch.bool else mask.double())
        assert out.dtype == dtype and max_error(out, exact) < 2e-2
    for bad in (torch.float64, torch.int64, torch.int32, torch.uint8, torch.complex64):
        with pytest.raises(RuntimeError, match="attn_mask"):
            sdpa(q, k, v, torch.zeros(9, 13, dtype=bad))
    with pytest.raises(RuntimeError, match="attn_mask"):
        sdpa(*qkv(2, 3), torch.zeros(9, 13, dtype=dtype))


def test_mask_of_fp32_for_fp64():
    q, k, v = qkv(2, 3, dtype=FP64)
    mask = randn((3, 9, 13), FP32, 4)
    agree(q, k, v, mask, tolerance=1e-6)
    assert max_error(sdpa(q, k, v, mask), torch_math(q, k, v, mask.double())) < 1e-13


def test_mask_and_is_causal_is_refused():
    with pytest.raises(RuntimeError, match="mask="):
        sdpa(*qkv(2, 3), torch.ones(9, 13, dtype=torch.bool), 0.0, True)


@pytest.mark.parametrize("Lq, Lk", [(9, 13), (13, 9), (1, 7), (7, 1), (70, 150), (150, 70)])
def test_causal_is_top_left(Lq, Lk):
    q, k, v = qkv(2, 3, Lq=Lq, Lk=Lk)
    out = agree(q, k, v, None, 0.0, True)
    visible = torch.ones(Lq, Lk, dtype=torch.bool).tril()
    assert max_error(out, torch_math(q, k, v, visible)) < 2e-6


@pytest.mark.parametrize("Hq, Hk", [(6, 2), (6, 6), (6, 1), (8, 4)])
def test_enable_gqa(Hq, Hk):
    agree(*qkv(2, Hq, Hk=Hk), enable_gqa=True)
    agree(*qkv(Hq, Hk=Hk), enable_gqa=True)


def _refused():
    q, k, v = qkv(2, 6)
    yield "heads", (q, k[:, :4], v[:, :4]), {"enable_gqa": True}
    yield "heads without gqa", (q, k[:, :2], v[:, :2]), {}
    yield "Lk and Lv", (q, k, v[:, :, :8]), {}
    yield "Hk and Hv", (q, k[:, :3], v[:, :2]), {"enable_gqa": True}
    yield "Hk and Hv = 1", (q, k[:, :3], v[:, :1]), {"enable_gqa": True}
    yield "D", (q, k[..., :7], v), {}
    yield "batch", (q, torch.cat([k, k[:1]]), v), {}
    yield "dtype of k", (q, k.half(), v), {}
    yield "dtype of v", (q, k, v.double()), {}
    yield "integers", (q.long(), k.long(), v.long()), {}
    yield "device", (q, k.to("meta"), v), {}
    yield "1-D", (q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]), {}
    yield "1-D key", (q, k[0, 0, 0], v), {}
    yield "6-D", tuple(x[None, None] for x in (q, k, v)), {}
    yield "mask shape", (q, k, v, torch.ones(9, 12, dtype=torch.bool)), {}
    yield "mask rank", (q, k, v, torch.ones(1, 1, 1, 1, 9, 13, dtype=torch.bool)), {}
    yield "mask would expand", (q[:1], k[:1], v[:1], torch.ones(2, 1, 9, 13, dtype=torch.bool)), {}
    yield "p > 1", (q, k, v, None, 1.5), {}
    yield "p < 0", (q, k, v, None, -0.1), {}
    yield "p NaN", (q, k, v, None, float("nan")), {}
    yield "scale NaN", (q, k, v), {"scale": float("nan")}
    yield "scale inf", (q, k, v), {"scale": float("inf")}


@pytest.mark.parametrize("arguments, options", [case[1:] for case in _refused()], ids=[case[0] for case in _refused()])
def test_refused_with_the_shapes_in_the_message(arguments, options):
    with pytest.raises((RuntimeError, ValueError)) as caught:
        sdpa(*arguments, **options)
    message = str(caught.value)
    shown = any(str(list(x.shape)) in message or str(x.dtype) in message or str(x.device) in message
                for x in arguments if isinstance(x, torch.Tensor))  # fmt: skip
    assert shown or "dropout_p" in message or "scale" in message, message


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_fully_masked_rows(kind):
    q, k, v = (x.requires_grad_() for x in qkv(2, 3))
    visible = torch.rand(9, 13, generator=torch.Generator().manual_seed(0)) < 0.5
    visible[3] = False
    out = sdpa(q, k, v, visible if kind == "bool" else torch.zeros(9, 13).masked_fill(~visible, -torch.inf))
    assert not out[:, :, 3].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v)) and not q.grad[:, :, 3].any()


@pytest.mark.parametrize(
    "dims",
    [(0, 3, 9, 13, 8, 8), (2, 0, 9, 13, 8, 8), (2, 3, 0, 13, 8, 8), (2, 3, 9, 0, 8, 8), (2, 3, 9, 13, 8, 0)],
    ids=str,
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_empty(dims, is_causal):
    B, H, Lq, Lk, D, Dv = dims
    tensors = [torch.ones(s).requires_grad_() for s in ((B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, Dv))]
    out = sdpa(*tensors, is_causal=is_causal)
    assert out.shape == (B, H, Lq, Dv) and not out.any()
    for x, grad in zip(tensors, torch.autograd.grad(out.sum(), tensors, materialize_grads=True, allow_unused=True)):
        assert grad.shape == x.shape and not grad.any()


def test_empty_head_dimension():
    """No logits to speak of: torch gives zeros of the right shape when D and Dv are 0."""
    out = sdpa(torch.ones(2, 3, 9, 0), torch.ones(2, 3, 13, 0), torch.ones(2, 3, 13, 0))
    assert out.shape == (2, 3, 9, 0)


def test_float_mask_gradient_is_not_expanded():
    q, k, v = qkv(2, 3, Lq=64, Lk=128)
    mask = randn((1, 1, 1, 128), FP32, 9).requires_grad_()
    seen = []
    handle = mask.register_hook(lambda grad: seen.append(tuple(grad.shape)))
    sdpa(q, k, v, mask).square().sum().backward()
    handle.remove()
    assert seen == [(1, 1, 1, 128)] and mask.grad.abs().sum() > 0


def test_dropout_is_always_applied():
    """A function, not a module: grad mode and eval mode do not switch it off."""
    q, k, v = qkv(2, 3)
    with torch.no_grad():
        first, second = sdpa(q, k, v, dropout_p=0.5), sdpa(q, k, v, dropout_p=0.5)
    assert not torch.equal(first, second)
    assert not sdpa(q, k, v, dropout_p=1.0).any()


def test_dropout_keeps_the_mean():
    q, k, v = qkv(1, 1, Lq=1, Lk=200)
    torch.manual_seed(0)
    batch = [x.expand(4000, 1, -1, -1) for x in (q, k, v)]
    mean = sdpa(*batch, dropout_p=0.3).double().mean(0, keepdim=True)
    spread = sdpa(*batch, dropout_p=0.3).double().std(0, keepdim=True) / 4000**0.5
    assert ((mean - sdpa(q, k, v)).abs() < 5 * spread).all()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)], ids=str)
def test_out_follows_the_layout_of_query(order):
    q, k, v = qkv(2, 3)
    inverse = [order.index(i) for i in range(4)]
    q = q.permute(order).contiguous().permute(inverse)
    assert sdpa(q, k, v).stride() == q.stride()


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=("bfloat16", "float16"))
def test_autocast(dtype):
    """As torch: query, key, value and a float mask go to the autocast dtype, whatever they were."""
    q, k, v = qkv(2, 3)
    mask = randn((9, 13), FP32, 4)
    with torch.autocast("cpu", dtype=dtype):
        ours, theirs = sdpa(q, k.to(BF16), v.double().float(), mask), torch_sdpa(q, k.to(BF16), v, mask)
    assert ours.dtype == theirs.dtype == dtype
    assert max_error(ours, theirs) < {BF16: 2e-2, FP16: 2e-3}[dtype]
    with torch.autocast("cpu", dtype=dtype):
        for half in (BF16, FP16):
            found = sdpa(q, k, v, mask.to(half))
            assert found.dtype == dtype and max_error(found, theirs) < 2e-2
        with pytest.raises(RuntimeError, match="attn_mask.*float64"):
            sdpa(q, k, v, mask.double())
        with pytest.raises(RuntimeError, match="dtype.*float64"):
            sdpa(q, k.double(), v)
        assert sdpa(q.double(), k.double(), v.double(), mask.double()).dtype == FP64


def test_scale():
    for scale in (0.0, -1.5, 0.3, 1e-320, 2):
        agree(*qkv(2, 3), scale=scale)


def test_numbers_as_torch_takes_them():
    q, k, v = qkv(2, 3)
    for scale in (np.float32(0.5), np.int64(2), torch.tensor(0.5), torch.tensor(2), True, False):
        agree(q, k, v, scale=scale)
    for p in (False, np.float32(0), torch.tensor(0.0)):
        assert torch.equal(sdpa(q, k, v, dropout_p=p), sdpa(q, k, v))
    assert not sdpa(q, k, v, dropout_p=True).any()


def test_fp64():
    agree(*qkv(2, 3, dtype=FP64), None, 0.0, True, tolerance=1e-13)


def test_vmap():
    q, k, v = qkv(5, 2, 3)
    assert max_error(torch.func.vmap(sdpa)(q, k, v), sdpa(q, k, v)) < 1e-6


def test_double_backward():
    q, k, v = (x.double().requires_grad_() for x in qkv(1, 2, Lq=3, Lk=4, D=3))
    assert torch.autograd.gradgradcheck(lambda *x: sdpa(*x, is_causal=True), (q, k, v))


def test_jvp_is_a_clear_error():
    q, k, v = qkv(2, 3)
    with pytest.raises(NotImplementedError, match="(?i)forward"):
        torch.func.jvp(lambda x: sdpa(x, k, v), (q,), (q,))


def test_signature_is_torchs():
    """Every way torch's own accepts its arguments, by position and by name."""
    q, k, v = qkv(2, 3)
    mask = randn((9, 13), FP32, 4)
    by_name = sdpa(query=q, key=k, value=v, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=0.3, enable_gqa=False)
    assert torch.equal(by_name, sdpa(q, k, v, mask, 0.0, False, scale=0.3))
    with pytest.raises(TypeError):
        sdpa(q, k, v, mask, 0.0, False, 0.3)
