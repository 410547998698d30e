"""Would catch: a sandbox that rests on the parser alone, that dies with what it was asked, or that outlives its parent."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from capfilt.stages.sandbox import NoAnswer, Sandbox
from tests.refusals import refused

GIVEN = {"t": pa.table({"x": [1, 2, 3]})}


@pytest.fixture(scope="module")
def sandbox():
    made = Sandbox()
    yield made
    made.end()


@pytest.mark.parametrize(
    "sql",
    ["(FROM read_text('/etc/hostname') SELECT content)", "(SELECT count(*) FROM glob('/*'))",
     "(FROM read_csv('/etc/passwd') LIMIT 1)",
     "(SELECT count(*) FROM 'other.parquet')", "x; SET threads = 2; SELECT x", "x; COPY (SELECT 1) TO 'made.csv'; SELECT x",
     "x; ATTACH 'made.db'; SELECT x", "x; INSTALL httpfs; SELECT x", "(SELECT count(*) FROM read_parquet('http://127.0.0.1:9/x'))",
     "x; SET lock_configuration = false; SELECT x", "(SELECT count(*) FROM GIVEN)"],
)  # fmt: skip
def test_nothing_but_its_tables_is_reached_whatever_is_asked(sandbox, tmp_path, monkeypatch, sql):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoAnswer) as caught:
        sandbox.ask(sql, GIVEN, 20)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_was_killed_is_replaced(sandbox):
    endless = "levenshtein(repeat('ab', 200000), repeat('ba', 200000 + x))"
    with refused("0.2 s", error=NoAnswer):
        sandbox.ask(f"{endless} AS y", GIVEN, 0.2)
    with pytest.raises(NoAnswer, match=r"[mM]emory"):
        sandbox.ask("length(list_transform(range(3000000000), lambda y: y + x)) AS y", GIVEN, 20)
    for _ in range(2):
        assert sandbox.ask("x + 1 AS y", GIVEN, 20)["y"].to_pylist() == [2, 3, 4]
        sandbox._child.kill()  # as the end of a Ray session does
        sandbox._child.wait()


def test_the_child_goes_with_its_parent(tmp_path):
    code = (
        "import os, signal, pyarrow as pa; from capfilt.stages.sandbox import SANDBOX; "
        "SANDBOX.ask('x', {'t': pa.table({'x': [1]})}, 20); print(SANDBOX._child.pid, flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).resolve().parents[2]
    child = int(subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout)
    end = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != "zombie" and time.monotonic() < end:
        time.sleep(0.05)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"
