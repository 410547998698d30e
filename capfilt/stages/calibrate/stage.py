"""The second half of `calibrate`: a fit on human pairs, the corpus's share of true pairs, and a probability per text.

Not here: the arithmetic (`capfilt.calibration`), the cosines (`judge.py`).
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

from capfilt.calibration.fit import Calibration, calibrate
from capfilt.calibration.record import FILE, read
from capfilt.calibration.share import cut, em_share, posterior, upper_bound
from capfilt.errors import UserError
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.calibrate import CalibrateOptions
from capfilt.stages.calibrate.judge import BATCH, COLUMNS, HUB, PROBABILITY, Judging, trained_on
from capfilt.stages.inputs import captions_of, input_hashes, shards_of
from capfilt.stages.pixels import pictures
from capfilt.tables.contracts import SCORES
from capfilt.tables.manifest import Counts
from capfilt.tables.publish import replace
from capfilt.tables.sealed import seal
from capfilt.tables.shards import Part
from capfilt.tables.texts import FOUND_COLUMNS, texts_of
from capfilt.tables.workspace import Workspace

LEAST_IMAGES = 50
MEANING = "probability that the text belongs to the picture, in [0, 1]; null for a synthetic text"
LEVEL = 0.95
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
MOST_RESAMPLED = 20_000
"""Texts that the bootstrap looks at: enough for an interval, few enough for hundreds of draws."""

Floats = npt.NDArray[np.float64]


class Calibrate(ShardStage):
    """Writes a row per judged text: `match_probability`, null for a synthetic text, and the signals behind it."""

    name = "calibrate"
    version = 1
    accounts = "texts"

    def __init__(self, options: CalibrateOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.options, self.workspace = options, workspace
        self.images = workspace.input("images", options.images)
        self.captions = [workspace.input("captions", name) for name in options.captions]
        self.held_out = workspace.input("images", options.calibration)
        if self.held_out.path == self.images.path:
            raise UserError(f"--calibration {options.calibration}: is the part that is judged; give another")
        self.judged = workspace.part("scores", f"{options.out}-judged")
        self.contract = SCORES.extended({PROBABILITY: MEANING, HUB: COLUMNS[HUB]})
        self.output = output or workspace.part("scores", options.out)

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": option_values(self.options, without=("batch_size", "precision", "draft", "compile")),
            "columns": [PROBABILITY, *COLUMNS],
            # The share is of the whole part.
            "judged": self.judged.expect("scores").digest(),
            "calibration": self.held_out.digest(),
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
                f"({made['images']:,} calibration images)"
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
        judging = Judging(self.options, self.workspace, self.images)
        warned = self._unseen(judging)
        with judging.ready():
            owners, scores, truth = self._pairs(judging)
        if float(np.std(scores)) < 1e-9:
            raise UserError(
                f"--filter {self.options.filter}: all calibration pairs have one score; give another filter"
            )
        fit = calibrate(scores, truth, 0.5, method=self.options.method, link="identity")  # type: ignore[arg-type]
        corpus, images = self._corpus()
        ratios = ratios_of(fit, corpus)
        share = em_share(ratios)
        bound = upper_bound(corpus, scores[truth], (len(set(images)), len(set(owners))), LEVEL)
        interval = self._interval((np.array(owners), scores, truth), (np.array(images), corpus))
        if not 0.001 < share < 0.999:
            warned.append(f"the estimated share is {share:.3f}: judge and corpus do not fit each other")
        if share > bound or interval[0] > bound:
            warned.append(
                f"the estimated share {share:.3f} is above the bound {bound:.3f}: human texts are easier than the web's"
            )
        probabilities = posterior(ratios, share)
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
            "cuts": [_plain(vars(cut(probabilities, threshold))) for threshold in THRESHOLDS],
            "warnings": warned,
        }

    def _unseen(self, judging: Judging) -> list[str]:
        """Warnings. UserError where a training of the filter saw a calibration picture, or the part has too few."""
        table = pa.concat_tables(self.held_out.tables(["image_id", "status"]))
        ids = set(table.filter(pc.equal(table["status"], "success"))["image_id"].to_pylist())
        if len(ids) < LEAST_IMAGES:
            raise UserError(
                f"--calibration {self.options.calibration}: {len(ids)} pictures; a fit needs {LEAST_IMAGES} or more"
            )
        given = f"--calibration {self.options.calibration}"
        judged = set(pa.concat_tables(self.images.tables(["image_id"]))["image_id"].to_pylist())
        if shared := len(ids & judged):
            raise UserError(f"{given}: {shared:,} of its pictures are in --images too; give others")
        seen = trained_on(judging.path)
        if seen is None:
            return [
                f"{judging.path} does not say which pictures trained it; none of {given} may be among them"
            ]
        if both := len(ids & seen):
            raise UserError(
                f"{given}: {both:,} of its {len(ids):,} pictures trained {self.options.filter}; give pictures that it never saw"
            )
        return []

    def _pairs(self, judging: Judging) -> tuple[list[str], Floats, npt.NDArray[np.bool_]]:
        """(image, hub score, truth) of calibration pairs: each picture with its own texts, and with texts of others."""
        rng = np.random.default_rng(self.options.seed)
        found = pa.concat_tables(self.held_out.tables(["image_id", "captions"])).to_pylist()
        texts = {
            row["image_id"]: [text for text in row["captions"] or () if text and text.strip()]
            for row in found
        }
        every = [(image, text) for image, some in texts.items() for text in some]
        if len({text for _, text in every}) < 2:
            raise UserError(
                f"--calibration {self.options.calibration}: its pictures have no texts to tell apart"
            )
        owners: list[str] = []
        scores: list[Floats] = []
        truth: list[bool] = []
        for shard in self.held_out.shards():
            for batch in pictures(self.held_out, shard, judging.scorer, BATCH):
                asked: list[tuple[str, int, str, bool]] = []
                for row, place in zip(batch.rows, batch.place, strict=True):
                    own = texts.get(row["image_id"], [])
                    if place < 0 or not own:
                        continue
                    asked += [(row["image_id"], place, text, True) for text in own]
                    others = self._foreign(rng, every, row["image_id"], {*own})
                    asked += [(row["image_id"], place, text, False) for text in others]
                if asked:
                    ids, index, said, true = (list(each) for each in zip(*asked, strict=True))
                    seen, read = judging.embedded(batch.images, index, said)
                    owners += ids
                    truth += true
                    scores.append(judging.bank.corrected(ids, seen, read))
        return owners, np.concatenate(scores), np.array(truth)

    def _foreign(
        self, rng: np.random.Generator, every: list[tuple[str, str]], image: str, own: set[str]
    ) -> list[str]:
        drawn = (every[place] for place in rng.integers(len(every), size=20 * self.options.negatives))
        others = [text for other, text in drawn if other != image and text not in own]
        return others[: self.options.negatives]

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

    def _interval(self, pairs: tuple[Any, Floats, Any], corpus: tuple[Any, Floats]) -> list[float]:
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
            fit = calibrate(scores[drawn], here, 0.5, method=self.options.method, link="identity")  # type: ignore[arg-type]
            shares.append(em_share(ratios_of(fit, found), _drawn(rng, images)[images]))
        low, high = np.quantile(shares, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        return [float(low), float(high)]


def _drawn(rng: np.random.Generator, groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    count = int(groups.max()) + 1
    return np.bincount(rng.integers(count, size=count), minlength=count)


def ratios_of(fit: Calibration, scores: Floats) -> Floats:
    """Log-likelihood ratios of scores [T], by a fit where half of the pairs are true; NaN stays NaN."""
    if fit.method == "platt":
        slope, intercept = fit.values
        return slope * scores + intercept
    edge = 1 / (fit.pairs + 2)
    p = np.clip(fit(scores), edge, 1 - edge)
    return np.log(p) - np.log1p(-p)


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
