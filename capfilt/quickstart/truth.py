"""The truth about texts of the generated world: the one place that decides which text is true of which scene.

Used only for grading (and by web.py to plant what it says it plants); no stage that learns or selects reads
it. It judges what a text says (language.parse), never where the text came from.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from capfilt.quickstart.language import Mention, Statement, parse
from capfilt.quickstart.world import OPPOSITE, Scene, SceneObject


@dataclass(frozen=True)
class Kind:
    """What holds for every text of one kind: whether it is a sentence of the language, and whether it is true."""

    well_formed: bool
    true: bool


# Measures of the filter use the well-formed kinds only; the others are spam and are reported apart, each
# under its own name.
KINDS = {
    "true": Kind(True, True),
    "other_image": Kind(True, False),  # a true caption of another page's picture that is false of this one
    "one_attribute_off": Kind(True, False),  # a true caption with one stated fact changed
    "file_name": Kind(False, False),
    "boilerplate": Kind(False, False),  # words of the web page, not of the picture
    "truncated": Kind(False, False),  # a true caption cut off before it states what it began to
    "other_language": Kind(False, False),  # a true caption in German, Spanish or French
}
SPAM_KINDS = tuple(name for name, kind in KINDS.items() if not kind.well_formed)


def is_true(text: str | Statement | None, scene: Scene) -> bool:
    """Whether every stated fact holds of the scene.

    Each object named must be an object of the scene of its own, with the colour, the shape and the size
    stated; so must the relation and the background where stated. Leaving an object out is not false (see
    `is_complete_and_true`), naming one too many is. A text that is no sentence of the language is false.
    """
    statement = text if isinstance(text, Statement) else parse(text)
    if statement is None:
        return False
    if statement.background not in (None, scene.background):
        return False
    indexes = range(len(scene.objects))
    return any(
        _relation_holds(statement, scene, places)
        and all(_is(mention, scene.objects[i]) for mention, i in zip(statement.objects, places, strict=True))
        for places in itertools.permutations(indexes, len(statement.objects))
    )


def is_complete_and_true(text: str | Statement | None, scene: Scene) -> bool:
    """Whether the text is true and names every object with colour and shape: how synthetic captions are graded."""
    statement = text if isinstance(text, Statement) else parse(text)
    return (
        statement is not None and len(statement.objects) == len(scene.objects) and is_true(statement, scene)
    )


def attributes_stated(text: str | Statement | None) -> int:
    """How many single facts the text states (colours, shapes, sizes, relation, background); 0 if no sentence."""
    statement = text if isinstance(text, Statement) else parse(text)
    return 0 if statement is None else statement.stated()


def _is(mention: Mention, thing: SceneObject) -> bool:
    same = (mention.shape, mention.colour) == (thing.shape, thing.colour)
    return same and mention.size in (None, thing.size)


def _relation_holds(statement: Statement, scene: Scene, places: tuple[int, ...]) -> bool:
    if statement.relation is None or scene.relation is None:
        return statement.relation is None
    return statement.relation == (scene.relation if places == (0, 1) else OPPOSITE[scene.relation])
