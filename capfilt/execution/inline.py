"""Runs a stage in this process, one shard after the other. For debugging, and for machines without Ray.

A stage that trains in several ranks runs in as many processes of this machine; under torchrun, this process is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from capfilt.execution.run import process_and_commit
from capfilt.stages.base import ModelStage, Report, ShardStage
from capfilt.tables.shards import Manifest
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
        if stage.ranks != 1 and not started_together():
            # Not at the top: it imports torch, which other stages here do without.
            from capfilt.execution.together import ranks_here, run_here

            ranks = ranks_here(stage)
            if ranks > 1:
                return run_here(stage, ranks, report)
        return stage.run(report)

    def share(self, ways: int) -> None:
        return None
