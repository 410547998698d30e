"""The report's charts: the sizes and places of stacked bars, histograms and curves, which `charts.jinja` draws as SVG.

Colours come from the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from capfilt.catalog.artefacts import number
from capfilt.catalog.pages import template

CURVE_COLOURS = 8
"""How many colours the style sheet has for curves; further ones repeat, dashed."""

_MOST_POINTS = 160


def share(part: float, whole: float) -> str:
    """`part` of `whole` as a percentage; a part that is not all and not nothing is never shown as 100% or 0%."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "<0.1%"
    if 99.9 < percent < 100:
        return ">99.9%"
    return f"{percent:.1f}%"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if rough <= factor * power * 1.0001)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Frame:
    """The room of a chart, and the values at its edges: from `low` to `high` along x, from `bottom` to `top` along y."""

    low: float
    high: float
    bottom: float
    top: float

    WIDTH, HEIGHT = 420, 176
    left, right, ceiling, floor = 46, WIDTH - 10, 18, HEIGHT - 24

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * (value - self.low) / (self.high - self.low)

    def y(self, value: float) -> float:
        return self.floor - (self.floor - self.ceiling) * (value - self.bottom) / (self.top - self.bottom)

    def levels(self) -> Iterator[tuple[float, str]]:
        """Where the grid's lines are, and what they say."""
        return ((round(self.y(value), 2), _tick(value)) for value in ticks(self.bottom, self.top, 3))

    def marks(self) -> Iterator[tuple[float, str]]:
        """Where the x axis says something, and what."""
        return ((round(self.x(value), 2), _tick(value)) for value in ticks(self.low, self.high))


def _drawn(chart: str, *given: Any) -> Markup:
    drawn: Markup = getattr(template("charts.jinja").module, chart)(*given)
    return drawn


def stacked_bar(parts: Sequence[tuple[str, float]], whole: float) -> Markup:
    """A horizontal bar whose pieces (style class, size) take their share of `whole`."""
    pieces, x = [], 0.0
    for class_, size in parts:
        if size > 0 and whole > 0:
            # A sliver that exists is seen.
            length = max(100 * size / whole, 0.4)
            pieces.append((class_, round(x, 3), round(length, 3)))
            x += length
    return _drawn("stacked_bar", pieces)


def histogram(
    kept: Sequence[int], dropped: Sequence[int], low: float, high: float, cut: float | None, label: str
) -> Markup:
    """Counts per bin, the kept on the axis and the dropped on top of them, with the threshold marked."""
    frame = Frame(low, high, 0, max([1, *(a + b for a, b in zip(kept, dropped, strict=True))]))
    bins = len(kept)
    bar = (frame.right - frame.left) / bins
    bars = []
    for place, counts in enumerate(zip(kept, dropped, strict=True)):
        if not any(counts):
            continue
        start, end = (low + (high - low) * (place + side) / bins for side in (0, 1))
        boxes, y = [], float(frame.floor)
        for class_, count in zip(("kept", "dropped"), counts, strict=True):
            if count:
                height = max(frame.floor - frame.y(count), 0.75)
                y -= height
                box = (frame.left + place * bar + 0.5, y, bar - 1, height)
                boxes.append((class_, *(round(value, 2) for value in box)))
        title = f"{start:.2f} to {end:.2f}: {counts[0]:,} kept, {counts[1]:,} dropped"
        bars.append((title, boxes))
    line = None if cut is None or not low <= cut <= high else {"x": round(frame.x(cut), 2), "value": cut}
    return _drawn("histogram", frame, bars, line, label)


@dataclass(frozen=True)
class Curve:
    """One line of a chart: its name, its points in order of x, and which colour it has (from 0)."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int


@dataclass(frozen=True)
class Reference:
    """A level worth knowing, drawn where it falls inside the chart."""

    value: float
    label: str


def curves(lines: Sequence[Curve], label: str, x_label: str, reference: Reference | None = None) -> Markup:
    """Lines over a shared x axis from 0, thinned to what their share of the axis can show (see `thinned`)."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    low, high = min(ys), max(ys)
    # A loss that ends near 0 is read against 0.
    if 0 < low < 0.35 * high:
        low = 0.0
    if high <= low:
        low, high = low - 0.5, high + 0.5
    padding = 0.04 * (high - low)
    frame = Frame(0, max(*xs, 1e-9), low if low == 0 else low - padding, high + padding)
    drawn = []
    for line in lines:
        last_x, last_y = line.points[-1]
        points = thinned(line.points, math.ceil(_MOST_POINTS * last_x / frame.high))
        drawn.append(
            {
                "class": colour(line.colour),
                "title": f"{line.name}: {number(last_y)} at {number(last_x)}",
                "points": [(f"{frame.x(x):.1f}", f"{frame.y(y):.1f}") for x, y in points],
            }
        )
    known = None
    if reference is not None and frame.bottom < reference.value < frame.top:
        known = {"y": round(frame.y(reference.value), 1), "label": reference.label}
    return _drawn("curves", frame, drawn, known, x_label, label)


def colour(place: int) -> str:
    """The style classes of the curve at a place."""
    return f"c{place % CURVE_COLOURS}{' dash' if place >= CURVE_COLOURS else ''}"


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points (2 or more): means over stretches of equally many, each at the x of its last point.

    The first point stays as it is, so that a curve begins where its log begins.
    """
    most = max(most, 2)
    if len(points) <= most:
        return list(points)
    result, rest, stretches = [points[0]], points[1:], most - 1
    for place in range(stretches):
        stretch = rest[place * len(rest) // stretches : (place + 1) * len(rest) // stretches]
        result.append((stretch[-1][0], sum(y for _, y in stretch) / len(stretch)))
    return result


def _tick(value: float) -> str:
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:,.0f}" if size >= 1000 else f"{value:g}"
