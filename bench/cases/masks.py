"""Softmax attention under masks of `fastattn.masks`: against its own dense time, torch with a dense mask, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import masks
from fastattn.testing import inputs as testing_inputs
from fastattn.testing.inputs import Inputs

from .. import mask_expression
from .. import peers as everyone
from ..case import Case, Goal, Implementation, NotAvailable, installed
from . import softmax

DTYPES = softmax.DTYPES
BLOCK = 64
OVERHEAD = 0.03  # of the dense time: what a sparse call may take beyond its density
DOCUMENTS = 8
PATTERNS = ("blocks", "causal documents", "documents", "window", "prefix")


@dataclass(frozen=True)
class Problem(testing_inputs.Case):
    pattern: str = "full"  # one of PATTERNS, or an expression
    density: float = 1.0  # of blocks, where the pattern draws them


def mask_of(problem: Problem) -> masks.Mask:
    return _mask(problem.pattern, problem.Lk, problem.density)


@cache
def _mask(pattern: str, L: int, density: float) -> masks.Mask:
    if pattern == "blocks":
        return masks.blocks(_drawn(L, density), BLOCK)
    table = {
        "causal documents": lambda: masks.causal() & masks.documents(_ids(L)),
        "documents": lambda: masks.documents(_ids(L)),
        "window": lambda: masks.causal() & masks.window(1023, 0),
        "prefix": lambda: masks.causal() | masks.prefix(L // 8),
    }
    return table[pattern]() if pattern in PATTERNS else mask_expression.parse(pattern)


def _drawn(L: int, density: float) -> Tensor:
    """Which blocks are visible."""
    n = -(-L // BLOCK)
    return torch.rand(n, n, generator=testing_inputs.generator(1)) < density


def visible_share(problem: Problem) -> float:
    """Of all pairs. Errors: ValueError for lengths that the mask does not allow."""
    return _share(mask_of(problem), problem.Lq, problem.Lk)


@cache
def _share(mask: masks.Mask, Lq: int, Lk: int) -> float:
    return mask.density(Lq, Lk)


@cache
def _ids(L: int) -> Tensor:
    """Random documents, end to end."""
    cuts = torch.randperm(L - 1, generator=testing_inputs.generator(2))[: DOCUMENTS - 1] + 1
    return torch.isin(torch.arange(L), cuts).cumsum(0)


def _mask_mod(problem: Problem, device: str) -> Callable:
    """The same visibility as FlexAttention takes it."""
    L, ids = problem.Lk, _ids(problem.Lk).to(device)
    if problem.pattern == "blocks":
        drawn = mask_of(problem).visible.to(device)  # type: ignore[attr-defined]
        return lambda b, h, i, j: drawn[i // BLOCK, j // BLOCK]
    return {
        "causal documents": lambda b, h, i, j: (ids[i] == ids[j]) & (j <= i),
        "documents": lambda b, h, i, j: ids[i] == ids[j],
        "window": lambda b, h, i, j: (j <= i) & (i - j <= 1023),
        "prefix": lambda b, h, i, j: (j <= i) | (j < L // 8),
    }[problem.pattern]


def case(name: str, problem: Problem, dtype: str, baseline: str, ratio: float | None, **fields: Any) -> Case:
    backward = fields.get("backward", False)
    pairs = problem.B * problem.Hq * problem.Lq * problem.Lk
    products = 3 * problem.D + 2 * problem.head_dim_v if backward else problem.D + problem.head_dim_v
    shape = {name: getattr(problem, name) for name in ("B", "Hq", "Hk", "Lq", "Lk", "D")} | {"Dv": problem.head_dim_v}
    return Case(
        name,
        "masks",
        problem,
        dtype,
        count=lambda: 2.0 * pairs * visible_share(problem) * products,
        bytes=softmax.bytes_moved(problem, dtype, backward),
        goal=Goal(ratio),
        describe=lambda: {"shape": shape, "options": {"mask": repr(mask_of(problem))[:80]}, "against": baseline},
        extra=baseline,
        **fields,
    )


def problem(pattern: str, L: int, H: int = 4, D: int = 64, density: float = 1.0) -> Problem:
    return Problem(B=1, Hq=H, Hk=H, Lq=L, Lk=L, D=D, pattern=pattern, density=density)


def cpu_cases() -> list[Case]:
    cases = []
    for dtype in ("fp32", "bf16"):
        for backward in (False, True):
            way = "backward" if backward else "forward"
            for wanted in (1.0, 0.75, 0.5, 0.25, 0.1, 0.05):
                blocks = problem("blocks", 4096, density=wanted)
                density = _drawn(4096, wanted).double().mean().item()  # of whole blocks: that of the mask
                ratio = 1 / 1.05 if wanted == 1 else 1 / (density + OVERHEAD)
                name = f"{dtype} {way} blocks of 64, density {density:.2f}"
                cases.append(case(name, blocks, dtype, "dense", round(ratio, 3), backward=backward, presets=("masks",)))
    documents = problem("causal documents", 8192)
    for backward in (False, True):
        name = f"fp32 {'backward' if backward else 'forward'} causal & documents L8192"
        cases.append(case(name, documents, "fp32", "torch", 8.0, backward=backward, presets=("masks",)))
    for pattern, density in (("causal documents", 1.0), ("window", 1.0), ("prefix", 1.0), ("blocks", 0.25)):
        name = f"fp32 forward {pattern} L4096, vs flex"
        cases.append(case(name, problem(pattern, 4096, density=density), "fp32", "flex", 1.5, presets=("masks",)))
    return cases


def gpu_cases() -> list[Case]:
    cases = []
    for L in (8192, 16384, 32768):
        for pattern, density in (
            ("causal documents", 1.0),
            ("window", 1.0),
            ("prefix", 1.0),
            ("blocks", 0.1),
            ("blocks", 0.5),
        ):
            for backward in (False, True):
                way = "backward" if backward else "forward"
                name = f"bf16 {way} {pattern}{f' {density}' if pattern == 'blocks' else ''} L{L} D128, vs flex"
                p = problem(pattern, L, H=16, D=128, density=density)
                cases.append(case(name, p, "bf16", "flex", 1.25, backward=backward, presets=("masks",), device="cuda"))
    return cases


def ci_cases() -> list[Case]:
    fields: dict[str, Any] = {"presets": ("ci",), "peers": everyone.BACKENDS}
    return [case("fp32 forward documents H4 L512", problem("documents", 512), "fp32", "torch", None, **fields)]


CASES = (*cpu_cases(), *ci_cases(), *gpu_cases())

make, leaves, checked, pick = softmax.make, softmax.leaves, softmax.checked, softmax.pick


def golden(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    problem, device = case.problem, inputs.q.device
    visible = mask_of(problem).to_dense(problem.Lq, problem.Lk, softmax.checked_rows(problem, device))
    return softmax.golden_of(case, inputs, visible.to(device))


def peers(case: Case) -> dict[str, Callable[[], Implementation]]:
    """Everyone who can be asked for by name; made when called."""
    problem = case.problem
    others = {"dense": _dense, "torch": _torch, "flex": _flex, "natten": _natten}
    bands = {"flash_attn": everyone.flash_attn, "xformers": everyone.xformers}
    return {
        **{name: partial(make, problem) for name, make in others.items()},
        **{name: partial(_torch, problem, name) for name in everyone.TORCH_BACKENDS},
        **{name: partial(_of_band, problem, make) for name, make in bands.items()},
        **{name: partial(_backend, problem, name) for name in everyone.BACKENDS},
    }


def implementations(case: Case, backend: str = "auto", names: tuple[str, ...] = ()) -> dict[str, Implementation]:
    """Baseline first, fastattn last, between them the case's peers and those of `names`."""
    found = peers(case)
    baseline = {case.extra: found[case.extra]()}
    return everyone.together(baseline, _backend(case.problem, backend), found, (*case.peers, *names))


