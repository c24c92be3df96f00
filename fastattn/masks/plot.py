"""Pictures of masks: text for small sizes, matplotlib for any. matplotlib is imported when a picture is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor

from . import data
from .plan import TilePlan
from .plan_torch import of_slice
from .rows import TILE, text, unpack, visible_keys

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .algebra import Mask

PICTURE_LIMIT = 128
TOKEN_LIMIT = 512  # up to here single pairs are drawn inside partial tiles
TILE_LIMIT = 4096
EMPTY, HIDDEN, VISIBLE, FULL = range(4)
COLOURS = ("#ffffff", "#fde8c8", "#f0932b", "#1f5fa8")
LABELS = ("empty tile", "partial tile, hidden", "partial tile, visible", "full tile")


def picture(mask: Mask, Lq: int, Lk: int, batch: int, head: int) -> str:
    if max(Lq, Lk) > PICTURE_LIMIT:
        raise ValueError(f"a text picture takes lengths up to {PICTURE_LIMIT}, got {Lq} x {Lk}; use plot")
    visible = mask.to_dense(Lq, Lk)[_slice(mask, batch, head)]
    return text(visible)


def plot(mask: Mask, Lq: int, Lk: int, batch: int, head: int, ax: Optional[Axes]) -> Axes:
    try:
        from matplotlib import pyplot
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError(f"plot needs matplotlib: pip install 'fastattn[plot]' ({error})") from None
    at, plan = _slice(mask, batch, head), mask.plan(Lq, Lk)
    if max(Lq, Lk) > TILE_LIMIT * TILE:
        raise ValueError(f"plot takes lengths up to {TILE_LIMIT * TILE}, got {Lq} x {Lk}")
    image = _image(plan, plan.tiles()[at], by_token=max(Lq, Lk) <= TOKEN_LIMIT)
    if ax is None:
        ax = pyplot.subplots(figsize=(4.8, 4.8), layout="constrained")[1]
    if image.numel():
        ax.imshow(
            image.tolist(),
            cmap=ListedColormap(COLOURS),
            vmin=0,
            vmax=FULL,
            extent=(0, Lk, Lq, 0),
            interpolation="nearest",
        )
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    ax.set_title(f"{mask!r}\ndensity {_density(mask, Lq, Lk, *at):.3g}", fontsize=9, wrap=True)
    drawn = image.unique().tolist()
    handles = [Patch(facecolor=COLOURS[kind], edgecolor="#999999", label=LABELS[kind]) for kind in drawn]
    ax.legend(handles=handles, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4, frameon=False)
    return ax


def _slice(mask: Mask, batch: int, head: int) -> tuple[int, int]:
    for name, index, size in zip(("batch", "head"), (batch, head), mask.shape):
        if data.whole(name, index, 0) >= size:
            raise ValueError(f"{name} must be in 0 .. {size - 1}, got {index}" if size else f"the mask has no {name}")
    return batch, head


def _density(mask: Mask, Lq: int, Lk: int, batch: int, head: int) -> float:
    """The visible share of the pairs of one slice."""
    visible = 0
    with data.plainly():
        for i0, i1, rows in mask._stretches(Lq, Lk):
            own = of_slice(rows, batch, head, 0, i1 - i0)
            visible += visible_keys(own) * ((i1 - i0) // len(own[0]))
    return visible / max(Lq * Lk, 1)


def _image(plan: TilePlan, kinds: Tensor, by_token: bool) -> Tensor:
    """EMPTY .. FULL for each tile, or for each pair."""
    image = torch.where(kinds == -1, FULL, torch.where(kinds >= 0, VISIBLE, EMPTY))
    if not by_token:
        return image
    image = image.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    for t, k in (kinds >= 0).nonzero().tolist():
        visible = unpack(plan.words[kinds[t, k]][:, None], TILE)
        image[t * TILE : t * TILE + TILE, k * TILE : k * TILE + TILE] = torch.where(visible, VISIBLE, HIDDEN)
    return image[: plan.Lq, : plan.Lk]
