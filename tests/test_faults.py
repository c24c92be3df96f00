"""Faults other attention libraries shipped that no other file covers; docs/faults.md maps every row to its test."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from harness import BF16, DEVICE, FP32, Result, all_backends, assert_equal, attend, check, check_inputs, need

import fastattn
from fastattn.params import SoftmaxTensors
from fastattn.testing import Case, cast, make, max_error

TESTS = Path(__file__).parent
fast_backends = pytest.mark.parametrize("backend", ["native", "eager"])


def test_every_row_of_the_table_has_a_test_that_exists():
    """docs/faults.md: 56 rows, each with test ids that exist or a reason."""
    text = (TESTS.parent / "docs" / "faults.md").read_text()
    rows = re.findall(r"^\| *(\d+) *\|(.*)\|$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 57))
    for number, row in rows:
        ids = re.findall(r"`(\w+\.py)::(test_\w+)`", row)
        reason = re.search(r"no test: \S+", row)
        assert bool(ids) != bool(reason), f"row {number} needs test ids or a reason, not both"
        for file, name in ids:
            assert f"def {name}(" in (TESTS / file).read_text(), f"row {number}: {file}::{name} does not exist"


@pytest.fixture(scope="module")
def sparse_file(tmp_path_factory):
    """9.5 GB of virtual memory, of which only the pages touched exist."""
    path = tmp_path_factory.mktemp("sparse") / "storage"
    path.touch()
    os.truncate(path, 19 << 29)
    yield lambda dtype: torch.from_file(str(path), shared=True, size=(19 << 29) // dtype.itemsize, dtype=dtype)
    path.unlink()


WIDE_STRIDES = [  # strides of the tensor under test, in elements: past 2^31 by batch, by head, by row, by head dimension
    ((2**31 + 64, 4096, 16, 1), "batch"),
    ((8192, 2**31 + 64, 16, 1), "head"),
    ((64 * 2**20, 2**20, 2**27 + 8, 1), "row"),
    ((1 << 12, 1 << 11, 1, 306_783_400), "head_dim"),
]


@fast_backends
@pytest.mark.parametrize("tensor", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("strides", [s for s, _ in WIDE_STRIDES], ids=[name for _, name in WIDE_STRIDES])
def test_strides_past_int32(strides, tensor, backend, sparse_file):
    """Offsets of more than 2^31 elements: an int32 product reads somewhere else, or nowhere."""
    case = Case(B=2, Hq=2, Hk=2, Lq=17, Lk=17, D=8, causal=True)
    inputs = make(case, FP32)
    need(backend, inputs)
    x = getattr(inputs, tensor)
    wide = sparse_file(FP32).as_strided(x.shape, strides)
    assert sum((n - 1) * s for n, s in zip(x.shape, strides)) > 2**31 - 1
    wide.copy_(x)
    assert_equal_or_close(attend(inputs._replace(**{tensor: wide}), backend, **case.options()),
                          attend(inputs, backend, **case.options()), backend)  # fmt: skip


def assert_equal_or_close(found, expected, backend):
    if backend == "native":
        return assert_equal(found, expected, "wide strides")
    for name, a, b in zip(Result._fields, found, expected):
        assert a is None or max_error(a, b) < 1e-5, name


@fast_backends
@pytest.mark.parametrize("which", ["mask", "bias"])
@pytest.mark.parametrize("strides", [(2**31 + 64, 0, 32, 1), (1 << 20, 0, 2**27 + 8, 1)], ids=["batch", "row"])
def test_mask_and_bias_strides_past_int32(strides, which, backend, sparse_file):
    """pytorch#150054: masks of 49999^2."""
    case = Case(B=2, Hq=2, Hk=2, Lq=17, Lk=17, D=8, mask="b1qk", bias="b1qk")
    inputs = make(case, FP32)
    need(backend, inputs)
    x = getattr(inputs, which)
    wide = sparse_file(x.dtype).as_strided(x.shape, strides)
    wide.copy_(x)
    assert_equal_or_close(attend(inputs._replace(**{which: wide}), backend), attend(inputs, backend), backend)


@fast_backends
@pytest.mark.parametrize("B, H", [(65536, 1), (1, 65537), (257, 257)])
def test_more_than_65535_heads_or_batches(B, H, backend):
    """A grid dimension of a GPU, a 16-bit counter: batch, heads and their product each past 65535."""
    case = Case(B=B, Hq=H, Hk=H, Lq=1, Lk=3, D=4)
    inputs = make(case, FP32, device=DEVICE)
    result = attend(inputs, backend)
    expected = attend(inputs, "reference")
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert max_error(getattr(result, name), getattr(expected, name)) < 1e-5, name


