"""Softmax attention: shapes, options, FLOPs, bytes, goals, peers. No timing code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.testing import inputs as testing_inputs
from fastattn.testing.inputs import Case as Problem
from fastattn.testing.inputs import Inputs

from .. import peers as everyone
from ..case import Case, Goal, Implementation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NO_GOAL = Goal()
GOLDEN_SCORES = 1 << 24  # fp64 scores the check may form at once; more heads than fit are left out, then rows
DECODE_COPIES_BYTES = 256 << 20  # rotate this much K and V, so that no cache holds the next call's


def visible_pairs(problem: Problem) -> int:
    """Visible (query, key) pairs over all batches and heads."""
    lo, hi = everyone.band(problem)
    if problem.mask is not None:
        assert problem.mask in ("qk", "1k") and lo is None and hi is None, "count these pairs first"
        mask = testing_inputs.random_mask(problem.sizes(problem.mask), seed=4)
        pairs = int(mask.sum()) * problem.Lq * problem.Lk // mask.numel()
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
    """Every tensor once: q, k, v, out; backward also dout, dq, dk, dv. A bool mask has one byte per element."""
    size = DTYPES[dtype].itemsize
    queries = problem.B * problem.Hq * problem.Lq
    keys = problem.B * problem.Hk * problem.Lk
    elements = (queries + keys) * (problem.D + problem.head_dim_v)
    mask = prod(problem.sizes(problem.mask)) if problem.mask else 0
    output = queries * problem.head_dim_v
    return float(size * ((2 * elements + output) if backward else elements) + mask)


def case(name: str, problem: Problem, dtype: str, goal: Goal = NO_GOAL, **fields: Any) -> Case:
    backward = fields.get("backward", False)
    B, Hq, Hk, Lq, Lk, D = problem.B, problem.Hq, problem.Hk, problem.Lq, problem.Lk, problem.D
    shape = {"B": B, "Hq": Hq, "Hk": Hk, "Lq": Lq, "Lk": Lk, "D": D, "Dv": problem.head_dim_v}
    options = {"causal": problem.causal, "window": problem.window, "mask": problem.mask, "softcap": problem.softcap}
    return Case(
        name,
        "softmax",
        problem,
        dtype,
        count=lambda: flops(problem, backward),
        bytes=bytes_moved(problem, dtype, backward),
        goal=goal,
        describe=lambda: {"shape": shape, "options": options},
        **fields,
    )


def square(L: int, B: int = 1, H: int = 8, D: int = 64, **options: Any) -> Problem:
    return Problem(B=B, Hq=H, Hk=H, Lq=L, Lk=L, D=D, **options)


def decode(Hk: int, Lk: int = 8192, B: int = 1) -> Problem:
    return Problem(B=B, Hq=32, Hk=Hk, Lq=1, Lk=Lk, D=128)


FULL, CAUSAL = square(2048), square(2048, causal="top_left")
FULL_1024, CAUSAL_1024 = square(1024), square(1024, causal="top_left")
WINDOW = square(2048, causal="top_left", window=(255, 0))
RANDOM_MASK = square(1024, mask="qk")
QUICK = ("cpu", "quick")
DECODE = ("cpu", "decode")


def cpu_cases() -> list[Case]:
    """The table of goals on two CPU cores."""
    short = square(128, B=8, H=12)
    tiny = Problem(B=1, Hq=8, Hk=8, Lq=1, Lk=64, D=64)
    masked = Problem(B=1, Hq=8, Hk=8, Lq=1, Lk=1024, D=64, mask="1k")
    layer = square(64, H=4, causal="top_left", layout="blhd")  # of a small model, as its projection lays it out
    shortest = square(16, B=64)
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
        case("fp32 decode 32 kv heads", decode(32), "fp32", Goal(1.9, 0.90), bound="memory", presets=DECODE),
        case("fp32 decode 4 kv heads", decode(4), "fp32", Goal(4.5, 0.90), bound="memory", presets=(*QUICK, "decode")),
        case("bf16 decode 32 kv heads", decode(32), "bf16", Goal(6.5, 0.85), bound="memory", presets=DECODE),
        case("bf16 decode 4 kv heads", decode(4), "bf16", Goal(40, 0.85), bound="memory", presets=(*QUICK, "decode")),
        case("fp32 forward B8 H12 L128", short, "fp32", Goal(1.5)),
        case("bf16 forward B8 H12 L128", short, "bf16", Goal(2.2)),
        case("fp32 tiny Lq1 Lk64", tiny, "fp32", Goal(slower_by_us=5), presets=QUICK),
        case("fp32 decode with a mask of keys", masked, "fp32", Goal(1.0), bound="memory", presets=DECODE),
        case("fp32 small forward H4 L64", layer, "fp32", Goal(1.0)),
        case("fp32 small backward H4 L64", layer, "fp32", Goal(1.0), backward=True),
        case("fp32 short forward B64 H8 L16", shortest, "fp32", Goal(1.0)),
        case("fp32 short backward B64 H8 L16", shortest, "fp32", Goal(1.0), backward=True),
        case("fp32 backward H1, 1 -> 2 threads", one_head, "fp32", Goal(1.8), backward=True, extra="threads"),
    ]


def ci_cases() -> list[Case]:
    """Small, every backend and torch's own: for a machine that stores and compares what it measures."""
    names = (*everyone.BACKENDS, "math")
    cases = []
    for dtype in ("fp32", "bf16"):
        for backward in (False, True):
            name = f"{dtype} {'backward' if backward else 'forward'} causal H4 L256"
            problem = square(256, H=4, causal="top_left")
            cases.append(case(name, problem, dtype, backward=backward, presets=("ci",), peers=names))
    return cases


