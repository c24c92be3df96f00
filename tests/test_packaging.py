"""What users get: an sdist that is complete, a wheel built from it that works in an empty environment."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import reuse_objects
import torch
from packaging_tools import BIN, NOT_SOURCE, ROOT, pip, run, unpacked, wheel_names

CONFIGURATIONS = ("pyproject.toml", ".ci/cuda-wheels.toml")
CIBUILDWHEEL = ".ci/cibuildwheel-requirements.txt"
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", folder, checkout)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist in pip's isolated environment: only [build-system].requires is there, torch is not.

    Objects that the editable install has of the same files by the same commands are not compiled once more.
    """
    folder = tmp_path_factory.mktemp("wheel")
    editable = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-editable"
    launcher = ";".join(map(str, (sys.executable, ROOT / "tests" / "reuse_objects.py", editable)))
    pip("wheel", "--no-deps", "-w", folder, sdist, FASTATTN_BUILD="cpu", CMAKE_CXX_COMPILER_LAUNCHER=launcher)
    return next(folder.glob("*.whl"))


def test_objects_are_reused_only_for_the_same_files_and_commands(tmp_path):
    """What `wheel` leaves to reuse_objects.py: as a build that has made its object, and another on a copy of the sources."""
    made = tmp_path / "made" / "build" / "a.o"
    for name in ("made", "copy"):
        for file in ("cpu/a.cpp", "cpu/near.h", "include/far.h"):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
    made.parent.mkdir()
    made.touch()

    def command(name, *flags):
        folder = tmp_path / name
        return ["c++", *flags, f"-I{folder}/include", "-o", "a.o", "-c", f"{folder}/cpu/a.cpp"]

    entry = {"directory": str(made.parent), "output": "a.o", "file": str(tmp_path / "made/cpu/a.cpp")}
    entry["command"] = " ".join(command("made", "-O3"))
    (made.parent / "compile_commands.json").write_text(json.dumps([entry]))
    assert reuse_objects.find(made.parent, command("copy", "-MD", "-MF", "a.d", "-O3")) == made
    assert reuse_objects.find(made.parent, command("copy", "-O2")) is None
    for file in ("cpu/near.h", "include/far.h"):
        (tmp_path / "copy" / file).write_text("changed")
        assert reuse_objects.find(made.parent, command("copy", "-O3")) is None
        (tmp_path / "copy" / file).write_text("")
    assert reuse_objects.find(made.parent, command("copy", "-O3")) == made
    later = made.stat().st_mtime + 10
    os.utime(tmp_path / "made/cpu/near.h", (later, later))
    assert reuse_objects.find(made.parent, command("copy", "-O3")) is None  # the object is older than its source


class Environment:
    """An empty virtual environment that shares the torch of this one but nothing else of the project."""

    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.python = folder / "bin" / "python"
        self.site = next(folder.glob("lib/python*/site-packages"))
        (self.site / "shared.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")

    def install(self, *arguments, **options) -> None:
        pip("--python", self.python, "install", "--no-deps", *arguments, **options)

    def run(self, code: str, cwd="/") -> str:
        return run(self.python, "-c", textwrap.dedent(code), cwd=cwd).stdout


def test_sdist_is_complete(sdist, checkout):
    names = unpacked(sdist)
    folders = ("fastattn", "kernels", "bench", "csrc", "tests", "docs")
    files = {str(p.relative_to(checkout)) for f in folders for p in (checkout / f).rglob("*") if p.is_file()}
    files |= {
        "setup.py",
        "pyproject.toml",
        "CMakeLists.txt",
        "Makefile",
        "README.md",
        ".ci/run",
        ".ci/requirements.txt",
    }
    assert files <= names, f"missing: {sorted(files - names)}"
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_info.json"))]


def test_sdist_is_reproducible(sdist, checkout, tmp_path):
    """The same bytes from another folder, another day."""
    elsewhere = Path(shutil.copytree(checkout, tmp_path / "elsewhere", ignore=NOT_SOURCE))
    for path in elsewhere.rglob("*"):
        os.utime(path, (1e9, 1e9))
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", tmp_path, elsewhere)
    assert (tmp_path / sdist.name).read_bytes() == sdist.read_bytes()


