"""A small GPT on real text, trained with torch's SDPA and with fastattn from the same seed: the drop-in on real input.

The model is plain torch and knows only `F.scaled_dot_product_attention`; `fastattn.patched()` is the whole difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from math import isfinite
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = tuple[int, list[Any]]  # tokens seen, and what each layer keeps of them
REPORT_EVERY = 20
EARLY_STEPS, WINDOW = 10, 20
# Nats allowed between the curves, by autocast: (any early step, mean of any window later, when rounding is amplified).
LOSS_AGREES = {False: (1e-4, 0.01), True: (2e-3, 0.03)}


@dataclass(frozen=True)
class Config:
    layers: int = 2
    heads: int = 4
    d_model: int = 128
    context: int = 512
    batch: int = 4
    steps: int = 200
    chunk: int = 10  # steps of one implementation before the other has its turn
    learning_rate: float = 4e-3
    warmup: int = 20
    generate: int = 64
    seed: int = 0
    autocast: bool = False  # bf16


CONFIGS = (Config(), Config(autocast=True))


def precision(config: Config) -> str:
    return "bf16 autocast" if config.autocast else "fp32"


class SoftmaxAttention(nn.Module):
    """Causal self-attention with a K/V cache."""

    def __init__(self, config: Config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.project = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        B, L, _ = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, L, D]
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.project(a.transpose(1, 2).reshape(B, L, -1)), (k, v)


Mixer = Callable[[Config], nn.Module]  # of a module whose call takes (x, past or None) and returns (out, past)


class Block(nn.Module):
    def __init__(self, config: Config, mixer: Mixer):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(config.d_model), nn.LayerNorm(config.d_model)
        self.attention = mixer(config)
        self.mlp = nn.Sequential(
            nn.Linear(config.d_model, 4 * config.d_model), nn.GELU(), nn.Linear(4 * config.d_model, config.d_model)
        )

    def forward(self, x: Tensor, past: Any) -> tuple[Tensor, Any]:
        a, past = self.attention(self.norm_attention(x), past)
        x = x + a
        return x + self.mlp(self.norm_mlp(x)), past


class GPT(nn.Module):
    def __init__(self, config: Config, vocabulary: int, mixer: Mixer = SoftmaxAttention):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, config.d_model)
        self.positions = nn.Embedding(config.context, config.d_model)
        self.blocks = nn.ModuleList(Block(config, mixer) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Logits and the cache to pass on; with a cache, `ids` is the one token that follows it."""
        start, past = cache or (0, [None] * len(self.blocks))
        end = start + ids.shape[1]
        x = self.tokens(ids) + self.positions(torch.arange(start, end))
        kept = []
        for block, seen in zip(self.blocks, past):
            x, seen = block(x, seen)
            kept.append(seen)
        return F.linear(self.norm(x), self.tokens.weight), (end, kept)


def real_text() -> str:
    """The language reference that ships with CPython, without its layout: about 400 kB."""
    from pydoc_data.topics import topics

    return " ".join(word for name in sorted(topics) for word in topics[name].split())


def encode(text: str) -> tuple[Tensor, str]:
    """Character ids and the alphabet they index."""
    alphabet = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(alphabet)}
    return torch.tensor([index[character] for character in text]), alphabet


def batches(data: Tensor, config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(config.seed)
    while True:
        starts = torch.randint(len(data) - config.context - 1, (config.batch,), generator=generator)
        rows = torch.stack([data[s : s + config.context + 1] for s in starts.tolist()])
        yield rows[:, :-1], rows[:, 1:]


class Trainer:
    """One training run that can be advanced a few steps at a time."""

    def __init__(
        self, data: Tensor, vocabulary: int, config: Config, attention: Callable[[], AbstractContextManager],
        mixer: Mixer = SoftmaxAttention,
    ):  # fmt: skip
        torch.manual_seed(config.seed)
        self.config, self.attention = config, attention
        self.model = GPT(config, vocabulary, mixer)
        for parameter in self.model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate, fused=True)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.05, total_iters=config.warmup)
        self.batches = batches(data, config)
        self.losses: list[float] = []
        self.seconds = 0.0

    def advance(self, steps: int) -> None:
        work = [next(self.batches) for _ in range(steps)]
        with self.attention():
            start = perf_counter()
            for ids, targets in work:
                with torch.autocast("cpu", torch.bfloat16, enabled=self.config.autocast):
                    logits, _ = self.model(ids)
                loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
                self.losses.append(loss.item())
            self.seconds += perf_counter() - start


