"""What every list of URLs is, whatever its format: columns, slices, what a slice holds.

Text formats are `text_lists.py`'s; Parquet, folders and which format a file is are `lists.py`'s.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from capfilt.errors import UserError
from capfilt.formats.places import Place
from capfilt.formats.values import storable
from capfilt.stages.download.presets import Layout, fitting


@dataclass(frozen=True)
class Slice:
    """Consecutive rows of a list.

    Attributes:
        urls: as the list has them; None where it has none.
        captions: the texts of each row, untouched; a null is no text, an empty string is one.
        faults: why a row cannot be read, in words; None where it can.
        extra: the further columns asked for.
    """

    urls: list[str | None]
    captions: list[list[str]]
    faults: list[str | None]
    extra: pa.Table


class EmptyList(UserError):
    """A text file without anything in it."""


class UrlList(ABC):
    """A list of URLs cut into slices of `slice_rows` rows. Picklable; what it reads is remembered in each process.

    `extra` are the further columns that its slices have: those asked for, then those of the layout that are there.
    """

    def __init__(self, path: Place, layout: Layout, extra: Sequence[str], slice_rows: int) -> None:
        self.path = path
        self.layout = layout
        self.url_col = layout.url_col
        self.caption_col = layout.caption_col
        self.extra = tuple(extra)
        self.slice_rows = slice_rows
        self.check()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, hex."""
        return self.path.sha256()

    @property
    def slices(self) -> int:
        """How many slices there are."""
        return math.ceil(self.rows / self.slice_rows)

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many rows the list has."""

    @abstractmethod
    def read(self, number: int) -> Slice:
        """Slice `number`, from 0; the last one may be shorter."""

    @abstractmethod
    def check(self) -> None:
        """Raise UserError when the file is not of this format or a column asked for is not in it, EmptyList when it has
        nothing.
        """

    @abstractmethod
    def extra_types(self) -> Mapping[str, pa.DataType]:
        """The types of the further columns, of all slices alike."""

    def bounds(self, number: int) -> tuple[int, int]:
        """First row of slice `number`, and the row after its last."""
        start = number * self.slice_rows
        return start, min(self.rows, start + self.slice_rows)

    def check_columns(self, names: Sequence[str]) -> None:
        wanted: dict[str, tuple[str, ...]] = {
            "--url-col": (self.url_col,),
            "--caption-col": (self.caption_col,) if self.caption_col else (),
            "--save-additional-columns": self.extra,
        }
        for option, columns in wanted.items():
            for column in columns:
                if column not in names:
                    hint = ", or --caption-col '' for none" if option == "--caption-col" else ""
                    if preset := fitting(list(names)):
                        hint += f", or give --preset {preset}"
                    known = ", ".join(names) if names else "none"
                    raise UserError(
                        f"{self.path}: has no column {column!r}; its columns are {known}: name one with {option}{hint}"
                    )
        further = (*self.layout.carried, *self.layout.license_cols)
        self.extra = tuple(dict.fromkeys((*self.extra, *(name for name in further if name in names))))


def url_of(value: Any) -> str | None:
    """A URL as it is stored, whatever the list has in its place; None for none."""
    return storable(value) if isinstance(value, str) else None if value is None else str(value)
