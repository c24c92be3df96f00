"""The bench judges others, so it is judged first: what is wrong is caught, what is counted is counted right."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from time import sleep

import pytest
import torch

import fastattn
from fastattn.bench import __main__ as cli
from fastattn.bench import environment, gpt, lm, memory, runner, table
from fastattn.bench.case import Goal, Implementation
from fastattn.bench.cases import all_cases, softmax
from fastattn.testing.inputs import Case as Problem
from fastattn.testing.timing import Samples, interleave, ratio

SMALL = Problem(B=1, Hq=2, Hk=2, Lq=24, Lk=24, D=16, causal="top_left")


def small_case(**fields):
    return softmax.case("small", SMALL, "fp32", Goal(ratio=1e-6), **fields)


@pytest.fixture
def one_small_case(monkeypatch):
    """The bench knows nothing but one tiny case; yields a function that replaces our implementation of it."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(cli, "all_cases", lambda: [small_case(presets=("quick",))])
    honest = softmax.implementations

    def replace_ours(call):
        def implementations(case, backend="auto"):
            return honest(case, "eager") | {"fastattn": Implementation(call)}

        monkeypatch.setattr(softmax, "implementations", implementations)

    yield replace_ours
    torch.set_num_threads(threads)


def run_bench(path, *arguments):
    code = cli.main(["run", "--preset", "quick", "--rounds", "2", "--json", str(path), *arguments])
    return code, json.loads(path.read_text())


def wrong_mask(x):
    """Off by one key: the error is in few entries and small in most."""
    return fastattn.attention(x.q, x.k, x.v, window=(None, 1), backend="eager")


def wrong_slightly(x):
    return fastattn.attention(x.q, x.k, x.v, causal=True, backend="eager") * (1 + 1e-4)


def wrong_nan(x):
    return fastattn.attention(x.q, x.k, x.v, causal=True, backend="eager") / 0


def wrong_shape(x):
    return fastattn.attention(x.q, x.k, x.v, causal=True, backend="eager")[:, :, :-1]


def wrong_crash(x):
    raise IndexError("out of range")


@pytest.mark.parametrize("call", [wrong_mask, wrong_slightly, wrong_nan, wrong_shape, wrong_crash])
def test_a_wrong_implementation_gets_no_number_and_exit_code_1(one_small_case, tmp_path, capsys, call):
    one_small_case(call)
    code, report = run_bench(tmp_path / "run.json")
    assert code == 1
    ours, theirs = (report["results"][0]["implementations"][name] for name in ("fastattn", "torch"))
    assert ours["status"] == "wrong" and ours["reason"] and ours["ms"] is None and ours["rate"] is None
    assert theirs["status"] == "ok" and theirs["ms"]["median"] > 0
    assert report["results"][0]["ratio"] is None and report["results"][0]["ratio_met"] is False
    assert "WRONG, not timed: small: fastattn" in capsys.readouterr().out


def test_unsupported_is_not_available_and_not_an_error(one_small_case, tmp_path, capsys):
    def refuse(x):
        raise fastattn.UnsupportedError("no kernel for this")

    one_small_case(refuse)
    code, report = run_bench(tmp_path / "run.json")
    assert code == 0
    assert report["results"][0]["implementations"]["fastattn"]["status"] == "n/a"
    assert "n/a: UnsupportedError: no kernel for this" in capsys.readouterr().out


def test_a_wrong_gradient_is_caught():
    def half_gradient(x):
        out = fastattn.attention(x.q, x.k, x.v, causal=True, backend="eager")
        return out * 0.5 + out.detach() * 0.5

    case = small_case(backward=True)
    honest = softmax.implementations(case, "eager")
    outcomes = runner.check(case, honest | {"half": Implementation(half_gradient)})
    assert [outcome.status for outcome in outcomes.values()] == ["ok", "ok", "wrong"]
    assert outcomes["half"].reason


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("backward", [False, True])
def test_right_implementations_pass(backend, backward):
    for problem in (SMALL, replace(SMALL, causal=False, mask="qk"), replace(SMALL, window=(3, 0), Hq=4)):
        case = softmax.case("small", problem, "bf16", backward=backward)
        outcomes = runner.check(case, softmax.implementations(case, backend))
        assert [outcome.status for outcome in outcomes.values()] == ["ok", "ok"], outcomes
        assert outcomes["fastattn"].kernel.startswith(backend)


