"""`select`: a rule turns scores into verdicts, and verdicts into the corpus. Pure data work: no model, no GPU.

Two shard stages: `Select` writes verdicts (no pixels), `WritePairs` the kept images with their kept texts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.calibration.share import threshold_for
from capfilt.errors import UserError
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.inputs import captions_of, input_hashes, of_images, rows_for, shards_of
from capfilt.stages.require import SECONDS, Requirement
from capfilt.stages.select import SelectOptions
from capfilt.tables.contracts import IMAGES, PAIRS, SCORES, SOURCES, VERDICTS
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part
from capfilt.tables.texts import FOUND_COLUMNS, TEXT_SCHEMA, texts_of
from capfilt.tables.workspace import Workspace

_RANGES = {"itm_score": (0, 1), "match_probability": (0, 1), "itc_score": (-1, 1)}
"""From where to where the table's own scores are; a plug-in's are anywhere."""

PROBABILITY = "match_probability"
_KEY = ("image_id", "text_id")
_OF_IMAGES = (*_KEY, "source", "captions", "image", "status", "failure", "error_message")
"""Columns of images that `--require` does not name: texts have them too, or they are not of the picture."""

_TABLES = ("texts", "images", "scores")
"""The tables that `--require` may name, beside one for each signals part."""


class Select(ShardStage):
    """Writes a verdict for every text: keep or drop, with the reason.

    Web and synthetic texts are judged independently; both, one or none of an image's texts may be kept (BLIP,
    section 3.3, and its author's answers on the threshold).
    """

    name = "select"
    accounts = "texts"
    version = 2  # a score that is not finite is a failure, and none of those that --keep-fraction counts
    seconds = SECONDS

    def __init__(self, options: SelectOptions, workspace: Workspace, output: Part | None = None) -> None:
        if not options.sources:
            raise UserError(f"--sources: choose among {', '.join(SOURCES)}")
        cuts = {name: getattr(options, name) for name in ("threshold", "keep_fraction", "precision")}
        given = [name for name, value in cuts.items() if value != getattr(SelectOptions, name)]
        if len(given) > 1:
            one, other = (f"--{name.replace('_', '-')} {cuts[name]:g}" for name in given[:2])
            raise UserError(f"{one}, {other}: each finds the texts to keep; give one of them")
        if options.signals and not options.require:
            raise UserError(f"--signals {options.signals[0]}: is read for --require alone; give both")
        self.options = options
        # Before the inputs are looked at, which may not be there yet when a recipe's steps are checked.
        self.require = Requirement(options.require, self.seconds) if options.require else None
        self.images = workspace.input("images", options.images)
        self.captions = [workspace.input("captions", name) for name in options.captions]
        self.scores = workspace.input("scores", options.scores)
        self.output = output or workspace.part("verdicts", options.out)
        self.signals = {part.name: part for part in (workspace.input("signals", n) for n in options.signals)}
        names = [name.lower() for name in (*_TABLES, *self.signals)]
        if len({*names}) < len(_TABLES) + len(options.signals):
            raise UserError(
                f"--signals {' '.join(options.signals)}: --require names each by the last part of its path, so these must "
                f"differ, from {', '.join(_TABLES)} too"
            )
        contract = self.scores.contract
        # A plug-in tells which columns it fills; the others of its part are null.
        filled = self.scores.info.get("identity", {}).get("columns") or []
        # A calibrated part has a probability, and no itm_score to take the default for.
        unsaid = options.by == SelectOptions.by and options.by not in filled
        self.by = PROBABILITY if unsaid and PROBABILITY in filled else options.by
        choices = filled or SCORES.score_names
        for name, score in (("by", self.by), *([("weight", options.weight)] if options.weight else [])):
            if score not in contract.score_names or score not in choices:
                raise UserError(
                    f"--{name} {score!r}: {self.scores.path} has {', '.join(choices)}; choose one"
                )
        if options.weight and _RANGES.get(options.weight) != (0, 1):
            raise UserError(
                f"--weight {options.weight}: a weight is from 0 to 1; give {PROBABILITY} or itm_score"
            )
        if options.precision and self.by != PROBABILITY:
            raise UserError(
                f"--precision {options.precision:g}: needs {PROBABILITY}, which `capfilt calibrate` gives"
            )
        least, most = _RANGES.get(self.by, (-math.inf, math.inf))
        if not least <= options.threshold <= most:
            raise UserError(
                f"--threshold {options.threshold:g}: {self.by} is from {least} to {most}; give such a number"
            )
        used = [
            name
            for name in dict.fromkeys((self.by, options.weight))
            if name and name not in VERDICTS.score_names
        ]
        self.contract = VERDICTS.extended({name: contract.doc_of(name) for name in used})
        if self.require:
            self.require.bind(self._tables(self.require.names))

    def _tables(self, names: Iterable[str]) -> dict[str, list[pa.Schema]]:
        """The tables that --require may name some of `names` of, each with the schemas of its shards."""
        images = [_without(IMAGES.schema, *_OF_IMAGES)]
        tables = {
            "texts": [_without(TEXT_SCHEMA, "failure")],
            "images": images,
            "scores": [_without(self.scores.contract.schema, *_KEY, "failure")],
            **{
                name: [_without(each, *_KEY) for each in part.schemas()]
                for name, part in self.signals.items()
            },
        }
        known = {name.lower() for schemas in tables.values() for schema in schemas for name in schema.names}
        # Columns carried along are named in the footers of the shards alone, which take long to read where there are many.
        if {*names} - known - {name.lower() for name in tables}:
            images += [_without(each, *_OF_IMAGES) for each in self.images.schemas()]
        return tables

    @cached_property
    def threshold(self) -> float:
        """The score from which a text is kept: given, or the quantile that keeps `keep_fraction`, or that of `precision`.

        The share is of the texts that have a score and that nothing but their score can drop. With ties at the quantile
        every tied text is kept, so a little more than the fraction may be. It is part of the identity, so it is found before
        the stage travels to workers, and travels along.
        """
        if not (self.options.keep_fraction or self.options.precision):
            return self.options.threshold
        by = self.by
        judged = map(self._judged, self.shards())
        values = np.concatenate([each.filter(each["counts"])[by].to_numpy() for each in judged])
        if not len(values):
            raise UserError(
                f"{self.scores.path}: no text that may be kept has an {by}, so there is no quantile"
            )
        if self.options.precision:
            # Where no set of texts has such a mean, nothing is kept: no probability is above 1.
            return min(threshold_for(values, self.options.precision), 2.0)
        # The k-th largest score, counted exactly: a quantile function would interpolate or round.
        place = len(values) - max(1, round(self.options.keep_fraction * len(values)))
        return float(np.partition(values, place)[place])

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": {**option_values(self.options, without=("pairs",)), "by": self.by},
            "threshold": self.threshold,
            "images": self.images.info["fingerprint"],
            "captions": [part.info["fingerprint"] for part in self.captions],
            "scores": self.scores.info["fingerprint"],
            # Absent where it was not asked for, as before there was any.
            **(
                {"signals": {n: p.info["fingerprint"] for n, p in self.signals.items()}}
                if self.signals
                else {}
            ),
        }

    def _parts(self) -> list[Part]:
        return [self.images, *self.captions, self.scores, *self.signals.values()]

    def shards(self) -> list[int]:
        return shards_of(*self._parts())

    def inputs(self, shard: int) -> list[str]:
        return input_hashes(shard, *self._parts())

    def remarks(self) -> list[str]:
        counts, by = self.output.counts(), self.by
        if counts.kept:
            return (
                []
                if self.by == self.options.by
                else [f"judged by {by} (--by), kept from {self.threshold:.4g} on"]
            )
        unmet = counts.dropped.get("require_false", 0) + counts.dropped.get("require_null", 0)
        if unmet and not counts.dropped.get(f"{by}_below_threshold"):
            null = counts.dropped.get("require_null", 0)
            return [
                f"nothing is kept: --require is true of none of {unmet:,} scored texts, and null of {null:,}"
            ]
        column = pa.chunked_array(
            [chunk for table in self.output.tables([by]) for chunk in table[by].chunks], pa.float32()
        )
        count = len(column) - column.null_count
        if not count:
            return [f"nothing is kept: no text has an {by}; were these texts scored?"]
        least, most = pc.min_max(column).as_py().values()
        if self.options.precision:
            return [
                (
                    f"nothing is kept: the likeliest of {count:,} texts has a {by} of {most:.4g}, so no set has a mean of "
                    f"{self.options.precision:g} (--precision)"
                )
            ]
        return [
            (
                f"nothing is kept: {by} of {count:,} texts is between {least:.4g} and {most:.4g}, the threshold "
                f"{self.threshold:.4g}; --keep-fraction 0.3 keeps the best three in ten"
            )
        ]

    def _judged(self, shard: int) -> pa.Table:
        """The texts of a shard with their scores.

        `reason` is what drops a text whatever its score, `failure` how it failed; `counts` is whether --keep-fraction is of it.
        """
        named = self.require.columns["images"].names if self.require else ()
        images = self.images.read(shard, [*FOUND_COLUMNS, "status", *named])
        texts = texts_of(images, captions_of(self.images, images["image_id"], self.captions, shard))
        scores = rows_for(texts, self.scores.read(shard), self.scores, shard)
        ids = images["image_id"]
        images = images.drop_columns(["captions"]).take(pc.index_in(texts["image_id"], value_set=ids))
        value = scores[self.by]
        wrong = _where(pc.invert(pc.is_finite(value)), "not_finite")
        failure = pc.coalesce(texts["failure"], scores["failure"], wrong)
        lost = _where(pc.not_equal(images["status"], "success"), "no_image")
        others = [
            _where(
                pc.invert(pc.is_in(texts["source"], pa.array(self.options.sources))), "source_not_selected"
            ),
            _where(pc.is_null(value), "no_score"),
        ]
        if self.require:
            tables = {"texts": texts, "images": images, "scores": scores}
            for name, part in self.signals.items():
                rows = part.read(shard, [*_KEY, *self.require.columns[name].names])
                tables[name] = rows_for(texts, of_images(rows, part, self.images, ids, shard), part, shard)
            holds = self.require.holds(tables)
            others += [_where(pc.invert(holds), "require_false"), _where(pc.is_null(holds), "require_null")]
        judged = texts.set_column(texts.column_names.index("failure"), "failure", failure)
        for name in {*self.contract.score_names} & {*scores.column_names}:
            judged = judged.append_column(name, scores[name])
        judged = judged.append_column("counts", pc.is_null(pc.coalesce(wrong, *others)))
        return judged.append_column("reason", pc.coalesce(failure, lost, *others))

    def process(self, shard: int) -> Produced:
        judged, by = self._judged(shard), self.by
        enough = pc.fill_null(pc.greater_equal(judged[by].cast(pa.float64()), self.threshold), False)
        keep = pc.and_(pc.is_null(judged["reason"]), enough)
        by_score = pc.if_else(enough, f"{by}_at_threshold", f"{by}_below_threshold")
        reason = pc.coalesce(judged["reason"], by_score)
        failed = pc.is_valid(judged["failure"])
        table = judged.drop_columns(["failure", "counts", "reason"]).append_column("keep", keep)
        counts = Counts(
            judged.num_rows,
            pc.sum(keep).as_py() or 0,
            _tally(reason.filter(pc.invert(pc.or_(keep, failed)))),
            _tally(reason.filter(failed)),
        )
        return Produced(self.contract.conform(table.append_column("reason", reason)), counts)


def _without(schema: pa.Schema, *names: str) -> pa.Schema:
    return pa.schema([field for field in schema if field.name not in names])


def _where(test: pa.ChunkedArray, reason: str) -> pa.ChunkedArray:
    """`reason` for each row where the test is true, else null."""
    return pc.if_else(pc.fill_null(test, False), reason, pa.scalar(None, pa.string()))


def _tally(reasons: pa.ChunkedArray) -> dict[str, int]:
    return {each["values"]: each["counts"] for each in pc.value_counts(reasons).to_pylist()}


class WritePairs(ShardStage):
    """Writes the corpus: each image with at least one kept text, its pixels and its kept texts."""

    name = "select-pairs"
    version = 1
    contract = PAIRS

    def __init__(self, options: SelectOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.weight = options.weight
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
                {
                    "text": row["text"],
                    "source": row["source"],
                    "itm_score": row["itm_score"],
                    "weight": row[self.weight] if self.weight and row[self.weight] is not None else 1.0,
                }
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
