"""Catches a loop that does not close: the quickstart in miniature, through Ray and the loopback web, killed and continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capfilt.catalog.query import query
from capfilt.tables.workspace import Workspace
from tests.loopback import UNAVAILABLE

ROOT = Path(__file__).resolve().parents[2]


def quickstart(out, *more):
    command = [sys.executable, "-m", "capfilt", "quickstart", "--size", "miniature", "--out", str(out), *more]
    return [sys.executable, str(ROOT / "tests" / "loopback.py"), *command]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A miniature quickstart: killed with SIGKILL after its first model began, then run again to the end."""
    pytest.importorskip("img2dataset")
    out = tmp_path_factory.mktemp("quickstart") / "ws"
    first = subprocess.Popen(
        quickstart(out, "-q"),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 240
    while (
        first.poll() is None and time.monotonic() < deadline and not (out / "models" / "pretrained").exists()
    ):
        time.sleep(0.2)
    if first.poll() == UNAVAILABLE:
        pytest.skip(first.stderr.read().decode().strip())
    assert first.poll() is None, first.stderr.read().decode()[-2000:]
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    first.stderr.close()
    before = {p: p.stat().st_mtime_ns for p in (out / "images").rglob("*.parquet")}
    done = subprocess.run(quickstart(out), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p: p.stat().st_mtime_ns for p in (out / "images").rglob("*.parquet")} == before
    return out, done.stdout


def test_the_summary_holds_what_it_promises(finished):
    out, _ = finished
    summary = json.loads((out / "summary.json").read_bytes())
    models = {f"retrain-{model}" for model in ("raw", "human-only", "curated")}
    assert {name for name in summary["rows"] if name.startswith("retrain")} == models
    for name, each in summary["rows"].items():
        assert each["in"] == each["kept"] + each["dropped"] + each["failed"], name
    assert summary["rows"]["download"]["in"] == 60
    assert (
        summary["rows"]["download"]["failed"] == sum(summary["rows"]["download"]["by_failure"].values()) > 0
    )
    assert set(summary["rows"]) == set(summary["seconds"]) - {"total"}
    assert 0.3 < summary["noise"]["true_rate"] < 0.8
    assert {"roc_auc", "roc_auc_text_only", "kept_true", "dropped_false", "spam"} <= set(summary["filter"])
    captioner = {"true_before", "true_after", "mean_attributes", "distinct", "best_constant"}
    assert captioner <= set(summary["captioner"])
    keys = {"tr@1", "tr@5", "tr@10", "ir@1", "ir@5", "ir@10", "cider"}
    assert {name: set(row) for name, row in summary["evaluation"].items()} == dict.fromkeys(
        ("raw", "human_only", "curated"), keys
    )


def test_every_requested_url_is_one_row_with_a_known_end(finished):
    out, _ = finished
    rows = query(
        Workspace(out), "SELECT status, failure, count(*) AS n FROM images WHERE dataset = 'web' GROUP BY ALL"
    )
    assert sum(rows["n"].to_pylist()) == 60
    for row in rows.to_pylist():
        assert (row["status"] == "success") == (row["failure"] is None)


def test_people_see_what_happened(finished):
    out, printed = finished
    assert "What happened" in printed
    assert "60 in = " in printed
    assert (out / "report.html").stat().st_size > 20_000


def test_a_finished_quickstart_has_nothing_to_do_and_another_size_is_refused(finished):
    out, _ = finished
    models = {p: p.stat().st_mtime_ns for p in (out / "models").rglob("*.safetensors")}
    again = subprocess.run(
        quickstart(out, "-q", "--execution", "inline"), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in (out / "models").rglob("*.safetensors")} == models
    other = subprocess.run(
        [sys.executable, "-m", "capfilt", "quickstart", "--size", "small", "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert other.returncode == 2
    assert "of size 'miniature'" in other.stderr