def test_json_has_schema_environment_and_results(one_small_case, tmp_path):
    one_small_case(lambda x: fastattn.attention(x.q, x.k, x.v, causal=True, backend="eager"))
    code, report = run_bench(tmp_path / "run.json", "--threads", "1")
    assert code == 0 and report["schema_version"] == runner.SCHEMA_VERSION
    assert report["arguments"]["preset"] == "quick" and report["seconds"] > 0
    env = report["environment"]
    assert env["versions"]["torch"] == torch.__version__ and env["threads"] == 1
    assert {"model", "cores", "isa", "flags"} <= env["cpu"].keys() and isinstance(env["warnings"], list)
    assert environment.lines(env)
    (result,) = report["results"]
    assert result["case"] == "small" and result["shape"]["Lq"] == 24 and result["options"]["causal"] == "top_left"
    assert result["baseline"] == "torch" and result["unit"] == "GFLOP/s" and result["ratio_met"] is True
    ours = result["implementations"]["fastattn"]
    assert ours["ms"]["p20"] <= ours["ms"]["median"] <= ours["ms"]["p80"] and ours["ms"]["rounds"] == 2
    assert ours["rate"] == pytest.approx(result["flops"] / ours["ms"]["median"] * 1e-6)
    assert ours["error_vs_baseline"] > 0 and ours["max_error"] > 0


def test_flops_count_visible_pairs_only():
    full = Problem(B=2, Hq=4, Hk=2, Lq=32, Lk=48, D=16, Dv=24)
    assert softmax.flops(full, backward=False) == 2 * 2 * 4 * 32 * 48 * (16 + 24)
    assert softmax.flops(full, backward=True) == 2 * 2 * 4 * 32 * 48 * (3 * 16 + 2 * 24)
    equal = Problem(B=1, Hq=1, Hk=1, Lq=64, Lk=64, D=16)
    assert softmax.flops(equal, backward=True) == 2.5 * softmax.flops(equal, backward=False)


@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize("window", [None, (5, 0), (0, 3), (None, 2), (2, None), (100, 100)])
@pytest.mark.parametrize("lengths", [(16, 16), (7, 19), (19, 7), (1, 8)])
def test_visible_pairs_are_those_the_reference_sees(causal, window, lengths):
    Lq, Lk = lengths
    problem = Problem(B=1, Hq=1, Hk=1, Lq=Lq, Lk=Lk, D=1, causal=causal, window=window)
    # With q = 0 every visible key weighs the same, so exp(lse) counts them.
    zeros, keys = torch.zeros(1, 1, Lq, 1), torch.ones(1, 1, Lk, 1)
    _, lse = fastattn.attention(zeros, keys, keys, causal=causal, window=window, return_lse=True, backend="reference")
    assert softmax.visible_pairs(problem) == round(float(lse.exp().sum()))


def test_random_mask_flops_count_the_mask_of_the_inputs():
    problem = Problem(B=2, Hq=2, Hk=2, Lq=20, Lk=30, D=8, mask="qk")
    made = softmax.make(softmax.case("m", problem, "fp32"))[0]
    assert softmax.visible_pairs(problem) == 4 * int(made.mask.sum())


def test_bytes_are_every_tensor_once():
    decode = Problem(B=1, Hq=32, Hk=4, Lq=1, Lk=8192, D=128)
    assert softmax.bytes_moved(decode, "bf16", backward=False) == 2 * (2 * 4 * 8192 * 128 + 2 * 32 * 128)
    square = Problem(B=1, Hq=2, Hk=2, Lq=8, Lk=8, D=4)
    tensor = 2 * 8 * 4 * 4
    assert softmax.bytes_moved(square, "fp32", backward=False) == 4 * tensor
    assert softmax.bytes_moved(square, "fp32", backward=True) == 9 * tensor  # q k v out, dout, dq dk dv: out read


def test_memory_bound_cases_rotate_through_more_than_any_cache():
    case = softmax.case("d", softmax.decode(4), "bf16", bound="memory")
    copies = softmax.make(case)
    assert len({copy.k.data_ptr() for copy in copies}) == len(copies) > 1
    assert sum(copy.k.nbytes + copy.v.nbytes for copy in copies) >= softmax.DECODE_COPIES_BYTES


# The goals this project has set itself: (ratio to torch, share of peak, microseconds allowed over torch).
GOALS = {
    "fp32 forward full": (1.22, 0.85, None),
    "fp32 forward causal": (1.5, 0.80, None),
    "bf16 forward full": (2.2, 0.73, None),
    "bf16 forward causal": (2.7, 0.70, None),
    "bf16 forward causal D128": (2.6, 0.78, None),
    "fp16 forward causal": (2.1, None, None),
    "fp32 backward full L1024": (1.2, 0.80, None),
    "fp32 backward causal L1024": (1.8, 0.72, None),
    "bf16 backward causal L1024": (2.1, 0.60, None),
    "fp16 backward H4 L512": (11, None, None),
    "fp32 window 256": (6, None, None),
    "bf16 window 256": (6, None, None),
    "fp32 random mask L1024": (1.2, None, None),
    "bf16 random mask L1024": (2, None, None),
    "fp32 decode 32 kv heads": (1.9, 0.90, None),
    "fp32 decode 4 kv heads": (4.5, 0.90, None),
    "bf16 decode 32 kv heads": (6.5, 0.85, None),
    "bf16 decode 4 kv heads": (40, 0.85, None),
    "fp32 forward B8 H12 L128": (1.5, None, None),
    "bf16 forward B8 H12 L128": (2.2, None, None),
    "fp32 tiny Lq1 Lk64": (None, None, 5),
    "fp32 backward H1, 1 -> 2 threads": (1.8, None, None),
}


