"""`evaluate`: retrieval and captioning of one checkpoint on one split. The protocols are `tasks/`'s."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from capfilt.data.corpus import Corpus, from_images
from capfilt.errors import UserError
from capfilt.inference.captioner import Captioner
from capfilt.models import checkpoint
from capfilt.stages.base import Report, option_values
from capfilt.stages.options import EvaluateOptions
from capfilt.stages.pair_training import IMAGE_COLUMNS
from capfilt.stages.results import ResultStage, result_path
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace
from capfilt.tasks.adapters import BlipCapabilities
from capfilt.tasks.captioning import evaluate_captioning
from capfilt.tasks.retrieval import evaluate_retrieval
from capfilt.training.distributed import device

TASKS = ("retrieval", "captioning")


class Evaluate(ResultStage):
    """Writes `runs/<out>.json`: metrics in percent (CIDEr x 100), protocol, counts, and the captions written."""

    name = "evaluate"
    version = 1

    def __init__(self, options: EvaluateOptions, workspace: Workspace, output: Part | None = None) -> None:
        unknown = [task for task in options.tasks if task not in TASKS]
        if unknown or not options.tasks:
            raise UserError(f"--tasks {unknown[0] if unknown else ''!r}: choose among {', '.join(TASKS)}")
        self.options = options
        self.checkpoint = workspace.model(options.model)
        checkpoint.read_config(self.checkpoint)
        self.images = workspace.part("images", options.images).expect("images").check()
        self.output = result_path(workspace.path, options.out or self.checkpoint.name)

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": option_values(self.options),
            "model": checkpoint.fingerprint(self.checkpoint),
            "images": self.images.digest(),
        }

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        return checkpoint.origin(self.checkpoint, self.options.model)

    def headline(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {name: metrics[name] for name in ("tr@1", "ir@1", "cider") if name in metrics}

    def outlook(self) -> str:
        return (
            f"{', '.join(self.options.tasks)} on split {self.options.split or 'all'!r} of {self.images.path}"
        )

    def measure(self, report: Report) -> dict[str, Any]:
        o = self.options
        model, tokenizer, _ = checkpoint.load(self.checkpoint, device())
        for task in o.tasks:
            try:
                model.require("filter" if task == "retrieval" else "captioner")
            except UserError as error:
                raise UserError(f"--tasks {task}: {self.checkpoint}: {error}") from error
        corpus = self._corpus(model.config.image_size)
        batches = _PixelBatches(corpus, o.batch_size)
        image_of_text = corpus.image_of_text.tolist()
        metrics: dict[str, float] = {}
        result: dict[str, Any] = {
            "metrics": metrics,
            "split": o.split,
            "images": len(corpus.image_ids),
            "texts": len(corpus),
            "left_out": dict(corpus.skipped),
        }
        if "retrieval" in o.tasks:
            found = evaluate_retrieval(
                BlipCapabilities(model, tokenizer),
                batches,
                corpus.image_ids,
                corpus.texts,
                [corpus.image_ids[row] for row in image_of_text],
                rerank_k=o.rerank,
                progress=lambda what, done, of: report(done, of, {"scoring": what}),
            )
            best = found.itm or found.itc
            metrics |= {name: round(value, 3) for name, value in best.metrics.items()}
            metrics |= {f"itc_{name}": round(value, 3) for name, value in found.itc.metrics.items()}
            result["protocol"] = (
                f"re-ranked by ITM, k = {o.rerank}" if found.itm else "cosine of ITC embeddings"
            )
            result["image_ranks"] = best.image_ranks.tolist()
            result["text_ranks"] = best.text_ranks.tolist()
        if "captioning" in o.tasks:
            references: list[list[str]] = [[] for _ in corpus.image_ids]
            for row, text in zip(image_of_text, corpus.texts, strict=True):
                references[row].append(text)
            written = evaluate_captioning(
                Captioner(model, tokenizer),
                batches,
                references,
                progress=lambda done, of: report(done, of, {"writing": "captions"}),
                method=o.method,
                num_beams=o.num_beams,
                prompt=o.prompt,
                max_new_tokens=o.max_new_tokens,
            )
            metrics |= {name: round(value, 3) for name, value in written.metrics.items()}
            result["captions"] = dict(zip(corpus.image_ids, written.captions, strict=True))
        return result

    def _corpus(self, size: int) -> Corpus:
        splits = (self.options.split,) if self.options.split else None
        corpus = from_images(self.images.tables(IMAGE_COLUMNS), splits=splits, size=size)
        if self.options.limit:
            keep = [
                row for row, image in enumerate(corpus.image_of_text.tolist()) if image < self.options.limit
            ]
            corpus = corpus.take(keep)
        if not len(corpus):
            raise UserError(
                f"{self.images.path}: no texts with pictures in split {self.options.split!r} "
                f"(left out: {dict(corpus.skipped) | dict(corpus.deselected)})"
            )
        return corpus


class _PixelBatches:
    """The pictures of a corpus, uint8 [B, 3, S, S] at a time; can be iterated over again."""

    def __init__(self, corpus: Corpus, batch_size: int) -> None:
        self.corpus, self.batch_size = corpus, batch_size

    def __iter__(self) -> Any:

        count = len(self.corpus.image_ids)
        for start in range(0, count, self.batch_size):
            rows = np.arange(start, min(start + self.batch_size, count), dtype=np.int64)
            yield torch.from_numpy(self.corpus.images.read(rows))
