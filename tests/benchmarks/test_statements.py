"""Catches: a generated statement that is said to be true of boxes and is not, so that a model learns it wrong; a text
that is always true, or always false, which would tell its truth without the picture.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from random import Random

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "preparing"))
import nlvr_boxes
from statements import WORDS, Item, about_things, about_towers, contrast, described

NUMBER = {word: place for place, word in enumerate(WORDS)} | {str(n): n for n in range(9)}


def holds(kind: str, count: int, n: int) -> bool:
    exact = kind in ("exactly ", "only ")
    return count <= n if kind == "at most " else count == n if exact else count >= n


def judged(text: str, boxes) -> bool | None:
    """The truth of some forms, read from their words; None of others."""
    stacks = [[item.colour for item in box] for box in boxes]
    items = [item for box in boxes for item in box]
    kinds = r"(exactly |at ?least |only |at most |)"
    found = re.fullmatch(rf"there (?:is|are) {kinds}(\w+) (\w+) blocks?", text)
    if found:
        kind = found[1].replace("atleast", "at least")
        return holds(kind, sum(stack.count(found[3]) for stack in stacks), NUMBER[found[2]])
    found = re.fullmatch(
        r"there is (?:a|one|at least one) (\w+) block (?:over|above|on|on top of) a (\w+) block", text
    )
    if found:
        return any(f"{found[2]} {found[1]}" in " ".join(stack) for stack in stacks)
    found = re.fullmatch(
        rf"there (?:is|are) {kinds}(\w+) (\w+) (circle|square|triangle)s? touching the bottom", text
    )
    if found:
        kind = found[1].replace("atleast", "at least")
        low = [i for i in items if i.colour == found[3] and i.shape == found[4] and i.y + i.size >= 99]
        return holds(kind, len(low), NUMBER[found[2]])
    return None


def test_statements_say_the_truth():
    rng, checked = Random(3), 0
    for _ in range(6000):
        boxes = nlvr_boxes.towers(rng) if rng.random() < 0.5 else nlvr_boxes.scattered(rng)
        tower = all(item.x == 40 for box in boxes for item in box)
        text, true = (about_towers if tower else about_things)(rng, boxes)
        wanted = judged(text, boxes) if tower or "block" not in text else None
        if wanted is not None:
            assert true == wanted, (text, boxes)
            checked += 1
    assert checked > 150


@pytest.mark.parametrize("tower", [True, False])
def test_every_text_is_true_of_one_picture_and_false_of_another(tower):
    rng = Random(0)
    pool = [nlvr_boxes.towers(rng) if tower else nlvr_boxes.scattered(rng) for _ in range(80)]
    found = [each for each in (contrast(rng, pool, tower) for _ in range(100)) if each]
    assert len(found) > 70
    for text, yes, no in found:
        assert yes != no
        assert judged(text, pool[yes]) in (True, None)
        assert judged(text, pool[no]) in (False, None)


def test_a_box_is_drawn_as_it_is_described():
    item = Item("square", "blue", 20, 80, 10)
    assert item.touches
    assert not item.in_corner
    picture = nlvr_boxes.drawn([item])
    assert picture.getpixel((80, 10)) == picture.getpixel((99, 29)) == (0, 153, 255)
    assert picture.getpixel((79, 10)) == picture.getpixel((80, 30)) == nlvr_boxes.PALE


def test_a_description_names_everything_in_a_box():
    tower = [
        Item("square", colour, 20, 40, 80 - 21 * level) for level, colour in enumerate(("blue", "black"))
    ]
    assert described(tower, True) == "a tower with two blocks black over blue"
    box = [
        Item("circle", "blue", 10, 5, 5),
        Item("circle", "blue", 20, 30, 30),
        Item("square", "black", 30, 70, 70),
    ]
    assert described(box, False) == (
        "a box with three items blue on top two blue circles and one black square touching the wall"
    )


def test_a_picture_has_its_boxes_where_it_is_said_to():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    boxes = [nlvr_boxes.Image.new("RGB", (100, 100), colour) for colour in colours]
    picture, cells = nlvr_boxes.arranged(boxes, Random(4), mirror=False)
    for colour, cell in zip(colours, cells, strict=True):
        x, y = 50 + 104 * ("right" in cell), 50 + 104 * ("lower" in cell)
        assert picture.getpixel((x, y)) == colour
