"""Row groups of parts to pairs: which texts a row group has, and how many, without reading all texts again.

Which texts can be trained on is decided in `examples.py`; their order and their batches are `pairs.py`'s.

The counts of a shard are taken once and kept in the part's record, `00000.pairs.json`, sealed. They are derived: the file may
be deleted at any time, and a shard that changed is counted again.
"""

from __future__ import annotations

import os
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capfilt.data.examples import (
    CAPTIONS_NEEDED,
    IMAGES_NEEDED,
    PAIRS_NEEDED,
    TRAINING_SPLITS,
    Entry,
    Text,
    caption_entries,
    image_entries,
    pair_entries,
    picture_entries,
    slices,
    usable,
    weighed,
)
from capfilt.data.rows import IMAGE_ROWS, PAIR_ROWS, TEXT_ROWS
from capfilt.errors import RunError, UserError
from capfilt.tables.publish import replace
from capfilt.tables.sealed import seal, unseal
from capfilt.tables.shards import Part

K = TypeVar("K")
V = TypeVar("V")

RULE = 1
"""Of which texts count; raised when `examples.py` decides otherwise, so that shards are counted again."""
VERDICT_COLUMNS = ("text_id", "image_id", "source", "text", "keep")
DROPPED = "dropped"
"""The source of pictures that stay though a rule dropped their texts."""
PROBABILITIES = ("match_probability", "itm_score")
_KEPT, _BELOW = "_at_threshold", "_below_threshold"
_OPEN_FILES = 64


@dataclass(frozen=True)
class PairInput:
    """A part to read pairs from: of images (their found texts), of pairs, or of images joined with verdicts.

    Texts alone come from captions as well.
    """

    part: Part
    verdicts: Part | None = None


class RowGroup(NamedTuple):
    """One row group of one shard of one input."""

    source: int
    shard: int
    group: int


@dataclass(frozen=True)
class Counted:
    """The contents of a shard, counted.

    Attributes:
        texts: of each row group, how many usable texts each source has.
        images: of each row group, how many pictures have a usable text.
        skipped, deselected: how much is left out for a fault, or without a fault, by reason.
        weights: of each row group, the source and the weight of every usable text, in order; empty where all weights are 1.
    """

    texts: list[dict[str, int]]
    images: list[int]
    skipped: dict[str, int]
    deselected: dict[str, int]
    weights: list[list[tuple[str, float]]] = field(default_factory=list)


