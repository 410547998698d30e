"""Values of other tools' records as values that a table can hold: texts, numbers, splits, columns of one type."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, TypeVar

import pyarrow as pa

from capfilt.errors import UserError

CAPTION_COLUMNS = ("caption", "captions", "text", "texts")
"""Where texts are looked for when nothing is said: the first of these that is there, in capitals or not."""

# Names that other tools give the three splits; Karpathy's `restval` is trained on by convention.
_SPLITS = {
    "train": "train", "training": "train", "restval": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Keyed:
    """A row with a key."""

    key: str


Row = TypeVar("Row", bound=Keyed)

# The Arrow type of a column of JSON values, by the Python types found in it; whatever else becomes its JSON text.
_JSON_TYPES = {
    frozenset[type](): pa.string(),
    frozenset({str}): pa.string(),
    frozenset({bool}): pa.bool_(),
    frozenset({int}): pa.int64(),
    frozenset({float}): pa.float64(),
    frozenset({int, float}): pa.float64(),
}


class ColumnTypes:
    """The Arrow types of columns of JSON values, so that every shard of a part has the same."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._found: dict[str, set[type]] = {name: set() for name in columns}

    def notice(self, record: Mapping[str, Any]) -> None:
        """Count one record in."""
        for name, types in self._found.items():
            value = record.get(name)
            if value is not None:
                fits = type(value) is not int or -(2**63) <= value < 2**63
                types.add(type(value) if fits else object)

    def types(self) -> dict[str, pa.DataType]:
        """A type for each column: text where the values have no one type."""
        return {name: _JSON_TYPES.get(frozenset(types), pa.string()) for name, types in self._found.items()}


def arrow_column(values: Iterable[Any], type_: pa.DataType) -> pa.Array:
    """JSON values as an Arrow array: in a column of text, whatever is no text becomes its JSON."""
    if type_ != pa.string():
        return pa.array(list(values), type_)
    return pa.array([None if value is None else text_of(value) for value in values], type_)


def texts_in(value: Any) -> list[str]:
    """The texts in a field: a null or NaN is none, a list is each of its own; an empty string is a text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, list):
        return [text for each in value for text in texts_in(each)]
    return [text_of(value)]


def captions_in(record: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    """The texts of a record; where there are several columns of texts, an empty field is no text."""
    found = (text for column in columns for text in texts_in(record.get(column)))
    return tuple(text for text in found if text or len(columns) == 1)


def caption_columns(names: Sequence[str], asked: Sequence[str], source: object = None) -> tuple[str, ...]:
    """The columns of texts among `names`: those asked for, none where that is "", else the first of CAPTION_COLUMNS.

    Raises UserError where `source`, a table, has none.
    """
    if tuple(asked) == ("",):
        return ()
    if source is not None:
        require(names, asked, source, "--caption-col")
    spelled = {name.strip().lower(): name for name in reversed(names)}
    found = tuple(asked) or tuple(spelled[name] for name in CAPTION_COLUMNS if name in spelled)[:1]
    if source is not None and not found:
        raise UserError(
            f"{source}: has no column of texts ({', '.join(CAPTION_COLUMNS)}); its columns are {', '.join(names)}: name "
            "one with --caption-col, or give --caption-col '' for pictures without texts"
        )
    return found


def require(names: Sequence[str], columns: Sequence[str], source: object, option: str) -> None:
    """Raise UserError for the first of `columns` that is not among the `names` of a table."""
    for column in columns:
        if column not in names:
            raise UserError(
                f"{source}: has no column {column!r}; its columns are {', '.join(names)}: see {option}"
            )


def check_further(columns: Sequence[str], own: Sequence[str]) -> None:
    """Raise UserError for the first further column that a table has of its `own`, or that is named twice."""
    for column in columns:
        if column in own:
            raise UserError(
                f"--save-additional-columns {column}: the images table has a column {column!r} of its own; rename it first"
            )
        if columns.count(column) > 1:
            raise UserError(f"--save-additional-columns {column}: named twice")


def storable(text: str) -> str:
    """`text` as Arrow can hold it: a lone surrogate, which JSON can spell and UTF-8 cannot, becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def text_of(value: Any) -> str:
    """A JSON value as a text that can be stored: a string as it is, anything else as its JSON."""
    if isinstance(value, str):
        return storable(value)
    return storable(json.dumps(value, ensure_ascii=False, default=str))


def optional_text(value: Any) -> str | None:
    """As `text_of`; None for None."""
    return None if value is None else text_of(value)


def optional_size(value: Any) -> int | None:
    """A number of pixels; None for whatever is none."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number < 2**31 else None


def decoded(data: bytes) -> str:
    """The text in a file: UTF-8, or UTF-16 with its mark; bytes that are neither become U+FFFD."""
    marked = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if marked else "utf-8-sig", "replace")


def identity(value: Any) -> str:
    """A number or name by which records find each other: 7, 7.0, "7" and "007" are one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = storable(str(value).strip()) if isinstance(value, str | int) else text_of(value)
    return (text.lstrip("0") or "0") if text.isdecimal() else text


def split_named(value: Any) -> str | None:
    """train, val or test by any of the names that other tools give them ("train2014"); None for anything else."""
    return _SPLITS.get(value.strip().lower().rstrip("0123456789-._ ")) if isinstance(value, str) else None


def folder_split(name: str) -> str | None:
    """The split that the first of a relative name's folders which is called by one is called by, if any."""
    return next(filter(None, map(split_named, name.split("/")[:-1])), None)


def unique(rows: Iterable[Row]) -> list[Row]:
    """The rows with unlike keys: of those that share one, all but the first get a number."""
    result = list(rows)
    taken, seen = {row.key for row in result}, Counter[str]()
    for place, row in enumerate(result):
        seen[row.key] += 1
        if seen[row.key] > 1:
            keys = (f"{row.key}#{number}" for number in count(seen[row.key]))
            result[place] = replace(row, key=next(key for key in keys if key not in taken))
            taken.add(result[place].key)
    return result
