"""`subset`: a share of an images part, with noise of known kinds planted in its texts.

The column `planted` (list<string>, beside `captions`) says of each text what was done to it. Nothing but `grade`
reads it. The kinds:

    true          the text as found
    other_image   a text of a donor, drawn uniformly from all donors' texts but those that equal one of the image's own
    truncated     the first half of the words, "..." after them
    file_name     what a camera calls its files
    changed_word  one word swapped for another that the donors' texts have in the same place (`words.py`)

Donors are the images of the share that is kept, from all shards, or a share set aside: never an image of another share, as a
look-up among its texts would find the noise. A text that no donor has another for stays true, and is counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from capfilt.errors import UserError
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.inputs import input_hashes, shards_of
from capfilt.stages.subset import SubsetOptions
from capfilt.stages.subset.words import Swaps
from capfilt.tables.contracts import IMAGES
from capfilt.tables.ids import image_id
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace

_READ = ["image_id", "key", "captions", "split", "status", "failure"]
_DRAWS = 20
"""Donors tried before all are looked through: only where nearly all texts are the image's own do so many fail."""

Donors = list[tuple[str, str]]


def place(image: str) -> float:
    """Where an image stands in [0, 1), by a hash of its id: the same in every run."""
    return int.from_bytes(hashlib.blake2b(image.encode(), digest_size=7).digest(), "little") / 2**56