class PairShards:
    """Reads the row groups of inputs; some files and verdicts are kept open for the next look.

    `rows` says as what: pairs, or pictures or texts alone. A picture alone counts as one text. `dropped` says whether a picture
    whose texts are all below the threshold of its verdicts stays: with an empty text of the source DROPPED.
    """

    def __init__(self, inputs: Sequence[PairInput], rows: str = PAIR_ROWS, dropped: bool = False) -> None:
        self.inputs, self.rows, self.dropped = list(inputs), rows, dropped
        self._files: OrderedDict[tuple[int, int], pq.ParquetFile] = OrderedDict()
        self._kept: OrderedDict[tuple[int, int], tuple[dict[str, list[Text]], int]] = OrderedDict()

    def counted(self) -> Iterator[tuple[int, int, Counted]]:
        """(input, shard, counts) of every shard, in order. Shards that nobody counted yet are counted first.

        Ranks begin with different shards and find those of the others done.
        """
        every = [(number, shard) for number, given in enumerate(self.inputs) for shard in given.part.shards()]
        mixed = random.Random(os.getpid()).sample(every, len(every))
        found = {which: self._remembered(*which) for which in mixed}
        return ((*which, found[which]) for which in every)

    def entries(
        self,
        where: RowGroup,
        pictures: bool,
        skipped: Counter[str] | None = None,
        deselected: Counter[str] | None = None,
    ) -> list[Entry]:
        """The usable rows of a row group with their texts; pixels only where asked for."""
        given = self.inputs[where.source]
        file = self._file(where.source, where.shard)
        name = given.part.info["table"]
        needed = {"images": IMAGES_NEEDED, "pairs": PAIRS_NEEDED, "captions": CAPTIONS_NEEDED}[name]
        if given.verdicts is not None or self.rows == IMAGE_ROWS:
            needed = ("image_id", "image")
        wanted = [column for column in needed if pictures or column != "image"]
        names = set(file.schema_arrow.names)
        asked = ("split", "status", "failure", *(("source",) if self.rows == IMAGE_ROWS else ()))
        optional = [column for column in asked if column not in wanted and name != "captions"]
        table = pa.table(
            file.read_row_group(where.group, columns=[c for c in (*wanted, *optional) if c in names])
        )
        if name == "pairs" and not pictures and self.rows != IMAGE_ROWS:
            weighed(table, f"{given.part.path}, shard {where.shard:05d}")
        skipped = Counter() if skipped is None else skipped
        deselected = Counter() if deselected is None else deselected
        rows = [row for some in slices([table], name, wanted, optional) for row in some]
        if self.rows == IMAGE_ROWS:
            entries = picture_entries(rows)
        elif given.verdicts is not None:
            kept, _ = self._verdicts(where.source, where.shard)
            entries = [Entry(row, kept.get(row["image_id"], [])) for row in rows]
        else:
            made = {"images": image_entries, "pairs": pair_entries, "captions": caption_entries}
            entries = made[name](rows)
        return list(usable(entries, TRAINING_SPLITS, skipped, deselected, self.rows))

    def _file(self, number: int, shard: int) -> pq.ParquetFile:
        return _cached(
            self._files, (number, shard), lambda: self.inputs[number].part.open(shard), _OPEN_FILES
        )

    def _verdicts(self, number: int, shard: int) -> tuple[dict[str, list[Text]], int]:
        """The kept texts of a shard by image, those of pictures that stay without, and how many texts were not kept."""

        def read() -> tuple[dict[str, list[Text]], int]:
            kept: dict[str, list[Text]] = {}
            verdicts = self.inputs[number].verdicts
            if verdicts is None or shard not in verdicts.shards():
                return kept, 0
            # The rule says which score weighs its texts.
            weight = verdicts.info["identity"].get("options", {}).get("weight", "")
            columns = None if self.dropped else [*VERDICT_COLUMNS, *([weight] if weight else [])]
            table = verdicts.read(shard, columns)
            chosen = table.filter(pc.field("keep"))
            for row in chosen.to_pylist():
                likely = 1.0 if row["source"] == "human" else _probability(row, _KEPT)
                text = Text(row["text"], row["source"], row["text_id"], _weight(row, weight), likely)
                kept.setdefault(row["image_id"], []).append(text)
            if self.dropped:
                left = pc.and_(pc.invert(table["keep"]), pc.ends_with(table["reason"], _BELOW))
                for image_id, text in self._left(table.filter(left)).items():
                    kept.setdefault(image_id, [text])
            return kept, table.num_rows - chosen.num_rows

        return _cached(self._kept, (number, shard), read, 16)

    @staticmethod
    def _left(table: pa.Table) -> dict[str, Text]:
        """By image, what stands for its dropped texts: the likeliest of them."""
        found: dict[str, Text] = {}
        for row in table.to_pylist():
            text = Text("", DROPPED, row["text_id"], 1.0, _probability(row, _BELOW), False)
            if text.probability > found.setdefault(row["image_id"], text).probability:
                found[row["image_id"]] = text
        return found

    # ------------------------------------------------------------------ counts

    def _remembered(self, number: int, shard: int) -> Counted:
        given = self.inputs[number]
        keeper = given.verdicts or given.part
        path = keeper.record / f"{shard:05d}.{self.rows}{'.dropped' if self.dropped else ''}.json"
        mark = {"rule": RULE, "rows": [_hash_of(given.part, shard), _hash_of(given.verdicts, shard)]}
        with suppress(OSError, ValueError, TypeError):
            stands = unseal(path.read_bytes())
            if stands.pop("mark") == mark:
                return Counted(**stands)
        counted = self._count(number, shard)
        # A part that may only be read is counted every time.
        with suppress(RunError):
            replace(path, seal({"mark": mark, **asdict(counted)}))
        return counted

    def _count(self, number: int, shard: int) -> Counted:
        skipped, deselected = Counter[str](), Counter[str]()
        texts, images, weights = [], [], []
        for group in range(self._file(number, shard).num_row_groups):
            entries = self.entries(RowGroup(number, shard, group), False, skipped, deselected)
            texts.append(dict(Counter(text.source for entry in entries for text in entry.texts)))
            weights.append([(text.source, text.weight) for entry in entries for text in entry.texts])
            images.append(0 if self.rows == TEXT_ROWS else len(entries))
        if self.inputs[number].verdicts is not None:
            kept, deselected["verdict"] = self._verdicts(number, shard)
            here = set(self._file(number, shard).read(columns=["image_id"])["image_id"].to_pylist())
            skipped["no_image"] += sum(
                text.kept for key, some in kept.items() if key not in here for text in some
            )
        if all(weight == 1 for some in weights for _, weight in some):
            weights = []
        return Counted(texts, images, dict(+skipped), dict(+deselected), weights)


def _weight(row: dict[str, Any], name: str) -> float:
    """A human text has no score, and counts in full."""
    found = row.get(name)
    return 1.0 if found is None else float(found)


def _probability(row: dict[str, Any], decided: str) -> float:
    """The score that a rule decided by, where that is a probability; 0 elsewhere."""
    by = (row.get("reason") or "").removesuffix(decided)
    return float(row[by]) if by in PROBABILITIES and row[by] is not None else 0.0


def _hash_of(part: Part | None, shard: int) -> str:
    manifest = part.manifest(shard) if part is not None else None
    return manifest.sha256 if manifest is not None else ""


_ONE = {PAIR_ROWS: "pair", IMAGE_ROWS: "picture", TEXT_ROWS: "text"}


def refusal(given: PairInput, left_out: Counter[str], rows: str = PAIR_ROWS) -> UserError:
    """The error about an input that gives nothing to train on, with the reasons."""
    joined = f" with {given.verdicts.path}" if given.verdicts is not None else ""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(left_out.items()) if count)
    return UserError(
        f"{given.part.path}{joined}: gives no training {_ONE[rows]} (left out: {reasons or 'nothing, it is empty'}); name "
        "another part, or leave it out"
    )


def _cached(kept: OrderedDict[K, V], key: K, make: Callable[[], V], most: int) -> V:
    """`kept[key]`, made where it is missing; the least recently asked for go first."""
    if key in kept:
        kept.move_to_end(key)
        return kept[key]
    kept[key] = make()
    while len(kept) > most:
        kept.popitem(last=False)
    return kept[key]
