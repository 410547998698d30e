"""The `ingest` stage: pictures and texts made by other tools become an images part.

Which formats there are is `capfilt/formats`. Here each picture is looked at: it decodes, or its row says why not.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from PIL import Image

from capfilt.data.images import BadImage, decode, encode_jpeg, encode_png, phash, sha256
from capfilt.errors import UserError
from capfilt.formats.files import MAX_FILE_BYTES, read_file
from capfilt.formats.source import SourceRow, counted, open_source
from capfilt.formats.values import CAPTION_COLUMNS, check_further, storable
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.ingest import IngestOptions
from capfilt.stages.pictures import read_header
from capfilt.tables.contracts import IMAGES
from capfilt.tables.ids import image_id
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace

KEPT_FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats stored byte for byte as they were found, when the picture is upright, of KEPT_MODES, opaque and not to be shrunk."""

KEPT_MODES = ("RGB", "L")
"""Pillow's names for pixels that every reader sees as capfilt does."""


class Ingest(ShardStage):
    """Brings other tools' pictures and texts in. Every picture of the source is one row, in the source's order.

    A picture that has to be encoded again (turned by EXIF, too large, in another format, transparent, of 16 bits, ...) is
    stored as the models see it: a PNG as a PNG, unless it is shrunk, anything else as a JPEG. Its `sha256` stays that of the
    bytes as found.
    """

    name = "ingest"
    version = 3
    contract = IMAGES
    reads_manifests = False

    def __init__(self, options: IngestOptions, workspace: Workspace, output: Part | None = None) -> None:
        _check(options)
        self.options = options
        self.output = workspace.dataset("images", options.dataset, output)
        self.source = open_source(options.source_path, options.format, options)
        self._hashes: dict[int, str] = {}

    def identity(self) -> Mapping[str, Any]:
        named = {"options": option_values(self.options), "source": self.source.digest()}
        mixed = self.source.mixed_types()
        # Absent where all files agree, as before files could differ.
        return named | ({"types": mixed} if mixed else {})

    def shards(self) -> list[int]:
        return list(range(self.source.shard_count()))

    def expected_rows(self, shard: int) -> int:
        return self.source.count(shard)

    def inputs(self, shard: int) -> list[str]:
        # Of the very bytes the rows were made from, where this process made them.
        if shard not in self._hashes:
            digest = hashlib.sha256()
            for row in self.source.read(shard).rows:
                _note(digest, row, _read(row))
            return [digest.hexdigest()]
        return [self._hashes[shard]]

    def process(self, shard: int) -> Produced:
        digest = hashlib.sha256()
        rows, failed = [], Counter[str]()
        found = self.source.read(shard)
        for row in found.rows:
            body = _read(row)
            _note(digest, row, body)
            columns = self._columns(row, body)
            if columns["failure"] is not None:
                failed[columns["failure"]] += 1
            rows.append(columns)
        self._hashes[shard] = digest.hexdigest()
        table = IMAGES.table(rows)
        for field in found.further.schema:
            table = table.append_column(field, found.further.column(field.name))
        counts = Counts(len(rows), len(rows) - failed.total(), {}, dict(sorted(failed.items())))
        texts = sum(len(row["captions"]) for row in rows if row["failure"] is None)
        return Produced(table, counts, {"texts": texts, "left_out": dict(found.left_out)})

    def remarks(self) -> list[str]:
        stats = [self.output.stats(shard) for shard in self.output.shards()]
        if not all("texts" in each for each in stats):
            return []
        texts = sum(each["texts"] for each in stats)
        left_out = sum((Counter(each["left_out"]) for each in stats), Counter[str]())
        lines = [f"{self.output.counts().kept:,} images, {texts:,} texts", *self.source.remarks()]
        if not texts and self.options.caption_col != ("",):
            lines.append(
                f"no image has a text: no .txt beside it, no field {', '.join(CAPTION_COLUMNS)}; name one by --caption-col"
            )
        if left_out:
            lines.append(f"not read: {counted(left_out)}")
        return lines

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
        plain = header.upright and header.mode in KEPT_MODES and not header.transparent
        if not fits:
            picture.thumbnail((most, most), Image.Resampling.LANCZOS)
        if fits and plain and header.format in KEPT_FORMATS:
            stored, suffix = body, header.format.lower().replace("jpeg", "jpg")
        elif fits and header.format == "PNG":
            stored, suffix = encode_png(picture), "png"
        else:
            stored, suffix = encode_jpeg(picture), "jpg"
        known = row.original_width is not None and row.original_height is not None
        return {
            "image": {"bytes": stored, "path": f"{Path(row.key).stem}.{suffix}"},
            "width": picture.width,
            "height": picture.height,
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
    check_further(options.save_additional_columns, IMAGES.schema.names)
