"""Masks as data in the softmax op: every backend against a dense oracle, forward and all gradients."""

import copy
import pickle
import random

import mask_cases
import pytest
import torch
import torch._dynamo.testing
from harness import BACKENDS, FP32, FP64, all_backends
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fastattn
from fastattn import masks
from fastattn.testing import Case, make, max_error

EXPRESSIONS = 500
CHUNK = 25


def tensors(B, Hq, Hk, Lq, Lk, D=8, dtype=FP32, grad=True, seed=0):
    inputs = make(Case(B=B, Hq=Hq, Hk=Hk, Lq=Lq, Lk=Lk, D=D), dtype, seed)
    return [t.clone().requires_grad_(grad) for t in inputs[:3]], inputs.dout


def run(leaves, dout, **options):
    """(out, dq, dk, dv, ...) of one call; every leaf after q, k, v is an option by name."""
    out = fastattn.attention(*leaves[:3], **options)
    return out.detach(), *torch.autograd.grad(out, leaves, dout, materialize_grads=True)


def against_dense(mask, visible, Lq, Lk, backend, B=2, Hq=3, Hk=3, **options):
    leaves, dout = tensors(B, Hq, Hk, Lq, Lk)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    golden = run(exact, dout.double(), mask=visible, backend="reference", **options)
    found = run(leaves, dout, mask=mask, backend=backend, **options)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, golden):
        assert max_error(a, b) < 2e-5 * max(1.0, float(b.abs().max())), (name, mask)


@pytest.mark.parametrize("chunk", range(EXPRESSIONS // CHUNK))
def test_random_expressions(chunk):
    """All backends read the plan of the expression; the oracle is dense and knows neither plans nor intervals."""
    r = random.Random(chunk)
    for mask, visible, Lq, Lk in mask_cases.expressions(CHUNK, seed=chunk):
        Hk, options = r.choice([1, 3]), r.choice([{}, {}, {"causal": "top_left"}, {"window": (40, 9)}])
        for backend in BACKENDS:
            against_dense(mask, visible, Lq, Lk, backend, Hk=Hk, **options)


@all_backends
@pytest.mark.parametrize("name", mask_cases.PATTERNS)
def test_patterns_in_long_sequences(name, backend):
    """Several query blocks and key blocks of every kernel, lengths that differ where the pattern allows."""
    L = 200
    mask, visible = mask_cases.PATTERNS[name](random.Random(3), L, L)
    against_dense(mask, visible, L, L, backend, Hk=1)


@all_backends
@pytest.mark.parametrize("options", ({"bias": "bhqk"}, {"bias": "1h1k"}, {"dropout_p": 0.3}, {"softcap": 3.0}, {"alibi": True},
                                     {"sinks": True}), ids=str)  # fmt: skip
def test_masks_compose_with_options(options, backend):
    """A plan and the equal dense mask give the same, whatever else is asked for."""
    case = Case(B=2, Hq=4, Hk=2, Lq=150, Lk=170, D=8, bias=options.get("bias"))
    inputs = make(case, FP32)
    mask = (masks.causal() | masks.prefix(torch.tensor([30, 70]))) & ~masks.global_tokens([5, 100])
    extra = {name: value for name, value in options.items() if name in ("dropout_p", "softcap")}
    leaves = {"bias": inputs.bias} if inputs.bias is not None else {}
    if "alibi" in options:
        leaves["alibi_slopes"] = torch.rand(4)
    if "sinks" in options:
        leaves["sinks"] = torch.rand(4)

    def grads(mask, dtype, backend):
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in inputs[:3])
        named = {name: t.detach().to(dtype).requires_grad_() for name, t in leaves.items()}
        torch.manual_seed(5)
        out, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True, backend=backend, **named, **extra)
        outputs, cotangents = (
            (out, lse.masked_fill(lse == -torch.inf, 0)),
            (inputs.dout.to(dtype), inputs.dlse.to(dtype)),
        )
        return [out, *torch.autograd.grad(outputs, [q, k, v, *named.values()], cotangents)]

    golden = grads(mask.to_dense(150, 170), FP64, "reference")
    for a, b in zip(grads(mask, FP32, backend), golden):
        assert max_error(a, b) < 3e-5 * max(1.0, float(b.detach().abs().max()))


