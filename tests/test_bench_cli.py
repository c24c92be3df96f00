"""The bench as it is typed: what is chosen, what is refused, what an interrupted run leaves, how a GPU would be timed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import fastattn
from fastattn import masks
from fastattn.bench import __main__ as cli
from fastattn.bench import mask_expression, peaks, progress, runner, schema, session
from fastattn.bench.case import Goal
from fastattn.bench.cases import OPS, free, models, softmax
from fastattn.testing.timing import FEWEST_ROUNDS, Samples


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch):
    monkeypatch.setattr(peaks, "WINDOW_SECONDS", 0.01)
    monkeypatch.setattr(peaks, "READ_BYTES", 1 << 20)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("text, mask", [
    ("causal() & window(1024)", masks.causal() & masks.window(1024, None)),
    (' ~(causal("top_left") | prefix(3)) ', ~(masks.causal("top_left") | masks.prefix(3))),
    ("window(left=5, right=None)", masks.window(5, None)),
    ("documents([0, 0, 1])", masks.documents([0, 0, 1])),
    ("neighborhood((4, 8), 3)", masks.neighborhood((4, 8), 3)),
    ("blocks([[True, False], [True, True]], 64)", masks.blocks(torch.tensor([[True, False], [True, True]]), 64)),
])  # fmt: skip
def test_mask_expressions_are_masks(text, mask):
    assert mask_expression.parse(text) == mask


@pytest.mark.parametrize("text", [
    "", "causal(", "causal", "1", "__import__('os').system('true')", "causal().plan(8, 8)", "masks.causal()", "window(x, 0)",
    "window(-1, 0)", "window(1.5, 0)", "window(2**9, 0)", "(lambda: causal())()", "causal() if 1 else causal()",
    "[causal() for _ in [1]]", "causal() + causal()", "not causal()", "causal(**{})", "causal(*[])", "dense([[True]])",
    "from_dict({})", "Mask()", "TilePlan()", "f'{1}'", "causal() and causal()", "x := causal()", "~" * 9000 + "causal()",
    "(" * 5000 + "causal()" + ")" * 5000, "causal() | " * 1500 + "causal()",
])  # fmt: skip
def test_what_is_no_mask_expression_is_refused(text):
    with pytest.raises(ValueError):
        mask_expression.parse(text)


def test_mask_expressions_run_no_python():
    """The parser has no way to: it names no builtin that executes text, and looks names up in one fixed set."""
    tree = ast.parse(open(mask_expression.__file__).read())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"eval", "exec", "compile", "__import__", "globals", "open"}
    assert {name for name in mask_expression.CONSTRUCTORS if not callable(getattr(masks, name))} == set()


@pytest.mark.parametrize(
    "text", ["1,2,3", "1,8,8,16,16,64,64,1", "1,8,3,16,16,64", "0,8,8,16,16,64", "a,b,c,d,e,f", ""]
)
def test_shapes_that_are_none(capsys, text):
    assert "shape is B,H,Hk" in (error := refused(capsys, "list", "--shape", text)) or "multiple of Hk" in error


def test_a_case_of_your_own(tmp_path):
    path = tmp_path / "own.json"
    options = "--shape 1,4,2,40,40,16 --shape 1,4,2,24,40,16,8 --dtype fp32,bf16 --mask".split()
    arguments = [
        "run",
        *options,
        "causal() & window(9)",
        "--impl",
        "eager,natten",
        "--rounds",
        "2",
        "--json",
        str(path),
    ]
    assert cli.main(arguments) == 0
    report = schema.load(path)
    names = [result["case"] for result in report["results"]]
    assert names[0] == "fp32 forward B1 H4 Hk2 L40 D16 causal() & window(9)"
    assert names[3] == "bf16 forward B1 H4 Hk2 Lq24 Lk40 D16 Dv8 causal() & window(9)"
    for result in report["results"]:
        every = result["implementations"]
        assert list(every) == ["torch", "eager", "natten", "fastattn"]
        assert {name: one["status"] for name, one in every.items()} == dict.fromkeys(every, "ok") | {"natten": "n/a"}
        assert every["fastattn"]["kernel"].startswith(fastattn.explain(*torch.ones(3, 1, 2, 40, 16)).chosen)
        assert every["eager"]["ours_faster"]["median"] > 0 and every["eager"]["extra_bytes"] >= 0
        visible = mask_expression.parse("causal() & window(9)").to_dense(result["shape"]["Lq"], 40).sum()
        assert result["flops"] == 2 * 4 * visible * (16 + result["shape"]["Dv"])


def test_own_cases_say_causal_and_direction():
    (case,) = free.cases([(1, 2, 2, 8, 16, 4)], ["fp32"], "bottom_right", None, True, "cpu")
    assert case.name == "fp32 backward B1 H2 Lq8 Lk16 D4 causal bottom_right" and case.backward
    assert all(outcome.status == "ok" for outcome in runner.check(case, softmax.implementations(case)).values())
    (case,) = free.cases([(1, 2, 2, 1, 16, 4)], ["fp32"], None, None, False, "cpu")
    assert case.bound == "memory"


@pytest.mark.parametrize("arguments, message", [
    (["run", "--dtype", "fp32"], "need a --shape"),
    (["run", "--causal"], "need a --shape"),
    (["run", "--shape", "1,2,2,8,8,4", "--preset", "cpu"], "exclude each other"),
    (["run", "--shape", "1,2,2,8,8,4", "--causal", "--mask", "causal()"], "exclude each other"),
    (["run", "--shape", "1,2,2,8,8,4", "--mask", "prefix([1, 2])"], "differs between batches"),
    (["run", "--shape", "1,2,2,8,8,4", "--mask", "prefix(9)"], "prefix"),
    (["run", "--shape", "1,2,2,8,8,4", "--dtype", "fp8"], "expected some of"),
    (["run", "--shape", "1,2,2,8,8,4", "--impl", "flashiest"], "no implementation is called flashiest"),
    (["run", "--preset", "quick", "--graph"], "CUDA graphs"),
    (["run", "--json", "/no/such/folder/x.json"], "no folder"),
    (["run", "--rounds", "0"], "positive number"),
    (["check", "--preset", "model"], "no cases to check"),
    (["run", "--backend", "abacus"], "invalid choice"),
    (["report", "/no/such/file.json"], "No such file"),
    (["compare", "a.json", "b.json", "--fail-if-slower", "much"], "expected a share"),
])  # fmt: skip
def test_what_contradicts_itself_is_refused(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_presets_choose_cases_and_devices(monkeypatch):
    def chosen(*arguments):
        return cli.select(cli.parser().parse_args(["run", *arguments]))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert all(chosen("--preset", preset) for preset in cli.PRESETS if preset != "model")
    assert {case.device for case in chosen("--preset", "full")} == {"cpu"}
    assert {case.device for case in chosen("--preset", "gpu")} == {"cuda"}
    assert {case.op for case in chosen("--preset", "full")} == set(OPS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert {case.device for case in chosen("--preset", "masks")} == {"cuda"}
    assert {case.device for case in chosen("--preset", "masks", "--device", "cpu")} == {"cpu"}
    assert {case.device for case in chosen("--preset", "cpu")} == {"cpu"}
    assert {case.device for case in chosen("--preset", "llama3-8b")} == {"cuda"}


def test_importing_the_bench_builds_no_mask():
    """FLOPs are counted when they are asked for: a mask of 32k tokens takes seconds."""
    code = """
        from fastattn import masks

        def refuse(cls, *arguments, **options):
            raise AssertionError(f"{cls.__name__} was built")

        masks.Mask.__new__ = refuse
        from fastattn.bench.cases import all_cases

        case = next(case for case in all_cases() if case.op == "masks")
        try:
            case.flops
        except AssertionError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "blocks was built", done.stderr


