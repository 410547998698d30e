"""Would catch: a corpus that does not say where its pictures come from, and a corpus of the version before that nothing reads
any more.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from capfilt.catalog.query import print_query, query
from capfilt.catalog.report import write_report
from capfilt.data.images import decode
from capfilt.doctor import workspace as doctor
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_stage
from capfilt.stages import options as o
from capfilt.stages.registry import stage_command
from capfilt.stages.select import Select, WritePairs
from capfilt.stages.train import Retrain
from capfilt.tables.convert import convert
from capfilt.tables.workspace import Workspace
from tests.refusals import refused

OLD = Path(__file__).parents[1] / "fixtures" / "workspace-1"
"""A workspace as it was when pairs were of version 1: a retried download, an ingested part, everything up to pairs."""
ORIGIN = ("dataset", "key", "url", "license", "width", "height", "sha256")
RULE = {"images": "web", "captions": ("captioner",), "threshold": 0.01, "duplicates": "duplicates"}


@pytest.fixture
def old(tmp_path):
    shutil.copytree(OLD, tmp_path / "ws")
    convert(tmp_path / "ws")
    return Workspace(tmp_path / "ws")


def run(stage):
    return run_stage(stage, InlineExecutor(), quiet=True)


def rows_of(part):
    return [row for table in part.tables() for row in table.to_pylist()]


def test_pairs_carry_where_their_pictures_come_from(old):
    options = o.SelectOptions(out="new", **RULE)
    run(Select(options, old))
    run(WritePairs(options, old))
    images = {row["image_id"]: row for row in rows_of(old.part("images", "web"))}
    pairs = rows_of(old.part("pairs", "new"))
    assert len(pairs) == 4
    for pair in pairs:
        assert {name: pair[name] for name in ORIGIN} == {
            name: images[pair["image_id"]][name] for name in ORIGIN
        }
        assert (pair["width"], pair["height"]) == decode(pair["image"]["bytes"]).size
        assert None not in [pair[name] for name in ORIGIN]
    # Of a picture that a retry brought, the newest generation's.
    assert [pair["texts"] for pair in pairs] == [
        pair["texts"] for pair in rows_of(old.part("pairs", "capfilt"))
    ]


def test_pairs_of_version_1_are_read_as_ever(old, tmp_path):
    assert all(good for good, _ in doctor(str(old.path), full=True))
    listed = ", ".join(ORIGIN)
    rows = query(old, f"SELECT {listed} FROM pairs").to_pylist()
    assert rows == [dict.fromkeys(ORIGIN)] * 4
    for format in ("table", "json", "csv"):
        print_query(old, "SELECT * FROM pairs", format, io.StringIO())
    write_report(old, tmp_path / "report.html")
    options = o.SelectOptions(out="new", **RULE)
    for stage in (Select, WritePairs):
        run(stage(options, old))
    # Beside pairs of the new version, in one view and in one training.
    both = query(
        old, "SELECT rule, count(*) AS n, count(license) AS l FROM pairs GROUP BY 1 ORDER BY 1"
    ).to_pylist()
    assert both == [{"rule": "capfilt", "n": 4, "l": 0}, {"rule": "new", "n": 4, "l": 4}]
    for stream in (False, True):
        alone, joined = (
            Retrain(o.RetrainOptions(pairs=names, stream=stream), old).data(16)
            for names in (("capfilt",), ("capfilt", "new"))
        )
        assert len(alone) == 8
        assert len(joined) == 16


def test_pairs_of_version_1_train_and_what_they_train_is_evaluated(old):
    given = {
        "steps": 1,
        "batch_size": 4,
        "preset": "tiny",
        "vocab_size": 60,
        "queue_size": 0,
        "augment": False,
    }
    run(Retrain(o.RetrainOptions(pairs=("capfilt",), human=("human",), **given), old))
    options = o.EvaluateOptions(images="human", split="", tasks=("retrieval",), rerank=0, resamples=0)
    command = stage_command("evaluate")
    assert run(command.build(command.stages[0], options, old)).figures["texts"] == 4


def test_a_part_of_version_1_is_not_continued_in_version_2(old):
    """Would catch: one part with rows of two versions, and a message that does not say why."""
    with refused("pairs/capfilt", "contract_version", 1, 2):
        run(WritePairs(o.SelectOptions(**RULE), old))
