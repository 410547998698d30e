"""Would catch: a dead child that takes its rows along, one that hangs for ever, one that outlives its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from capfilt.stages.download.settings import Settings
from capfilt.stages.download.worker import Worker, shared_worker
from tests.refusals import failed
from tests.stages.download.web import (
    make,
    needs_img2dataset,
    run,
)

ROOT = Path(__file__).resolve().parents[3]


@needs_img2dataset
def test_a_killed_child_costs_no_row(tmp_path, server):
    urls = [server.url("good")] * 8 + [server.url("held")] + [server.url("good")] * 3
    stage = make(tmp_path, urls, server, total_timeout=20.0, timeout=20.0)
    stage.setup()
    server.hold.clear()

    def kill():
        while server.log.count("/held") < 1 or len(server.log) < 12:
            time.sleep(0.02)
        time.sleep(2.0)  # for the other answers to arrive, on a busy machine too
        os.kill(shared_worker().pid, signal.SIGKILL)
        server.hold.set()

    server.log.clear()
    killer = threading.Thread(target=kill)
    killer.start()
    rows = run(stage)
    killer.join()
    assert [row["failure"] for row in rows] == [None] * 12
    assert server.log.count("/held") == 2
    # What the first child had answered was kept: fewer requests than twice the list.
    assert len(server.log) < 24


# A child that speaks the same frames and does what each URL says; its start costs nothing.
PUPPET = """
import os, sys, time
sys.path[:] = __import__("json").loads(sys.argv[1])
from capfilt.stages.download import wire
out = os.dup(1)
send = lambda *frame: os.write(out, b"".join(wire.pack(*frame)))
send({"ready": "0"})
while True:
    rows = wire.unpack(sys.stdin.buffer.read)[0]["rows"]
    for row, url in rows:
        if url == "exit":
            print("its last words", file=sys.stderr, flush=True)
            os._exit(7)
        if url == "mute":
            time.sleep(60)
        send({"begin": row})
        if url == "poison":
            os.kill(os.getpid(), 11)
        if url == "hang":
            time.sleep(60)
        send({"row": row, "status": "success"}, b"x" * 100_000)
    send({"done": len(rows)})
"""

PLAIN = Settings(timeout=0.1, total_timeout=0.1)


@pytest.fixture
def puppet(monkeypatch):
    worker = Worker()
    worker.children = 0

    def command(path):
        worker.children += 1
        return [sys.executable, "-S", "-c", PUPPET, json.dumps(path)]

    monkeypatch.setattr("capfilt.stages.download.worker.command", command)
    yield worker
    worker.close()


def failures(answers):
    return [answers[row].columns.get("failure") for row in sorted(answers)]


def test_a_picture_that_kills_its_child_costs_only_itself(puppet):
    rows = list(enumerate(["ok", "poison", "ok", "ok", "poison", "ok"]))
    answers = puppet.run(rows, PLAIN)
    assert failures(answers) == [None, "worker_died", None, None, "worker_died", None]
    assert "exit status -11" in answers[1].columns["error_message"]
    assert answers[5].picture == b"x" * 100_000


def test_pictures_that_kill_do_not_cost_the_others_of_their_slice(puppet):
    answers = puppet.run(list(enumerate(["poison"] * 7 + ["ok"] * 20)), PLAIN)
    assert failures(answers) == ["worker_died"] * 7 + [None] * 20
    assert puppet.children == 2 * 5 + 2 + 1  # the first five twice, as any; then each once


def test_a_url_that_kills_its_child_while_it_is_fetched_is_found(puppet):
    """Nothing says which of those in flight it was."""
    answers = puppet.run(list(enumerate(["ok"] * 3 + ["exit"] + ["ok"] * 20 + ["exit"])), PLAIN)
    assert failures(answers) == [None] * 3 + ["worker_died"] + [None] * 20 + ["worker_died"]
    assert "exit status 7: its last words" in answers[3].columns["error_message"]
    assert puppet.children < 16


def test_children_that_can_do_nothing_end(puppet):
    assert failures(puppet.run([(row, "exit") for row in range(40)], PLAIN)) == ["worker_died"] * 40
    assert puppet.children == 20
    assert failures(puppet.run([(0, "ok")], PLAIN)) == [None]


def test_a_slice_costs_a_bounded_number_of_children(puppet):
    answers = puppet.run([(row, "poison") for row in range(30)], PLAIN)
    assert failures(answers) == ["worker_died"] * 30
    assert puppet.children == 2 * 5 + 25


@pytest.mark.parametrize(("url", "clock"), [("hang", "DECODE_SECONDS"), ("mute", "Settings.longest_silence")])
def test_a_child_that_hangs_is_replaced(puppet, monkeypatch, url, clock):
    """A picture has a clock of its own."""
    monkeypatch.setattr(f"capfilt.stages.download.worker.{clock}", 0.5)
    start = time.monotonic()
    assert failures(puppet.run(list(enumerate(["ok", url, "ok"])), PLAIN)) == [None, "worker_died", None]
    assert time.monotonic() - start < 20


@needs_img2dataset
def test_a_child_that_only_waits_for_retries_is_well(server, monkeypatch):
    """Longer without a row than a child may be silent: the first is there after seven attempts and 3 seconds."""
    urls = [(row, server.url("silent")) for row in range(3)]
    plain = replace(
        PLAIN,
        thread_count=1,
        retries=2,
        timeout=0.4,
        total_timeout=0.4,
        allow_host=(f"127.0.0.1:{server.port}",),
    )
    shared_worker().run([(0, None)], plain)  # imports take longer than that
    first = shared_worker().pid
    monkeypatch.setattr(Settings, "longest_silence", 2.0)
    server.log.clear()
    assert failures(shared_worker().run(urls, plain)) == ["timeout"] * 3
    assert shared_worker().pid == first
    assert len(server.log) == 9


def test_a_child_that_never_starts_ends_the_run(puppet, monkeypatch):
    monkeypatch.setattr(
        "capfilt.stages.download.worker.command",
        lambda path: [sys.executable, "-S", "-c", "raise SystemExit('broken')"],
    )
    with failed("exit status 1", "broken"):
        puppet.run([(0, "ok")], PLAIN)


def test_a_child_does_not_outlive_its_parent():
    code = (
        "from capfilt.stages.download.worker import shared_worker; import os\n"
        "shared_worker().start(); print(shared_worker().pid, flush=True); os.kill(os.getpid(), 9)"
    )
    parent = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout)
    until = time.monotonic() + 30
    while time.monotonic() < until and Path(f"/proc/{child}/stat").exists():
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()