def test_the_quick_preset_fits_a_minute_of_two_cores():
    """Of two implementations a check, three calls to warm up, at least five rounds and one for memory, at 50 GFLOP/s;
    fp64 of as many scores as are formed at 10; ten seconds to start and to measure peaks."""
    cases = [case for case in OPS["softmax"].CASES if "quick" in case.presets]
    exact = sum(softmax.GOLDEN_SCORES * 2 * case.problem.D * (5 if case.backward else 2) for case in cases) / 10e9
    calls = sum(2 * 5 * case.flops for case in cases) / 50e9
    timed = sum(max(session.SECONDS_PER_CASE["quick"], FEWEST_ROUNDS * 2 * case.flops / 50e9) for case in cases)
    assert len(cases) > 9 and 10 + exact + calls + timed < 60


def test_models_have_their_published_shapes():
    shapes = {
        name: {device: layers[0].problem for device, layers in both.items()} for name, both in models.MODELS.items()
    }
    heads = {name: (both["cuda"].Hq, both["cuda"].Hk, both["cuda"].D) for name, both in shapes.items()}
    assert heads == {
        "llama3-8b": (32, 8, 128), "gemma2-9b": (16, 8, 256), "vit-b16": (12, 12, 64), "sdxl": (10, 10, 64),
        "whisper": (20, 20, 64), "bert-base": (12, 12, 64),
    }  # fmt: skip
    assert shapes["gemma2-9b"]["cuda"].softcap == 50 and shapes["vit-b16"]["cpu"].Lq == 14 * 14 + 1


