"""The same small language model on the same real text with two mixers: softmax attention and a gated delta net.

Nothing else differs: sizes, parameters per layer, seed, batches and optimiser are the same. Both train on the first part
of the text and are judged on the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.nn import Cache, GatedDeltaNet

from .gpt import GPT, Config, SoftmaxAttention, Trainer, encode, generate, precision, real_text, train

HELD_OUT = 0.1  # of the text, at its end
HELD_OUT_WINDOWS = 16


class DeltaAttention(nn.Module):
    """A gated delta net with as many weights in its projections as softmax attention has, 4 d_model^2."""

    def __init__(self, config: Config):
        super().__init__()
        d = config.d_model
        self.layer = GatedDeltaNet(d, max(config.heads // 2, 1), key_dim=d // 2, value_dim=d)

    def forward(self, x: Tensor, past: Cache | None) -> tuple[Tensor, Cache]:
        if past is None:
            return self.layer(x, return_cache=True)
        return self.layer.step(x, past), past


MIXERS = {"softmax": SoftmaxAttention, "gated delta net": DeltaAttention}


def compare(config: Config, progress: Callable[[str], None]) -> dict[str, Any]:
    """Train both in alternating chunks; losses, speed, and text written from a cache, as plain data."""
    data, alphabet = encode(real_text())
    seen, held_out = data.split((len(data) - int(HELD_OUT * len(data)), int(HELD_OUT * len(data))))
    runs = {name: Trainer(seen, len(alphabet), config, fastattn.patched, mixer) for name, mixer in MIXERS.items()}
    steps = train(runs, seen, config, progress)
    judged = {name: loss_of(run.model, held_out, config) for name, run in runs.items()}
    frequencies = F.cross_entropy(counts(seen, len(alphabet)).log().expand(len(held_out), -1), held_out).item()
    curves = {name: [run.losses[s - 1] for s in steps] for name, run in runs.items()}
    return {
        "config": asdict(config),
        "precision": precision(config),
        "characters": len(seen),
        "held_out_characters": len(held_out),
        "parameters": {name: sum(p.numel() for p in run.model.parameters()) for name, run in runs.items()},
        "loss": {"step": steps} | curves,
        "held_out_loss": judged | {"character frequencies": frequencies},
        "learned": all(isfinite(x) for run in runs.values() for x in run.losses)
        and all(loss < frequencies for loss in judged.values()),
        "tokens_per_second": {
            name: config.batch * config.context * config.steps / run.seconds for name, run in runs.items()
        },
        "generated": {name: write(run, seen, alphabet) for name, run in runs.items()},
    }


def counts(data: Tensor, vocabulary: int) -> Tensor:
    """How often each character occurs, and one more, so that none is impossible."""
    return torch.bincount(data, minlength=vocabulary).float() + 1


@torch.no_grad()
def loss_of(model: GPT, data: Tensor, config: Config) -> float:
    """Mean loss on windows of `data` that lie as far apart as they can."""
    starts = torch.linspace(0, len(data) - config.context - 1, HELD_OUT_WINDOWS).long()
    rows = torch.stack([data[s : s + config.context + 1] for s in starts.tolist()])
    return F.cross_entropy(model(rows[:, :-1])[0].flatten(0, 1), rows[:, 1:].flatten()).item()


@torch.no_grad()
def write(run: Trainer, data: Tensor, alphabet: str) -> dict[str, Any]:
    """Greedy text from a cache, whether a full pass picks the same characters, and how large the cache has become."""
    config, model = run.config, run.model
    prompt = data[: config.context // 4]
    count = min(config.generate, config.context - len(prompt))
    with run.attention():
        generate(model, prompt, 2)
        ids, speed = generate(model, prompt, count)
        logits, (_, kept) = model(torch.cat((prompt, torch.tensor(ids)))[None])
    picked = logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    return {
        "tokens": count,
        "agree": picked == ids,
        "tokens_per_second": speed,
        "cache_bytes": sum(t.nbytes for t in tensors(kept)),
        "text": "".join(alphabet[i] for i in ids),
    }


def tensors(kept: Any) -> list[Tensor]:
    if isinstance(kept, Tensor):
        return [kept]
    return [t for part in kept or () for t in tensors(part)]
