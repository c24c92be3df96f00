"""The bench judges others, so it is judged first: what is wrong is caught, what is counted is counted right."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from time import sleep

import pytest
import torch

import fastattn
from fastattn.bench import __main__ as cli
from fastattn.bench import environment, memory, peaks, runner, schema, table
from fastattn.bench.case import Goal, Implementation
from fastattn.bench.cases import OPS, all_cases, softmax
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
    monkeypatch.setattr(peaks, "WINDOW_SECONDS", 0.01)
    monkeypatch.setattr(peaks, "READ_BYTES", 1 << 20)
    honest = softmax.implementations

    def replace_ours(call):
        def implementations(case, backend="auto", names=()):
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
    assert "n/a: no kernel for this" in capsys.readouterr().out


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
    assert code == 0 and report["schema_version"] == schema.VERSION
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
    # Ours: small calls, whose time is what a call costs.
    "fp32 decode with a mask of keys": (1.0, None, None),
    "fp32 small forward H4 L64": (1.0, None, None),
    "fp32 small backward H4 L64": (1.0, None, None),
    "fp32 short forward B64 H8 L16": (1.0, None, None),
    "fp32 short backward B64 H8 L16": (1.0, None, None),
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


def test_goals_are_judged_by_ratio_difference_and_peak(capsys):
    def result(goal, base, ours, roof):
        outcomes = {
            "torch": runner.Outcome("ok", samples=Samples((base,) * 3)),
            "fastattn": runner.Outcome("ok", samples=Samples((ours,) * 3)),
        }
        return runner.Result(softmax.case("x", SMALL, "fp32", goal), outcomes, roof)

    rate = softmax.flops(SMALL, False) * 1e-9  # GFLOP/s of a call that takes one second
    met = result(Goal(ratio=2.0, of_peak=0.5), 2.0, 1.0, 2 * rate)
    assert met.ratio_met(met.case.goal) is True and met.peak_met(met.case.goal) is True
    missed = result(Goal(ratio=2.1, of_peak=0.51), 2.0, 1.0, 2 * rate)
    assert missed.ratio_met(missed.case.goal) is False and missed.peak_met(missed.case.goal) is False
    limit = Goal(slower_by_us=5)
    assert result(limit, 1e-6, 5.9e-6, None).ratio_met(limit) is True
    assert result(limit, 1e-6, 6.1e-6, None).ratio_met(limit) is False
    assert met.must_met() is None and met.ratio_met(Goal(ratio=1, against="cudnn")) is None
    for must, judged in ((Goal(2.0, 0.5), True), (Goal(2.0, 0.6), False), (Goal(2.1), False)):
        assert runner.Result(replace(met.case, must=must), met.outcomes, met.roof).must_met() is judged
    table.speed([met, missed], None)
    assert "goals met: 2 of 4" in capsys.readouterr().out


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
    # cudnn has no kernel for this on any machine (fp32, D 16); nobody installs the last.
    names = ("math", "cudnn", "eager", "reference", "flash_attn")
    found = softmax.implementations(case, "auto", names)
    assert list(found) == ["torch", *names, "fastattn"]
    results = [runner.Result(case, runner.check(case, found))]
    statuses = [outcome.status for outcome in results[0].outcomes.values()]
    assert statuses == ["ok", "ok", "n/a", "ok", "ok", "n/a", "ok"]
    runner.measure(results[0], found, rounds=2)
    table.speed(results, None)
    printed = capsys.readouterr().out
    assert "torch math" in printed and "n/a: RuntimeError" in printed and "n/a: flash_attn is not installed" in printed
    shares = {name: results[0].faster_than(name) for name in found}
    assert shares["cudnn"] is None and len(shares["math"].seconds) == 2


def test_every_backend_of_fastattn_can_be_asked_for():
    for case in all_cases():
        known = OPS[case.op].peers(case)
        assert set(fastattn.dispatch.BACKENDS) <= set(known)
        assert set(case.peers) <= set(known)


@pytest.mark.parametrize("problem", [
    SMALL, replace(SMALL, causal="bottom_right", Lk=30), replace(SMALL, window=(3, 0)), replace(SMALL, window=(3, 2), Hq=4),
    replace(SMALL, causal=False, window=(None, 1)), replace(SMALL, softcap=2.0), replace(SMALL, causal=False, mask="qk"),
    replace(SMALL, causal="bottom_right", Lk=30, window=(3, 0), softcap=2.0, Hq=4),
], ids=str)  # fmt: skip
def test_torch_is_given_the_same_problem(problem):
    """Every option reaches every peer, or the peer says that it has none."""
    case = softmax.case("small", problem, "fp32")
    outcomes = runner.check(case, softmax.implementations(case, "auto", ("math", "eager")))
    assert {name for name, outcome in outcomes.items() if outcome.status == "ok"} >= {"torch", "eager", "fastattn"}
    if outcomes["math"].status != "ok":
        assert outcomes["math"].reason == "torch's function has no softcap" and problem.softcap


def test_someone_else_may_be_less_exact_but_not_wrong():
    case = small_case()
    off = {2e-6: "ok", 1e-4: "wrong"}
    for error, status in off.items():
        peer = Implementation(lambda x, e=error: fastattn.attention(x.q, x.k, x.v, causal=True) * (1 + e), peer=True)
        outcome = runner.check(case, softmax.implementations(case) | {"peer": peer})["peer"]
        assert outcome.status == status
        assert status == "wrong" or outcome.error_vs_baseline > 3  # beyond what fastattn itself is allowed


@pytest.mark.skipif(not memory.RESET.exists(), reason="needs Linux's /proc/self/clear_refs")
def test_peak_memory_of_a_call_counts_what_malloc_had_kept():
    def call(size):
        torch.empty(size, dtype=torch.uint8).fill_(1)
        return torch.empty(size // 4, dtype=torch.uint8).fill_(1)

    for mib in (1, 16):  # the smaller one comes from malloc's heap, which keeps it
        call(mib << 20)
        extra = memory.peak_extra(partial(call, mib << 20), "cpu")
        assert extra is not None and mib * 0.8 < extra / 2**20 < mib * 1.5 + 1
