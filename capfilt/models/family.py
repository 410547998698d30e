"""The record of a model family: all that the rest of capfilt needs to know of it, on the standard library alone.

A family is a folder, here or in anybody's package: a light `__init__.py` with its record, `model.py` (config, network,
training objective, presets), `tasks.py` (heads for tasks), `layouts.py` (other projects' checkpoints, as tables).
Not here: which families there are (`capfilt.models`).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from capfilt.data.rows import IMAGE_ROWS, ROWS
from capfilt.errors import UserError

RETRIEVAL, CAPTIONING = "retrieval", "captioning"
"""The finetunings of a pretrained model on pairs."""

ANSWERS, CLASSES, PAIRS = "answers", "classes", "pairs"
"""The forms of a task: answers in words, classes of a text with one picture, statements about two pictures."""

TOKENIZERS = {
    "wordpiece": "capfilt.data.tokenizer:Tokenizer",
    "byte-pair": "capfilt.data.bpe:BpeTokenizer",
    "unigram": "capfilt.data.unigram:UnigramTokenizer",
    "": "capfilt.data.tokenizer:NoTexts",
}
"""Tokenizers by name, and where their classes are; "": of a model without a text side."""


CONFIG = ("from_dict", "to_dict", "for_vocabulary", "sized", "image_size", "vocab_size", "reading")
"""The attributes of a family's configurations: `models.common.config.Shape` has them."""

ABILITIES: Mapping[str, tuple[str, ...]] = {
    "features": ("encode_image",),
    "embed": ("encode_image", "embed_image", "embed_text"),
    "match": ("encode_image",),
    "write": ("encode_image", "prefill_cross", "new_cache", "decode"),
    "answer": ("encode_image", "encode_question", "answer_logits", "prefill_cross", "writer"),
    "judge": ("judge", "labels", "pictures"),
}
"""The abilities of models, and the methods that each asks for: a model's `abilities` names some.

features: `encode_image(images)`, tokens [B, N, D] or features [B, E] of pixels uint8 [B, 3, S, S].
embed: `embed_image(encoded)` and `embed_text(ids, mask)`, fp32 unit vectors [B, E].
match: `match_logits(ids, mask, cross)` with `prefill_cross(encoded)`, keys and values of images; or, without them,
`match_pairs(encoded, ids, mask)`; fp32 logits [B, 2], index 1 = match.
write: the decoder as `capfilt.Captioner` uses it. answer: as `models.common.answering.Answering`.
judge: as `models.common.task_objectives.Judging`.
A model may have `taken(ids, mask)`, the tokenizer's output as it reads it."""

PARTS: Mapping[str, tuple[str, ...]] = {
    "vision": ("visual_encoder",),
    "text": ("text_encoder", "text_decoder"),
}
"""The parts of a model with two towers, by name."""

HEEDS = ("weights", "negatives", "soft")
"""The marks of a row that a family's losses may go by: `Batch.weight`, `dropped` and `soft`."""


def check_abilities(model: Any, abilities: Iterable[str]) -> None:
    """UserError naming an ability that does not exist, or a method of one that the model (or its class) lacks."""
    who = model.__name__ if isinstance(model, type) else type(model).__name__
    for ability in abilities:
        if ability not in ABILITIES:
            raise UserError(f"{who} has the ability {ability!r}: choose {', '.join(ABILITIES)}")
        names = ABILITIES[ability]
        if ability == "match" and not hasattr(model, "match_pairs"):
            names += ("prefill_cross", "match_logits")
        for name in names:
            if not hasattr(model, name):
                raise UserError(f"{who} has the ability {ability!r} and no {name}")


def found(path: str) -> Any:
    """The object at "module:name", imported now. UserError naming the module and its package where it is not there."""
    module, _, name = path.partition(":")
    package = module.partition(".")[0]
    try:
        code = importlib.import_module(module)
    except UserError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{module} cannot be imported ({why}); install the package {package}, or another version of it"
        ) from error
    if not hasattr(code, name):
        raise UserError(f"{module} has no {name}; install another version of the package {package}")
    return getattr(code, name)


