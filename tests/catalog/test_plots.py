"""Would catch: bars and curves whose sizes are not those of the numbers, and points lost by thinning."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.catalog.plots import Curve, Reference, curves, histogram, share, stacked_bar, thinned, ticks


def attributes(svg: str, tag: str) -> list[dict[str, str]]:
    return [node.attrib for node in ET.fromstring(svg).iter(tag)]


def test_bar_pieces_have_their_shares() -> None:
    pieces = attributes(stacked_bar([("kept", 30), ("dropped", 10), ("failed", 0)], 80), "rect")
    assert [(p["class"], float(p["x"]), float(p["width"])) for p in pieces] == [
        ("kept", 0.0, 37.5), ("dropped", 37.5, 12.5),
    ]  # fmt: skip
    # One row of a million is still to be seen; no rows at all are no division by zero.
    assert float(attributes(stacked_bar([("failed", 1)], 10**6), "rect")[0]["width"]) > 0
    assert attributes(stacked_bar([("kept", 0)], 0), "rect") == []


def test_histogram_stacks_the_dropped_on_the_kept_and_marks_the_cut() -> None:
    svg = histogram([0, 4, 8], [8, 4, 0], 0.0, 1.0, 0.5, "scores")
    bars = {(b["class"], b["x"]): (float(b["y"]), float(b["height"])) for b in attributes(svg, "rect")}
    heights = {}
    for (kind, x), (y, height) in bars.items():
        heights.setdefault(x, {})[kind] = (y, height)
    first, middle, last = (heights[x] for x in sorted(heights, key=float))
    full = last["kept"][1]
    assert set(first) == {"dropped"}
    assert set(last) == {"kept"}
    assert first["dropped"][1] == full
    assert middle["kept"][1] == pytest.approx(full / 2, abs=0.02)
    assert middle["dropped"][0] + middle["dropped"][1] == pytest.approx(middle["kept"][0], abs=0.02)
    assert "kept from 0.5" in svg
    assert "0.33 to 0.67: 4 kept, 4 dropped" in svg
    assert "kept from" not in histogram([1], [0], 0.0, 1.0, None, "scores")
    assert "kept from" not in histogram([1], [0], 0.0, 1.0, 1.5, "scores")


def test_curves_span_the_chart_and_name_themselves() -> None:
    svg = curves([Curve("a<b", ((1.0, 2.0), (10.0, 1.0)), 0), Curve("one", ((5.0, 1.5),), 9)], "loss", "step")
    (line,) = attributes(svg, "polyline")
    points = [tuple(map(float, point.split(","))) for point in line["points"].split()]
    assert points[0][1] < points[1][1]
    assert (points[1][0] - 46) / (points[0][0] - 46) == pytest.approx(10, rel=0.02)
    (dot,) = attributes(svg, "circle")
    assert dot["class"] == "curve c1 dash dot"
    assert "a&lt;b: 1 at 10" in svg


def test_reference_is_drawn_only_where_it_falls_inside() -> None:
    lines = [Curve("a", ((1.0, 0.7), (10.0, 0.6)), 0)]
    assert "prior" in curves(lines, "itm", "step", Reference(0.6365, "prior"))
    assert "prior" not in curves(lines, "itm", "step", Reference(2.0, "prior"))


def test_flat_and_single_points_do_not_divide_by_zero() -> None:
    for points in (((0.0, 1.0),), ((1.0, 0.0), (2.0, 0.0)), ((0.0, -1.0), (0.0, -1.0))):
        assert "nan" not in curves([Curve("a", points, 0)], "x", "step")


@given(st.integers(2, 50), st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400))
def test_thinning_keeps_ends_order_and_mean(most: int, values: list[float]) -> None:
    points = [(float(place), value) for place, value in enumerate(values)]
    thin = thinned(points, most)
    assert len(thin) <= max(most, 2)
    assert thin[0] == points[0]
    assert thin[-1][0] == points[-1][0]
    assert [x for x, _ in thin] == sorted({x for x, _ in thin})
    assert min(values) - 1e-6 <= min(y for _, y in thin)
    assert max(y for _, y in thin) <= max(values) + 1e-6


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_inside_and_few(low: float, size: float) -> None:
    places = ticks(low, low + size)
    assert 1 <= len(places) <= 6
    assert all(low - 1e-6 * size <= place <= low + size * (1 + 1e-6) for place in places)


def test_known_ticks() -> None:
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert ticks(0, 105, 3) == [0, 50, 100]
    assert ticks(3, 3) == [3]


@pytest.mark.parametrize(
    ("part", "whole", "shown"),
    [
        (1, 3, "33.3%"),
        (0, 5, "0.0%"),
        (5, 5, "100.0%"),
        (1, 10**6, "<0.1%"),
        (999_999, 10**6, ">99.9%"),
        (0, 0, "–"),
    ],
)
def test_shares_never_hide_an_exception(part: int, whole: int, shown: str) -> None:
    assert share(part, whole) == shown


def test_svg_is_well_formed_with_hostile_labels() -> None:
    svg = curves([Curve("</svg><script>\x00", ((1.0, 2.0), (2.0, 1.0)), 0)], '"><b>', "step")
    assert [re.sub("{.*}", "", node.tag) for node in ET.fromstring(svg).iter() if "script" in node.tag] == []
