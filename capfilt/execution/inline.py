"""Runs a stage in this process, one shard after the other. For debugging, and for machines without Ray.

A stage that trains in several ranks runs in as many processes of this machine; under torchrun, this process is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from capfilt.errors import UserError
from capfilt.execution.commit import process_and_commit
from capfilt.stages.base import ModelStage, Report, ShardStage
from capfilt.tables.manifest import Manifest
from capfilt.training.launched import started_together


class InlineExecutor:
    """The executor without a cluster."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def shards(self, stage: ShardStage, mark: str, todo: list[int]) -> Iterator[Manifest]:
        stage.setup()
        try:
            for shard in todo:
                yield process_and_commit(stage, mark, shard)
        finally:
            stage.teardown()

    def model(self, stage: ModelStage, report: Report) -> Mapping[str, Any]:
        if not started_together():
            # Not at the top: other stages here do without torch.
            import torch

            gpus = torch.cuda.device_count()
            ranks = stage.ranks(gpus)
            if gpus and ranks > gpus:
                raise UserError(f"--ranks {ranks}: this machine has {gpus} GPUs")
            if ranks > 1:
                from capfilt.execution.together import run_here

                return run_here(stage, ranks, report)
        return stage.run(report)

    def share(self, ways: int) -> None:
        return None
