"""The report's charts as inline SVG: stacked bars, histograms, curves. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from capfilt.catalog.artefacts import number
from capfilt.catalog.html import Html, element

WIDTH, HEIGHT = 420, 176
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 18, 24
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


def stacked_bar(parts: Sequence[tuple[str, float]], whole: float, width: float = 1.0) -> Html:
    """A horizontal bar whose pieces (style class, size) take their share of `whole` in `width` of the room."""
    pieces, x = [], 0.0
    for class_, size in parts:
        if size > 0 and whole > 0:
            # A sliver that exists is seen.
            length = max(100 * width * size / whole, 0.4)
            pieces.append(
                element("rect", x=round(x, 3), y=0, width=round(length, 3), height=10, class_=class_)
            )
            x += length
    return element(
        "svg", *pieces, class_="bar", viewBox="0 0 100 10", preserveAspectRatio="none", aria_hidden="true"
    )


def histogram(
    kept: Sequence[int], dropped: Sequence[int], low: float, high: float, cut: float | None, label: str
) -> Html:
    """Counts per bin, the kept on the axis and the dropped on top of them, with the threshold marked."""
    bins = len(kept)
    top = max([1, *(a + b for a, b in zip(kept, dropped, strict=True))])
    plot_width, plot_height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    children = _axes(low, high, 0, top, x_label="")
    bar = plot_width / bins
    for place, (k, d) in enumerate(zip(kept, dropped, strict=True)):
        if not k + d:
            continue
        x = _LEFT + place * bar
        start, end = (low + (high - low) * (place + side) / bins for side in (0, 1))
        title = element("title", f"{start:.2f} to {end:.2f}: {k:,} kept, {d:,} dropped")
        y = float(_TOP + plot_height)
        rectangles = []
        for class_, count in (("kept", k), ("dropped", d)):
            if count:
                height = max(plot_height * count / top, 0.75)
                y -= height
                box = {"x": x + 0.5, "y": y, "width": bar - 1, "height": height}
                rounded = {name: round(value, 2) for name, value in box.items()}
                rectangles.append(element("rect", class_=class_, **rounded))
        children.append(element("g", title, *rectangles))
    if cut is not None and low <= cut <= high:
        x = _LEFT + plot_width * (cut - low) / (high - low)
        # Near the right edge the words go to the left of the line.
        side, anchor = (-4, "end") if x > WIDTH * 0.75 else (4, "start")
        words = f"kept from {number(cut)}"
        children += [
            element(
                "line", x1=round(x, 2), x2=round(x, 2), y1=_TOP - 15, y2=_TOP + plot_height, class_="cut"
            ),
            element("text", words, x=round(x + side, 2), y=_TOP - 8, class_="cutlabel", text_anchor=anchor),
        ]
    return _chart(children, label)


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


def curves(lines: Sequence[Curve], label: str, x_label: str, reference: Reference | None = None) -> Html:
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
    low, high = (low if low == 0 else low - padding), high + padding
    right = max(*xs, 1e-9)
    plot_width, plot_height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> str:
        return f"{_LEFT + plot_width * x / right:.1f},{_TOP + plot_height * (high - y) / (high - low):.1f}"

    children = _axes(0, right, low, high, x_label=x_label)
    if reference is not None and low < reference.value < high:
        y = round(_TOP + plot_height * (high - reference.value) / (high - low), 1)
        children += [
            element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_="reference"),
            element("text", reference.label, x=WIDTH - _RIGHT, y=y - 3, text_anchor="end", class_="cutlabel"),
        ]
    for line in lines:
        points = thinned(line.points, math.ceil(_MOST_POINTS * line.points[-1][0] / right))
        class_ = f"curve c{line.colour % CURVE_COLOURS}{' dash' if line.colour >= CURVE_COLOURS else ''}"
        title = element("title", f"{line.name}: {number(line.points[-1][1])} at {number(line.points[-1][0])}")
        if len(points) == 1:
            at_x, at_y = place(*points[0]).split(",")
            children.append(element("circle", title, cx=at_x, cy=at_y, r=2.5, class_=f"{class_} dot"))
        else:
            path = " ".join(place(*point) for point in points)
            children.append(element("polyline", title, points=path, class_=class_))
    return _chart(children, label)


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


def _axes(left: float, right: float, bottom: float, top: float, *, x_label: str) -> list[Html]:
    plot_width, plot_height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    floor = _TOP + plot_height
    children = []
    for value in ticks(bottom, top, 3):
        y = round(floor - plot_height * (value - bottom) / (top - bottom), 2)
        children += [
            element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_="grid"),
            element("text", _tick(value), x=_LEFT - 6, y=y + 3.5, text_anchor="end"),
        ]
    children.append(element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=floor, y2=floor, class_="axis"))
    for value in ticks(left, right):
        x = round(_LEFT + plot_width * (value - left) / (right - left), 2)
        near_end = x > WIDTH - 34
        children.append(
            element("text", _tick(value), x=x, y=floor + 15, text_anchor="end" if near_end else "middle")
        )
    if x_label:
        children.append(element("text", x_label, x=_LEFT - 6, y=floor + 15, text_anchor="end"))
    return children


def _tick(value: float) -> str:
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:,.0f}" if size >= 1000 else f"{value:g}"


def _chart(children: Sequence[Html], label: str) -> Html:
    return element(
        "svg", *children, class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label
    )
