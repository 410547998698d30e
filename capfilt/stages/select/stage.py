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
from capfilt.stages.select.captions import bare, common_captions, faults, named_words
from capfilt.stages.select.rules import BETTER_KEPT, EACH, FALLBACK, FOUND_KEPT, decided, ranked
from capfilt.tables.contracts import IMAGES, PAIRS, SCORES, SOURCES, VERDICTS
from capfilt.tables.manifest import Counts
from capfilt.tables.sealed import fingerprint
from capfilt.tables.shards import Part
from capfilt.tables.texts import FOUND_COLUMNS, TEXT_SCHEMA, texts_of
from capfilt.tables.workspace import Workspace

_RANGES = {"itm_score": (0, 1), "match_probability": (0, 1), "itc_score": (-1, 1)}
"""From where to where the table's own scores are; a plug-in's are anywhere."""

PROBABILITY = "match_probability"
STATS = ("named_words", "named_words_kept", "synthetic_without_score")
"""Of pictures with a kept synthetic text: named words of their found texts, and those that synthetic texts say. And synthetic
texts without a score."""
_KEY = ("image_id", "text_id")
_OF_IMAGES = (*_KEY, "source", "captions", "image", "status", "failure", "error_message")
"""Columns of images that `--require` does not name: texts have them too, or they are not of the picture."""

_TABLES = ("texts", "images", "scores")
"""The tables that `--require` may name, beside one for each signals part."""


