"""Linear attention: shapes, variants, FLOPs, bytes, goals, peers. No timing code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.testing.inputs import randn

from .. import peers as everyone
from ..case import Case, Goal, Implementation, NotAvailable, installed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NO_GOAL = Goal()
SOFTMAX_ONLY = (*everyone.TORCH_BACKENDS, "flex", "flash_attn", "xformers", "entmax", "natten")
STEP_COPIES_BYTES = 256 << 20  # rotate this much state, so that no cache holds the next call's
SHORT = 2048  # length that the cost per token of long sequences is held against


@dataclass(frozen=True)
class Problem:
    B: int
    H: int
    L: int
    D: int
    variant: str  # a key of VARIANTS

    @property
    def options(self) -> dict[str, Any]:
        return {"feature_map": VARIANTS[self.variant].feature_map}


class Variant(NamedTuple):
    feature_map: str = "identity"
    decay: str = ""  # "", "scalar" or "vector"
    beta: bool = False


VARIANTS = {
    "elu1": Variant("elu1"),
    "scalar decay": Variant(decay="scalar"),
    "vector decay": Variant(decay="vector"),
    "delta": Variant(beta=True),
    "gated delta": Variant(decay="scalar", beta=True),
}


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    decay: Tensor | None = None
    beta: Tensor | None = None
    state: fastattn.LinearState | None = None  # of a step


def flops(problem: Problem, backward: bool) -> float:
    """Of the recurrence: the state's update and its read-out, its decay, the delta rule's prediction; three such scans backward."""
    variant = VARIANTS[problem.variant]
    state = problem.B * problem.H * problem.L * problem.D**2
    forward = 4 + bool(variant.decay) + 2 * variant.beta
    return float(state * (3 * forward if backward else forward))


def bytes_moved(problem: Problem, dtype: str, backward: bool) -> float:
    """q, k, v and out once; backward also dout, dq, dk, dv. Gates of channels are float32."""
    tokens = problem.B * problem.H * problem.L
    gates = {"": 0, "scalar": 4, "vector": 4 * problem.D}[VARIANTS[problem.variant].decay]
    elements = 4 * problem.D * DTYPES[dtype].itemsize
    return float(tokens * ((2 * elements + 2 * gates) if backward else elements + gates))


def case(name: str, problem: Problem, dtype: str, baseline: str, goal: Goal = NO_GOAL, **fields: Any) -> Case:
    backward = fields.get("backward", False)
    shape = {"B": problem.B, "H": problem.H, "L": problem.L, "D": problem.D}
    work = flops(problem, backward) + (flops(problem, False) if fields.get("with_forward") else 0)
    return Case(
        name,
        "linear",
        problem,
        dtype,
        count=lambda: work,
        bytes=fields.pop("bytes", bytes_moved(problem, dtype, backward)),
        goal=goal,
        presets=fields.pop("presets", ("linear",)),
        describe=lambda: {"shape": shape, "options": {"variant": problem.variant}},
        extra=baseline,
        **fields,
    )


def step(variant: str) -> Case:
    """One token: the state is read and written."""
    problem = Problem(1, 32, 1, 128, variant)
    size = 2 * 4.0 * problem.H * problem.D**2
    return case(
        f"step {variant}, 32 heads D128", problem, "fp32", "eager", Goal(of_peak=0.7), bound="update", bytes=size
    )


NOTHING: dict[str, Any] = {}


def cpu_cases() -> list[Case]:
    both: dict[str, Any] = {"backward": True, "with_forward": True}
    long = Problem(1, 8, 4096, 64, "elu1")
    cases = [
        case("elu1 forward L4096, vs eager", long, "fp32", "eager", Goal(4, 0.4)),
        case("elu1 forward+backward L4096, vs eager", long, "fp32", "eager", Goal(3, 0.4), **both),
        case("elu1 backward within 3 forwards", long, "fp32", "4 forwards", Goal(1), **both),
    ]
    for L, D in ((512, 64), (1024, 128)):
        problem = Problem(1, 8, L, D, "elu1")
        for fields in NOTHING, both:
            way = "forward+backward" if fields else "forward"
            name = f"elu1 {way} L{L} D{D}, vs own softmax"
            cases.append(case(name, problem, "fp32", "softmax", Goal(1, 0.4), **fields))
    for L, ratio in ((128, 1), (512, 1.7), (2048, 6), (8192, 25)):
        cases.append(case(f"elu1 forward L{L}, vs torch", Problem(1, 8, L, 64, "elu1"), "fp32", "torch", Goal(ratio)))
    for name, baseline in (("32 times L2048", "short"), ("its tokens as L2048", "cut")):
        longest = Problem(1, 8, 65536, 64, "elu1")
        cases.append(case(f"elu1 forward L65536, vs {name}", longest, "fp32", baseline, Goal(0.9)))
    cases += [step(variant) for variant in ("elu1", "gated delta")]
    for variant in ("scalar decay", "vector decay", "delta", "gated delta"):
        for fields in NOTHING, both:
            name = f"{variant} {'forward+backward' if fields else 'forward'} L4096, vs eager"
            cases.append(case(name, Problem(1, 8, 4096, 64, variant), "fp32", "eager", **fields))
        name = f"{variant} backward within 3 forwards"
        cases.append(case(name, Problem(1, 8, 4096, 64, variant), "fp32", "4 forwards", Goal(1), **both))
    cases.append(case("elu1 forward L4096 bf16, vs eager", long, "bf16", "eager"))
    return cases


def gpu_cases() -> list[Case]:
    """The shapes that flash-linear-attention's authors publish; theirs is the baseline where it is installed."""
    cases = []
    for variant in ("scalar decay", "vector decay", "gated delta"):
        for B, L, H in ((1, 2048, 32), (1, 8192, 32), (1, 32768, 32)):
            for backward in (False, True):
                way = "forward+backward" if backward else "forward"
                name = f"bf16 {variant} {way} B{B} L{L} H{H} D128, vs fla"
                goal = Goal(1.2 if backward else 1.15)
                fields = {"backward": backward, "with_forward": backward}
                problem = Problem(B, H, L, 128, variant)
                cases.append(case(name, problem, "bf16", "fla", goal, device="cuda", **fields))
    return cases


