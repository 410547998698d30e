"""What test_ray.py runs where only the loopback exists. Prints a line of JSON per check."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from capfilt.errors import RunError, UserError
from capfilt.execution.ray import RayExecutor
from capfilt.execution.run import run_stage
from capfilt.stages.base import ModelStage, Produced, ShardStage
from capfilt.stages.caption import CaptionOptions
from capfilt.stages.caption.stage import CaptionStage
from capfilt.stages.score import ScoreOptions
from capfilt.stages.score.stage import ScoreStage
from capfilt.tables.contracts import SIGNALS
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace
from tests.plugins.packages import install_documented
from tests.worlds import image_rows, write_images


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


class Meets(ModelStage):
    """Ends when another of its kind has begun; the one called `lonely` is never met, the one called `fails` fails."""

    name = "meets"
    version = 1

    def __init__(self, root: str, name: str, other: str) -> None:
        self.output, self.mark, self.other = (
            Path(root) / name,
            Path(root) / f"{name}.begun",
            Path(root) / f"{other}.begun",
        )

    def identity(self):
        return {}

    def outlook(self):
        return "a meeting"

    def done(self):
        return False

    def run(self, report):
        self.mark.write_text("")
        while not self.other.exists():
            time.sleep(0.05)
        if self.output.name == "fails":
            raise RunError("the machine is on fire")
        return {"threads": int(os.environ["OMP_NUM_THREADS"])}


def together(work, *stages):
    """What each stage came to, and the seconds until all had ended; the first that fails stops the rest."""
    shared = work.share(len(stages))

    def one(stage):
        found = attempt(stage, shared)
        if "error" in found:
            shared.stop()
        return found

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, stages))


def attempt(stage, work):
    try:
        summary = run_stage(stage, work, quiet=True)
        return {"rows": summary.rows_out, "now": summary.done_now, "figures": dict(summary.figures)}
    except (UserError, RunError) as error:
        shards = stage.output.shards() if isinstance(stage, ShardStage) else []
        return {"error": type(error).__name__, "message": str(error), "shards": shards}


def of_its_own():
    """How many nodes the executor of another process sees while this one's cluster runs on the machine."""
    code = "import ray\nfrom capfilt.execution.ray import RayExecutor\nwith RayExecutor(): print(len(ray.nodes()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else done.stderr[-500:]


if __name__ == "__main__":
    root = sys.argv[1]
    site = str(install_documented(Path(root) / "site"))
    sys.path.insert(0, site)
    # Workers are new processes: what is installed for them is what their own path has.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
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
        place = Workspace(Path(root) / "workspace")
        write_images(place.part("images", "web"), [image_rows("web", 4), image_rows("web", 3, start=9)])
        captions = attempt(
            CaptionStage(CaptionOptions(images="web", captioner="colours:square"), place), work
        )
        scores = ScoreOptions(images="web", captions=("colours",), filter="colours:")
        judged = attempt(ScoreStage(scores, place), work)
        texts = [
            row["text"] for table in place.part("captions", "colours").tables() for row in table.to_pylist()
        ]
        values = [
            row["colour_score"]
            for table in place.part("scores", "colours").tables()
            for row in table.to_pylist()
        ]
        print(json.dumps({"plugins": [captions, judged, texts, values]}), flush=True)
        met = together(work, Meets(root, "one", "two"), Meets(root, "two", "one"), Rows(root, "beside"))
        print(json.dumps({"together": met}), flush=True)
        stopped = together(work, Meets(root, "lonely", "nobody"), Meets(root, "fails", "lonely"))
        print(json.dumps({"stopped": stopped}), flush=True)
        print(json.dumps({"own": of_its_own()}), flush=True)
