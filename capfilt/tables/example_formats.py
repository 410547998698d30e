"""Questions, statements and labels of pictures in other tools' layouts, as rows: VQA v2, NLVR2, records, class folders.

What is read here is described, not judged: whether a picture is there and what a fault costs a row is the business of
`stages/examples`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capfilt.errors import UserError
from capfilt.tables.formats import folder_split, read_json, split_named, text_of, texts_in, unique, walk

KEYS = ("question_id", "identifier", "pair_id", "example_id", "item_id", "id")
TEXTS = {"question": "vqa", "sentence": "nlvr", "hypothesis": "entailment"}
"""Where a record's text is looked for, and which task that tells."""

CAPTIONS = ("caption", "text")
"""Where a record's text is looked for else: a caption that is rated, or told from a wrong one, or labelled a match."""


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


def example_rows(path: Path, annotations: Path | None = None) -> tuple[str, list[ExampleRow]]:
    """(the task its field names tell, the rows in the source's order) of a file.

    VQA v2: the questions' JSON, with the answers' JSON as `annotations` where they are public. Otherwise records, as a
    JSON list or JSON Lines: a text (question, sentence or hypothesis), the pictures (`image`, or `images` in order; in
    NLVR2's own files they follow from the identifier), `answers` or `label`, `split`, and a key. A record with a `caption`
    is a rating where it has `ratings`, a choice where it has a `negative_caption`, else a match; one with a label and no
    text is a classification. A folder of folders of pictures is a classification by the folders' names.

    Raises UserError naming what is broken, or when there is no row.
    """
    if path.is_dir():
        return "classification", class_folders(path)
    if not path.is_file():
        raise UserError(f"--source-path {path}: no such file or folder")
    data = _json_or_lines(path)
    if isinstance(data, dict) and isinstance(data.get("questions"), list):
        rows = _vqa_rows(data, path, annotations)
        task = "vqa"
    elif isinstance(data, list):
        if annotations is not None:
            raise UserError(
                f"--annotations {annotations}: {path} holds its own answers; only VQA v2's does not"
            )
        task = _task(data, path)
        rows = [_record(record, number) for number, record in enumerate(data)]
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
                return task
    for record in records:
        fields = record if isinstance(record, dict) else {}
        captioned = any(fields.get(name) is not None for name in CAPTIONS)
        if captioned and fields.get("ratings") is not None:
            return "rating"
        if captioned and (fields.get("negative_caption") or fields.get("wrong_texts")):
            return "choice"
        if fields.get("label") is not None:
            return "match" if captioned else "classification"
    raise UserError(
        f"{path}: no record has {', '.join(TEXTS)}, a caption with ratings or a negative_caption, or a label: it holds no "
        "examples"
    )


def class_folders(root: Path) -> list[ExampleRow]:
    """Pictures in folders named by their classes, as torchvision's ImageFolder has them, perhaps in folders of splits."""
    rows = []
    for name in walk(root):
        *folders, _ = name.split("/")
        split = folder_split(name) if len(folders) > 1 else None
        if folders:
            rows.append(ExampleRow(name, (name,), label=folders[1] if split else folders[0], split=split))
    if not rows:
        raise UserError(f"{root}: has no pictures in folders; a class is a folder of its pictures")
    return rows


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
    named = images if isinstance(images, list) else [images]
    names = tuple(each for each in named if isinstance(each, str | int) and not isinstance(each, bool))
    split = fields.get("split")
    if images is None and isinstance(key, str) and key.count("-") >= 3:
        # NLVR2 (its README): sentence train-10171-0-0 is about train-10171-0-img0.png and -img1.png.
        stem = key.rpartition("-")[0]
        names = (f"{stem}-img0.png", f"{stem}-img1.png")
        split = split or key.partition("-")[0].rstrip("0123456789")
    given = fields.get("answers", fields.get("answer", fields.get("ratings")))
    label = fields.get("label")
    wrong = fields.get("negative_caption", fields.get("wrong_texts"))
    return ExampleRow(
        _key(key, number),
        names,
        _text(next((fields[name] for name in (*TEXTS, *CAPTIONS) if fields.get(name) is not None), None)),
        None if given is None else _counted(given if isinstance(given, list) else [given]),
        None if label is None else text_of(label),
        split_named(split),
        wrong_texts=tuple(texts_in(wrong)) if wrong is not None else (),
        category=_text(fields.get("category")),
    )


def _key(value: Any, number: int) -> str:
    return text_of(value) if value is not None else f"#{number}"


def _text(value: Any) -> str | None:
    return None if value is None else text_of(value)


def _counted(answers: Iterable[Any]) -> tuple[tuple[str, int], ...]:
    """Each answer once, in the order they first come, with how often it comes."""
    return tuple(Counter(text for answer in answers for text in texts_in(answer)).items())
