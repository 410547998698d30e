"""The stages that finetune for a task on its examples: `finetune vqa`, `nlvr`, `entailment`, `classification`.

For VQA a checkpoint has `answers.json` too, the answers to rank. The figures in its `config.json` are the loop's last ones,
and with `--validate` the loss and accuracy on examples of the split val: of VQA the share of annotators whose answer is the
one written greedily, which is no official metric.
Not here: the training (`training.py`), the rows (`sources.py`), the model that each makes of its start (`starts.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch

from capfilt.data.answers import closed_list
from capfilt.data.task_corpus import Answers
from capfilt.errors import UserError
from capfilt.models.common.ranks import Ranks
from capfilt.models.common.task_objectives import AnsweringConfig, ClassifierTraining, VqaTraining
from capfilt.models.family import ANSWERS, CLASSES, PAIRS
from capfilt.stages.sources import ExampleSource
from capfilt.stages.starts import ForTask
from capfilt.stages.task_options import (
    FinetuneClassificationOptions,
    FinetuneEntailmentOptions,
    FinetuneNlvrOptions,
    FinetuneVqaOptions,
)
from capfilt.stages.training import Train
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace


class Finetune(Train):
    """Examples, and a classifier of them (ALBEF and ViLT publish such heads).

    Attributes:
        task: one of `capfilt.tables.contracts.TASKS`.
        form: the task's form (`capfilt.models.family`).
    """

    shown = ("loss", "accuracy")
    task: ClassVar[str]
    form: ClassVar[str] = CLASSES

    def __init__(self, options: Any, workspace: Workspace, output: Part | None = None) -> None:
        super().__init__(options, workspace, output)
        self.compose(
            lambda: ForTask(workspace, options, self.form, self.task, self.name),
            lambda: ExampleSource(options, workspace, self.task, **self.reading()),
        )

    def reading(self) -> dict[str, Any]:
        """Further options of the source."""
        return {"pictures": 1}

    def module(self, model: Any, tokenizer: Any, ranks: Ranks) -> torch.nn.Module:
        return ClassifierTraining(model, self.options.momentum or None)


class FinetuneVqa(Finetune):
    """Questions with their annotators' answers, which the model writes (BLIP, section 5.3)."""

    name = "finetune-vqa"
    task, form = "vqa", ANSWERS
    version = 5  # questions are cleaned by the family's rule of questions; crops are the same on any number of ranks
    options: FinetuneVqaOptions

    def __init__(self, options: FinetuneVqaOptions, workspace: Workspace, output: Part | None = None) -> None:
        if options.softmax:
            raise UserError("--softmax is of answers chosen from a list: give --closed")
        super().__init__(options, workspace, output)

    def reading(self) -> dict[str, Any]:
        return {"weights": answer_weights(self.options)}

    def prepare(self, data: Any, model: Any, where: torch.device) -> None:
        # BLIP ranks the answers that are frequent in training (released code: answer_list.json).
        answers = closed_list(data.annotated, self.options.min_answers)
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "answers.json").write_text(json.dumps(answers, indent=0) + "\n", encoding="utf-8")

    def module(self, model: Any, tokenizer: Any, ranks: Ranks) -> torch.nn.Module:
        smoothing = AnsweringConfig(self.options.label_smoothing)
        return VqaTraining(model, smoothing, self.options.momentum or None)


class FinetuneClosedVqa(Finetune):
    """Questions answered from a closed list: the answers that are frequent in training (ViLT, arXiv 2102.03334)."""

    name = "finetune-vqa"
    task = "vqa"
    version = 4
    options: FinetuneVqaOptions

    def __init__(self, options: FinetuneVqaOptions, workspace: Workspace, output: Part | None = None) -> None:
        if options.answer_weight:
            raise UserError("--answer-weight weighs written answers; with --closed leave it out")
        if options.momentum:
            raise UserError("--momentum teaches answers that are written; with --closed leave it out")
        super().__init__(options, workspace, output)

    def reading(self) -> dict[str, Any]:
        return {"pictures": 1, "classes": partial(frequent_answers, self.options.min_answers)}

    def module(self, model: Any, tokenizer: Any, ranks: Ranks) -> torch.nn.Module:
        return ClassifierTraining(model, softmax=self.options.softmax)


class FinetuneNlvr(Finetune):
    """Statements about two pictures, or about one that is shown twice (BLIP, section 5.4)."""

    name = "finetune-nlvr"
    task, form = "nlvr", PAIRS
    options: FinetuneNlvrOptions

    def reading(self) -> dict[str, Any]:
        return {"swap": self.options.swap}


class FinetuneSingleNlvr(Finetune):
    """Statements about one picture, true or false (NLVR: Suhr et al., ACL 2017)."""

    name = "finetune-nlvr"
    task = "nlvr"
    options: FinetuneNlvrOptions


class FinetuneEntailment(Finetune):
    """Hypotheses about a picture: entailment, neutral or contradiction (SNLI-VE: Xie et al., arXiv 1901.06706)."""

    name = "finetune-entailment"
    task = "entailment"
    options: FinetuneEntailmentOptions


class FinetuneClassification(Finetune):
    """Pictures by their classes, those that the training examples have; no text is read."""

    name = "finetune-classification"
    task = "classification"
    options: FinetuneClassificationOptions

    def reading(self) -> dict[str, Any]:
        return {"pictures": 1, "classes": ()}


def answer_weights(options: FinetuneVqaOptions) -> Mapping[str, float]:
    """The weight of a part's answers, by the part's name. UserError for an --answer-weight that is none."""
    weights = {}
    for item in options.answer_weight:
        name, equals, weight = item.partition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            equals = ""
        if not equals or name not in options.examples or not 0 < weights[name] < float("inf"):
            raise UserError(
                f"--answer-weight {item}: write PART=WEIGHT, one of --examples and a number above 0"
            )
    return weights


def frequent_answers(least: int, questions: Sequence[Answers]) -> tuple[str, ...]:
    """The closed list: answers that are the most frequent of `least` questions or more. UserError for fewer than two."""
    answers = closed_list(questions, least)
    if len(answers) < 2:
        raise UserError(
            f"of {len(questions)} questions, {len(answers)} answers are the most frequent of {least} "
            "or more, and a closed list needs two; lower --min-answers"
        )
    return answers
