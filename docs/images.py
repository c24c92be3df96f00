"""Draws the pictures of docs/masks.md: `python docs/images.py [folder]`. Needs matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import numpy
import torch
from matplotlib import pyplot
from PIL import Image

from fastattn import masks

IMAGES = Path(__file__).resolve().parent / "images"
L = 512
DOCUMENTS = torch.repeat_interleave(torch.arange(4), torch.tensor([75, 200, 37, 200]))

PICTURES = {
    "causal": masks.causal(),
    "window": masks.causal() & masks.window(100, None),
    "documents": masks.causal() & masks.documents(DOCUMENTS),
    "prefix": masks.causal() | masks.prefix(150),
    "longformer": masks.longformer(50, [0, 1, 300]),
    "bigbird": masks.bigbird(32, near=1, global_blocks=1, random_blocks=2),
    "dilated": masks.dilated(12, 120),
    "neighborhood": masks.neighborhood((16, 32), 7),
}


def draw(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, mask in PICTURES.items():
        figure = mask.plot(L, L).figure
        figure.set_dpi(140)  # a token is a pixel at least
        figure.canvas.draw()
        picture = Image.fromarray(numpy.asarray(figure.canvas.buffer_rgba())).convert("RGB")
        picture.quantize(16).save(folder / f"{name}.png", optimize=True)
        pyplot.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
