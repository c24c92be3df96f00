import json
import re
import subprocess
import sys
from types import SimpleNamespace

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


@pytest.mark.parametrize("reason", ["no C++ compiler found", "GLIBC_2.99 not found"])
def test_pure_python_install_is_loud(capsys, monkeypatch, reason):
    monkeypatch.setattr(info, "_native", lambda: None)
    monkeypatch.setattr(BACKENDS["native"], "status", lambda: f"{reason}; rebuild it")
    info.main([])
    lines = capsys.readouterr().out.splitlines()
    assert any("PURE PYTHON" in line for line in lines)
    assert f"!!! Reason: {reason}" in lines and "!!! Remedy: rebuild it" in lines


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


def test_a_gpu_too_old_for_the_kernels_is_not_told_to_rebuild(monkeypatch):
    monkeypatch.setattr(BACKENDS["cuda"], "built_archs", lambda: ["80", "90a"])
    problem = BACKENDS["cuda"].uncovered((7, 5))
    assert "need compute capability 8.0" in problem and "use backend triton or eager" in problem
    assert "pip install" not in problem


def test_a_gpu_that_is_not_covered_is_no_available_backend(monkeypatch, capsys):
    """The table and the line of the build say the same."""
    cuda, gpu = BACKENDS["cuda"], {"name": "Old", "major": 7, "minor": 5, "total_memory": 2**34}
    monkeypatch.setattr(info.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(info.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(info.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**gpu))
    monkeypatch.setattr(cuda, "status", lambda: None)
    assert info.main([]) == 0
    row = re.search(r"^cuda  .*$", capsys.readouterr().out.partition("backend  ")[2], re.MULTILINE).group()
    assert row.split()[1] == "no" and "need compute capability 8.0" in row


@pytest.mark.parametrize(
    ("built_with", "error", "status"),
    [
        (None, None, "this torch is built without CUDA; install"),
        (
            "13.0",
            "Found no NVIDIA driver on your system. Please check",
            "no NVIDIA driver on your system; please check",
        ),
        ("13.0", "No CUDA GPUs are available", "No CUDA GPUs are available; look at nvidia-smi"),
        ("13.0", None, "torch sees no CUDA device; look at nvidia-smi"),
    ],
)
def test_without_a_device_cause_and_remedy(monkeypatch, built_with, error, status):
    def init():
        if error:
            raise RuntimeError(error)

    monkeypatch.setattr(torch.version, "cuda", built_with)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert status in BACKENDS["cuda"].status()


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_what_is_not_available_has_a_remedy(monkeypatch, hip):
    for variable in ("TRITON_INTERPRET", "FASTATTN_CUDA_EMULATOR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = [row for row in info.backends() if not row["available"]]
    assert {"cuda", "triton"} <= {row["backend"] for row in rows}
    assert all(row["reason"] and row["remedy"] for row in rows), rows


def test_two_installs_are_named(monkeypatch, capsys, tmp_path):
    """A copy of the package in one folder, an install in another; the folder twice is one."""
    installed = tmp_path / "site" / "fastattn"
    for folder in (tmp_path / "copy" / "fastattn", installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    metadata = tmp_path / "site" / "fastattn-0.0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: fastattn\nVersion: 0.0.1\n")
    used = str(info.libraries.PACKAGE)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "copy"), str(tmp_path / "copy"), str(tmp_path / "site")])
    assert info.installs() == [used, str(installed), str(tmp_path / "copy" / "fastattn")]
    info.main([])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("installs")]
    assert f"{used} is used" in line and str(installed) in line and "PYTHONPATH" in line


def test_an_editable_install_and_its_source_tree_are_one(monkeypatch, tmp_path):
    metadata = tmp_path / "fastattn-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: fastattn\nVersion: 0.1.0\n")
    source = info.libraries.PACKAGE.parent
    direct = {"url": source.as_uri(), "dir_info": {"editable": True}}
    (metadata / "direct_url.json").write_text(json.dumps(direct))
    monkeypatch.setattr(sys, "path", [str(source), str(tmp_path)])
    assert info.installs() == [str(source / "fastattn")]


def test_the_local_version_and_the_compiler_of_the_cuda_library_are_named(monkeypatch, capsys):
    record = {**info.libraries.record(), "version": "0.1.0+cu130", "cuda_compiler": "13.0.88"}
    monkeypatch.setattr(info.libraries, "record", lambda: record)
    info.main([])
    report = capsys.readouterr().out
    assert re.search(r"^fastattn +\S+\+cu130$", report, re.MULTILINE) and "(nvcc 13.0.88)" in report


def test_a_library_of_another_version_is_refused(monkeypatch):
    if BACKENDS["native"]._C is None:
        pytest.skip(BACKENDS["native"].status())
    monkeypatch.setattr(info.libraries, "__version__", "99.0")
    library, problem = info.libraries.native.__wrapped__()
    assert library is None and "99.0" in problem and f"; {info.libraries.rebuild()}" in problem
