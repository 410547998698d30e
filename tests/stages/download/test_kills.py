"""Would catch: a row lost or twice after `kill -9`, a half shard behind a manifest, a run that does not go on.

The driver, the child that fetches and Ray's worker are killed at random moments; a rerun completes. The suite does a few;
`pytest -m slow tests/stages/download/test_kills.py` does 50. On Ray in a network namespace of its own, as tests/loopback.py
says why.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.tables.shards import Part
from tests.stages.download.web import needs_img2dataset

pytestmark = needs_img2dataset

ROOT = Path(__file__).resolve().parents[3]
ROWS = 240
PATHS = ("good", "404", "cut", "wide")


def descendants(pid):
    """(pid, command line) of every process below `pid`."""
    found = []
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                words = (
                    Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
                found += [(int(child), words), *descendants(int(child))]
    except OSError:
        pass
    return found


def victims(driver, kind):
    if kind == "driver":
        return [driver]
    mark = "download.child" if kind == "child" else "ray::"
    return [
        pid for pid, words in descendants(driver) if mark in words and (kind == "child" or "_Worker" in words)
    ]


def command(tmp_path, port, execution):
    words = [
        sys.executable,
        "-m",
        "capfilt",
        "download",
        str(tmp_path / "urls.parquet"),
        "--out",
        str(tmp_path / "out"),
    ]
    words += [
        "--number-sample-per-shard",
        "20",
        "--allow-host",
        f"127.0.0.1:{port}",
        "--execution",
        execution,
    ]
    return words


def check(tmp_path, urls):
    """Every row once and in order, every shard whole, nothing else that passes for a shard."""
    part = Part(tmp_path / "out").check()
    assert part.shards() == list(range(ROWS // 20))
    rows = pa.concat_tables(part.tables(["url", "key", "failure"])).to_pylist()
    assert [row["url"] for row in rows] == urls
    assert len({row["key"] for row in rows}) == ROWS
    expected = {"good": None, "wide": None, "404": "not_found", "cut": "truncated"}
    assert {row["failure"] for row in rows} <= {*expected.values(), "worker_died"}
    # Two deaths over one slice are told, not hidden; one costs no row.
    wrong = [row for row in rows if row["failure"] != expected[row["url"].rpartition("/")[2]]]
    assert all(row["failure"] == "worker_died" for row in wrong)
    names = sorted(path.name for path in part.path.glob("[0-9]*.parquet"))
    assert names == [f"{shard:05d}.parquet" for shard in part.shards()]
    return len(wrong)


def kill_and_rerun(tmp_path, server, kinds, execution="inline", seed=0):
    """Kill once per kind at a random moment of the work, then run to the end. Returns rows that say `worker_died`."""
    draw = random.Random(seed)
    urls = [server.url(PATHS[number % 4]) for number in range(ROWS)]
    pq.write_table(pa.table({"url": urls, "caption": [""] * ROWS}), tmp_path / "urls.parquet")
    words = command(tmp_path, server.port, execution)
    killed = 0
    for kind in kinds:
        asked = len(server.log)
        with (tmp_path / "log").open("wb") as log:
            driver = subprocess.Popen(
                [*words, "--quiet"], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
        # Not by the clock: so many answers after the work began.
        after = draw.randrange(ROWS // 4)
        found: list[int] = []
        while driver.poll() is None:
            if len(server.log) > asked + after and (found := victims(driver.pid, kind)):
                os.kill(draw.choice(found), signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.005)
        if kind == "driver":
            driver.wait()
        else:
            assert driver.wait() == 0, (tmp_path / "log").read_text()[-2000:]
    assert killed == len(kinds), "the run was over before anything was killed"
    if kinds[-1] != "driver":
        # What took its place did the rest.
        return check(tmp_path, urls)
    done = subprocess.run([*words, "--quiet"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return check(tmp_path, urls)


@pytest.mark.parametrize("kinds", [("driver",), ("child",)], ids=" ".join)
def test_a_rerun_completes(tmp_path, server, kinds):
    assert kill_and_rerun(tmp_path, server, kinds) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_a_rerun_completes_often(tmp_path, server, seed):
    kill_and_rerun(tmp_path, server, [("driver", "child")[seed % 2]], seed=seed + 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_rerun_completes_on_ray(tmp_path, seed):
    ray_in_its_own_network(tmp_path, ("worker", "child", "driver")[seed % 3], seed)


def test_a_killed_worker_of_ray_is_replaced(tmp_path):
    ray_in_its_own_network(tmp_path, "worker", 0)


def ray_in_its_own_network(tmp_path, kind, seed):
    """In a process of its own, and its server too: there is no way back out of a network namespace."""
    pytest.importorskip("ray")
    from tests.loopback import UNAVAILABLE

    code = (
        "import pathlib, sys; from tests.stages.download import test_kills, web; server = web.Server()\n"
        f"died = test_kills.kill_and_rerun(pathlib.Path({str(tmp_path)!r}), server, [{kind!r}], 'ray', {seed})\n"
        "server.stop(); sys.exit(3 if died else 0)"
    )
    loopback = str(ROOT / "tests" / "loopback.py")
    done = subprocess.run(
        [sys.executable, loopback, sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == UNAVAILABLE:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-4000:]
