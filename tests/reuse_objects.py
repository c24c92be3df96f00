"""A compiler launcher for CMake: python reuse_objects.py BUILD COMPILER ARGUMENTS...

Copies the object that the folder BUILD has of the same command on the same files, or compiles.
"""

from __future__ import annotations

import filecmp
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

COMPILED = "module.cpp"  # in every build


def same_files(ours: Path, theirs: Path) -> bool:
    if not ours.is_dir():
        return ours.is_file() and theirs.is_file() and filecmp.cmp(ours, theirs, shallow=False)
    names = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (ours, theirs)]
    return names[0] == names[1] and all(filecmp.cmp(ours / n, theirs / n, shallow=False) for n in names[0])


def same(ours: str, theirs: str) -> bool:
    """Arguments, folders of headers, or sources together with their neighbours."""
    if ours == theirs:
        return True
    a, b = (Path(argument.removeprefix("-I")) for argument in (ours, theirs))
    return a.is_absolute() and b.is_absolute() and same_files(a, b) and (a.is_dir() or same_files(a.parent, b.parent))


def without_dependencies(arguments: list[str]) -> list[str]:
    """compile_commands.json leaves out where CMake has the names of headers written to."""
    skipped = {n + m for n, word in enumerate(arguments) if word in ("-MT", "-MF") for m in (0, 1)}
    return [word for n, word in enumerate(arguments) if n not in skipped and word != "-MD"]


def find(build: Path, command: list[str]) -> Path | None:
    """The object, if it is younger than its source and the headers of this project."""
    listed = build / "compile_commands.json"
    if "-o" not in command or command[-1].endswith(COMPILED) or not listed.exists():
        return None
    target = command[command.index("-o") + 1]
    made, ours = build / target, without_dependencies(command)
    for entry in json.loads(listed.read_text()):
        theirs = shlex.split(entry["command"])
        if Path(entry["directory"], entry.get("output", "")) != made or len(ours) != len(theirs) or not made.exists():
            continue
        source = Path(entry["file"])
        project = [*source.parent.rglob("*"), *(source.parents[1] / "include").rglob("*")]
        if all(map(same, ours, theirs)) and max(p.stat().st_mtime for p in project) <= made.stat().st_mtime:
            return made
    return None


def main(build: str, *command: str) -> None:
    found = find(Path(build), list(command))
    if found is None:
        os.execvp(command[0], command)
    shutil.copy(found, command[command.index("-o") + 1])


if __name__ == "__main__":
    main(*sys.argv[1:])