def sweep_cases() -> list[Case]:
    """The same call at growing lengths, and one token against growing caches."""
    cases = []
    for dtype in ("fp32", "bf16"):
        for backward in (False, True):
            for L in (256, 512, 1024, 2048, 4096):
                name = f"{dtype} {'backward' if backward else 'forward'} causal H8 L{L}"
                problem = square(L, causal="top_left")
                cases.append(case(name, problem, dtype, backward=backward, presets=("full",)))
        for Lk in (1024, 4096, 16384, 32768):
            name = f"{dtype} decode 8 kv heads Lk{Lk}"
            cases.append(case(name, decode(8, Lk), dtype, bound="memory", presets=("decode",)))
    return cases


LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LONG, SHORT = 4096, 1024  # where the goals of long sequences begin, and those of short ones end
FLEX_LENGTHS = (4096, 16384)  # compiling it takes seconds a shape
MATH_LONGEST = 2048  # it keeps every score
GPU_BACKENDS = tuple(name for name in everyone.BACKENDS if name not in ("native", "eager", "reference"))

# (goal, must) of long sequences in 16 bits by (direction, D, causal); ratios are to cuDNN.
GPU_GOALS = {
    ("forward", 64, False): (Goal(of_peak=0.62), Goal(of_peak=0.54)),
    ("forward", 64, "top_left"): (Goal(of_peak=0.58), Goal(of_peak=0.48)),
    ("forward", 128, False): (Goal(1.05, 0.84, against="cudnn"), Goal(0.97, 0.75, against="cudnn")),
    ("forward", 128, "top_left"): (Goal(1.2, 0.85, against="cudnn"), Goal(1.05, 0.70, against="cudnn")),
    ("forward", 256, False): (Goal(of_peak=0.90), Goal(of_peak=0.70)),
    ("backward", 128, False): (Goal(1.08, 0.70, against="cudnn"), Goal(0.95, 0.58, against="cudnn")),
    ("backward", 128, "top_left"): (Goal(1.08, 0.66, against="cudnn"), Goal(0.95, 0.50, against="cudnn")),
}
SHORT_FORWARD = (Goal(1.0, against="cudnn"), Goal(0.9, against="cudnn"))
TRITON_GOALS = {"forward": (Goal(of_peak=0.75), Goal(of_peak=0.58)), "backward": (NO_GOAL, Goal(of_peak=0.35))}


