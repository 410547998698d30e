"""The `download` stage: one slice of the list of URLs becomes one shard of an images part.

Fetching and resizing happen in a child process (`worker.py`); here is what goes in and how rows come out.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

import capfilt
from capfilt.errors import UserError
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.download.addresses import AddressPolicy
from capfilt.stages.download.engine import Settings
from capfilt.stages.download.lists import open_list
from capfilt.stages.download.worker import MISSING, Row, close_shared_worker, shared_worker
from capfilt.stages.options import DownloadOptions
from capfilt.tables.contracts import IMAGES
from capfilt.tables.formats import storable
from capfilt.tables.ids import image_id
from capfilt.tables.shards import Counts, Part
from capfilt.tables.workspace import Workspace

RESIZE_MODES = ("border", "keep_ratio", "keep_ratio_largest", "center_crop", "no")
ENCODE_FORMATS = ("jpg", "png", "webp")

SHARD_DIGITS = 5
"""Digits of the shard's number in a key (img2dataset's `oom_shard_count`)."""


class Download(ShardStage):
    """Fetches a list of URLs. Every URL is one row, in the order of the list; what fails is a row that says why.

    A list's `license` column, where it is among the additional columns, fills the table's own.
    """

    name = "download"
    version = 1
    contract = IMAGES

    def __init__(self, options: DownloadOptions, workspace: Workspace, output: Part | None = None) -> None:
        _check(options)
        if importlib.util.find_spec("img2dataset") is None:
            raise UserError(MISSING)
        self.options = options
        self.output = output or workspace.part("images", options.dataset)
        self.list = open_list(
            options.url_list,
            options.input_format,
            options.url_col,
            options.caption_col,
            options.save_additional_columns,
            options.number_sample_per_shard,
        )

    def identity(self) -> Mapping[str, Any]:
        # How many fetches are in flight changes the order of answers, and rows are put back in the list's.
        return {
            "options": option_values(self.options, without=("thread_count",)),
            "url_list": self.list.digest,
        }

    def shards(self) -> list[int]:
        rows = self.list.rows
        if not rows:
            raise UserError(f"{self.list.path}: has no URLs")
        return list(range(math.ceil(rows / self.options.number_sample_per_shard)))

    def expected_rows(self, shard: int) -> int:
        start, stop = self.list.bounds(shard)
        return stop - start

    def setup(self) -> None:
        shared_worker().start()

    def teardown(self) -> None:
        # Inline, the same process goes on to train; the child's memory is better spent there.
        close_shared_worker()

    def process(self, shard: int) -> Produced:
        listed = self.list.read(shard)
        answers = {row: _bad_url(words) for row, words in enumerate(listed.faults) if words is not None}
        wanted = [(row, url) for row, url in enumerate(listed.urls) if row not in answers]
        answers |= shared_worker().run(wanted, self._settings())

        rows, failed = [], Counter[str]()
        for row, url in enumerate(listed.urls):
            columns, picture = answers[row].columns, answers[row].picture
            key = self.key(shard, row)
            if columns["status"] != "success":
                failed[columns["failure"]] += 1
            rows.append(
                {
                    **columns,
                    "image_id": image_id(self.options.dataset, key),
                    "dataset": self.options.dataset,
                    "key": key,
                    "url": url,
                    "source": "web",
                    "captions": listed.captions[row],
                    "error_message": None
                    if (words := columns.get("error_message")) is None
                    else storable(words),
                    "image": {"bytes": picture, "path": f"{key}.{self.options.encode_format}"}
                    if picture
                    else None,
                }
            )
        table = IMAGES.table(rows)
        for name in listed.extra.column_names:
            column = listed.extra[name]
            if name == "license":
                place = table.schema.get_field_index(name)
                table = table.set_column(place, table.schema.field(name), _as_text(column))
            else:
                table = table.append_column(pa.field(name, column.type), column)
        return Produced(
            table, Counts(len(rows), len(rows) - failed.total(), {}, dict(sorted(failed.items())))
        )

    def key(self, shard: int, row: int) -> str:
        """img2dataset's key (its `compute_key`): the shard's number, then the row's within it, zero-padded."""
        digits = math.ceil(math.log10(self.options.number_sample_per_shard))
        return f"{10**digits * shard + row:0{digits + SHARD_DIGITS}d}"

    def _settings(self) -> Settings:
        options = self.options
        token = options.user_agent_token.strip()
        program = f"capfilt/{capfilt.__version__}"
        values: dict[str, Any] = {
            name: getattr(options, name, None) for name in Settings.__dataclass_fields__
        }
        values["user_agent"] = program if token.lower() in ("", "capfilt") else f"{token} {program}"
        # As img2dataset's Downloader prepares them for its comparison with the header.
        values["user_agent_token"] = token.lower()
        values["disallowed_header_directives"] = [
            directive.strip().lower() for directive in options.disallowed_header_directives
        ]
        return Settings.of(values)


def _bad_url(words: str) -> Row:
    return Row({"status": "failed_to_download", "failure": "bad_url", "error_message": words}, b"")


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.chunked_array(
            [pa.array([None if v is None else str(v) for v in column.to_pylist()], pa.string())]
        )


def _check(options: DownloadOptions) -> None:
    """Raise UserError for the first option that cannot be."""
    for name in ("url_list", "dataset", "url_col"):
        if getattr(options, name).strip("\0") == "":
            raise UserError(f"download: {_flag(name)} must be given")
    if os.sep in options.dataset:
        raise UserError(f"--dataset {options.dataset!r}: give a name; --out names a directory")
    for name, allowed in (("resize_mode", RESIZE_MODES), ("encode_format", ENCODE_FORMATS)):
        if getattr(options, name) not in allowed:
            raise UserError(f"{_flag(name)} {getattr(options, name)!r}: choose {', '.join(allowed)}")
    for name in ("image_size", "number_sample_per_shard", "thread_count", "max_bytes", "max_pixels"):
        if getattr(options, name) < 1:
            raise UserError(f"{_flag(name)} {getattr(options, name)}: give at least 1")
    for name in ("timeout", "total_timeout"):
        if not 0 < getattr(options, name) < float("inf"):
            raise UserError(f"{_flag(name)} {getattr(options, name)}: give seconds above 0")
    for name in ("retries", "min_image_size"):
        if getattr(options, name) < 0:
            raise UserError(f"{_flag(name)} {getattr(options, name)}: give 0 or more")
    if not options.max_aspect_ratio >= 1:
        raise UserError(f"--max-aspect-ratio {options.max_aspect_ratio}: give at least 1")
    # cv2 takes PNG's number as a compression level, and img2dataset refuses levels it has not.
    most = 9 if options.encode_format == "png" else 100
    if not 0 <= options.encode_quality <= most:
        what = "for png it is the compression level, " if options.encode_format == "png" else ""
        raise UserError(f"--encode-quality {options.encode_quality}: {what}give 0 to {most}")
    AddressPolicy.of(options.allow_host, options.allow_private)
    for column in options.save_additional_columns:
        if column in IMAGES.schema.names and column != "license":
            raise UserError(
                f"--save-additional-columns {column}: the images table has a column {column!r} of its own; "
                "rename it in the list"
            )
        if options.save_additional_columns.count(column) > 1:
            raise UserError(f"--save-additional-columns {column}: named twice")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
