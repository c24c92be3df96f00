"""Pieces of a report's page: tables, sections, cards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .. import columns

Cell = tuple[str, str]  # text, class
Row = tuple[bool, Sequence[Cell]]  # whether a new group begins


def cell(text: str, class_: str = "") -> str:
    return f'<td class="{class_}">{escape(text)}</td>' if class_ else f"<td>{escape(text)}</td>"


def table(header: Sequence[str], rows: Iterable[Row]) -> str:
    numeric = {"n": ' class="n"'}
    first = list(rows)
    classes = [class_ for _, class_ in first[0][1]] if first else [""] * len(header)
    head = "".join(f"<th{numeric.get(c.split(' ')[0], '')}>{escape(name)}</th>" for name, c in zip(header, classes))
    body = "".join(
        f"<tr{' class=first' if new else ''}>{''.join(cell(*one) for one in cells)}</tr>" for new, cells in first
    )
    return f'<div class="card wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def of_text(header: Sequence[str], rows: Sequence[Sequence[columns.Cell]]) -> str:
    """A table as the terminal shows it, whose first and last columns are words."""
    last, classes = len(header) - 1, {columns.RED: "bad", columns.GREEN: "good", "": ""}
    return table(
        header,
        (
            (True, [(text, "n" if 0 < i < last else classes[colour]) for i, (text, colour) in enumerate(row)])
            for row in rows
        ),
    )


def section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p class=muted>{escape(text)}</p>{body}</section>" if body else ""


def cards(drawn: Sequence[str | None]) -> str:
    found = "".join(f'<div class="card">{image}</div>' for image in drawn if image)
    return f'<div class="cards">{found}</div>' if found else ""
