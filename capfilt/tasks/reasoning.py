"""Texts judged true or false of one picture or two (NLVR, NLVR2), and visual entailment (SNLI-VE).

What lives here: accuracy, NLVR's consistency, accuracy by class. What does not: how a model fuses pictures and text.

Examples are not alone: NLVR shows one scene with its boxes in six orders and asks one statement of four scenes, NLVR2 asks
several statements of pairs found together. What has one origin is drawn together when an interval is made.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from capfilt.tables.contracts import LABELS
from capfilt.tasks.answers import pixels
from capfilt.tasks.outcome import Outcome, Units, units
from capfilt.tasks.registry import Unsuited

if TYPE_CHECKING:
    from capfilt.data.example_set import ExampleSet
    from capfilt.tasks.registry import Progress

_NLVR2 = re.compile(r"((?:train|dev|test[12]?)-\d+)-\d+-(\d+)")
_NLVR = re.compile(r"((?:train|dev|test|hidden)-\d+)-\d+(?:-\d+)?|(\d+)-\d+(?:-\d+)?")


def statement_of(key: str, pictures: int) -> str | None:
    """What the examples that share a statement have in common in their keys; None for a key of another form.

    NLVR2 (its README): `split-set-pair-sentence`, so set and sentence. NLVR (its README): `presentation-position`, in
    pictures' names with the split before and the order of the boxes behind, so the presentation, which has one statement.
    """
    if pictures > 1:
        found = _NLVR2.fullmatch(key)
        return f"{found[1]}-{found[2]}" if found else None
    found = _NLVR.fullmatch(key)
    return (found[1] or found[2]) if found else None


def origin_of(key: str, pictures: int) -> str | None:
    """What the examples of one origin have in common in their keys; None for a key of another form.

    NLVR: the statement, with its four scenes and their orders of boxes. NLVR2: `split-set`, whose pairs were searched for
    together and have their statements in common (Suhr et al., ACL 2019, sec. 3).
    """
    if pictures > 1:
        found = _NLVR2.fullmatch(key)
        return found[1] if found else None
    return statement_of(key, pictures)


def evaluate_nlvr(model: Any, data: ExampleSet, options: Any, progress: Progress) -> Outcome:
    """`nlvr_accuracy`, and `nlvr_consistency` where keys are NLVR's or NLVR2's, in percent.

    Consistency is the share of statements all of whose examples in this split are judged right. With fewer examples of a
    statement than it has, that is easier: where any were left out for a fault or by a limit, it is skipped.
    """
    return _outcome("nlvr", data, *_judged("nlvr", model, data, options, progress))


def evaluate_entailment(model: Any, data: ExampleSet, options: Any, progress: Progress) -> Outcome:
    """`entailment_accuracy`, and `entailment_accuracy:LABEL` of each of the three classes, in percent."""
    return _outcome("entailment", data, *_judged("entailment", model, data, options, progress))


def _judged(
    task: str, model: Any, data: ExampleSet, options: Any, progress: Progress
) -> tuple[np.ndarray[Any, Any], list[str]]:
    """(float64 [E], 1 where the model is right; the labels it gave)."""
    if set(model.labels) != set(LABELS[task]):
        shown = ", ".join(model.labels[:3])
        raise Unsuited(
            f"--tasks {task}: the model tells {len(model.labels)} other classes apart ({shown}); finetune one with "
            f"`capfilt finetune {task}`"
        )
    if not len(data):
        raise Unsuited(f"--tasks {task}: there is no example in this split")
    unlabelled = sum(label is None for label in data.labels)
    if unlabelled:
        raise Unsuited(f"--tasks {task}: {unlabelled} examples have no label; choose another --split")
    too_many = sum(len(places) > model.pictures for places in data.pictures)
    if too_many:
        raise Unsuited(
            f"--tasks {task}: {too_many} examples have two pictures and the model looks at {model.pictures}; "
            "finetune one without --single"
        )
    count = len(data)
    predicted: list[str] = []
    for start in range(0, count, options.batch_size):
        rows = range(start, min(start + options.batch_size, count))
        logits = model.classify(pixels(data, rows, model.pictures), [data.texts[row] or "" for row in rows])
        predicted += [model.labels[place] for place in logits.argmax(dim=1).tolist()]
        progress("examples", rows.stop, count)
    right = np.array(
        [mine == label for mine, label in zip(predicted, data.labels, strict=True)], dtype=np.float64
    )
    return right, predicted


def _outcome(task: str, data: ExampleSet, right: np.ndarray[Any, Any], predicted: list[str]) -> Outcome:
    labels = [label or "" for label in data.labels]
    pictures = max(len(places) for places in data.pictures)
    shown = ["+".join(data.image_ids[place] for place in places) for places in data.pictures]
    origins = [origin_of(key, pictures) if task == "nlvr" else None for key in data.keys]
    together = [origin or pair for origin, pair in zip(origins, shown, strict=True)]
    name = f"{task}_accuracy"
    made_of = {name: units("mean", right, together)}
    metrics = {name: made_of[name].value()}
    baselines = {name: 100.0 * max(Counter(labels).values()) / len(labels)}
    counts = {"examples": len(labels), "images": len(data.image_ids)}
    protocol = f"accuracy over {len(LABELS[task])} classes"
    skipped = {}
    if task == "nlvr":
        protocol += ", " + ("two pictures" if pictures > 1 else "one picture")
        if any(origins):
            protocol += "; intervals by " + ("set of pairs" if pictures > 1 else "statement")
        statements = [statement_of(key, pictures) for key in data.keys]
        lost = sum(data.skipped.values()) + data.deselected.get("limit", 0)
        if all(statements) and lost:
            skipped["nlvr_consistency"] = (
                f"{lost:,} examples were left out, and a part of a statement is easier"
            )
        elif all(statements):
            made_of["nlvr_consistency"] = _consistency(statements, together, right)
            metrics["nlvr_consistency"] = made_of["nlvr_consistency"].value()
            counts["statements"] = len(made_of["nlvr_consistency"].columns)
            protocol += "; consistency: statements all of whose examples are right"
    else:
        for label in LABELS[task]:
            here = np.array(labels) == label
            if here.any():
                metrics[f"{name}:{label}"] = 100.0 * float(right[here].mean())
    return Outcome(
        protocol=protocol,
        metrics=metrics,
        units=made_of,
        counts=counts,
        baselines=baselines,
        details={
            "baseline": "the split's own most frequent label",
            "chance": 100.0 / len(LABELS[task]),
            "confusion": {
                label: dict(
                    sorted(Counter(p for p, of in zip(predicted, labels, strict=True) if of == label).items())
                )
                for label in LABELS[task]
            },
            **({"skipped": skipped} if skipped else {}),
        },
    )


def _consistency(statements: list[str | None], together: list[str], right: np.ndarray[Any, Any]) -> Units:
    """Units of the statements, 1 where every example [E] of it is right."""
    values: dict[str | None, float] = {}
    groups: dict[str | None, str] = {}
    for statement, group, value in zip(statements, together, right.tolist(), strict=True):
        values[statement] = min(values.get(statement, 1.0), value)
        groups[statement] = group
    return units("mean", list(values.values()), list(groups.values()))