def small_cases():
    problem, goal = softmax.square(16, H=2, D=8), Goal(1e-6, 1e-6)
    return [softmax.case(f"case {i}", problem, "fp32", goal, must=goal, presets=("quick",)) for i in range(3)]


@pytest.mark.parametrize("stage", ["check", "measure"])
def test_an_interrupted_run_leaves_a_valid_json(monkeypatch, tmp_path, capsys, stage):
    honest, seen = getattr(runner, stage), []

    def interrupted(what, *arguments):
        seen.append(what)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return honest(what, *arguments)

    monkeypatch.setattr(cli, "all_cases", small_cases)
    monkeypatch.setattr(runner, stage, interrupted)
    path = tmp_path / "run.json"
    assert cli.main(["run", "--preset", "quick", "--rounds", "2", "--json", str(path)]) == 130
    report = schema.load(path)
    printed = capsys.readouterr().out
    assert report["interrupted"] and "what is done is kept" in printed
    assert ("Speed, medians" in printed) == (stage == "measure") and "MISSED" not in printed
    timed = [result["case"] for result in report["results"] if result["implementations"]["fastattn"]["ms"]]
    assert timed == ([] if stage == "check" else ["case 0", "case 1"])
    judged = {result["case"]: (result["ratio_met"], result["must_met"]) for result in report["results"]}
    assert judged == {name: (True, True) if name in timed else (None, None) for name in judged}
    assert all(result["peak_met"] is None for result in report["results"] if result["case"] not in timed)
    assert len(report["results"]) == (2 if stage == "check" else 3)


def test_the_file_is_valid_after_every_case(monkeypatch, tmp_path):
    states, path = [], tmp_path / "run.json"
    honest = schema.save

    def watched(report, to):
        honest(report, to)
        loaded = schema.load(path)
        states.append((len(loaded["results"]), sum(bool(r["ratio"]) for r in loaded["results"]), loaded["interrupted"]))

    monkeypatch.setattr(cli, "all_cases", small_cases)
    monkeypatch.setattr(schema, "save", watched)
    assert cli.main(["run", "--preset", "quick", "--rounds", "2", "--json", str(path)]) == 0
    done = [(0, 0), (1, 0), (2, 0), (3, 0), (3, 1), (3, 2), (3, 3)]
    assert states[:7] == [(*counts, True) for counts in done]  # a run that is killed has the file of its last case
    assert states[-1] == (3, 3, False)


