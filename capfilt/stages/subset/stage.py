"""`subset`: a share of an images part, with noise of known kinds planted in its texts.

The column `planted` (list<string>, beside `captions`) says of each text what was done to it. Nothing but `grade`
reads it. The kinds:

    true         the text as found
    other_image  a text of another image of the same share and shard, drawn uniformly; none of another share, whose texts
                 a filter may have learned
    truncated    the first half of the words, "..." after them
    file_name    what a camera calls its files
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from capfilt.errors import UserError
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.inputs import input_hashes, shards_of
from capfilt.stages.subset import SubsetOptions
from capfilt.tables.contracts import IMAGES
from capfilt.tables.ids import image_id
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace

_READ = ["image_id", "key", "captions", "split", "status", "failure"]

KINDS = ("true", "other_image", "truncated", "file_name")


def place(image: str) -> float:
    """Where an image stands in [0, 1), by a hash of its id: the same in every run."""
    return int.from_bytes(hashlib.blake2b(image.encode(), digest_size=7).digest(), "little") / 2**56


class Subset(ShardStage):
    """Rows in are images; those of other splits or outside the share are dropped, the rest kept."""

    name = "subset"
    version = 3  # texts of other images are of the same share
    contract = IMAGES

    def __init__(self, options: SubsetOptions, workspace: Workspace, output: Part | None = None) -> None:
        if options.share_from >= options.share_to:
            raise UserError(
                f"--share-from {options.share_from:g}: give less than --share-to {options.share_to:g}"
            )
        if options.wrong + options.truncated + options.file_name > 1:
            raise UserError("--wrong, --truncated and --file-name are shares: at most 1 together")
        self.options = options
        self.images = workspace.input("images", options.images)
        self.output = workspace.dataset("images", options.dataset, output)
        if self.output.path == self.images.path:
            raise UserError(f"--dataset {options.dataset}: is the part that is read; name another")

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": option_values(self.options),
            "dataset": self.options.dataset,
            "images": self.images.info["fingerprint"],
        }

    def shards(self) -> list[int]:
        return shards_of(self.images)

    def inputs(self, shard: int) -> list[str]:
        return input_hashes(shard, self.images)

    def process(self, shard: int) -> Produced:
        o = self.options
        rng = np.random.default_rng([o.seed, shard])
        donors = self._donors(shard)
        tables: list[pa.Table] = []
        dropped: Counter[str] = Counter()
        failed: Counter[str] = Counter()
        rows_in = kept = 0
        for batch in self.images.batches(shard):
            made, taken = [], []
            for number, row in enumerate(batch.select(_READ).to_pylist()):
                rows_in += 1
                if not self._within(row):
                    other = o.splits and row["split"] not in o.splits
                    dropped["other_split" if other else "outside_share"] += 1
                    continue
                made.append(self._planted(row, donors, rng))
                taken.append(number)
                if row["status"] == "success":
                    kept += 1
                else:
                    failed[row["failure"] or "decode_error"] += 1
            if made:
                tables.append(_changed(pa.Table.from_batches([batch]).take(taken), made))
        table = pa.concat_tables(tables) if tables else IMAGES.table([])
        return Produced(table, Counts(rows_in, kept, dict(dropped), dict(failed)))

    def _within(self, row: dict[str, Any]) -> bool:
        o = self.options
        return (not o.splits or row["split"] in o.splits) and o.share_from <= place(
            row["image_id"]
        ) < o.share_to

    def _donors(self, shard: int) -> list[tuple[str, str]]:
        table = self.images.read(shard, ["image_id", "captions", "split"]).to_pylist()
        return [(row["image_id"], text) for row in table if self._within(row) for text in row["captions"]]

    def _planted(
        self, row: dict[str, Any], donors: list[tuple[str, str]], rng: np.random.Generator
    ) -> dict[str, Any]:
        o = self.options
        captions = row["captions"][: o.texts] if o.texts else row["captions"]
        draw = rng.random()
        kind = "true"
        if draw < o.wrong:
            kind = "other_image"
        elif draw < o.wrong + o.truncated:
            kind = "truncated"
        elif draw < o.wrong + o.truncated + o.file_name:
            kind = "file_name"
        texts = [self._text(kind, text, row["image_id"], donors, rng) for text in captions]
        return {
            "image_id": image_id(o.dataset, row["key"]),
            "dataset": o.dataset,
            "source": o.role,
            "captions": [text for text, _ in texts],
            "planted": [kind for _, kind in texts],
        }

    @staticmethod
    def _text(
        kind: str, text: str, image: str, donors: list[tuple[str, str]], rng: np.random.Generator
    ) -> tuple[str, str]:
        if kind == "other_image":
            for _ in range(20):
                other, found = donors[int(rng.integers(len(donors)))]
                if other != image and found != text:
                    return found, kind
            return text, "true"  # a shard of one image has no other to take from
        if kind == "truncated":
            words = text.split()
            return " ".join(words[: max(1, len(words) // 2)]) + "...", kind
        if kind == "file_name":
            return f"DSC_{int(rng.integers(10_000)):04d}.JPG", kind
        return text, kind


def _changed(table: pa.Table, rows: list[dict[str, Any]]) -> pa.Table:
    """`table` with the columns that `rows` has in the place of its own; all others as they are, whatever their types."""
    types = {field.name: field.type for field in IMAGES.schema} | {"planted": pa.list_(pa.string())}
    for name in rows[0]:
        field = pa.field(name, types[name])
        values = pa.array([row[name] for row in rows], field.type)
        place = table.schema.get_field_index(name)
        table = table.append_column(field, values) if place < 0 else table.set_column(place, field, values)
    return IMAGES.conform(table)