def ci_cases() -> list[Case]:
    problem = Problem(1, 4, 512, 64, "elu1")
    return [case("elu1 forward H4 L512", problem, "fp32", "eager", presets=("ci",), peers=everyone.BACKENDS)]


CASES = (*cpu_cases(), *ci_cases(), *gpu_cases())


def make(case: Case) -> list[Inputs]:
    """The inputs, in as many copies as the calls have to rotate through."""
    p, variant, dtype, device = case.problem, VARIANTS[case.problem.variant], DTYPES[case.dtype], case.device
    shape = (p.B, p.H, p.L, p.D)
    q, k, v, dout = (randn(shape, dtype, seed, device, device) for seed in range(4))
    decay = beta = None
    if variant.beta:
        k = F.normalize(k, dim=-1)
        beta = randn(shape[:3], torch.float32, 5, device).sigmoid()
    if variant.decay:
        decay = F.logsigmoid(randn(shape if variant.decay == "vector" else shape[:3], torch.float32, 6, device) + 2)
    made = Inputs(q, k, v, dout, decay, beta)
    if case.backward:
        made = made._replace(**{n: t.requires_grad_() for n, t in _differentiable(made).items()})
    if case.bound != "update":
        return [made]
    copies = 1 + round(STEP_COPIES_BYTES / case.bytes)
    kv, z = randn((p.B, p.H, p.D, p.D), torch.float32, 7), randn(shape[:2] + (p.D,), torch.float32, 8).abs()
    states = [fastattn.LinearState(kv.clone(), None if variant.beta else z.clone()) for _ in range(copies)]
    return [made._replace(state=state) for state in states]


def _differentiable(inputs: Inputs) -> dict[str, Any]:
    return {n: t for n in ("q", "k", "v", "decay", "beta") if (t := getattr(inputs, n)) is not None}


def leaves(inputs: Inputs) -> dict[str, Tensor]:
    return {f"d{name}": t for name, t in _differentiable(inputs).items()}


def checked(case: Case, inputs: Inputs) -> Inputs:
    """What the check computes with: as it is, `golden` has all rows of its head."""
    return inputs


def pick(case: Case, name: str, result: Tensor) -> Tensor:
    """The part of a result that `golden` has computed: the last head."""
    return result[-1:, -1:]