def test_every_goal_is_in_the_cpu_preset():
    goals = {c.name: (c.goal.ratio, c.goal.of_peak, c.goal.slower_by_us) for c in all_cases() if "cpu" in c.presets}
    assert goals == GOALS


def test_case_names_are_unique_and_list_shows_them(capsys):
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert cli.main(["list", "--preset", "quick", "--case", "decode"]) == 0
    printed = capsys.readouterr().out
    assert "bf16 decode 4 kv heads" in printed and "forward" not in printed


def test_a_run_that_cannot_be_says_why(capsys, monkeypatch):
    assert cli.main(["run", "--case", "no such case"]) == 2
    assert "no such case" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["run", "--preset", "gpu"]) == 2
    assert "n/a: preset gpu needs a CUDA device" in capsys.readouterr().out


def test_goals_are_judged_by_ratio_difference_and_peak():
    def result(goal, base, ours, roof):
        outcomes = {
            "torch": runner.Outcome("ok", samples=Samples((base,) * 3)),
            "fastattn": runner.Outcome("ok", samples=Samples((ours,) * 3)),
        }
        return runner.Result(softmax.case("x", SMALL, "fp32", goal), outcomes, roof)

    rate = softmax.flops(SMALL, False) * 1e-9  # GFLOP/s of a call that takes one second
    met = result(Goal(ratio=2.0, of_peak=0.5), 2.0, 1.0, 2 * rate)
    assert met.ratio_met() is True and met.peak_met() is True
    missed = result(Goal(ratio=2.1, of_peak=0.51), 2.0, 1.0, 2 * rate)
    assert missed.ratio_met() is False and missed.peak_met() is False
    assert result(Goal(slower_by_us=5), 1e-6, 5.9e-6, None).ratio_met() is True
    assert result(Goal(slower_by_us=5), 1e-6, 6.1e-6, None).ratio_met() is False
    table.speed([met, missed], runner.Peaks())


def test_interleaving_pairs_rounds_and_alternates_order():
    order = []

    def call(name):
        order.append(name)
        sleep(2e-3)  # long enough not to be repeated within a sample

    samples = interleave({name: partial(call, name) for name in "ab"}, rounds=4)
    assert [len(s.seconds) for s in samples.values()] == [4, 4]
    assert "".join(order[-8:]) == "abbaabba"
    paired = ratio(Samples((2.0, 4.0, 9.0)), Samples((1.0, 2.0, 3.0)))
    assert paired.seconds == (2.0, 2.0, 3.0) and paired.median == 2.0
    assert Samples((1.0, 2.0, 3.0, 4.0, 5.0)).quantile(0.25) == 2.0


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
    assert cli.failed({"results": [], "memory": None, "lm": None, "gpt": [report]})


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
    assert not cli.failed(empty | {"lm": report}) and cli.failed(empty | {"lm": report | {"learned": False}})
    report["generated"]["softmax"]["agree"] = False
    assert cli.failed(empty | {"lm": report})


def test_memory_of_a_long_call_is_measured_in_its_own_process():
    report = memory.measure(timeout=60, threads=1, backend="eager", length=1024)
    assert report["status"] == "ok", report
    assert report["results_bytes"] == 4 * 1024 * 64 * 2 and report["scores_bytes"] == 2 * 1024**2
    assert report["extra_bytes"] >= 0 and report["seconds"] > 0
    table.memory(report)
    late = memory.measure(timeout=0.01, threads=1)
    assert late["status"] == "n/a" and "took more than" in late["reason"]
    table.memory(late)


def test_peers_by_name_each_have_a_row(capsys):
    case = small_case()
    peers = softmax.implementations(case, "eager")
    peers["math"] = softmax._torch(case.problem, "math")
    peers["cudnn"] = softmax._torch(case.problem, "cudnn")  # no kernel for this on any machine: fp32, D 16
    results = [runner.Result(case, runner.check(case, peers))]
    assert [outcome.status for outcome in results[0].outcomes.values()] == ["ok", "ok", "ok", "n/a"]
    table.speed(results, runner.Peaks())
    printed = capsys.readouterr().out
    assert "torch math" in printed and "n/a: RuntimeError" in printed
