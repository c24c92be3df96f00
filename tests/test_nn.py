"""Layers against their papers' formulas, in value and gradient; steps, caches, errors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from nn_formulas import FP64, channels, gated_delta, gated_linear, katharopoulos, retention, taylor

from fastattn import nn

B, L, E = 2, 21, 24


CAUSAL = {
    "linear": (lambda **kw: nn.LinearAttention(E, 4, **kw), katharopoulos),
    "linear relu": (lambda **kw: nn.LinearAttention(E, 2, feature_map="relu", **kw), katharopoulos),
    "linear taylor2": (lambda **kw: nn.LinearAttention(E, 4, feature_map="taylor2", bias=False, **kw), katharopoulos),
    "taylor": (lambda **kw: nn.TaylorLinearAttention(E, 2, key_dim=10, causal=True, **kw), taylor),
    "retention": (lambda **kw: nn.Retention(E, 3, **kw), retention),
    "retention plain": (lambda **kw: nn.Retention(E, 3, key_dim=15, value_dim=30, rotary=False, **kw), retention),
    "gla": (lambda **kw: nn.GatedLinearAttention(E, 4, **kw), gated_linear),
    "gla warm": (lambda **kw: nn.GatedLinearAttention(E, 2, value_dim=36, temperature=1.0, **kw), gated_linear),
    "gdn": (lambda **kw: nn.GatedDeltaNet(E, 3, **kw), gated_delta),
    "gdn grouped": (
        lambda **kw: nn.GatedDeltaNet(E, 2, num_value_heads=4, conv_width=2, negative_eigenvalues=True, **kw),
        gated_delta,
    ),
    "gdn no conv": (lambda **kw: nn.GatedDeltaNet(E, 2, conv_width=1, **kw), gated_delta),
}
WHOLE = {
    "linear": (lambda **kw: nn.LinearAttention(E, 4, causal=False, **kw), katharopoulos),
    "taylor": (lambda **kw: nn.TaylorLinearAttention(E, **kw), taylor),
}
CHANNEL = lambda **kw: nn.TaylorLinearAttention(E, channel=True, **kw)
every_causal = pytest.mark.parametrize("name", CAUSAL)
one_of_each = pytest.mark.parametrize("name", ["linear", "taylor", "retention", "gla", "gdn"])


def made(make, dtype=torch.float32, **options):
    """A layer with no parameter at a special value: gamma, norms and biases start at 0 or 1, where errors hide."""
    torch.manual_seed(0)
    module = make(**options)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module.to(dtype)


def tokens(dtype=torch.float32, length=L, batch=B, seed=1):
    return torch.randn(batch, length, E, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(a, b, tolerance=1e-10):
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1), float((a - b).abs().max())


@every_causal
def test_causal_layers_are_what_the_papers_say(name):
    make, formula = CAUSAL[name]
    x = tokens(FP64)
    module = made(make, FP64)
    close(module(x), formula(module, x))
    expected = torch.autograd.grad(formula(module, x).square().sum(), list(module.parameters()))
    for found, e in zip(torch.autograd.grad(module(x).square().sum(), list(module.parameters())), expected):
        close(found, e, 1e-9)


@every_causal
def test_a_row_sees_no_later_token(name):
    module, x = made(CAUSAL[name][0]), tokens()
    changed = x.clone()
    changed[:, 12:] += 1
    with torch.no_grad():
        assert torch.equal(module(x)[:, :12], module(changed)[:, :12])


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("masked", [False, True])
def test_layers_without_order_are_what_the_papers_say(name, masked):
    make, formula = WHOLE[name]
    x, module = tokens(FP64), made(make, FP64)
    visible = torch.rand(B, L) > 0.4 if masked else None
    expected = formula(module, x, causal=False, visible=visible)
    if masked:
        x = x.masked_fill(~visible[..., None], torch.nan)  # padding may hold anything
        close(module(x, key_mask=visible)[visible], expected[visible])
    else:
        close(module(x), expected)


def test_cross_attention():
    module, x, context = made(WHOLE["linear"][0], FP64), tokens(FP64, 5), tokens(FP64, 13, seed=2)
    close(module(x, context=context), katharopoulos(module, x, causal=False, context=context))


@pytest.mark.parametrize("masked", [False, True])
def test_channel_form_swaps_channels_and_positions(masked):
    x, module = tokens(FP64), made(CHANNEL, FP64)
    visible = torch.rand(B, L) > 0.4 if masked else None
    close(module(x, key_mask=visible), channels(module, x, visible))


def test_channel_form_is_the_op_on_transposed_input():
    from fastattn import linear_attention

    x, module = tokens(FP64), made(CHANNEL, FP64)
    rows = x.mT[:, None]
    out = linear_attention(rows, rows, rows, feature_map="taylor1", causal=False)
    close(module(x), x + module.gamma * out[:, 0].mT)


def test_dead_channels_are_finite_with_gradients():
    module, x = made(CHANNEL), tokens()
    x[..., 3] = 0
    x.requires_grad_()
    out = module(x)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all() and x.grad.abs().max() < 100


@every_causal
@pytest.mark.parametrize("dtype", [FP64, torch.float32, torch.bfloat16])
def test_step_after_step_is_forward(name, dtype):
    module, x = made(CAUSAL[name][0], dtype), tokens(dtype)
    tolerance = {FP64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
    with torch.no_grad():
        whole, after = module(x, return_cache=True)
        cache = module.empty_cache(B)
        close(torch.cat([module.step(x[:, t : t + 1], cache) for t in range(L)], 1), whole, tolerance)
        head, middle = module(x[:, :9], return_cache=True)  # a prompt, a piece, then steps
        piece, cut = module(x[:, 9:11], middle, return_cache=True)
        rest = [module.step(x[:, t : t + 1], cut) for t in range(11, L)]
        close(torch.cat([head, piece, *rest], 1), whole, tolerance)
    for stepped in (cache, cut):
        for a, b in zip((*stepped.state, *stepped[1:]), (*after.state, *after[1:])):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype
                close(a.double(), b.double(), tolerance)


@every_causal
def test_a_cache_is_left_as_it_was_by_forward_and_differentiable(name):
    module, x = made(CAUSAL[name][0], FP64), tokens(FP64).requires_grad_()
    head, cache = module(x[:, :8], return_cache=True)
    kept = copy.deepcopy([t.detach() for t in (*cache.state, *cache[1:]) if t is not None])
    out = torch.cat((head, module(x[:, 8:], cache)), 1)
    assert all(torch.equal(a, b) for a, b in zip(kept, (t for t in (*cache.state, *cache[1:]) if t is not None)))
    (found,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    close(found, expected, 1e-9)


@pytest.mark.parametrize("make", [*(make for make, _ in CAUSAL.values()), *(m for m, _ in WHOLE.values()), CHANNEL])
def test_gradients_reach_everything(make):
    module, x = made(make), tokens().requires_grad_()
    module(x).square().sum().backward()
    for name, p in [("x", x), *module.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


@one_of_each
def test_gradcheck(name):
    module = made(CAUSAL[name][0], FP64)
    assert torch.autograd.gradcheck(module, tokens(FP64, 5, 1).requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("make", [*(make for make, _ in CAUSAL.values()), CHANNEL])
def test_state_dict_goes_round(make):
    module, other, x = made(make), make(), tokens()
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(x), other(x))
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize("make", [*(make for make, _ in CAUSAL.values()), CHANNEL])
def test_new_layers_start_well(make):
    torch.manual_seed(0)
    module, x = make(), tokens()
    fresh = copy.deepcopy(module)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(torch.nan)
    module.reset_parameters()
    for (name, p), q in zip(module.named_parameters(), fresh.parameters()):
        assert p.isfinite().all() and (p.dim() < 2 or 0.3 < p.std() / q.std() < 3), name
    assert module(x).isfinite().all() and str(E) in repr(module)
    elsewhere = make(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in elsewhere.parameters()} == {("meta", torch.bfloat16)}


def test_gates_start_where_the_papers_start():
    torch.manual_seed(0)
    delta = nn.GatedDeltaNet(256, 64)
    assert 1 <= delta.A_log.exp().min() and delta.A_log.exp().max() <= 16
    dt = F.softplus(delta.dt_bias)
    assert 0.9e-3 < dt.min() < 0.01 < dt.max() < 0.101
    decay = F.logsigmoid(nn.GatedLinearAttention(E).decay_proj(tokens())) / 16
    assert (decay.exp() - 0.5 ** (1 / 16)).abs().max() < 0.05
    x = tokens()
    assert torch.equal(nn.TaylorLinearAttention(E)(x), x) and torch.equal(CHANNEL()(x), x)


@every_causal
@pytest.mark.filterwarnings("error:Mismatch dtype")
def test_autocast(name):
    module, x = made(CAUSAL[name][0]), tokens()
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        out, cache = module(x, return_cache=True)
        out.float().square().sum().backward()
        with torch.no_grad():
            assert module.step(x[:, :1], cache).isfinite().all()
    close(out.float(), expected, 0.1)
    assert cache.state.kv.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


@one_of_each
def test_compiles_without_a_break(name):
    torch._dynamo.reset()
    module, x = made(CAUSAL[name][0]), tokens()
    with torch.no_grad():
        _, cache = module(x[:, :9], return_cache=True)
    outs = []
    for layer in (torch.compile(module, fullgraph=True, backend="aot_eager"), module):
        out, after = layer(x[:, 9:], cache, return_cache=True)
        loss = out.square().sum() + after.state.kv.sum()
        outs.append([out, *after.state, *after[1:], *torch.autograd.grad(loss, list(module.parameters()))])
    for found, expected in zip(*outs):
        assert (found is None) == (expected is None)
        if found is not None:
            close(found, expected, 1e-5)


@one_of_each
def test_no_tokens(name):
    module = made(CAUSAL[name][0])
    out, cache = module(tokens(length=0), return_cache=True)
    assert out.shape == (B, 0, E)
    close(module(tokens(), cache), module(tokens()), 1e-6)
    assert module(tokens(batch=0)).shape == (0, L, E)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.LinearAttention(24, 5), "embed_dim 24 must be a multiple of num_heads 5"),
        (lambda: nn.LinearAttention(0, 1), "embed_dim must be a positive int, got 0"),
        (lambda: nn.LinearAttention(24, 4, feature_map="identity"), "feature_map must be"),
        (lambda: nn.TaylorLinearAttention(24, 2, key_dim=3), "key_dim 3 must be a multiple of num_heads 2"),
        (lambda: nn.TaylorLinearAttention(24, channel=True, causal=True), "causal needs an order"),
        (lambda: nn.Retention(24, 4, value_dim=30), "value_dim 30 must be a multiple of num_heads 4"),
        (lambda: nn.Retention(24, 8), "key_dim 24 / num_heads 8 must be even"),
        (lambda: nn.GatedLinearAttention(24, 4, gate_rank=0), "gate_rank must be a positive int, got 0"),
        (lambda: nn.GatedLinearAttention(24, 4, temperature=0.0), "temperature must be > 0, got 0.0"),
        (lambda: nn.GatedDeltaNet(24, 2, num_value_heads=3), "num_value_heads 3 must be a multiple of num_heads 2"),
        (lambda: nn.GatedDeltaNet(24, 2, conv_width=0), "conv_width must be a positive int, got 0"),
        (lambda: nn.GatedDeltaNet(24, 5), "key_dim 18 must be a multiple of num_heads 5"),
    ],
)
def test_bad_sizes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_calls_are_named():
    module, x = nn.GatedDeltaNet(E, 2), tokens()
    cache, turned = module.empty_cache(B), nn.Retention(E, 2).empty_cache(B)
    narrow = nn.GatedDeltaNet(E, 2, conv_width=3).empty_cache(B)
    bad = [
        (lambda: module(x[0]), ValueError, r"x must be \[B, L, 24\], got \[21, 24\]"),
        (lambda: module(x.int()), TypeError, "x must be a floating point tensor, got torch.int32"),
        (lambda: module(x, cache.state), TypeError, "cache must come from empty_cache"),
        (lambda: module(x, module.empty_cache(3)), ValueError, "cache is of a batch of 3"),
        (lambda: module(x, turned), ValueError, "cache is of another layer"),
        (lambda: module(x, narrow), ValueError, "cache is of another layer"),
        (lambda: module.step(x, cache), ValueError, "a step takes one token"),
        (lambda: module.step(x[:, :1], cache), RuntimeError, r"call it under torch.no_grad\(\)"),
        (lambda: nn.LinearAttention(E, 2)(x, context=x), ValueError, "context goes with causal=False"),
        (lambda: nn.LinearAttention(E, 2, causal=False)(x, return_cache=True), ValueError, "a cache needs causal=True"),
        (lambda: nn.TaylorLinearAttention(E).step(x[:, :1], cache), ValueError, "a cache needs causal=True"),
        (lambda: CHANNEL()(x, context=x + 1), ValueError, "context does not go with channel=True"),
        (lambda: CHANNEL()(x, key_mask=torch.ones(B, 3, dtype=torch.bool)), ValueError, r"key_mask must be bool"),
        (lambda: nn.LinearAttention(E, 2, backend="none")(x), Exception, "backend"),
    ]
    for call, error, message in bad:
        with pytest.raises(error, match=message):
            call()
    with torch.no_grad():
        assert torch.equal(cache.conv, torch.zeros_like(cache.conv)), "a refused step changed its cache"
