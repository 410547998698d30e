"""The sweeps of `just crash-sweep` and `just fuzz`, in short: catches what loses or mixes rows wherever a run is killed, and a
changed byte that a reader takes for what was written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def swept(script, *arguments):
    """What a sweep prints. A process of its own: it forks, and watches all files that are opened."""
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_stage_killed_at_every_operation_ends_as_if_nothing_had_killed_it(tmp_path):
    printed = swept("crash.py", "--stages", "ingest,examples")
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", printed, re.MULTILINE)
    assert [row[0] for row in rows] == ["ingest", "examples"]
    for _, operations, kills, torn, whole in rows:
        assert int(operations) > 30  # else the sweep swept nothing
        assert int(kills) == int(operations) + int(torn) == int(whole)
        assert int(torn) > 3


def test_no_damaged_file_passes_for_what_was_written_nor_ends_a_reader_with_its_own_error():
    own = "shard of,shard with,read for texts,manifest,part record,index,precision"
    foreign = "COCO,WebDataset,metadata.csv,URLs (csv),URLs (parquet),VQA v2's answers,records of answers,recipe,(PNG)"
    printed = swept("fuzz.py", "--damages", "10", "--kinds", f"{own},{foreign}")
    rows = re.findall(r"^\| ([^|]+) \| 10 \|.*\| 0 \|$", printed, re.MULTILINE)
    assert len(rows) == len(own.split(",")) + len(foreign.split(","))
