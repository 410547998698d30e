"""A source of pictures and texts: what it gives (rows, cut into shards), how it is asked, and how its format is found.

A source is described, not judged: whether a picture decodes, and what is stored of it, is the business of
`stages/ingest`. Nothing is ever unpickled or extracted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Protocol, cast

import pyarrow as pa

from capfilt.errors import UserError
from capfilt.formats import FORMATS, Reading
from capfilt.formats.files import find, images_beside, is_file, kind_in_words, leads_out
from capfilt.formats.keys import Keys
from capfilt.formats.places import Place
from capfilt.formats.values import (
    ColumnTypes,
    Keyed,
    arrow_column,
    captions_in,
    folder_split,
    optional_size,
    optional_text,
    split_named,
    storable,
    unique,
)
from capfilt.tables.workspace import expanded


@dataclass(frozen=True)
class SourceRow(Keyed):
    """One picture as its source describes it.

    Attributes:
        key: unique within its source; a file name wherever there is one.
        captions: the texts, untouched.
        split: train, val or test.
        url, license: as the source has them.
        file: where the encoded picture lies; or
        picture: the encoded picture itself. Neither where there is none.
        status, failure, message: what the source itself says went wrong.
        original_width, original_height, sha256: what the source knows of the body it once received.
        extra: the further fields asked for.
    """

    captions: tuple[str, ...] = ()
    split: str | None = None
    url: str | None = None
    license: str | None = None
    file: Path | None = None
    picture: bytes | None = field(default=None, repr=False)
    status: str = "success"
    failure: str | None = None
    message: str | None = None
    original_width: int | None = None
    original_height: int | None = None
    sha256: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def failed(self, failure: str, message: str) -> SourceRow:
        """This row without a picture, and why."""
        return replace(
            self, file=None, picture=None, status="failed_to_resize", failure=failure, message=message
        )

    def missing(self, message: str) -> SourceRow:
        """This row, whose picture is not there."""
        return self.failed("file_missing", message)


def described(
    key: str, record: Mapping[str, Any], columns: Sequence[str] = (), extra: Sequence[str] = ()
) -> SourceRow:
    """The row that a record's fields tell, its texts in `columns`; the fields' names in capitals or not."""
    known = {name.strip().lower(): value for name, value in reversed(list(record.items()))}
    return SourceRow(
        key,
        captions_in(record, columns),
        split_named(known.get("split")),
        url=optional_text(known.get("url")),
        license=optional_text(known.get("license", known.get("licence"))),
        original_width=optional_size(known.get("original_width")),
        original_height=optional_size(known.get("original_height")),
        sha256=optional_text(known.get("sha256")),
        extra={name: record.get(name) for name in extra},
    )


def placed(row: SourceRow, name: Any, root: Path) -> SourceRow:
    """`row` with the picture called `name` in `root`, its key the name; as it is, and missing, where none is named."""
    if not isinstance(name, str) or not name:
        return row.missing("no file is named")
    file = find(root, name)
    if file is None:
        row = replace(row, key=storable(name))
        return row.missing(f"{storable(name)!r} leads out of the folder of pictures")
    return replace(row, key=storable(PurePosixPath(name).as_posix()), file=file)


@dataclass
class Found:
    """Rows, and what belongs to them.

    Attributes:
        rows: the rows.
        left_out: how many files or members beside them are not read, by kind.
        further: the further columns asked for, in the types that they have in every shard.
    """

    rows: list[SourceRow]
    left_out: Counter[str] = field(default_factory=Counter)
    further: pa.Table = field(default_factory=lambda: pa.table({}))


class Given:
    """A source as formats see it, looked at once for all of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_file = path.is_file()
        self.suffix = Place(str(path)).suffix if self.is_file else ""

    @cached_property
    def opening(self) -> str:
        """The first two characters of a `.json` or `.jsonl` file, spaces left out."""
        if self.suffix not in (".json", ".jsonl"):
            return ""
        with Place(str(self.path)).stream() as file:
            head = file.read(4096)
        return "".join(head.decode(json.detect_encoding(head), "replace").lstrip("\ufeff").split())[:2]

    @cached_property
    def json(self) -> Any:
        """The JSON in the file; None where there is none, or JSON Lines. Raises UserError where it is broken."""
        if self.opening[:1] not in ("{", "["):
            return None
        with Place(str(self.path)).stream() as file:
            data = file.read()
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            if re.match(rb"[^\n]*}\s*\n\s*\{", data[: 1 << 24]):
                return None
            raise UserError(f"{self.path}: is not JSON ({error})") from None

    @property
    def object(self) -> dict[str, Any]:
        """The JSON object that the file is; empty where it is anything else."""
        return (self.json or {}) if self.opening.startswith("{") else {}

    def shards(self, *suffixes: str) -> list[Path]:
        """The file, or those in the folder and below it, if it ends with one of these; `.tar.gz` is a `.tar`.

        Raises UserError for a link out of the folder.
        """
        if self.is_file:
            return [self.path] if self.suffix in suffixes else []
        # Most files of a folder of pictures are none of these: a look at the name is quick.
        likely = (file for file in self._visible() if any(suffix in file.name.lower() for suffix in suffixes))
        found = [file for file in likely if Place(file.name).suffix in suffixes]
        for file in found:
            if leads_out(self.path, file):
                raise UserError(
                    f"{file}: is a link out of the folder, which is not followed; give {file.resolve().parent}"
                )
        return sorted(found)

    def others(self, *suffixes: str) -> Counter[str]:
        """How many files that end otherwise are in the folder and below it, by kind."""
        files = () if self.is_file else self._visible()
        return Counter(kind_in_words(file.name) for file in files if Place(file.name).suffix not in suffixes)

    def _visible(self) -> Iterator[Path]:
        for directory, folders, files in os.walk(self.path):
            folders[:] = [name for name in folders if not name.startswith((".", "_"))]
            yield from (
                Path(directory, name) for name in files if not name.startswith((".", "_", "metadata."))
            )