def gpu_cases() -> list[Case]:
    """16k tokens, hidden size 2048: the grid of the flash-attention papers; and one token against caches of 64 MiB on."""
    cases = []
    for D, causal, backward, L in product((64, 128, 256), (False, "top_left"), (False, True), LENGTHS):
        direction = "backward" if backward else "forward"
        goals = GPU_GOALS.get((direction, D, causal), (NO_GOAL, NO_GOAL)) if L >= LONG else (NO_GOAL, NO_GOAL)
        if L <= SHORT and not backward:
            goals = SHORT_FORWARD
        names = ("cudnn", "flash", "efficient", *GPU_BACKENDS)
        names += ("math",) * (L <= MATH_LONGEST) + ("flex",) * (L in FLEX_LENGTHS)
        problem = square(L, B=16384 // L, H=2048 // D, D=D, causal=causal)
        name = f"bf16 {direction} {'causal' if causal else 'full'} D{D} L{L}"
        cases.append(gpu_case(name, problem, goals, names, backward=backward))
    for direction, goals in TRITON_GOALS.items():
        problem, backward = square(8192, B=2, H=16, D=128), direction == "backward"
        cases.append(gpu_case(f"bf16 {direction} by Triton", problem, goals, (), backward=backward, extra="triton"))
    problem, goals = square(8192, B=2, H=16, D=128), (Goal(0.9, against="flash"), NO_GOAL)
    cases.append(gpu_case("bf16 forward by portable CUDA", problem, goals, ("flash",), extra="portable"))
    for B, Lk in ((1, 16384), (1, 65536), (16, 8192)):
        goals = Goal(of_peak=0.92), Goal(of_peak=0.85)
        peers = ("cudnn", "flash", *GPU_BACKENDS)
        cases.append(gpu_case(f"bf16 decode B{B} Lk{Lk}", decode(8, Lk, B), goals, peers, bound="memory"))
    return cases


def gpu_case(name: str, problem: Problem, goals: tuple[Goal, Goal], names: Sequence[str], **fields: Any) -> Case:
    goal, must = goals
    presets = ("gpu", "decode") if fields.get("bound") == "memory" else ("gpu",)
    return case(name, problem, "bf16", goal, must=must, peers=tuple(names), device="cuda", presets=presets, **fields)


CASES = (*cpu_cases(), *ci_cases(), *sweep_cases(), *gpu_cases())


def make(case: Case) -> list[Inputs]:
    """The inputs, in as many copies as the calls have to rotate through."""
    made = testing_inputs.make(case.problem, DTYPES[case.dtype], device=case.device, drawn_on=case.device)
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


def checked_rows(problem: Problem, device: torch.device) -> Tensor | None:
    """Query rows that the check looks at, drawn at random with the last one among them; None: all."""
    count = max(1, GOLDEN_SCORES // (problem.Hq // problem.Hk * problem.Lk))
    if count >= problem.Lq:
        return None
    drawn = torch.randperm(problem.Lq - 1, generator=testing_inputs.generator(9))[: count - 1]
    return torch.cat((drawn, torch.tensor([problem.Lq - 1]))).sort().values.to(device)


def checked(case: Case, inputs: Inputs) -> Inputs:
    """What the check computes with: gradients come from the rows that `golden` has and from no other."""
    rows = checked_rows(case.problem, inputs.dout.device)
    if rows is None:
        return inputs
    return inputs._replace(dout=torch.zeros_like(inputs.dout).index_copy_(2, rows, inputs.dout[:, :, rows]))


def pick(case: Case, name: str, result: Tensor) -> Tensor:
    """The part of a result that `golden` has computed."""
    problem, heads = case.problem, _kv_heads(case.problem)
    if name not in ("out", "dq"):
        return result[-1:, heads]
    group, rows = problem.Hq // problem.Hk, checked_rows(problem, result.device)
    found = result[-1:, [h * group + g for h in heads for g in range(group)]]
    return found if rows is None else found[:, :, rows]


def golden(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """out, or dq, dk, dv, in fp64 by the dense reference, for some heads of the last batch, and rows where they are long."""
    rows = checked_rows(case.problem, inputs.q.device)
    return golden_of(case, inputs, everyone.visible(case.problem, inputs, rows))


def golden_of(case: Case, inputs: Inputs, visible: Tensor | None) -> dict[str, Tensor]:
    """`golden`, where those rows see the pairs of `visible`."""
    q, k, v = (pick(case, n, t).detach().double().requires_grad_(case.backward) for n, t in leaves(inputs).items())
    out = fastattn.attention(q, k, v, mask=visible, softcap=case.problem.softcap, backend="reference")
    if not case.backward:
        return {"out": out}
    grads = torch.autograd.grad(out, (q, k, v), pick(case, "out", inputs.dout).double())
    return dict(zip(("dq", "dk", "dv"), grads))


def peers(case: Case) -> dict[str, Callable[[], Implementation]]:
    """Everyone who can be asked for by name; made when called."""
    return everyone.of_softmax(case.problem)


def implementations(case: Case, backend: str = "auto", names: tuple[str, ...] = ()) -> dict[str, Implementation]:
    """Baseline first, fastattn last, between them the case's peers and those of `names`.

    `backend` other than auto holds fastattn to that one.
    """
    if case.extra == "portable":
        ours = everyone.portable(case.problem)
    else:
        ours = everyone.backend(case.problem, case.extra if case.extra in everyone.BACKENDS else backend)
    if case.extra == "threads":
        return {"1 thread": replace(ours, threads=1), "fastattn": replace(ours, threads=2)}
    baseline = {"torch": everyone.torch_sdpa(case.problem)}
    return everyone.together(baseline, ours, peers(case), (*case.peers, *names), ("natten",))
