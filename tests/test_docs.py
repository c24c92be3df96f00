"""README and docs say what the code says: snippets run, generated parts are up to date, pictures are there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_MEASURED = ("32 MiB", "64 MiB", "32 MB")  # limits that the code sets
BUILDS = "building.md"  # times and sizes of builds are measured by hand: no results file has them
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))
SNIPPETS = [
    pytest.param(snippet, id=f"{page.name}-{n}")
    for page in PAGES
    for n, snippet in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


# A process each, all forked from one that has imported torch already.
RUN_ALL = """
import json, os, sys, traceback, torch, fastattn
for snippet in json.load(sys.stdin):
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            exec(snippet, {"__name__": "__main__"})
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-4000:])
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        error = said.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, error]), flush=True)
"""


@pytest.fixture(scope="module")
def results():
    """Exit status and traceback of every snippet."""
    snippets = json.dumps([snippet.values[0] for snippet in SNIPPETS])
    done = subprocess.run([sys.executable, "-c", RUN_ALL], input=snippets, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("n", [pytest.param(n, id=snippet.id) for n, snippet in enumerate(SNIPPETS)])
def test_snippet_runs(n, results):
    code, error = results[n]
    assert code == 0, error


def test_generated_parts_are_current():
    done = subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"run: python docs/generate.py\n{done.stderr}"


def test_pictures_can_be_drawn(tmp_path):
    """docs/images.py draws every picture that docs/masks.md shows and that is checked in."""
    pytest.importorskip("matplotlib")
    done = subprocess.run([sys.executable, ROOT / "docs" / "images.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn = {path.name for path in tmp_path.glob("*.png")}
    shown = set(re.findall(r"\]\(images/(.*?)\)", (ROOT / "docs" / "masks.md").read_text()))
    kept = {path.name: path.stat().st_size for path in (ROOT / "docs" / "images").glob("*")}
    assert drawn == shown == set(kept) and max(kept.values()) < 30_000


def git(*arguments):
    return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)


def test_the_page_says_which_published_commits_are_in_the_history():
    if shutil.which("git") is None or git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("no git, no checkout, or a shallow one")
    history = git("rev-list", "HEAD").stdout.split()
    rows = [
        line.split(" | ")
        for line in (ROOT / "docs" / "benchmarking.md").read_text().splitlines()
        if ".json` | " in line
    ]
    said = {row[0].strip("| `"): (row[3], row[4]) for row in rows}
    commits = {path.name: json.loads(path.read_text())["environment"]["git"]["commit"] for path in RESULTS}
    assert said == {name: (full[:12], "yes" if full in history else "no") for name, full in commits.items()}


MEASURED = re.compile(
    r"\b\d[\d.,]*\s?(?:s|ms|us|GFLOP/s|TFLOP/s|GB/s|tokens/s|MB|MiB|GiB)\b|\b\d+\.\d+x(?!\w)|\b\d+(?:\.\d+)? times (?:as fast|faster)"
)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_figure_is_generated(page):
    """A number with a unit of speed or memory stands only between the marks of docs/generate.py, or of what is predicted."""
    by_hand = re.sub(r"<!-- (.*?): (generated|not measured)\b.*?<!-- end of \1 -->", "", page.read_text(), flags=re.S)
    found = [found.group() for found in MEASURED.finditer(by_hand)]
    if page.name == BUILDS:
        found = [figure for figure in found if not figure.endswith((" s", " MB", " GiB"))]
    assert not [figure for figure in found if figure not in NOT_MEASURED], found


def test_a_chart_that_differs_from_the_results_is_noticed(tmp_path):
    """`--check` names what is out of date: run on a copy of the pages, of which one figure was changed by hand."""
    for name in ("README.md", "docs", "bench/results"):
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    for page, figure in (
        ("README.md", r"\| met \|"),
        ("docs/charts/cpu.svg", r"\d\.\d\dx"),
        ("docs/benchmarking.md", r"\| \d+ s \|"),
    ):
        path = tmp_path / page
        changed, count = re.subn(figure, "| 9.99x better |", path.read_text(), count=1)
        assert count == 1
        path.write_text(changed)
    check = [sys.executable, tmp_path / "docs" / "generate.py", "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "out of date: README.md, docs/benchmarking.md, docs/charts/cpu.svg"
