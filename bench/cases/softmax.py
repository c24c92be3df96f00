"""Softmax attention: shapes, options, FLOPs, bytes, goals, peers. No timing code."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.testing import inputs as testing_inputs
from fastattn.testing.inputs import Case as Problem
from fastattn.testing.inputs import Inputs

from ..case import Case, Goal, Implementation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NO_GOAL = Goal()
GOLDEN_SCORES = 1 << 24  # fp64 scores the check may form at once; more heads than fit are left out
DECODE_COPIES_BYTES = 256 << 20  # rotate this much K and V, so that no cache holds the next call's

torch_attention = F.scaled_dot_product_attention  # bound here: fastattn.enable() must not reach the baseline


def visible_pairs(problem: Problem) -> int:
    """Visible (query, key) pairs over all batches and heads."""
    shift = problem.Lk - problem.Lq
    left, right = problem.window or (None, None)
    lo = None if left is None else shift - left
    hi = None if right is None else shift + right
    if problem.causal:
        diagonal = 0 if problem.causal == "top_left" else shift
        hi = diagonal if hi is None else min(hi, diagonal)
    if problem.mask is not None:
        assert problem.mask == "qk" and lo is None and hi is None, "count these pairs first"
        pairs = int(testing_inputs.random_mask((problem.Lq, problem.Lk), seed=4).sum())
    else:
        i = torch.arange(problem.Lq)
        first = torch.zeros_like(i) if lo is None else (i + lo).clamp(min=0)
        last = torch.full_like(i, problem.Lk - 1) if hi is None else (i + hi).clamp(max=problem.Lk - 1)
        pairs = int((last - first + 1).clamp(min=0).sum())
    return problem.B * problem.Hq * pairs


def flops(problem: Problem, backward: bool) -> float:
    """Two products per visible pair forward; five backward, which recomputes the scores."""
    D, Dv = problem.D, problem.head_dim_v
    return 2.0 * visible_pairs(problem) * ((3 * D + 2 * Dv) if backward else (D + Dv))


def bytes_moved(problem: Problem, dtype: str, backward: bool) -> float:
    """Every tensor once: q, k, v, out; backward also dout, dq, dk, dv. A bool mask has one byte per pair."""
    size = DTYPES[dtype].itemsize
    queries = problem.B * problem.Hq * problem.Lq
    keys = problem.B * problem.Hk * problem.Lk
    elements = (queries + keys) * (problem.D + problem.head_dim_v)
    mask = problem.Lq * problem.Lk if problem.mask else 0
    output = queries * problem.head_dim_v
    return float(size * ((2 * elements + output) if backward else elements) + mask)


def case(name: str, problem: Problem, dtype: str, goal: Goal = NO_GOAL, **fields: Any) -> Case:
    backward = fields.get("backward", False)
    B, Hq, Hk, Lq, Lk, D = problem.B, problem.Hq, problem.Hk, problem.Lq, problem.Lk, problem.D
    shape = {"B": B, "Hq": Hq, "Hk": Hk, "Lq": Lq, "Lk": Lk, "D": D, "Dv": problem.head_dim_v}
    options = {"causal": problem.causal, "window": problem.window, "mask": problem.mask}
    return Case(
        name,
        "softmax",
        problem,
        dtype,
        flops=flops(problem, backward),
        bytes=bytes_moved(problem, dtype, backward),
        goal=goal,
        details={"shape": shape, "options": options},
        **fields,
    )


def square(L: int, B: int = 1, H: int = 8, D: int = 64, **options: Any) -> Problem:
    return Problem(B=B, Hq=H, Hk=H, Lq=L, Lk=L, D=D, **options)


def decode(Hk: int) -> Problem:
    return Problem(B=1, Hq=32, Hk=Hk, Lq=1, Lk=8192, D=128)


FULL, CAUSAL = square(2048), square(2048, causal="top_left")
FULL_1024, CAUSAL_1024 = square(1024), square(1024, causal="top_left")
WINDOW = square(2048, causal="top_left", window=(255, 0))
RANDOM_MASK = square(1024, mask="qk")
QUICK = ("cpu", "quick")


def cpu_cases() -> list[Case]:
    """The table of goals on two CPU cores."""
    short = square(128, B=8, H=12)
    tiny = Problem(B=1, Hq=8, Hk=8, Lq=1, Lk=64, D=64)
    one_head = square(1024, H=1, causal="top_left")
    return [
        case("fp32 forward full", FULL, "fp32", Goal(1.22, 0.85), presets=QUICK),
        case("fp32 forward causal", CAUSAL, "fp32", Goal(1.5, 0.80), presets=QUICK),
        case("bf16 forward full", FULL, "bf16", Goal(2.2, 0.73), presets=QUICK),
        case("bf16 forward causal", CAUSAL, "bf16", Goal(2.7, 0.70), presets=QUICK),
        case("bf16 forward causal D128", square(2048, D=128, causal="top_left"), "bf16", Goal(2.6, 0.78)),
        case("fp16 forward causal", CAUSAL, "fp16", Goal(2.1)),
        case("fp32 backward full L1024", FULL_1024, "fp32", Goal(1.2, 0.80), backward=True),
        case("fp32 backward causal L1024", CAUSAL_1024, "fp32", Goal(1.8, 0.72), backward=True, presets=QUICK),
        case("bf16 backward causal L1024", CAUSAL_1024, "bf16", Goal(2.1, 0.60), backward=True, presets=QUICK),
        case("fp16 backward H4 L512", square(512, H=4), "fp16", Goal(11), backward=True),
        case("fp32 window 256", WINDOW, "fp32", Goal(6), presets=QUICK),
        case("bf16 window 256", WINDOW, "bf16", Goal(6)),
        case("fp32 random mask L1024", RANDOM_MASK, "fp32", Goal(1.2)),
        case("bf16 random mask L1024", RANDOM_MASK, "bf16", Goal(2), presets=QUICK),
        case("fp32 decode 32 kv heads", decode(32), "fp32", Goal(1.9, 0.90), bound="memory"),
        case("fp32 decode 4 kv heads", decode(4), "fp32", Goal(4.5, 0.90), bound="memory", presets=QUICK),
        case("bf16 decode 32 kv heads", decode(32), "bf16", Goal(6.5, 0.85), bound="memory"),
        case("bf16 decode 4 kv heads", decode(4), "bf16", Goal(40, 0.85), bound="memory", presets=QUICK),
        case("fp32 forward B8 H12 L128", short, "fp32", Goal(1.5)),
        case("bf16 forward B8 H12 L128", short, "bf16", Goal(2.2)),
        case("fp32 tiny Lq1 Lk64", tiny, "fp32", Goal(slower_by_us=5), presets=QUICK),
        case("fp32 backward H1, 1 -> 2 threads", one_head, "fp32", Goal(1.8), backward=True, extra="threads"),
    ]


def gpu_cases() -> list[Case]:
    """16k tokens, hidden size 2048: the grid of the flash-attention papers."""
    cases = []
    for D in (64, 128, 256):
        for causal in (False, "top_left"):
            for backward in (False, True):
                for L in (512, 1024, 2048, 4096, 8192, 16384):
                    direction = "backward" if backward else "forward"
                    name = f"bf16 {direction} {'causal' if causal else 'full'} D{D} L{L}"
                    problem = square(L, B=16384 // L, H=2048 // D, D=D, causal=causal)
                    cases.append(case(name, problem, "bf16", backward=backward, presets=("gpu",), device="cuda"))
    return cases


CASES = (*cpu_cases(), *gpu_cases())


def make(case: Case) -> list[Inputs]:
    """The inputs, in as many copies as the calls have to rotate through."""
    made = testing_inputs.make(case.problem, DTYPES[case.dtype], device=case.device)
    if case.backward:
        made = made._replace(**{name: getattr(made, name).requires_grad_() for name in ("q", "k", "v")})
    if case.bound != "memory":
        return [made]
    copies = 1 + round(DECODE_COPIES_BYTES / case.bytes)
    return [made] + [made._replace(k=made.k.clone(), v=made.v.clone()) for _ in range(copies - 1)]


def leaves(inputs: Inputs) -> dict[str, Tensor]:
    return {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v}


def _kv_heads(problem: Problem) -> list[int]:
    """kv heads of the first batch that the check looks at: evenly spread, the last one included."""
    group = problem.Hq // problem.Hk
    count = max(1, min(problem.Hk, GOLDEN_SCORES // (group * problem.Lq * problem.Lk)))
    return [problem.Hk - 1 - i * problem.Hk // count for i in range(count)]


def pick(case: Case, name: str, result: Tensor) -> Tensor:
    """The part of a result that `golden` has computed."""
    problem, heads = case.problem, _kv_heads(case.problem)
    if name in ("out", "dq"):
        group = problem.Hq // problem.Hk
        heads = [h * group + g for h in heads for g in range(group)]
    return result[-1:, heads]


def golden(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """out, or dq, dk, dv, in fp64 by the dense reference, for some heads of the last batch."""
    q, k, v = (pick(case, n, t).detach().double().requires_grad_(case.backward) for n, t in leaves(inputs).items())
    options = {"causal": case.problem.causal, "window": case.problem.window}
    out = fastattn.attention(q, k, v, mask=inputs.mask, backend="reference", **options)
    if not case.backward:
        return {"out": out}
    grads = torch.autograd.grad(out, (q, k, v), pick(case, "out", inputs.dout).double())
    return dict(zip(("dq", "dk", "dv"), grads))


def implementations(case: Case, backend: str = "auto") -> dict[str, Implementation]:
    """Baseline first. `backend` other than auto times that one of fastattn's backends."""
    ours = _fastattn(case.problem, backend)
    if case.extra == "threads":
        return {"1 thread": replace(ours, threads=1), "fastattn": replace(ours, threads=2)}
    peers = {"torch": _torch(case.problem)}
    if case.device == "cuda":
        peers |= {name: _torch(case.problem, name) for name in ("cudnn", "flash", "efficient", "math")}
        peers["flex"] = _flex(case.problem)
    return peers | {"fastattn": ours}


