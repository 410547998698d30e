"""What the quickstart's run came to, against the truth of its world. Reads tables and truth.parquet; decides nothing.

The figures are those of `summary.json`; what is true is `truth.py`'s word.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from capfilt.quickstart import truth
from capfilt.quickstart.textonly import text_only_auc
from capfilt.quickstart.world import Scene
from capfilt.tables.texts import found_texts
from capfilt.tables.workspace import Workspace
from capfilt.tasks.filter_quality import roc_auc

THRESHOLD = 0.5


@dataclass(frozen=True)
class WebText:
    """A found text of a picture that arrived, with the truth about it and the filter's score (None: it failed)."""

    kind: str
    text: str
    score: float | None
    keep: bool


@dataclass(frozen=True)
class Synthetic:
    """A synthetic text, its scene, and the filter's score."""

    text: str
    scene: Scene
    score: float | None
    keep: bool


def read_truth(path: Path) -> dict[str, dict[str, Any]]:
    """truth.parquet by URL."""
    return {row["url"]: row for row in pq.read_table(path).to_pylist()}


def read_texts(
    workspace: Workspace, known: dict[str, dict[str, Any]], images: str, captions: str, verdicts: str
) -> tuple[list[WebText], list[Synthetic]]:
    """The web and synthetic texts of pictures that arrived, with their verdicts. Null synthetic texts are left out."""
    web: list[WebText] = []
    synthetic: list[Synthetic] = []
    pictures = workspace.part("images", images)
    for shard in pictures.shards():
        table = pictures.read(shard, ["image_id", "url", "source", "captions", "status"])
        rows = {row["image_id"]: row for row in table.to_pylist() if row["status"] == "success"}
        judged = {row["text_id"]: row for row in workspace.part("verdicts", verdicts).read(shard).to_pylist()}
        for text in found_texts(table).to_pylist():
            if text["image_id"] in rows:
                fact = known[rows[text["image_id"]]["url"]]
                verdict = judged[text["text_id"]]
                web.append(WebText(fact["kind"], text["text"], verdict["itm_score"], verdict["keep"]))
        for row in workspace.part("captions", captions).read(shard).to_pylist():
            if row["text"] is not None:
                scene = Scene.from_json(known[rows[row["image_id"]]["url"]]["scene"])
                verdict = judged[row["text_id"]]
                synthetic.append(Synthetic(row["text"], scene, verdict["itm_score"], verdict["keep"]))
    return web, synthetic


def noise(texts: Sequence[WebText]) -> dict[str, Any]:
    """The web's true rate: of the texts of pictures that arrived, how many are true."""
    kinds = Counter(text.kind for text in texts)
    true = sum(count for kind, count in kinds.items() if truth.KINDS[kind].true)
    return {
        "texts": len(texts),
        "true_rate": _share(true, len(texts)),
        "by_kind": dict(sorted(kinds.items())),
    }


def filter_figures(texts: Sequence[WebText], seed: int) -> dict[str, Any]:
    """The filter against the truth, over well-formed captions; spam kinds apart."""
    scored = [text for text in texts if text.score is not None]
    formed = [text for text in scored if truth.KINDS[text.kind].well_formed]
    true = [text for text in formed if truth.KINDS[text.kind].true]
    false = [text for text in formed if not truth.KINDS[text.kind].true]

    def area(wrong: Sequence[WebText]) -> float:
        both = [*true, *wrong]
        scores = np.array([text.score for text in both], np.float64)
        return roc_auc(scores, [truth.KINDS[text.kind].true for text in both])

    labels = [truth.KINDS[text.kind].true for text in formed]
    spam = {
        kind: {
            "texts": sum(text.kind == kind for text in scored),
            "kept": sum(text.kind == kind and _kept(text) for text in scored),
        }
        for kind in truth.SPAM_KINDS
    }
    return {
        "roc_auc": area(false),
        "roc_auc_other_image": area([text for text in false if text.kind == "other_image"]),
        "roc_auc_one_attribute_off": area([text for text in false if text.kind == "one_attribute_off"]),
        "roc_auc_text_only": text_only_auc([text.text for text in formed], labels, seed),
        "kept_true": _share(sum(map(_kept, true)), len(true)),
        "dropped_false": _share(sum(not _kept(text) for text in false), len(false)),
        "well_formed": len(formed),
        "spam": spam,
    }


def _kept(text: WebText | Synthetic) -> bool:
    return text.score is not None and text.score >= THRESHOLD


def captioner_figures(texts: Sequence[Synthetic], human: Iterable[str]) -> dict[str, Any]:
    """Synthetic captions against their scenes: true and naming every object, before and after selecting.

    `best_constant` is the share that the one best caption among `human` would reach on the same pictures.
    """
    right = [truth.is_complete_and_true(text.text, text.scene) for text in texts]
    kept = [good for good, text in zip(right, texts, strict=True) if text.keep]
    scenes = [text.scene for text in texts]
    candidates = [text for text, _ in Counter(text.lower() for text in human).most_common(300)]
    best = max(
        (sum(truth.is_complete_and_true(text, scene) for scene in scenes) for text in candidates), default=0
    )
    return {
        "texts": len(texts),
        "kept": len(kept),
        "true_before": _share(sum(right), len(right)),
        "true_after": _share(sum(kept), len(kept)),
        "mean_attributes": float(np.mean([truth.attributes_stated(text.text) for text in texts]))
        if texts
        else 0.0,
        "distinct": len({text.text for text in texts}),
        "best_constant": _share(best, len(scenes)),
    }


def _share(part: int, whole: int) -> float | None:
    """None where there is nothing to take a share of: JSON has no NaN."""
    return part / whole if whole else None


def evaluation_figures(workspace: Workspace, models: Sequence[str]) -> dict[str, dict[str, float]]:
    """`tr@1 ... ir@10 cider` of each model's result in runs/."""
    names = [f"{side}@{depth}" for side in ("tr", "ir") for depth in (1, 5, 10)] + ["cider"]
    found = {}
    for model in models:
        metrics = json.loads((workspace.path / "runs" / f"{model}.json").read_bytes())["metrics"]
        found[model] = {name: metrics[name] for name in names}
    return found


def human_captions(path: Path) -> list[str]:
    """The texts of a captions.json."""
    return [str(row["caption"]) for row in json.loads(path.read_bytes())["annotations"]]


TARGETS: dict[str, tuple[str, float]] = {
    "filter.roc_auc": (">=", 0.95),
    "filter.roc_auc_text_only": ("<=", 0.6),
    "filter.kept_true": (">=", 0.85),
    "filter.dropped_false": (">=", 0.9),
    "captioner.true_before": (">=", 0.6),
    "captioner.true_after": (">=", 0.85),
}
"""What a full-size run is expected to reach; smaller ones show less."""


def met(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every target with its value and whether it was met; curated must beat raw and human_only in three figures."""
    results: dict[str, dict[str, Any]] = {}
    for name, (sign, bound) in TARGETS.items():
        room, _, key = name.partition(".")
        value = summary[room][key]
        good = value is not None and (value >= bound if sign == ">=" else value <= bound)
        results[name] = {"value": value, "target": f"{sign} {bound}", "met": good}
    evaluation = summary["evaluation"]
    for metric in ("tr@1", "ir@1", "cider"):
        for other in ("raw", "human_only"):
            value = evaluation["curated"][metric] - evaluation[other][metric]
            results[f"curated - {other}, {metric}"] = {
                "value": round(value, 3),
                "target": "> 0",
                "met": value > 0,
            }
    return results
