"""The rules of docs/architecture.md: where a file lives, who may import whom, what may not appear at all."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = {"fastattn": "fastattn", "kernels": "fastattn.kernels", "bench": "fastattn.bench"}
_FILES = {path.stem for path in (ROOT / "fastattn" / "ops").glob("*.py") if path.stem != "__init__"}


def belongs(stem: str, ops) -> bool:
    """Whether `stem` is an op or, as op_part, one of several files of an op."""
    return any(stem == op or stem.startswith(op + "_") for op in ops)


OPS = sorted(stem for stem in _FILES if not belongs(stem, _FILES - {stem}))

# Layer -> the parts of fastattn it may import at any time; the longest matching prefix counts.
MAY_IMPORT = {
    "fastattn.params": (),
    "fastattn.philox": (),
    "fastattn.reference": (),
    "fastattn.flops": (),
    "fastattn.autograd": ("params", "flops"),
    "fastattn.checks": ("params",),
    "fastattn.eager": ("params", "philox"),
    "fastattn.masks": ("params", "checks", "philox", "backends.native"),
    "fastattn.kernels": ("kernels",),
    "fastattn.backends.reference": ("params", "philox", "reference"),
    "fastattn.backends.eager": ("params", "eager"),
    "fastattn.libraries": ("_version", "_C"),
    "fastattn.backends.native": ("params", "libraries", "_C"),
    "fastattn.backends.triton": ("params", "kernels"),
    "fastattn.backends.cuda": ("params", "libraries", "_C"),
    "fastattn.dispatch": ("params", "backends"),
    "fastattn.ops": ("params", "checks", "autograd", "dispatch", "eager", "masks", "ops"),
    "fastattn.nn": ("params", "ops"),
    "fastattn.dropin": ("params", "checks", "autograd", "dispatch", "ops"),
    "fastattn.testing": ("params", "philox", "reference", "testing"),
}

# Files that may exceed 400 lines, and by how much.
LONGER = {"tests/test_dropin.py": 420}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([SHIPPED[top], *(part for part in rest if part != "__init__")])


def imports(path: Path) -> set[str]:
    """Absolute names of all modules a shipped file imports, at the top or inside functions; not those for types alone."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    tree = ast.parse(path.read_text())
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import x` names modules, `from .x import y` names what is in one.
            found |= {target} if node.module and target != "fastattn" else {f"{target}.{a.name}" for a in node.names}
    return found


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources("fastattn", "kernels"), ids=relative)
def test_imports_follow_the_layers(path):
    name = module_name(path)
    layers = [layer for layer in MAY_IMPORT if name == layer or name.startswith(layer + ".")]
    if not layers:
        return  # __init__.py and the command line may import any layer
    layer = max(layers, key=len)
    allowed = tuple(f"fastattn.{part}" for part in MAY_IMPORT[layer])
    inside = {target for target in imports(path) if target.split(".")[0] in ("fastattn", "kernels", "bench")}
    wrong = {t for t in inside if not any(t == a or t.startswith(a + ".") for a in (*allowed, layer))}
    assert not wrong, f"{name} imports {sorted(wrong)}; {layer} may import {allowed or 'nothing of fastattn'}"


def test_masks_reach_the_native_core_through_one_door():
    """Only the plan builder asks for it, inside a function: masks work where the core is missing."""
    users = {path.name for path in sources("fastattn/masks") if "fastattn.backends.native" in imports(path)}
    assert users == {"plan.py"}
    at_import = ast.parse((ROOT / "fastattn" / "masks" / "plan.py").read_text()).body
    assert not any(
        "backends" in ast.unparse(node) for node in at_import if isinstance(node, (ast.Import, ast.ImportFrom))
    )


@pytest.mark.parametrize("path", sources("fastattn/reference"), ids=relative)
def test_reference_imports_torch_only(path):
    assert {name.split(".")[0] for name in imports(path)} <= {"torch", "math", "typing", "__future__"}


def test_kernels_import_torch_and_triton_only():
    outside = {name for path in sources("kernels") for name in imports(path) if not name.startswith("fastattn.kernels")}
    assert {name.split(".")[0] for name in outside} <= {"torch", "triton", "__future__", *sys.stdlib_module_names}


def test_bench_uses_the_public_api():
    import fastattn

    public = {f"fastattn.{name}" for name in fastattn.__all__}
    for path in sources("bench"):
        names = {name for name in imports(path) if name.split(".")[0] == "fastattn"}
        prefixes = ("fastattn.testing", "fastattn.bench", "fastattn._C")
        wrong = {name for name in names - public - {"fastattn"} if not name.startswith(prefixes)}
        assert not wrong, f"{relative(path)} imports {sorted(wrong)}"


def test_cpp_includes_follow_the_layers():
    torch_free, python_free = (
        re.compile(r"#include\s*[<\"](torch|ATen|c10)/"),
        re.compile(r"#include\s*[<\"](Python|pybind11)"),
    )
    for path in (p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")):
        text = path.read_text()
        assert not torch_free.search(text), f"{relative(path)} includes torch"
        if path.parent.name != "bind":
            assert not python_free.search(text), f"{relative(path)} includes Python outside csrc/bind"


def test_every_op_has_its_mirrored_files():
    needed = ["fastattn/reference/{}.py", "fastattn/eager/{}.py", "tests/test_{}.py", "bench/cases/{}.py"]
    missing = [path.format(op) for op in OPS for path in needed if not (ROOT / path.format(op)).exists()]
    assert OPS and not missing, f"missing: {missing}"


def test_every_kernel_belongs_to_an_op():
    stems = {path.stem for folder in ("reference", "eager") for path in (ROOT / "fastattn" / folder).glob("*.py")}
    stems |= {path.name for path in (ROOT / "kernels").iterdir() if path.is_dir() and path.name != "__pycache__"}
    native = [path.stem for path in (ROOT / "csrc" / "cpu").glob("*_forward*.cpp")]
    stems |= {re.sub(r"_forward.*", "", stem) for stem in native}
    assert not [stem for stem in stems - {"__init__", "common"} if not belongs(stem, OPS)]
    for folder in (path for path in (ROOT / "kernels").iterdir() if path.name in OPS):
        files = {path.stem for path in folder.glob("*.py")}
        assert {"__init__", "forward", "backward", "config"} <= files, f"{relative(folder)} has {sorted(files)}"


def test_every_package_directory_is_a_package():
    """Without __init__.py a folder is in the wheel but not importable from an editable install."""
    for path in sources("fastattn", "bench", "kernels"):
        assert (path.parent / "__init__.py").exists(), f"{relative(path.parent)} has no __init__.py"
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's package `kernels`"
    assert not (ROOT / "conftest.py").exists(), "a root conftest.py puts the checkout on sys.path"


def test_no_source_file_is_longer_than_400_lines():
    files = [*sources("fastattn", "kernels", "bench", "tests"), ROOT / "setup.py", ROOT / "CMakeLists.txt"]
    files += [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    lengths = {relative(path): len(path.read_text().splitlines()) for path in files}
    too_long = {path: lines for path, lines in lengths.items() if lines > LONGER.get(path, 400)}
    assert not too_long, f"a longer file usually holds two jobs: {too_long}"


@pytest.mark.parametrize("path", [*sources("fastattn", "kernels", "bench"), ROOT / "setup.py"], ids=relative)
def test_banned_calls(path):
    """Results do not depend on tuning at run time, and no file is ever executed or unpickled."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "marshal", "shelve"} & {name.split(".")[0] for name in names}, f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            assert dotted not in ("triton.autotune", "torch.load", "triton.heuristics"), f"line {node.lineno}"


def fresh(code: str) -> str:
    """Output of a new interpreter that starts outside the checkout."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert result.returncode == 0, result.stderr
    return result.stdout


WITHOUT = """
    from importlib.machinery import PathFinder

    find = PathFinder.find_spec

    def find_spec(name, path=None, target=None):
        return None if name in {names} or name.split(".")[0] in {names} else find(name, path, target)

    PathFinder.find_spec = find_spec
"""


@pytest.mark.parametrize("names", [("triton",), ("fastattn._C",), ("triton", "fastattn._C", "numpy")], ids=str)
def test_computes_on_cpu_without(names):
    output = fresh(
        WITHOUT.format(names=names)
        + """
    import torch, fastattn
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (5, 9, 9))
    out = fastattn.attention(q, k, v, causal=True)
    out.sum().backward()
    expected = fastattn.attention(q, k, v, causal=True, backend="reference")
    assert torch.allclose(out, expected, atol=1e-5) and q.grad.isfinite().all()
    print(fastattn.explain(q, k, v).chosen)
    """
    )
    if "fastattn._C" in names:
        assert output.strip() == "eager"


LATER = ("fastattn.kernels", "fastattn.bench", "fastattn.testing", "fastattn.nn")


def test_import_is_light():
    """Next to torch, importing fastattn loads its own modules, starts no process and writes no file."""
    output = fresh(
        """
    import sys, torch
    before = set(sys.modules)

    def hook(event, arguments):
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        compiled = writes and str(arguments[0]).endswith(".pyc") or "__pycache__" in str(arguments[0]) if writes else False
        if writes and not compiled or event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "socket.connect"):
            print("EVENT", event, arguments)

    sys.addaudithook(hook)
    import fastattn
    print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
    print(*sorted(name for name in set(sys.modules) - before if name.startswith("fastattn.")))
    """
    )
    events = [line for line in output.splitlines() if line.startswith("EVENT")]
    top_level, own = output.splitlines()[-2:]
    assert not events
    assert set(top_level.split()) - set(sys.stdlib_module_names) <= {
        "fastattn",
        "torch",
        "__editable___fastattn_finder",
    }
    assert not any(name.startswith(LATER) for name in own.split())
