import json
import subprocess
import sys

import pytest
import torch

from fastattn import info
from fastattn.dispatch import BACKENDS


def test_json_has_what_an_issue_needs(capsys):
    assert info.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert [row["backend"] for row in facts["backends"]] == list(BACKENDS)
    for row in facts["backends"]:
        assert row["available"] is (row["reason"] == "")
    assert facts["native"]["build"]["mode"] in ("cpu", "none")


def test_report_is_plain_text_without_secrets(capsys, monkeypatch):
    monkeypatch.setenv("FASTATTN_ISA", "avx2")
    monkeypatch.setenv("SECRET_TOKEN", "do not print")
    assert info.main([]) == 0
    report = capsys.readouterr().out
    assert "FASTATTN_ISA=avx2" in report and "do not print" not in report
    assert report.isascii() and "\x1b" not in report
    assert all(name in report for name in BACKENDS)


def test_pure_python_install_is_loud(capsys, monkeypatch):
    monkeypatch.setattr(info, "_native", lambda: None)
    monkeypatch.setattr(info, "_build_record", lambda: {"mode": "none", "reason": "no C++ compiler found"})
    info.main([])
    report = capsys.readouterr().out
    assert "PURE PYTHON" in report and "no C++ compiler found" in report and "FASTATTN_BUILD=cpu" in report


def test_library_that_does_not_load_says_why(capsys, monkeypatch):
    problem = "the native library is not built (GLIBC_2.99 not found); rebuild it"
    monkeypatch.setattr(info, "_native", lambda: None)
    monkeypatch.setattr(info, "_build_record", lambda: {"mode": "cpu", "reason": "FASTATTN_BUILD=auto"})
    monkeypatch.setattr(BACKENDS["native"], "status", lambda: problem)
    info.main([])
    report = capsys.readouterr().out
    assert "GLIBC_2.99" in report and "rebuild it" in report


def test_openmp_runtimes_of_this_process():
    if sys.platform == "linux":
        assert len(info.openmp_runtimes()) == 1, "torch and fastattn._C must share one OpenMP runtime"


def test_check_runs_every_available_backend(capsys):
    assert info.main(["--check", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["check"]
    checked = {row["backend"] for row in rows}
    assert checked == {name for name, backend in BACKENDS.items() if backend.status() is None}
    assert all(row["ok"] is not False for row in rows)
    assert {row["dtype"] for row in rows if row["ok"]} == {"float32", "bfloat16", "float16"}


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_check_fails_on_a_wrong_backend(capsys, monkeypatch, wrong):
    right = info._gradients

    def broken(qkv, backend):
        results = right(qkv, backend)
        return [results[0], results[1] * wrong, *results[2:]] if backend == "eager" else results

    monkeypatch.setattr(info, "_gradients", broken)
    assert info.main(["--check"]) == 1
    wrong_lines = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert wrong_lines and all(line.startswith("eager") for line in wrong_lines)


def test_command_line():
    command = [sys.executable, "-m", "fastattn.info"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith("fastattn ")


@pytest.mark.parametrize(
    ("archs", "capability", "covered"),
    [
        (["80"], (8, 0), True),
        (["80"], (8, 9), True),  # the same major number
        (["80"], (9, 0), True),  # PTX of the newest target
        (["80", "90a"], (7, 5), False),
        (["90a"], (8, 6), False),
        (["100"], (9, 0), False),
        ([], (9, 0), False),
    ],
)
def test_which_gpus_a_cuda_library_covers(monkeypatch, archs, capability, covered):
    backend = BACKENDS["cuda"]
    monkeypatch.setattr(backend, "built_archs", lambda: archs)
    problem = backend.uncovered(capability)
    assert (problem is None) is covered
    if not covered:
        arch = "".join(map(str, capability)) + "a" * (capability == (9, 0))
        assert f"FASTATTN_CUDA_ARCHS={arch} pip install" in problem
    monkeypatch.setattr(info.torch.cuda, "is_available", lambda: False)
    facts = info.collect()
    assert facts["cuda library"] == {"archs": archs, "missing": None}


def test_a_library_of_another_version_is_refused(monkeypatch):
    native = BACKENDS["native"]
    if native._C is None:
        pytest.skip(native.status())
    monkeypatch.setattr(native, "__version__", "99.0")
    library, problem = native._load()
    assert library is None and "99.0" in problem and "remove the other install" in problem
