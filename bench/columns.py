"""Tables of text: drawn by rich on a terminal wide enough, aligned plain lines anywhere else. No number is ever cut."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

RED, GREEN = "red", "green"
ANSI = {RED: "\x1b[31m", GREEN: "\x1b[32m"}
Cell = tuple[str, str]  # text, colour or ""


def show(
    title: str, header: Sequence[str], rows: Sequence[list[Cell]], left: Sequence[int] = (0, -1), below: int = 1
) -> None:
    """`left`: the columns that are not numbers. `below`: how many of the last have lines of their own where it is narrow."""
    words = {i % len(header) for i in left}
    widths = [max(len(name), *(len(row[i][0]) for row in rows)) for i, name in enumerate(header)] if rows else []
    terminal = sys.stdout.isatty()
    if terminal and sum(widths) + 3 * len(widths) + 1 > shutil.get_terminal_size().columns:
        _narrow(title, header, rows, widths, words, below)
    elif not (terminal and _drawn(title, header, rows, words)):
        print(f"\n{title}")
        for texts in (header, *([text for text, _ in row] for row in rows)):
            print(_line(texts, widths, words))


def _line(texts: Sequence[str], widths: Sequence[int], words: set[int], start: int = 0, end: int | None = None) -> str:
    columns = range(len(widths))[start:end]
    return "  ".join(texts[i].ljust(widths[i]) if i in words else texts[i].rjust(widths[i]) for i in columns).rstrip()


def _narrow(
    title: str, header: Sequence[str], rows: Sequence[list[Cell]], widths: list[int], words: set[int], below: int
) -> None:
    """The first column is a line above the numbers, the last are one below them."""
    names = [*header[-below:-1], ""]
    print(f"\n{title}\n  {_line(header, widths, words, 1, -below)}")
    for row in rows:
        if row[0][0]:
            print(row[0][0])
        print(" ", _line([text for text, _ in row], widths, words, 1, -below))
        rest = [_painted(f"{name} {text}".strip(), c) for name, (text, c) in zip(names, row[-below:]) if text]
        if rest:
            print("   ", "  ".join(rest))


def _painted(text: str, colour: str) -> str:
    return f"{ANSI[colour]}{text}\x1b[0m" if colour else text


def _drawn(title: str, header: Sequence[str], rows: Sequence[list[Cell]], words: set[int]) -> bool:
    """False where rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i in words else "right")
    for row in rows:
        table.add_row(*(Text(text, style=colour) for text, colour in row))
    Console().print(table)
    return True
