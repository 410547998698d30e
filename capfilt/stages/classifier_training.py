"""The stages that finetune a model with a classifier on it: `finetune vqa --closed`, `finetune nlvr --single`, `finetune
entailment`, `finetune classification`.

What they share with BLIP's own finetunings is `task_training.py`'s; the model is `capfilt.models.classifier`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from capfilt.data.answers import closed_list
from capfilt.data.task_corpus import Answers, TaskCorpus
from capfilt.data.tokenizer import Tokenizer
from capfilt.errors import UserError
from capfilt.models.kinds import CLASSES, Judges, Model, Start
from capfilt.models.ranks import Ranks
from capfilt.models.task_objectives import ClassifierTraining
from capfilt.stages.task_options import (
    FinetuneClassificationOptions,
    FinetuneEntailmentOptions,
    FinetuneNlvrOptions,
    FinetuneVqaOptions,
)
from capfilt.stages.task_training import TaskTraining
from capfilt.tables.contracts import LABELS
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace


class ClassifierTask(TaskTraining):
    """What they share: one picture per example, and a head for the task's classes."""

    form = CLASSES

    def classes(self, data: TaskCorpus) -> tuple[str, ...]:
        """What the classifier's outputs stand for."""
        return LABELS[self.task]

    def reading(self, model: Any = None) -> dict[str, Any]:
        return {"pictures": 1}

    def started(self, start: Start, model: Model, data: TaskCorpus) -> Model:
        o = self.options
        made: Model = start(
            model,
            task=self.task,
            classes=self.classes(data),
            seed=o.seed,
            drop_path=o.drop_path,
        )
        return made

    def prototype(self, start: Start, model: Model) -> Model:
        classes = LABELS[self.task] or ("a", "b")
        made: Model = start(model, task=self.task, classes=classes, seed=0, drop_path=0.0)
        return made

    def continues(self, model: Any, data: TaskCorpus) -> bool:
        same = (model.config.task, model.pictures, model.labels) == (self.task, 1, self.classes(data))
        return bool(same)

    def module(self, model: Judges, tokenizer: Tokenizer, ranks: Ranks) -> torch.nn.Module:
        return ClassifierTraining(model, self.options.momentum or None)


class FinetuneClosedVqa(ClassifierTask):
    """Questions answered from a closed list: the answers that are frequent in training (ViLT, arXiv 2102.03334)."""

    name = "finetune-vqa"
    task = "vqa"
    version = 3
    options: FinetuneVqaOptions

    def __init__(self, options: FinetuneVqaOptions, workspace: Workspace, output: Part | None = None) -> None:
        super().__init__(options, workspace, output)
        if options.answer_weight:
            raise UserError("--answer-weight weighs written answers; with --closed leave it out")
        if options.momentum:
            raise UserError("--momentum teaches answers that are written; with --closed leave it out")

    def classes(self, data: TaskCorpus) -> tuple[str, ...]:
        return data.classes

    def reading(self, model: Any = None) -> dict[str, Any]:
        return {
            **super().reading(model),
            "classes": model.labels if model is not None else self._closed_list,
        }

    def module(self, model: Judges, tokenizer: Tokenizer, ranks: Ranks) -> torch.nn.Module:
        return ClassifierTraining(model, softmax=self.options.softmax)

    def _closed_list(self, questions: Sequence[Answers]) -> tuple[str, ...]:
        least = self.options.min_answers
        found = closed_list(questions, least)
        if len(found) < 2:
            raise UserError(
                f"{self.name}: of {len(questions)} questions, {len(found)} answers are the most frequent of {least} "
                "or more, and a closed list needs two: lower --min-answers"
            )
        return found


class FinetuneSingleNlvr(ClassifierTask):
    """Statements about one picture, true or false (NLVR: Suhr et al., ACL 2017)."""

    name = "finetune-nlvr"
    task = "nlvr"
    options: FinetuneNlvrOptions


class FinetuneEntailment(ClassifierTask):
    """Hypotheses about a picture: entailment, neutral or contradiction (SNLI-VE: Xie et al., arXiv 1901.06706)."""

    name = "finetune-entailment"
    task = "entailment"
    options: FinetuneEntailmentOptions


class FinetuneClassification(ClassifierTask):
    """Pictures by their classes, those that the training examples have; no text is read."""

    name = "finetune-classification"
    task = "classification"
    options: FinetuneClassificationOptions

    def classes(self, data: TaskCorpus) -> tuple[str, ...]:
        if len(data.classes) < 2:
            raise UserError(
                f"{self.name}: the examples have {len(data.classes)} classes; a classifier needs two"
            )
        return data.classes

    def reading(self, model: Any = None) -> dict[str, Any]:
        return {**super().reading(model), "classes": model.labels if model is not None else ()}
