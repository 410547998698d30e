"""VQA: answers to questions about pictures, written freely, ranked from a list, or chosen from a closed set.

What lives here: the accuracy (Antol et al., arXiv 1505.00468; Goyal et al., arXiv 1612.00837) and the evaluation of what
answers. What does not: the normal form of answers and what one is worth, which training shares (`capfilt.data.answers`).

A question with ten annotators is judged by the official accuracy, in its leave-one-out form, as the official script has
computed it since 2021 (github.com/GT-Vision-Lab/VQA, a013f00): where annotators differ in normal forms, where all agree as
they spell it. Where a question has fewer than four, nobody could reach 1 in it: a set with such questions is judged by exact
match with any of the answers, and named so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capfilt.data.answers import (
    LEAST_ANNOTATORS,
    merged,
    normalised,
    soft_score,
    spellings,
    stripped,
)
from capfilt.errors import UserError
from capfilt.inference.capabilities import AnswersQuestions
from capfilt.inference.decoding import RELEASED
from capfilt.tables.contracts import LABELS
from capfilt.tables.workspace import expanded
from capfilt.tasks.outcome import Outcome, units
from capfilt.tasks.registry import Unsuited

if TYPE_CHECKING:
    from capfilt.data.example_set import ExampleSet
    from capfilt.tasks.registry import Progress

Answers = Sequence[tuple[str, int]]


def soft_accuracy(predicted: str, answers: Answers) -> float:
    """The official accuracy of one answer, in [0, 1]: the mean over left-out annotators of min(matches / 3, 1).

    answers: what annotators said, with how many did, four of them or more. As in the official script, nothing but the
    space around is touched where all said the same, and both sides are put into their normal form where not.
    """
    form = stripped if len({stripped(text) for text, _ in answers}) == 1 else normalised
    found = form(predicted)
    matching = sum(count for text, count in answers if form(text) == found)
    return soft_score(matching, sum(count for _, count in answers))


def exact_match(predicted: str, answers: Answers) -> float:
    """1 where the normal form of the answer is that of one that was given, else 0."""
    return float(normalised(predicted) in merged(answers))


def by_annotators(questions: Sequence[Answers]) -> bool:
    """Whether every question has annotators enough for the official accuracy."""
    return all(sum(count for _, count in answers) >= LEAST_ANNOTATORS for answers in questions)


def worth(predicted: Sequence[str], questions: Sequence[Answers]) -> NDArray[np.float64]:
    """What each answer is worth, float64 [Q] in [0, 1]: `soft_accuracy`, or `exact_match` (see the module)."""
    judge = soft_accuracy if by_annotators(questions) else exact_match
    return np.array(
        [judge(each, answers) for each, answers in zip(predicted, questions, strict=True)], dtype=np.float64
    )


def evaluate_vqa(model: Any, data: ExampleSet, options: Any, progress: Progress) -> Outcome:
    """VQA with whatever the model has: `vqa_written` and `vqa_ranked` (open set), `vqa_closed` (closed set), in percent.

    options: `batch_size`, `num_beams`, `beam_rule`, `answer_list` (without one nothing is ranked) and `answer_k`.
    Figures by exact match have `_exact` behind their names. Where categories are given, the figures by each.
    """
    if not len(data):
        raise Unsuited("--tasks vqa: there is no question in this split")
    questions = list(data.answers)
    if not all(questions):
        raise Unsuited(
            f"--tasks vqa: {sum(not each for each in questions)} questions have no answers to compare with; "
            "choose another --split, or bring the answers in with `capfilt examples --annotations`"
        )
    suffix = "" if by_annotators(questions) else "_exact"
    written: dict[str, list[str]] = {}
    protocol = []
    if isinstance(model, AnswersQuestions):
        listed = answer_list(options.answer_list)
        written[f"vqa_written{suffix}"] = []
        rule = ", the released rule" if options.beam_rule == RELEASED else ""
        protocol.append(f"open set: written with {options.num_beams} beams{rule}")
        if listed:
            written[f"vqa_ranked{suffix}"] = []
            protocol.append(f"open set: ranked, {len(listed)} answers, k = {options.answer_k}")
    else:
        listed = []
        written[f"vqa_closed{suffix}"] = []
        protocol.append(f"closed set: {len(model.labels)} answers")
        if model.pictures != 1 or model.labels in LABELS.values():
            raise Unsuited(
                f"--tasks vqa: the model tells {', '.join(model.labels[:3])} apart, which are no answers; finetune one "
                "with `capfilt finetune vqa`"
            )
    count = len(data)
    for start in range(0, count, options.batch_size):
        rows = range(start, min(start + options.batch_size, count))
        images, texts = pixels(data, rows), [data.texts[row] or "" for row in rows]
        for name, made in written.items():
            if name.startswith("vqa_written"):
                made += model.answer(
                    images[:, 0], texts, num_beams=options.num_beams, beam_rule=options.beam_rule
                )
            elif name.startswith("vqa_ranked"):
                best = model.rank_answers(images[:, 0], texts, listed, k=options.answer_k)
                made += [listed[place] for place in best.tolist()]
            else:
                made += [
                    model.labels[place] for place in model.classify(images, texts).argmax(dim=1).tolist()
                ]
        progress("questions", rows.stop, count)
    protocol.append(
        "exact match with any answer, in VQA's normal form"
        if suffix
        else "official accuracy (GT-Vision-Lab/VQA a013f00: mean over left-out annotators of min(matches / 3, 1))"
    )
    figures, made_of = {}, {}
    image_of = [data.image_ids[places[0]] for places in data.pictures]
    constant = most_frequent(questions)
    baselines = {}
    for name, made in written.items():
        values = worth(made, questions)
        made_of[name] = units("mean", values, image_of)
        figures[name] = made_of[name].value()
        figures |= by_category(name, values, data.categories)
        baselines[name] = 100.0 * float(worth([constant] * count, questions).mean())
    return Outcome(
        protocol="; ".join(protocol),
        metrics=figures,
        units=made_of,
        counts={"examples": count, "images": len(set(image_of))},
        baselines=baselines,
        details={
            "baseline": f"always the split's own most frequent answer, {constant!r}",
            "answers": {
                name: dict(zip(data.example_ids, made, strict=True)) for name, made in written.items()
            },
        },
    )


def answer_list(path: str) -> list[str]:
    """The answers in a file, a JSON list or lines, each once; none where no file is named. UserError naming it."""
    if not path:
        return []
    file = expanded(path)
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--answer-list {file}: not readable as a list of answers ({error})") from error
    listed = list(dict.fromkeys(each for each in found if isinstance(each, str) and each.strip()))
    if not listed:
        raise UserError(f"--answer-list {file}: has no answers; give a JSON list of strings, or lines")
    return listed


def depends(options: Any) -> list[str]:
    """What the figures depend on beside options and inputs: the answers to rank."""
    return answer_list(options.answer_list)


def most_frequent(questions: Sequence[Answers]) -> str:
    """The answer that most people gave in any spelling, in its own; the last in the alphabet of several."""
    counts = Counter[str]()
    for answers in questions:
        counts.update(merged(answers))
    return spellings(questions)[max(counts, key=lambda answer: (counts[answer], answer))] if counts else ""


def by_category(name: str, values: NDArray[np.float64], categories: Sequence[str | None]) -> dict[str, float]:
    """The mean of `values` over each kind, in percent, as `name:kind`; nothing where there are no kinds."""
    kinds = sorted({kind for kind in categories if kind})
    told = np.array([kind or "" for kind in categories], dtype=object)
    return {f"{name}:{kind}": 100.0 * float(values[told == kind].mean()) for kind in kinds}


def pixels(data: ExampleSet, rows: Sequence[int], pictures: int = 1) -> Tensor:
    """uint8 [B, pictures, 3, S, S] of examples `rows`; an example with one picture shows it to a model of two twice."""
    places = [data.pictures[row] for row in rows]
    shown = np.array([each * (pictures // len(each)) for each in places], dtype=np.int64)
    read = torch.from_numpy(data.images.read(shown.reshape(-1)))
    return read.view(*shown.shape, *read.shape[1:])
