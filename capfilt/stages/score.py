"""`score`: the filter judges web and synthetic texts alike. A picture is encoded once, however many texts it has."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from capfilt.data.tokenizer import clean
from capfilt.inference.filter import Filter
from capfilt.models import checkpoint
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.inputs import input_hashes, shards_of
from capfilt.stages.options import ScoreOptions
from capfilt.stages.pixels import pictures
from capfilt.tables.contracts import MAX_TEXT_CHARACTERS, SCORES
from capfilt.tables.shards import Counts, Part
from capfilt.tables.texts import FOUND_COLUMNS, texts_of
from capfilt.tables.workspace import Workspace


class ScoreStage(ShardStage):
    """Writes a row per text of a picture that is there; texts of pictures that are not are dropped as `no_image`."""

    name = "score"
    version = 1
    contract = SCORES
    uses_gpu = True

    def __init__(self, options: ScoreOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.options = options
        self.images = workspace.part("images", options.images).expect("images")
        self.captions = [workspace.part("captions", name).expect("captions") for name in options.captions]
        self.checkpoint = workspace.model(options.filter)
        self.output = output or workspace.part("scores", options.out or self.checkpoint.name)
        checkpoint.read_config(self.checkpoint)

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": option_values(self.options),
            "filter": checkpoint.fingerprint(self.checkpoint),
            "images": self.images.info["fingerprint"],
            "captions": [part.info["fingerprint"] for part in self.captions],
        }

    def shards(self) -> list[int]:
        return shards_of(self.images, *self.captions)

    def inputs(self, shard: int) -> list[str]:
        return input_hashes(shard, self.images, *self.captions)

    def setup(self) -> None:
        self.filter = Filter.load(self.checkpoint)

    def process(self, shard: int) -> Produced:
        found = self.images.read(shard, FOUND_COLUMNS)
        texts: dict[str, list[dict[str, Any]]] = {}
        for row in texts_of(found, (part.read(shard) for part in self.captions)).to_pylist():
            texts.setdefault(row["image_id"], []).append(row)
        rows_in = sum(len(each) for each in texts.values())
        made: list[dict[str, Any]] = []
        dropped: Counter[str] = Counter()
        failed: Counter[str] = Counter()
        kept = 0
        size = self.filter.model.config.image_size
        for batch in pictures(self.images, shard, size, self.options.batch_size, ()):
            asked: list[dict[str, Any]] = []
            image_index: list[int] = []
            for row, failure, place in zip(batch.rows, batch.failures, batch.place, strict=True):
                for text in texts.pop(row["image_id"], []):
                    if failure == "no_image":
                        dropped[failure] += 1
                        continue
                    reason = failure or text["failure"] or _fault(text["text"])
                    entry = {"text_id": text["text_id"], "image_id": row["image_id"], "failure": reason}
                    made.append(entry)
                    if reason:
                        failed[reason] += 1
                    else:
                        asked.append({"entry": entry, "text": text["text"]})
                        image_index.append(place)
            scores = self.filter.score_texts(
                batch.pixels,
                image_index,
                [item["text"] for item in asked],
                batch_size=self.options.batch_size,
                max_text_tokens=self.options.max_text_tokens,
            )
            for item, score in zip(asked, scores, strict=True):
                if math.isfinite(score.itm_score) and math.isfinite(score.itc_score):
                    item["entry"] |= {"itm_score": score.itm_score, "itc_score": score.itc_score}
                    kept += 1
                else:
                    item["entry"]["failure"] = "not_finite"
                    failed["not_finite"] += 1
        return Produced(SCORES.table(made), Counts(rows_in, kept, dict(dropped), dict(failed)))


def _fault(text: str | None) -> str | None:
    """Why a text cannot be scored, or None."""
    if text is None or not text.strip() or not clean(text):
        return "empty_text"
    return "too_long" if len(text) > MAX_TEXT_CHARACTERS else None