class Subset(ShardStage):
    """Rows in are images; those of other splits or outside the share are dropped, the rest kept."""

    name = "subset"
    version = 3  # donors are of the share that is kept, or of one set aside, in all shards
    contract = IMAGES

    def __init__(self, options: SubsetOptions, workspace: Workspace, output: Part | None = None) -> None:
        if options.share_from >= options.share_to:
            raise UserError(
                f"--share-from {options.share_from:g}: give less than --share-to {options.share_to:g}"
            )
        if options.wrong + options.truncated + options.file_name + options.changed_word > 1:
            raise UserError(
                "--wrong, --truncated, --file-name and --changed-word are shares: at most 1 together"
            )
        if options.donors_from or options.donors_to:
            if options.donors_from >= options.donors_to:
                raise UserError(
                    f"--donors-from {options.donors_from:g}: give less than --donors-to {options.donors_to:g}"
                )
            if options.donors_from < options.share_to and options.share_from < options.donors_to:
                raise UserError(
                    f"--donors-from {options.donors_from:g} --donors-to {options.donors_to:g}: overlaps the share that is "
                    f"kept, {options.share_from:g} to {options.share_to:g}; set other images aside"
                )
        self.options = options
        self.images = workspace.input("images", options.images)
        self.output = workspace.dataset("images", options.dataset, output)
        if self.output.path == self.images.path:
            raise UserError(f"--dataset {options.dataset}: is the part that is read; name another")

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": option_values(self.options),
            "dataset": self.options.dataset,
            # Donors are of all shards: a new shard may change a row of any.
            "images": self.images.digest() if self._plants else self.images.info["fingerprint"],
        }

    @property
    def _plants(self) -> bool:
        """Whether texts of donors are needed."""
        return self.options.wrong + self.options.changed_word > 0

    def shards(self) -> list[int]:
        shards = shards_of(self.images)
        # Here, so that donors are read once and travel to workers.
        if self._plants and not self._donors:
            raise UserError(
                f"{self.images.path}: has no texts in the share that wrong texts come from; widen --share-from to --share-to, "
                "or --donors-from to --donors-to"
            )
        return shards

    @cached_property
    def _donors(self) -> Donors:
        """(image, text) for every text that may become another image's, in the part's order."""
        o = self.options
        start, end = (o.donors_from, o.donors_to) if o.donors_to else (o.share_from, o.share_to)
        return [
            (row["image_id"], text)
            for table in self.images.tables(["image_id", "captions", "split"])
            for row in table.to_pylist()
            if (not o.splits or row["split"] in o.splits) and start <= place(row["image_id"]) < end
            for text in row["captions"]
            if text.strip()
        ]

    @cached_property
    def _swaps(self) -> Swaps:
        return Swaps(text for _, text in self._donors)

    def inputs(self, shard: int) -> list[str]:
        return input_hashes(shard, self.images)

    def process(self, shard: int) -> Produced:
        o = self.options
        rng = np.random.default_rng([o.seed, shard])
        tables: list[pa.Table] = []
        dropped: Counter[str] = Counter()
        failed: Counter[str] = Counter()
        left: Counter[str] = Counter()
        rows_in = kept = 0
        for batch in self.images.batches(shard):
            made, taken = [], []
            for number, row in enumerate(batch.select(_READ).to_pylist()):
                rows_in += 1
                if o.splits and row["split"] not in o.splits:
                    dropped["other_split"] += 1
                    continue
                if not o.share_from <= place(row["image_id"]) < o.share_to:
                    dropped["outside_share"] += 1
                    continue
                made.append(self._planted(row, rng, left))
                taken.append(number)
                if row["status"] == "success":
                    kept += 1
                else:
                    failed[row["failure"] or "decode_error"] += 1
            if made:
                tables.append(_changed(pa.Table.from_batches([batch]).take(taken), made))
        table = pa.concat_tables(tables) if tables else IMAGES.table([])
        return Produced(
            table,
            Counts(rows_in, kept, dict(dropped), dict(failed)),
            {"left_true": dict(left)} if left else {},
        )

    def remarks(self) -> list[str]:
        left: Counter[str] = Counter()
        for shard in self.output.shards():
            left.update(self.output.stats(shard).get("left_true", {}))
        return [
            f"{count:,} texts stay true in place of {kind}: no donor has another text or word for them"
            for kind, count in sorted(left.items())
        ]

    def _planted(self, row: dict[str, Any], rng: np.random.Generator, left: Counter[str]) -> dict[str, Any]:
        """The changed columns of a row; `left` counts the texts that should have been changed and could not."""
        o = self.options
        captions = row["captions"][: o.texts] if o.texts else row["captions"]
        draw, kind = rng.random(), "true"
        for name, share in (
            ("other_image", o.wrong),
            ("truncated", o.truncated),
            ("file_name", o.file_name),
            ("changed_word", o.changed_word),
        ):
            if 0 <= draw < share:
                kind = name
            draw -= share
        texts = [self._text(kind, text, row, rng) for text in captions]
        if None in texts:
            left[kind] += texts.count(None)
        return {
            "image_id": image_id(o.dataset, row["key"]),
            "dataset": o.dataset,
            "source": o.role,
            "captions": [old if new is None else new for new, old in zip(texts, captions, strict=True)],
            "planted": ["true" if new is None else kind for new in texts],
        }

    def _text(self, kind: str, text: str, row: dict[str, Any], rng: np.random.Generator) -> str | None:
        """The text that takes the place of `text`; None where there is none."""
        if kind == "other_image":
            return self._other(row, rng)
        if kind == "changed_word":
            return self._swaps.changed(text, row["captions"], rng)
        if kind == "truncated":
            words = text.split()
            return " ".join(words[: max(1, len(words) // 2)]) + "..."
        if kind == "file_name":
            return f"DSC_{int(rng.integers(10_000)):04d}.JPG"
        return text

    def _other(self, row: dict[str, Any], rng: np.random.Generator) -> str | None:
        """A text of another image that is none of the row's own."""
        donors, own = self._donors, set(row["captions"])
        for _ in range(_DRAWS):
            image, found = donors[int(rng.integers(len(donors)))]
            if image != row["image_id"] and found not in own:
                return found
        others = [found for image, found in donors if image != row["image_id"] and found not in own]
        return others[int(rng.integers(len(others)))] if others else None


def _changed(table: pa.Table, rows: list[dict[str, Any]]) -> pa.Table:
    """`table` with the columns that `rows` has in the place of its own; all others as they are, whatever their types."""
    types = {field.name: field.type for field in IMAGES.schema} | {"planted": pa.list_(pa.string())}
    for name in rows[0]:
        field = pa.field(name, types[name])
        values = pa.array([row[name] for row in rows], field.type)
        place = table.schema.get_field_index(name)
        table = table.append_column(field, values) if place < 0 else table.set_column(place, field, values)
    return IMAGES.conform(table)
