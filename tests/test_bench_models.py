"""The language models of the bench: both sides learn, write the same, and a wrong attention is noticed."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager

import torch

import fastattn
from fastattn.bench import gpt, lm, table
from fastattn.bench.session import failed


def test_gpt_learns_the_same_with_both_and_generates_the_same():
    config = gpt.Config(layers=1, heads=2, d_model=32, context=32, batch=2, steps=2, chunk=1, generate=8)
    lines = []
    report = gpt.compare(config, fastattn.patched, lines.append)
    assert report["loss_agrees"] and report["loss_max_difference"] < 1e-4
    assert report["loss"]["step"] == [1, 2]
    assert all(math.isfinite(loss) for name in ("torch", "fastattn") for loss in report["loss"][name])
    assert report["generated"]["agree"] and len(report["generated"]["text"]) == 8
    assert all(speed > 0 for speed in report["tokens_per_second"].values()) and lines
    assert json.loads(json.dumps(report)) == report
    table.gpt(report)


def test_gpt_curves_are_judged_early_by_step_and_later_by_running_mean():
    torch_losses = [4.0 - 0.01 * i for i in range(60)]
    noisy = [loss + (0.015 if i > 30 and i % 2 else 0.0) for i, loss in enumerate(torch_losses)]
    assert gpt.difference(torch_losses, noisy, autocast=False)["loss_agrees"]
    early = [torch_losses[0] + 1e-3, *torch_losses[1:]]
    late = [loss + (0.03 if i > 30 else 0.0) for i, loss in enumerate(torch_losses)]
    lost = [*torch_losses[:-1], float("nan")]
    for losses in (early, late, lost):
        assert not gpt.difference(torch_losses, losses, autocast=False)["loss_agrees"]


def test_gpt_cache_gives_the_tokens_of_a_full_pass():
    config = gpt.Config(layers=2, heads=2, d_model=32, context=48)
    torch.manual_seed(0)
    model, prompt = gpt.GPT(config, 50), torch.randint(50, (20,))
    cached, _ = gpt.generate(model, prompt, 10)
    ids = prompt.tolist()
    with torch.no_grad():
        for _ in range(10):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    assert cached == ids[20:]


def test_gpt_notices_a_wrong_attention(monkeypatch):
    honest = torch.nn.functional.scaled_dot_product_attention

    @contextmanager
    def broken():
        def not_causal(q, k, v, is_causal):
            return honest(q, k, v)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", not_causal)
        yield
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", honest)

    config = gpt.Config(layers=1, heads=2, d_model=32, context=64, batch=4, steps=10, chunk=5, generate=8)
    report = gpt.compare(config, broken, lambda line: None)
    assert failed({"results": [], "memory": None, "lm": None, "gpt": [report]})


def test_language_models_learn_with_both_mixers_and_write_from_their_caches():
    config = gpt.Config(layers=1, heads=4, d_model=32, context=64, batch=8, steps=60, chunk=20, warmup=5, generate=8)
    lines = []
    report = lm.compare(config, lines.append)
    assert len(lines) == 3 and report["loss"]["step"] == [1, 20, 40, 60]
    assert report["learned"] and max(report["held_out_loss"].values()) < report["loss"]["softmax"][0]
    softmax_size, delta_size = report["parameters"].values()
    assert abs(delta_size / softmax_size - 1) < 0.05
    for written in report["generated"].values():
        assert written["agree"] and len(written["text"]) == 8
    assert report["generated"]["softmax"]["cache_bytes"] == 2 * 24 * 32 * 4
    assert json.loads(json.dumps(report)) == report
    table.lm(report)
    empty = {"results": [], "memory": None, "gpt": []}
    assert not failed(empty | {"lm": report}) and failed(empty | {"lm": report | {"learned": False}})
    report["generated"]["softmax"]["agree"] = False
    assert failed(empty | {"lm": report})
