"""Catches a stage whose fingerprint or rows moved, so that parts which people have are refused, made again or not what their
manifests say. The fixture was written by the capfilt that first kept records apart from shards."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

from capfilt.doctor import workspace as doctor
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_stage
from capfilt.stages.download.worker import close_shared_worker
from capfilt.stages.select import SelectOptions
from capfilt.stages.select.stage import Select, WritePairs
from capfilt.tables.workspace import Workspace
from tests.golden import make
from tests.golden.stages import RULE, STAGES, server, shown, write_sources

GOLDEN = make.recorded()["fingerprints"]
needs_img2dataset = pytest.mark.skipif(
    importlib.util.find_spec("img2dataset") is None, reason="img2dataset is not installed"
)
ALL = [pytest.param(name, marks=needs_img2dataset if name == "download" else ()) for name in STAGES]


@pytest.fixture
def place(tmp_path):
    shutil.copytree(make.WORKSPACE, tmp_path / "ws")
    shutil.copytree(make.CHECKPOINTS / "blip", tmp_path / "ws" / "models" / "blip")
    write_sources(tmp_path)
    return Workspace(tmp_path / "ws")


def rows_of(table):
    return [shown(row) for row in table.to_pylist()]


@pytest.mark.parametrize("name", ALL)
def test_a_part_that_stands_is_the_one_this_code_would_make(name, place):
    """Its fingerprint, each shard's fingerprint, and each shard's rows and account."""
    stage = STAGES[name](place, place.path.parent)
    part = make.part_of(name, place)
    assert stage.output.path == part.path
    mark = stage.begin()
    assert mark == part.info["fingerprint"] == GOLDEN[name]
    assert stage.shards() == part.shards()
    stage.setup()
    with server():
        for shard in stage.shards():
            made, manifest = stage.process(shard), part.manifest(shard)
            assert stage.shard_fingerprint(mark, shard) == manifest.fingerprint
            assert made.counts == manifest.counts
            stands = part.read(shard)
            # Older scores have a column that nothing ever filled, and that the table has no more.
            gone = set(stands.column_names) - set(part.contract.schema.names) - set(made.table.column_names)
            assert gone <= {"itm_probability"}
            assert all(stands[name].null_count == stands.num_rows for name in gone)
            stands = stands.drop_columns(sorted(gone))
            table = part.contract.conform(made.table)
            assert table.schema.equals(stands.schema)
            assert not list(make.differences(rows_of(table), rows_of(stands), name))
    if name == "download":
        close_shared_worker()


@pytest.mark.parametrize("name", [each for each in STAGES if each != "download"])
def test_a_run_over_a_part_that_stands_does_nothing(name, place):
    before = {path: path.read_bytes() for path in place.path.rglob("*") if path.is_file()}
    summary = run_stage(STAGES[name](place, place.path.parent), InlineExecutor(), quiet=True)
    assert (summary.done_before, summary.done_now) == (len(make.part_of(name, place).shards()), 0)
    assert {path: path.read_bytes() for path in place.path.rglob("*") if path.is_file()} == before


def test_doctor_finds_the_workspace_whole(place):
    lines = list(doctor(str(place.path), full=True))
    assert len(lines) == len(STAGES) + 1
    assert all(good for good, _ in lines), lines


def test_a_new_rule_selects_from_it(place):
    options = SelectOptions(**RULE, threshold=0.0, out="all")
    for stage in (Select, WritePairs):
        run_stage(stage(options, place), InlineExecutor(), quiet=True)
    verdicts = [row for table in place.part("verdicts", "all").tables() for row in table.to_pylist()]
    kept = sum(row["keep"] for row in verdicts)
    pairs = [row for table in place.part("pairs", "all").tables() for row in table.to_pylist()]
    assert (
        kept
        == sum(len(row["texts"]) for row in pairs)
        == sum(row["itm_score"] is not None for row in verdicts)
        > 5
    )


def test_what_the_fixture_holds_exercises_every_branch(place):
    """An input of good rows alone would freeze little."""
    rows = {
        name: [row for table in make.part_of(name, place).tables() for row in table.to_pylist()]
        for name in STAGES
    }
    assert {row["failure"] for row in rows["ingest"]} == {None, "truncated", "file_missing"}
    assert len({row["failure"] for row in rows["download"]}) > 3
    assert (
        {row["keep"] for row in rows["select"]}
        == {True, False}
        == {row["keep"] for row in rows["select a share"]}
    )
    assert {kind for row in rows["subset"] for kind in row["planted"]} >= {
        "true",
        "other_image",
        "truncated",
        "file_name",
    }
    assert None in {row["failure"] for row in rows["examples"]} != {None}
