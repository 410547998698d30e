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

from capfilt.calibration.ranking import roc_auc
from capfilt.quickstart import truth
from capfilt.quickstart.textonly import text_only_auc
from capfilt.quickstart.world import Scene
from capfilt.tables.texts import found_texts
from capfilt.tables.workspace import Workspace

THRESHOLD = 0.5


@dataclass(frozen=True)
class Graded:
    """A text of a picture that arrived, the truth about its page, and the filter's verdict (no score: it failed)."""

    text: str
    kind: str
    scene: Scene
    score: float | None
    keep: bool

    @property
    def true(self) -> bool:
        return truth.KINDS[self.kind].true

    @property
    def passes(self) -> bool:
        return self.score is not None and self.score >= THRESHOLD


def read_texts(
    workspace: Workspace, known: Path, images: str, captions: str, verdicts: str
) -> tuple[list[Graded], list[Graded]]:
    """The web and synthetic texts of pictures that arrived. Null texts are left out. `known` is the path of truth.parquet."""
    facts = {row["url"]: row for row in pq.read_table(known).to_pylist()}
    web: list[Graded] = []
    synthetic: list[Graded] = []
    pictures = workspace.part("images", images)
    for shard in pictures.shards():
        table = pictures.read(shard, ["image_id", "url", "source", "captions", "status"])
        urls = {row["image_id"]: row["url"] for row in table.to_pylist() if row["status"] == "success"}
        judged = {row["text_id"]: row for row in workspace.part("verdicts", verdicts).read(shard).to_pylist()}
        written = workspace.part("captions", captions).read(shard)
        for texts, graded in ((found_texts(table), web), (written, synthetic)):
            for text in texts.to_pylist():
                if text["text"] is not None and text["image_id"] in urls:
                    fact, verdict = facts[urls[text["image_id"]]], judged[text["text_id"]]
                    scene = Scene.from_json(fact["scene"])
                    score = verdict["itm_score"]
                    graded.append(Graded(text["text"], fact["kind"], scene, score, verdict["keep"]))
    return web, synthetic


def noise(texts: Sequence[Graded]) -> dict[str, Any]:
    """The web's true rate: of the texts of pictures that arrived, how many are true."""
    return {
        "texts": len(texts),
        "true_rate": _share([text.true for text in texts]),
        "by_kind": dict(sorted(Counter(text.kind for text in texts).items())),
    }


def filter_figures(texts: Sequence[Graded], seed: int) -> dict[str, Any]:
    """The filter against the truth, over well-formed captions; spam kinds apart."""
    by_kind = {kind: [t for t in texts if t.kind == kind and t.score is not None] for kind in truth.KINDS}
    formed = [text for text in texts if text.score is not None and text.kind not in truth.SPAM_KINDS]
    false = [text for text in formed if not text.true]

    def area(wrong: Sequence[Graded]) -> float:
        both = [*by_kind["true"], *wrong]
        return roc_auc(np.array([text.score for text in both], np.float64), [text.true for text in both])

    return {
        "roc_auc": area(false),
        "roc_auc_other_image": area(by_kind["other_image"]),
        "roc_auc_one_attribute_off": area(by_kind["one_attribute_off"]),
        "roc_auc_text_only": text_only_auc([t.text for t in formed], [t.true for t in formed], seed),
        "kept_true": _share([text.passes for text in by_kind["true"]]),
        "dropped_false": _share([not text.passes for text in false]),
        "well_formed": len(formed),
        "spam": {
            kind: {"texts": len(by_kind[kind]), "kept": sum(text.passes for text in by_kind[kind])}
            for kind in truth.SPAM_KINDS
        },
    }


def captioner_figures(texts: Sequence[Graded], human: Iterable[str]) -> dict[str, Any]:
    """Synthetic captions against their scenes: true and naming every object, before and after selecting.

    `best_constant` is the share that the one best caption among `human` would reach on the same pictures.
    """
    right = [truth.is_complete_and_true(text.text, text.scene) for text in texts]
    kept = [good for good, text in zip(right, texts, strict=True) if text.keep]
    candidates = [text for text, _ in Counter(text.lower() for text in human).most_common(300)]
    constant = [[truth.is_complete_and_true(each, text.scene) for text in texts] for each in candidates]
    stated = [truth.attributes_stated(text.text) for text in texts]
    return {
        "texts": len(texts),
        "kept": len(kept),
        "true_before": _share(right),
        "true_after": _share(kept),
        "mean_attributes": sum(stated) / max(len(stated), 1),
        "distinct": len({text.text for text in texts}),
        "best_constant": _share(max(constant, key=sum, default=[])),
    }


def _share(good: Sequence[bool]) -> float | None:
    """None where there is nothing to take a share of: JSON has no NaN."""
    return sum(good) / len(good) if good else None


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