class Format(Protocol):
    """A module named in FORMATS."""

    def detect(self, given: Given) -> bool:
        """Whether a source is in this format. Raises UserError where it is broken."""

    def read(self, given: Given, reading: Reading) -> Source:
        """The source. Raises UserError when it is not what it should be."""


class Source(ABC):
    """Pictures and texts somewhere, cut into shards."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path = path
        self.reading = reading

    @abstractmethod
    def digest(self) -> str:
        """Hex; changes when what the source lists changes. The bytes of pictures are not in it."""

    @abstractmethod
    def shard_count(self) -> int:
        """How many shards."""

    @abstractmethod
    def count(self, shard: int) -> int:
        """Rows of one shard."""

    @abstractmethod
    def read(self, shard: int) -> Found:
        """The rows of one shard, and what is left out beside them; what is left out of no shard, with the first one."""

    def mixed_types(self) -> dict[str, str]:
        """The types of further fields that have several types in the source."""
        return {}

    def remarks(self) -> Sequence[str]:
        """Lines for people on how the source is read."""
        return ()


def open_source(path: str, format: str, reading: Reading) -> Source:
    """The source at `path`; `format` is one of FORMATS or "auto". Raises UserError when it is not what it should be."""
    place = expanded(path)
    if "://" in path or not place.exists():
        remote = "sources are read from a local or shared file system"
        raise UserError(f"{path}: {remote if '://' in path else 'no such file or folder'}")
    if reading.images and not expanded(reading.images).is_dir():
        raise UserError(f"--images {reading.images}: no such folder")
    if format not in ("auto", *FORMATS):
        raise UserError(f"--format {format!r}: choose auto, {', '.join(FORMATS)}")
    given = Given(place)
    for name in FORMATS if format == "auto" else (format,):
        module = cast(Format, import_module(f"capfilt.formats.{name}"))
        if name == format or module.detect(given):
            return module.read(given, reading)
    fields = f" (a JSON object with {', '.join(list(given.object)[:9])})" if given.object else ""
    raise UserError(
        f"{path}: no format fits its name and content{fields}; give --format {', '.join(FORMATS)}"
    )


def pictures_of(path: Path, reading: Reading) -> Path:
    """The folder of the pictures that a file names. Raises UserError for a link elsewhere."""
    return expanded(reading.images) if reading.images else images_beside(path)


class ListedSource(Source):
    """A source that is listed whole, then cut. Pickled with its list, so that every worker cuts the same one."""

    def __init__(self, path: Path, reading: Reading, found: Found) -> None:
        super().__init__(path, reading)
        rows = (replace(row, split=row.split or reading.split or None) for row in unique(found.rows))
        chosen = [row for row in rows if not reading.splits or row.split in reading.splits]
        self._rows = chosen[: reading.limit] if reading.limit else chosen
        self._left_out = found.left_out
        if not self._rows:
            where = f" in the splits {', '.join(reading.splits)}" if reading.splits else ""
            others = f"; beside them: {counted(found.left_out)}" if found.left_out else ""
            raise UserError(f"{path}: has no pictures{where}{others}")

    def digest(self) -> str:
        digest = hashlib.sha256()
        # Names and sizes: the bytes of the pictures are in the fingerprint of each shard.
        for row in self._rows:
            size = row.file.stat().st_size if row.file is not None and is_file(row.file) else -1
            digest.update(json.dumps([row.key, size]).encode())
        return digest.hexdigest()

    def shard_count(self) -> int:
        return math.ceil(len(self._rows) / self.reading.shard_size)

    def count(self, shard: int) -> int:
        return len(self.read(shard).rows)

    def read(self, shard: int) -> Found:
        start = shard * self.reading.shard_size
        rows = self._rows[start : start + self.reading.shard_size]
        return Found(rows, Counter() if shard else self._left_out, further_columns(rows, self._types))

    @cached_property
    def _types(self) -> dict[str, pa.DataType]:
        types = ColumnTypes(self.reading.save_additional_columns)
        for row in self._rows:
            types.notice(row.extra)
        return types.types()


class FileSource(Source):
    """A source with shards of its own: each file is one. Keys are those of the files where these tell the files apart."""

    endings: ClassVar[tuple[str, ...]]
    beside: ClassVar[tuple[str, ...]] = ()
    """How files end that belong to the shards, and are none."""

    def __init__(self, given: Given, reading: Reading) -> None:
        super().__init__(given.path, reading)
        files = given.shards(*self.endings)
        if not files:
            raise UserError(f"{given.path}: has no {' or '.join(self.endings)} files")
        root = given.path.parent if given.is_file else given.path
        names = {file: file.relative_to(root).as_posix() for file in files}
        self.splits = {file: _shard_split(name) or reading.split or None for file, name in names.items()}
        if reading.splits and None in self.splits.values():
            raise UserError(f"--splits: {given.path} does not say which split a picture is in; give --split")
        self.files = [file for file in files if not reading.splits or self.splits[file] in reading.splits]
        if not self.files:
            raise UserError(f"{given.path}: has no files in the splits {', '.join(reading.splits)}")
        self.names = names
        self._left_out = given.others(*self.endings, *self.beside)
        self.keys = Keys(list(names.values()))

    def digest(self) -> str:
        sizes = [[self.names[file], file.stat().st_size] for file in self.files]
        return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()

    @abstractmethod
    def _count(self, file: Path) -> int: ...

    @abstractmethod
    def _read(self, file: Path) -> Found:
        """All rows of a file, with keys of the whole source."""

    @cached_property
    def _limited(self) -> list[int]:
        """Rows to take of each file, up to the limit."""
        counts, left = [], self.reading.limit
        for file in self.files:
            counts.append(min(self._count(file), left))
            left -= counts[-1]
            if not left:
                break
        return counts

    def shard_count(self) -> int:
        return len(self._limited) if self.reading.limit else len(self.files)

    def count(self, shard: int) -> int:
        return self._limited[shard] if self.reading.limit else self._count(self.files[shard])

    def read(self, shard: int) -> Found:
        file = self.files[shard]
        found = self._read(file)
        rows = unique(found.rows)[: self._limited[shard] if self.reading.limit else None]
        rows = [replace(row, split=row.split or self.splits[file]) for row in rows]
        left_out = found.left_out if shard else found.left_out + self._left_out
        return Found(rows, left_out, found.further.slice(0, len(rows)))


def further_columns(rows: Sequence[SourceRow], types: Mapping[str, pa.DataType]) -> pa.Table:
    """The further fields of rows as columns of these types."""
    columns = [arrow_column((row.extra.get(name) for row in rows), type_) for name, type_ in types.items()]
    return pa.table(columns, names=list(types))


def counted(kinds: Mapping[str, int]) -> str:
    """Counts by kind in words, the most frequent first."""
    most = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count:,} {kind}" for kind, count in most[:9]]
    return ", ".join(shown + ([f"{len(most) - 9} further kinds"] if most[9:] else []))


def _shard_split(name: str) -> str | None:
    """The split that a file of many pictures is named by: in `train/0.tar`, `data/train-00000-of-00042.parquet`."""
    words = map(split_named, re.split(r"[^a-zA-Z]+", PurePosixPath(name).name))
    return folder_split(name) or next(filter(None, words), None)