@all_backends
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_masks_in_low_precision(dtype, backend):
    leaves, dout = tensors(2, 4, 2, 150, 150, D=16, dtype=dtype)
    mask = masks.causal() & masks.documents([0] * 40 + [1] * 50 + [2] * 60) | masks.prefix(9)
    golden = run([t.detach().double().requires_grad_() for t in leaves], dout.double(), mask=mask, backend="reference")
    for a, b in zip(run(leaves, dout, mask=mask, backend=backend), golden):
        assert max_error(a, b) < 4e-2 * max(1.0, float(b.abs().max()))


@all_backends
def test_keys_that_no_query_sees_may_hold_nan(backend):
    L = 200
    mask = (masks.causal() | masks.prefix(30)) & ~masks.global_tokens([3, 64, 65, 190])
    hidden = ~mask.to_dense(L, L).any(2)[0, 0]
    assert hidden.sum() == 4
    (q, k, v), dout = tensors(1, 2, 2, L, L)
    with torch.no_grad():
        k[:, :, hidden], v[:, :, hidden] = torch.nan, torch.inf
    for x in run([q, k, v], dout, mask=mask, backend=backend):
        assert x.isfinite().all()


@all_backends
@pytest.mark.parametrize("Lq, Lk, group", ((1, 1300, 1), (1, 1300, 4), (3, 700, 8), (1, 1300, 8)))
def test_decoding_under_a_mask(Lq, Lk, group, backend):
    mask = masks.window(600, 0) | masks.prefix(100)
    against_dense(mask, mask.to_dense(Lq, Lk), Lq, Lk, backend, Hq=group, Hk=1)


