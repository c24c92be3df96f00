"""Cases made of the command line: --shape, --dtype, --causal, --mask, --backward."""

from __future__ import annotations

from fastattn.testing.inputs import Case as Problem

from ..case import Case
from . import masks, softmax

SIZES = "B,H,Hk,Lq,Lk,D[,Dv]"


def parse_shape(text: str) -> tuple[int, ...]:
    """Six or seven positive numbers. Errors: ValueError that names what was expected."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) not in (6, 7) or min(sizes) < 1:
        raise ValueError(f"a shape is {SIZES} in positive integers, got {text!r}")
    if sizes[1] % sizes[2]:
        raise ValueError(f"H must be a multiple of Hk, got {sizes[1]} and {sizes[2]}")
    return sizes


def cases(
    shapes: list[tuple[int, ...]], dtypes: list[str], causal: str | None, mask: str | None, backward: bool, device: str
) -> list[Case]:
    """One per shape and dtype. Errors: ValueError for a mask that is no expression or does not fit a shape."""
    return [_case(shape, dtype, causal, mask, backward, device) for shape in shapes for dtype in dtypes]


def _case(
    shape: tuple[int, ...], dtype: str, causal: str | None, mask: str | None, backward: bool, device: str
) -> Case:
    sizes = dict(zip(("B", "Hq", "Hk", "Lq", "Lk", "D", "Dv"), shape))
    words = [dtype, "backward" if backward else "forward", _sizes_in_words(sizes)]
    if mask is None:
        problem = Problem(**sizes, causal=causal or False)  # type: ignore[arg-type]
        bound = "memory" if problem.Lq == 1 and not backward else "compute"
        name = " ".join([*words, *([f"causal {causal}".removesuffix(" top_left")] if causal else [])])
        return softmax.case(name, problem, dtype, backward=backward, device=device, bound=bound, presets=())
    masked = masks.Problem(**sizes, pattern=mask)  # type: ignore[arg-type]
    if masks.mask_of(masked).shape != (1, 1):
        raise ValueError("a mask that differs between batches or heads cannot be timed here")
    masks.visible_share(masked)  # refuses lengths
    name = " ".join([*words, mask])
    return masks.case(name, masked, dtype, "torch", None, backward=backward, device=device, presets=())


def _sizes_in_words(sizes: dict[str, int]) -> str:
    """B1 H8 Hk2 L1024 D64: what is equal to its fellow goes without saying."""
    words = [f"B{sizes['B']}", f"H{sizes['Hq']}"]
    words += [f"Hk{sizes['Hk']}"] if sizes["Hk"] != sizes["Hq"] else []
    words += [f"L{sizes['Lk']}"] if sizes["Lq"] == sizes["Lk"] else [f"Lq{sizes['Lq']}", f"Lk{sizes['Lk']}"]
    words += [f"D{sizes['D']}"] + ([f"Dv{sizes['Dv']}"] if "Dv" in sizes else [])
    return " ".join(words)
