"""Memory: every layout of every tensor, the layout of the result, untouched surroundings, no Lq x Lk allocation."""

import subprocess
import sys

import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32, all_backends, all_dtypes, attend, check_inputs, need
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
from fastattn.testing import LAYOUTS, Case, make, relayout

CASE = Case(B=2, Hq=4, Hk=2, Lq=37, Lk=75, D=24, Dv=40, causal=True)


@all_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tensor", ["q", "k", "v", "all"])
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
def test_layouts(tensor, layout, dtype, backend):
    """One tensor at a time in each layout, then all; NaN lies between the elements of strided ones."""
    inputs = make(CASE, dtype, device=DEVICE)
    names = ("q", "k", "v") if tensor == "all" else (tensor,)
    inputs = inputs._replace(**{name: relayout(getattr(inputs, name), layout) for name in names})
    check_inputs(inputs, CASE, backend)


@all_backends
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=str)
@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1), (0, 2), (0, 1, 2)], ids=str)
def test_out_of_an_expanded_query(dims, order, backend):
    """Expanded dimensions take their place as in torch.empty_like, so that a broadcast batch can be viewed as rows."""
    q, k, v = make(Case(B=2, Hq=4, Hk=4, Lq=5, Lk=7, D=8), FP32, device=DEVICE)[:3]
    small = q.permute(order)
    for dim in (order.index(dim) for dim in dims):
        small = small.narrow(dim, 0, 1)
    q = small.contiguous().permute(order).expand(q.shape)
    strides = torch.empty_like(q).stride()
    assert fastattn.attention(q, k, v, backend=backend).stride() == strides
    with FakeTensorMode() as mode:
        assert fastattn.attention(*map(mode.from_tensor, (q, k, v)), backend=backend).stride() == strides
    if dims in ((0,), (0, 1, 2)) and backend != "reference":  # a second each; the reference is plain torch
        torch._dynamo.reset()
        compiled = torch.compile(fastattn.attention, backend="aot_eager", fullgraph=True, dynamic=True)
        assert compiled(q, k, v, backend=backend).stride() == strides


@all_backends
@all_dtypes
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"expanded"}))
def test_layout_does_not_change_the_result(layout, dtype, backend):
    inputs = make(CASE, dtype, device=DEVICE)
    need(backend, inputs, **CASE.options())
    plain = attend(inputs, backend, **CASE.options())
    moved = inputs._replace(**{name: relayout(getattr(inputs, name), layout) for name in ("q", "k", "v")})
    result = attend(moved, backend, **CASE.options())
    for name in ("out", "lse", "dq", "dk", "dv"):
        if backend == "native":
            assert torch.equal(getattr(result, name), getattr(plain, name)), name
        else:
            torch.testing.assert_close(
                getattr(result, name), getattr(plain, name), atol=2e-2 if dtype != FP32 else 1e-5, rtol=0
            )


@all_backends
@pytest.mark.parametrize("offset", range(1, 8))
@pytest.mark.parametrize("dtype", (FP32, FP16), ids=("float32", "float16"))
def test_storage_offsets(offset, dtype, backend):
    """Pointers aligned to nothing but their element."""
    inputs = make(CASE, dtype, device=DEVICE)

    def shifted(x):
        flat = x.new_full((x.numel() + offset,), float("nan"))
        flat[offset:] = x.reshape(-1)
        return flat[offset:].view(x.shape)

    inputs = inputs._replace(q=shifted(inputs.q), k=shifted(inputs.k), v=shifted(inputs.v), dout=shifted(inputs.dout))
    check_inputs(inputs, CASE, backend)


@all_backends
@pytest.mark.parametrize("layout", ["contiguous", "blhd", "lbhd"])
@pytest.mark.parametrize("Dv", (24, 40))
def test_out_follows_the_layout_of_q(layout, Dv, backend):
    case = Case(B=2, Hq=4, Hk=4, Lq=37, D=24, Dv=Dv)
    inputs = make(case, FP32, device=DEVICE)
    inputs = inputs._replace(q=relayout(inputs.q, layout))
    need(backend, inputs)
    result = attend(inputs, backend)
    expected = relayout(torch.empty(2, 4, 37, Dv), layout).stride()
    assert result.out.stride() == expected
    assert result.lse.is_contiguous()


