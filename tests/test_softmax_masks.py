"""Masks and masking biases: every broadcast shape, structure and stride; rows that see nothing; hidden NaN."""

import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32, all_backends, all_dtypes, attend, check, check_inputs, need

import fastattn
from fastattn.testing import Case, Inputs, make, max_error, random_mask

MASK_SHAPES = ["bhqk", "1hqk", "b1qk", "11qk", "bh1k", "b11k", "1h1k", "111k", "bhq1", "b1q1", "11q1", "b111", "1h11", "1111",
               "hqk", "1qk", "qk", "1k", "q1", "11", "k", "1"]  # fmt: skip


@all_backends
@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_every_broadcast_shape(shape, backend):
    """Lq and Lk off every tile size; random visibility of one broadcast row may hide everything: that is legal."""
    for seed in (0, 1):
        for case in (Case(B=3, Hk=2, Lq=70, Lk=133, mask=shape), Case(B=3, Hk=2, Lq=5, Lk=7, mask=shape, causal=True)):
            check(case, FP32, backend, seed)
    check(Case(B=3, Hk=2, Lq=70, Lk=133, mask=shape), BF16, backend)


def _blocks(rows, columns, tile, seed):
    return random_mask((-(-rows // tile), -(-columns // tile)), seed, 0.5).repeat_interleave(tile, 0).repeat_interleave(
        tile, 1)[:rows, :columns]  # fmt: skip


def _structures(Lq, Lk):
    i, j = torch.arange(Lq)[:, None], torch.arange(Lk)
    return {
        "full": torch.ones(Lq, Lk, dtype=torch.bool),
        "causal": j <= i,
        "anti_causal": j >= i,
        "first_tile_hidden": (j >= 64).expand(Lq, Lk),
        "last_key_only": (j == Lk - 1).expand(Lq, Lk),
        "one_key_per_row": j == (37 * i) % Lk,
        "blocks_64": _blocks(Lq, Lk, 64, 1),
        "blocks_16": _blocks(Lq, Lk, 16, 2),
        "checker": (i + j) % 2 == 0,
        "dense_99": random_mask((Lq, Lk), 3, 0.99),
        "sparse_01": random_mask((Lq, Lk), 4, 0.01),
        "documents": (i // 50) == (j // 50),
    }


@all_backends
@pytest.mark.parametrize("name", _structures(1, 1))
def test_structures(name, backend):
    """Empty, full and partial tiles in every arrangement, rows that see nothing among them."""
    for Lq, Lk, dtype in ((150, 200, FP32), (150, 200, BF16), (64, 128, FP32), (3, 200, FP32)):
        case = Case(B=1, Hq=2, Hk=1, Lq=Lq, Lk=Lk, D=32, mask="qk")
        inputs = make(case, dtype, device=DEVICE)._replace(mask=_structures(Lq, Lk)[name].to(DEVICE))
        check_inputs(inputs, case, backend)


@all_backends
@pytest.mark.parametrize("layout", ["dense", "every second key", "one for all heads", "beside a mask"])
@pytest.mark.parametrize("name", ["causal", "last_key_only", "blocks_64", "documents", "sparse_01"])
def test_structures_as_biases(name, layout, backend):
    """A bias whose -inf hide whole tiles; NaN where no query looks. Each head hides another part."""
    Lq, Lk = 150, 200
    for dtype in (FP32, BF16, FP16):
        case = Case(B=2, Hq=2, Hk=1, Lq=Lq, Lk=Lk, D=16, bias="1hqk")
        inputs = make(case, dtype)
        hidden = torch.stack((~_structures(Lq, Lk)[name], _structures(Lq, Lk)["causal"]))[None]
        hidden[..., 100:110] = True
        if layout == "one for all heads":
            inputs, hidden = inputs._replace(bias=inputs.bias[:, :1]), hidden[:, :1]
        bias = inputs.bias.masked_fill(hidden, -torch.inf)
        if layout == "every second key":
            bias = torch.stack((bias, torch.full_like(bias, torch.nan)), -1).flatten(-2)[..., ::2]
        if layout == "beside a mask":
            inputs = inputs._replace(mask=random_mask((2, 1, Lq, Lk), 5, 0.5))
        inputs = inputs._replace(bias=bias)
        clean = check_inputs(Inputs(*(t if t is None else t.to(DEVICE) for t in inputs)), case, backend)
        if backend == "reference":  # dense products: NaN times 0
            continue
        for t in (inputs.k, inputs.v):
            t[:, :, 100:110] = torch.nan
        found = attend(Inputs(*(t if t is None else t.to(DEVICE) for t in inputs)), backend)
        assert torch.equal(found.out, clean.out) and not found.dk[:, :, 100:110].any()


@all_backends
def test_mask_equal_to_causal_gives_the_same_result(backend):
    """Sparse pattern equal to causal: same gradients, not only the same forward (FA#2623)."""
    case = Case(Hk=2, Lq=140, Lk=140)
    inputs = make(case, FP32, device=DEVICE)
    need(backend, inputs)
    plain = attend(inputs, backend, causal=True)
    triangle = torch.ones(140, 140, dtype=torch.bool, device=DEVICE).tril()
    masked = attend(inputs._replace(mask=triangle), backend)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert max_error(getattr(masked, name), getattr(plain, name)) < 2e-6, name


MASK_VIEWS = {
    "expanded": lambda m: m[:, :, :1, :].expand(m.shape),
    "expanded_heads": lambda m: m[:, :1].expand(m.shape),
    "expanded_keys": lambda m: m[..., :1].expand(m.shape),
    "transposed": lambda m: m.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every_other_key": lambda m: m.repeat_interleave(2, -1)[..., ::2],
    "offset_1": lambda m: torch.nn.functional.pad(m, (1, 2))[..., 1:-2],
    "offset_7": lambda m: torch.nn.functional.pad(m, (7, 0))[..., 7:],
    "bytes_of_2": lambda m: (2 * m.to(torch.uint8)).view(torch.bool),
}


@all_backends
@pytest.mark.parametrize("view", MASK_VIEWS)
def test_mask_of_any_stride(view, backend):
    case = Case(Hk=2, Lq=70, Lk=90, mask="bhqk")
    inputs = make(case, FP32, device=DEVICE)
    inputs = inputs._replace(mask=MASK_VIEWS[view](inputs.mask))
    result = check_inputs(inputs, case, backend)
    assert torch.equal(result.out, attend(inputs._replace(mask=inputs.mask.contiguous()), backend).out)


@all_backends
@all_dtypes
@pytest.mark.parametrize("Lq", (1, 5, 66))
def test_rows_that_see_nothing(Lq, dtype, backend):
    """out 0, lse -inf, all gradients 0 for that row; others untouched."""
    case = Case(Lq=Lq, Lk=130, Hk=2, mask="b1q1", bias="1hqk")
    inputs = make(case, dtype, device=DEVICE)
    mask = torch.ones_like(inputs.mask)
    mask[0, :, 0] = False
    mask[1, :, Lq // 2 :] = False
    inputs = inputs._replace(mask=mask)
    result = check_inputs(inputs, case, backend)
    hidden = ~mask[..., 0].expand(2, 4, Lq)
    assert not result.out[hidden].any() and (result.lse[hidden] == -torch.inf).all()
    assert not result.dq[hidden].any()
    assert result.lse[~hidden].isfinite().all()


@all_backends
@pytest.mark.parametrize("upstream", [float("nan"), float("inf")], ids=str)
def test_rows_that_see_nothing_ignore_the_gradient_of_their_lse(upstream, backend):
    """Merging partial results by logaddexp hands NaN back where every part was -inf."""
    case = Case(Lq=20, Lk=30, Hk=2, mask="q1", bias="1hqk")
    inputs = make(case, FP32, device=DEVICE)
    mask = torch.arange(20, device=DEVICE)[:, None] % 3 != 0
    inputs = inputs._replace(mask=mask)
    expected = attend(inputs, backend)
    result = attend(inputs._replace(dlse=inputs.dlse.masked_fill(~mask[:, 0], upstream)), backend)
    for name in ("dq", "dk", "dv", "dbias"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name


@all_backends
@all_dtypes
def test_nothing_visible_at_all(dtype, backend):
    case = Case(Hk=2, mask="1111", bias="qk")
    inputs = make(case, dtype, device=DEVICE)
    result = check_inputs(inputs._replace(mask=torch.zeros_like(inputs.mask)), case, backend)
    assert (result.lse == -torch.inf).all()
    assert not any(x.any() for x in (result.out, result.dq, result.dk, result.dv, result.dbias))


@all_backends
@pytest.mark.parametrize("Lq, Lk", [(30, 10), (100, 40), (200, 65)])
def test_bottom_right_causal_hides_the_first_rows(Lq, Lk, backend):
    result = check(Case(Lq=Lq, Lk=Lk, Hk=2, causal="bottom_right"), FP32, backend)
    assert (result.lse[:, :, : Lq - Lk] == -torch.inf).all() and not result.dq[:, :, : Lq - Lk].any()
    assert result.lse[:, :, Lq - Lk :].isfinite().all()


@all_backends
@all_dtypes
@pytest.mark.parametrize("shape", ["qk", "bhqk", "b11k", "1hq1"])
def test_bias_of_minus_infinity_masks(shape, dtype, backend):
    """-inf is a mask: hidden entries have bias gradient 0, whole rows of it see nothing."""
    case = Case(Hk=2, Lq=40, Lk=90, bias=shape)
    inputs = make(case, dtype, device=DEVICE)
    hidden = random_mask(inputs.bias.shape, 9, 0.4, DEVICE)
    if "q" in shape and shape[-1] == "k":
        hidden[..., 3, :] = True
    inputs = inputs._replace(bias=inputs.bias.masked_fill(hidden, -torch.inf))
    result = check_inputs(inputs, case, backend)
    assert not result.dbias[hidden].any()
    assert all(x.isfinite().all() for x in (result.out, result.dq, result.dk, result.dv, result.dbias))


@all_backends
@all_dtypes
def test_bias_of_finfo_min(dtype, backend):
    """The Hugging Face way to mask: finite, so a row of nothing else is uniform over its keys; mixes with -inf."""
    case = Case(Hk=2, Lq=40, Lk=90, bias="qk")
    inputs = make(case, dtype, device=DEVICE)
    lowest = torch.finfo(dtype).min
    bias = inputs.bias.clone()
    bias[:, 50:] = lowest
    bias[5] = lowest
    bias[6, :30], bias[6, 30:] = -torch.inf, lowest
    bias[7] = -torch.inf
    inputs = inputs._replace(bias=bias)
    need(backend, inputs)
    result = attend(inputs, backend)
    assert all(x.isfinite().all() for x in (result.out, result.dq, result.dk, result.dv, result.dbias))
    assert not result.out[:, :, 7].any() and (result.lse[:, :, 7] == -torch.inf).all()
    ordinary = torch.tensor([i for i in range(40) if i not in (5, 6, 7)], device=DEVICE)
    short = fastattn.attention(
        inputs.q[:, :, ordinary],
        inputs.k[:, :, :50],
        inputs.v[:, :, :50],
        bias=bias[ordinary, :50],
        backend="reference",
    )
    assert max_error(result.out[:, :, ordinary], short) < {FP32: 1e-5}.get(dtype, 2e-2)


@all_backends
def test_padding_by_finfo_min_equals_padding_by_mask(backend):
    """fp32: products vanish beside 3e38, so a row of finfo.min alone averages its values."""
    inputs = make(Case(B=1, Hq=1, Hk=1, Lq=4, Lk=8), FP32, device=DEVICE)
    bias = torch.full((4, 8), torch.finfo(FP32).min, device=DEVICE)
    need(backend, inputs._replace(bias=bias))
    out = attend(inputs._replace(bias=bias), backend, grad=False).out
    assert max_error(out, inputs.v.mean(2, keepdim=True).expand_as(out)) < 1e-6


@all_backends
@all_dtypes
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("Lq", (1, 40, 130))
def test_hidden_keys_may_hold_nan(poison, Lq, dtype, backend):
    """Keys hidden from every query leak nothing, forward or backward, whichever option hides them."""
    case = Case(B=2, Hk=2, Lq=Lq, Lk=200, D=32)
    clean = make(case, dtype, device=DEVICE)
    padding = torch.ones(2, 1, 1, 200, dtype=torch.bool, device=DEVICE)
    padding[0, ..., 77:], padding[1, ..., :64] = False, False
    everywhere = torch.ones(1, 1, 1, 200, dtype=torch.bool, device=DEVICE)
    everywhere[..., 100:] = False
    for mask, options in (
        (padding, {}),
        (everywhere.expand(2, 4, Lq, 200), {}),
        (None, {"causal": "top_left"}),
        (padding, {"causal": "bottom_right", "window": (170, None)}),
    ):
        inputs = clean._replace(mask=mask)
        need(backend, inputs, **options)
        expected = attend(inputs, backend, **options)
        hidden = ~mask[:, 0, 0] if mask is not None else (torch.arange(200, device=DEVICE) >= Lq).expand(2, 200)
        at = hidden[:, None, :, None]
        dirty = inputs._replace(k=inputs.k.masked_fill(at, poison), v=inputs.v.masked_fill(at, poison))
        result = attend(dirty, backend, **options)
        for name in ("out", "lse", "dq"):
            assert torch.equal(getattr(result, name), getattr(expected, name)), (name, options)
        for name in ("dk", "dv"):
            gradient = getattr(result, name)
            assert torch.equal(gradient, getattr(expected, name)), (name, options)
            assert not gradient.masked_select(at).any(), (name, options)


@all_backends
def test_keys_hidden_by_bias_may_hold_nan(backend):
    case = Case(B=2, Hk=2, Lq=40, Lk=90, bias="b11k")
    inputs = make(case, FP32, device=DEVICE)
    bias = torch.zeros_like(inputs.bias)
    bias[0, ..., 50:] = -torch.inf
    at = (bias[:, 0, 0] == -torch.inf)[:, None, :, None]
    inputs = inputs._replace(bias=bias)
    need(backend, inputs)
    expected = attend(inputs, backend)
    result = attend(
        inputs._replace(k=inputs.k.masked_fill(at, torch.nan), v=inputs.v.masked_fill(at, torch.nan)), backend
    )
    for name in ("out", "lse", "dq", "dk", "dv", "dbias"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name


@all_backends
def test_visible_nan_is_not_hidden(backend):
    """The counterpart: a NaN someone sees must come out, in the rows that see it and no other."""
    inputs = make(Case(B=1, Hq=2, Hk=2, Lq=80, Lk=80), FP32, device=DEVICE)
    k = inputs.k.clone()
    k[:, :, 70] = torch.nan
    need(backend, inputs)
    out = attend(inputs._replace(k=k), backend, grad=False, causal=True).out
    assert out[:, :, :70].isfinite().all() and out[:, :, 70:].isnan().all()


@all_backends
@pytest.mark.parametrize("B, H", ((0, 2), (2, 0), (0, 0)))
def test_a_mask_expanded_to_nothing(B, H, backend):
    """No batch or no head, which have stride 0 in the mask."""
    q, k = torch.zeros(B, H, 3, 4, requires_grad=True, device=DEVICE), torch.zeros(B, H, 70, 4, device=DEVICE)
    mask = torch.ones(1, 1, 3, 70, dtype=torch.bool, device=DEVICE).expand(B, H, 3, 70)
    need(backend, make(Case(), FP32, device=DEVICE))
    (dq,) = torch.autograd.grad(fastattn.attention(q, k, k, mask=mask, backend=backend).sum(), q)
    assert dq.shape == q.shape
