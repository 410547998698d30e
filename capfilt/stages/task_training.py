"""The stages that finetune a BLIP for a task on its examples: `finetune vqa`, `finetune nlvr`, in BLIP's own ways.

Those that put a classifier on it are `classifier_training.py`'s.

What every training shares is `training.py`'s. A checkpoint directory holds what that of the other stages holds;
`exposures.parquet` counts examples, and for VQA `answers.json` lists those to rank. The figures in its `config.json` are
the loop's last ones, and with `--validate` the loss and accuracy on examples of the split val: of VQA the share of
annotators whose answer is the one written greedily, which is no official metric.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pyarrow as pa
import torch

from capfilt.data.answers import closed_list
from capfilt.data.cleaning import OF_QUESTIONS
from capfilt.data.task_corpus import NEEDED, TaskCorpus, from_examples, task_batches
from capfilt.data.tokenizer import Tokenizer
from capfilt.errors import UserError
from capfilt.models import checkpoint, kinds
from capfilt.models.kinds import (
    ANSWERS,
    EXAMPLE_ROWS,
    FINETUNED,
    PAIRS,
    STARTS,
    Answers,
    Judges,
    Model,
    Start,
)
from capfilt.models.ranks import ALONE, Ranks
from capfilt.models.task_objectives import AnsweringConfig, ClassifierTraining, VqaTraining
from capfilt.stages.task_options import FinetuneNlvrOptions, FinetuneVqaOptions
from capfilt.stages.training import Training
from capfilt.tables.contracts import LABELS
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace

IMAGE_COLUMNS = ("image_id", "image", "split")


class TaskTraining(Training[TaskCorpus]):
    """What they share: examples, pictures, where a model starts, how it is judged."""

    rows = EXAMPLE_ROWS
    shown = ("loss", "accuracy")
    task: ClassVar[str]
    form: ClassVar[str]

    def __init__(self, options: Any, workspace: Workspace, output: Part | None = None) -> None:
        for name in ("examples", "images"):
            if not getattr(options, name):
                raise UserError(f"{self.name}: give at least one part of {name} (--{name})")
        super().__init__(options, workspace, output)
        self.parts = {name: workspace.input("examples", name).check() for name in options.examples}
        self.images = [workspace.input("images", name).check() for name in options.images]
        self.init = workspace.model(options.init)
        self.check_start(self.init, "--init", (*STARTS[self.form], *FINETUNED[self.form]))

    def started(self, start: Start, model: Model, data: TaskCorpus) -> Model:
        """The task's model, made of a pretrained one by `start`."""
        made: Model = start(model, seed=self.options.seed, drop_path=self.options.drop_path)
        return made

    def continues(self, model: Any, data: TaskCorpus) -> bool:
        """Whether a model of the task's form is gone on from as it is."""
        return True

    def reading(self, model: Any = None) -> dict[str, Any]:
        """Further options of `from_examples`, for training, or for judging `model`."""
        return {}

    def weights(self) -> Mapping[str, float]:
        """What the answers of a part weigh, where that is not 1."""
        return {}

    def inputs(self) -> list[Part]:
        return [*self.parts.values(), *self.images]

    def identity(self) -> Mapping[str, Any]:
        return {**super().identity(), "init": checkpoint.fingerprint(self.init)}

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        return checkpoint.origin(self.init, self.options.init)

    def outlook(self) -> str:
        o = self.options
        length = f"{o.steps:,} steps" if o.steps else f"{o.epochs:g} epochs"
        rows = sum(part.rows for part in self.parts.values())
        return f"{length} of {o.batch_size} over {rows:,} examples"

    def image_size(self) -> int:
        return int(
            self.options.image_size or checkpoint.read_config(self.init)["config"]["vision"]["image_size"]
        )

    def data(self, size: int) -> TaskCorpus:
        corpus = self._corpus(size, (*self.options.splits, None), **self.reading())
        if not len(corpus):
            raise UserError(
                f"{self.name}: no examples of the task {self.task} to train on in "
                f"{', '.join(str(part.path) for part in self.parts.values())} "
                f"(left out: {corpus.skipped | corpus.deselected})"
            )
        given = set(corpus.example_ids)
        for part in self.parts.values():
            ids = (table["example_id"].to_pylist() for table in part.tables(["example_id"]))
            if all(given.isdisjoint(some) for some in ids):
                raise UserError(
                    f"{part.path}: gives no example of the task {self.task} to train on; name another part, or leave it out"
                )
        return corpus

    def _corpus(
        self, size: int, splits: tuple[str | None, ...], limit: int = 0, **options: Any
    ) -> TaskCorpus:
        weights = self.weights()
        return from_examples(
            (
                (table, weights.get(name, 1.0))
                for name, part in self.parts.items()
                for table in part.tables((*NEEDED, "split"))
            ),
            (table for part in self.images for table in part.tables(IMAGE_COLUMNS)),
            self.task,
            splits,
            size=size,
            limit=limit,
            training=True,
            **options,
        )

    def planned(self) -> Any:
        with torch.device("meta"):
            model = kinds.empty(checkpoint.shape_of(self.init))
            if kinds.of(model).rows == self.rows and type(model) in FINETUNED[self.form]:
                return model.config
            return self.prototype(STARTS[self.form][type(model)], model).config

    def prototype(self, start: Start, model: Model) -> Model:
        """The task's model without weights, before its examples are known."""
        made: Model = start(model, seed=0, drop_path=0.0)
        return made

    def initial(self, data: TaskCorpus) -> tuple[Model, Tokenizer]:
        contents, _ = checkpoint.open_any(self.init)
        model, size = contents.model, self.image_size()
        starts, finetuned = STARTS[self.form], FINETUNED[self.form]
        if size != model.config.image_size:
            resize = getattr(model, "resize_image", None)
            if resize is None:
                raise UserError(
                    f"--image-size {size}: {self.init} was trained with {model.config.image_size} and keeps it"
                )
            resize(size)
        # What has learned from a task's rows is gone on from; what learned from pairs becomes the task's model first.
        if (
            kinds.of(model).rows != self.rows
            or type(model) not in finetuned
            or not self.continues(model, data)
        ):
            model = self.started(starts[type(model)], model, data)
        return model, contents.tokenizer

    def feed(self) -> dict[str, Any]:
        return {}

    def account(self, data: TaskCorpus) -> dict[str, Any]:
        return {"examples": len(data), "images": len(data.image_ids)}

    def named(self, data: TaskCorpus) -> Iterator[pa.Table]:
        yield pa.table({"example_id": data.example_ids})

    @torch.no_grad()
    def judged(self, model: Model, tokenizer: Tokenizer, where: torch.device) -> dict[str, float]:
        o = self.options
        if not o.validate or "val" in o.splits:
            return {}
        corpus = self._corpus(self.image_size(), ("val",), o.validate, **self.reading(model))
        if not len(corpus):
            return {}
        module = self.module(model.to(where), tokenizer, ALONE).eval()
        totals = {"loss": 0.0, "accuracy": 0.0}
        for batch in task_batches(corpus, tokenizer, o.batch_size, epochs=1, **self.longest(model)):
            found = module.losses(batch.to(where))  # type: ignore[operator]
            for name in totals:
                totals[name] += float(found[name]) * len(batch) / len(corpus)
        return {"val_examples": len(corpus), **{f"val_{name}": value for name, value in totals.items()}}


