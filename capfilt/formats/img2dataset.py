"""img2dataset's output: a Parquet file per shard, failures too; the pictures in it, in a tar beside it, or in a folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from capfilt.data.images import SUFFIXES
from capfilt.formats import Reading
from capfilt.formats.files import find, is_file
from capfilt.formats.parquet import ENDINGS, ParquetSource, schema_of
from capfilt.formats.source import Given, SourceRow
from capfilt.formats.values import optional_text, text_of
from capfilt.formats.webdataset import ENDINGS as TARS
from capfilt.formats.webdataset import REST, read_tar
from capfilt.tables.contracts import STATUSES


def detect(given: Given) -> bool:
    """Whether the Parquet files have its columns, and each tar is beside one of them."""
    tables = given.shards(*ENDINGS)
    if not tables or not {"key", "status"} <= set(schema_of(tables[0]).names):
        return False
    return {tar.with_suffix("") for tar in given.shards(*TARS)} <= {table.with_suffix("") for table in tables}


def read(given: Given, reading: Reading) -> Img2datasetSource:
    """A shard per Parquet file, in the file's order."""
    return Img2datasetSource(given, reading)


class Img2datasetSource(ParquetSource):
    """Rows with img2dataset's own account of what went wrong."""

    beside = (*TARS, ".json", ".txt", *(f".{suffix}" for suffix in SUFFIXES))

    def _pictures(self, file: Path, column: str | None) -> Callable[[SourceRow, dict[str, Any]], SourceRow]:
        tars = (find(file.parent, file.with_suffix(suffix).name) for suffix in TARS)
        tar = (
            next((each for each in tars if each is not None and is_file(each)), None)
            if column is None
            else None
        )
        samples = {sample.key: sample for sample in read_tar(tar)[0]} if tar is not None else {}
        inside = None if column is None else super()._pictures(file, column)

        def onto(row: SourceRow, record: dict[str, Any]) -> SourceRow:
            status, message = record.get("status") or "success", record.get("error_message")
            if status not in STATUSES:
                status, message = "failed_to_download", f"status {status!r}"
            if status != "success":
                failure = failure_in_words(status, message)
                return replace(row, status=status, failure=failure, message=optional_text(message))
            if inside is not None:
                return inside(row, record)
            key = text_of(record.get("key"))
            sample = samples.get(key, samples.get(REST))
            if sample is not None:
                return sample.onto(row)
            files = (find(file.parent, f"{file.stem}/{key}.{suffix}") for suffix in SUFFIXES)
            picture = next((each for each in files if each is not None and is_file(each)), None)
            if picture is None:
                return row.missing("the row says success, but its picture is not here")
            return replace(row, file=picture)

        return onto


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
