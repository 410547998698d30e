"""One example as its source describes it, and how the format of a source is found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from capfilt.errors import UserError
from capfilt.formats import EXAMPLE_FORMATS
from capfilt.formats.source import Given
from capfilt.formats.values import Keyed, texts_in, unique


@dataclass(frozen=True)
class ExampleRow(Keyed):
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
        fault: why its record cannot be read.
    """

    images: tuple[str | int, ...] = ()
    text: str | None = None
    answers: tuple[tuple[str, int], ...] | None = None
    label: str | None = None
    split: str | None = None
    subset: str = ""
    wrong_texts: tuple[str, ...] = ()
    category: str | None = None
    fault: str = ""


Examples = tuple[str, list[ExampleRow]]
"""The task that a source's field names tell, and its rows in order."""


class Format(Protocol):
    """A module named in EXAMPLE_FORMATS."""

    def detect(self, given: Given) -> bool:
        """Whether a source is in this format. Raises UserError where it is broken."""

    def read(self, given: Given, annotations: Path | None) -> Examples:
        """The source's examples; `annotations` is the answers' file. Raises UserError when it is not what it should be."""


def example_rows(path: Path, annotations: Path | None = None) -> Examples:
    """The examples at `path`, each with a key of its own. Raises UserError naming what is broken, or when there is none."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    given = Given(path)
    for name in EXAMPLE_FORMATS:
        module = cast(Format, import_module(f"capfilt.formats.examples.{name}"))
        if module.detect(given):
            task, rows = module.read(given, annotations)
            if not rows:
                raise UserError(f"{path}: has no examples")
            return task, unique(rows)
    raise UserError(f"{path}: has no list `questions` (VQA v2) and is no list of records")


def no_annotations(given: Given, annotations: Path | None) -> None:
    """Raise UserError where answers are given that the format has itself."""
    if annotations is not None:
        raise UserError(
            f"--annotations {annotations}: {given.path} holds its own answers; only VQA v2's does not"
        )


def counted(answers: Iterable[Any]) -> tuple[tuple[str, int], ...]:
    """Each answer once, in the order they first come, with how often it comes."""
    return tuple(Counter(text for answer in answers for text in texts_in(answer)).items())
