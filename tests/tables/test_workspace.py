"""Catches a name that leads outside the workspace by accident, and a path that is taken for a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from capfilt.tables.contracts import SIGNALS
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace
from tests.refusals import refused


def test_names_live_in_the_workspace_and_paths_where_they_point(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = Workspace(tmp_path / "ws")
    assert place.part("images", "coco").path == tmp_path / "ws" / "images" / "coco"
    assert place.part("images", "./coco").path.resolve() == tmp_path / "coco"
    # A folder that happens to lie in the working directory never replaces a name.
    Part("coco").begin(SIGNALS, "test", {})
    assert place.part("images", "coco").path == tmp_path / "ws" / "images" / "coco"
    assert place.model("m").name == "m"


NO_NAMES = [
    "", ".", "..", "-rf", "_part", ".hidden", "~home", " web", "web ", "a\x1b[31mb", "a\nb", "a\0b", "a\u202eb", "a\u200bb",
    "\udcff", "x" * 201, "é" * 101,
]  # fmt: skip


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_are_no_names_are_refused(tmp_path, name):
    """Would catch: a folder that a listing hides, that a command takes for a flag, or that a terminal obeys."""
    place = Workspace(tmp_path)
    for look_up in (
        lambda: place.part("images", name),
        lambda: place.model(name),
        lambda: place.result(name),
    ):
        with refused("no name") as caught:
            look_up()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", [*NO_NAMES, "../x", "a/b", "/tmp/x", "./web"])
def test_a_dataset_is_a_name_and_never_a_path(tmp_path, name):
    """Would catch: `--dataset ../x`, which wrote outside of the workspace."""
    place = Workspace(tmp_path)
    for output in (None, Part(tmp_path / "elsewhere")):
        with refused("--dataset", "no name"):
            place.dataset("images", name, output)


@pytest.mark.parametrize(
    "name", ["web", "we[i]rd *x?", "it's", "k=3", 'a"b', "ünï ☃", "v1.2-b_c", "日本", "x" * 200]
)
def test_any_other_name_is_one(tmp_path, name):
    assert Workspace(tmp_path).dataset("images", name).path == tmp_path / "images" / name


@pytest.mark.parametrize("path", ["./a\x1bb", "./a\0b", "/tmp/a\u202eb/c", "./" + "x" * 201, "a\n/b"])
def test_paths_that_no_file_system_or_nobody_takes_are_refused(tmp_path, path):
    with refused("no path") as caught:
        Workspace(tmp_path).part("images", path)
    assert str(caught.value).isprintable()


def test_a_result_is_a_json_file(tmp_path):
    place = Workspace(tmp_path)
    assert place.result("a.b") == tmp_path / "runs" / "a.b.json"
    assert place.result("./a") == Path("a.json")
    assert place.result("/x/a.json") == Path("/x/a.json")


def test_unknown_tables_and_object_stores_are_refused(tmp_path):
    with refused("table imags"):
        Workspace(tmp_path).part("imags", "x")
    with refused("s3://"):
        Workspace("s3://bucket/ws")


def test_parts_lists_only_parts(tmp_path):
    place = Workspace(tmp_path)
    place.part("signals", "b").begin(SIGNALS, "test", {})
    (tmp_path / "signals" / "a").mkdir()
    assert [part.name for part in place.parts("signals")] == ["b"]
    assert place.parts("pairs") == []
