"""Just enough SVG for charts: elements, scales with ticks, axes. Colours are CSS variables of `style.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]


def element(tag: str, *inside: str, **attributes: object) -> str:
    """`inside` is markup. In names of attributes _ stands for -, and a last one for nothing."""
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    given = "".join(f' {name}="{escape(_text(value))}"' for name, value in names.items())
    return f"<{tag}{given}>{''.join(inside)}</{tag}>" if inside else f"<{tag}{given}/>"


def _text(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def words(x: float, y: float, content: str, class_: str = "tick", anchor: str = "start", **attributes: object) -> str:
    return element("text", escape(content), x=x, y=y, class_=class_, text_anchor=anchor, **attributes)


def tooltip(content: str) -> str:
    return f"<title>{escape(content)}</title>"


def short(value: float) -> str:
    """Three digits, thousands as k, millions as M."""
    if abs(value) >= 999_500:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 9999.5:
        return f"{value / 1000:.3g}k"
    return f"{value:.0f}" if abs(value) >= 99.5 else f"{value:.3g}"


def rate(value: float, unit: str) -> tuple[float, str]:
    """GFLOP/s as TFLOP/s from ten of them on; anything else as it is."""
    return (value / 1000, "TFLOP/s") if unit == "GFLOP/s" and value >= 10_000 else (value, unit)


def length(value: float) -> str:
    """Lengths of sequences: 512, 1k, 16k."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


@dataclass(frozen=True)
class Scale:
    """Data to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * ((at - low) / ((high - low) or 1.0))

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    raw = (high - low or 1.0) / 5
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and what lies between them where they are few; as on a linear axis where there is none."""
    decades = math.log10(high / low)
    if decades < 0.7:
        return _ticks(low, high)
    parts = (1, 2, 5) if decades < 2.5 else (1,)
    thin = max(1, math.ceil(decades / 7))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**p for p in powers if p % thin == 0 for m in parts]
    return [x for x in found if low * 0.999 <= x <= high * 1.001]


def round_up(value: float) -> float:
    """A little more than the largest value, where a linear axis ends."""
    ticks = _ticks(0, value or 1.0)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else value
    return math.ceil(value / step + 0.05) * step


@dataclass(frozen=True)
class Frame:
    """The plotting area: pixels of its edges, and its scales."""

    x: Scale
    y: Scale

    def axes(self, x_ticks: Sequence[tuple[float, str]], x_label: str, y_label: str) -> str:
        left, right, top, bottom = self.x.start, self.x.end, self.y.end, self.y.start
        parts = []
        for value in self.y.ticks():
            y = self.y(value)
            parts.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
            parts.append(words(left - 6, y + 4, short(value), anchor="end"))
        for value, text in x_ticks:
            x = self.x(value)
            parts.append(element("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
            parts.append(words(x, bottom + 17, text, anchor="middle"))
        parts.append(element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
        parts.append(words((left + right) / 2, bottom + 34, x_label, "label", "middle"))
        parts.append(words(left - 40, top - 10, y_label, "label"))
        return "".join(parts)

    def path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)


def apart(pixels: Sequence[float], room: float) -> list[int]:
    """Indices of labels, the first included, that leave each other `room` pixels."""
    kept: list[int] = []
    for i, at in enumerate(pixels):
        if not kept or abs(at - pixels[kept[-1]]) >= room:
            kept.append(i)
    return kept


def drawing(width: float, height: float, title: str, *parts: str, style: str = "") -> str:
    """One image; `style` makes it stand alone."""
    inside = [f"<style>{style}</style>"] if style else []
    attributes = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width:g} {height:g}"}
    return element("svg", tooltip(title), *inside, *parts, **attributes, width=width, height=height, role="img")