def test_check_times_nothing_and_finds_what_is_wrong(monkeypatch, tmp_path):
    path = tmp_path / "check.json"
    monkeypatch.setattr(cli, "all_cases", small_cases)
    assert cli.main(["check", "--preset", "quick", "--json", str(path)]) == 0
    judged = [[r[key] for key in ("ratio", "ratio_met", "peak_met", "must_met")] for r in schema.load(path)["results"]]
    assert judged == [[None] * 4] * 3
    honest = softmax.implementations
    broken = lambda case, *rest: honest(case, *rest) | {"fastattn": softmax.Implementation(lambda x: x.q * 0)}
    monkeypatch.setattr(softmax, "implementations", broken)
    assert cli.main(["check", "--preset", "quick", "--json", str(path)]) == 1
    assert [(r["ratio_met"], r["peak_met"]) for r in schema.load(path)["results"]] == [(False, False)] * 3


def test_wrong_is_red_on_a_terminal_and_plain_elsewhere(monkeypatch, capsys):
    progress.say("WRONG", progress.RED)
    assert capsys.readouterr().out == "WRONG\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    progress.say("WRONG", progress.RED)
    assert capsys.readouterr().out == "\x1b[1;31mWRONG\x1b[0m\n"


def test_progress_counts_lines_and_draws_a_bar_on_a_terminal(monkeypatch, capsys):
    with progress.steps("Timing", 12) as done:
        done("first")
        done("second")
    assert capsys.readouterr().out.splitlines() == ["", "Timing", "[ 1/12] first", "[ 2/12] second"]
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with progress.steps("Timing", 2) as done:
        done("first [not markup]")
    assert "first [not markup]" in capsys.readouterr().out


def test_all_means_everyone_of_the_op_and_strangers_have_a_row():
    case = small_cases()[0]
    assert set(softmax.implementations(case, "auto", ("all",))) == {*softmax.peers(case), "fastattn"}
    outcomes = runner.check(case, softmax.implementations(case, "auto", ("natten", "fla")))
    reasons = {name: outcome.reason for name, outcome in outcomes.items() if outcome.status == "n/a"}
    assert reasons == {"natten": "it has no such operation", "fla": "not wired in this bench"}


def test_noise_is_warned_of():
    run = session.Session.__new__(session.Session)
    steady, wild = Samples((1.0, 1.01, 1.02)), Samples((1.0, 2.0, 3.0))
    outcomes = {"torch": runner.Outcome("ok", samples=steady), "fastattn": runner.Outcome("ok", samples=wild)}
    run.results, run.report = [runner.Result(small_cases()[0], outcomes)], {"environment": {"warnings": []}}
    run._note_noise()
    assert "1 of 2 times have an IQR over 10%" in run.report["environment"]["warnings"][0]


def test_confidence_intervals_cover_the_median():
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        low, high = Samples(tuple(torch.rand(25, generator=generator).tolist())).interval
        covered += low <= 0.5 <= high
    assert 0.92 < covered / 300 < 0.995
    assert Samples((3.0, 1.0, 2.0)).interval == (1.0, 3.0)


def test_pytest_benchmark_runs_the_same_cases(tmp_path):
    """One group per case, FLOP/s in extra_info, skips with their reason."""
    path = tmp_path / "speed.json"
    folder = str(Path(cli.__file__).parent)
    command = [
        sys.executable,
        "-m",
        "pytest",
        folder,
        "--benchmark-only",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        "fp32 and forward and causal",
    ]
    command += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=2", f"--benchmark-json={path}", "-q", "-rs"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=alone)
    assert done.returncode == 0, done.stdout
    report = json.loads(path.read_text())
    assert report["machine_info"]["versions"]["torch"] == torch.__version__
    found = report["benchmarks"]
    assert {one["group"] for one in found} == {"fp32 forward causal H4 L256"}
    assert {"torch", "math", "eager", "fastattn"} <= {one["params"]["name"] for one in found}
    for one in found:
        info = one["extra_info"]
        assert info["FLOP/s"] == pytest.approx(info["flops"] / one["stats"]["median"]) and info["kernel"]
