"""One example as its source describes it: what every reader of another tool's layout makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from capfilt.tables.formats import texts_in


@dataclass(frozen=True)
class ExampleRow:
    """One example as its source describes it.

    Attributes:
        key: unique within its source.
        images: the pictures by name, or by number where the source has numbers.
        text: untouched; None where there is none.
        answers: each answer once, in order, with how often it was given; None where the source says nothing.
        label: as its source spells it; None where the source says nothing.
        split: train, val or test.
        subset: what VQA v2 calls its pictures' subset ("train2014"), which is part of their files' names.
        wrong_texts: texts that are wrong of the picture (SugarCrepe's negative caption).
        category: the source's own name of the kind of example.
    """

    key: str
    images: tuple[str | int, ...] = ()
    text: str | None = None
    answers: tuple[tuple[str, int], ...] | None = None
    label: str | None = None
    split: str | None = None
    subset: str = ""
    wrong_texts: tuple[str, ...] = ()
    category: str | None = None


def counted(answers: Iterable[Any]) -> tuple[tuple[str, int], ...]:
    """Each answer once, in the order they first come, with how often it comes."""
    return tuple(Counter(text for answer in answers for text in texts_in(answer)).items())
