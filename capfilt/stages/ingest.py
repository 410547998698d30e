"""The `ingest` stage: pictures and texts made by other tools become an images part.

Which layouts there are is `tables/formats.py`. Here each picture is looked at: it decodes, or its row says why not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from capfilt.data.images import BadImage, decode, encode_jpeg, phash, sha256
from capfilt.errors import UserError
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.options import IngestOptions
from capfilt.stages.pictures import read_header
from capfilt.tables.contracts import IMAGES
from capfilt.tables.formats import (
    MAX_FILE_BYTES,
    Reading,
    SourceRow,
    arrow_column,
    open_source,
    read_file,
    storable,
)
from capfilt.tables.ids import image_id
from capfilt.tables.shards import Counts, Part
from capfilt.tables.workspace import Workspace

KEPT_FORMATS = ("JPEG", "PNG", "WEBP")
"""What is stored byte for byte as it was found, when it is upright and not to be shrunk."""


class Ingest(ShardStage):
    """Brings other tools' pictures and texts in. Every picture of the source is one row, in the source's order.

    A picture that has to be encoded again (turned by EXIF, too large, in another format) becomes a JPEG.
    """

    name = "ingest"
    version = 2
    contract = IMAGES
    reads_manifests = False

    def __init__(self, options: IngestOptions, workspace: Workspace, output: Part | None = None) -> None:
        _check(options)
        self.options = options
        self.output = output or workspace.part("images", options.dataset)
        self.source = open_source(
            options.source_path,
            options.format,
            Reading(
                images=Path(options.images).expanduser() if options.images else None,
                image_col=options.image_col,
                caption_cols=options.caption_col,
                extra=options.save_additional_columns,
                splits=options.splits,
                split=options.split or None,
                limit=options.limit,
                shard_size=options.shard_size,
            ),
        )
        self._hashes: dict[int, str] = {}

    def identity(self) -> Mapping[str, Any]:
        return {"options": option_values(self.options), "source": self.source.digest()}

    def shards(self) -> list[int]:
        return list(range(self.source.shard_count()))

    def expected_rows(self, shard: int) -> int:
        return self.source.count(shard)

    def inputs(self, shard: int) -> list[str]:
        # Of the very bytes the rows were made from, where this process made them.
        if shard not in self._hashes:
            digest = hashlib.sha256()
            for row in self.source.rows(shard):
                _note(digest, row, _read(row))
            return [digest.hexdigest()]
        return [self._hashes[shard]]

    def process(self, shard: int) -> Produced:
        digest = hashlib.sha256()
        rows, failed = [], Counter[str]()
        found = self.source.rows(shard)
        for row in found:
            body = _read(row)
            _note(digest, row, body)
            columns = self._columns(row, body)
            if columns["failure"] is not None:
                failed[columns["failure"]] += 1
            rows.append(columns)
        self._hashes[shard] = digest.hexdigest()
        table = IMAGES.table(rows)
        for name, type_ in self.source.extra_types().items():
            table = table.append_column(
                pa.field(name, type_), arrow_column((row.extra.get(name) for row in found), type_)
            )
        return Produced(
            table, Counts(len(rows), len(rows) - failed.total(), {}, dict(sorted(failed.items())))
        )

    def _columns(self, row: SourceRow, body: bytes | tuple[str, str] | None) -> dict[str, Any]:
        columns: dict[str, Any] = {
            "image_id": image_id(self.options.dataset, row.key),
            "dataset": self.options.dataset,
            "key": row.key,
            "url": row.url,
            "source": self.options.source,
            "captions": list(row.captions),
            "split": row.split,
            "status": row.status,
            "failure": row.failure,
            "error_message": row.message,
            "license": row.license,
            "original_width": row.original_width,
            "original_height": row.original_height,
            "sha256": row.sha256,
        }
        if row.status != "success":
            return columns
        if not isinstance(body, bytes):
            failure, message = body or ("file_missing", "the source has no picture for this row")
            return columns | _failure(failure, message)
        columns["sha256"] = row.sha256 or sha256(body)
        try:
            return columns | self._picture(row, body)
        except BadImage as bad:
            return columns | _failure(bad.failure, bad.message)
        except Exception as error:  # noqa: BLE001 - a picture that trips Pillow's encoder is a row, not the end of the shard
            return columns | _failure("decode_error", f"{type(error).__name__}: {error}")

    def _picture(self, row: SourceRow, body: bytes) -> dict[str, Any]:
        most = self.options.max_side
        picture = decode(
            body,
            max_pixels=self.options.max_pixels,
            max_bytes=MAX_FILE_BYTES,
            draft_size=2 * most if most else None,
        )
        header = read_header(body)
        perceptual = phash(picture)
        fits = not most or max(header.width, header.height) <= most
        if fits and header.upright and header.format in KEPT_FORMATS:
            stored, width, height = body, header.width, header.height
            suffix = header.format.lower().replace("jpeg", "jpg")
        else:
            if not fits:
                picture.thumbnail((most, most), Image.Resampling.LANCZOS)
            stored, (width, height), suffix = encode_jpeg(picture), picture.size, "jpg"
        known = row.original_width is not None and row.original_height is not None
        return {
            "image": {"bytes": stored, "path": f"{Path(row.key).stem}.{suffix}"},
            "width": width,
            "height": height,
            "original_width": row.original_width if known else header.width,
            "original_height": row.original_height if known else header.height,
            "phash": perceptual,
        }


def _read(row: SourceRow) -> bytes | tuple[str, str] | None:
    if row.picture is not None:
        return row.picture
    return read_file(row.file) if row.file is not None else None


def _note(digest: Any, row: SourceRow, body: bytes | tuple[str, str] | None) -> None:
    """Add everything that decides a row's columns to a running hash."""
    described = astuple(replace(row, file=None, picture=None, extra={}))
    for part in (
        json.dumps([described, row.extra], default=str).encode(),
        body if isinstance(body, bytes) else b"",
    ):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _failure(failure: str, message: str) -> dict[str, Any]:
    return {"status": "failed_to_resize", "failure": failure, "error_message": storable(message[:500])}


def _check(options: IngestOptions) -> None:
    """Raise UserError for the first option that cannot be."""
    if options.source_path.strip("\0") == "":
        raise UserError("ingest: SOURCE_PATH must be given")
    if options.dataset.strip("\0") == "":
        raise UserError("ingest: --dataset must be given")
    if os.sep in options.dataset:
        raise UserError(f"--dataset {options.dataset!r}: give a name; --out names a directory")
    for name in options.save_additional_columns:
        if name in IMAGES.schema.names:
            raise UserError(
                f"--save-additional-columns {name}: the images table has a column {name!r} of its own; rename it first"
            )
        if options.save_additional_columns.count(name) > 1:
            raise UserError(f"--save-additional-columns {name}: named twice")
