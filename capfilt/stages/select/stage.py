"""`select`: a rule turns scores into verdicts, and verdicts into the corpus. Pure data work: no model, no GPU.

Two shard stages: `Select` writes verdicts (no pixels), `WritePairs` the kept images with their kept texts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.errors import UserError
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.inputs import captions_of, input_hashes, shards_of
from capfilt.stages.select import SelectOptions
from capfilt.tables.contracts import PAIRS, SCORES, SOURCES, VERDICTS
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part
from capfilt.tables.texts import FOUND_COLUMNS, texts_of
from capfilt.tables.workspace import Workspace

_RANGES = {"itm_score": (0, 1), "itm_probability": (0, 1), "itc_score": (-1, 1)}
"""From where to where the table's own scores are; a plug-in's are anywhere."""


class Select(ShardStage):
    """Writes a verdict for every text: keep or drop, with the reason.

    Web and synthetic texts are judged independently; both, one or none of an image's texts may be kept (BLIP,
    section 3.3, and its author's answers on the threshold).
    """

    name = "select"
    accounts = "texts"
    version = 2  # a score that is not finite is a failure, and none of those that --keep-fraction counts

    def __init__(self, options: SelectOptions, workspace: Workspace, output: Part | None = None) -> None:
        if not options.sources:
            raise UserError(f"--sources: choose among {', '.join(SOURCES)}")
        if options.keep_fraction and options.threshold != SelectOptions.threshold:
            raise UserError(
                f"--keep-fraction {options.keep_fraction:g} finds the threshold; give it or --threshold, not both"
            )
        self.options = options
        self.workspace = workspace
        self.images = workspace.input("images", options.images)
        self.captions = [workspace.input("captions", name) for name in options.captions]
        self.scores = workspace.input("scores", options.scores)
        self.output = output or workspace.part("verdicts", options.out)
        self.duplicates = workspace.input("signals", options.duplicates) if options.duplicates else None
        if self.duplicates is not None and self.duplicates.info.get("stage") != "duplicates":
            raise UserError(f"--duplicates {options.duplicates}: {self.duplicates.path} is of another stage")
        contract = self.scores.contract
        # A plug-in tells which columns it fills; the others of its part are null.
        choices = self.scores.info.get("identity", {}).get("columns") or SCORES.score_names
        if options.by not in contract.score_names or options.by not in choices:
            raise UserError(f"--by {options.by!r}: {self.scores.path} has {', '.join(choices)}; choose one")
        least, most = _RANGES.get(options.by, (-math.inf, math.inf))
        if not least <= options.threshold <= most:
            raise UserError(
                f"--threshold {options.threshold:g}: {options.by} is from {least} to {most}; give such a number"
            )
        used = {} if options.by in VERDICTS.score_names else {options.by: contract.doc_of(options.by)}
        self.contract = VERDICTS.extended(used)

    @cached_property
    def threshold(self) -> float:
        """The score from which a text is kept: given, or the quantile that keeps `keep_fraction`.

        The share is of the texts that have a score and that nothing but their score can drop. With ties at the quantile
        every tied text is kept, so a little more than the fraction may be. It is part of the identity, so it is found before
        the stage travels to workers, and travels along.
        """
        if not self.options.keep_fraction:
            return self.options.threshold
        import duckdb

        with duckdb.connect() as connection:
            self._put_candidates(connection)
            row = connection.execute("SELECT count(*) FROM candidates").fetchone()
            count = int(row[0]) if row else 0
            if not count:
                raise UserError(
                    f"{self.scores.path}: no text of {', '.join(self.options.sources)} has an {self.options.by}, so there "
                    "is no quantile of it"
                )
            # The k-th largest score, counted exactly: a quantile function would interpolate or round.
            place = max(1, round(self.options.keep_fraction * count))
            row = connection.execute(
                "SELECT value FROM candidates ORDER BY 1 DESC LIMIT 1 OFFSET ?", [place - 1]
            ).fetchone()
        assert row is not None
        return float(row[0])

    def _put_candidates(self, connection: Any) -> None:
        """Makes the table `candidates`: the scores (`value`) of all texts that may be kept."""
        by = self.options.by
        kinds = {"first": pa.bool_(), "value": pa.float32()}
        wanted: dict[str, tuple[list[Part], tuple[str, ...]]] = {
            "scored": ([self.scores], ("text_id", "image_id", by)),
            "pictures": ([self.images], ("image_id", "source")),
            "chosen": (self.captions, ("text_id",)),
            "others": (self._scored_captions(), ("text_id",)),
            "copies": ([self.duplicates] if self.duplicates else [], ("image_id", "first")),
        }
        for name, (parts, columns) in wanted.items():
            names = ["value" if column == by else column for column in columns]
            schema = pa.schema([(each, kinds.get(each, pa.string())) for each in names])
            connection.register("incoming", schema.empty_table())
            connection.execute(f"CREATE TABLE {name} AS FROM incoming")
            # Not by DuckDB from the files: it checks no page of theirs.
            for table in (table for part in parts for table in part.tables(columns)):
                connection.register("incoming", table.select(columns).rename_columns(names).cast(schema))
                connection.execute(f"INSERT INTO {name} FROM incoming")
            connection.unregister("incoming")
        # What was found with the pictures is whatever no captioner wrote.
        connection.execute(
            """
            CREATE TABLE candidates AS
            SELECT value FROM scored JOIN pictures USING (image_id)
            WHERE isfinite(value)
              AND image_id NOT IN (SELECT image_id FROM copies WHERE NOT first)
              AND CASE
                    WHEN text_id IN (SELECT text_id FROM chosen) THEN 'synthetic'
                    WHEN text_id IN (SELECT text_id FROM others) THEN 'not asked for'
                    ELSE source
                  END IN (SELECT unnest($sources))
            """,
            {"sources": list(self.options.sources)},
        )

    def _scored_captions(self) -> list[Part]:
        """The captions parts whose texts were scored and are not to be judged. Raises UserError where one is gone."""
        ours = {part.info["fingerprint"] for part in self.captions}
        scored = [mark for mark in self.scores.info["identity"].get("captions", ()) if mark not in ours]
        if not scored:
            return []
        here = {part.info["fingerprint"]: part for part in self.workspace.parts("captions")}
        if any(mark not in here for mark in scored):
            raise UserError(
                f"{self.scores.path}: scores captions that are neither named nor in {self.workspace.path}, so their share "
                "cannot be told from the others'; name them with --captions"
            )
        return [here[mark] for mark in scored]

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": option_values(self.options, without=("pairs",)),
            "threshold": self.threshold,
            "images": self.images.info["fingerprint"],
            "captions": [part.info["fingerprint"] for part in self.captions],
            "scores": self.scores.info["fingerprint"],
            # Absent where it was not asked for, as before there was any.
            **({"duplicates": self.duplicates.info["fingerprint"]} if self.duplicates else {}),
        }

    def _parts(self) -> list[Part]:
        return [self.images, *self.captions, self.scores, *([self.duplicates] if self.duplicates else [])]

    def shards(self) -> list[int]:
        return shards_of(*self._parts())

    def inputs(self, shard: int) -> list[str]:
        return input_hashes(shard, *self._parts())

    def _later_copies(self, shard: int) -> set[str]:
        """The images of a shard that show what another, kept in their place, shows."""
        if self.duplicates is None:
            return set()
        table = self.duplicates.read(shard, ["image_id", "first"])
        rows = zip(table["image_id"].to_pylist(), table["first"].to_pylist(), strict=True)
        return {image for image, first in rows if first is False}

    def remarks(self) -> list[str]:
        if self.output.counts().kept:
            return []
        by = self.options.by
        column = pa.chunked_array(
            [chunk for table in self.output.tables([by]) for chunk in table[by].chunks], pa.float32()
        )
        count = len(column) - column.null_count
        if not count:
            return [f"nothing is kept: no text has an {by}; were these texts scored?"]
        least, most = pc.min_max(column).as_py().values()
        return [
            (
                f"nothing is kept: {by} of {count:,} texts is between {least:.4g} and {most:.4g}, the threshold "
                f"{self.threshold:.4g}; --keep-fraction 0.3 keeps the best three in ten"
            )
        ]

    def process(self, shard: int) -> Produced:
        images = self.images.read(shard, [*FOUND_COLUMNS, "status", "failure"])
        captions = captions_of(self.images, images["image_id"], self.captions, shard)
        rows = texts_of(images, captions).to_pylist()
        fetched = dict(zip(images["image_id"].to_pylist(), images["status"].to_pylist(), strict=True))
        copies = self._later_copies(shard)
        scores = {row["text_id"]: row for row in self.scores.read(shard).to_pylist()}
        dropped: Counter[str] = Counter()
        failed: Counter[str] = Counter()
        kept = 0
        for row in rows:
            score = scores.get(row["text_id"], {})
            failure = row.pop("failure") or score.get("failure")
            row |= {name: score.get(name) for name in self.contract.score_names}
            row["keep"], row["reason"] = False, ""
            value = score.get(self.options.by)
            if not failure and value is not None and not math.isfinite(value):
                failure = "not_finite"
            if failure:
                row["reason"] = failure
                failed[failure] += 1
                continue
            if fetched.get(row["image_id"]) != "success":
                row["reason"] = "no_image"
            elif row["image_id"] in copies:
                row["reason"] = "duplicate"
            elif row["source"] not in self.options.sources:
                row["reason"] = "source_not_selected"
            elif value is None:
                row["reason"] = "no_score"
            elif value < self.threshold:
                row["reason"] = f"{self.options.by}_below_threshold"
            else:
                row["keep"], row["reason"] = True, f"{self.options.by}_at_threshold"
                kept += 1
                continue
            dropped[row["reason"]] += 1
        return Produced(self.contract.table(rows), Counts(len(rows), kept, dict(dropped), dict(failed)))


class WritePairs(ShardStage):
    """Writes the corpus: each image with at least one kept text, its pixels and its kept texts."""

    name = "select-pairs"
    version = 1
    contract = PAIRS

    def __init__(self, options: SelectOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.images = workspace.input("images", options.images)
        self.verdicts = workspace.part("verdicts", options.out)
        self.output = output or workspace.part("pairs", options.out)

    def identity(self) -> Mapping[str, Any]:
        return {
            "images": self.images.info["fingerprint"],
            "verdicts": self.verdicts.expect("verdicts").info["fingerprint"],
        }

    def shards(self) -> list[int]:
        return shards_of(self.images, self.verdicts)

    def inputs(self, shard: int) -> list[str]:
        return input_hashes(shard, self.images, self.verdicts)

    def process(self, shard: int) -> Produced:
        texts: dict[str, list[dict[str, Any]]] = {}
        verdicts = self.verdicts.read(shard)
        for row in verdicts.filter(verdicts["keep"]).to_pylist():
            texts.setdefault(row["image_id"], []).append(
                {"text": row["text"], "source": row["source"], "itm_score": row["itm_score"], "weight": 1.0}
            )
        tables = []
        dropped: Counter[str] = Counter()
        rows_in = kept = 0
        taken = [name for name in PAIRS.schema.names if name != "texts"]
        for batch in self.images.batches(shard, [*taken, "status"]):
            table = pa.Table.from_batches([batch])
            rows_in += table.num_rows
            mask = []
            for image, status in zip(table["image_id"].to_pylist(), table["status"].to_pylist(), strict=True):
                keep = image in texts and status == "success"
                mask.append(keep)
                kept += keep
                if not keep:
                    dropped["no_kept_text" if status == "success" else "no_image"] += 1
            table = table.filter(pa.array(mask, pa.bool_())).select(taken)
            column = pa.array(
                [texts[image] for image in table["image_id"].to_pylist()], PAIRS.schema.field("texts").type
            )
            tables.append(table.append_column("texts", column))
        table = PAIRS.conform(pa.concat_tables(tables)) if tables else PAIRS.table([])
        return Produced(table, Counts(rows_in, kept, dict(dropped)))
