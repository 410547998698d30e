"""Statements about three boxes of things whose truth is computed, in the forms of NLVR's train and development sentences;
and what teaches a model to judge them: what is in the boxes, and which of them have a property.

Each maker of statements returns a text and whether it is true of the boxes. Which boxes, and their pictures, are
`nlvr_boxes.py`'s.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

BOX = 100
COLOURS = ("yellow", "black", "blue")
SHAPES = ("circle", "triangle", "square")
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


@dataclass(frozen=True)
class Item:
    """A thing in a box: its left and upper edge and its size in pixels of the box, y downwards."""

    shape: str
    colour: str
    size: int
    x: int
    y: int

    @property
    def gaps(self) -> dict[str, int]:
        """Pixels to each wall."""
        right, bottom = BOX - self.x - self.size, BOX - self.y - self.size
        return {"left": self.x, "top": self.y, "right": right, "bottom": bottom}

    @property
    def touches(self) -> bool:
        return min(self.gaps.values()) <= 1

    @property
    def in_corner(self) -> bool:
        return sorted(self.gaps.values())[1] <= 1


Box = list[Item]


Statement = tuple[str, bool]


def number(rng: Random, count: int) -> str:
    return str(count) if rng.random() < 0.3 else WORDS[count]


def quantity(rng: Random, most: int = 4) -> tuple[str, int, Callable[[int], bool]]:
    """(words, the number in them, whether a count agrees)."""
    n = rng.randint(1, most)
    kind = rng.choice(("", "", "exactly ", "exactly ", "at least ", "at least ", "only ", "at most "))
    agrees = {
        "at least ": lambda count: count >= n,
        "": lambda count: count >= n,
        "at most ": lambda count: count <= n,
    }.get(kind, lambda count: count == n)
    kind = "atleast " if kind == "at least " and rng.random() < 0.2 else kind
    return kind + number(rng, n), n, agrees


def there(rng: Random, words: str, n: int) -> str:
    return f"there {'is' if n == 1 else 'are'} {words}"


def height(rng: Random) -> tuple[str, Callable[[int], bool]]:
    """("three blocks", whether a tower's height agrees)."""
    n = rng.randint(1, 4)
    kind = rng.choice(("", "", "exactly ", "only ", "at least ", "more than ", "less than ", "at most "))
    agrees = {
        "at least ": lambda count: count >= n,
        "more than ": lambda count: count > n,
        "less than ": lambda count: count < n,
        "at most ": lambda count: count <= n,
    }.get(kind, lambda count: count == n)
    return f"{kind}{number(rng, n)} block{'' if n == 1 else 's'}", agrees


END = {"top": -1, "base": 0, "bottom": 0}


def about_towers(rng: Random, boxes: list[Box]) -> Statement:
    stacks = [[item.colour for item in box] for box in boxes]
    c, d = rng.choice(COLOURS), rng.choice(COLOURS)
    end = rng.choice(("top", "top", "base", "base", "bottom"))
    at = [stack[END[end]] for stack in stacks]
    having = rng.choice(("with", "having", "which has", "that has", "that contains"))
    adjacent = [(stack[i + 1], stack[i]) for stack in stacks for i in range(len(stack) - 1)]
    over = rng.choice(("over", "above", "on", "on top of"))
    form = rng.randrange(17)
    if form in (0, 1):
        words, n, agrees = quantity(rng, 3)
        s = "" if n == 1 else "s"
        return there(rng, f"{words} tower{s} {having} a {c} block at the {end}", n), agrees(at.count(c))
    if form in (2, 3):
        words, agrees = height(rng)
        tall = rng.random() < 0.7
        true = any(stack[END[end]] == c and (not tall or agrees(len(stack))) for stack in stacks)
        some, flip = rng.choice((("a", False), ("a", False), ("at least one", False), ("no", True)))
        return f"there is {some} {c} block as the {end} of a tower" + (
            f" with {words}" if tall else ""
        ), true != flip
    if form == 4:
        words, agrees = height(rng)
        many, n, right = quantity(rng, 3)
        if rng.random() < 0.5:
            some, flip = rng.choice((("a", False), ("a", False), ("one", False), ("no", True)))
            return f"there is {some} tower with {words}", any(agrees(len(x)) for x in stacks) != flip
        s = "" if n == 1 else "s"
        return there(rng, f"{many} tower{s} with {words}", n), right(sum(agrees(len(x)) for x in stacks))
    if form in (5, 6):
        if rng.random() < 0.15:
            return f"there is no {c} block {over} a {d} block", (c, d) not in adjacent
        some = rng.choice(("a", "one", "at least one"))
        text = rng.choice(
            (
                f"there is {some} {c} block {over} a {d} block",
                f"there is {some} tower {having} a {c} block {over} a {d} block",
                f"one of the tower has a {c} block {over} a {d} block",
                f"there is {some} {d} block {rng.choice(('below', 'under', 'beneath'))} a {c} block",
            )
        )
        return text, (c, d) in adjacent
    if form == 7:
        words, n, agrees = quantity(rng, 4)
        s = "" if n == 1 else "s"
        return there(rng, f"{words} {c} block{s}", n), agrees(sum(stack.count(c) for stack in stacks))
    if form == 8:
        n = rng.randint(1, 3)
        together = rng.random() < 0.4 and n > 1
        runs = [any(stack[i : i + n] == [c] * n for i in range(len(stack))) for stack in stacks]
        counts = [stack.count(c) >= n for stack in stacks] if not together else runs
        one = rng.choice(
            ("there is 1 tower with", "there is a tower with", "there is one tower with", "one tower with")
        )
        s = "" if n == 1 else "s"
        return f"{one} {number(rng, n)} {c} block{s}" + (" stacked together" if together else ""), any(counts)
    if form == 9:
        words, agrees = height(rng)
        some = rng.choice(("a", "a", "one", "at least one"))
        if rng.random() < 0.3:
            return f"there is {some} {c} tower", any(set(stack) == {c} for stack in stacks)
        return f"there is {some} {c} tower with {words}", any(
            set(stack) == {c} and agrees(len(stack)) for stack in stacks
        )
    if form == 10:
        n = rng.randint(1, 2)
        kind = rng.choice(("at least ", "", "only "))
        true = all(stack.count(c) == n if kind == "only " else stack.count(c) >= n for stack in stacks)
        s = "" if n == 1 else "s"
        who = rng.choice(("all towers have", "all 3 towers have", "each tower has", "all the towers contain"))
        return f"{who} {kind}{number(rng, n)} {c} block{s}", true
    if form == 11:
        words, agrees = height(rng)
        some = rng.choice(("the", "there is a", "there is one"))
        has = "has" if some == "the" else "which has"
        true = any(agrees(len(stack)) and stack[END[end]] == c for stack in stacks)
        if rng.random() < 0.3:
            return f"the {end} of a {words} tower is {c}", true
        return f"{some} tower with {words} {has} a {c} block at the {end}", true
    if form == 12:
        words, agrees = height(rng)
        same = [len(set(stack)) == 1 for stack in stacks]
        text, true = rng.choice(
            (
                (f"there is a tower with {words} having all the blocks of the same color",
                 any(one and agrees(len(stack)) for one, stack in zip(same, stacks, strict=True))),
                ("there is a tower with only same blocks in color", any(same)),
                (f"there is a tower with blocks of {c} color only", any(set(x) == {c} for x in stacks)),
                ("there is a tower with blocks of all three colors", any(len(set(x)) == 3 for x in stacks)),
                (f"there is a tower with only {c} and {d} blocks", any(set(x) == {c, d} for x in stacks)),
                (f"there is a tower with {c} and {d} blocks", any({c, d} <= set(x) for x in stacks)),
            )
        )  # fmt: skip
        return text, true
    if form == 13:
        heights, most = [len(stack) for stack in stacks], max(Counter(at).values())
        return rng.choice(
            (
                (f"all the {end}s of the towers are the same in color", most == 3),
                (f"one tower has a different {end} color", most == 2),
                (f"there are two towers with the same {end} color", most >= 2),
                ("there are at least two towers with the same height", len(set(heights)) < 3),
                ("all towers have the same height", len(set(heights)) == 1),
                (f"the {end} of a tower is {c}", c in at),
                (f"{c} block at the {end}", c in at),
                (f"none of the towers has a {c} {end}", c not in at),
            )
        )
    if form == 14:
        n = rng.randint(1, 3)
        text = rng.choice((f"{WORDS[n]} of the three towers has a {c} {end}",
                           f"there are {WORDS[n]} {c} blocks as the {end} of a tower"))  # fmt: skip
        return text, at.count(c) >= n
    if form == 15:
        place = rng.choice((1, 2))
        name = ("second", "third")[place - 1]
        from_top = rng.random() < 0.3
        seen = [stack[::-1] if from_top else stack for stack in stacks]
        true = any(len(stack) > place and stack[place] == c for stack in seen)
        return f"there is a tower that the {name} block from the {'top' if from_top else 'base'} is {c}", true
    n, m = rng.randint(1, 2), rng.randint(1, 2)
    text = f"there is a tower with {number(rng, n)} {c} block{'s' * (n > 1)} and {number(rng, m)} {d} block{'s' * (m > 1)}"
    if c == d:
        middle = any(c in stack[1:-1] for stack in stacks)
        return f"there is a tower with a {c} block in the middle", middle
    return text, any(stack.count(c) >= n and stack.count(d) >= m for stack in stacks)


PLACES = ("first", "second", "third")
WALL = ("the edge", "the wall", "a wall", "an edge", "the side")
FLOOR = ("the base", "the bottom", "the bottom of a box", "the bottom edge")
PLACED: tuple[tuple[str, Callable[[Item], bool]], ...] = (
    ("touching the edge", lambda item: item.touches),
    ("touching the wall", lambda item: item.touches),
    ("touching the bottom of a box", lambda item: item.gaps["bottom"] <= 1),
    ("touching the base", lambda item: item.gaps["bottom"] <= 1),
    ("not touching any edge", lambda item: not item.touches),
    ("touching a corner", lambda item: item.in_corner),
)


def about_things(rng: Random, boxes: list[Box]) -> Statement:
    everything = [item for box in boxes for item in box]
    colour = rng.choice([*COLOURS, *COLOURS, ""])
    shape = rng.choice([*SHAPES, "item", "object"])
    d = rng.choice(COLOURS)

    def fits(item: Item, colour: str = colour, shape: str = shape) -> bool:
        return (not colour or item.colour == colour) and (shape not in SHAPES or item.shape == shape)

    thing = f"{colour} {shape}".strip()
    closely = rng.choice(("", "closely "))
    place, there_is = rng.choice(
        (
            (f"{closely}touching {rng.choice(WALL)}", lambda item: item.touches),
            (f"{closely}touching {rng.choice(WALL)}", lambda item: item.touches),
            (f"{closely}touching {rng.choice(FLOOR)}", lambda item: item.gaps["bottom"] <= 1),
            ("not touching any edge", lambda item: not item.touches),
            (f"{closely}touching a corner of a box", lambda item: item.in_corner),
        )
    )
    form = rng.randrange(13)
    if form in (0, 1, 2):
        words, n, agrees = quantity(rng, 3)
        s = "" if n == 1 else "s"
        placed = form > 0
        count = sum(fits(item) and (not placed or there_is(item)) for item in everything)
        return there(rng, f"{words} {thing}{s}" + (f" {place}" if placed else ""), n), agrees(count)
    if form == 3:
        some, flip = rng.choice((("a", False), ("a", False), ("no", True), ("at least one", False)))
        return f"there is {some} {thing} {place}", any(fits(i) and there_is(i) for i in everything) != flip
    if form == 4:
        return f"none of the {thing}s are {place}", not any(fits(i) and there_is(i) for i in everything)
    who, single = rng.choice((("there is a box with", True), ("one of the grey box has", True),
                              ("one of the grey square contains", True), ("there are two boxes with", False)))  # fmt: skip
    need = 1 if single else 2
    if form in (5, 6):
        words, n, agrees = quantity(rng, 6)
        name = rng.choice(("item", "object")) + ("" if n == 1 else "s")
        text, inside = f"{who} {words} {name}", lambda box: agrees(len(box))
        if form == 6 and colour:
            text, inside = (
                f"{who} {words} {colour} {name}",
                lambda box: agrees(sum(i.colour == colour for i in box)),
            )
        return text, sum(map(inside, boxes)) >= need
    if form == 7:
        n = rng.randint(2, 5)
        k = rng.choice((1, 2, 3))
        kinds = {1: "only one color", 2: "2 different colors", 3: "all 3 different colors"}[k]
        tail = rng.random() < 0.5
        words = f"{number(rng, n)} items of {kinds}" if tail else f"items of {kinds}"
        return f"{who} {words}", sum(
            len({i.colour for i in box}) == k and (not tail or len(box) == n) for box in boxes
        ) >= need
    if form == 8:
        colour = colour or d
        pair = rng.choice((f"only {colour} items", f"items of only {colour} color")) if colour == d else (
            f"only {colour} and {d} items"
        )  # fmt: skip
        return f"{who} {pair}", sum({i.colour for i in box} == {colour, d} for box in boxes) >= need
    if form == 9:
        colour = colour or d
        n = rng.randint(1, 5)
        counted = rng.random() < 0.6
        top = rng.choice((f"a {colour} item on top", f"the {colour} item is on top"))
        text = (
            f"there is a box with {number(rng, n)} items and {top}"
            if counted
            else f"there is a {colour} item on top"
        )
        return text, any(box[0].colour == colour and (not counted or len(box) == n) for box in boxes if box)
    if form == 10:
        n = rng.randint(1, 2)
        kind = rng.choice(("at least ", "", "exactly "))
        s = "" if n == 1 else "s"
        placed = rng.random() < 0.4
        counts = [sum(fits(i) and (not placed or there_is(i)) for i in box) for box in boxes]
        true = all(count == n if kind == "exactly " else count >= n for count in counts)
        each = rng.choice(("each box has", "each grey box contains", "each grey square has"))
        return f"{each} {kind}{number(rng, n)} {thing}{s}" + (f" {place}" if placed else ""), true
    if form == 11:
        second = rng.choice([*SHAPES, "item"])
        n, m = rng.randint(1, 2), rng.randint(1, 2)
        other = f"{d} {second}"
        text = (
            f"there is a box with {'a' if n == 1 else number(rng, n)} {thing}{'s' * (n > 1)} and "
            f"{'a' if m == 1 else number(rng, m)} {other}{'s' * (m > 1)}"
        )
        return text, any(
            sum(map(fits, box)) >= n and sum(fits(i, d, second) for i in box) >= m for box in boxes
        )
    touching = {i.colour for i in everything if i.touches}
    colour = colour or d
    return rng.choice(
        (
            ("there is only one color touching the wall", len(touching) == 1),
            ("all 3 different colors are touching the wall", len(touching) == 3),
            (f"all {colour} items are in the same box", sum(any(i.colour == colour for i in b) for b in boxes) == 1),
            (f"{colour} {shape}s are {place}", any(map(fits, everything)) and all(there_is(i) for i in everything if fits(i))),
            ("there is a box with one item", any(len(box) == 1 for box in boxes)),
            (f"there is a box with the same number of {colour} and {d} items",
             any(sum(i.colour == colour for i in b) == sum(i.colour == d for i in b) > 0 for b in boxes)),
        )
    )  # fmt: skip


def described(boxes: Sequence[Box], tower: bool) -> list[str]:
    """What is in the boxes, in their order: of towers one text, from the base up; of other things one for each box, from the
    top down.

    A text in which every word is due at its place teaches where things are: asked for one box of three, whichever, a
    captioner takes a thousand steps to learn nothing of it.
    """
    if tower:
        return [" ".join(f"{WORDS[len(box)]} {' '.join(item.colour for item in box)}" for box in boxes)]
    return [
        " ".join(
            [place, WORDS[len(box)], *(f"{item.colour} {item.shape}{' wall' * item.touches}" for item in box)]
        )
        for place, box in zip(PLACES, boxes, strict=True)
    ]


def box_property(rng: Random) -> tuple[str, Callable[[Box], bool]]:
    """What a box of scattered things may have: ("with two black items", whether a box has it)."""
    c, d, shape = rng.choice(COLOURS), rng.choice(COLOURS), rng.choice((*SHAPES, "item"))
    place, there_is = rng.choice(PLACED)
    words, n, agrees = quantity(rng, 5)
    s = "" if n == 1 else "s"

    def fits(item: Item) -> bool:
        return item.colour == c and shape in (item.shape, "item")

    return rng.choice(
        (
            (f"with {words} item{s}", lambda box: agrees(len(box))),
            (f"with {words} {c} {shape}{s}", lambda box: agrees(sum(map(fits, box)))),
            (f"with a {c} {shape}", lambda box: any(map(fits, box))),
            (f"with a {c} {shape} {place}", lambda box: any(fits(i) and there_is(i) for i in box)),
            (f"with a {shape} {place}", lambda box: any(shape in (i.shape, "item") and there_is(i) for i in box)),
            (f"with only {c} items", lambda box: {i.colour for i in box} == {c}),
            (f"with only {c} and {d} items", lambda box: {i.colour for i in box} == {c, d}),
            (f"with items of {WORDS[min(n, 3)]} colors", lambda box: len({i.colour for i in box}) == min(n, 3)),
            (f"with a {c} item on top", lambda box: box[0].colour == c),
        )
    )  # fmt: skip


def tower_property(rng: Random) -> tuple[str, Callable[[Box], bool]]:
    """What a tower may have: ("with a blue block at the base", whether a box's tower has it)."""
    c, d, end = rng.choice(COLOURS), rng.choice(COLOURS), rng.choice(tuple(END))
    words, agrees = height(rng)
    n = rng.randint(1, 3)
    s = "" if n == 1 else "s"

    def over(box: Box) -> bool:
        return any((above.colour, below.colour) == (c, d) for below, above in itertools.pairwise(box))

    def has(box: Box) -> bool:
        return box[END[end]].colour == c

    above, below = rng.choice(("over", "above", "on", "on top of")), rng.choice(("below", "under", "beneath"))
    text, holds = rng.choice(
        (
            (f"a {c} block at the {end}", has),
            (f"a {c} block at the {end}", has),
            (words, lambda box: agrees(len(box))),
            (f"{words} and a {c} block at the {end}", lambda box: agrees(len(box)) and has(box)),
            (f"a {c} block", lambda box: any(item.colour == c for item in box)),
            (f"exactly {number(rng, n)} {c} block{s}", lambda box: sum(i.colour == c for i in box) == n),
            (f"at least {number(rng, n)} {c} block{s}", lambda box: sum(i.colour == c for i in box) >= n),
            (f"a {c} block {above} a {d} block", over),
            (f"a {d} block {below} a {c} block", over),
            (f"only {c} blocks", lambda box: {item.colour for item in box} == {c}),
            ("blocks of only one color", lambda box: len({item.colour for item in box}) == 1),
            ("blocks of all three colors", lambda box: len({item.colour for item in box}) == 3),
        )
    )  # fmt: skip
    return f"{rng.choice(('with', 'having', 'that has'))} {text}", holds


def asked(rng: Random, boxes: Sequence[Box], tower: bool, tries: int = 4) -> tuple[str, str]:
    """(a question, its answer): which of the boxes have a property, or how many things there are; most often some do."""
    if not tower and rng.random() < 0.4:
        c, shape = rng.choice((*COLOURS, "")), rng.choice((*SHAPES, "item"))
        place, there_is = rng.choice((*PLACED, ("", lambda _: True), ("", lambda _: True)))
        count = sum(
            (not c or item.colour == c) and shape in (item.shape, "item") and there_is(item)
            for box in boxes
            for item in box
        )
        return " ".join(f"how many {c} {shape}s {place}".split()), str(min(count, 9))
    for _ in range(tries):
        text, holds = (tower_property if tower else box_property)(rng)
        found = [place for place, box in zip(PLACES, boxes, strict=True) if holds(box)]
        if found:
            break
    return f"which {'towers' if tower else 'boxes'} {text}", " ".join(found) or "none"


def told(seed: int, boxes: list[Box], tower: bool) -> Statement:
    """The statement of this number about boxes: its text is the same whatever they are, its truth is theirs."""
    return (about_towers if tower else about_things)(Random(seed), boxes)


def contrast(
    rng: Random, pool: Sequence[list[Box]], tower: bool, alike: int = 1, tries: int = 60
) -> tuple[str, int, int] | None:
    """(a text, the place in `pool` of boxes that it is true of, the place of others that it is not); None where none are found.

    Every text comes once true and once false, so that nothing but the picture tells which: a text by itself would, were
    only the labels balanced, since "exactly three" is seldom true. Each `alike` in a row in `pool` are arrangements of the
    same things; the two are among such where they can be, as those are that people told apart.
    """
    seed = rng.getrandbits(48)
    anywhere: dict[bool, int] = {}
    for _ in range(tries // alike):
        first = rng.randrange(len(pool)) // alike * alike
        found: dict[bool, int] = {}
        for place in rng.sample(range(first, first + alike), alike):
            text, true = told(seed, pool[place], tower)
            found.setdefault(true, place)
            anywhere.setdefault(true, place)
        if len(found) == 2:
            return text, found[True], found[False]
    return (text, anywhere[True], anywhere[False]) if len(anywhere) == 2 else None
