"""What a run prints: numbers are whole however narrow the terminal, and every word about errors is true."""

from __future__ import annotations

import re
import sys

import pytest

from fastattn.bench import runner, table
from fastattn.bench.case import Goal
from fastattn.bench.cases import linear, masks, softmax
from fastattn.testing.timing import Samples

KERNEL = "native: flash forward, avx512_bf16, tiles of 64 x 64, heads in parallel, two threads"
NAME = "llama3-8b prefill backward B1 L2048 bf16"


def results():
    """Two implementations that are right, one that is not checked, one that cannot run."""
    case = softmax.case(NAME, softmax.square(2048), "bf16", Goal(1.05, 0.84, against="cudnn"))
    outcomes = {
        "torch": runner.Outcome("ok", kernel="torch's choice", rms_error=1e-7, samples=Samples((0.3214,) * 3)),
        "flash_attn": runner.Outcome("n/a", "flash_attn is not installed"),
        "entmax": runner.Outcome("ok", kernel="entmax15 over dense scores", samples=Samples((1.2345,) * 3)),
        "fastattn": runner.Outcome("ok", "", KERNEL, 1e-7, 1e-6, 12.34, Samples((0.1002, 0.1012, 0.1022)), 1234 << 20),
    }
    return [runner.Result(case, outcomes, roof=1000.0)] * 2


def printed(monkeypatch, capsys, columns: int) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    table.speed(results(), None)
    text = capsys.readouterr().out
    return re.sub("\x1b\\[[0-9;]*m", "", text).splitlines()


@pytest.mark.parametrize("columns", [80, 120, 260])
def test_no_number_is_cut_on_a_terminal_of_any_width(monkeypatch, capsys, columns):
    pytest.importorskip("rich")
    lines = printed(monkeypatch, capsys, columns)
    (ours,) = {line for line in lines if "fastattn" in line}
    assert re.search(r"fastattn\W+101\.2 \(100\.6-101\.8\)\W+84\.9\W+8%\W+1234\.0\W+12\.34x", ours)
    assert any("1234.5 (1234.5-1234.5)" in line and "unchecked" in line for line in lines)
    assert all(any(word in line for line in lines) for word in (NAME, KERNEL, "1.05x cudnn, 84%", "MISSED"))
    assert sum("ms (p20-p80)" in line for line in lines) == 1
    rows = [line for line in lines if re.match(r"  \w", line)]
    assert len(rows) == (0 if columns == 260 else 9) and all(len(line) <= columns for line in rows)


def test_the_plain_form_has_no_width(capsys):
    table.speed(results(), None)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(NAME) and "321.4 (321.4-321.4)" in line for line in lines)
    assert any("101.2 (100.6-101.8)" in line and line.endswith(f"MISSED  {KERNEL}") for line in lines)


def test_what_computes_something_else_is_not_called_right():
    """In linear and masks the first row may be a yardstick of time: nobody's error is relative to it."""
    problem = linear.Problem(1, 2, 64, 16, "elu1")
    found = (
        linear.case("x", problem, "fp32", "softmax"),
        masks.case("x", masks.problem("prefix", 64), "fp32", "dense", None),
    )
    for case in found:
        module = {"linear": linear, "masks": masks}[case.op]
        result = runner.Result(case, runner.check(case, module.implementations(case)))
        other, ours = table.verdicts(result).split("; ")
        assert other == f"{case.extra} not checked: it computes something else"
        assert ours.startswith("fastattn ok, rms ") and "x " not in ours
    case = linear.case("x", problem, "fp32", "eager")
    result = runner.Result(case, runner.check(case, linear.implementations(case)))
    assert table.verdicts(result).endswith("x eager's")


def test_a_yardstick_that_cannot_run_is_not_available():
    case = softmax.case("x", softmax.square(16), "fp32")
    outcome = runner.check(case, softmax.implementations(case, "auto", ("entmax",)))["entmax"]
    assert outcome.unchecked or (outcome.status == "n/a" and "entmax is not installed" in outcome.reason)
