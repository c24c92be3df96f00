"""fastattn.enable, disable and patched: what reaches fastattn through torch, and what is put back."""

import threading

import pytest
import torch
import torch.nn.functional as F
from harness import FP32
from test_dropin import qkv, torch_math, torch_sdpa
from torch.overrides import TorchFunctionMode

import fastattn
from fastattn.testing import max_error, randn


@pytest.fixture(autouse=True)
def unpatched():
    """A failing test must not leave the patch on for the next."""
    yield
    while fastattn.disable().active:
        pass


def test_compile_of_patched_code():
    torch._dynamo.reset()
    q, k, v = qkv(2, 3)
    with fastattn.patched():
        compiled = torch.compile(
            lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), fullgraph=True, backend="aot_eager"
        )
        assert max_error(compiled(q, k, v), torch_math(q, k, v, is_causal=True)) < 2e-6
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch):
    """Counts calls that reach fastattn."""
    import fastattn.dropin as dropin

    count = []
    inner = dropin.attention
    monkeypatch.setattr(dropin, "plain_attention", lambda *a: None)  # the short cut past it
    monkeypatch.setattr(dropin, "attention", lambda *a, **k: (count.append(k.get("backend")), inner(*a, **k))[1])
    return count


def test_enable_disable_nest(calls):
    q, k, v = qkv(2, 3)
    assert F.scaled_dot_product_attention is torch_sdpa
    fastattn.enable()
    fastattn.enable(backend="eager")
    F.scaled_dot_product_attention(q, k, v)
    fastattn.disable()
    F.scaled_dot_product_attention(q, k, v)
    assert calls == ["eager", "auto"]
    fastattn.disable()
    assert F.scaled_dot_product_attention is torch_sdpa
    fastattn.disable()  # one too many does no harm
    F.scaled_dot_product_attention(q, k, v)
    assert len(calls) == 2 and F.scaled_dot_product_attention is torch_sdpa


def test_patched_restores_after_an_error():
    with pytest.raises(ZeroDivisionError):
        with fastattn.patched(), fastattn.patched(backend="eager"):
            raise ZeroDivisionError
    assert F.scaled_dot_product_attention is torch_sdpa


def test_what_was_there_is_put_back():
    """Someone else's function comes back; one put in place of ours meanwhile stays, and may still call ours."""
    q, k, v = qkv(2, 3)
    ours = []

    def wrap(inner):
        return lambda *args, **options: (ours.append(inner), inner(*args, **options))[1]

    before = F.scaled_dot_product_attention = wrap(torch_sdpa)
    try:
        with fastattn.patched():
            assert F.scaled_dot_product_attention is not before
        assert F.scaled_dot_product_attention is before
        with fastattn.patched():
            later = F.scaled_dot_product_attention = wrap(F.scaled_dot_product_attention)
        assert F.scaled_dot_product_attention is later
        assert max_error(later(q, k, v), torch_sdpa(q, k, v)) == 0  # no patch is on: torch's own
    finally:
        F.scaled_dot_product_attention = torch_sdpa


def test_nested_tensors_are_torchs():
    sequences = [randn((L, 2, 8), FP32, L) for L in (5, 6)]
    jagged = torch.nested.nested_tensor(sequences, layout=torch.jagged).transpose(1, 2)
    strided = torch.nested.nested_tensor([x.transpose(0, 1).contiguous() for x in sequences])
    for x in (jagged, strided):
        expected = torch_sdpa(x, x, x)
        with fastattn.patched():
            results = F.scaled_dot_product_attention(x, x, x), fastattn.scaled_dot_product_attention(x, x, x)
        for found in results:
            assert all(torch.equal(a, b) for a, b in zip(found.unbind(), expected.unbind()))


class Watching(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def test_modes_and_subclasses_keep_the_backend(calls):
    q, k, v = qkv(2, 3)
    mask = torch.ones(9, 13).as_subclass(Subclass)
    with fastattn.patched(backend="eager"):
        with Watching() as mode:
            F.scaled_dot_product_attention(q, k, v)
        assert F.scaled_dot_product_attention in mode.seen
        assert type(F.scaled_dot_product_attention(q, k, v, mask)) is Subclass
    assert calls == ["eager", "eager"]


def test_report_says_what_is_patched():
    with fastattn.patched(backend="eager") as report:
        assert report.active and "scaled_dot_product_attention" in str(report) and "eager" in str(report)
    report = fastattn.enable()
    assert report.active and report.depth == 1
    assert not fastattn.disable().active


@pytest.mark.parametrize("training", [False, True])
def test_multihead_attention_goes_through_the_patch(calls, training):
    """The fast path of nn.MultiheadAttention bypasses F.scaled_dot_product_attention: switched off inside, restored after."""
    before = torch.backends.mha.get_fastpath_enabled()
    layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).train(training)
    x = randn((2, 5, 16), FP32)
    with torch.no_grad():
        expected = layer(x, x, x, need_weights=False)[0]
        with fastattn.patched():
            assert not torch.backends.mha.get_fastpath_enabled()
            found = layer(x, x, x, need_weights=False)[0]
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert len(calls) == 1 and max_error(found, expected) < 2e-6


def test_invalid_backend_is_refused_before_patching():
    with pytest.raises(ValueError, match="backend"):
        fastattn.enable(backend="cudnn")
    assert F.scaled_dot_product_attention is torch_sdpa


def test_overlapping_threads_keep_their_backend(calls):
    """A enters, B enters, A leaves: B is still patched, with its own backend; after B all is restored."""
    tensors = qkv(2, 3)
    a_in, b_in, a_out = threading.Event(), threading.Event(), threading.Event()
    seen = []

    def first():
        with fastattn.patched(backend="eager"):
            a_in.set()
            b_in.wait(20)
        a_out.set()

    def second():
        a_in.wait(20)
        with fastattn.patched(backend="reference"):
            b_in.set()
            a_out.wait(20)
            F.scaled_dot_product_attention(*tensors)
            seen.append(F.scaled_dot_product_attention is not torch_sdpa)

    threads = [threading.Thread(target=f) for f in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == [True] and calls == ["reference"]
    assert F.scaled_dot_product_attention is torch_sdpa


def test_many_threads_patch_and_unpatch():
    tensors = qkv(2, 3)
    expected = torch_math(*tensors)
    errors = []

    def work():
        try:
            for _ in range(50):
                with fastattn.patched():
                    assert F.scaled_dot_product_attention is not torch_sdpa
                    assert max_error(F.scaled_dot_product_attention(*tensors), expected) < 2e-6
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and F.scaled_dot_product_attention is torch_sdpa
    assert torch.backends.mha.get_fastpath_enabled()
