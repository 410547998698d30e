"""The record of a model family: all that the rest of capfilt needs to know of it, on the standard library alone.

A family is a folder, here or in anybody's package: a light `__init__.py` with its record, `model.py` (config, network,
training objective, presets), `tasks.py` (heads for tasks), `layouts.py` (other projects' checkpoints, as tables).
Not here: which families there are (`capfilt.models`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

PAIR_ROWS, EXAMPLE_ROWS = "pairs", "examples"
"""The rows that a model learns from: pictures with their texts, or a task's examples (questions with answers, texts or
pictures with classes)."""

ANSWERS, CLASSES, PAIRS = "answers", "classes", "pairs"
"""The forms of a task: answers in words, classes of a text with one picture, statements about two pictures."""

TOKENIZERS = {"wordpiece": "capfilt.data.tokenizer:Tokenizer", "byte-pair": "capfilt.data.bpe:BpeTokenizer"}
"""Tokenizers by name, and where their classes are."""


Start = Callable[..., Any]
"""(pretrained model, seed=, drop_path=) -> the task's model; of CLASSES with task= and classes= as well."""


def found(path: str) -> Any:
    """The object at "module:name", imported now."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Kind:
    """A class of models of a family: the pretrained model, or a model finetuned for a task.

    Attributes:
        name: `model_type` in a checkpoint's config.json.
        config_path, model_path: the classes, each as "module:Class".
        who: its name in messages.
        does: its use, as a verb after its name.
        rows: the rows it learns from, PAIR_ROWS or EXAMPLE_ROWS.
        tokenizer_name: one of TOKENIZERS.
        cleaning: how the released code cleans its texts, one of `capfilt.data.cleaning.CLEANINGS`.
        starts: by a task's form, the function that makes the task's model of this model, as "module:function": (model, seed=,
            drop_path=) -> model; for CLASSES with task= and classes= as well.
        forms: the forms of tasks whose finetuned model this is, and whose finetuning can continue from it.
    """

    name: str
    config_path: str
    model_path: str
    who: str
    does: str
    rows: str
    cleaning: str
    tokenizer_name: str = "wordpiece"
    starts: Mapping[str, str] = field(default_factory=dict)
    forms: tuple[str, ...] = ()

    @property
    def config(self) -> Any:
        """The class of its configuration."""
        return found(self.config_path)

    @property
    def model(self) -> Any:
        """The class of the model."""
        return found(self.model_path)

    @property
    def tokenizer(self) -> Any:
        """The class of its tokenizer."""
        return found(TOKENIZERS[self.tokenizer_name])

    @property
    def one(self) -> str:
        """Its name with an article, for messages."""
        return f"{'an' if self.who[0] in 'AEIOU' else 'a'} {self.who}"

    @property
    def what(self) -> str:
        """Its use and its class, for messages."""
        return f"{self.does} ({self.model_path.partition(':')[2]})"


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: the word that calls it.
        title: its name in prose.
        code: the module with its `PRESETS`, its training objective and its network.
        kinds: its classes of models, the pretrained one first.
    """

    name: str
    title: str
    code: str
    kinds: tuple[Kind, ...]
