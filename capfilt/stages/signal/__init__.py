"""A signal: its options, its columns and how it measures rows, in one class; `stage.py` has the stage that runs any of them.

Light: a signal's own file imports what measuring needs when it measures, so that `--help` loads nothing heavy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from capfilt.errors import UserError
from capfilt.options import REQUIRED, Checked, option
from capfilt.stages.command import StageCommand


@dataclass(frozen=True)
class Signal(Checked, ABC):
    """A cheap test of every picture of an images part.

    A subclass is a frozen dataclass of its own options. Its docstring is its help.

    Attributes:
        name: of the command, and of the part where nobody names it.
        columns: the Arrow type ("bool", "int64", "float", "string", ...) and the meaning of each column.
        reads: the columns of the images table that `measure` wants of a picture, such as "image", "width" or "url".
        version: raised when the code changes what it measures; part of the fingerprint.
    """

    name: ClassVar[str]
    columns: ClassVar[Mapping[str, tuple[str, str]]]
    reads: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[int] = 1

    images: str = option(REQUIRED, "images part", kind="images")
    out: str = option("", "name of the signals part to write; default: the signal's")

    @abstractmethod
    def measure(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any] | None]:
        """The values of each row by column, in order; None for a row that has none.

        `rows` are pictures that came, some at a time: image_id and what `reads` says.
        """

    @classmethod
    def command(cls, *examples: str) -> StageCommand:
        """The record to register. Raises UserError naming the attribute that is missing."""
        missing = [name for name in ("name", "columns") if not hasattr(cls, name)]
        missing += sorted(cls.__abstractmethods__)
        if missing:
            raise UserError(f"signal {cls.__name__}: has no {', '.join(missing)}")
        return StageCommand((cls.name,), cls, ("capfilt.stages.signal.stage:SignalStage",), examples)


@dataclass(frozen=True)
class TextSignal(Signal):
    """A cheap test of every text: those found with the pictures of an images part, and those of captions parts.

    `rows` of `measure` have text_id, image_id, source and text, which is never null.
    """

    captions: tuple[str, ...] = option(
        (), "captions parts of the same images, to measure too; repeatable", kind="captions"
    )