@dataclass(frozen=True)
class Kind:
    """A class of models of a family: the pretrained model, or a model finetuned for a task.

    Attributes:
        name: `model_type` in a checkpoint's config.json.
        config_path, model_path: the classes, each as "module:Class".
        who: its name in messages.
        does: its use, as a verb after its name.
        rows: the kinds of rows it learns from, of `capfilt.data.rows`. Of several, each step has a batch of each, and epochs
            are those of the first.
        tokenizer_name: one of TOKENIZERS; "": the model has no text side, and its checkpoints no tokenizer.json.
        cleaning: how the released code cleans its texts, one of `capfilt.data.cleaning.CLEANINGS`.
        starts: by a task's form, the function that makes the task's model of this model, as "module:function": (model, seed=,
            drop_path=) -> model; for CLASSES with task= and classes= as well.
        learns: by RETRIEVAL and CAPTIONING, the function that puts the model under the losses of that finetuning, as
            "module:function": (model, tokenizer, options, ranks) -> a module, as the family's `objective`.
        parts: by the name of a part that can be frozen, the attributes of the model that hold it.
        forms: the forms of tasks whose finetuned model this is, and whose finetuning can continue from it.
    """

    name: str
    config_path: str
    model_path: str
    who: str
    does: str
    rows: tuple[str, ...]
    cleaning: str
    tokenizer_name: str = "wordpiece"
    starts: Mapping[str, str] = field(default_factory=dict)
    learns: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: PARTS)
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
        name: the word that calls it: `capfilt retrain NAME`.
        code: the module with its `PRESETS` (name to config) and its `objective`: (model, tokenizer, options, ranks) -> a torch
            module with `losses(batch, alpha, hardness)`, a dict of fp32 scalars with "loss", and `blocks()`. Where the kind
            learns from several kinds of rows, `batch[rows]` is the batch of one of them. It may have
            `configured(config, options)`, the config that options ask for, `vocabulary(config)`, the file of the
            vocabulary that a preset's encoder brings ("" for none), and `start_vision` and `start_text`, (model,
            directory), which fill a tower with published weights.
        kinds: its classes of models, the pretrained one first.
        options: the dataclass of the options that this family alone has in training, with its own published defaults.
        presets: the names of its PRESETS, for help and completion; the first one is the default where there is no "small".
        shown: figures of its losses that progress and summaries show.
        version: of its training: raised whenever the same options and rows give other weights.
        layouts: its tables of other projects' checkpoint layouts, as "module:LAYOUTS"; "" for none.
        starts: by the `model_type` of another family, the function that starts a model of this one from it, as
            "module:function": (their model, options, tokenizer) -> model. The tokenizer is theirs where both kinds have one
            `tokenizer_name`, else a new one as `--vocab` says.
        heeds: the marks of a row that its losses go by, of HEEDS.
    """

    name: str
    code: str
    kinds: tuple[Kind, ...]
    options: type
    presets: tuple[str, ...]
    shown: tuple[str, ...]
    version: int = 1
    starts: Mapping[str, str] = field(default_factory=dict)
    layouts: str = ""
    heeds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise UserError(f"model family {self.name!r}: its name is no word")
        if not self.kinds:
            raise UserError(f"model family {self.name}: it has no kinds")
        if not dataclasses.is_dataclass(self.options):
            raise UserError(f"model family {self.name}: its options are no dataclass")
        if {*self.heeds} - {*HEEDS}:
            raise UserError(f"model family {self.name}: heeds {self.heeds}; choose {', '.join(HEEDS)}")

    def part(self, name: str) -> Any:
        """An attribute of the family's code. UserError naming it where it is missing, or the module where there is none."""
        return self._found(f"{self.code}:{name}")

    def check(self) -> None:
        """UserError naming the first part of the protocol that is missing: see the attributes above and `ABILITIES`."""
        self.part("objective")
        if {*self.part("PRESETS")} != {*self.presets}:
            raise UserError(f"model family {self.name}: its PRESETS are not {', '.join(self.presets)}")
        for kind in self.kinds:
            if not kind.rows or {*kind.rows} - {*ROWS}:
                raise UserError(
                    f"model family {self.name}: {kind.who} learns from {', '.join(kind.rows) or 'no rows'}; choose "
                    f"{', '.join(ROWS)}"
                )
            if kind.rows == (IMAGE_ROWS,) and kind.tokenizer_name:
                raise UserError(
                    f"model family {self.name}: {kind.who} learns from {IMAGE_ROWS} alone, which have no "
                    f"texts for its tokenizer {kind.tokenizer_name!r}; give it none"
                )
            config, model = self._found(kind.config_path), self._found(kind.model_path)
            self._check(config, CONFIG)
            self._check(model, ("abilities",))
            # A property says it of a model alone: `capfilt.inference.adapted` checks that one.
            if isinstance(model.abilities, tuple):
                try:
                    check_abilities(model, model.abilities)
                except UserError as error:
                    raise UserError(f"model family {self.name}: {error}") from error
            for path in (*kind.starts.values(), *kind.learns.values()):
                self._found(path)
        for path in (*self.starts.values(), *([self.layouts] if self.layouts else [])):
            self._found(path)

    def _check(self, owner: Any, names: tuple[str, ...]) -> None:
        for name in names:
            if not hasattr(owner, name):
                raise UserError(f"model family {self.name}: {owner.__name__} has no {name}")

    def _found(self, path: str) -> Any:
        try:
            return found(path)
        except UserError as error:
            raise UserError(f"model family {self.name}: {error}") from error

    def preset(self, name: str, vocab_size: int) -> Any:
        """The config of a preset for a tokenizer of `vocab_size`; UserError for an unknown name."""
        presets = self.part("PRESETS")
        if name not in presets:
            raise UserError(f"--preset {name!r} of {self.name}: choose {', '.join(presets)}")
        return presets[name].for_vocabulary(vocab_size)
