"""What test_ray.py runs where only the loopback exists. Prints a line of JSON per check."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from capfilt.errors import RunError, UserError
from capfilt.execution.ray import RayExecutor
from capfilt.execution.run import run_stage
from capfilt.stages.base import ModelStage, Produced, ShardStage
from capfilt.tables.contracts import SIGNALS
from capfilt.tables.shards import Counts, Part


class Rows(ShardStage):
    """Shards of rows; dies, raises or refuses where it is told to."""

    name = "rows"
    version = 1
    contract = SIGNALS

    def __init__(self, root: str, name: str, deaths: dict[int, int] | None = None, mode: str = "") -> None:
        self.output, self.root, self.deaths, self.mode = Part(Path(root) / name), root, deaths or {}, mode

    def identity(self):
        return {"name": self.output.name}

    def shards(self):
        return list(range(6))

    def setup(self):
        if self.mode == "setup":
            raise UserError("the checkpoint is not there")

    def process(self, shard):
        marks = Path(self.root) / f"{self.output.name}.{shard}.deaths"
        died = len(marks.read_text()) if marks.exists() else 0
        if died < self.deaths.get(shard, 0):
            marks.write_text("x" * (died + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        if self.mode == "raise" and shard == 3:
            raise ValueError("a bug")
        return Produced(SIGNALS.table([{"image_id": f"{shard}-{n}"} for n in range(50)]), Counts(50, 50))


class Steps(ModelStage):
    """A piece of work that reports its steps."""

    name = "steps"
    version = 1

    def __init__(self, root: str) -> None:
        self.output = Path(root) / "steps.txt"

    def identity(self):
        return {}

    def outlook(self):
        return "5 steps"

    def done(self):
        return self.output.exists()

    def run(self, report):
        for step in range(1, 6):
            report(step, 5, {"loss": 1 / step})
        self.output.write_text("done")
        return {"threads": int(os.environ["OMP_NUM_THREADS"])}


def attempt(stage, work):
    try:
        summary = run_stage(stage, work, quiet=True)
        return {"rows": summary.rows_out, "now": summary.done_now, "figures": dict(summary.figures)}
    except (UserError, RunError) as error:
        return {"error": type(error).__name__, "message": str(error), "shards": stage.output.shards()}


if __name__ == "__main__":
    root = sys.argv[1]
    with RayExecutor() as work:
        checks = {
            "plain": Rows(root, "plain"),
            "again": Rows(root, "plain"),
            "killed": Rows(root, "killed", {1: 1, 4: 2}),
            "hopeless": Rows(root, "hopeless", {2: 99}),
            "bug": Rows(root, "bug", mode="raise"),
            "setup": Rows(root, "setup", mode="setup"),
            "steps": Steps(root),
        }
        for name, stage in checks.items():
            print(json.dumps({name: attempt(stage, work)}), flush=True)
