"""`grade`: scores and verdicts against known truth: noise planted by `subset`, and expert ratings."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capfilt.calibration.ranking import roc_auc
from capfilt.data.images import BadImage
from capfilt.data.transforms import decode_uint8
from capfilt.errors import UserError
from capfilt.formats.examples.row import own_captions
from capfilt.formats.files import read_file
from capfilt.inference.adapters import opened
from capfilt.models import checkpoint
from capfilt.stages.base import Report, option_values
from capfilt.stages.grade import GradeOptions
from capfilt.stages.results import ResultStage
from capfilt.tables.ids import file_sha256, text_id
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace
from capfilt.tasks.filter_quality import (
    kendall_tau_c,
    kendall_tau_c_interval,
    roc_auc_interval,
    spearman,
)
from capfilt.tasks.pair_judging import score_pairs
from capfilt.tasks.registry import check, chosen
from capfilt.training.distributed import device

_BATCH = 32


class Grade(ResultStage):
    """Writes `runs/<out>.json`: ROC-AUC on planted noise, the share kept of each kind, tau-c against experts' ratings.

    All in [0, 1] or [-1, 1], where `evaluate` writes points of 100.
    """

    name = "grade"
    version = 4  # every rating is a point, own captions are left out

    def __init__(self, options: GradeOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.options = options
        self.images = workspace.input("images", options.images).check()
        self.verdicts = workspace.input("verdicts", options.verdicts).check()
        self.filter = workspace.model(options.filter) if options.filter else None
        if options.expert:
            if self.filter is None:
                raise UserError("--expert needs --filter: the ratings are compared with its scores")
            if not Path(options.expert).is_file():
                raise UserError(f"--expert {options.expert}: no such file")
        if self.filter is not None:
            checkpoint.read_config(self.filter)
        self.output = workspace.result(options.out)

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": option_values(self.options),
            "images": self.images.digest(),
            "verdicts": self.verdicts.digest(),
            "filter": checkpoint.fingerprint(self.filter) if self.filter else "",
            "expert": file_sha256(Path(self.options.expert)) if self.options.expert else "",
        }

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        return checkpoint.origin(self.filter, self.options.filter) if self.filter else {}

    def outlook(self) -> str:
        return f"verdicts {self.verdicts.path} against planted noise" + (
            " and experts" if self.options.expert else ""
        )

    def measure(self, report: Report) -> dict[str, Any]:
        metrics: dict[str, float] = {}
        result: dict[str, Any] = {"metrics": metrics, "kinds": self._planted(metrics)}
        if self.options.expert:
            result["expert"] = self._experts(metrics, report)
        # A correlation with what never varies is no number.
        result["metrics"] = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return result

    def _planted(self, metrics: dict[str, float]) -> dict[str, dict[str, float]]:
        truth: dict[str, str] = {}
        for table in self.images.tables(["image_id", "source", "captions", "planted"]):
            if "planted" not in table.column_names:
                raise UserError(
                    f"{self.images.path}: has no column `planted`; make the part with `capfilt subset`"
                )
            for row in table.to_pylist():
                for index, (text, kind) in enumerate(zip(row["captions"], row["planted"] or [], strict=True)):
                    truth[text_id(row["image_id"], row["source"], text, "", index)] = kind
        kept: Counter[str] = Counter()
        seen: Counter[str] = Counter()
        scores: list[tuple[float, str, str]] = []
        # A plug-in's verdicts carry the score they were judged by; the filter's are graded by ITM.
        column = next(iter(self.verdicts.contract.further), "itm_score")
        for table in self.verdicts.tables(["text_id", "image_id", "source", column, "keep"]):
            for row in table.to_pylist():
                kind = truth.get(row["text_id"], row["source"])
                seen[kind] += 1
                kept[kind] += row["keep"]
                if row[column] is not None and kind in ("true", "other_image"):
                    scores.append((row[column], kind, row["image_id"]))
        values = [score for score, _, _ in scores]
        labels = [kind == "true" for _, kind, _ in scores]
        if any(labels) and not all(labels):
            interval = roc_auc_interval(
                values, labels, [image for _, _, image in scores], seed=self.options.seed
            )
            metrics["roc_auc"] = roc_auc(values, labels)
            metrics["roc_auc_low"], metrics["roc_auc_high"] = interval.low, interval.high
        for kind in sorted(seen):
            metrics[f"kept_{kind}"] = kept[kind] / seen[kind]
        return {kind: {"texts": seen[kind], "kept": kept[kind]} for kind in sorted(seen)}

    def _experts(self, metrics: dict[str, float], report: Report) -> dict[str, Any]:
        assert self.filter is not None
        contents, _ = checkpoint.open_any(self.filter)
        model = opened(contents, device())
        check(chosen(["rating"]), model.can, f"{self.filter} ({model.what})")
        root = Path(self.options.expert_root or Path(self.options.expert).parent)
        lines: list[dict[str, Any]] = []
        with Path(self.options.expert).open() as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                    ratings = [float(rating) for rating in row["ratings"]]
                    if (
                        not ratings
                        or not isinstance(row["image"], str)
                        or not isinstance(row["caption"], str)
                    ):
                        raise ValueError
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{self.options.expert}, line {number}: needs image, caption, ratings"
                    ) from error
                lines.append(row | {"ratings": ratings})
        own = own_captions(lines)
        by_image: dict[str, list[tuple[str, list[float]]]] = {}
        for row, owned in zip(lines, own, strict=True):
            if not owned:
                by_image.setdefault(row["image"], []).append((row["caption"], row["ratings"]))
        failed: Counter[str] = Counter()
        kept: list[tuple[str, list[tuple[str, list[float]]]]] = []
        pictures = []
        for name, rows in sorted(by_image.items()):
            data = read_file(root / name)
            if not isinstance(data, bytes):
                failed[data[0]] += len(rows)
                continue
            try:
                pictures.append(decode_uint8(data, model.image_size))
            except BadImage as error:
                failed[error.failure] += len(rows)
            else:
                kept.append((name, rows))
        places = [place for place, (_, rows) in enumerate(kept) for _ in rows]
        scores = score_pairs(
            model.model,
            [
                torch.from_numpy(np.stack(pictures[start : start + _BATCH]))
                for start in range(0, len(pictures), _BATCH)
            ],
            places,
            [text for _, rows in kept for text, _ in rows],
            progress=lambda what, done, of: report(done, of, {"texts": what}),
        )
        rated = [ratings for _, rows in kept for _, ratings in rows]
        means = [sum(ratings) / len(ratings) for ratings in rated]
        single = [rating for ratings in rated for rating in ratings]
        pairs = np.repeat(np.arange(len(rated)), [len(ratings) for ratings in rated])
        images = np.array(places, dtype=np.int64)[pairs]
        for name, found in scores.items():
            interval = kendall_tau_c_interval(single, found[pairs], images, seed=self.options.seed)
            metrics[f"tau_c_{name}"] = interval.value
            metrics[f"tau_c_{name}_low"], metrics[f"tau_c_{name}_high"] = interval.low, interval.high
            metrics[f"tau_c_mean_{name}"] = kendall_tau_c(means, found)
            metrics[f"spearman_{name}"] = spearman(means, found)
        return {
            "texts": len(rated),
            "ratings": len(single),
            "images": len(kept),
            "own_captions": sum(own),
            "failed": dict(failed),
        }