class Select(ShardStage):
    """Writes a verdict for every text: keep or drop, with the reason.

    By default web and synthetic texts are judged independently; both, one or none of an image's texts may be kept (BLIP,
    section 3.3, and its author's answers on the threshold). `rules.py` has the other rules.
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
        if options.rule == EACH and options.best != SelectOptions.best:
            raise UserError(
                f"--best {options.best}: ranks nothing with --rule {EACH}; give --rule best or fallback"
            )
        self.options = options
        self.distinct = options.distinct or options.rule != EACH or options.caption_share > 0
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
        for name in ("threshold", "synthetic_threshold"):
            if not least <= (asked := getattr(options, name)) <= most:
                raise UserError(
                    f"--{name.replace('_', '-')} {asked:g}: {self.by} is from {least} to {most}; give such a number"
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

        The share is of the texts that have a score and that nothing but their score can drop: of found texts alone where
        synthetic ones are their fallback (Nguyen et al., section 4), or have a threshold of their own. With ties at the
        quantile every tied text is kept, so a little more than the fraction may be. It is part of the identity, so it is
        found before the stage travels to workers, and travels along.
        """
        if not (self.options.keep_fraction or self.options.precision):
            return self.options.threshold
        by = self.by
        judged = (each.filter(each["counts"]) for each in map(self._judged, self.shards()))
        if self.options.rule == FALLBACK or self.options.synthetic_threshold:
            judged = (each.filter(pc.not_equal(each["source"], "synthetic")) for each in judged)
        values = np.concatenate([each[by].to_numpy() for each in judged])
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

    @cached_property
    def common(self) -> frozenset[str]:
        """The captions, without case and signs, that too many pictures have; found and taken along as `threshold` is."""
        if not self.options.caption_share:
            return frozenset()
        columns = ["image_id", "text"]
        shards = (
            pa.concat_tables([part.read(shard, columns) for part in self.captions]) for shard in self.shards()
        )
        pairs = (
            zip(each["image_id"].to_pylist(), map(bare, each["text"].to_pylist()), strict=True)
            for each in (shards if self.captions else ())
        )
        return common_captions(pairs, self.options.caption_share)

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": {**option_values(self.options, without=("pairs",)), "by": self.by},
            "threshold": self.threshold,
            **({"common": fingerprint({"texts": sorted(self.common)})} if self.options.caption_share else {}),
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
        return [*self._outcome(), *self._told_of_captions()]

    def _told_of_captions(self) -> list[str]:
        """Lines on the synthetic texts, of the stats of all shards."""
        said = Counter[str]()
        for shard in self.output.shards() if self.captions else ():
            said.update({name: count for name, count in self.output.stats(shard).items() if name in STATS})
        lines = []
        if words := said["named_words"]:
            lines.append(
                f"kept synthetic texts say {said['named_words_kept']:,} of {words:,} named words and numbers of the found texts"
            )
        if unscored := said["synthetic_without_score"]:
            lines.append(f"warning: {unscored:,} synthetic texts have no {self.by}: dropped as no_score")
        return lines

    def _outcome(self) -> list[str]:
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
        if self.distinct:
            others.append(self._faults(judged, value, pc.coalesce(failure, lost, *others)))
        judged = judged.append_column("counts", pc.is_null(pc.coalesce(wrong, *others)))
        return judged.append_column("reason", pc.coalesce(failure, lost, *others))

    def _faults(self, texts: pa.Table, value: pa.ChunkedArray, reason: pa.ChunkedArray) -> pa.Array:
        """The fault of each synthetic text that nothing else drops, else null."""
        images, said = texts["image_id"].to_pylist(), [bare(text) for text in texts["text"].to_pylist()]
        synthetic = pc.equal(texts["source"], "synthetic").to_numpy()
        able = np.flatnonzero(synthetic & pc.is_null(reason).to_numpy())
        found = ((images[row], said[row]) for row in np.flatnonzero(~synthetic))
        order = ranked(able, value.cast(pa.float64()).to_numpy(), texts["text_id"].to_pylist())
        wrong = faults(order, images, said, found, self.common)
        return pa.array([wrong.get(row) for row in range(texts.num_rows)], pa.string())

    def process(self, shard: int) -> Produced:
        judged, by, o = self._judged(shard), self.by, self.options
        synthetic = pc.equal(judged["source"], "synthetic")
        own = bool(o.synthetic_threshold)
        threshold = pc.if_else(synthetic, o.synthetic_threshold if own else self.threshold, self.threshold)
        value = judged[by].cast(pa.float64())
        enough = pc.fill_null(pc.greater_equal(value, threshold), False)
        able = pc.and_(pc.is_null(judged["reason"]), enough)
        images, ids = (judged[name].to_pylist() for name in ("image_id", "text_id"))
        by_rule = decided(
            o.rule, o.best, images, ids, synthetic.to_numpy(), value.to_numpy(), able.to_numpy()
        )
        ruled = pa.array(by_rule, pa.string())
        beaten = pc.fill_null(pc.is_in(ruled, value_set=pa.array([FOUND_KEPT, BETTER_KEPT])), False)
        keep = pc.and_not(able, beaten)
        cut = pc.if_else(synthetic, "synthetic_threshold" if own else "threshold", "threshold")
        by_score = pc.binary_join_element_wise(by, pc.if_else(enough, "at", "below"), cut, "_")
        reason = pc.coalesce(judged["reason"], ruled, by_score)
        failed = pc.is_valid(judged["failure"])
        table = judged.drop_columns(["failure", "counts", "reason"]).append_column("keep", keep)
        counts = Counts(
            judged.num_rows,
            pc.sum(keep).as_py() or 0,
            _tally(reason.filter(pc.invert(pc.or_(keep, failed)))),
            _tally(reason.filter(failed)),
        )
        table = self.contract.conform(table.append_column("reason", reason))
        return Produced(table, counts, _words_kept(table) if self.captions else {})


def _words_kept(verdicts: pa.Table) -> dict[str, int]:
    """STATS of the verdicts of a shard."""
    synthetic = pc.equal(verdicts["source"], "synthetic")
    written = verdicts.filter(pc.and_(synthetic, verdicts["keep"]))
    said: dict[str, set[str]] = {}
    for image, text in zip(written["image_id"].to_pylist(), written["text"].to_pylist(), strict=True):
        said.setdefault(image, set()).update(bare(text).split())
    found = verdicts.filter(
        pc.and_(pc.invert(synthetic), pc.is_in(verdicts["image_id"], written["image_id"]))
    )
    named: dict[str, set[str]] = {}
    for image, text in zip(found["image_id"].to_pylist(), found["text"].to_pylist(), strict=True):
        named.setdefault(image, set()).update(named_words(text))
    unscored = pc.and_(synthetic, pc.equal(verdicts["reason"], "no_score"))
    counts = (
        sum(map(len, named.values())),
        sum(len(words & said[image]) for image, words in named.items()),
        pc.sum(unscored).as_py() or 0,
    )
    return dict(zip(STATS, counts, strict=True))


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
