"""The charts of a report, each one image: lines against length, bars of ratios, a roofline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .style import CHART, SERIES, THEMES
from .svg import Frame, Point, Scale, apart, drawing, element, length, round_up, short, tooltip, words

WIDTH, HEIGHT = 500, 300
LEFT, RIGHT, BOTTOM = 58, 16, 46
LEGEND_ROW, LETTER = 18, 6.6  # pixels
MOST_LABEL, BARS, ROW = 400, 400, 22  # of the chart of ratios
ALONE = THEMES + CHART


@dataclass(frozen=True)
class Line:
    name: str
    colour: int  # an index of the series' colours
    points: tuple[Point, ...]  # x ascending


@dataclass(frozen=True)
class Bar:
    label: str
    ratio: float
    low: float
    high: float
    goal: float | None = None


@dataclass(frozen=True)
class Dot:
    label: str
    intensity: float  # FLOP per byte
    rate: float  # GFLOP/s
    colour: int
    hollow: bool = False


def paint(colour: int) -> str:
    return f"var(--s{min(colour, SERIES)})"


def _legend(entries: Sequence[tuple[str, int]], left: float, top: float, width: float) -> tuple[str, float]:
    """Markup, and the height it takes."""
    parts, x, y = [], left, top
    for name, colour in entries:
        size = 26 + LETTER * len(name)
        if x > left and x + size > width:
            x, y = left, y + LEGEND_ROW
        parts.append(element("rect", x=x, y=y - 9, width=10, height=10, rx=2, fill=paint(colour)))
        parts.append(words(x + 15, y, name, "label"))
        x += size
    return "".join(parts), y - top + LEGEND_ROW


def lines(title: str, series: Sequence[Line], y_label: str, *, log: bool = False, alone: bool = False) -> str:
    """y against length of sequence, on a logarithmic axis of lengths."""
    xs = sorted({x for line in series for x, _ in line.points})
    return _lines(title, series, y_label, "length (tokens)", [(x, length(x)) for x in xs], True, log, alone)


def curves(title: str, series: Sequence[Line], y_label: str) -> str:
    """y against steps of training."""
    last = max(x for line in series for x, _ in line.points)
    ticks = [(x, short(x)) for x in Scale(0, last, 0, 1).ticks()]
    return _lines(title, series, y_label, "step", ticks, False, True, False)


def _lines(
    title: str,
    series: Sequence[Line],
    y_label: str,
    x_label: str,
    ticks: Sequence[tuple[float, str]],
    log_x: bool,
    log: bool,
    alone: bool,
) -> str:
    xs = sorted({x for line in series for x, _ in line.points})
    ys = [y for line in series for _, y in line.points]
    legend, taken = _legend([(line.name, line.colour) for line in series], LEFT - 40, 44, WIDTH - RIGHT)
    top = 44 + taken + 16
    height = HEIGHT + taken
    low, high = (min(ys) / 1.3, max(ys) * 1.3) if log else (0.0, round_up(max(ys)))
    x = Scale(xs[0] if log_x else 0, xs[-1], LEFT + 12, WIDTH - RIGHT - 14, log=log_x)
    frame = Frame(x, Scale(low, high, height - BOTTOM, top, log=log))
    shown = [ticks[i] for i in apart([frame.x(x) for x, _ in ticks], 34)]
    parts = [words(LEFT - 40, 20, title, "title"), legend]
    parts.append(frame.axes(shown, x_label, y_label))
    for line in reversed(series):  # ours lies on top
        stroke = paint(line.colour)
        parts.append(element("path", class_="line", stroke=stroke, d=frame.path(line.points)))
        for x_, y_ in line.points:
            at = f"{length(x_)} tokens" if log_x else f"step {x_:g}"
            note = tooltip(f"{line.name}, {at}: {short(y_)} {y_label}")
            parts.append(element("circle", note, cx=frame.x(x_), cy=frame.y(y_), r=4, fill=stroke))
    return drawing(WIDTH, height, title, *_background(WIDTH, height, alone), *parts, style=ALONE if alone else "")


def _background(width: float, height: float, alone: bool) -> list[str]:
    return [element("rect", class_="surface", width=width, height=height, rx=8)] if alone else []


def ratios(title: str, bars: Sequence[Bar], *, alone: bool = False) -> str:
    """How many times faster, from 1 to the right, or slower, to the left; a mark where the goal is."""
    values = [v for bar in bars for v in (bar.low, bar.high, bar.ratio, bar.goal or 1.0)]
    low, high = min(0.8, *values) / 1.05, max(1.5, *values) * 1.05
    top, left = 62, min(MOST_LABEL, 34 + LETTER * max(len(bar.label) for bar in bars))
    width, height = left + BARS + 76, top + ROW * len(bars) + 34
    scale = Scale(low, high, left, left + BARS, log=True)
    bottom = height - 28
    ticks = scale.ticks()
    parts = [words(12, 22, title, "title")]
    parts.append(words(12, 42, "bar: times as fast, with its 95% interval; black or white mark: the goal", "label"))
    for i in apart([scale(tick) for tick in ticks], 30):
        x = scale(ticks[i])
        parts.append(element("line", x1=x, x2=x, y1=top - 6, y2=bottom, class_="grid"))
        parts.append(words(x, bottom + 16, f"{short(ticks[i])}x", anchor="middle"))
    for i, bar in enumerate(bars):
        y = top + ROW * i
        parts.append(_bar(bar, scale, y))
    parts.append(element("line", x1=scale(1), x2=scale(1), y1=top - 6, y2=bottom, class_="axis"))
    return drawing(width, height, title, *_background(width, height, alone), *parts, style=ALONE if alone else "")


def _bar(bar: Bar, scale: Scale, y: float) -> str:
    one, end, middle = scale(1), scale(bar.ratio), y + ROW / 2
    most = int(MOST_LABEL / LETTER) - 3
    label = bar.label if len(bar.label) <= most else bar.label[: most - 1] + "…"
    goal = "" if bar.goal is None else f", goal {bar.goal:g}x"
    note = tooltip(f"{bar.label}: {bar.ratio:.2f}x ({bar.low:.2f} to {bar.high:.2f}){goal}")
    fill = paint(0) if bar.ratio >= 1 else "var(--bad)"
    tip = max(end, one, scale(bar.high), scale(bar.goal) if bar.goal is not None else 0) + 7
    box = {"x": min(one, end), "y": y + 4, "width": max(abs(end - one), 1.0), "height": ROW - 8, "rx": 2}
    parts = [
        words(scale.start - 10, middle + 4, label, "value", "end"),
        element("rect", note, fill=fill, **box),
        element("line", x1=scale(bar.low), x2=scale(bar.high), y1=middle, y2=middle, class_="whisker"),
        words(tip, middle + 4, f"{bar.ratio:.2f}x", "value"),
    ]
    if bar.goal is not None:
        at = scale(bar.goal)
        parts.append(element("line", x1=at, x2=at, y1=y + 1, y2=y + ROW - 1, class_="goal"))
    return "".join(parts)


def roofline(
    title: str,
    dots: Sequence[Dot],
    roofs: Sequence[tuple[str, float]],
    bandwidth: float,
    legend: Sequence[tuple[str, int]],
) -> str:
    """What was reached against what arithmetic (`roofs`, GFLOP/s) and memory (`bandwidth`, GB/s) allow."""
    width, height = 1040, 460
    below, above = min(dot.intensity for dot in dots), max(dot.intensity for dot in dots)
    ridge = max(rate for _, rate in roofs) / bandwidth
    low_x, high_x = min(below, ridge) / 2, max(above, ridge) * 2
    low_y = min(min(dot.rate for dot in dots), bandwidth * low_x) / 1.5
    high_y = max(rate for _, rate in roofs) * 1.8
    entries, _ = _legend(legend, LEFT - 40, 44, width - RIGHT)
    frame = Frame(
        Scale(low_x, high_x, LEFT, width - RIGHT, log=True), Scale(low_y, high_y, height - BOTTOM, 84, log=True)
    )
    parts = [words(LEFT - 40, 20, title, "title"), entries]
    parts.append(frame.axes([(x, short(x)) for x in frame.x.ticks()], "FLOP per byte of the call's tensors", "GFLOP/s"))
    for name, rate in roofs:
        parts.append(
            element("path", class_="roof", d=frame.path([(max(low_x, rate / bandwidth), rate), (high_x, rate)]))
        )
        note = f"{name} {short(rate)} GFLOP/s"
        parts.append(words(width - RIGHT - 4, frame.y(rate) - 6, note, "label", "end"))
    start = max(low_x, low_y / bandwidth)
    parts.append(element("path", class_="roof", d=frame.path([(start, start * bandwidth), (ridge, ridge * bandwidth)])))
    middle = math.sqrt(start * ridge)
    x, y = frame.x(middle), frame.y(middle * bandwidth)
    slope = math.degrees(math.atan2(frame.y(1) - frame.y(10), frame.x(10) - frame.x(1)))
    note = f"memory {short(bandwidth)} GB/s"
    parts.append(words(x, y - 7, note, "label", "middle", transform=f"rotate({-slope:.1f} {x:.1f} {y:.1f})"))
    for dot in sorted(dots, key=lambda dot: not dot.hollow):
        place = {"cx": frame.x(dot.intensity), "cy": frame.y(dot.rate), "r": 5}
        note = tooltip(f"{dot.label}: {short(dot.rate)} GFLOP/s at {short(dot.intensity)} FLOP per byte")
        colour = paint(dot.colour)
        look = {"class_": "hollow", "style": f"stroke:{colour}"} if dot.hollow else {"fill": colour}
        parts.append(element("circle", note, **place, **look))
    return drawing(width, height, title, *parts)
