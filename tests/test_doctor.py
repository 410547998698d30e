"""Catches a check that says ok of nothing, of rows with one id, or of files that no stage would read."""

from __future__ import annotations

import shutil

import pytest

from capfilt import doctor
from capfilt.catalog.query import query
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_stage
from capfilt.stages.duplicates import DuplicatesOptions
from capfilt.stages.duplicates.stage import Duplicates
from capfilt.tables.contracts import CAPTIONS, IMAGES, SIGNALS
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace
from tests.refusals import refused
from tests.worlds import image_rows, write_images


@pytest.fixture
def place(tmp_path):
    found = Workspace(tmp_path / "ws")
    write_images(found.part("images", "web"), [image_rows("web", 4), image_rows("web", 3, start=10)])
    return found


def checked(place, *, full=True):
    """(all is well, the lines)"""
    found = list(doctor.workspace(str(place.path), full=full))
    return all(good for good, _ in found), "\n".join(line for _, line in found)


def test_verify_without_a_workspace_verifies_the_current_directory(place, capsys, monkeypatch):
    """`doctor --verify` verified nothing and ended with 0."""
    from capfilt.cli import main

    def ends(code):
        with pytest.raises(SystemExit) as stopped:
            main(["doctor", "--verify"])
        assert stopped.value.code == code
        return capsys.readouterr()

    monkeypatch.chdir(place.path)
    assert "images/web: 2 shards hashed" in ends(0).out
    path = place.part("images", "web").path / "00001.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "BAD" in ends(1).out
    (place.path / "runs").mkdir()
    monkeypatch.chdir(place.path / "runs")
    assert "holds no part" in ends(2).err


@pytest.mark.parametrize(
    ("contract", "make"),
    [
        (IMAGES, lambda n: image_rows("web", 3, start=3 * n) + image_rows("web", 1)),
        (CAPTIONS, lambda n: [{"text_id": "t", "image_id": f"i{n}", "sample_index": 0, "captioner": "c", "decoding": "g"}]),
        (SIGNALS, lambda n: [{"image_id": "i", "text_id": None}]),
    ],
    ids=["images", "captions", "signals"],
)  # fmt: skip
def test_ids_that_two_rows_have_are_counted(place, contract, make):
    part = place.part(contract.name, "twice")
    mark = part.begin(contract, "test", {})
    for shard in range(2):
        rows = make(shard)
        part.commit(shard, contract.table(rows), Counts(len(rows), len(rows)), mark, 0.1)
    good, lines = checked(place)
    assert not good
    count = part.rows
    assert f"{part.path}: {count:,} rows with " in lines
    assert checked(place, full=False)[0]  # cheap checks read no row


def test_files_that_nobody_wrote_and_leftovers_are_told(place):
    part = place.part("images", "web")
    (part.record / ".00003.parquet.abc.tmp").write_bytes(b"half")
    (part.path / "notes.txt").write_text("mine")
    (part.path / "00009.parquet").write_bytes((part.path / "00001.parquet").read_bytes())
    good, lines = checked(place)
    assert good
    assert "1 files of killed attempts (safe to delete:" in lines
    assert "2 further files among its shards (00009.parquet)" in lines


@pytest.mark.parametrize("name", ["part.json", "00001.manifest.json", "index.json", "precision.json"])
def test_a_changed_byte_of_a_record_is_found(place, name):
    part = place.part("images", "web")
    part.settle("precision", "fp32")
    part.finish()
    path = part.record / name
    whole = path.read_bytes()
    for where in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:where] + bytes([whole[where] ^ 4]) + whole[where + 1 :])
        good, lines = checked(place, full=False)
        assert not good, where
        assert name in lines
    path.write_bytes(whole)
    assert checked(place)[0]


def test_a_missing_index_is_written_by_the_next_run(place):
    stage = Duplicates(DuplicatesOptions("web"), place)
    run_stage(stage, InlineExecutor(), quiet=True)
    index = stage.output.record / "index.json"
    before = index.read_bytes()
    index.unlink()
    assert checked(place)[0]
    assert run_stage(Duplicates(DuplicatesOptions("web"), place), InlineExecutor(), quiet=True).done_now == 0
    assert index.read_bytes() == before


def test_a_folder_that_is_no_part_is_named_and_the_others_are_checked(place):
    (place.path / "captions" / "other").mkdir(parents=True)
    (place.path / "captions" / "other" / "a.parquet").write_bytes(b"")
    good, lines = checked(place)
    assert not good
    assert "captions/other: not a part" in lines
    assert "images/web: 2 shards hashed" in lines


def test_a_folder_of_pictures_on_another_disk_is_as_good(tmp_path):
    """Its records lie beside the pictures, where a link leads, and are no part."""
    (tmp_path / "big").mkdir()
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws" / "images").symlink_to(tmp_path / "big")
    place = Workspace(tmp_path / "ws")
    write_images(place.part("images", "web"), [image_rows("web", 2)])
    assert (tmp_path / "big" / ".capfilt" / "web" / "part.json").is_file()
    assert checked(place)[0]


def test_shards_without_a_record_are_not_passed_over_in_silence(place):
    """A copy that leaves `.capfilt` behind looked like an empty workspace."""
    shutil.rmtree(place.path / ".capfilt")
    with pytest.warns(RuntimeWarning, match=r"images/web: .*\.capfilt/images/web"):
        assert query(place, "SELECT count(*) AS n FROM images").to_pylist() == [{"n": 0}]


def test_nothing_at_all_is_no_workspace(tmp_path):
    with refused(tmp_path / "nowhere"):
        list(doctor.workspace(str(tmp_path / "nowhere"), full=True))
    (tmp_path / "empty" / "images").mkdir(parents=True)
    with refused(tmp_path / "empty"):
        list(doctor.workspace(str(tmp_path / "empty"), full=True))
    assert not Part(tmp_path / "empty" / "images").exists
