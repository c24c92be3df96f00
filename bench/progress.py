"""What is shown while a run goes on: lines as they come, and on a terminal a bar below them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

RED = "bold red"
Say = Callable[..., None]  # say(line, style="")


def say(line: str, style: str = "") -> None:
    """A plain line; red where the terminal can show it."""
    print(f"\x1b[1;31m{line}\x1b[0m" if style == RED and sys.stdout.isatty() else line, flush=True)


@contextmanager
def steps(title: str, total: int) -> Iterator[Say]:
    """Announces the title; each line said is one step of `total`."""
    bar = _bar() if sys.stdout.isatty() else None
    say(f"\n{title}")
    if bar is None:
        done = 0

        def numbered(line: str, style: str = "") -> None:
            nonlocal done
            done += 1
            say(f"[{done:{len(str(total))}d}/{total}] {line}", style)

        yield numbered
        return
    from rich.text import Text

    with bar:
        task = bar.add_task(title, total=total)

        def beside_the_bar(line: str, style: str = "") -> None:
            bar.console.print(Text(line, style=style))
            bar.advance(task)

        yield beside_the_bar


def _bar():
    try:
        from rich import progress
    except ImportError:
        return None
    columns = progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn()
    return progress.Progress(progress.TextColumn("{task.description}"), *columns, transient=True)