def test_release_builds_pin_their_tools_by_hash():
    pinned = dict(
        re.findall(r"^(\S+?)==(\S+) \\$", (ROOT / ".ci" / "build-requirements.txt").read_text(), re.MULTILINE)
    )
    wanted = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert set(pinned) == {re.match(r"[\w-]+", name.strip(' "')).group() for name in wanted.split(",")}
    used = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / ".ci" / "requirements.txt").read_text(), re.MULTILINE))
    assert all(used[name] == version for name, version in pinned.items())
    assert f"cibuildwheel=={used['cibuildwheel']} --hash=" in (ROOT / CIBUILDWHEEL).read_text()


def test_release_builds_install_nothing_without_a_hash():
    """In pip's --require-hashes mode, which one hash switches on, a name without one is an error."""
    files = [ROOT / name for name in (".github/workflows/release.yml", ".ci/cuda-library", *CONFIGURATIONS)]
    installed = [line for path in files for line in re.findall(r"\bpip install (.*)", path.read_text())]
    hashed = r"--require-hashes -r (\{project\}/)?\.ci/(build|cibuildwheel)-requirements\.txt\"?"
    assert len(installed) == 5 and all(re.fullmatch(hashed, line) for line in installed), installed


def test_the_sdist_job(checkout, tmp_path):
    """As the workflow does it: no `build`, into a folder that is not there yet."""
    (command,) = re.findall(r"python (setup\.py .*sdist -d )", (ROOT / ".github/workflows/release.yml").read_text())
    run(sys.executable, *command.split(), tmp_path / "first", cwd=checkout)
    assert len(list((tmp_path / "first").glob("*.tar.gz"))) == 1


@pytest.mark.skipif(shutil.which("cibuildwheel", path=BIN) is None, reason="cibuildwheel is not installed")
@pytest.mark.parametrize("config", CONFIGURATIONS)
@pytest.mark.parametrize("machines", [("x86_64", "aarch64"), ()], ids=("all", "host"))
def test_the_matrix_of_wheels(checkout, config, machines):
    """Unasked, those of this machine: the release workflow has a runner for each."""
    command = ["cibuildwheel", "--config-file", config, "--print-build-identifiers", "--platform", "linux"]
    archs = ("--archs", ",".join(machines)) if machines else ()
    names = run(f"{BIN}/{command[0]}", *command[1:], *archs, cwd=checkout, CUDA_VERSION="13.0").stdout
    pythons, machines = ("310", "311", "312", "313", "314"), machines or (platform.machine(),)
    assert names.split() == [f"cp{python}-manylinux_{machine}" for machine in machines for python in pythons]


