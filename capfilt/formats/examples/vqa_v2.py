"""VQA v2: a JSON object of `questions`; the answers are a file of their own, where they are public."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from capfilt.errors import UserError
from capfilt.formats.examples.row import Examples, example
from capfilt.formats.source import Given
from capfilt.formats.values import identity, text_of


def detect(given: Given) -> bool:
    """Whether there is a list of questions."""
    return isinstance(given.object.get("questions"), list)


def read(given: Given, annotations: Path | None = None) -> Examples:
    """An example per question. Raises UserError where the answers are of no question."""
    found = None if annotations is None else _answers(annotations)
    subset = text_of(given.object.get("data_subtype") or "")
    rows = []
    for number, question in enumerate(given.object["questions"]):
        fields: dict[str, Any] = question if isinstance(question, dict) else {}
        image = fields.get("image_id")
        if isinstance(image, str) and image.isdecimal() and identity(image) == image:
            image = int(image)
        answer = (found or {}).get(identity(fields.get("question_id")), {})
        listed = answer.get("answers")
        given_answers = listed if isinstance(listed, list) else []
        answers = [each.get("answer") for each in given_answers if isinstance(each, dict)]
        known = {
            **{name: fields.get(name) for name in ("question_id", "question")},
            "images": [image],
            "answers": None if found is None else answers,
            "split": subset,
            "answer_type": answer.get("answer_type"),
        }
        rows.append(replace(example(known, number), subset=subset))
    if found is not None and not any(row.answers for row in rows):
        raise UserError(f"--annotations {annotations}: answers none of the questions in {given.path}")
    return "vqa", rows


def _answers(path: Path) -> dict[str, dict[str, Any]]:
    """The annotations by their questions."""
    listed = Given(path).object.get("annotations")
    if not isinstance(listed, list):
        raise UserError(f"--annotations {path}: is no JSON file with a list `annotations` (VQA v2)")
    return {
        identity(each["question_id"]): each
        for each in listed
        if isinstance(each, dict) and isinstance(each.get("question_id"), int | str)
    }
