"""`prove`: what a calibration is worth on human pairs with planted noise: ranking, share of true pairs, what is kept.

Not here: the judge (`calibrate/judge.py`), the arithmetic (`capfilt.calibration`), noise in a corpus of its own (`subset`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from capfilt.calibration.judgement import Judgement
from capfilt.calibration.ranking import roc_auc
from capfilt.calibration.share import calibration_error, em_share, posterior
from capfilt.errors import UserError
from capfilt.stages.base import Report, option_values
from capfilt.stages.calibrate import CalibrateOptions
from capfilt.stages.calibrate.held_out import (
    LEAST_IMAGES,
    captioners,
    human_texts,
    parents,
    trained_on,
    written_for,
)
from capfilt.stages.calibrate.judging import AGREEMENT, BATCH, Judging
from capfilt.stages.folds import members, origins
from capfilt.stages.pixels import Pictures, pictures
from capfilt.stages.prove import NOISES, ProveOptions
from capfilt.stages.results import ResultStage
from capfilt.stages.subset.words import Swaps
from capfilt.tables.calibrations import read
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace
from capfilt.tasks.filter_quality import at_threshold

Vectors = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]


class Prove(ResultStage):
    """Writes `runs/<out>.json`: of each kind of noise the ROC-AUC, the share estimated and planted, what a threshold keeps."""

    name = "prove"
    version = 2  # by fused signals

    def __init__(self, options: ProveOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.options, self.workspace = options, workspace
        if not options.noises:
            raise UserError("--noises: give at least one")
        self.images = workspace.input("images", options.images).check()
        self.scores = workspace.input("scores", options.scores)
        made = read(self.scores)
        if made is None:
            raise UserError(
                f"--scores {options.scores}: has no calibration; give a part that calibrate wrote"
            )
        self.made = made
        said: dict[str, Any] = {
            name: tuple(each) if isinstance(each, list) else each for name, each in made["options"].items()
        }
        self.calibrated = CalibrateOptions(**said)
        self.captions = [workspace.input("captions", name) for name in options.captions]
        wanted = captioners(workspace, self.calibrated.captions)
        if AGREEMENT in made["fusion"]["names"] and captioners(workspace, options.captions) != wanted:
            raise UserError(
                f"--scores {options.scores}: judges by {AGREEMENT}; give --captions, by the same captioner for --images "
                f"{options.images}"
            )
        self.output = workspace.result(options.out)

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": option_values(self.options),
            "images": self.images.digest(),
            "scores": self.scores.digest(),
            "calibration": self.made["mark"],
            **({"captions": [part.digest() for part in self.captions]} if self.captions else {}),
        }

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        return origins(self.calibrated.filter, self.workspace)

    def outlook(self) -> str:
        return f"{self.scores.path} against noise planted in {self.images.path}"

    def headline(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {name: value for name, value in metrics.items() if name.endswith(("_auc", "_share_error"))}

    def remarks(self) -> list[str]:
        lines = []
        for noise, found in self._made().get("noises", {}).items():
            auc, planted, estimated, kept, precision, ece = (
                "–" if found[name] is None else f"{found[name]:.3f}"
                for name in ("auc", "planted", "estimated", "kept_true", "precision", "ece")
            )
            lines.append(
                f"{noise}: AUC {auc}, share true {estimated} for {planted}; p >= {self.options.threshold:g} keeps {kept} "
                f"of the true texts at precision {precision}; calibration error {ece}"
            )
        return [*lines, "these are human texts: the web's own noise is harder"]

    def measure(self, report: Report) -> dict[str, Any]:
        judged = self.workspace.input("images", self.calibrated.images)
        self._unseen(judged)
        judging = Judging(self.calibrated, self.workspace, judged)
        judgement = Judgement.from_dict(self.made)
        names = list(judgement.fusion.names)
        columns = [judging.columns.index(name) for name in names]
        captions: dict[str, list[str]] = {}
        for row in written_for(self.images, self.captions) if self.captions else ():
            captions.setdefault(row["image_id"], []).append(row["text"])
        with judging.ready():
            ids, seen, texts = self._embedded(judging)
            if len(ids) < LEAST_IMAGES:
                raise UserError(
                    f"--images {self.options.images}: {len(ids)} pictures with a human text; give {LEAST_IMAGES} or more"
                )
            planted = {noise: self._planted(noise, seen, texts) for noise in self.options.noises}
            values: dict[str, list[Floats]] = {noise: [] for noise in planted}
            done = 0
            for batch, chosen in self._pictures(judging, set(ids)):
                report(done, len(ids), {})
                here = slice(done, done + len(chosen))
                for noise, (said, _) in planted.items():
                    found = judging.signals(
                        batch.images, ids[here], [place for _, place in chosen], said[here], captions
                    )
                    values[noise].append(found[:, columns])
                done = here.stop
        noises = {
            noise: self._found(judgement, np.concatenate(values[noise]), true)
            for noise, (_, true) in planted.items()
        }
        metrics = {
            f"{noise}_{name}": value
            for noise, found in noises.items()
            for name, value in {**found, "share_error": abs(found["estimated"] - found["planted"])}.items()
            if value is not None
        }
        return {"metrics": metrics, "noises": noises, "texts": len(ids)}

    def _unseen(self, judged: Part) -> None:
        """UserError naming what has seen pictures of the part: the filter's training, its calibration, or its bank."""
        ids = _ids(self.images)
        given = f"--images {self.options.images}"
        found: list[tuple[set[str], str]] = []
        for path in (path for name in self.calibrated.filter for path in members(name, self.workspace)):
            trained = trained_on(path, self.workspace)
            if trained is None:
                raise UserError(
                    f"{given}: {path} does not say which pictures trained it, so that nothing can be proved of it"
                )
            found.append((trained, f"trained {path.name}"))
        found += [
            (trained_on(path, self.workspace) or set(), f"trained {path.name}")
            for part in self.captions
            for path in parents(part.info, self.workspace)
        ]
        found.append((_ids(self.workspace.input("images", self.calibrated.calibration)), "calibrated it"))
        found += [
            (_ids(self.workspace.input("images", name)), f"are its neighbours in {name}")
            for name in self.calibrated.neighbours
        ]
        found.append((_ids(judged), f"are in {judged.path}, which it judged"))
        for seen, what in found:
            if both := len(ids & seen):
                raise UserError(
                    f"{given}: {both:,} of its {len(ids):,} pictures {what}; give pictures that it never saw"
                )

    def _pictures(
        self, judging: Judging, wanted: set[str]
    ) -> Iterator[tuple[Pictures, list[tuple[str, int]]]]:
        """Batches of the part, each with (image_id, place in the batch) of the wanted pictures that can be used."""
        for shard in self.images.shards():
            for batch in pictures(self.images, shard, judging, BATCH, only=wanted):
                if decoded := batch.decoded:
                    yield batch, list(zip(decoded, range(len(decoded)), strict=True))

    def _embedded(self, judging: Judging) -> tuple[list[str], Vectors, list[list[str]]]:
        """(image_ids, unit vectors [N, D], the texts of each picture) of the pictures that have a human text."""
        texts: dict[str, list[str]] = {}
        for row in human_texts(self.images):
            texts.setdefault(row["image_id"], []).append(row["text"])
        ids: list[str] = []
        vectors: list[Vectors] = []
        for batch, chosen in self._pictures(judging, set(texts)):
            ids += [image for image, _ in chosen]
            vectors.append(judging.alike(batch.images))
        seen = np.concatenate(vectors) if vectors else np.empty((0, 1), np.float32)
        return ids, seen, [texts[each] for each in ids]

    def _planted(
        self, noise: str, seen: Vectors, texts: list[list[str]]
    ) -> tuple[list[str], npt.NDArray[np.bool_]]:
        """A text per picture, and whether it is true. A text that no wrong one can replace stays true."""
        o = self.options
        rng = np.random.default_rng([o.seed, NOISES.index(noise)])
        said = [str(rng.choice(own)) for own in texts]
        true = rng.random(len(texts)) >= o.wrong
        swaps = Swaps(text for own in texts for text in own) if noise == "word" else None
        for place in np.flatnonzero(~true):
            own = texts[place]
            if swaps is not None:
                other = swaps.changed(said[place], own, rng)
            else:
                if noise == "near":
                    order = np.argsort(-(seen @ seen[place]), kind="stable")
                    donors = order[order != place][: o.nearest]
                else:
                    donors = np.delete(np.arange(len(texts)), place)
                # A donor's text that the picture has too is true of it.
                able = [
                    text for donor in rng.permutation(donors)[:50] for text in texts[donor] if text not in own
                ]
                other = str(rng.choice(able)) if able else None
            if other is None:
                true[place] = True
            else:
                said[place] = other
        return said, true

    def _found(self, judgement: Judgement, values: Floats, true: npt.NDArray[np.bool_]) -> dict[str, Any]:
        scores, ratios = judgement.scores(values), judgement.ratios(values)
        share = em_share(ratios)
        p = posterior(ratios, share)
        kept = at_threshold(p, true, self.options.threshold)
        found = {
            "auc": roc_auc(scores, true),
            "planted": float(true.mean()),
            "estimated": share,
            "kept_true": kept.kept_true,
            "precision": kept.precision,
            "ece": calibration_error(p, true),
        }
        return {name: float(value) if math.isfinite(value) else None for name, value in found.items()}


def _ids(part: Part) -> set[str]:
    return {image for table in part.tables(["image_id"]) for image in table["image_id"].to_pylist()}
