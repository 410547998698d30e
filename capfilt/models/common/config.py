"""The configurations of all models: their way through JSON, and the two sides that most of them have."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from capfilt.errors import UserError
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig


class Shape:
    """Base of a frozen dataclass whose fields `vision` and `text` are dataclasses too, and which needs no argument.

    A model without one of the sides has no such field; its size is then 0. Whoever trains a model writes into its config how
    long the texts were; whoever evaluates it reads texts so.
    """

    vision: Any
    text: Any
    max_text_tokens: int  # longest text in tokens, [CLS] and [SEP] included, as the model was trained with
    max_words: int  # and before that in words; 0: all of them

    @classmethod
    def sides(cls) -> tuple[str, ...]:
        """Which of `vision` and `text` it has."""
        fields = {each.name for each in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return tuple(side for side in ("vision", "text") if side in fields)

    @property
    def image_size(self) -> int:
        return int(self.vision.image_size) if "vision" in self.sides() else 0

    @property
    def vocab_size(self) -> int:
        return int(self.text.vocab_size) if "text" in self.sides() else 0

    @property
    def reading(self) -> dict[str, Any]:
        """How a tokenizer is to encode texts for this model: `max_length` in tokens, and `max_words`, None for all."""
        if "text" not in self.sides():
            return {}
        longest = min(self.max_text_tokens, self.text.max_positions)
        return {"max_length": longest, "max_words": self.max_words or None}

    def for_vocabulary(self, size: int) -> Self:
        """The same, for a tokenizer of `size` tokens."""
        return self._with(text={"vocab_size": size})

    def read_as(self, max_text_tokens: int, max_words: int) -> Self:
        """The same for texts cut to so many tokens, and words (0: its own); itself without a text side."""
        if "text" not in self.sides():
            return self
        longest = min(max_text_tokens, self.text.max_positions)
        words = max_words or self.max_words
        return dataclasses.replace(self, max_text_tokens=longest, max_words=words)  # type: ignore[type-var]

    def sized(self, image_size: int, patch_size: int, pad_id: int) -> Self:
        """The same for pictures of this side, patches of this side (0: its own), and a tokenizer's padding."""
        patch = {"patch_size": patch_size} if patch_size else {}
        return self._with(vision={"image_size": image_size, **patch}, text={"pad_id": pad_id})

    def _with(self, **changes: dict[str, Any]) -> Self:
        """The same with fields of its sides changed; changes of a side that it has not are dropped."""
        new = {
            side: dataclasses.replace(getattr(self, side), **changes[side])
            for side in self.sides()
            if side in changes
        }
        return dataclasses.replace(self, **new)  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict of the fields, nested as the dataclasses are."""
        found: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Missing fields take their defaults; UserError names unknown ones."""
        rest, base = dict(values), cls()
        sides = {
            name: type(side)(**checked_fields(side, rest.pop(name, {}), f"{name}."))
            for name in cls.sides()
            for side in (getattr(base, name),)
        }
        return cls(**sides, **checked_fields(base, rest, ""))


class Classified(Shape):
    """A Shape of something that tells `classes` apart: what its outputs stand for, in order."""

    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise UserError(f"a classifier needs two classes or more, each once, and has {len(self.classes)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """As `Shape.from_dict`; the classes may come as JSON has them, in a list."""
        classes = values.get("classes")
        if isinstance(classes, list) and all(isinstance(each, str) for each in classes):
            values = {**values, "classes": tuple(classes)}
        return super().from_dict(values)


_FROM_ZERO = ("pad_id", "max_words", "cells")


_MOST, _DEEPEST = 2**24, 1000
"""Of every whole number, and of `depth`: before a model is made whose layers alone take hours, its tensors unread."""


def checked_fields(defaults: Any, values: Any, prefix: str) -> dict[str, Any]:
    """`values` as keyword arguments for the dataclass that `defaults` is one of; UserError names what does not fit."""
    known = {each.name: type(getattr(defaults, each.name)) for each in dataclasses.fields(defaults)}
    if not isinstance(values, Mapping):
        raise UserError(f"model config: {prefix.rstrip('.')} is {_short(values)}, not a table of fields")
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"model config: unknown fields {', '.join(prefix + name for name in unknown)}")
    for name, value in values.items():
        # A whole number is a fine float; a boolean is no number.
        right = type(value) is known[name] or (known[name] is float and type(value) is int)
        # JSON as Python reads it has NaN and Infinity.
        right = right and (type(value) is not float or math.isfinite(value))
        least, most = 0 if name in _FROM_ZERO else 1, _DEEPEST if name == "depth" else _MOST
        if not right or (type(value) is int and not least <= value <= most):
            raise UserError(
                f"model config: {prefix}{name} is {_short(value)}, not a usable {known[name].__name__}"
            )
    return dict(values)


def _short(value: Any) -> str:
    """A value for a message: of a number that does not fit in 64 bits only that."""
    if type(value) is int and abs(value) >= 2**63:
        return "a number of more than 64 bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class ModelConfig(Shape):
    """What the configurations of models with a vision and a text side share."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
