"""What test_interrupted.py runs, in a process that gets signals: a training in several ranks, slow enough to be stopped.

Prints its figures, or that it was interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from capfilt.execution.run import executor, run_stage
from capfilt.stages.train import FinetuneFilter
from capfilt.stages.training_options import FinetuneFilterOptions
from capfilt.tables.workspace import Workspace


class Slow(FinetuneFilter):
    """As the stage, but a step takes a while, and so does saving: rank 0 marks that it has begun to."""

    def _run(self, ranks, report):
        # Where the stage runs, which with Ray is another process.
        from capfilt.training import state

        whole = state.write

        def slow(path, *rest):
            begun = Path(path).with_name("saving")
            begun.touch()
            time.sleep(float(os.environ.get("SLOW_SAVING", "0")))
            whole(path, *rest)
            begun.unlink()

        state.write = slow
        try:
            return super()._run(ranks, lambda *values: (time.sleep(0.15), report(*values))[1])
        finally:
            state.write = whole


if __name__ == "__main__":
    place, how, out, ranks = Workspace(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    settings = {"steps": 30, "batch_size": 4, "augment": False, "save_every": 1000, "queue_size": 8}
    options = FinetuneFilterOptions(init="filter", human=("human",), out=out, ranks=ranks, **settings)
    try:
        with executor(how) as work:
            print(json.dumps(dict(run_stage(Slow(options, place), work, quiet=True).figures)), flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(1)
