"""The language of the generated world: what texts can state, how it is written, and how it is read back.

Whether a statement holds is not decided here (truth.py). The reader shares the words with the writer but none
of its templates, so that a slip in one does not excuse itself in the other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from capfilt.quickstart.world import BACKGROUNDS, COLOURS, OPPOSITE, RELATIONS, SHAPES, SIZES, Scene

T = TypeVar("T")


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


# How often a text states what may be left out (colour and shape of every object never are). People who caption and the
# authors of alt texts write the same sentences, so that models trained on one or the other differ in what is true and not in
# manner.
_SIZES_STATED, _RELATIONS_STATED, _BACKGROUNDS_STATED = 0.25, 0.15, 0.25

_RELATION_WORDS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


def state(scene: Scene, rng: np.random.Generator) -> Statement:
    """A true statement about the scene: every object with colour and shape, now and then the rest."""
    things = scene.objects
    relation = scene.relation
    if relation is not None:
        if rng.random() < 0.5:
            things, relation = things[::-1], OPPOSITE[relation]
        if rng.random() >= _RELATIONS_STATED:
            relation = None
    mentions = tuple(
        Mention(thing.shape, thing.colour, thing.size if rng.random() < _SIZES_STATED else None)
        for thing in things
    )
    return Statement(mentions, relation, scene.background if rng.random() < _BACKGROUNDS_STATED else None)


def one_attribute_off(statement: Statement, rng: np.random.Generator) -> tuple[Statement, str]:
    """The statement with one stated fact changed, and which: "colour", "shape", "size", "relation" or "background".

    The kind of fact is drawn uniformly among those stated and its new value uniformly among those the world
    allows. Over scenes that are uniform themselves this leaves the distribution of statements exactly as it
    was (the step is symmetric within every class of statements of one form), so that no classifier can tell
    the changed ones from true ones by their words. The statement is about a scene, so its objects are not alike.
    """
    sized = [i for i, mention in enumerate(statement.objects) if mention.size is not None]
    stated = {"size": sized, "relation": statement.relation, "background": statement.background}
    kinds = ["colour", "shape", *(kind for kind, value in stated.items() if value)]
    kind = _pick(kinds, rng)
    values = {
        "colour": COLOURS,
        "shape": SHAPES,
        "size": SIZES,
        "relation": RELATIONS,
        "background": BACKGROUNDS,
    }

    def others(whole: Any) -> list[Any]:
        return [replace(whole, **{kind: value}) for value in values[kind] if value != getattr(whole, kind)]

    if kind in ("relation", "background"):
        return _pick(others(statement), rng), kind
    index = _pick(sized if kind == "size" else range(len(statement.objects)), rng)
    rest = [(m.shape, m.colour) for i, m in enumerate(statement.objects) if i != index]
    changed = [m for m in others(statement.objects[index]) if (m.shape, m.colour) not in rest]
    objects = list(statement.objects)
    objects[index] = _pick(changed, rng)
    return replace(statement, objects=tuple(objects)), kind


def _pick(values: Sequence[T], rng: np.random.Generator) -> T:
    return values[int(rng.integers(len(values)))]


def write(statement: Statement, rng: np.random.Generator) -> str:
    """A sentence that states exactly this, at most 18 words; wording, capital and full stop vary with `rng`."""
    names = [_name(mention) for mention in statement.objects]
    if len(names) == 1:
        forms: tuple[str, ...] = ("{0}", "there is {0}", "one shape: {0}")
    elif statement.relation is not None:
        where = _pick(_RELATION_WORDS[statement.relation], rng)
        forms = ("{0} " + where + " {1}", "{0} is " + where + " {1}", "there is {0} " + where + " {1}")
    else:
        forms = ("{0} and {1}", "{0} with {1}", "there is {0} and {1}", "two shapes: {0} and {1}")
    text = _pick(forms, rng).format(*names)
    if statement.background is not None:
        ground = f"on a {statement.background} background"
        text = f"{ground} {text}" if rng.random() < 0.25 else f"{text} {ground}"
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
        if rng.random() < 0.5:
            text += "."
    return text


def captions(scene: Scene, count: int, rng: np.random.Generator) -> tuple[str, ...]:
    """`count` different true captions of the scene that name every object with colour and shape."""
    found: dict[str, str] = {}
    while len(found) < count:
        text = write(state(scene, rng), rng)
        found.setdefault(text.lower().rstrip("."), text)
    return tuple(found.values())


def _name(mention: Mention) -> str:
    words = f"{mention.size} {mention.colour}" if mention.size else mention.colour
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words} {mention.shape}"


_NOUN = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_GROUND = rf"on an? ({'|'.join(BACKGROUNDS)}) background"
_SENTENCE = re.compile(
    rf"(?:{_GROUND} )?"
    r"(?:(?P<lead>there is|one shape|two shapes) )?"
    rf"{_NOUN}"
    rf"(?: (?P<link>(?:is )?(?:to the )?(?:left|right) of|(?:is )?(?:above|over|below|under)|and|with) {_NOUN})?"
    rf"(?: {_GROUND})?"
)
_RELATION_READ = {word: relation for relation, words in _RELATION_WORDS.items() for word in words}
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
        relation = _RELATION_READ[link.removeprefix("is ")]
    return Statement(tuple(objects), relation, before or after)
