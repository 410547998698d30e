"""Catches: a generated statement that is said to be true of boxes and is not, so that a model learns it wrong; a text
that is always true, or always false, which would tell its truth without the picture; a question whose answer names other
boxes than those that have what it asks for.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "preparing"))
import nlvr_boxes
from statements import WORDS, Item, about_things, about_towers, asked, contrast, described

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
        rf"there (?:is|are) {kinds}(?!no |a )(\w+) (\w+) (circle|square|triangle)s? touching the bottom", text
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


def test_a_description_names_everything_in_its_place():
    tower = [
        Item("square", colour, 20, 40, 80 - 21 * level) for level, colour in enumerate(("blue", "black"))
    ]
    assert described([tower, tower[:1], tower], True) == ["two blue black one blue two blue black"]
    box = [
        Item("circle", "blue", 10, 5, 5),
        Item("circle", "blue", 20, 30, 30),
        Item("square", "black", 30, 70, 70),
    ]
    assert described([box, box[1:2], box[2:]], False) == [
        "first three blue circle blue circle black square wall",
        "second one blue circle",
        "third one black square wall",
    ]


@pytest.mark.parametrize("tower", [True, False])
def test_answers_are_the_boxes_that_have_what_is_asked_for(tower):
    rng, checked = Random(5), set()
    for _ in range(4000):
        boxes = nlvr_boxes.towers(rng) if tower else nlvr_boxes.scattered(rng)
        question, answer = asked(rng, boxes, tower)
        found = re.search(r"(?:with|having|that has) a (\w+) block at the (top|base|bottom)$", question)
        if found:
            has = [box[-1 if found[2] == "top" else 0].colour == found[1] for box in boxes]
        elif found := re.search(r"with only (yellow|black|blue) items$", question):
            has = [all(item.colour == found[1] for item in box) for box in boxes]
        elif found := re.fullmatch(r"how many (yellow|black|blue) (circle|square|triangle)s", question):
            things = [i for box in boxes for i in box if (i.colour, i.shape) == (found[1], found[2])]
            assert answer == str(len(things))
            checked.add("how many")
            continue
        else:
            continue
        places = [name for name, each in zip(("first", "second", "third"), has, strict=True) if each]
        assert answer == (" ".join(places) or "none")
        checked.add(question.split()[0] + answer)
    assert len(checked) >= 7


@pytest.mark.parametrize("tower", [True, False])
def test_rearranged_boxes_hold_the_same_things(tower):
    rng, moved = Random(6), 0
    for _ in range(100):
        boxes = nlvr_boxes.towers(rng) if tower else nlvr_boxes.scattered(rng)
        other = nlvr_boxes.rearranged(boxes, rng)
        before, after = (
            Counter((item.shape, item.colour, item.size) for box in each for item in box)
            for each in (boxes, other)
        )
        assert nlvr_boxes.are_towers(other) == nlvr_boxes.are_towers(boxes)
        assert all(1 <= len(box) <= (4 if tower else 8) for box in other)
        # A crowded box may leave no room for one of its things, and then it is not drawn at all.
        assert after <= before
        assert not tower or after == before
        moved += other != boxes
    assert moved > 80


def test_a_text_is_false_of_the_same_things_where_that_can_be():
    rng = Random(2)
    pool = []
    for _ in range(30):
        boxes = nlvr_boxes.towers(rng)
        pool += [boxes, *(nlvr_boxes.rearranged(boxes, rng) for _ in range(3))]
    found = [each for each in (contrast(rng, pool, True, alike=4) for _ in range(200)) if each]
    alike = [yes // 4 == no // 4 for _, yes, no in found]
    assert 0.5 < sum(alike) / len(alike) < 1


def test_a_picture_has_its_boxes_in_three_cells():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    picture = nlvr_boxes.arranged([nlvr_boxes.Image.new("RGB", (100, 100), colour) for colour in colours])
    found = [picture.getpixel(place) for place in ((50, 50), (154, 50), (50, 154), (154, 154))]
    assert found == [*colours, nlvr_boxes.GREY]
