"""Questions, statements and labels of pictures in other tools' layouts, as rows: VQA v2, NLVR2, SNLI-VE, records, class
folders; and those of `answer_formats`.

What is read here is described, not judged: whether a picture is there and what a fault costs a row is the business of
`stages/examples`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capfilt.errors import UserError
from capfilt.tables.answer_formats import (
    daquar_rows,
    easy_rows,
    is_nlvr,
    is_sugarcrepe,
    nlvr_rows,
    sugarcrepe_rows,
)
from capfilt.tables.contracts import LABELS
from capfilt.tables.example_row import ExampleRow, counted
from capfilt.tables.formats import folder_split, read_json, split_named, text_of, texts_in, unique, walk

KEYS = ("question_id", "identifier", "pair_id", "pairID", "example_id", "item_id", "id")
TEXTS = {"question": "vqa", "hypothesis": "entailment", "sentence2": "entailment", "sentence": "nlvr"}
"""Where a record's text is looked for, and which task that tells (SNLI-VE's own files call the hypothesis sentence2)."""

PICTURE_NAMES = ("Flickr30K_ID", "Flikr30kID")
"""Where SNLI-VE's own files have the name of the picture, with and without its ending, by their version."""

CAPTIONS = ("caption", "text")
"""Where a record's text is looked for else: a caption that is rated, or told from a wrong one, or labelled a match."""


def example_rows(path: Path, annotations: Path | None = None) -> tuple[str, list[ExampleRow]]:
    """(the task its field names tell, the rows in the source's order) of a file.

    VQA v2: the questions' JSON, with the answers' JSON as `annotations` where they are public. Otherwise records, as a
    JSON list or JSON Lines: a text (question, sentence or hypothesis), the pictures (`image`, or `images` in order; in
    NLVR's and NLVR2's own files they follow from the identifier), `answers` or `label`, `split`, and a key. SNLI-VE's own
    lines have other names for these. A record with a `caption` is a rating where it has `ratings`, a choice where it has a
    `negative_caption`, else a match; one with a label and no text is a classification. A folder of folders of pictures is
    a classification by the folders' names; a text file is DAQUAR's, a list of lists easy-VQA's, numbered records with a
    `negative_caption` SugarCrepe's.

    Raises UserError naming what is broken, or when there is no row.
    """
    if path.is_dir():
        return "classification", class_folders(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix == ".txt":
        _own_answers(path, annotations)
        return "vqa", unique(daquar_rows(path))
    data = _json_or_lines(path)
    if isinstance(data, dict) and isinstance(data.get("questions"), list):
        rows = _vqa_rows(data, path, annotations)
        task = "vqa"
    elif is_sugarcrepe(data):
        _own_answers(path, annotations)
        task, rows = "choice", sugarcrepe_rows(data, path)
    elif isinstance(data, list):
        _own_answers(path, annotations)
        if data and isinstance(data[0], list):
            return "vqa", unique(easy_rows(data, path))
        task = _task(data, path)
        rows = [
            row
            for number, record in enumerate(data)
            for row in (
                nlvr_rows(_record({**record, "image": ""}, 0), path.stem)
                if is_nlvr(record)
                else [_record(record, number)]
            )
        ]
    else:
        raise UserError(f"{path}: has no list `questions` (VQA v2) and is no list of records")
    if not rows:
        raise UserError(f"{path}: has no examples")
    return task, unique(rows)


def _own_answers(path: Path, annotations: Path | None) -> None:
    if annotations is not None:
        raise UserError(f"--annotations {annotations}: {path} holds its own answers; only VQA v2's does not")


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
        whole = isinstance(records[0], dict) and ("questions" in records[0] or is_sugarcrepe(records[0]))
        return records[0] if whole and len(records) == 1 else records
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
    kinds: dict[Any, str | None] = {}
    if annotations is not None:
        found = read_json(annotations) if annotations.is_file() else None
        listed = found.get("annotations") if isinstance(found, dict) else None
        if not isinstance(listed, list):
            raise UserError(
                f"--annotations {annotations}: is no JSON file with a list `annotations` (VQA v2)"
            )
        answers = {
            each["question_id"]: counted(
                answer.get("answer") for answer in each.get("answers") or () if isinstance(answer, dict)
            )
            for each in listed
            if isinstance(each, dict) and isinstance(each.get("question_id"), int | str)
        }
        kinds = {
            each["question_id"]: _text(each.get("answer_type"))
            for each in listed
            if isinstance(each, dict) and each.get("question_id") in answers
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
                category=kinds.get(key),
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
        images = next((str(fields[name]) for name in PICTURE_NAMES if fields.get(name) is not None), None)
    named = images if isinstance(images, list) else [images]
    names = tuple(each for each in named if isinstance(each, str | int) and not isinstance(each, bool))
    split = fields.get("split")
    if images is None and isinstance(key, str) and key.count("-") >= 3:
        # NLVR2 (its README): sentence train-10171-0-0 is about train-10171-0-img0.png and -img1.png.
        stem = key.rpartition("-")[0]
        names = (f"{stem}-img0.png", f"{stem}-img1.png")
        split = split or key.partition("-")[0].rstrip("0123456789")
    given = fields.get("answers", fields.get("answer", fields.get("ratings")))
    label = fields.get("label", fields.get("gold_label"))
    wrong = fields.get("negative_caption", fields.get("wrong_texts"))
    return ExampleRow(
        _key(key, number),
        names,
        _text(next((fields[name] for name in (*TEXTS, *CAPTIONS) if fields.get(name) is not None), None)),
        None if given is None else counted(given if isinstance(given, list) else [given]),
        None if label is None else text_of(label),
        split_named(split),
        wrong_texts=tuple(texts_in(wrong)) if wrong is not None else (),
        category=_text(fields.get("category", fields.get("answer_type"))),
    )


def _key(value: Any, number: int) -> str:
    return text_of(value) if value is not None else f"#{number}"


def _text(value: Any) -> str | None:
    return None if value is None else text_of(value)