def _backend(problem: Problem, name: str) -> Implementation:
    """The plan is made and kept at the first call: the check."""
    options: dict[str, Any] = {"mask": mask_of(problem), "backend": name}
    return Implementation(
        lambda x: fastattn.attention(x.q, x.k, x.v, **options),
        lambda x: everyone.in_words(fastattn.explain(x.q, x.k, x.v, **options)),
    )


def _dense(problem: Problem) -> Implementation:
    """Our own time for everything: the result is that of the mask only where the mask hides nothing."""
    return Implementation(
        lambda x: fastattn.attention(x.q, x.k, x.v),
        lambda x: "fastattn, no mask",
        other=visible_share(problem) < 1,
    )


def _torch(problem: Problem, name: str | None = None) -> Implementation:
    """torch's function, or one of its backends."""

    @cache
    def visible(device: str) -> Tensor:
        return mask_of(problem).to_dense(problem.Lq, problem.Lk).to(device)

    def masked(x: Inputs) -> Inputs:
        return x._replace(mask=visible(x.q.device.type))

    whole = everyone.torch_sdpa(problem, name)
    return replace(
        whole, call=lambda x: whole.call(masked(x)), kernel=lambda x: f"{whole.kernel(masked(x))}, dense bool mask"
    )


def _of_band(problem: Problem, make: Callable[[Problem], Implementation]) -> Implementation:
    """Someone who takes the mask as a window of a softmax problem, or not at all."""
    band = _band(mask_of(problem), problem.Lk - problem.Lq)
    return everyone.unavailable("it takes no such mask") if band is None else make(replace(problem, window=band))


def _band(mask: masks.Mask, shift: int) -> tuple[int | None, int | None] | None:
    """So many tokens to the left and right of i + shift; None: no band."""
    if isinstance(mask, masks.full):
        return None, None
    if isinstance(mask, masks.causal):
        return None, 0 if mask.alignment == "bottom_right" else -shift
    if isinstance(mask, masks.window):
        return mask.left, mask.right
    if type(mask).__name__ != "And":
        return None
    parts = [_band(part, shift) for part in mask.masks]  # type: ignore[attr-defined]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    left, right = (min((side for side in sides if side is not None), default=None) for sides in zip(*known))
    return left, right


def _flex(problem: Problem) -> Implementation:
    def block_mask(x: Inputs) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        if problem.pattern not in PATTERNS:
            return mask_of(problem).to_flex(problem.Lq, problem.Lk, device=x.q.device)
        device = x.q.device.type
        return create_block_mask(_mask_mod(problem, device), None, None, problem.Lq, problem.Lk, device=device)

    return everyone.compiled_flex(block_mask)


def _natten(problem: Problem) -> Implementation:
    """Neighbourhood attention by its authors; tensors are [B, *grid, H, D]."""
    mask = mask_of(problem)

    def attend(x: Inputs) -> Tensor:
        package = installed("natten")
        if not isinstance(mask, masks.neighborhood):
            raise NotAvailable("natten computes neighborhood masks only")
        q, k, v = (t.unflatten(1, mask.grid) for t in x[:3])
        attention = getattr(package, f"na{len(mask.grid)}d")
        out = attention(q, k, v, kernel_size=mask.kernel, dilation=mask.dilation)
        return out.flatten(1, len(mask.grid))

    return Implementation(attend, lambda x: "natten package", peer=True, blhd=True)
