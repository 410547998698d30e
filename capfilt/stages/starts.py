"""Where the model of a training comes from: a family's preset, a checkpoint as it is, or a task's model made of one.

Not here: the rows that it learns from (`sources.py`), the training (`training.py`).
"""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from capfilt.data.cleaning import OF_QUESTIONS, trained
from capfilt.data.rows import EXAMPLE_ROWS, PAIR_ROWS
from capfilt.errors import UserError
from capfilt.models import Model, build, checkpoint, kind_named, kind_of, kinds
from capfilt.models.family import ANSWERS, CLASSES, PAIRS, Family, Kind, found
from capfilt.tables.contracts import LABELS
from capfilt.tables.ids import file_sha256
from capfilt.tables.workspace import Workspace


class Start(ABC):
    """A model to train.

    Attributes:
        kind: its class of models; of a task, that of the checkpoint.
        image_size: side of the pictures that it sees, in pixels.
    """

    kind: Kind
    image_size: int

    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """All that decides the model, beside the options. JSON-able."""

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        """As `ShardStage.origins`."""
        return {}

    def becomes(self) -> Kind:
        """The class of the model that is trained."""
        return self.kind

    @abstractmethod
    def planned(self) -> Any:
        """The model's config, as far as it is known before any rows are read; no weights are loaded."""

    @abstractmethod
    def initial(self, data: Any) -> tuple[Model, Any]:
        """(the model, its tokenizer); `data` are the rows to train on."""


class Preset(Start):
    """A new model of a family: its preset, for a tokenizer that is given or learned, with towers that are given or fresh."""

    def __init__(self, family: Family, options: Any) -> None:
        self.family, self.kind, self.options = family, family.kinds[0], options
        if options.vocab != "corpus" and not self.kind.tokenizer_name:
            raise UserError(f"--vocab {options.vocab}: {self.kind.one} reads no texts; leave it out")
        _check_paths(options, *_STARTS)
        config = self._config(1000)
        self.kind = kind_of(config)
        vocabulary_of = self._hook("vocabulary")
        if vocabulary_of and (own := vocabulary_of(config, options)):
            for name in ("vocab", "vocab_size"):
                given = getattr(options, name)
                if given != type(options).__dataclass_fields__[name].default:
                    raise UserError(
                        f"--{name.replace('_', '-')} {given}: the preset {options.preset} reads with its encoder's own; "
                        "leave it out"
                    )
            self.options = dataclasses.replace(options, vocab=own)
        _check_paths(self.options, "vocab")
        self.image_size = int(options.image_size or config.image_size)

    def identity(self) -> Mapping[str, Any]:
        digests = vocabulary_identity(self.options)
        for name in _STARTS:
            if directory := getattr(self.options, name, ""):
                digests[name] = (
                    checkpoint.fingerprint(directory)
                    if name == "encoders"
                    else file_sha256(Path(directory) / "model.safetensors")
                )
        return digests

    def planned(self) -> Any:
        # A vocabulary that is learned later is none that was published, whatever its size.
        learned = self.options.vocab == "corpus"
        return self._sized(
            SimpleNamespace(vocab_size=1000, pad_id=0)
            if learned
            else vocabulary(self.kind, self.options, None)
        )

    def initial(self, data: Any) -> tuple[Model, Any]:
        tokenizer = vocabulary(self.kind, self.options, data)
        model = build(self._sized(tokenizer), seed=self.options.seed)
        for name, start in _STARTS.items():
            if directory := getattr(self.options, name, ""):
                tokenizer = self._hook(start)(model, directory) or tokenizer
        return model, tokenizer

    def _hook(self, name: str) -> Any:
        return getattr(importlib.import_module(self.family.code), name, None)

    def _config(self, vocab_size: int) -> Any:
        config = self.family.preset(self.options.preset, vocab_size)
        configured = self._hook("configured")
        return configured(config, self.options) if configured else config

    def _sized(self, tokenizer: Any) -> Any:
        """The preset for this tokenizer, with pictures and patches of the sizes that were asked for."""
        config = self._config(tokenizer.vocab_size)
        return config.sized(self.image_size, getattr(self.options, "patch_size", 0), tokenizer.pad_id)


_STARTS = {"vision_init": "start_vision", "text_init": "start_text", "encoders": "start_encoders"}
"""Options that name published weights, and the function of a family's code that takes them; it may return their tokenizer."""


def _check_paths(options: Any, *names: str) -> None:
    for name in names:
        path = getattr(options, name, "")
        if path and path != "corpus" and not Path(path).exists():
            raise UserError(f"--{name.replace('_', '-')} {path}: no such file or directory")


def vocabulary(kind: Kind, options: Any, data: Any) -> Any:
    """A new tokenizer for models of a kind: as `--vocab` says, from a file, or learned on the texts of `data`."""
    cleaning = trained(kind.cleaning)
    if options.vocab == "corpus":
        return kind.tokenizer.train(data.texts(), options.vocab_size, cleaning=cleaning)
    return kind.tokenizer.open(options.vocab).cleaned_as(cleaning)


def vocabulary_identity(options: Any) -> dict[str, str]:
    """What decides such a tokenizer, beside the options and the texts."""
    vocab = Path(options.vocab)
    file = vocab / "tokenizer.json" if vocab.is_dir() else vocab
    return {"vocab": "corpus" if options.vocab == "corpus" else file_sha256(file)}