class FinetuneVqa(TaskTraining):
    """Questions with their annotators' answers (BLIP, section 5.3)."""

    name = "finetune-vqa"
    task = "vqa"
    form = ANSWERS
    version = 4  # questions are cleaned by the family's rule of questions
    options: FinetuneVqaOptions

    def __init__(self, options: FinetuneVqaOptions, workspace: Workspace, output: Part | None = None) -> None:
        super().__init__(options, workspace, output)
        if options.softmax:
            raise UserError("--softmax is of answers chosen from a list: give --closed")
        self.weights()

    def weights(self) -> Mapping[str, float]:
        found = {}
        for item in self.options.answer_weight:
            name, equals, weight = item.partition("=")
            try:
                found[name] = float(weight)
            except ValueError:
                equals = ""
            if not equals or name not in self.parts or not 0 < found[name] < float("inf"):
                raise UserError(
                    f"--answer-weight {item}: write PART=WEIGHT, one of --examples and a number above 0"
                )
        return found

    def initial(self, data: TaskCorpus) -> tuple[Model, Tokenizer]:
        model, tokenizer = super().initial(data)
        cleaning = tokenizer.cleaning
        # One that goes on from answering questions has read them so, or never has.
        if checkpoint.read_config(self.init)["model_type"] != kinds.of(model).name:
            cleaning = OF_QUESTIONS.get(cleaning, cleaning)
        return model, tokenizer.cleaned_as(cleaning)

    def prepare(self, data: TaskCorpus, model: Any, where: torch.device) -> None:
        # BLIP ranks the answers that are frequent in training (released code: answer_list.json).
        answers = closed_list(data.annotated, self.options.min_answers)
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "answers.json").write_text(json.dumps(answers, indent=0) + "\n", encoding="utf-8")

    def module(self, model: Answers, tokenizer: Tokenizer, ranks: Ranks) -> torch.nn.Module:
        return VqaTraining(
            model, AnsweringConfig(self.options.label_smoothing), self.options.momentum or None
        )


class FinetuneNlvr(TaskTraining):
    """Statements about two pictures, or about one that is shown twice (BLIP, section 5.4)."""

    name = "finetune-nlvr"
    task = "nlvr"
    form = PAIRS
    options: FinetuneNlvrOptions

    def __init__(
        self, options: FinetuneNlvrOptions, workspace: Workspace, output: Part | None = None
    ) -> None:
        super().__init__(options, workspace, output)

    def feed(self) -> dict[str, Any]:
        return {"swap": self.options.swap}

    def continues(self, model: Any, data: TaskCorpus) -> bool:
        # An ALBEF that has learned text assignment alone has other classes, a ViLT for one picture another head.
        return bool((model.pictures, model.labels) == (2, LABELS[self.task]))

    def module(self, model: Judges, tokenizer: Tokenizer, ranks: Ranks) -> torch.nn.Module:
        return ClassifierTraining(model, self.options.momentum or None)