@all_backends
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("float32", "bfloat16"))
def test_whole_blocks_hidden_in_the_middle_of_a_row(dtype, backend):
    """pytorch#127055: exp(-inf + inf) when every key of a block is masked, at L = 640 with windows longer than it."""
    case = Case(B=1, Hq=2, Hk=2, Lq=640, Lk=640, D=16, bias="qk")
    i, j = torch.arange(640)[:, None], torch.arange(640)
    hidden = ((j - i).abs() > 20) | ((i // 64) % 3 == 1) & (j < 512)
    inputs = make(case, dtype, device=DEVICE)
    check_inputs(inputs._replace(bias=inputs.bias.masked_fill(hidden.to(DEVICE), -torch.inf)), case, backend)


@pytest.mark.parametrize("with_parts", [False, True])
@pytest.mark.parametrize("Lq", (1, 3, 40))
def test_native_writes_its_outputs_and_nothing_else(Lq, with_parts):
    """FlagGems#5235: the combine step of split keys wrote out of bounds for [B, L, H, D] results."""
    case = Case(B=2, Hq=4, Hk=2, Lq=Lq, Lk=1200, D=24, Dv=17)
    inputs = make(case, FP32)
    need("native", inputs)
    from fastattn import _C

    expected = attend(inputs, "native", grad=with_parts)
    frame = torch.full((2 * 4 * Lq * 17 + 256,), 7.0)
    out = frame[128:-128].view(2, Lq, 4, 17).transpose(1, 2)
    lse_frame = torch.full((2 * 4 * Lq + 256,), 7.0)
    lse = lse_frame[128:-128].view(2, 4, Lq)
    parts_frame = torch.full((2 * 2 * 4 * Lq + 256,), 7.0)
    parts = parts_frame[128:-128].view(2, 4, Lq, 2) if with_parts else None
    _C.softmax_forward(SoftmaxTensors(*inputs[:3]), out, lse, parts, 24**-0.5, None, None, 0.0, 0.0, 2)
    assert torch.equal(out, expected.out) and torch.equal(lse, expected.lse)
    for guard in (frame, lse_frame, parts_frame):
        assert (guard[:128] == 7).all() and (guard[-128:] == 7).all()


def run_script(code, timeout=240, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, **environment}, cwd=TESTS)  # fmt: skip


def test_nothing_is_read_past_the_end_of_a_tensor():
    """Every input ends at a page that may not be read (pytorch PR#128816: mask with last dimension 1)."""
    need("native", make(Case(), FP32))
    done = subprocess.run([sys.executable, str(TESTS / "guard_pages.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), (
        done.returncode,
        done.stdout[-300:],
        done.stderr[-2000:],
    )


EMPTY = """
import itertools, torch, fastattn
count = 0
for B, H, Lq, Lk, D, Dv in itertools.product((0, 2), (0, 2), (0, 1, 70), (0, 1, 70), (0, 8), (0, 8)):
    for backend in ("auto", "eager", "reference"):
        for options in ({}, {"causal": True, "window": (3, 3)}, {"dropout_p": 0.5}):
            q, k, v = (torch.ones(s, requires_grad=True) for s in ((B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, Dv)))
            out, lse = fastattn.attention(q, k, v, return_lse=True, backend=backend, **options)
            assert out.shape == (B, H, Lq, Dv) and lse.shape == (B, H, Lq)
            grads = torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True, materialize_grads=True)
            assert all(not g.isnan().any() for g in (out, *grads))
            count += 1
print("done", count)
"""


def test_empty_shapes_do_not_kill_the_process():
    """pytorch#141218, FA PR#2470: division by zero heads or lengths is SIGFPE."""
    done = run_script(EMPTY)
    assert done.returncode == 0 and done.stdout == "done 1296\n", (done.returncode, done.stderr[-2000:])


CHILDREN = """
import os, signal, time, torch, fastattn
def wait_for(children):
    deadline, codes = time.time() + 60, []
    for pid in children:
        while True:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes.append(status)
                break
            if time.time() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes.append("hung")
                break
            time.sleep(0.02)
    return codes
"""
FORK = """
torch.set_num_threads(4)
q = torch.randn(2, 4, 200, 32, requires_grad=True)
def work():
    out = fastattn.attention(q, q, q, causal=True, backend="native")
    return [out.detach(), *torch.autograd.grad(out, q, torch.ones_like(out))]
expected = [x.tolist() for x in work()]
children = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        # Forward only: torch's autograd engine itself refuses to run in a forked child.
        with torch.no_grad():
            out = fastattn.attention(q, q, q, causal=True, backend="native")
        os._exit(0 if out.tolist() == expected[0] else 3)
    children.append(pid)
codes = wait_for(children)
assert [x.tolist() for x in work()] == expected
print(codes)
"""
FIRST_CALL_IN_CHILD = """
torch.set_num_threads(2)
q = torch.randn(1, 8, 256, 64)
torch.exp(q)  # starts the team
pid = os.fork()
if pid == 0:
    fastattn.attention(q, q, q, backend="native")
    os._exit(0)
print(wait_for([pid]))
"""


@pytest.mark.parametrize(
    "script, codes", [(FORK, "[0, 0, 0]"), (FIRST_CALL_IN_CHILD, "[0]")], ids=["warm", "first call"]
)
def test_fork_after_warm_up(script, codes):
    """pytorch#17199: GNU OpenMP's pool does not survive fork; children must neither hang nor err, nor hurt the parent.

    Also where torch alone has started it, and the library is first called in the child.
    """
    need("native", make(Case(), FP32))
    done = run_script(CHILDREN + script)
    assert done.stdout == f"{codes}\n", (done.returncode, done.stdout, done.stderr[-2000:])


SMALL_TEAM = """
import torch, fastattn
torch.manual_seed(0)
def run(threads):
    torch.set_num_threads(threads)
    q, k, v = (torch.randn(3, 4, L, 40, generator=torch.Generator().manual_seed(L), requires_grad=True) for L in (90, 130, 130))
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True, backend="native")
    one = fastattn.attention(q[:, :, :1], k, v, backend="native")
    return [out, lse, one, *torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum() + one.sum(), (q, k, v))]
first = run(1)
assert all(x.isfinite().all() for x in first[:1])
for threads in (4, 2, 7, 1, 16, 3):
    for a, b in zip(run(threads), first):
        assert torch.equal(a, b), threads
print("done")
"""


@pytest.mark.parametrize("limit", ["1", "2", None])
def test_thread_team_smaller_than_asked(limit):
    """OMP_THREAD_LIMIT below set_num_threads: the team is smaller, and no part of the work may be lost."""
    need("native", make(Case(), FP32))
    done = run_script(SMALL_TEAM, **({"OMP_THREAD_LIMIT": limit} if limit else {}))
    assert done.returncode == 0 and done.stdout == "done\n", (done.returncode, done.stderr[-2000:])


@fast_backends
def test_eight_python_threads_at_once(backend):
    """pytorch#45198: per-thread buffers shared, or sized by another call's thread count."""
    cases = [
        Case(B=1, Hq=2, Hk=1, Lq=30 + 17 * n, Lk=60 + 31 * n, D=8 + 8 * n, causal=bool(n % 2), dropout_p=0.0)
        for n in range(8)
    ]
    problems = [(make(case, FP32 if n % 3 else BF16), case) for n, case in enumerate(cases)]
    need(backend, problems[0][0])
    need(backend, problems[1][0])
    expected = [attend(inputs, backend, **case.options()) for inputs, case in problems]
    errors, start = [], threading.Barrier(8)

    def work(index):
        inputs, case = problems[index]
        try:
            start.wait(30)
            for repeat in range(12):
                assert_equal(
                    attend(inputs, backend, **case.options()), expected[index], f"thread {index}, repeat {repeat}"
                )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors, errors[0]


def test_uninitialised_memory_is_nan_here():
    """conftest's promise, on which every other test leans: a row never written shows."""
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
    assert torch.empty_like(torch.ones(4)).isnan().all() and torch.empty_strided((2, 2), (2, 1)).isnan().all()


@all_backends
def test_large_head_count_ratio_maps_every_head(backend):
    """levanter PR#449: the map of query to kv heads, seen one by one: kv head g is constant g."""
    for Hq, Hk in ((12, 3), (12, 4), (6, 6), (7, 1)):
        inputs = make(Case(B=1, Hq=Hq, Hk=Hk, Lq=3, Lk=5, D=4), FP32, device=DEVICE)
        v = torch.arange(Hk, dtype=FP32, device=DEVICE).view(1, Hk, 1, 1).expand(inputs.v.shape)
        out = attend(inputs._replace(v=v), backend, grad=False).out
        expected = torch.arange(Hq, device=DEVICE) // (Hq // Hk)
        assert max_error(out, expected.view(1, Hq, 1, 1).expand(out.shape)) < 1e-6


@all_backends
def test_long_rows(backend):
    """Many key tiles per row, lengths off the tile, in both directions (fla PR#1143: the last partial chunk)."""
    check(Case(B=1, Hq=1, Hk=1, Lq=3, Lk=5000, D=16, causal=True), FP32, backend)
    check(Case(B=1, Hq=1, Hk=1, Lq=2111, Lk=40, D=16, causal="top_left"), FP32, backend)


@fast_backends
def test_two_references_agree_on_gradients(backend):
    """fla PR#875: the reference was wrong too. aten's math op, fp64, is the second one."""
    case = Case(Hk=4, Lq=40, Lk=40, causal="top_left")
    inputs = make(case, FP32, device=DEVICE)
    leaves = [x.double().requires_grad_() for x in inputs[:3]]
    out = torch.ops.aten._scaled_dot_product_attention_math(*leaves, None, 0.0, True)[0]
    expected = torch.autograd.grad(out, leaves, inputs.dout.double())
    flat = inputs._replace(dlse=torch.zeros_like(inputs.dlse))
    for result, tolerance in (
        (attend(flat, backend, **case.options()), 1e-5),
        (attend(cast(flat, torch.float64), "reference", **case.options()), 1e-12),
    ):
        for name, exact in zip(("dq", "dk", "dv"), expected):
            assert max_error(getattr(result, name), exact) < tolerance, name


def test_importing_before_torch():
    """Several OpenMP runtimes in one process hang or crash: importing fastattn before torch must load one."""
    code = "import fastattn, torch; print(fastattn.attention(*[torch.ones(1, 1, 2, 4)] * 3).sum().item())"
    done = run_script(code)
    assert done.stdout == "8.0\n", done.stderr[-2000:]
    assert fastattn.__version__
