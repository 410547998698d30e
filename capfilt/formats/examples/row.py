"""One example as its source describes it, by the names that records have for its fields, and how a source's format is found."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from capfilt.errors import UserError
from capfilt.formats import ANSWERS_APART, EXAMPLE_FORMATS
from capfilt.formats.source import Given
from capfilt.formats.values import Keyed, optional_text, split_named, text_of, texts_in, unique
from capfilt.tables.texts import folded

KEYS = ("question_id", "identifier", "pair_id", "pairID", "example_id", "item_id", "id")
TEXTS = {"question": "vqa", "hypothesis": "entailment", "sentence2": "entailment", "sentence": "nlvr"}
"""Where a record's text is looked for, and which task that tells (SNLI-VE's own files call the hypothesis sentence2)."""

PICTURE_NAMES = ("Flickr30K_ID", "Flikr30kID")
"""Where SNLI-VE's own files have the name of the picture, with and without its ending, by their version."""

CAPTIONS = ("caption", "text")
"""Where a record's text is looked for else: a caption that is rated, or told from a wrong one, or labelled a match."""


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

    def read(self, given: Given, *annotations: Path) -> Examples:
        """The source's examples. Raises UserError when it is not what it should be.

        annotations: the answers' file, where there is one; only for ANSWERS_APART.
        """


def example_rows(path: Path, annotations: Path | None = None) -> Examples:
    """The examples at `path`, each with a key of its own. Raises UserError naming what is broken, or when there is none."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    given = Given(path)
    for name in EXAMPLE_FORMATS:
        module = cast(Format, import_module(f"capfilt.formats.examples.{name}"))
        if module.detect(given):
            if annotations and name not in ANSWERS_APART:
                raise UserError(
                    f"--annotations {annotations}: {path} holds its own answers; only VQA v2's does not"
                )
            task, rows = module.read(given, *([annotations] if annotations else []))
            if not rows:
                raise UserError(f"{path}: has no examples")
            return task, unique(rows)
    raise UserError(f"{path}: has no list `questions` (VQA v2) and is no list of records")


def example(fields: Mapping[str, Any], number: int) -> ExampleRow:
    """The example that a record tells, of the names above; without a key, `number` is its key."""
    key = next((fields[name] for name in KEYS if fields.get(name) is not None), None)
    images = fields.get("images", fields.get("image"))
    if images is None:
        images = next((str(fields[name]) for name in PICTURE_NAMES if fields.get(name) is not None), None)
    named = images if isinstance(images, list) else [images]
    names = tuple(each for each in named if isinstance(each, str | int) and not isinstance(each, bool))
    split = fields.get("split")
    if images is None and isinstance(key, str) and key.count("-") >= 3:
        # NLVR2 (its README): sentence train-10171-0-0 is about train-10171-0-img0.png and -img1.png.
        stem = key.rpartition("-")[0]
        names = (f"{stem}-img0.png", f"{stem}-img1.png")
        split = split or key.partition("-")[0]
    given = fields.get("answers", fields.get("answer", fields.get("ratings")))
    label = fields.get("label", fields.get("gold_label"))
    wrong = fields.get("negative_caption", fields.get("wrong_texts"))
    return ExampleRow(
        f"#{number}" if key is None else text_of(key),
        names,
        optional_text(
            next((fields[name] for name in (*TEXTS, *CAPTIONS) if fields.get(name) is not None), None)
        ),
        None if given is None else counted(given if isinstance(given, list) else [given]),
        optional_text(label),
        split_named(split),
        wrong_texts=tuple(texts_in(wrong)),
        category=optional_text(fields.get("category", fields.get("answer_type"))),
    )


def own_captions(records: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether each record's caption is one of its picture's own.

    Flickr8k's `caption_id` is the name of the picture that a caption was written for, and a number: "NAME.jpg#2". A caption is
    the picture's own where that is its picture, or where it equals, but for case and white space, one that is known
    so. Records without it are never own.
    """
    owner_of = [text_of(record.get("caption_id") or "").rpartition("#")[0] for record in records]
    texts = [
        folded(text_of(next((record[name] for name in CAPTIONS if record.get(name) is not None), "")))
        for record in records
    ]
    own: defaultdict[str, set[str]] = defaultdict(set)
    for owner, text in zip(owner_of, texts, strict=True):
        own[owner].add(text)
    named = [text_of(record.get("image") or "").rpartition("/")[2] for record in records]
    return [bool(name) and text in own.get(name, ()) for name, text in zip(named, texts, strict=True)]


def counted(answers: Iterable[Any]) -> tuple[tuple[str, int], ...]:
    """Each answer once, in the order they first come, with how often it comes."""
    return tuple(Counter(text for answer in answers for text in texts_in(answer)).items())
