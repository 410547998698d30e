"""Catches a workspace of an earlier capfilt that is misread in silence, that a conversion changes, or that a killed
conversion leaves between two layouts. The fixture was written by the capfilt that kept records among the shards."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from capfilt.catalog.query import query
from capfilt.doctor import workspace as doctor
from capfilt.errors import MissingInput
from capfilt.tables import convert as module
from capfilt.tables.contracts import CONTRACTS
from capfilt.tables.convert import convert
from capfilt.tables.ids import file_sha256
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace
from tests.refusals import refused

FIXTURE = Path(__file__).parents[1] / "fixtures" / "workspace-1"


@pytest.fixture
def old(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "ws")
    return Workspace(tmp_path / "ws")


def ids(path):
    """The rows of every shard that the old manifests vouch for, by folder."""
    found = {}
    for manifest in sorted(path.glob("*/*/*.manifest.json")):
        values = json.loads(manifest.read_bytes())
        key = CONTRACTS[values["table"]].key
        rows = pq.read_table(manifest.parent / values["file"], columns=list(key)).to_pylist()
        # Of a retried shard the last one listed is the newest.
        newest = found.setdefault((manifest.parent.relative_to(path).as_posix(), values["shard"]), [0, None])
        if values.get("generation", 0) >= newest[0]:
            newest[:] = values.get("generation", 0), rows
    return {where: rows for where, (_, rows) in found.items()}


def test_an_old_part_is_refused_with_the_command_that_converts_it(old):
    for read in (
        lambda: old.parts("images"),
        lambda: old.input("images", "web"),
        lambda: query(old, "SELECT 1"),
        lambda: old.part("images", "web").begin(CONTRACTS["images"], "download", {}),
    ):
        with refused("capfilt convert", old.path):
            read()
    assert not any(good for good, line in doctor(str(old.path), full=True) if "/models/" not in line)


def test_a_converted_workspace_has_the_rows_ids_and_fingerprints_it_had(old):
    before = ids(old.path)
    marks = {
        path.parent: json.loads(path.read_bytes())["fingerprint"] for path in old.path.glob("*/*/_part.json")
    }
    sums = {file_sha256(path) for path in old.path.glob("*/*/*.parquet")}
    parts = convert(old.path)
    assert sorted(parts) == sorted(marks)
    after = {}
    for part in map(Part, parts):
        assert part.info["fingerprint"] == marks[part.path]
        assert set(os.listdir(part.path)) == {f"{shard:05d}.parquet" for shard in part.shards()}
        for shard in part.shards():
            key = list(part.contract.key)
            after[part.path.relative_to(old.path).as_posix(), shard] = (
                part.read(shard, key).select(key).to_pylist()
            )
            assert len(pq.read_table(part.path / f"{shard:05d}.parquet")) == len(part.read(shard))
    assert after == before
    assert {file_sha256(path) for path in old.path.rglob("*.parquet")} == sums
    assert all(good for good, _ in doctor(str(old.path), full=True))
    assert old.part("images", "web").manifest(0).generation == 1
    assert (
        old.part("captions", "captioner").planned_rows == old.part("captions", "captioner").counts().rows_in
    )
    assert convert(old.path) == []
    with refused(old.path / "nowhere"):
        convert(old.path / "nowhere")


def test_a_conversion_killed_anywhere_is_finished_by_the_next(old, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    whole = tmp_path / "whole"
    shutil.copytree(old.path, whole)
    convert(whole)
    expected = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    kills = 0
    for die_at in range(1, 200):
        place = tmp_path / f"killed{die_at}"
        shutil.copytree(old.path / "images", place / "images")
        left = die_at

        def dying(real):
            def call(*arguments, **named):
                nonlocal left
                left -= 1
                if left <= 0:
                    raise Killed
                return real(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            for owner, name in (
                (module, "replace"),
                (module.os, "replace"),
                (module.os, "link"),
                (Path, "unlink"),
            ):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                convert(place)
            except Killed:
                kills += 1
        convert(place)
        found = {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        # An attempt that a dead process could not remove is no part of the layout.
        found = {path: data for path, data in found.items() if not path.name.endswith(".tmp")}
        assert found == {path: data for path, data in expected.items() if "images" in path.parts}
        if left > 0:
            break
    assert kills > 20


@pytest.mark.parametrize("name", ["_part.json", "00000.manifest.json"])
def test_a_record_that_cannot_be_read_is_named(old, name):
    path = old.path / "captions" / "captioner" / name
    path.write_text("[]")
    with refused(name):
        convert(old.path)
    with refused("capfilt convert"):
        old.input("captions", "captioner")


def test_a_record_of_a_part_that_was_removed_does_not_pass_for_the_parts_own(old):
    convert(old.path)
    shutil.rmtree(old.path / "images" / "human")
    shutil.copytree(FIXTURE / "images" / "web", old.path / "images" / "human")
    convert(old.path)
    part = old.part("images", "human")
    assert part.info["stage"] == "download"
    assert part.check().shards() == [0, 1]


def test_nothing_is_converted_where_there_is_nothing(tmp_path):
    assert convert(tmp_path) == []
    with pytest.raises(MissingInput):
        Workspace(tmp_path).input("images", "web")
