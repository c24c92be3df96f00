"""Plans: refused when malformed, kept by the mask, small in memory, the same from a dense tensor."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from test_masks import BUILDERS, assert_same_plan

import fastattn
from fastattn import masks
from fastattn.backends import native
from fastattn.masks import TilePlan, plan_from_dense
from fastattn.masks.plan import build_plan
from fastattn.masks.rows import unpack
from fastattn.ops.softmax import _extras
from fastattn.params import SoftmaxParams, SoftmaxTensors

needs_core = pytest.mark.skipif(native._C is None, reason=f"native: {native.status()}")
MASK = masks.causal() & masks.documents(torch.arange(300) // 70) | masks.prefix(5)


def plan() -> TilePlan:
    return MASK.plan(300, 300)


def changed(name: str, value, at=...) -> TilePlan:
    tensor = getattr(plan(), name).clone()
    tensor[at] = value
    return plan()._replace(**{name: tensor})


MALFORMED = {
    "row_start begins after 0": lambda: changed("row_start", 1, 0),
    "row_start decreases": lambda: changed("row_start", 0, 3),
    "row_start is negative": lambda: changed("row_start", -1, 2),
    "row_start points past the rows": lambda: changed("row_start", 2**31 - 1, 2),
    "row_start ends before the rows": lambda: plan()._replace(rows=torch.cat((plan().rows, plan().rows[:1]))),
    "column_start decreases": lambda: changed("column_start", 0, 3),
    "column_start points past the columns": lambda: changed("column_start", 10**6, -1),
    "a key tile is negative": lambda: changed("rows", -1, (0, 0)),
    "a key tile is past the last": lambda: changed("rows", 5, (-1, 0)),
    "a run ends past the last tile": lambda: changed("rows", 2**31 - 1, (-1, 1)),
    "a run is empty": lambda: changed("rows", 0, (0, 1)),
    "a partial run of two tiles": lambda: changed("rows", 2, ((plan().rows[:, 2] >= 0).nonzero()[0, 0], 1)),
    "bits past the words": lambda: changed("rows", len(plan().words), (0, 2)),
    "bits below -1": lambda: changed("rows", -2, (0, 2)),
    "rows out of order": lambda: plan()._replace(rows=plan().rows.flip(0)),
    "a query tile past the last": lambda: changed("columns", 5, (-1, 0)),
    "columns lack a tile": lambda: shorter_columns(),
    "an order repeats a tile": lambda: changed("row_order", 0),
    "an order has a tile too many": lambda: changed("column_order", 5, (0, 0)),
    "an order has a negative tile": lambda: changed("column_order", -1, (0, 0)),
    "starts of another length": lambda: plan()._replace(row_start=plan().row_start[:-1]),
    "words of 32 rows": lambda: plan()._replace(words=plan().words.view(-1, 32)),
    "words of int32": lambda: plan()._replace(words=plan().words.int()),
    "rows of int64": lambda: plan()._replace(rows=plan().rows.long()),
    "rows not contiguous": lambda: plan()._replace(rows=plan().rows.T.contiguous().T),
    "rows of two numbers": lambda: plan()._replace(rows=plan().rows[:, :2].contiguous()),
    "row_start with gaps": lambda: plan()._replace(row_start=plan().row_start.repeat_interleave(2)[::2]),
    "another Lq": lambda: plan()._replace(Lq=700),
    "another Lk": lambda: plan()._replace(Lk=10),
    "batches that are not there": lambda: plan()._replace(batches=2),
    "negative heads": lambda: plan()._replace(heads=-1),
    "heads past int32": lambda: plan()._replace(heads=2**40),
    "another tile": lambda: plan()._replace(tile=128),
    "not a tensor": lambda: plan()._replace(rows=[[0, 1, -1]]),
    "a tensor without memory": lambda: plan()._replace(words=plan().words.to("meta")),
    "a tuple of another length": lambda: tuple(plan())[:-1],
    "not a plan": lambda: None,
}


def shorter_columns() -> TilePlan:
    start = plan().column_start.clone()
    start[-1] -= 1
    return plan()._replace(columns=plan().columns[:-1].contiguous(), column_start=start)


@needs_core
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_plans_are_refused(name):
    native._C.check_plan(plan())
    with pytest.raises((ValueError, TypeError)) as refusal:
        native._C.check_plan(MALFORMED[name]())
    assert str(refusal.value)


@needs_core
@pytest.mark.parametrize("backend", ["native", "eager", "reference"])
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_plans_reach_no_backend(name, backend):
    q, wrong = torch.zeros(1, 1, 300, 8), MALFORMED[name]()
    if isinstance(wrong, TilePlan):
        with pytest.raises((ValueError, TypeError)):
            fastattn.attention(q.requires_grad_(), q, q, mask=wrong, backend=backend)


def test_plans_and_offsets_without_data():
    q = torch.zeros(1, 1, 300, 8)
    with pytest.raises(ValueError, match="mask is a plan on the meta device"):
        fastattn.attention(q, q, q, mask=plan().to("meta"))
    with pytest.raises(ValueError, match="cu_seqlens_q is on meta"):
        fastattn.attention(q, q, q, cu_seqlens_q=torch.zeros(2, dtype=torch.int32, device="meta"))


def test_masks_of_other_heads_are_refused_before_they_are_planned():
    q = torch.zeros(1, 2, 8, 4)
    for options in ({}, {"cu_seqlens_q": torch.tensor([0, 8])}):
        with pytest.raises(ValueError, match="1000000000 heads.*Hq 2"):
            fastattn.attention(q, q, q, mask=masks.bigbird(1, heads=10**9), **options)


@needs_core
def test_builder_refuses_rows_it_cannot_hold():
    def build(lo, hi, i0=0, i1=70):
        builder = native._C.PlanBuilder(1, 1, 70, 100)
        ends = (torch.tensor(x, dtype=torch.int32).view(1, 1, 1, -1) for x in (lo, hi))
        builder.add_rows([("intervals", *ends)], i0, i1)
        return builder

    assert build([3, 9], [5, 100]).finish() == (4, 3, 1)
    for lo, hi in (([-1], [5]), ([3], [101]), ([5], [3]), ([5, 0], [7, 2]), ([0, 4], [5, 9]), ([2**30], [2**31 - 1])):
        with pytest.raises(ValueError, match="sorted, disjoint and within"):
            build(lo, hi)
    refused = native._C.PlanBuilder(1, 1, 70, 100)
    with pytest.raises(ValueError, match="sorted"):
        refused.add_rows([("intervals", *torch.tensor([[5], [3]], dtype=torch.int32).view(2, 1, 1, 1, 1))], 0, 70)
    with pytest.raises(ValueError, match="missing"):
        refused.finish()
    for i0, i1 in ((64, 70), (0, 10), (0, 71), (10, 70), (70, 0), (-64, 0), (-(2**63), 2**63 - 1)):
        with pytest.raises(ValueError):
            build([0], [5], i0, i1)
    with pytest.raises(ValueError, match="missing"):
        build([0], [5], 0, 64).finish()
    with pytest.raises(ValueError, match="whole tiles"):  # which has no rows, and a tile that began before
        build([0], [5]).add_rows([("words", torch.empty(1, 1, 0, 2, dtype=torch.int64))], 70, 70)
    builder, rows = native._C.PlanBuilder(1, 1, 70, 100), torch.zeros(1, 1, 70, 2, dtype=torch.int32)
    good, one, ends = ("intervals", rows, rows), rows[..., :1], rows.flatten()
    for steps in (
        [("intervals", rows, rows[..., :1])],
        [("intervals", rows.long(), rows)],
        [("intervals", rows[:, :, :64], rows)],
        [("intervals", rows.mT.contiguous().mT, rows)],
        [("intervals", rows)],
        [("lists", one, one + 141, ends, ends)],
        [("lists", one - 1, one, ends, ends)],
        [("lists", one + 1, one, ends, ends)],
        [("lists", rows, rows, ends, ends)],
        [("lists", one, one, ends, ends[:-1])],
        [("lists", one.long(), one, ends, ends)],
        [("lists", one, one + 2, ends + 90, ends + 101)],
        [("words", rows)],
        [("words", rows.long()[..., :1])],
        [("multiples", 0, 0)],
        [("multiples", 3, 2**33)],
        [("multiples", 3, -(2**63))],
        [],
        [()],
        [good, good],
        [("complement",)],
        [good, ("unite",)],
        [good, good, ("unite", 1)],
        [good, ("nothing",)],
        ["intervals"],
    ):
        for call in (native._C.PlanBuilder(1, 1, 70, 100).add_rows, builder.count_pairs):
            with pytest.raises((ValueError, TypeError, RuntimeError)):
                call(steps, 0, 70)
    for i0, i1 in ((1, 70), (0, 71), (-64, 0), (64, 0), (0, 10), (-(2**63), 2**63 - 1)):
        with pytest.raises(ValueError):
            builder.count_pairs([("multiples", 3, 0)], i0, i1)
    for mask, threads in (
        (torch.ones(1, 1, 70, 99, dtype=torch.bool), 1),
        (torch.ones(1, 1, 70, 100, dtype=torch.bool), 0),
        (torch.ones(1, 2, 70, 100, dtype=torch.bool), 1),
    ):
        with pytest.raises((ValueError, TypeError)):
            builder.add_mask(mask, threads)
    for sizes in ((-1, 1, 5, 5), (1, 1, 2**31, 5), (2**31 - 66, 2**31 - 66, 0, 0)):
        with pytest.raises(ValueError):
            native._C.PlanBuilder(*sizes)


@needs_core
def test_rows_that_share_one_end_only():
    lo, hi = torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.tensor([7, 90], dtype=torch.int32).view(1, 2, 1, 1)
    builder = native._C.PlanBuilder(1, 2, 128, 100)
    assert builder.count_pairs([("intervals", lo, hi)], 0, 128) == 128 * 97
    assert builder.count_pairs([("intervals", lo, hi[:, :1].expand(-1, -1, 128, -1))], 0, 128) == 2 * 128 * 7
    words = torch.tensor([[1, 0], [3, 1]]).view(1, 2, 1, 2)
    assert builder.count_pairs([("words", words), ("complement",)], 0, 128) == 128 * (99 + 97)


def test_write_refuses_other_sizes():
    if native._C is None:
        pytest.skip(f"native: {native.status()}")
    builder = native._C.PlanBuilder(1, 1, 70, 100)
    builder.add_mask(masks.causal().to_dense(70, 100), 1)
    good = tuple(masks.causal().plan(70, 100))[:7]
    assert builder.finish() == tuple(len(good[at]) for at in (1, 3, 4))
    builder.write(good)
    for at, tensor in enumerate(good):
        for wrong in (torch.empty(0, dtype=tensor.dtype), tensor.double(), torch.cat((tensor, tensor, tensor[:1]))):
            with pytest.raises((ValueError, TypeError)):
                builder.write((*good[:at], wrong, *good[at + 1 :]))


@pytest.mark.parametrize("own", BUILDERS)
def test_dense_tensors_of_any_layout(own):
    """Broadcast rows and keys, strides, expanded batches, and sizes that take several blocks and threads."""
    random = torch.rand(2, 3, 1100, 700) < 0.002
    wide = torch.rand(1, 1, 128, 130 * 64) < 0.5
    for mask in (
        random,
        random.transpose(2, 3).contiguous().transpose(2, 3),
        random.transpose(0, 1),
        random[..., ::2],
        random[:1].expand(4, -1, -1, -1),
        wide,
        wide.expand(-1, 5, -1, -1),
    ):
        Lq, Lk = mask.shape[2:]
        plan = plan_from_dense(mask, Lq, Lk, native=own)
        assert torch.equal(plan.to_dense().expand(mask.shape), mask)
    assert plan.heads == 1, "expanded heads are read once"
    row, column = random[:, :, :1], random[:, :, :, :1]
    assert torch.equal(plan_from_dense(row, 200, 700, native=own).to_dense(), row.expand(-1, -1, 200, -1))
    assert torch.equal(plan_from_dense(column, 1100, 130, native=own).to_dense(), column.expand(-1, -1, -1, 130))


def test_threads_do_not_change_a_plan():
    mask = torch.rand(2, 2, 500, 1000) < 0.01
    before = torch.get_num_threads()
    plans = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        plans.append(plan_from_dense(mask, 500, 1000))
    torch.set_num_threads(before)
    for other in plans[1:]:
        assert_same_plan(plans[0], other)


@pytest.mark.parametrize("L, tiles", [(64, 1), (4096, 1), (4000, 2), (3969, 1)])
def test_equal_tiles_are_stored_once(L, tiles):
    """A causal mask has one partial tile, and one more where the end of the keys cuts it (unless it leaves one key)."""
    assert len(masks.causal().plan(L, L).words) == tiles


@pytest.mark.parametrize("Lq, Lk", [(0, 0), (0, 70), (70, 0)])
@pytest.mark.parametrize("own", BUILDERS)
def test_empty_lengths(Lq, Lk, own):
    ids_q, ids_k = torch.zeros(Lq, dtype=torch.int64), torch.zeros(Lk, dtype=torch.int64)
    for mask in (
        masks.causal(),
        ~masks.full(),
        masks.dilated(3) | masks.strided(100),
        masks.prefix(0) | masks.window(2, 2),
        masks.documents(ids_q, ids_k),
        masks.from_cu_seqlens([0, Lq], [0, Lk], causal=True),
        masks.bigbird(16) & masks.longformer(3) & masks.global_tokens([]),
        masks.key_padding([0]) | masks.key_padding(ids_k == 0),
        masks.blocks(torch.ones(-(-Lq // 16), -(-Lk // 16), dtype=torch.bool), 16) & masks.full(),
        masks.dense(torch.ones(Lq, Lk, dtype=torch.bool)),
    ):
        plan = build_plan(mask, Lq, Lk, native=own)
        assert plan.to_dense().shape == mask.to_dense(Lq, Lk).shape == (1, 1, Lq, Lk)
        assert len(plan.rows) == len(plan.columns) == 0 and mask.density(Lq, Lk) == 0
        if native._C is not None:
            native._C.check_plan(plan)
    empty = torch.zeros(1, 1, Lq, Lk, dtype=torch.bool)
    assert len(plan_from_dense(empty, Lq, Lk, native=own).rows) == 0


def test_plans_are_kept_for_the_lengths_used_last():
    mask = masks.causal()
    assert mask.plan(100, 200) is mask.plan(100, 200) is not mask.plan(100, 201)
    for n in range(100):
        mask.plan(1, n)
    assert len(mask._plans) <= 16 and mask.plan(1, 99) is mask.plan(1, 99)
    moved = mask.plan(100, 200, device="meta")
    assert moved is mask.plan(100, 200, device="meta") and moved.rows.device.type == "meta"


def test_attention_keeps_the_plan_of_its_device():
    mask, q = masks.causal() & masks.window(9, None), torch.zeros(1, 1, 20, 8, device="meta")
    plans = [
        _extras(SoftmaxTensors(q, q, q), SoftmaxParams(1.0), mask, None, None, None, None, None)[0].plan
        for _ in range(2)
    ]
    assert plans[0] is plans[1] and plans[0].rows.is_meta


def test_plans_pass_through_compile_and_pytree():
    """Twelve leaves; other documents of the same lengths compile nothing new where the sizes are equal."""
    compiled = []

    def backend(graph, example):
        compiled.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def visited(plan: TilePlan):
        return plan.rows[:, 1].sum() + plan.Lq

    first, second = (masks.documents(torch.arange(256) // n).plan(256, 256) for n in (64, 64))
    assert visited(first) == visited(second) == 4 + 256
    assert len(compiled) == 1
    leaves, tree = torch.utils._pytree.tree_flatten(first)
    assert len(leaves) == 12 and isinstance(torch.utils._pytree.tree_unflatten(leaves, tree), TilePlan)
    assert "4 runs" in repr(first)


@pytest.mark.parametrize("Lk", [2**24 + 1, 2**25 + 3, masks.algebra.MAX_LENGTH])
def test_lengths_past_the_integers_of_float32(Lk):
    assert len(masks.empty().plan(64, Lk).rows) == 0 and masks.empty().density(64, Lk) == 0
    assert masks.full().density(64, Lk) == (~masks.empty()).density(64, Lk) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of /proc/self/status")
@needs_core
@pytest.mark.parametrize(
    "L, budget_MiB, more",
    [
        (2**17, 8, "masks.documents(torch.arange(L) * 8 // L)"),
        (2**20, 64, "masks.documents(torch.arange(L) * 8 // L)"),
        # Half of the tokens are documents of their own; one document has the most intervals there are.
        (2**14, 32, "masks.documents(torch.arange(L) % 2 * torch.arange(L))"),
        (2**17, 64, "masks.documents((torch.arange(L) % 512 > 0) * torch.arange(L))"),
        (2**17, 16, "masks.bigbird(16)"),
        (2**17, 16, "~masks.strided(64)"),
        (2**17, 16, "masks.dilated(64) | masks.global_tokens(torch.arange(0, L, 1000))"),
    ],
)
def test_memory_of_building(L, budget_MiB, more):
    """Causal, a window and more, the algebra included; nothing of size Lq x Lk exists on the way."""
    code = f"""
        import torch
        from fastattn import masks

        def build(L):
            return (masks.causal() & ({more}) & masks.window(4096, None)).plan(L, L)

        def peak():
            return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

        torch.set_num_threads(1)
        build(512)
        open("/proc/self/clear_refs", "w").write("5")
        before = peak()
        plan = build({L})
        print((peak() - before) / 1024 + plan.nbytes / 2**20)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= budget_MiB


def test_plans_without_the_native_core(monkeypatch):
    expected = MASK.plan(300, 300)
    monkeypatch.setattr(native, "_missing", "not built; build it")
    monkeypatch.setattr(native, "_C", None)
    assert_same_plan(masks.from_dict(MASK.to_dict()).plan(300, 300), expected)
    assert_same_plan(plan_from_dense(MASK.to_dense(300, 300), 300, 300), expected)


def test_bits_are_unpacked_where_they_are():
    """A plan on another device is read there."""
    words = torch.zeros(3, 2, dtype=torch.int64, device="meta")
    assert unpack(words, 100).device.type == "meta"
