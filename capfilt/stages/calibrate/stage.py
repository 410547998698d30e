"""The last stage of `calibrate`: a fit on human pairs, the corpus's share of true pairs, and a probability per text.

No model: it reads what `judge.py` wrote. Not here: the arithmetic (`capfilt.calibration`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.calibration.judgement import Judgement, Known, judged, judged_synthetic
from capfilt.errors import UserError
from capfilt.plugins.registry import score_contract
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.calibrate import CalibrateOptions
from capfilt.stages.calibrate.held_out import LEAST_IMAGES, check_unseen
from capfilt.stages.calibrate.judging import AGREEMENT, COSINE, HUB, MATCH, MEANINGS, UNKNOWN, WORDS, Judging
from capfilt.stages.inputs import captions_of, input_hashes, shards_of
from capfilt.tables.calibrations import FILE, read
from capfilt.tables.ids import fold_of
from capfilt.tables.manifest import Counts
from capfilt.tables.publish import replace
from capfilt.tables.sealed import seal
from capfilt.tables.shards import Part
from capfilt.tables.texts import FOUND_COLUMNS, texts_of
from capfilt.tables.workspace import Workspace

PROBABILITY = "match_probability"
MEANING = "probability that the text belongs to the picture, in [0, 1]; docs/calibration.md says when a synthetic one has it"
LEAST_AREA = 0.75
"""ROC-AUC of synthetic texts against the same with a word changed, below which they have no probability: the filter is weak or
the captioner often wrong, and even odds would be a guess. On the quickstart's world it is 0.86, and the error 0.05; with
captioner and filter of 40 steps it is 0.53, and the error 0.47 (benchmarks/generated_texts.py)."""
SETTLED_SHARE, SETTLED_TEXTS = 0.02, 0.95
"""A round that moves the share by less, or leaves more of the likely texts as they were, is the last."""
NOT_FUSED = (WORDS, UNKNOWN)
"""Signals of the text alone, which the texts of other pictures have alike: fused where asked for only."""

Floats = npt.NDArray[np.float64]


class Calibrate(ShardStage):
    """Writes a row per judged text: `match_probability` and the signals behind it.

    A synthetic text has a probability only where texts of the same captioner were judged with calibration pictures.
    """

    name = "calibrate"
    version = 3  # signals are fused
    accounts = "texts"

    def __init__(self, options: CalibrateOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.options, self.workspace = options, workspace
        self.images = workspace.input("images", options.images)
        self.captions = [workspace.input("captions", name) for name in options.captions]
        self.held_out = workspace.input("images", options.calibration)
        self.judged = workspace.part("scores", f"{options.judged_as}-judged")
        self.pairs = workspace.part("signals", f"{options.judged_as}-pairs")
        self.signals = Judging(options, workspace, self.images).columns
        columns = {PROBABILITY: MEANING, **{name: MEANINGS[name] for name in self.signals}}
        self.contract = score_contract(columns)
        self.output = output or workspace.part("scores", options.out)
        self.previous = workspace.input("scores", options.previous) if options.previous else None
        if self.previous and read(self.previous) is None:
            raise UserError(
                f"--previous {options.previous}: has no calibration; give a part that calibrate wrote"
            )

    @cached_property
    def fused(self) -> list[str]:
        """The signals that become the score."""
        asked = self.options.signals or [name for name in self.signals if name not in NOT_FUSED]
        if absent := [name for name in asked if name not in self.signals]:
            raise UserError(
                f"--signals {' '.join(absent)}: is not among those that these options give: {', '.join(self.signals)}"
            )
        return [name for name in self.signals if name in asked]

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": option_values(
                self.options, without=("judged", "batch_size", "precision", "draft", "compile")
            ),
            "columns": [PROBABILITY, *self.signals],
            "fused": self.fused,
            # The share is of the whole part.
            "judged": self.judged.expect("scores").digest(),
            "pairs": self.pairs.expect("signals").digest(),
            **({"previous": self.previous.digest()} if self.previous else {}),
        }

    def shards(self) -> list[int]:
        return shards_of(self.images, self.judged)

    def inputs(self, shard: int) -> list[str]:
        return input_hashes(shard, self.images, self.judged)

    def begin(self) -> str:
        # Before the part is begun, so that what cannot be calibrated leaves none, and before it travels to workers.
        mark = self.output.identity_fingerprint(self.contract, self.name, self.full_identity())
        made = read(self.output) if self.output.exists else None
        if made is None or made.get("mark") != mark:
            made = {"mark": mark, **self._fit()}
        self.fitted = made
        begun = super().begin()
        replace(self.output.record / FILE, seal(made))
        return begun

    def process(self, shard: int) -> Produced:
        scores = self.judged.read(shard)
        found = self.images.read(shard, FOUND_COLUMNS)
        texts = texts_of(found, captions_of(self.images, found["image_id"], self.captions, shard))
        source = texts["source"].take(pc.index_in(scores["text_id"], value_set=texts["text_id"]))
        synthetic = pc.fill_null(pc.equal(source, "synthetic"), False).to_numpy()
        values = self.judgement.probabilities(_matrix(scores, self.fused))
        written = scores.filter(pa.array(synthetic))
        values[synthetic] = (
            self.synthetic.probabilities(_matrix(written, self.telling)) if self.synthetic else np.nan
        )
        null = np.isnan(values)
        column = pa.array(values, pa.float32(), mask=null)
        folds = [fold_of(image, self.options.folds) for image in scores["image_id"].to_pylist()]
        table = scores.append_column(PROBABILITY, column)
        table = table.set_column(table.schema.get_field_index("fold"), "fold", pa.array(folds, pa.int32()))
        failed = Counter(scores["failure"].drop_null().to_pylist())
        dropped = (
            int((synthetic & scores["failure"].is_null().to_numpy()).sum()) if self.synthetic is None else 0
        )
        kept = scores.num_rows - dropped - failed.total()
        reasons = {"synthetic_not_calibrated": dropped} if dropped else {}
        return Produced(self.contract.conform(table), Counts(scores.num_rows, kept, reasons, dict(failed)))

    def expected_rows(self, shard: int) -> int:
        manifest = self.judged.manifest(shard)
        return manifest.rows if manifest else 0

    def remarks(self) -> list[str]:
        made = read(self.output)
        if made is None:
            return []
        low, high = made["share_interval"]
        lines = [
            (
                f"share of true pairs: {made['share']:.3f} [{low:.3f}, {high:.3f}], at most {made['share_bound']:.3f}; "
                f"{made['share_near']:.3f} if all wrong texts were of like pictures "
                f"({made['images']:,} calibration images, calibration error {made['error']:.3f})"
            ),
            f"ROC-AUC of calibration pairs: {made['auc']:.3f}, against texts of like pictures {made['auc_near']:.3f}",
        ]
        lines += [
            f"{name}: ROC-AUC {found['auc']:.3f} and {found['auc_near']:.3f}, weight {found['weight']:+.2f}"
            for name, found in made["signals"].items()
        ]
        if found := made.get("synthetic"):
            lines.append(
                f"synthetic texts: ROC-AUC {found['auc']:.3f} against those of other pictures, {found['auc_near']:.3f} "
                f"against the same with a word changed; calibration error {found['error']:.3f}"
            )
        if self.previous:
            lines.append(self._progress(made))
        lines += [
            f"p >= {each['threshold']:g} keeps {each['kept']:.1%}, of which {each['precision']:.1%} are expected to be true"
            for each in made["cuts"]
            if each["precision"] is not None
        ]
        return lines + [f"warning: {line}" for line in made["warnings"]]

    def _progress(self, made: Mapping[str, Any]) -> str:
        """How far this round is from the one before, and whether a further one is worth its time (docs/calibration.md)."""
        assert self.previous is not None
        before = read(self.previous)
        assert before is not None
        kept = [_likely(part) for part in (self.previous, self.output)]
        alike = len(kept[0] & kept[1]) / max(1, len(kept[0] | kept[1]))
        moved = made["share"] - before["share"]
        told = (
            f"since {self.previous.name}: ROC-AUC {made['auc'] - before['auc']:+.3f}, share {moved:+.3f}, "
            f"likely texts {alike:.1%} the same"
        )
        if made["auc"] < before["auc"]:
            return f"{told}; stop, and keep {self.previous.name}: this round ranks worse"
        settled = abs(moved) < SETTLED_SHARE or alike > SETTLED_TEXTS
        return f"{told}; {'stop: it has settled' if settled else 'a further round may help'}"

    # ------------------------------------------------------------------ the fit

    @cached_property
    def judgement(self) -> Judgement:
        """Signals to probabilities."""
        return Judgement.from_dict(self.fitted)

    @property
    def telling(self) -> list[str]:
        """The signals that become the score of a synthetic text, which agrees with itself."""
        return [name for name in self.fused if name != AGREEMENT]

    @cached_property
    def synthetic(self) -> Judgement | None:
        """Signals of synthetic texts to probabilities; None where they have none."""
        made = self.fitted.get("synthetic")
        return None if made is None or made["auc_near"] < LEAST_AREA else Judgement.from_dict(made)

    def _fit(self) -> dict[str, Any]:
        warned = check_unseen(self.options, self.workspace, self.held_out, self.images)
        known = self._known(self.fused)
        corpus, images = self._corpus()
        made, figures = judged(
            self.fused,
            known,
            corpus,
            images,
            method=self.method,
            seed=self.options.seed,
            resamples=self.options.resamples,
        )
        # A fusion would turn round gladly what a filter ranks upside down.
        for name, found in figures["signals"].items():
            if name in (COSINE, HUB, MATCH) and found["auc"] <= 0.5:
                raise UserError(
                    f"--filter {' '.join(self.options.filter)}: {name} ranks the calibration pictures' own texts no higher "
                    f"than others' (ROC-AUC {found['auc']:.2f}); give a filter that is trained"
                )
        share, bound = made.share, figures["share_bound"]
        if not 0.001 < share < 0.999:
            warned.append(f"the estimated share is {share:.3f}: judge and corpus do not fit each other")
        if share > bound or figures["share_interval"][0] > bound:
            warned.append(
                f"the estimated share {share:.3f} is above the bound {bound:.3f}: human texts are easier than the web's"
            )
        return {
            **self._fit_synthetic(warned),
            "options": asdict(self.options),
            "filter": ", ".join(self.options.filter),
            "calibration": self.held_out.name,
            "images": len(set(known.owners)),
            "texts": len(corpus),
            **made.as_dict(),
            **figures,
            "warnings": warned,
        }

    def _fit_synthetic(self, warned: list[str]) -> dict[str, Any]:
        """The key `synthetic` of the calibration; adds to what is warned of."""
        if not self.options.calibration_captions:
            return {}
        if not self.telling:
            raise UserError(f"--signals {AGREEMENT}: says nothing of synthetic texts; add another signal")
        known = self._known(self.telling, synthetic=True)
        made, figures = judged_synthetic(self.telling, known, method=self.method)
        if figures["auc_near"] < LEAST_AREA:
            warned.append(
                f"synthetic texts have no probability: the filter hardly tells them from the same with a word changed (ROC-AUC "
                f"{figures['auc_near']:.2f}, at least {LEAST_AREA:g}); train captioner and filter for longer"
            )
        return {"synthetic": {**made.as_dict(), **figures}}

    @property
    def method(self) -> Any:
        """How scores are fitted."""
        return self.options.method

    def _known(self, signals: list[str], synthetic: bool = False) -> Known:
        """The calibration pairs that have signals, of human texts or of synthetic ones."""
        marked = ["synthetic"] if self.options.calibration_captions else []
        columns = ["image_id", "own", "near", "failure", *marked, *self.signals]
        table = pa.concat_tables(self.pairs.tables(columns))
        table = table.filter(pc.is_null(table["failure"]))
        if marked:
            table = table.filter(pc.equal(table["synthetic"], synthetic))
        owners = np.array(table["image_id"].to_pylist(), dtype=str)
        own, near = (table[name].to_numpy(zero_copy_only=False).astype(bool) for name in ("own", "near"))
        values = _matrix(table, signals)
        count = len(set(owners[own].tolist()))
        if count < LEAST_IMAGES:
            raise UserError(
                f"--calibration {self.options.calibration}: {count:,} of its pictures could be judged with their own texts; "
                f"a fit needs {LEAST_IMAGES} or more"
            )
        if float(np.std(values, axis=0).max()) < 1e-9:
            raise UserError(
                f"--filter {' '.join(self.options.filter)}: all calibration pairs have one score; give another filter"
            )
        return Known(owners, values, own, near)

    def _corpus(self) -> tuple[Floats, list[str]]:
        """(signals [T, S], images) of the found texts of the part that is judged."""
        values, images = [], []
        for shard in self.shards():
            found = texts_of(self.images.read(shard, FOUND_COLUMNS), [])
            table = self.judged.read(shard, ["text_id", "image_id", "failure", *self.fused])
            kept = pc.and_(
                pc.is_in(table["text_id"], value_set=found["text_id"]), pc.is_null(table["failure"])
            )
            table = table.filter(kept)
            values.append(_matrix(table, self.fused))
            images += table["image_id"].to_pylist()
        if not images:
            raise UserError(f"{self.judged.path}: no found text has a score; were its pictures downloaded?")
        return np.concatenate(values), images


def _likely(part: Part) -> set[str]:
    """The texts that are more likely true than not."""
    tables = part.tables(["text_id", PROBABILITY])
    likely = (table.filter(pc.greater_equal(table[PROBABILITY], 0.5)) for table in tables)
    return {text for table in likely for text in table["text_id"].to_pylist()}


def _matrix(table: pa.Table, names: list[str]) -> Floats:
    """float64 [T, S] of columns; NaN where null."""
    columns = [table[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in names]
    return np.stack(columns, axis=1)