@torch.no_grad()
def generate(model: GPT, prompt: Tensor, count: int) -> tuple[list[int], float]:
    """Greedy continuation with a cache, and tokens per second."""
    start = perf_counter()
    logits, cache = model(prompt[None])
    ids: list[int] = []
    for _ in range(count):
        ids.append(int(logits[0, -1].argmax()))
        logits, cache = model(torch.tensor([ids[-1:]]), cache)
    return ids, count / (perf_counter() - start)


def difference(a: list[float], b: list[float], autocast: bool) -> dict[str, Any]:
    """How far two loss curves are apart: step by step, in the first steps, and as running means."""
    gaps = [abs(x - y) for x, y in zip(a, b)]
    windows = [(a[i : i + WINDOW], b[i : i + WINDOW]) for i in range(max(1, len(a) - WINDOW + 1))]
    early = max(gaps[:EARLY_STEPS])
    smooth = max(abs(fmean(x) - fmean(y)) for x, y in windows)
    allowed_early, allowed_smooth = LOSS_AGREES[autocast]
    return {
        "loss_max_difference": max(gaps),
        "loss_max_difference_early": early,
        "loss_max_difference_smooth": smooth,
        "loss_agrees": all(isfinite(x) for x in a + b) and early <= allowed_early and smooth <= allowed_smooth,
    }


def train(runs: dict[str, Trainer], data: Tensor, config: Config, progress: Callable[[str], None]) -> list[int]:
    """All runs to the end, in alternating chunks; the steps whose losses a report shows."""
    for run in runs.values():  # both start warm; the weights do not move
        ids, targets = next(batches(data, config))
        with run.attention():
            F.cross_entropy(run.model(ids)[0].flatten(0, 1), targets.flatten()).backward()
    for done in range(0, config.steps, config.chunk):
        step = min(done + config.chunk, config.steps)
        for name in list(runs) if done // config.chunk % 2 == 0 else list(runs)[::-1]:
            runs[name].advance(step - done)
        if step % REPORT_EVERY == 0 or step == config.steps:
            losses = "  ".join(f"{name} {run.losses[-1]:.4f}" for name, run in runs.items())
            progress(f"  step {step:4d}  loss: {losses}")
    return [s for s in range(1, config.steps + 1) if s in (1, config.steps) or s % REPORT_EVERY == 0]


def compare(config: Config, attention: Callable[[], AbstractContextManager], progress=print) -> dict[str, Any]:
    """Train twice in alternating chunks, then generate from the same weights with both; the report as plain data."""
    data, alphabet = encode(real_text())
    runs = {
        "torch": Trainer(data, len(alphabet), config, nullcontext),
        "fastattn": Trainer(data, len(alphabet), config, attention),
    }
    steps = train(runs, data, config, progress)
    tokens = config.batch * config.context * config.steps
    curves = runs["torch"].losses, runs["fastattn"].losses

    model, prompt = runs["torch"].model, data[: config.context // 4]
    count = min(config.generate, config.context - len(prompt))
    written = {}
    for name, run in runs.items():
        with run.attention():
            generate(model, prompt, 2)
            written[name] = generate(model, prompt, count)
    continuation = "".join(alphabet[i] for i in written["fastattn"][0])
    return {
        "config": asdict(config),
        "precision": precision(config),
        "characters": len(data),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": {"step": steps} | {name: [run.losses[s - 1] for s in steps] for name, run in runs.items()},
        **difference(*curves, config.autocast),
        "tokens_per_second": {name: tokens / run.seconds for name, run in runs.items()},
        "speedup": runs["torch"].seconds / runs["fastattn"].seconds,
        "generated": {
            "tokens": count,
            "agree": written["torch"][0] == written["fastattn"][0],
            "tokens_per_second": {name: speed for name, (_, speed) in written.items()},
            "text": continuation,
        },
    }
