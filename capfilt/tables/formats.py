"""Pictures and texts in other tools' layouts, as rows: COCO and Karpathy JSON, folders, img2dataset's output, tars.

What is read here is described, not judged: whether a picture decodes, and what is stored of it, is the business of
`stages/ingest`. Nothing is ever unpickled or extracted, and no file name leads out of its folder.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import stat
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.errors import UserError
from capfilt.tables.ids import file_sha256
from capfilt.tables.parquet import open_parquet

FORMATS = ("coco", "karpathy", "folder", "img2dataset", "webdataset")

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")

CAPTION_COLUMNS = ("caption", "captions", "text", "texts")
"""Where texts are looked for when nothing is said: the first of these that is there."""

MAX_FILE_BYTES = 256 * 2**20
"""A picture's file above this many bytes is not read: the failure `too_large`."""

REST = "#rest"
"""The key of what is missing of a tar that breaks off."""

_METADATA = ("metadata.parquet", "metadata.csv", "metadata.tsv", "metadata.jsonl")
_TABLES = (".parquet", ".csv", ".tsv", ".jsonl")
_TEXT_BYTES = 10_000_000

# Names that other tools give the three splits; Karpathy's `restval` is trained on by convention.
_SPLITS = {
    "train": "train", "training": "train", "restval": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class SourceRow:
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

    key: str
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


@dataclass(frozen=True)
class Reading:
    """How to read a source: what may be asked of it beside its path.

    Attributes:
        images: folder of the pictures, where it is not where the format has it.
        image_col: field of a folder's metadata that has the picture's path.
        caption_cols: fields of the texts; empty for the first of CAPTION_COLUMNS that is there.
        extra: further fields to carry through.
        splits: only rows of these splits; empty for all.
        split: the split of rows that have none.
        limit: only the first so many rows; 0 for all.
        shard_size: rows per shard, where the source has no shards of its own.
    """

    images: Path | None = None
    image_col: str = "file_name"
    caption_cols: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    split: str | None = None
    limit: int = 0
    shard_size: int = 1000


class _HasKey(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def key(self) -> str: ...


Keyed = TypeVar("Keyed", bound=_HasKey)


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
        """How many shards. Raises UserError when there is nothing to read."""

    @abstractmethod
    def count(self, shard: int) -> int:
        """Rows of one shard."""

    @abstractmethod
    def rows(self, shard: int) -> list[SourceRow]:
        """The rows of one shard."""

    @abstractmethod
    def extra_types(self) -> dict[str, pa.DataType]:
        """The Arrow type of each further field, the same for every shard."""


def open_source(path: str, format: str, reading: Reading) -> Source:
    """The source at `path`; `format` is one of FORMATS or "auto". Raises UserError when it is not what it should be."""
    place = Path(path).expanduser()
    if "://" in path or not place.exists():
        reason = (
            "sources are read from a local or shared file system"
            if "://" in path
            else "no such file or folder"
        )
        raise UserError(f"{path}: {reason}")
    if reading.images is not None and not reading.images.is_dir():
        raise UserError(f"--images {reading.images}: no such folder")
    if format == "auto":
        format = _detect(place)
    if format in ("coco", "karpathy"):
        return _AnnotatedSource(place, reading, format)
    if format == "folder":
        return _FolderSource(place, reading)
    if format == "img2dataset":
        return _ParquetSource(place, reading)
    if format == "webdataset":
        return _TarSource(place, reading)
    raise UserError(f"--format {format!r}: choose auto, {', '.join(FORMATS)}")


def _detect(path: Path) -> str:
    if path.is_file():
        if path.suffix == ".json":
            return _json_layout(path, read_json(path))
        if path.suffix == ".tar":
            return "webdataset"
        if path.suffix in _TABLES:
            pictures = path.suffix == ".parquet" and _picture_column(_parquet_schema(path).names)
            return "img2dataset" if pictures else "folder"
        raise UserError(f"{path}: its name does not tell the format; give --format")
    tars = {child.stem for child in path.glob("*.tar")}
    tables = sorted(child for child in path.glob("*.parquet") if _is_shard(child))
    if tars:
        return "img2dataset" if tars <= {table.stem for table in tables} else "webdataset"
    if tables:
        names = _parquet_schema(tables[0]).names
        if _picture_column(names) or {"key", "status"} <= set(names):
            return "img2dataset"
    return "folder"


# -- COCO and Karpathy ----------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """The JSON in a file. Raises UserError naming it when it is broken."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _json_layout(path: Path, data: Any) -> str:
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list):
        raise UserError(f"{path}: has no list `images`: neither COCO captions nor Karpathy's layout")
    if any(isinstance(image, dict) and "sentences" in image for image in images[:100]):
        return "karpathy"
    if isinstance(data.get("annotations"), list):
        return "coco"
    raise UserError(f"{path}: has neither `annotations` (COCO captions) nor `sentences` (Karpathy's layout)")


def coco_rows(data: Any, path: Path, images: Path, extra: Sequence[str] = ()) -> list[SourceRow]:
    """Rows of COCO captions JSON: `images` and `annotations`; each image's texts in the order of the annotations.

    Each image may have a `split`. Captions of an image that is not listed are a row without a picture. Raises UserError
    naming `path` when the file is not captions.
    """
    if _json_layout(path, data) != "coco":
        raise UserError(f"{path}: is in Karpathy's layout; give --format karpathy")
    texts: dict[Any, list[str]] = {}
    for annotation in data["annotations"]:
        if isinstance(annotation, dict) and annotation.get("caption") is not None:
            texts.setdefault(_hashable(annotation.get("image_id")), []).append(text_of(annotation["caption"]))
    if data["annotations"] and not texts:
        raise UserError(
            f"{path}: its annotations have no `caption`; give the captions file, not instances or keypoints"
        )
    licenses = {
        _hashable(entry.get("id")): str(entry.get("name") or entry.get("url"))
        for entry in data.get("licenses") or []
        if isinstance(entry, dict)
    }
    rows, listed = [], set()
    for number, image in enumerate(data["images"]):
        entry = image if isinstance(image, dict) else {}
        identity = _hashable(entry.get("id"))
        listed.add(identity)
        license_ = entry.get("license")
        row = _placed(entry.get("file_name"), images, f"#{number}")
        rows.append(
            replace(
                row,
                captions=tuple(texts.get(identity, ())),
                split=split_named(entry.get("split")),
                license=None if license_ is None else licenses.get(_hashable(license_), text_of(license_)),
                extra={name: entry.get(name) for name in extra},
            )
        )
    for identity, captions in texts.items():
        if identity not in listed:
            words = f"captions are of image {identity!r}, which the file does not list"
            rows.append(_missing(SourceRow(f"#{identity}", tuple(captions)), words))
    return unique(rows)


def karpathy_rows(data: Any, path: Path, images: Path, extra: Sequence[str] = ()) -> list[SourceRow]:
    """Rows of Karpathy's JSON (dataset_coco.json and the like): `restval` is train.

    A picture is at `filepath`/`filename`, or at `filename` where the folder has no such `filepath`. Raises UserError
    naming `path` when the file is in another layout.
    """
    if _json_layout(path, data) != "karpathy":
        raise UserError(f"{path}: is COCO captions JSON; give --format coco")
    folders: dict[str, bool] = {}
    rows = []
    for number, image in enumerate(data["images"]):
        entry = image if isinstance(image, dict) else {}
        name, folder = entry.get("filename"), entry.get("filepath")
        row = _placed(name, images, f"#{number}")
        if isinstance(name, str) and isinstance(folder, str) and folder:
            full = _placed(f"{folder}/{name}", images, f"#{number}")
            if folder not in folders:
                folders[folder] = safe_join(images, folder) is not None and os.path.isdir(images / folder)  # noqa: PTH112
            row = full if folders[folder] or full.file is None else replace(row, key=full.key)
        sentences = [each for each in entry.get("sentences") or [] if isinstance(each, dict)]
        rows.append(
            replace(
                row,
                captions=tuple(text_of(each["raw"]) for each in sentences if each.get("raw") is not None),
                split=split_named(entry.get("split")),
                extra={field: entry.get(field) for field in extra},
            )
        )
    return unique(rows)


# -- folders --------------------------------------------------------------------------------------------------------


def folder_rows(path: Path, reading: Reading) -> list[SourceRow]:
    """Rows of a folder of pictures, or of a table (csv, tsv, jsonl, Parquet) that names pictures in one.

    A folder may have a `metadata.csv` (or tsv, jsonl, Parquet) with the column `file_name`; pictures it does not name
    are rows too. Without it, the texts of `a/b.jpg` are the lines of `a/b.txt`. Rows that name the same picture are
    one, with all their texts; where several columns of texts are given, an empty field is no text. A first folder
    called train, val or test (or the like) is the split, unless a column `split` says otherwise.
    """
    if path.is_file():
        beside = path.parent / "images"
        root = reading.images or (beside if beside.is_dir() else path.parent)
        return unique(_table_rows(path, root, reading))
    root = reading.images or path
    metadata = [path / name for name in _METADATA if (path / name).is_file()]
    if len(metadata) > 1:
        raise UserError(f"{path}: has {metadata[0].name} and {metadata[1].name}; name one of them")
    rows = _table_rows(metadata[0], root, reading) if metadata else []
    named = {row.key for row in rows}
    nothing = dict.fromkeys(reading.extra)
    for name in walk(root):
        if name not in named:
            file = root / name
            texts = () if metadata else _sidecar(file.with_suffix(".txt"))
            rows.append(SourceRow(storable(name), texts, folder_split(name), file=file, extra=nothing))
    return unique(rows)


def _table_rows(path: Path, root: Path, reading: Reading) -> list[SourceRow]:
    records, names = read_table(path)
    for option, columns in (
        ("--image-col", (reading.image_col,)),
        ("--caption-col", reading.caption_cols),
        ("--save-additional-columns", reading.extra),
    ):
        for column in columns:
            if column not in names:
                raise UserError(
                    f"{path}: has no column {column!r}; its columns are {', '.join(names)}: see {option}"
                )
    columns = reading.caption_cols or tuple(name for name in CAPTION_COLUMNS if name in names)[:1]
    rows: dict[str, SourceRow] = {}
    for number, record in enumerate(records):
        row = _placed(record.get(reading.image_col), root, f"#{number}")
        found = [text for column in columns for text in texts_in(record.get(column))]
        captions = tuple(text for text in found if text or len(columns) == 1)
        if row.key in rows:
            first = rows[row.key]
            rows[row.key] = replace(first, captions=first.captions + captions)
            continue
        license_ = record.get("license", record.get("licence"))
        rows[row.key] = replace(
            row,
            captions=captions,
            split=split_named(record.get("split")) or folder_split(row.key),
            license=None if license_ is None else text_of(license_),
            extra={name: record.get(name) for name in reading.extra},
        )
    return list(rows.values())


def read_table(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a csv, tsv, jsonl or Parquet file, and its columns. Raises UserError naming what is broken."""
    if path.suffix == ".parquet":
        _parquet_schema(path)
        table = pq.read_table(path)
        return table.to_pylist(), list(table.schema.names)
    if path.suffix == ".jsonl":
        records = []
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        record = json.loads(line)
                    except ValueError as error:
                        raise UserError(f"{path}: line {number} is not JSON ({error})") from None
                    if not isinstance(record, dict):
                        raise UserError(f"{path}: line {number} is not a JSON object")
                    records.append(record)
        return records, list(dict.fromkeys(name for record in records for name in record))
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        # As in lists of URLs: csv quotes, tsv does not.
        if path.suffix == ".tsv":
            lines: Iterator[list[str]] = (
                line.rstrip("\r\n").split("\t") for line in file if line.strip("\r\n")
            )
        else:
            lines = _csv_lines(path, file)
        header = next(lines, [])
        return [dict(zip(header, line, strict=False)) for line in lines if line], header


def _csv_lines(path: Path, file: Iterable[str]) -> Iterator[list[str]]:
    csv.field_size_limit(max(csv.field_size_limit(), _TEXT_BYTES))
    reader = csv.reader(file)
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: {error}") from None


def walk(root: Path) -> list[str]:
    """The pictures below a folder by their names relative to it, in order."""
    found: list[str] = []
    for directory, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        pictures = (name for name in files if name.rpartition(".")[2].lower() in PICTURE_SUFFIXES)
        found += [
            Path(directory, name).relative_to(root).as_posix()
            for name in pictures
            if not name.startswith(".")
        ]
    return sorted(found)


def _sidecar(path: Path) -> tuple[str, ...]:
    data = read_file(path, _TEXT_BYTES)
    if not isinstance(data, bytes):
        return ()
    lines = data.decode("utf-8-sig", "replace").splitlines()
    return tuple(line for line in lines if line.strip())


# -- img2dataset's output and other Parquet files with pictures in them ---------------------------------------------


def parquet_rows(path: Path, reading: Reading) -> list[SourceRow]:
    """Rows of one Parquet shard of img2dataset: failures too, in the file's order.

    The picture is in a column of the file, in the tar beside it, or in the folder of the file's name (img2dataset's
    formats parquet, webdataset and files). Rows without a `key` get the file's name and their number. Raises UserError
    naming the file when it is no Parquet file.
    """
    schema = _parquet_schema(path)
    picture = _picture_column(schema.names)
    columns = _caption_columns(path, schema.names, reading)
    tar = path.with_suffix(".tar")
    samples = {} if picture or not tar.is_file() else {sample.key: sample for sample in read_tar(tar)}
    rows = []
    for number, record in enumerate(pq.read_table(path).to_pylist()):
        key = text_of(record["key"]) if record.get("key") is not None else f"{path.stem}/{number:06d}"
        status, message = record.get("status") or "success", record.get("error_message")
        if status not in ("success", "failed_to_download", "failed_to_resize"):
            status, message = "failed_to_download", f"status {status!r}"
        row = SourceRow(
            key,
            tuple(text for column in columns for text in texts_in(record.get(column))),
            split_named(record.get("split")),
            url=_optional(record.get("url")),
            license=_optional(record.get("license")),
            status=status,
            failure=None if status == "success" else failure_in_words(status, message),
            message=None if status == "success" else _optional(message),
            original_width=_integer(record.get("original_width")),
            original_height=_integer(record.get("original_height")),
            sha256=_optional(record.get("sha256")),
            extra={name: record.get(name) for name in reading.extra},
        )
        if status == "success":
            sample = samples.get(key, samples.get(REST))
            row = _with_picture(row, record.get(picture) if picture else None, sample, path)
        rows.append(row)
    return unique(rows)


def _with_picture(row: SourceRow, value: Any, sample: TarSample | None, path: Path) -> SourceRow:
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return replace(row, picture=value)
    if sample is not None:
        return sample.onto(row)
    for suffix in PICTURE_SUFFIXES:
        file = safe_join(path.with_suffix(""), f"{row.key}.{suffix}")
        if file is not None and is_file(file):
            return replace(row, file=file)
    return _missing(row, "the row says success, but its picture is not here")


_WORDS = (
    (
        r"unknown url type|[Nn]o host|nonnumeric port|can't contain control|codec can't encode|NoneType",
        "bad_url",
    ),
    (r"HTTP Error 4(04|10)\b", "not_found"),
    (r"HTTP Error 429\b", "rate_limited"),
    (r"X-Robots-Tag", "opted_out"),
    (r"redirect", "too_many_redirects"),
    (r"HTTP Error", "http_error"),
    (r"timed? ?out", "timeout"),
    (r"Errno -\d|getaddrinfo|[Nn]ame or service|name resolution|nodename", "dns"),
    (r"IncompleteRead", "truncated"),
    (r"hash mismatch", "hash_mismatch"),
    (r"too small", "too_small"),
    (r"area too large", "too_many_pixels"),
    (r"aspect ratio", "bad_aspect_ratio"),
)


def failure_in_words(status: str, message: Any) -> str:
    """The failure, from the closed list, that img2dataset's `error_message` speaks of."""
    for pattern, failure in _WORDS:
        if re.search(pattern, str(message)):
            return failure
    return "connection" if status == "failed_to_download" else "decode_error"


# -- tars -----------------------------------------------------------------------------------------------------------


@dataclass
class TarSample:
    """The members of a tar that share a key: extension -> bytes; `fault` is (failure, words) where one is not whole."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    fault: tuple[str, str] | None = None

    def onto(self, row: SourceRow) -> SourceRow:
        """`row` with the picture of this sample, or with the failure to have one."""
        for suffix in PICTURE_SUFFIXES:
            if suffix in self.members:
                return replace(row, picture=self.members[suffix])
        if self.fault is not None:
            return _failed(row, *self.fault)
        return _missing(row, "the tar has no picture under this key")


def read_tar(path: Path, *, contents: bool = True) -> list[TarSample]:
    """The samples of a tar in WebDataset's layout, in order of their first members; nothing is extracted.

    Members of a key need not stand side by side. Of two members of one name the later counts, as it would when
    extracting. Where the archive breaks off
    or lacks its end mark, a last sample with the key REST stands for what followed. Without
    `contents` the samples are as many, and empty.
    """
    samples: dict[str, TarSample] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = storable(f"{folder}/{stem}" if folder else stem)
                sample = samples.setdefault(key, TarSample(key))
                if not contents:
                    continue
                if member.size > MAX_FILE_BYTES:
                    words = f"{storable(member.name)}: {member.size} bytes, more than {MAX_FILE_BYTES}"
                    sample.fault = ("too_large", words)
                    continue
                file = tar.extractfile(member)
                assert file is not None
                sample.fault = ("truncated", f"{path.name} breaks off in {storable(member.name)}")
                sample.members[extension.lower()] = file.read()
                sample.fault = None
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        words = f"{path.name} breaks off after {len(samples)} samples ({error}): what followed is not here"
        samples[REST] = TarSample(REST, fault=("truncated", words))
    return list(samples.values())


def _check_end(path: Path, offset: int) -> None:
    # tarfile takes a cut header, or the end of the file, for the end of the archive.
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end mark")


def tar_rows(path: Path, reading: Reading) -> list[SourceRow]:
    """Rows of one tar: a picture, `.txt` (one text) or `.json` (fields) by key.

    A key that does not already begin with the tar's own name, as img2dataset's do, is put behind it: keys are unique
    within a tar only.
    """
    rows = []
    for sample in read_tar(path):
        key = sample.key if sample.key.startswith(path.stem) else f"{path.stem}/{sample.key}"
        record, broken = _sample_fields(sample)
        captions: tuple[str, ...]
        if "txt" in sample.members:
            captions = (sample.members["txt"].decode("utf-8", "replace"),)
        else:
            columns = reading.caption_cols or tuple(name for name in CAPTION_COLUMNS if name in record)[:1]
            captions = tuple(text for column in columns for text in texts_in(record.get(column)))
        row = SourceRow(
            key,
            captions,
            split_named(record.get("split")),
            url=_optional(record.get("url")),
            license=_optional(record.get("license")),
            original_width=_integer(record.get("original_width")),
            original_height=_integer(record.get("original_height")),
            sha256=_optional(record.get("sha256")),
            extra={name: record.get(name) for name in reading.extra},
        )
        if broken and "txt" not in sample.members:
            rows.append(
                _failed(row, "decode_error", f"its .json is broken ({broken}), so its text is unknown")
            )
        else:
            rows.append(sample.onto(row))
    return unique(rows)


def _sample_fields(sample: TarSample) -> tuple[dict[str, Any], str]:
    data = sample.members.get("json")
    if data is None:
        return {}, ""
    try:
        record = json.loads(data[:_TEXT_BYTES])
    except (ValueError, RecursionError) as error:
        return {}, str(error)
    return (record, "") if isinstance(record, dict) else ({}, "not an object")


# -- sources --------------------------------------------------------------------------------------------------------


class _ListedSource(Source):
    """A source that is listed whole, then cut. Pickled with its list, so that every worker cuts the same one."""

    @abstractmethod
    def _list(self) -> list[SourceRow]: ...

    @cached_property
    def _rows(self) -> list[SourceRow]:
        reading = self.reading
        rows = [
            row if row.split or not reading.split else replace(row, split=reading.split)
            for row in self._list()
        ]
        if reading.splits:
            rows = [row for row in rows if row.split in reading.splits]
        if reading.limit:
            rows = rows[: reading.limit]
        if not rows:
            where = f" in the splits {', '.join(reading.splits)}" if reading.splits else ""
            raise UserError(f"{self.path}: has no pictures{where}")
        return rows

    def shard_count(self) -> int:
        return math.ceil(len(self._rows) / self.reading.shard_size)

    def count(self, shard: int) -> int:
        return len(self.rows(shard))

    def rows(self, shard: int) -> list[SourceRow]:
        start = shard * self.reading.shard_size
        return self._rows[start : start + self.reading.shard_size]

    def extra_types(self) -> dict[str, pa.DataType]:
        return self._extra_types

    @cached_property
    def _extra_types(self) -> dict[str, pa.DataType]:
        types = ColumnTypes(self.reading.extra)
        for row in self._rows:
            types.notice(row.extra)
        return types.types()


class _AnnotatedSource(_ListedSource):
    """COCO or Karpathy JSON."""

    def __init__(self, path: Path, reading: Reading, layout: str) -> None:
        super().__init__(path, reading)
        self.layout = layout
        beside = path.parent / "images"
        self.images = reading.images or (beside if beside.is_dir() else path.parent)

    def _list(self) -> list[SourceRow]:
        rows = coco_rows if self.layout == "coco" else karpathy_rows
        return rows(read_json(self.path), self.path, self.images, self.reading.extra)

    @cached_property
    def _digest(self) -> str:
        return file_sha256(self.path)

    def digest(self) -> str:
        # Whoever asks is about to begin a part: a broken file must be found out before.
        self.shard_count()
        return self._digest


class _FolderSource(_ListedSource):
    """A folder of pictures, or a table that names pictures."""

    def _list(self) -> list[SourceRow]:
        return folder_rows(self.path, self.reading)

    def digest(self) -> str:
        digest = hashlib.sha256()
        # Names and sizes: the bytes of the pictures are in the fingerprint of each shard.
        for row in self._rows:
            size = row.file.stat().st_size if row.file is not None and is_file(row.file) else -1
            digest.update(json.dumps([row.key, size]).encode())
        return digest.hexdigest()


class _FileSource(Source):
    """A source with shards of its own: each file is one."""

    suffix = ""

    def __init__(self, path: Path, reading: Reading) -> None:
        super().__init__(path, reading)
        if path.is_file():
            self.files = [path]
        else:
            self.files = sorted(child for child in path.glob(f"*{self.suffix}") if _is_shard(child))
        if not self.files:
            raise UserError(f"{path}: has no {self.suffix} files")
        if reading.splits and not reading.split:
            raise UserError(f"--splits: {path} does not say which split a picture is in; give --split")
        if reading.split and reading.splits and reading.split not in reading.splits:
            raise UserError(f"--split {reading.split} is not among --splits {', '.join(reading.splits)}")

    def digest(self) -> str:
        return hashlib.sha256(
            json.dumps([[file.name, file.stat().st_size] for file in self.files]).encode()
        ).hexdigest()

    @abstractmethod
    def _count(self, file: Path) -> int: ...

    @abstractmethod
    def _read(self, file: Path) -> list[SourceRow]: ...

    @cached_property
    def _counts(self) -> list[int]:
        """Rows to take of each file, up to the limit."""
        counts: list[int] = []
        left = self.reading.limit
        for file in self.files:
            counts.append(min(self._count(file), left) if self.reading.limit else self._count(file))
            left -= counts[-1]
            if self.reading.limit and left <= 0:
                break
        return counts

    def shard_count(self) -> int:
        return len(self._counts) if self.reading.limit else len(self.files)

    def count(self, shard: int) -> int:
        return self._counts[shard] if self.reading.limit else self._count(self.files[shard])

    def rows(self, shard: int) -> list[SourceRow]:
        rows = self._read(self.files[shard])
        if self.reading.limit:
            rows = rows[: self._counts[shard]]
        return [replace(row, split=row.split or self.reading.split) for row in rows]


class _ParquetSource(_FileSource):
    """img2dataset's output, and other Parquet files with pictures in them."""

    suffix = ".parquet"

    def _count(self, file: Path) -> int:
        _parquet_schema(file)
        return int(pq.read_metadata(file).num_rows)

    def _read(self, file: Path) -> list[SourceRow]:
        return parquet_rows(file, self.reading)

    def extra_types(self) -> dict[str, pa.DataType]:
        schema = _parquet_schema(self.files[0])
        for name in self.reading.extra:
            if name not in schema.names:
                raise UserError(
                    f"{self.files[0]}: has no column {name!r}; its columns are {', '.join(schema.names)}: see "
                    "--save-additional-columns"
                )
        return {name: schema.field(name).type for name in self.reading.extra}


class _TarSource(_FileSource):
    """Tars in WebDataset's layout."""

    suffix = ".tar"

    def _count(self, file: Path) -> int:
        return len(read_tar(file, contents=False))

    def _read(self, file: Path) -> list[SourceRow]:
        return tar_rows(file, self.reading)

    def extra_types(self) -> dict[str, pa.DataType]:
        # Each sample brings its own JSON: no type but text holds for all of them.
        return dict.fromkeys(self.reading.extra, pa.string())


# -- values ---------------------------------------------------------------------------------------------------------

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


def storable(text: str) -> str:
    """`text` as Arrow can hold it: a lone surrogate, which JSON can spell and UTF-8 cannot, becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def safe_join(root: Path, name: str) -> Path | None:
    """`name` within `root`, or None where it leads out of it (absolute, or through `..`)."""
    parts = PurePosixPath(name).parts
    if not parts or "\0" in name or parts[0] == "/" or ".." in parts:
        return None
    return root.joinpath(*parts)


def is_file(path: Path) -> bool:
    """Whether there is such a file. Unlike Path's own, False also of a name that no system takes."""
    return os.path.isfile(path)  # noqa: PTH113


def read_file(path: Path, most: int = MAX_FILE_BYTES) -> bytes | tuple[str, str]:
    """The bytes of a file, or (failure, words) where it is missing, no plain file, or above `most` bytes."""
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to must not wait for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return "file_missing", f"{path.name} is no plain file"
            if status.st_size > most:
                return "too_large", f"{status.st_size} bytes, more than {most}"
            return file.read()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return "file_missing", f"{path.name}: {reason}"


def _placed(name: Any, root: Path, otherwise: str) -> SourceRow:
    if not isinstance(name, str) or not name:
        return _missing(SourceRow(otherwise), "no file is named")
    file = safe_join(root, name)
    if file is None:
        return _missing(SourceRow(storable(name)), f"{storable(name)!r} leads out of the folder of pictures")
    return SourceRow(storable(PurePosixPath(name).as_posix()), file=file)


def unique(rows: list[Keyed]) -> list[Keyed]:
    """The rows with unlike keys: of those that share one, all but the first get a number."""
    counts = Counter(row.key for row in rows)
    if len(counts) == len(rows):
        return rows
    taken, result = set(counts), []
    seen: Counter[str] = Counter()
    for row in rows:
        key = row.key
        seen[key] += 1
        if seen[key] > 1:
            number = seen[key]
            while f"{key}#{number}" in taken:
                number += 1
            row = replace(row, key=f"{key}#{number}")
            taken.add(row.key)
        result.append(row)
    return result


def _missing(row: SourceRow, message: str) -> SourceRow:
    return _failed(row, "file_missing", message)


def _failed(row: SourceRow, failure: str, message: str) -> SourceRow:
    return replace(row, file=None, picture=None, status="failed_to_resize", failure=failure, message=message)


def split_named(value: Any) -> str | None:
    """train, val or test by any of the names that other tools give them; None for anything else."""
    return _SPLITS.get(value.strip().lower()) if isinstance(value, str) else None


def folder_split(name: str) -> str | None:
    """The split that the first folder of a relative name is called by, if any."""
    folder, separator, _ = name.partition("/")
    return split_named(folder) if separator else None


def text_of(value: Any) -> str:
    """A JSON value as a text that can be stored: a string as it is, anything else as its JSON."""
    if isinstance(value, str):
        return storable(value)
    return storable(json.dumps(value, ensure_ascii=False, default=str))


def _optional(value: Any) -> str | None:
    return None if value is None else text_of(value)


def _integer(value: Any) -> int | None:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number < 2**31 else None


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else json.dumps(value)


def _is_shard(path: Path) -> bool:
    return not path.name.startswith((".", "_")) and path.name not in _METADATA


def _picture_column(names: Sequence[str]) -> str | None:
    return next((name for name in (*PICTURE_SUFFIXES, "image", "image_bytes") if name in names), None)


def _caption_columns(path: Path, names: Sequence[str], reading: Reading) -> tuple[str, ...]:
    for name in reading.caption_cols:
        if name not in names:
            raise UserError(
                f"{path}: has no column {name!r}; its columns are {', '.join(names)}: see --caption-col"
            )
    return reading.caption_cols or tuple(name for name in CAPTION_COLUMNS if name in names)[:1]


def _parquet_schema(path: Path) -> pa.Schema:
    with open_parquet(path, path) as file:
        schema: pa.Schema = file.schema_arrow
        return schema
