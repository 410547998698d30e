"""Questions and statements about pictures in other tools' layouts, as rows: VQA v2, DAQUAR, easy-VQA, NLVR and NLVR2,
SNLI-VE, and lists of records.

What is read here is described, not judged: whether a picture is there and what a fault costs a row is the business of
`stages/examples`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from capfilt.errors import UserError
from capfilt.tables.contracts import LABELS
from capfilt.tables.formats import read_json, split_named, text_of, texts_in, unique

KEYS = ("question_id", "identifier", "pair_id", "pairID", "example_id", "id")
TEXTS = {"question": "vqa", "hypothesis": "entailment", "sentence2": "entailment", "sentence": "nlvr"}
"""Where a record's text is looked for, and which task that tells (SNLI-VE's own files call the hypothesis sentence2)."""

PICTURE_NUMBERS = ("Flickr30K_ID", "Flikr30kID")
"""Where SNLI-VE's own files have the name of the picture, with and without its ending, by their version."""

ORDERS = 6
"""NLVR draws every picture with its three boxes in each of their orders."""


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
    """

    key: str
    images: tuple[str | int, ...] = ()
    text: str | None = None
    answers: tuple[tuple[str, int], ...] | None = None
    label: str | None = None
    split: str | None = None
    subset: str = ""


def example_rows(path: Path, annotations: Path | None = None) -> tuple[str, list[ExampleRow]]:
    """(the task its field names tell, the rows in the source's order) of a file.

    VQA v2: the questions' JSON, with the answers' JSON as `annotations` where they are public. Otherwise records, as a
    JSON list or JSON Lines: a text (question, sentence or hypothesis), the pictures (`image`, or `images` in order; in
    NLVR's and NLVR2's own files they follow from the identifier), `answers` or `label`, `split`, and a key. SNLI-VE's own
    lines have other names for these. DAQUAR's is a text, of questions and answers line by line; easy-VQA's a list of
    [question, answer, picture's number]. Raises UserError naming what is broken, or when there is no row.
    """
    if not path.is_file():
        raise UserError(f"--source-path {path}: no such file")
    if path.suffix == ".txt":
        if annotations is not None:
            raise UserError(
                f"--annotations {annotations}: {path} holds its own answers; only VQA v2's does not"
            )
        return "vqa", daquar_rows(path)
    data = _json_or_lines(path)
    if isinstance(data, dict) and isinstance(data.get("questions"), list):
        rows = _vqa_rows(data, path, annotations)
        task = "vqa"
    elif isinstance(data, list):
        if annotations is not None:
            raise UserError(
                f"--annotations {annotations}: {path} holds its own answers; only VQA v2's does not"
            )
        if data and isinstance(data[0], list):
            return "vqa", easy_rows(data, path)
        task = _task(data, path)
        told = split_named(path.stem) or "train"
        rows = [
            row
            for number, record in enumerate(data)
            for row in (_nlvr(record, told) if _is_nlvr(record) else [_record(record, number)])
        ]
    else:
        raise UserError(f"{path}: has no list `questions` (VQA v2) and is no list of records")
    if not rows:
        raise UserError(f"{path}: has no examples")
    return task, unique(rows)


def _json_or_lines(path: Path) -> Any:
    """The JSON in a file, or the list of its lines': NLVR2's files are called .json and are lines."""
    with path.open("rb") as file:
        first = file.readline().strip()
    if first.startswith(b"{") and first.endswith(b"}"):
        records = []
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    records.append(_line(path, number, line))
        # A file of one line may be one object.
        if len(records) > 1 or not (isinstance(records[0], dict) and "questions" in records[0]):
            return records
        return records[0]
    return read_json(path)


def _line(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: line {number} is not JSON ({error})") from None


def _task(records: list[Any], path: Path) -> str:
    for record in records:
        for name, task in TEXTS.items():
            if isinstance(record, dict) and record.get(name) is not None:
                # ALBEF's lists for SNLI-VE call a hypothesis a sentence too; their labels tell.
                entails = task == "nlvr" and str(record.get("label")).lower() in LABELS["entailment"]
                return "entailment" if entails else task
    raise UserError(f"{path}: no record has {', '.join(TEXTS)}: it holds no examples")


def _vqa_rows(data: Mapping[str, Any], path: Path, annotations: Path | None) -> list[ExampleRow]:
    answers: dict[Any, tuple[tuple[str, int], ...]] | None = None
    if annotations is not None:
        found = read_json(annotations) if annotations.is_file() else None
        listed = found.get("annotations") if isinstance(found, dict) else None
        if not isinstance(listed, list):
            raise UserError(
                f"--annotations {annotations}: is no JSON file with a list `annotations` (VQA v2)"
            )
        answers = {
            each["question_id"]: _counted(
                answer.get("answer") for answer in each.get("answers") or () if isinstance(answer, dict)
            )
            for each in listed
            if isinstance(each, dict) and isinstance(each.get("question_id"), int | str)
        }
    subset = text_of(data.get("data_subtype") or "")
    split = split_named(subset.rstrip("0123456789"))
    rows = []
    for number, question in enumerate(data["questions"]):
        fields = question if isinstance(question, dict) else {}
        key, image = fields.get("question_id"), fields.get("image_id")
        rows.append(
            ExampleRow(
                _key(key, number),
                (image,) if isinstance(image, int | str) else (),
                _text(fields.get("question")),
                None if answers is None else answers.get(key, ()),
                split=split,
                subset=subset,
            )
        )
    if answers is not None and not any(row.answers for row in rows):
        raise UserError(f"--annotations {annotations}: answers none of the questions in {path}")
    return rows


def _record(record: Any, number: int) -> ExampleRow:
    fields = record if isinstance(record, dict) else {}
    key = next((fields[name] for name in KEYS if fields.get(name) is not None), None)
    images = fields.get("images", fields.get("image"))
    if images is None:
        images = next((str(fields[name]) for name in PICTURE_NUMBERS if fields.get(name) is not None), None)
    named = images if isinstance(images, list) else [images]
    names = tuple(each for each in named if isinstance(each, str | int) and not isinstance(each, bool))
    split = fields.get("split")
    if images is None and isinstance(key, str) and key.count("-") >= 3:
        # NLVR2 (its README): sentence train-10171-0-0 is about train-10171-0-img0.png and -img1.png.
        stem = key.rpartition("-")[0]
        names = (f"{stem}-img0.png", f"{stem}-img1.png")
        split = split or key.partition("-")[0].rstrip("0123456789")
    given = fields.get("answers", fields.get("answer"))
    label = fields.get("label", fields.get("gold_label"))
    return ExampleRow(
        _key(key, number),
        names,
        _text(next((fields[name] for name in TEXTS if fields.get(name) is not None), None)),
        None if given is None else _counted(given if isinstance(given, list) else [given]),
        None if label is None else text_of(label),
        split_named(split),
    )


def _is_nlvr(record: Any) -> bool:
    """Whether it is a record of NLVR's own files, which has all of a picture's orders at once."""
    return (
        isinstance(record, dict) and "structured_rep" in record and isinstance(record.get("identifier"), str)
    )


def _nlvr(record: Mapping[str, Any], split: str) -> list[ExampleRow]:
    """A row per order of the boxes: sentence 72-0 is about train-72-0-0.png to train-72-0-5.png (NLVR, its README)."""
    row = _record({**record, "image": ""}, 0)
    return [
        replace(
            row, key=f"{split}-{row.key}-{order}", images=(f"{split}-{row.key}-{order}.png",), split=split
        )
        for order in range(ORDERS)
    ]


def daquar_rows(path: Path) -> list[ExampleRow]:
    """Rows of DAQUAR's text file (Malinowski and Fritz, arXiv 1410.0210): a line with a question, a line with its answer.

    The picture is named at the question's end ("... in the image3 ?"), which is left out of the text. An answer of several
    parts ("cup, book") is one answer, its parts in the alphabet's order: their set is what is right.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line]
    split = next((name for name in ("train", "test") if name in path.stem), None)
    rows = []
    for number, (question, answer) in enumerate(zip(lines[::2], lines[1::2], strict=False)):
        found = _DAQUAR.fullmatch(question)
        if found is None:
            raise UserError(
                f"{path}: question {number} names no picture (... in the image3 ?): {question[:60]!r}; DAQUAR's file "
                "has a line with a question, then one with its answer"
            )
        text = f"{found['text'].strip()} ?"
        rows.append(
            ExampleRow(f"{split}-{number}", (found["image"],), text, ((in_parts(answer), 1),), split=split)
        )
    if not rows or len(lines) % 2:
        raise UserError(f"{path}: has {len(lines)} lines, not pairs of a question and its answer (DAQUAR)")
    return unique(rows)


_DAQUAR = re.compile(r"(?P<text>.*?)(?:\s+(?:in|on|of))?(?:\s+the)?\s+(?P<image>image\d+)\s*\??")


def in_parts(answer: str) -> str:
    """An answer that is a set, as one text: its parts in the alphabet's order."""
    return ", ".join(sorted(part.strip() for part in answer.split(",") if part.strip()))


def easy_rows(data: list[Any], path: Path) -> list[ExampleRow]:
    """Rows of easy-VQA's list (github.com/vzhou842/easy-VQA): [question, answer, picture's number]."""
    rows = []
    for number, each in enumerate(data):
        if not (isinstance(each, list) and len(each) == 3 and isinstance(each[2], int)):
            raise UserError(f"{path}: entry {number} is not [question, answer, picture's number] (easy-VQA)")
        rows.append(ExampleRow(f"#{number}", (each[2],), _text(each[0]), _counted([each[1]])))
    return unique(rows)


def _key(value: Any, number: int) -> str:
    return text_of(value) if value is not None else f"#{number}"


def _text(value: Any) -> str | None:
    return None if value is None else text_of(value)


def _counted(answers: Iterable[Any]) -> tuple[tuple[str, int], ...]:
    """Each answer once, in the order they first come, with how often it comes."""
    return tuple(Counter(text for answer in answers for text in texts_in(answer)).items())