def golden(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """In fp64 by the eager backend, which the tests hold to the definition, token by token."""
    exact: dict[str, Any] = {
        n: t[-1:, -1:].detach().double().requires_grad_(case.backward) for n, t in _differentiable(inputs).items()
    }
    if inputs.state is not None:
        exact["initial_state"] = tuple(None if t is None else t[-1:, -1:].double() for t in inputs.state)
    out = fastattn.linear_attention(**exact, **case.problem.options, backend="eager")
    if not case.backward:
        return {"out": out}
    grads = torch.autograd.grad(out, tuple(exact.values()), inputs.dout[-1:, -1:].double())
    return dict(zip((f"d{name}" for name in exact), grads))


def peers(case: Case) -> dict[str, Callable[[], Implementation]]:
    """Everyone who can be asked for by name; made when called."""
    problem = case.problem
    if case.bound == "update":
        return {name: partial(_step, problem, name) for name in everyone.BACKENDS}
    return {
        "softmax": partial(_softmax, fastattn.attention, "fastattn.attention, causal"),
        "torch": partial(_softmax, _torch_causal, "torch's choice, causal softmax"),
        "fla": partial(_fla, problem),
        **{name: partial(_linear, problem, name) for name in everyone.BACKENDS},
    }


def implementations(case: Case, backend: str = "auto", names: tuple[str, ...] = ()) -> dict[str, Implementation]:
    """Baseline first, fastattn last, between them the case's peers and those of `names`."""
    problem, found = case.problem, peers(case)
    parts = {
        "4 forwards": partial(_repeated, problem, backend, 4, problem.L),
        "short": partial(_repeated, problem, backend, problem.L // SHORT, SHORT),
        "cut": partial(_cut, problem, backend),
    }
    baseline = {case.extra: (found | parts)[case.extra]()}
    ours = _step(problem, backend) if case.bound == "update" else _linear(problem, backend)
    return everyone.together(baseline, ours, found, (*case.peers, *names), SOFTMAX_ONLY)


def _call(inputs: Inputs, problem: Problem, backend: str) -> Tensor:
    q, k, v, _, decay, beta, _ = inputs
    return fastattn.linear_attention(q, k, v, decay=decay, beta=beta, **problem.options, backend=backend)


def _kernel(inputs: Inputs, problem: Problem, backend: str) -> str:
    q, k, v, _, decay, beta, _ = inputs
    options = {"decay": decay, "beta": beta, **problem.options, "backend": backend}
    return everyone.in_words(fastattn.explain_linear(q, k, v, **options))


def _linear(problem: Problem, backend: str) -> Implementation:
    return Implementation(lambda x: _call(x, problem, backend), lambda x: _kernel(x, problem, backend))


def _repeated(problem: Problem, backend: str, times: int, L: int) -> Implementation:
    """Forward passes over the first L tokens."""

    def run(x: Inputs) -> None:
        cut = x._replace(**{n: t[:, :, :L] for n, t in _differentiable(x).items()})
        for _ in range(times):
            _call(cut, problem, backend)

    return Implementation(run, lambda x: f"fastattn, {times} forwards of L {L}", other=True, timed=run)


def _cut(problem: Problem, backend: str) -> Implementation:
    """All tokens as sequences of SHORT: the same memory, read and written once. Of equal heads, without gates."""

    def run(x: Inputs) -> None:
        p = problem
        short = {n: t.view(p.B * p.H, p.L // SHORT, SHORT, p.D) for n, t in _differentiable(x).items()}
        _call(x._replace(**short), problem, backend)

    return Implementation(run, lambda x: f"fastattn, sequences of L {SHORT}", other=True, timed=run)


def _softmax(attend: Callable[..., Tensor], words: str) -> Implementation:
    return Implementation(lambda x: attend(x.q, x.k, x.v, causal=True), lambda x: words, other=True)


def _torch_causal(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return everyone.torch_attention(q, k, v, is_causal=causal)


def _step(problem: Problem, backend: str) -> Implementation:
    def run(x: Inputs) -> Tensor:
        assert x.state is not None
        options = {"decay": x.decay, "beta": x.beta, **problem.options}
        return fastattn.linear_attention_step(x.q, x.k, x.v, x.state, **options, backend=backend)

    def once(x: Inputs) -> Tensor:
        assert x.state is not None
        kv, z = x.state
        return run(x._replace(state=fastattn.LinearState(kv.clone(), None if z is None else z.clone())))

    return Implementation(once, lambda x: _kernel(x, problem, backend), timed=run)


def _fla(problem: Problem) -> Implementation:
    """flash-linear-attention's chunked op for the variant."""

    def run(x: Inputs) -> Tensor:
        if problem.variant not in ("scalar decay", "vector decay", "gated delta"):
            raise NotAvailable(f"this bench has no call of fla for {problem.variant}")
        q, k, v, _, g, beta, _ = x
        if beta is not None:
            out, _ = installed("fla.ops.gated_delta_rule").chunk_gated_delta_rule(q, k, v, g=g, beta=beta)
        elif problem.variant == "vector decay":
            out, _ = installed("fla.ops.gla").chunk_gla(q, k, v, g)
        else:
            out, _ = installed("fla.ops.simple_gla").chunk_simple_gla(q, k, v, g)
        return out

    return Implementation(run, lambda x: "flash-linear-attention", peer=True, blhd=True)