@all_backends
def test_packed_projection_needs_no_copy(backend):
    """q, k, v as views of one [B, L, 3, H, D] projection, the usual module; gradients come back through the views."""
    need(backend, make(Case(), FP32))
    packed = torch.randn(2, 50, 3, 4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    out = fastattn.attention(q, k, v, causal=True, backend=backend)
    copy = packed.detach().clone().requires_grad_()
    expected = fastattn.attention(*(x.contiguous() for x in copy.permute(2, 0, 3, 1, 4)), causal=True, backend=backend)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(packed.grad, copy.grad, atol=1e-5, rtol=0)


@all_backends
@all_dtypes
def test_inputs_are_not_written(dtype, backend):
    """Inputs sit inside larger buffers: neither they nor what surrounds them may change."""
    case = Case(Hk=2, Lq=33, Lk=65, D=17, mask="bhqk", bias="bhqk", alibi="bh", sinks=True)
    inputs = make(case, dtype, device=DEVICE)
    need(backend, inputs)
    frames, framed = [], []
    for x in inputs:
        frame = torch.ones(x.numel() + 128, device=DEVICE).to(x.dtype)
        view = frame[64:-64].view(x.shape).copy_(x)
        frames.append((frame, frame.clone()))
        framed.append(view)
    attend(type(inputs)(*framed), backend)
    for name, (frame, before) in zip(inputs._fields, frames):
        assert torch.equal(frame, before), name


@all_backends
def test_lazily_negated_inputs(backend):
    """x.conj().imag is a real view whose memory holds the opposite sign."""
    inputs = make(CASE, FP32, device=DEVICE)
    need(backend, inputs, **CASE.options())
    lazy = inputs._replace(
        **{n: torch.complex(x, -x).conj().imag for n in ("q", "k", "v") for x in [getattr(inputs, n)]}
    )
    assert lazy.q.is_neg()
    check_inputs(lazy, CASE, backend)


@all_backends
def test_shared_memory_between_inputs(backend):
    """q is k is v: self attention of one tensor."""
    case = Case(Hk=4, Lq=47, Lk=47)
    inputs = make(case, FP32, device=DEVICE)
    need(backend, inputs)
    x = inputs.q.clone().requires_grad_()
    fastattn.attention(x, x, x, backend=backend).backward(inputs.dout)
    alone = attend(inputs._replace(k=inputs.q, v=inputs.q, dlse=torch.zeros_like(inputs.dlse)), backend)
    torch.testing.assert_close(x.grad, alone.dq + alone.dk + alone.dv, atol=1e-5, rtol=0)


MEMORY = """
import resource, sys, torch, fastattn
torch.set_num_threads(2)
L, backend = int(sys.argv[1]), sys.argv[2]
def run(L):
    q, k, v = (torch.ones(1, 1, L, 16, requires_grad=True) for _ in range(3))
    fastattn.attention(q, k, v, backend=backend).sum().backward()
run(L // 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(L)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@all_backends
def test_nothing_of_size_Lq_by_Lk_is_allocated(backend):
    """Doubling L raises the high-water mark of a fresh process by far less than the 200 MB one dense matrix would."""
    if backend == "reference":
        pytest.skip("the reference is dense by definition")
    need(backend, make(Case(), FP32))
    done = subprocess.run([sys.executable, "-c", MEMORY, "8192", backend], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 100 * 1024, f"{int(done.stdout) / 1024:.0f} MB"


READ = """
import sys, torch
if sys.argv[2] == "methods":  # as in an older torch
    del torch.Tensor.__dlpack_c_exchange_api__
import fastattn
from fastattn.testing import LAYOUTS, Case, make, relayout
found = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for layout in LAYOUTS:
        case = Case(B=2, Hq=4, Hk=2, Lq=37, Lk=75, D=24, Dv=40)
        x = [relayout(t, layout).requires_grad_() for t in make(case, dtype)[:3]]
        mask = fastattn.masks.causal("bottom_right") & fastattn.masks.window(20, 20)
        out = fastattn.attention(*x, mask=mask, backend="native")
        found += [out, *torch.autograd.grad(out.float().square().sum(), x)]
    found.append(fastattn.attention(*(t.detach() for t in x)))
torch.save(found, sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no DLPack exchange")
def test_tensors_read_by_their_methods(tmp_path):
    """Where torch has no DLPack exchange, the same memory is found."""
    need("native", make(CASE, FP32))
    found = []
    for way in ("dlpack", "methods"):
        path = tmp_path / way
        subprocess.run([sys.executable, "-c", READ, str(path), way], check=True, timeout=300)
        found.append(torch.load(path))
    assert len(found[0]) == 3 * (4 * len(LAYOUTS) + 1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