class Checkpoint(Start):
    """A checkpoint as it is.

    Args:
        options: the stage's, of which `init` names the checkpoint.
        able: whether a kind of model can be trained so. UserError names the kinds that can, where this one cannot.
        stage, rows: the stage that trains, and the rows that it reads, for that message.
    """

    def __init__(
        self,
        workspace: Workspace,
        options: Any,
        able: Callable[[Kind], bool],
        stage: str,
        rows: tuple[str, ...] = (PAIR_ROWS,),
    ) -> None:
        self.options, self.name = options, options.init
        self.path = workspace.model(self.name)
        made = checkpoint.read_config(self.path)
        self.kind = kind_named(str(made["model_type"]))
        if not able(self.kind):
            other = (
                f", which learns from {' and '.join(self.kind.rows)}, and {stage} reads {' and '.join(rows)}"
            )
            why = other if self.kind.rows != rows else ""
            known = " or ".join(each.one for each in kinds() if able(each))
            raise UserError(f"--init {self.path}: is {self.kind.one}{why}; start from {known}")
        self.image_size = options.image_size or int(checkpoint.shape_of(self.path).image_size)

    def identity(self) -> Mapping[str, Any]:
        return {"init": checkpoint.fingerprint(self.path)}

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        return checkpoint.origin(self.path, self.name)

    def planned(self) -> Any:
        return checkpoint.shape_of(self.path)

    def initial(self, data: Any) -> tuple[Model, Any]:
        contents, _ = checkpoint.open_any(self.path, self.image_size)
        return contents.model, contents.tokenizer


class Foreign(Checkpoint):
    """A model of one family, made of a checkpoint of another by the function that the record has for it."""

    def __init__(self, family: Family, workspace: Workspace, options: Any, stage: str) -> None:
        self.family, self.own = family, family.kinds[0]
        own = [kind.name for kind in family.kinds if kind.rows == self.own.rows]
        able = (*own, *family.starts)
        super().__init__(workspace, options, lambda kind: kind.name in able, stage, self.own.rows)
        self.mapped = self.kind.name not in own
        if not self.mapped:
            self.own = self.kind
        self.new_vocabulary = self.mapped and self.own.tokenizer_name != self.kind.tokenizer_name

    def becomes(self) -> Kind:
        return self.own

    def identity(self) -> Mapping[str, Any]:
        return {
            **super().identity(),
            **(vocabulary_identity(self.options) if self.new_vocabulary else {}),
        }

    def planned(self) -> Any:
        # Their config says nothing of the model to come.
        return None if self.mapped else super().planned()

    def initial(self, data: Any) -> tuple[Model, Any]:
        model, tokenizer = super().initial(data)
        if self.new_vocabulary:
            tokenizer = vocabulary(self.own, self.options, data)
        if self.mapped:
            model = found(self.family.starts[self.kind.name])(model, self.options, tokenizer)
        return model, tokenizer


class ForTask(Checkpoint):
    """The model of a task: made of a pretrained model, or one of the task's own that is trained on.

    Args:
        form: the task's form (`capfilt.models.family`).
        task: one of `capfilt.tables.contracts.TASKS`.
    """

    def __init__(self, workspace: Workspace, options: Any, form: str, task: str, stage: str) -> None:
        self.form, self.task = form, task
        super().__init__(
            workspace, options, lambda kind: form in (*kind.starts, *kind.forms), stage, (EXAMPLE_ROWS,)
        )

    def becomes(self) -> Kind:
        return kind_of(self.planned())

    def planned(self) -> Any:
        shape = checkpoint.shape_of(self.path)
        if self.form in self.kind.forms:
            return shape
        with torch.device("meta"):
            return self._made(build(shape), LABELS[self.task] or ("a", "b"), seed=0, drop_path=0.0).config

    def initial(self, data: Any) -> tuple[Model, Any]:
        contents, _ = checkpoint.open_any(self.path)
        model, tokenizer = contents.model, contents.tokenizer
        if self.image_size != model.config.image_size:
            resize = getattr(model, "resize_image", None)
            if resize is None:
                raise UserError(
                    f"--image-size {self.image_size}: {self.path} was trained with {model.config.image_size} and keeps it"
                )
            resize(self.image_size)
        classes = LABELS[self.task] or data.classes
        if not self._continues(model, classes):
            model = self._made(model, classes, seed=self.options.seed, drop_path=self.options.drop_path)
        if self.form == ANSWERS and kind_of(model).name != self.kind.name:
            # A model that goes on answering questions has read them so, or never has.
            tokenizer = tokenizer.cleaned_as(OF_QUESTIONS.get(tokenizer.cleaning, tokenizer.cleaning))
        return model, tokenizer

    def _made(self, model: Model, classes: tuple[str, ...], **options: Any) -> Model:
        told = {"task": self.task, "classes": classes} if self.form == CLASSES else {}
        return found(self.kind.starts[self.form])(model, **told, **options)

    def _continues(self, model: Model, classes: tuple[str, ...]) -> bool:
        """Whether the model is the task's own and can be trained on as it is: of other classes, its head is new."""
        if self.form not in self.kind.forms:
            return False
        if self.form == ANSWERS:
            return True
        same = (model.pictures, model.labels) == (2 if self.form == PAIRS else 1, classes)
        return bool(same and (self.form == PAIRS or model.config.task == self.task))


def frozen(model: Model, kind: Kind, parts: tuple[str, ...]) -> None:
    """Freeze these parts of a model; see `Kind.parts`."""
    for part in parts:
        for name in kind.parts[part]:
            module = getattr(model, name, None)
            if module is not None:
                module.requires_grad_(False)
