"""What test_cluster.py runs where only the loopback exists: a cluster of two nodes, and runs on it that lose some of it.

Prints a line of JSON per run: what it came to, and what the driver said on standard error.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ray.cluster_utils import Cluster

from capfilt.errors import RunError, UserError
from capfilt.execution import cluster as connection
from capfilt.execution.ray import RayExecutor
from capfilt.execution.run import run_stage
from capfilt.stages.base import ModelStage, Produced, ShardStage
from capfilt.tables.contracts import SIGNALS
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace
from capfilt.training.launched import launched_rank
from tests.worlds import image_rows, write_images


def touch_and_wait(root: Path, name: str, held: bool) -> None:
    """Says that `name` has begun, and goes on when it may."""
    first = not (root / f"{name}.begun").exists()
    (root / f"{name}.begun").touch()
    while held and first and not (root / "go").exists():
        time.sleep(0.05)


class Rows(ShardStage):
    """Shards of a row; the first time, each waits for the word to go on, or dies."""

    name = "rows"
    version = 1
    contract = SIGNALS

    def __init__(
        self, root: Path, name: str, shards: int, *, held: bool = False, dies: tuple[int, ...] = ()
    ) -> None:
        self.root = root / name
        self.root.mkdir()
        self.output, self.count, self.held, self.dies = Part(self.root / "part"), shards, held, dies

    def identity(self):
        return {}

    def shards(self):
        return list(range(self.count))

    def process(self, shard):
        died = (self.root / f"{shard}.begun").exists()
        touch_and_wait(self.root, str(shard), self.held)
        if shard in self.dies and not died:
            os.kill(os.getpid(), signal.SIGKILL)
        threads = os.environ["OMP_NUM_THREADS"]
        return Produced(SIGNALS.table([{"image_id": f"{shard}-{threads}"}]), Counts(1, 1))


class Piece(ModelStage):
    """One piece of work, or several ranks; the first time, it waits for the word to go on."""

    name = "piece"
    version = 1

    def __init__(self, root: Path, name: str, ranks: int = 1) -> None:
        self.root = root / name
        self.root.mkdir()
        self.output, self.count = self.root / "done", ranks

    def ranks(self, gpus):
        return self.count

    def identity(self):
        return {}

    def outlook(self):
        return "a piece of work"

    def done(self):
        return False

    def run(self, report):
        touch_and_wait(self.root, f"piece{launched_rank()}", held=True)
        return {"threads": int(os.environ["OMP_NUM_THREADS"])}


def attempt(stage, meanwhile=None):
    """Runs a stage while `meanwhile` happens beside it. Returns what came of it, and what was said."""
    said = io.StringIO()
    beside = threading.Thread(target=meanwhile or (lambda: None))
    found = {}
    start = time.monotonic()
    with contextlib.redirect_stderr(said), RayExecutor() as work:
        beside.start()
        try:
            summary = run_stage(stage, work, quiet=True)
            found = {"rows": summary.rows_out, "figures": dict(summary.figures)}
        except (UserError, RunError) as error:
            found = {"error": type(error).__name__, "message": str(error)}
        beside.join()
    if isinstance(stage, ShardStage):
        tables = [table.to_pylist() for table in stage.output.tables()]
        found["ids"] = sorted(row["image_id"] for rows in tables for row in rows)
    return {**found, "said": said.getvalue().splitlines(), "seconds": time.monotonic() - start}


def until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill(node):
    """As a machine dies: nothing is told."""
    cluster.remove_node(node, allow_graceful=False)


def other_work():
    time.sleep(600)


def autoscalers():
    """What is said of ranks with GPUs, which no node has: without an autoscaler, and where one has written its report."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_put

    refused = ""
    try:
        RayExecutor()._together("--ranks 9", 9, gpu=True)
    except UserError as error:
        refused = str(error)
    report = {"autoscaler_report": {"active_nodes": {"gpu-workers": 1}}}

    def reported(ask):
        # Ray's own monitor writes its report over this one every few seconds.
        for _ in range(20):
            _internal_kv_put(DEBUG_AUTOSCALING_STATUS, json.dumps(report), overwrite=True)
            with contextlib.suppress(UserError, connection.NoRoom):
                return ask()
        raise AssertionError(ask)

    size = reported(lambda: RayExecutor()._together("--ranks 9", 9, gpu=True))
    wait, said = connection.Wait("pretrain"), io.StringIO()
    time.sleep(1.1)
    with contextlib.redirect_stderr(said):
        reported(lambda: wait.look(size, size.workers))
    return [refused, said.getvalue()]


def say(**found):
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": True})
    os.environ["RAY_ADDRESS"] = cluster.address
    connection.SAID_AFTER, connection._LOOK = 1.0, 0.5

    other = cluster.add_node(num_cpus=2)
    if sys.argv[2:] == ["ranks"]:
        ranks = Piece(root, "ranks", 2)

        def kill_a_rank():
            until(lambda: len(list(ranks.root.glob("*.begun"))) == 2)
            kill(other)

        say(ranks_killed=attempt(ranks, kill_a_rank))
        sys.exit()
    say(one_left=attempt(Rows(root, "one-left", 1)))
    say(worker_killed=attempt(Rows(root, "worker-killed", 3, dies=(1,))))

    stage = Rows(root, "node-killed", 5, held=True)

    def kill_other():
        until(lambda: len(list(stage.root.glob("*.begun"))) == 4)
        kill(other)
        (stage.root / "go").touch()

    say(node_killed=attempt(stage, kill_other))

    larger = cluster.add_node(num_cpus=3)
    piece = Piece(root, "piece")

    def kill_larger():
        until((piece.root / "piece0.begun").exists)
        kill(larger)

    say(piece_killed=attempt(piece, kill_larger))

    larger = cluster.add_node(num_cpus=3, resources={"larger": 1})
    waits = Rows(root, "waits", 1)

    def occupy_and_kill():
        # Another job has a processor of the node that the worker would fill, until the node is gone.
        until(lambda: "waits for" in sys.stderr.getvalue())
        kill(larger)

    with RayExecutor():
        other_job = connection.ray.remote(num_cpus=1, resources={"larger": 1})(other_work).remote()
        until(lambda: connection.ray.available_resources().get("larger", 0) == 0)
        say(waits=attempt(waits, occupy_and_kill))
        say(scaled=autoscalers())

    place = Workspace(root / "workspace")
    write_images(place.part("images", "web"), [image_rows("web", 4), image_rows("web", 3, start=9)])
    submit = [
        str(Path(sys.executable).with_name("ray")),
        "job",
        "submit",
        "--address",
        f"http://{cluster.webui_url}",
    ]
    recipe = root / "recipe.yaml"
    recipe.write_text(
        "{version: 1, description: copies, stages: [{stage: duplicates, options: {images: web}}]}"
    )
    capfilt = [sys.executable, "-m", "capfilt", "run", str(recipe), "-w", str(place.path)]
    done = subprocess.run([*submit, "--", *capfilt], capture_output=True, text=True, timeout=300)
    say(submitted=[done.returncode, done.stdout, done.stderr])
    cluster.shutdown()
