"""The language of the generated world: what texts can state, how it is written, and how it is read back.

Whether a statement holds is not decided here (truth.py). The reader shares the words with the writer but none
of its templates, so that a slip in one does not excuse itself in the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from capfilt.quickstart.world import BACKGROUNDS, COLOURS, OPPOSITE, RELATIONS, SHAPES, SIZES, Scene


@dataclass(frozen=True)
class Mention:
    """One object as a text names it; `size` is None where the text leaves it out."""

    shape: str
    colour: str
    size: str | None = None


@dataclass(frozen=True)
class Statement:
    """What one text states: one or two objects, where the first is seen from the second, and what they are on.

    `relation` and `background` are None where the text leaves them out; one object has no relation.
    """

    objects: tuple[Mention, ...]
    relation: str | None = None
    background: str | None = None

    def stated(self) -> int:
        """How many single facts: a colour and a shape per object, and each size, relation and background given."""
        sizes = sum(mention.size is not None for mention in self.objects)
        return 2 * len(self.objects) + sizes + (self.relation is not None) + (self.background is not None)


@dataclass(frozen=True)
class Style:
    """How often a writer states what may be left out (colour and shape of every object never are)."""

    size: float
    relation: float
    background: float


# People who caption and the authors of alt texts write the same sentences, so that models trained on one or the other
# differ in what is true and not in manner.
HUMAN = WEB = Style(size=0.25, relation=0.15, background=0.25)

_RELATION_WORDS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


def state(scene: Scene, rng: np.random.Generator, style: Style) -> Statement:
    """A true statement about the scene: every object with colour and shape, the rest as often as the style says."""
    order = list(range(len(scene.objects)))
    relation = scene.relation
    if relation is not None:
        if rng.random() < 0.5:
            order.reverse()
            relation = OPPOSITE[relation]
        if rng.random() >= style.relation:
            relation = None
    mentions = []
    for index in order:
        thing = scene.objects[index]
        mentions.append(Mention(thing.shape, thing.colour, thing.size if rng.random() < style.size else None))
    background = scene.background if rng.random() < style.background else None
    return Statement(tuple(mentions), relation, background)


def one_attribute_off(statement: Statement, rng: np.random.Generator) -> tuple[Statement, str]:
    """The statement with one stated fact changed, and which: "colour", "shape", "size", "relation" or "background".

    The kind of fact is drawn uniformly among those stated and its new value uniformly among those the world
    allows. Over scenes that are uniform themselves this leaves the distribution of statements exactly as it
    was (the step is symmetric within every class of statements of one form), so that no classifier can tell
    the changed ones from true ones by their words. The statement is about a scene, so its objects are not alike.
    """
    kinds = ["colour", "shape"]
    sized = [i for i, mention in enumerate(statement.objects) if mention.size is not None]
    if sized:
        kinds.append("size")
    if statement.relation is not None:
        kinds.append("relation")
    if statement.background is not None:
        kinds.append("background")
    kind = kinds[int(rng.integers(len(kinds)))]
    if kind == "relation":
        others = [relation for relation in RELATIONS if relation != statement.relation]
        return replace(statement, relation=others[int(rng.integers(len(others)))]), kind
    if kind == "background":
        others = [background for background in BACKGROUNDS if background != statement.background]
        return replace(statement, background=others[int(rng.integers(len(others)))]), kind
    candidates = sized if kind == "size" else list(range(len(statement.objects)))
    index = candidates[int(rng.integers(len(candidates)))]
    mention = statement.objects[index]
    changed = {
        "colour": [replace(mention, colour=colour) for colour in COLOURS if colour != mention.colour],
        "shape": [replace(mention, shape=shape) for shape in SHAPES if shape != mention.shape],
        "size": [replace(mention, size=size) for size in SIZES if size != mention.size],
    }[kind]
    rest = [(m.shape, m.colour) for i, m in enumerate(statement.objects) if i != index]
    allowed = [m for m in changed if (m.shape, m.colour) not in rest]
    objects = list(statement.objects)
    objects[index] = allowed[int(rng.integers(len(allowed)))]
    return replace(statement, objects=tuple(objects)), kind


def write(statement: Statement, rng: np.random.Generator) -> str:
    """A sentence that states exactly this, at most 18 words; wording, capital and full stop vary with `rng`."""
    names = [_name(mention) for mention in statement.objects]
    if len(names) == 1:
        forms: list[Callable[[], str]] = [
            lambda: names[0],
            lambda: f"there is {names[0]}",
            lambda: f"one shape: {names[0]}",
        ]
    elif statement.relation is not None:
        words = _RELATION_WORDS[statement.relation]
        where = words[int(rng.integers(len(words)))]
        forms = [
            lambda: f"{names[0]} {where} {names[1]}",
            lambda: f"{names[0]} is {where} {names[1]}",
            lambda: f"there is {names[0]} {where} {names[1]}",
        ]
    else:
        forms = [
            lambda: f"{names[0]} and {names[1]}",
            lambda: f"{names[0]} with {names[1]}",
            lambda: f"there is {names[0]} and {names[1]}",
            lambda: f"two shapes: {names[0]} and {names[1]}",
        ]
    text = forms[int(rng.integers(len(forms)))]()
    if statement.background is not None:
        ground = f"on a {statement.background} background"
        text = f"{ground} {text}" if rng.random() < 0.25 else f"{text} {ground}"
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
        if rng.random() < 0.5:
            text += "."
    return text


def caption(scene: Scene, rng: np.random.Generator, style: Style = WEB) -> str:
    """A true caption of the scene that names every object with colour and shape."""
    return write(state(scene, rng, style), rng)


def captions(scene: Scene, count: int, rng: np.random.Generator, style: Style = HUMAN) -> tuple[str, ...]:
    """`count` different true captions of the scene. Raises ValueError where the style cannot word that many."""
    found: dict[str, str] = {}
    for _ in range(50 * count):
        text = caption(scene, rng, style)
        found.setdefault(text.lower().rstrip("."), text)
        if len(found) == count:
            return tuple(found.values())
    raise ValueError(f"{count} different captions of one scene are more than this style can word")


def _name(mention: Mention) -> str:
    words = f"{mention.size} {mention.colour}" if mention.size else mention.colour
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words} {mention.shape}"


def _one_of(words: tuple[str, ...]) -> str:
    return "|".join(words)


_NOUN = rf"an? (?:({_one_of(SIZES)}) )?({_one_of(COLOURS)}) ({_one_of(SHAPES)})"
_GROUND = rf"on an? ({_one_of(BACKGROUNDS)}) background"
_SENTENCE = re.compile(
    rf"(?:{_GROUND} )?"
    r"(?:(?P<lead>there is|one shape|two shapes) )?"
    rf"{_NOUN}"
    rf"(?: (?P<link>(?:is )?(?:to the )?(?:left|right) of|(?:is )?(?:above|over|below|under)|and|with) {_NOUN})?"
    rf"(?: {_GROUND})?"
)
_RELATION_READ = {
    "left of": "left", "right of": "right", "above": "above", "over": "above", "below": "below", "under": "below",
}  # fmt: skip
# What BLIP's caption cleaning turns into blanks (pre_caption in its data/utils.py), and the comma: a
# captioner trained on cleaned text can write none of them, and a person may.
_PUNCTUATION = re.compile(r"[.!\"()*#:;~,]")


def parse(text: str | None) -> Statement | None:
    """What a text states, or None where it is no sentence of this language.

    Made for texts that models write: case, odd spacing and punctuation do not matter; a repeated, missing or
    foreign word, a trailing "..." or a second background does.
    """
    if not isinstance(text, str) or "..." in text or "\u2026" in text or len(text) > 400:
        return None
    match = _SENTENCE.fullmatch(" ".join(_PUNCTUATION.sub(" ", text.lower()).split()))
    if match is None:
        return None
    before, lead, size, colour, shape, link, size2, colour2, shape2, after = match.groups()
    if before and after:
        return None
    objects = [Mention(shape, colour, size)]
    if link is not None:
        objects.append(Mention(shape2, colour2, size2))
    if (lead == "one shape" and link is not None) or (lead == "two shapes" and link is None):
        return None
    relation = None
    if link is not None and link not in ("and", "with"):
        relation = _RELATION_READ[link.removeprefix("is ").removeprefix("to the ")]
    return Statement(tuple(objects), relation, before or after)
