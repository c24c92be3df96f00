"""The attention calls of models people run, by name. Lengths are what two CPU cores, or one GPU, do in a moment."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastattn.testing.inputs import Case as Problem

from ..case import Case
from . import softmax


class Layer(NamedTuple):
    name: str
    problem: Problem
    train: bool = False  # backward as well


def layer(
    name: str, B: int, H: int, Lq: int, Lk: int, D: int, Hk: int = 0, train: bool = False, **options: Any
) -> Layer:
    return Layer(name, Problem(B=B, Hq=H, Hk=Hk or H, Lq=Lq, Lk=Lk, D=D, **options), train)


def llama3_8b(L: int) -> list[Layer]:
    return [
        layer("prefill", 1, 32, L, L, 128, Hk=8, train=True, causal="top_left"),
        layer("decode", 1, 32, 1, 4 * L, 128, Hk=8),
    ]


def gemma2_9b(L: int) -> list[Layer]:
    """Every second layer sees 4096 tokens back; logits are capped at 50."""
    made = [layer("global layer", 1, 16, L, L, 256, Hk=8, causal="top_left", softcap=50.0)]
    if L > 4096:
        window: dict[str, Any] = {"causal": "top_left", "window": (4095, 0), "softcap": 50.0}
        made.append(layer("local layer", 1, 16, L, L, 256, Hk=8, **window))
    return made


def sdxl(B: int) -> list[Layer]:
    """Image of 1024 x 1024: two of its resolutions, and what it sees of the text."""
    return [
        layer("64 x 64", B, 10, 4096, 4096, 64),
        layer("32 x 32", B, 20, 1024, 1024, 64),
        layer("64 x 64 to text", B, 10, 4096, 77, 64),
    ]


def whisper(B: int) -> list[Layer]:
    """large-v3: 30 seconds of sound are 1500 tokens, the text at most 448."""
    return [
        layer("encoder", B, 20, 1500, 1500, 64),
        layer("decoder to sound", B, 20, 448, 1500, 64),
        layer("decoder step to sound", B, 20, 1, 1500, 64),
    ]


def encoder(B: int, L: int) -> list[Layer]:
    return [layer("layer", B, 12, L, L, 64, train=True)]


MODELS: dict[str, dict[str, list[Layer]]] = {
    "llama3-8b": {"cpu": llama3_8b(2048), "cuda": llama3_8b(8192)},
    "gemma2-9b": {"cpu": gemma2_9b(2048), "cuda": gemma2_9b(8192)},
    "vit-b16": {"cpu": encoder(8, 197), "cuda": encoder(256, 197)},
    "sdxl": {"cpu": sdxl(1), "cuda": sdxl(2)},
    "whisper": {"cpu": whisper(1), "cuda": whisper(8)},
    "bert-base": {"cpu": encoder(4, 512), "cuda": encoder(64, 512)},
}


def cases() -> list[Case]:
    found = []
    for model, devices in MODELS.items():
        for device, layers in devices.items():
            peers = ("flash", "cudnn") if device == "cuda" else ()
            for name, problem, train in layers:
                for backward in (False, True) if train else (False,):
                    bound = "memory" if problem.Lq == 1 and problem.Lk > 4096 else "compute"
                    full = f"{model} {name} {'backward' if backward else 'forward'} B{problem.B} L{problem.Lk} bf16"
                    fields: dict[str, Any] = {
                        "presets": (model, "full"),
                        "device": device,
                        "peers": peers,
                        "bound": bound,
                    }
                    found.append(softmax.case(full, problem, "bf16", backward=backward, **fields))
    return found


CASES = tuple(cases())
