"""The last stage of `calibrate`: a fit on human pairs, the corpus's share of true pairs, and a probability per text.

No model: it reads what `judge.py` wrote. Not here: the arithmetic (`capfilt.calibration`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.calibration.fit import Calibration, calibrate, class_weights, reliability
from capfilt.calibration.share import cut, em_share, posterior, upper_bound
from capfilt.errors import UserError
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.calibrate import CalibrateOptions
from capfilt.stages.calibrate.held_out import LEAST_IMAGES, check_unseen
from capfilt.stages.calibrate.judge import COLUMNS, HUB, PROBABILITY
from capfilt.stages.inputs import captions_of, input_hashes, shards_of
from capfilt.tables.calibrations import FILE, read
from capfilt.tables.contracts import SCORES
from capfilt.tables.manifest import Counts
from capfilt.tables.publish import replace
from capfilt.tables.sealed import seal
from capfilt.tables.shards import Part
from capfilt.tables.texts import FOUND_COLUMNS, texts_of
from capfilt.tables.workspace import Workspace
from capfilt.tasks.filter_quality import roc_auc

MEANING = "probability that the text belongs to the picture, in [0, 1]; null for a synthetic text"
LEVEL = 0.95
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
FOLDS = 5
"""The calibration pairs are told by fits that saw none of the picture, or a curve that bends to each would look faultless."""
MOST_RESAMPLED = 20_000
"""Texts that the bootstrap looks at: enough for an interval, few enough for hundreds of draws."""

Floats = npt.NDArray[np.float64]
Pairs = tuple[npt.NDArray[np.str_], Floats, npt.NDArray[np.bool_]]
"""Image_ids, scores and truths of pairs."""


class Calibrate(ShardStage):
    """Writes a row per judged text: `match_probability`, null for a synthetic text, and the signals behind it."""

    name = "calibrate"
    version = 2  # fitted on a part of pairs, of human texts alone
    accounts = "texts"

    def __init__(self, options: CalibrateOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.options, self.workspace = options, workspace
        self.images = workspace.input("images", options.images)
        self.captions = [workspace.input("captions", name) for name in options.captions]
        self.held_out = workspace.input("images", options.calibration)
        self.judged = workspace.part("scores", f"{options.out}-judged")
        self.pairs = workspace.part("signals", f"{options.out}-pairs")
        self.contract = SCORES.extended({PROBABILITY: MEANING, HUB: COLUMNS[HUB]})
        self.output = output or workspace.part("scores", options.out)

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": option_values(self.options, without=("batch_size", "precision", "draft", "compile")),
            "columns": [PROBABILITY, *COLUMNS],
            # The share is of the whole part.
            "judged": self.judged.expect("scores").digest(),
            "pairs": self.pairs.expect("signals").digest(),
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
        values = self._probabilities(scores[HUB].to_numpy(zero_copy_only=False).astype(np.float64))
        null = np.isnan(values) | synthetic
        column = pa.array(values, pa.float32(), mask=null)
        table = scores.append_column(PROBABILITY, column)
        failed = Counter(scores["failure"].drop_null().to_pylist())
        dropped = int((synthetic & scores["failure"].is_null().to_numpy()).sum())
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
                f"share of true pairs: {made['share']:.3f} [{low:.3f}, {high:.3f}], at most {made['share_bound']:.3f} "
                f"({made['images']:,} calibration images, calibration error {made['error']:.3f})"
            )
        ]
        lines += [
            f"p >= {each['threshold']:g} keeps {each['kept']:.1%}, of which {each['precision']:.1%} are expected to be true"
            for each in made["cuts"]
            if each["precision"] is not None
        ]
        return lines + [f"warning: {line}" for line in made["warnings"]]

    # ------------------------------------------------------------------ the fit

    def _probabilities(self, scores: Floats) -> Floats:
        return posterior(ratios_of(self.fit, scores), float(self.fitted["share"]))

    @cached_property
    def fit(self) -> Calibration:
        """Scores to probabilities where half of the pairs are true."""
        return Calibration.from_dict(self.fitted["fit"])

    def _fit(self) -> dict[str, Any]:
        warned = check_unseen(self.options, self.workspace, self.held_out, self.images)
        owners, scores, truth = self._pairs()
        # A logistic curve would fall as gladly as it rises, and call what the filter ranks last the likeliest.
        if (auc := roc_auc(scores, truth)) <= 0.5:
            raise UserError(
                f"--filter {self.options.filter}: ranks the calibration pictures' own texts no higher than others' (ROC-AUC "
                f"{auc:.2f}); give a filter that is trained"
            )
        fit = calibrate(scores, truth, 0.5, method=self.method, link="identity")
        corpus, images = self._corpus()
        ratios = ratios_of(fit, corpus)
        share = em_share(ratios)
        bound = upper_bound(corpus, scores[truth], (len(set(images)), len(set(owners))), LEVEL)
        interval = self._interval((owners, scores, truth), (np.array(images), corpus))
        if not 0.001 < share < 0.999:
            warned.append(f"the estimated share is {share:.3f}: judge and corpus do not fit each other")
        if share > bound or interval[0] > bound:
            warned.append(
                f"the estimated share {share:.3f} is above the bound {bound:.3f}: human texts are easier than the web's"
            )
        probabilities = posterior(ratios, share)
        curve, error = reliability(
            told_apart((owners, scores, truth), share, self.method, self.options.seed),
            truth,
            class_weights(truth, _within(share)),
        )
        return {
            "options": asdict(self.options),
            "filter": str(self.options.filter),
            "calibration": self.held_out.name,
            "images": len(set(owners)),
            "texts": len(corpus),
            "fit": fit.as_dict(),
            "share": share,
            "share_interval": interval,
            "share_bound": bound,
            "curve": [vars(point) for point in curve],
            "error": error,
            "cuts": [_plain(vars(cut(probabilities, threshold))) for threshold in THRESHOLDS],
            "warnings": warned,
        }

    @property
    def method(self) -> Any:
        """How scores are fitted."""
        return self.options.method

    def _pairs(self) -> Pairs:
        """The calibration pairs that have a score."""
        table = pa.concat_tables(self.pairs.tables(["image_id", HUB, "own"]))
        table = table.filter(pc.is_valid(table[HUB]))
        owners = np.array(table["image_id"].to_pylist(), dtype=str)
        scores = table[HUB].to_numpy().astype(np.float64)
        truth = table["own"].to_numpy(zero_copy_only=False).astype(bool)
        count = len(set(owners[truth].tolist()))
        if count < LEAST_IMAGES:
            raise UserError(
                f"--calibration {self.options.calibration}: {count:,} of its pictures could be judged with their own texts; "
                f"a fit needs {LEAST_IMAGES} or more"
            )
        if float(np.std(scores)) < 1e-9:
            raise UserError(
                f"--filter {self.options.filter}: all calibration pairs have one score; give another filter"
            )
        return owners, scores, truth

    def _corpus(self) -> tuple[Floats, list[str]]:
        """(hub scores, images) of the found texts of the part that is judged."""
        scores, images = [], []
        for shard in self.shards():
            found = texts_of(self.images.read(shard, FOUND_COLUMNS), [])
            table = self.judged.read(shard, ["text_id", "image_id", HUB])
            table = table.filter(pc.is_in(table["text_id"], value_set=found["text_id"])).drop_null()
            scores.append(table[HUB].to_numpy().astype(np.float64))
            images += table["image_id"].to_pylist()
        every = np.concatenate(scores) if scores else np.empty(0)
        if not len(every):
            raise UserError(f"{self.judged.path}: no found text has a score; were its pictures downloaded?")
        return every, images

    def _interval(self, pairs: Pairs, corpus: tuple[Any, Floats]) -> list[float]:
        """The share's bootstrap interval: calibration images and images of the corpus are drawn again, and all is fitted."""
        rng = np.random.default_rng([self.options.seed, 1])
        keep = (
            slice(None)
            if len(corpus[1]) <= MOST_RESAMPLED
            else rng.permutation(len(corpus[1]))[:MOST_RESAMPLED]
        )
        owners, images = (np.unique(each, return_inverse=True)[1] for each in (pairs[0], corpus[0][keep]))
        scores, truth, found = pairs[1], pairs[2], corpus[1][keep]
        shares = []
        for _ in range(self.options.resamples):
            drawn = np.repeat(np.arange(len(owners)), _drawn(rng, owners)[owners])
            here = truth[drawn]
            if here.all() or not here.any():
                continue
            fit = calibrate(scores[drawn], here, 0.5, method=self.method, link="identity")
            shares.append(em_share(ratios_of(fit, found), _drawn(rng, images)[images]))
        low, high = np.quantile(shares, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        return [float(low), float(high)]


def _drawn(rng: np.random.Generator, groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    count = int(groups.max()) + 1
    return np.bincount(rng.integers(count, size=count), minlength=count)


def told_apart(pairs: Pairs, share: float, method: Any, seed: int) -> Floats:
    """Probabilities [T] of pairs in a corpus with this share of true ones, by fits that saw no pair of the same picture."""
    owners, scores, truth = pairs
    _, image = np.unique(owners, return_inverse=True)
    fold = np.random.default_rng(seed).permutation(int(image.max()) + 1)[image] % FOLDS
    told = np.empty(len(scores))
    for number in range(FOLDS):
        rest = fold != number
        fit = calibrate(scores[rest], truth[rest], 0.5, method=method, link="identity")
        told[~rest] = posterior(ratios_of(fit, scores[~rest]), share)
    return told


def ratios_of(fit: Calibration, scores: Floats) -> Floats:
    """Log-likelihood ratios of scores [T], by a fit where half of the pairs are true; NaN stays NaN."""
    if fit.method == "platt":
        slope, intercept = fit.values
        return slope * scores + intercept
    edge = 1 / (fit.pairs + 2)
    p = np.clip(fit(scores), edge, 1 - edge)
    return np.log(p) - np.log1p(-p)


def _within(share: float) -> float:
    return min(max(share, 1e-3), 1 - 1e-3)


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
