"""One shard of work, wherever it runs: a stage's rows for it, committed to the part. Which shards are to do is run.py's."""

from __future__ import annotations

import time

from capfilt.errors import RunError
from capfilt.stages.base import ShardStage
from capfilt.tables.manifest import Manifest

INPUT_CHANGES = 3
"""How often a shard is made anew because a retry of its input committed a generation meanwhile."""


def process_and_commit(stage: ShardStage, mark: str, shard: int) -> Manifest:
    """What a worker does with one shard, wherever it runs."""
    for _ in range(INPUT_CHANGES):
        start = time.monotonic()
        before = stage.shard_fingerprint(mark, shard) if stage.reads_manifests else None
        produced = stage.process(shard)
        after = stage.shard_fingerprint(mark, shard)
        if before in (None, after):
            return stage.output.commit(
                shard,
                produced.table,
                produced.counts,
                after,
                time.monotonic() - start,
                stats=produced.stats,
                successor=produced.successor,
                batch_size=produced.batch_size,
            )
    raise RunError(
        f"{stage.name}, shard {shard:05d}: its input got a new generation while it was read, {INPUT_CHANGES} times; "
        "run again when that run is over"
    )