def test_the_repository_of_nvidia_for_arm_servers(checkout, tmp_path):
    """Its folder is not named as the machine names itself."""
    for name, text in (("dnf", 'echo "$@"'), ("uname", "echo aarch64")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = (checkout / ".ci" / "cuda-library").read_text().replace("/usr/local/cuda/bin/nvcc", "/no/such/nvcc")
    path = os.pathsep.join((str(tmp_path), os.environ["PATH"]))
    done = run(
        "bash",
        "-c",
        script,
        "cuda-library",
        "13.0",
        tmp_path,
        check=False,
        cwd=tmp_path,
        PYTHON="/bin/false",
        PATH=path,
    )
    assert "repos/rhel8/sbsa/cuda-rhel8.repo" in done.stdout and "cuda-nvcc-13-0" in done.stdout


def test_a_wheel_is_made_without_torch(checkout):
    """`make wheel` in a bare clone."""
    commands = run("make", "-n", "wheel", cwd=checkout).stdout
    assert "build-requirements.txt" in commands and "torch" not in commands
    assert commands.index("dist/fastattn-*.whl") < commands.index("pip --disable-pip-version-check wheel")


def test_torch_is_no_build_requirement():
    build_system = (ROOT / "pyproject.toml").read_text().split("[project]")[0]
    assert "requires" in build_system and "torch" not in build_system


@pytest.mark.slow
def test_wheel_contents(wheel, checkout):
    names = unpacked(wheel)
    ours = {name for name in names if ".dist-info/" not in name}
    extra = ours - wheel_names(checkout)
    assert wheel_names(checkout) <= names, f"missing: {sorted(wheel_names(checkout) - names)}"
    library = [name for name in extra if name.startswith("fastattn/_C.") and name.endswith(".so")]
    assert len(library) == 1
    assert extra - set(library) <= {"fastattn/py.typed", "fastattn/_C.pyi", "fastattn/_build_info.json"}
    assert wheel.stat().st_size <= 3 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_library_links_the_shared_openmp_and_no_torch(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    library = next((tmp_path / "fastattn").glob("_C.*.so")).read_bytes()
    assert b"libgomp.so.1\0" in library
    assert not [name for name in (b"libtorch", b"libc10", b"libpython", b".debug_info\0") if name in library]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("auditwheel", path=BIN) is None, reason="auditwheel is not installed")
def test_wheel_fits_a_manylinux_policy_without_libraries_of_others(wheel, checkout, tmp_path):
    path = os.pathsep.join((BIN, os.environ["PATH"]))
    run(checkout / ".ci" / "repair", wheel, tmp_path, PATH=path)
    (repaired,) = tmp_path.glob("*.whl")
    names = {name for name in unpacked(repaired) if not name.endswith("/")}
    assert "-manylinux_" in repaired.name and names == unpacked(wheel)


@pytest.mark.slow
def test_wheel_works_in_an_empty_environment(wheel, tmp_path):
    environment = Environment(tmp_path / "venv")
    environment.install(wheel)
    output = environment.run(
        """
        import fastattn, fastattn._C, fastattn.bench, fastattn.kernels, fastattn.testing, importlib.util, torch
        for module in (fastattn, fastattn._C, fastattn.bench, fastattn.kernels):
            print(module.__file__)
        print(importlib.util.find_spec("fastattn.kernels.softmax.forward").origin)
        q = torch.randn(1, 2, 33, 16, requires_grad=True)
        out = fastattn.attention(q, q, q, causal=True)
        out.sum().backward()
        assert fastattn.explain(q, q, q, causal=True).chosen == "native"
        assert torch.allclose(out, fastattn.attention(q, q, q, causal=True, backend="reference"), atol=1e-5)
        assert q.grad.isfinite().all()
        """,
        cwd=tmp_path,
    )
    assert all(line.startswith(str(environment.site)) for line in output.splitlines()), output
    facts = json.loads(run(environment.python, "-m", "fastattn.info", "--check", "--json", cwd=tmp_path).stdout)
    assert {row["backend"] for row in facts["check"] if row["ok"]} == {"native", "eager", "reference"}
    assert facts["native"]["path"].startswith(str(environment.site))
    assert facts["native"]["build"]["mode"] == "cpu" and facts["native"]["build"]["compiler"]
    listed = run(Path(environment.python).parent / "fastattn-bench", "list", "--preset", "quick", cwd=tmp_path).stdout
    assert "bf16 forward causal" in listed


def test_without_a_compiler_pure_python_installs_and_says_so(checkout, tmp_path):
    options = {"CXX": "/no/such/compiler"}
    built = pip("wheel", "-v", "--no-deps", "--no-build-isolation", "-w", tmp_path, checkout, **options)
    assert "WITHOUT its native library" in built.stdout + built.stderr
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl") and wheel_names(checkout) <= unpacked(wheel)
    environment = Environment(tmp_path / "venv")
    environment.install(wheel)
    environment.run(
        """
        import fastattn, torch
        q = torch.randn(1, 2, 9, 16)
        assert fastattn.explain(q, q, q).chosen == "eager"
        assert torch.allclose(fastattn.attention(q, q, q), fastattn.attention(q, q, q, backend="reference"), atol=1e-5)
        """
    )
    report = run(environment.python, "-m", "fastattn.info").stdout
    assert "PURE PYTHON" in report and "no C++ compiler found" in report


def test_editable_install(checkout, tmp_path):
    environment = Environment(tmp_path / "venv")
    environment.install("--no-build-isolation", "-e", checkout, FASTATTN_BUILD="none")
    output = environment.run(
        """
        import fastattn, fastattn.bench, importlib.util
        print(fastattn.__file__)
        print(fastattn.bench.__file__)
        print(importlib.util.find_spec("fastattn.kernels.softmax.forward").origin)
        """
    )
    folders = (checkout / "fastattn", checkout / "bench", checkout / "kernels")
    assert all(line.startswith(str(folder)) for line, folder in zip(output.splitlines(), folders)), output


def test_kernels_of_hugging_face_is_not_shadowed(tmp_path, monkeypatch):
    """transformers and diffusers look for a top-level `kernels`; a checkout as working directory must not be found."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path, str(tmp_path)])
    spec = importlib.util.find_spec("kernels")
    assert spec is not None and spec.origin == str(package / "__init__.py")
