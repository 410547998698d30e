"""`caption` and `score` from Parquet shards of JPEGs to Parquet shards: images/s, and how much of the time the engine computes.

Some pictures are broken, as everywhere. The engine's share is of wall time: on a processor the time spent inside the engine; on
a GPU the time that it computes, by CUDA's own events around the engines' passes, so that a host that cannot keep up is seen.
"""

from __future__ import annotations

import io
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _form import Record
from PIL import Image

from capfilt.data.tokenizer import Tokenizer
from capfilt.execution.commit import process_and_commit
from capfilt.inference import decoding
from capfilt.models import checkpoint
from capfilt.models.blip.model import Blip
from capfilt.stages.caption import CaptionOptions
from capfilt.stages.caption.stage import CaptionStage
from capfilt.stages.score import ScoreOptions
from capfilt.stages.score.stage import ScoreStage
from capfilt.tables.contracts import IMAGES
from capfilt.tables.ids import image_id
from capfilt.tables.manifest import Counts
from capfilt.tables.workspace import Workspace

SHARE = {"cpu": 0.85, "cuda": 0.9}
"""The least share of the wall time that `base` is to compute in."""

BROKEN = 20
"""Of so many pictures, one is."""


class Busy:
    """How long a GPU was busy with calls that are watched: from a call's first kernel to its last. None of them waits for the
    GPU, but for a choice among the likeliest tokens, and what is not watched is not counted: never too much.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[Any, Any]] = []

    def watch(self, owner: Any, name: str) -> None:
        """Every call of `owner.name` from now on."""
        call = getattr(owner, name)

        def watched(*inputs: Any, **options: Any) -> Any:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            out = call(*inputs, **options)
            end.record()
            self.spans.append((start, end))
            return out

        setattr(owner, name, watched)

    @property
    def seconds(self) -> float:
        """Since the beginning; waits for the GPU."""
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.spans) / 1000


def write_images(workspace: Workspace, count: int, seed: int) -> int:
    """Two shards of 512-pixel JPEGs, `count` in all, one of `BROKEN` cut off. Returns how many can be used."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(min(count, 256)):
        blocks = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        image = Image.fromarray(blocks).resize((512, 512), Image.Resampling.BICUBIC)
        image.save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    images = workspace.part("images", "web")
    mark = images.begin(IMAGES, "benchmark", {})
    broken = 0
    for shard in range(2):
        rows = []
        for number in range(count // 2):
            key = f"{shard:05d}{number:04d}"
            data = pictures[number % len(pictures)]
            if number % BROKEN == BROKEN - 1 or number == 1:
                data, broken = data[:300], broken + 1
            rows.append(
                {
                    "image_id": image_id("web", key), "dataset": "web", "key": key, "status": "success", "source": "web",
                    "captions": [" ".join(f"w{i}" for i in rng.integers(0, 1000, 12))],
                    "image": {"bytes": data, "path": f"{key}.jpg"},
                }
            )  # fmt: skip
        images.commit(shard, IMAGES.table(rows), Counts(len(rows), len(rows)), mark, 1.0)
    return 2 * (count // 2) - broken


def stages(
    name: str,
    model: Blip,
    tokenizer: Tokenizer,
    count: int,
    tokens: int,
    seed: int,
    precision: str,
    compiled: bool,
    record: Record,
) -> None:
    """Both stages on `count` pictures: images/s of those that can be used, and the engine's share of the wall time."""
    device = next(model.parameters()).device.type
    with tempfile.TemporaryDirectory() as directory:
        workspace = Workspace(Path(directory))
        checkpoint.save(Path(directory) / "models" / "both", model, tokenizer)
        usable = write_images(workspace, count, seed)
        # Two batches at least in each shard, so that one can be made ready while another is worked on.
        batch = 0 if device == "cuda" else 2 if name == "base" else 64
        how = {"precision": precision, "compile": compiled, "batch_size": batch}
        caption = CaptionOptions(captioner="both", images="web", min_new_tokens=tokens, **how)
        score = ScoreOptions(filter="both", images="web", captions=("both",), **how)
        for make in (lambda: CaptionStage(caption, workspace), lambda: ScoreStage(score, workspace)):
            stage: CaptionStage | ScoreStage = make()
            begun = stage.begin()
            stage.setup()
            busy = Busy()
            if device == "cuda":
                engine = (stage.writer if isinstance(stage, CaptionStage) else stage.scorer).engine  # type: ignore[attr-defined]
                busy.watch(engine, "tokens")
                busy.watch(engine, "cross")
                if isinstance(stage, CaptionStage):
                    busy.watch(engine.writer, "decode")
                    busy.watch(decoding, "draw")
                else:
                    busy.watch(engine.model, "match_logits")
                    busy.watch(engine.model, "embed_text")
            start = time.perf_counter()
            for shard in stage.shards():
                process_and_commit(stage, begun, shard)
            seconds = time.perf_counter() - start
            found = [stage.output.stats(shard) for shard in stage.output.shards()]
            computing = busy.seconds if device == "cuda" else sum(each["engine_seconds"] for each in found)
            if stage.name == "caption":
                assert sum(each["kept"] for each in found) == usable, (
                    "a picture that can be used has a caption"
                )
            label = f"{name}_stage_{stage.name}"
            record.figure(f"{label}_images_per_second", usable / seconds)
            record.figure(f"{label}_batch", min(each["batch_size"] for each in found))
            if name == "base":
                record.target(f"{label}_engine_share", computing / seconds, ">=", SHARE[device])
            else:
                record.figure(f"{label}_engine_share", computing / seconds)
