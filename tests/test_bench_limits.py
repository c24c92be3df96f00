"""What is too large, or fails half way: the bench says so, checks what fits, and goes on with the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastattn
from fastattn.bench import __main__ as cli
from fastattn.bench import peaks, runner, schema
from fastattn.bench.case import Implementation
from fastattn.bench.cases import free, masks, softmax
from fastattn.testing.inputs import Case as Problem

SMALL = Problem(B=1, Hq=2, Hk=2, Lq=24, Lk=24, D=16, causal="top_left")


def small_case(**fields):
    return softmax.case("small", SMALL, "fp32", **fields)


def test_what_runs_out_of_memory_while_timed_leaves_the_others_their_time():
    case, calls = small_case(), []

    def once(x):
        if calls:
            raise RuntimeError("out of memory")
        calls.append(x)
        return fastattn.attention(x.q, x.k, x.v, causal=True)

    found = softmax.implementations(case) | {"greedy": Implementation(once)}
    result = runner.Result(case, runner.check(case, found))
    assert result.outcomes["greedy"].status == "ok"
    runner.measure(result, found, rounds=2)
    assert result.outcomes["greedy"].status == "n/a" and result.outcomes["greedy"].reason.endswith("out of memory")
    assert result.ours.samples is not None and result.outcomes["torch"].samples is not None


def test_what_fails_while_the_clock_runs_leaves_the_others_their_time():
    case, calls = small_case(), []

    def thrice(x):
        calls.append(x)
        if len(calls) > 6:
            raise RuntimeError("worn out")
        return fastattn.attention(x.q, x.k, x.v, causal=True)

    found = softmax.implementations(case) | {"weak": Implementation(thrice)}
    result = runner.Result(case, runner.check(case, found))
    runner.measure(result, found, rounds=9)
    assert (result.outcomes["weak"].status, result.outcomes["weak"].reason) == ("n/a", "RuntimeError: worn out")
    assert result.outcomes["weak"].samples is None and len(result.ours.samples.seconds) == 9


@pytest.mark.parametrize("part", ["make", "golden"])
def test_a_case_too_large_to_check_is_not_available_and_the_others_go_on(monkeypatch, tmp_path, part):
    honest = getattr(softmax, part)

    def too_large(case, *rest):
        if case.name == "huge":
            raise torch.OutOfMemoryError("not enough memory")
        return honest(case, *rest)

    monkeypatch.setattr(softmax, part, too_large)
    monkeypatch.setattr(
        cli, "all_cases", lambda: [replace(small_case(presets=("quick",)), name=n) for n in ("huge", "x")]
    )
    monkeypatch.setattr(peaks, "WINDOW_SECONDS", 0.01)
    monkeypatch.setattr(peaks, "READ_BYTES", 1 << 20)
    path = tmp_path / "run.json"
    code = cli.main(["run", "--preset", "quick", "--rounds", "2", "--json", str(path)])
    report = schema.load(path)
    huge, small = ([one for one in r["implementations"].values()] for r in report["results"])
    assert code == 0 and {one["status"] for one in huge} == {"n/a"} and {one["status"] for one in small} == {"ok"}
    assert all(one["reason"].endswith("not enough memory") and one["ms"] is None for one in huge)


def test_inputs_that_no_longer_fit_when_timed_are_not_available(monkeypatch):
    case = small_case()
    found = softmax.implementations(case)
    result = runner.Result(case, runner.check(case, found))
    monkeypatch.setattr(softmax, "make", lambda case: torch.empty(1 << 60))
    runner.measure(result, found, rounds=2)
    assert {outcome.status for outcome in result.outcomes.values()} == {"n/a"}


@pytest.mark.parametrize("problem", [
    replace(SMALL, Lq=30, causal="bottom_right"), replace(SMALL, window=(5, 2), causal=False), replace(SMALL, Hq=4, softcap=2.0),
    replace(SMALL, causal=False, mask="qk"), replace(SMALL, causal=False),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("backward", [False, True])
def test_long_calls_are_checked_by_some_of_their_rows(monkeypatch, problem, backward):
    monkeypatch.setattr(softmax, "GOLDEN_SCORES", 11 * 24)
    case = softmax.case("long", problem, "fp32", backward=backward)
    inputs = softmax.make(case)[0]
    golden = softmax.golden(case, softmax.checked(case, inputs))
    rows = 11 * problem.Hk // problem.Hq
    assert golden["dq" if backward else "out"].shape == (1, problem.Hq // problem.Hk, rows, 16)
    outcomes = runner.check(case, softmax.implementations(case))
    assert {outcome.status for outcome in outcomes.values()} == {"ok"}, outcomes

    def off_in_the_last_row(x):
        out = fastattn.attention(x.q, x.k, x.v, mask=x.mask, **options)
        return torch.cat((out[:, :, :-1], out[:, :, -1:] * 1.001), 2)

    options = {"causal": problem.causal, "window": problem.window, "softcap": problem.softcap}
    wrong = softmax.implementations(case) | {"wrong": Implementation(off_in_the_last_row)}
    assert runner.check(case, wrong)["wrong"].status == "wrong"


def test_masks_are_checked_by_some_rows_too(monkeypatch):
    monkeypatch.setattr(softmax, "GOLDEN_SCORES", 40 * 9)
    for backward in (False, True):
        (case,) = free.cases([(1, 4, 2, 40, 40, 16)], ["fp32"], None, "causal() & window(9)", backward, "cpu")
        outcomes = runner.check(case, masks.implementations(case))
        assert {outcome.status for outcome in outcomes.values()} == {"ok"}, outcomes


def test_the_check_of_a_mask_forms_only_those_rows(monkeypatch):
    monkeypatch.setattr(softmax, "GOLDEN_SCORES", 40 * 9)
    (case,) = free.cases([(1, 1, 1, 40, 40, 16)], ["fp32"], None, "strided(3) & causal()", False, "cpu")
    mask, formed = masks.mask_of(case.problem), []
    to_dense = type(mask).to_dense

    def recorded(*arguments):
        formed.append(to_dense(*arguments))
        return formed[-1]

    monkeypatch.setattr(type(mask), "to_dense", recorded)
    masks.golden(case, softmax.make(case)[0])
    (visible,), rows = formed, softmax.checked_rows(case.problem, torch.device("cpu"))
    assert visible.shape == (1, 1, 9, 40) and torch.equal(visible, to_dense(mask, 40, 40)[:, :, rows])