def _fastattn(problem: Problem, backend: str) -> Implementation:
    """The drop-in wherever its signature can say it, else `fastattn.attention`."""
    options: dict[str, Any] = {"causal": problem.causal, "window": problem.window, "backend": backend}

    def kernel(x: Inputs) -> str:
        explanation = fastattn.explain(x.q, x.k, x.v, mask=x.mask, **options)
        return f"{explanation.chosen}: {explanation.kernel}"

    if backend != "auto" or problem.window is not None or problem.causal == "bottom_right":
        return Implementation(lambda x: fastattn.attention(x.q, x.k, x.v, mask=x.mask, **options), kernel)
    dropin, causal, gqa = fastattn.scaled_dot_product_attention, bool(problem.causal), problem.Hq != problem.Hk
    return Implementation(lambda x: dropin(x.q, x.k, x.v, attn_mask=x.mask, is_causal=causal, enable_gqa=gqa), kernel)


@cache
def _band_mask(Lq: int, Lk: int, left: int, right: int, device: str) -> Tensor:
    """A window as torch has to be given it: a dense bool mask."""
    offset = torch.arange(Lk, device=device)[None, :] - torch.arange(Lq, device=device)[:, None] - (Lk - Lq)
    return (offset >= -left) & (offset <= right)


def _torch(problem: Problem, backend: str | None = None) -> Implementation:
    causal, gqa = bool(problem.causal), problem.Hq != problem.Hk

    def attend(x: Inputs) -> Tensor:
        if problem.window is None:
            return torch_attention(x.q, x.k, x.v, attn_mask=x.mask, is_causal=causal, enable_gqa=gqa)
        band = _band_mask(problem.Lq, problem.Lk, *problem.window, x.q.device.type)
        return torch_attention(x.q, x.k, x.v, attn_mask=band, enable_gqa=gqa)

    if backend is None:
        return Implementation(attend, lambda x: "torch's choice", peer=True)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }

    def attend_by_name(x: Inputs) -> Tensor:
        with sdpa_kernel(names[backend]):
            return attend(x)

    return Implementation(attend_by_name, lambda x: f"torch {backend}", peer=True)


def _flex(problem: Problem) -> Implementation:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # beyond eight shapes it would stop compiling and run unfused
    compiled = torch.compile(flex_attention, dynamic=False)
    plans: dict[str, Any] = {}

    def visible(b, h, i, j):
        return j <= i

    def attend(x: Inputs) -> Tensor:
        if problem.causal and "causal" not in plans:
            plans["causal"] = create_block_mask(visible, None, None, problem.Lq, problem.Lk, device=x.q.device)
        return compiled(x.q, x.k, x.v, block_mask=plans.get("causal"))

    return Implementation(attend, lambda x: "compiled FlexAttention", peer=True)