def test_results_do_not_depend_on_threads():
    leaves, dout = tensors(2, 4, 2, 300, 300, D=16)
    mask = masks.causal() & masks.documents(torch.arange(300) // 70) | masks.neighborhood((15, 20), 5)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(run(leaves, dout, mask=mask, backend="native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def _flex(name):
    """(ours, mask_mod) for the kinds of masks people write for FlexAttention."""
    L, doc = 128, torch.arange(128) // 37
    table = {
        "causal": (masks.causal(), lambda b, h, i, j: j <= i),
        "sliding window": (masks.causal() & masks.window(20, 0), lambda b, h, i, j: (j <= i) & (i - j <= 20)),
        "prefix lm": (masks.causal() | masks.prefix(30), lambda b, h, i, j: (j <= i) | (j < 30)),
        "documents": (masks.documents(doc), lambda b, h, i, j: doc[i] == doc[j]),
        "causal documents": (masks.causal() & masks.documents(doc), lambda b, h, i, j: (doc[i] == doc[j]) & (j <= i)),
        "prefix lm documents": (
            masks.documents(doc) & (masks.causal() | masks.prefix(5)),
            lambda b, h, i, j: (doc[i] == doc[j]) & ((j <= i) | (j < 5)),
        ),
        "dilated": (
            masks.dilated(4, 40) & masks.causal(),
            lambda b, h, i, j: ((i - j) % 4 == 0) & (i - j <= 40) & (j <= i),
        ),
        "global tokens": (
            masks.window(9, 9) | masks.global_tokens([0, 64]),
            lambda b, h, i, j: ((i - j).abs() <= 9) | (i == 0) | (j == 0) | (i == 64) | (j == 64),
        ),
        "attention sink": (
            masks.causal() & (masks.window(16, 0) | masks.prefix(4)),
            lambda b, h, i, j: (j <= i) & ((i - j <= 16) | (j < 4)),
        ),
        "natten": (
            masks.neighborhood((8, 16), 3),
            lambda b, h, i, j: (
                ((j // 16 - (i // 16).clamp(1, 6)).abs() <= 1) & ((j % 16 - (i % 16).clamp(1, 14)).abs() <= 1)
            ),
        ),
        "padding": (
            masks.key_padding(torch.tensor([100, 50])),
            lambda b, h, i, j: j < torch.tensor([100, 50])[b],
        ),
        "block sparse": (
            masks.blocks(torch.eye(8, dtype=torch.bool) | torch.eye(8, dtype=torch.bool).roll(2, 1), 16),
            lambda b, h, i, j: (i // 16 == j // 16) | ((i // 16 + 2) % 8 == j // 16),
        ),
        "inverted": (~masks.window(3, 3), lambda b, h, i, j: (i - j).abs() > 3),
        "sliding tiles": (
            masks.documents(torch.arange(L) // 16) | masks.documents((torch.arange(L) + 8) // 16),
            lambda b, h, i, j: (i // 16 == j // 16) | ((i + 8) // 16 == (j + 8) // 16),
        ),
    }
    return table[name] if name else list(table)


@all_backends
@pytest.mark.parametrize("name", _flex(None))
def test_flex_attention_agrees(name, backend):
    """An oracle from outside: FlexAttention in eager mode, given the same mask as a function."""
    mask, mod = _flex(name)
    (q, k, v), dout = tensors(2, 2, 2, 128, 128, D=16, grad=False)
    block_mask = create_block_mask(mod, 2, None, 128, 128, device="cpu")
    expected = flex_attention(q, k, v, block_mask=block_mask)
    assert max_error(fastattn.attention(q, k, v, mask=mask, backend=backend), expected) < 2e-6


@all_backends
def test_a_plan_is_as_good_as_its_mask(backend):
    leaves, dout = tensors(2, 4, 4, 100, 100)
    mask = masks.causal() & masks.documents([0] * 30 + [1] * 70)
    for a, b in zip(*(run(leaves, dout, mask=m, backend=backend) for m in (mask, mask.plan(100, 100)))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ("native", "eager"))
def test_compile_does_not_break_on_masks(backend):
    """Fullgraph, forward and backward, and other lengths of documents need no second graph."""
    leaves, dout = tensors(1, 2, 2, 100, 100)
    plans = [(masks.causal() & masks.documents([0] * n + [1] * (100 - n))).plan(100, 100) for n in (40, 70)]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(q, k, v, plan):
        return fastattn.attention(q, k, v, mask=plan, backend=backend)

    for plan in plans:
        out = compiled(*leaves, plan)
        expected = run(leaves, dout, mask=plan, backend=backend)
        for a, b in zip((out, *torch.autograd.grad(out, leaves, dout)), expected):
            assert max_error(a, b) < 1e-6
    assert counter.frame_count <= 2


@pytest.mark.parametrize("what", ("mask", "cu_seqlens"))
def test_building_a_mask_is_not_compiled(what):
    """One break of the graph, where the plan is built; a mask that is planned already needs none."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(fastattn.attention, backend=counter)
    for n in (10, 20, 33):
        q = torch.randn(1, 2, 100, 16)
        options = {"mask": masks.causal() & masks.documents(torch.arange(100) // n)}
        if what == "cu_seqlens":
            options = {"cu_seqlens_q": torch.tensor([0, n, 100], dtype=torch.int32)}
        assert max_error(compiled(q, q, q, **options), fastattn.attention(q, q, q, **options)) < 1e-6
    assert counter.frame_count <= 2
    if what == "mask":
        whole = torch.compile(lambda q: fastattn.attention(q, q, q, **options), backend=counter, fullgraph=True)
        assert max_error(whole(q), fastattn.attention(q, q, q, **options)) < 1e-6


@pytest.mark.parametrize("backend", ("native", "eager"))
@pytest.mark.parametrize("batched", (False, True))
def test_vmap_over_calls_with_a_plan(batched, backend):
    mask = (
        masks.causal() & masks.key_padding(torch.tensor([40, 60])) if batched else masks.causal() & masks.window(9, 0)
    )
    q, k, v = (torch.randn(3, 2, 2, 70, 8) for _ in range(3))
    plan = mask.plan(70, 70)
    mapped = torch.vmap(lambda q, k, v: fastattn.attention(q, k, v, mask=plan, backend=backend))(q, k, v)
    for n in range(3):
        assert max_error(mapped[n], fastattn.attention(q[n], k[n], v[n], mask=plan, backend=backend)) < 1e-6


@pytest.mark.parametrize(
    "mask, match",
    (
        (lambda: masks.documents([0] * 9), r"9"),
        (lambda: masks.causal().plan(5, 5), r"plan for Lq 5, Lk 5.*Lq 7, Lk 7"),
        (lambda: masks.key_padding(torch.tensor([1, 2, 3])), r"3 batches.*B 2"),
        (lambda: masks.dense(torch.ones(1, 3, 7, 7, dtype=torch.bool)), r"3 heads.*Hq 2"),
        (lambda: "causal", r"fastattn.masks"),
        (lambda: [[True]], r"fastattn.masks"),
    ),
)
def test_wrong_masks_are_refused(mask, match):
    q = torch.zeros(2, 2, 7, 8)
    with pytest.raises((TypeError, ValueError), match=match):
        fastattn.attention(q, q, q, mask=mask())


@all_backends
def test_a_mask_that_hides_everything_gives_zeros(backend):
    leaves, dout = tensors(1, 2, 2, 70, 70)
    for x in run(leaves, dout, mask=masks.empty(), backend=backend):
        assert not x.any()


def test_double_backward_under_a_mask():
    mask = masks.window(2, 1) | masks.prefix(1)
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=FP64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradgradcheck(lambda *x: fastattn.attention(*x, mask=mask, backend="eager"), (q, k, v))


def test_masks_and_plans_copy_and_pickle():
    mask = masks.causal() & masks.documents([0, 0, 1, 1]) | masks.global_tokens([1])
    for copied in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert copied == mask and torch.equal(copied.to_dense(4, 4), mask.to_dense(4, 4))
    plan = mask.plan(4, 4)
    for copied in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert torch.equal(copied.to_dense(), plan.to_dense())


def _documents(n):
    return masks.causal() & masks.documents([0] * n + [1] * (70 - n))


@pytest.mark.parametrize("backend", ("native", "eager"))
def test_a_mask_first_used_in_inference_mode_can_be_trained_with(backend):
    leaves, dout = tensors(1, 2, 2, 70, 70)
    mask = _documents(30)
    with torch.inference_mode():
        fastattn.attention(*leaves, mask=mask, backend=backend)
    found = run(leaves, dout, mask=mask, backend=backend)
    for a, b in zip(found, run(leaves, dout, mask=_documents(30), backend=backend)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ("native", "eager"))
def test_fresh_masks_inside_of_transforms(backend):
    """A plan is built of ordinary tensors, also where factory functions would return wrapped ones."""
    q, k, v = (torch.randn(1, 2, 70, 8) for _ in range(3))
    cu = torch.tensor([0, 30, 70], dtype=torch.int32)

    def loss(q, **how):
        return fastattn.attention(q, k, v, backend=backend, **how).square().sum()

    for how in (lambda: {"mask": _documents(30)}, lambda: {"cu_seqlens_q": cu, "causal": True}):
        leaf = q.clone().requires_grad_()
        expected = torch.autograd.grad(loss(leaf, **how()), leaf)[0]
        found = torch.func.grad(lambda x: loss(x, **how()))(q)  # noqa: B023 used inside this iteration only
        assert max_error(found, expected) < 1e-6


def test_fake_tensors_with_masks_and_gradients():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(1, 2, 70, 8, requires_grad=True) for _ in range(3))
        out = fastattn.attention(q, k, v, mask=torch.ones(70, 70, dtype=torch.bool))
        assert out.shape == (1, 2, 70, 8) and torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_vjp_mapped_over_cotangents_in_one_batch():
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    _, pull = torch.func.vjp(lambda x: fastattn.attention(x, k, v, backend="native"), q)
    cotangents = torch.randn(3, 1, 2, 20, 8)
    for mapped, one in zip(torch.func.vmap(pull)(cotangents)[0], cotangents):
        assert max_error(mapped, pull(one)[0]) < 1e-6


@pytest.mark.parametrize(
    "field, make_wrong",
    (
        ("words", lambda w: torch.stack((w, w), -1).flatten(1)[:, ::2]),
        ("words", lambda w: w[:1, :1].expand(1, 64)),
        ("row_order", lambda x: torch.stack((x, x), -1).flatten(1)[:, ::2]),
    ),
)
def test_plans_of_one_row_must_be_dense_too(field, make_wrong):
    q = torch.zeros(1, 1, 128, 8)
    plan = masks.causal().plan(128, 128)
    assert len(plan.words) == 1
    with pytest.raises(ValueError, match="contiguous"):
        fastattn.attention(q, q, q, mask=plan._replace(**{field: make_wrong(getattr(plan, field))}), backend="native")
