"""What test_ranks.py runs where only the loopback exists. Prints a line of JSON per run."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import psutil

from capfilt.data.pairs import Pairs
from capfilt.errors import RunError, UserError
from capfilt.execution.run import executor, run_stage
from capfilt.stages.train import FinetuneFilter
from capfilt.stages.training_options import FinetuneFilterOptions
from capfilt.tables.workspace import Workspace
from capfilt.training.launched import launched_rank


class Dies(Pairs):
    """Pairs whose reader, on rank 1, kills its process once, or says that it cannot go on."""

    def batches(self, *arguments, **options):
        mark = self.mark
        for batch in super().batches(*arguments, **options):
            if launched_rank() == 1 and batch.step == 3 and mark.suffix == ".fails":
                raise RunError("the disk is on fire")
            if launched_rank() == 1 and batch.step == 3 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


class Filter(FinetuneFilter):
    """As the stage, but its reader dies."""

    mark = None

    def _run(self, ranks, report):
        heard = psutil.Process().net_connections("inet")
        place = self.output.with_name(f"{self.output.name}.{ranks.rank}.sockets")
        place.write_text("\n".join(each.laddr.ip for each in heard if each.status == psutil.CONN_LISTEN))
        read = self.source.data

        def data(size):
            pairs = read(size)
            if self.mark is not None:
                pairs.mark, pairs.__class__ = self.mark, Dies
            return pairs

        self.source.data = data
        return super()._run(ranks, report)


def attempt(place: Workspace, work, out: str, ranks: int, mark: Path | None = None, **more):
    settings = {"steps": 5, "batch_size": 4, "augment": False, "save_every": 2, "queue_size": 8, **more}
    options = FinetuneFilterOptions(init="filter", human=("human",), out=out, ranks=ranks, **settings)
    stage = Filter(options, place)
    stage.mark = mark
    try:
        return {out: dict(run_stage(stage, work, quiet=True).figures)}
    except (UserError, RunError) as error:
        return {out: {"error": type(error).__name__, "message": str(error)}}


if __name__ == "__main__":
    place, how = Workspace(sys.argv[1]), sys.argv[2]
    with executor(how) as work:
        runs = {
            "whole": (None, {}),
            "fails": (".fails", {}),
            "odd": (None, {"batch_size": 5}),
            "killed": (".killed", {}),
            "crowded": (None, {}),
        }
        for name in sys.argv[3:]:
            mark, more = runs[name]
            if name == "crowded":
                # Another job has the cluster, for as long as this process is there.
                import capfilt.execution.ray as execution
                from capfilt.execution.board import Board
                from capfilt.execution.cluster import ray

                execution.PLACEMENT = 2.0
                other = ray.remote(Board).options(num_cpus=os.cpu_count()).remote()
                ray.get(other.read.remote())
            path = None if mark is None else (Path(sys.argv[1]) / how).with_suffix(mark)
            print(json.dumps(attempt(place, work, f"{how}-{name}", 2, path, **more)), flush=True)
