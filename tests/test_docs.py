"""README and docs say what the code says: snippets run, generated parts are up to date, pictures are there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    pytest.param(snippet, id=f"{page.name}-{n}")
    for page in PAGES
    for n, snippet in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet):
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


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
