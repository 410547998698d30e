"""Catches a name that leads outside the workspace by accident, and a path that is taken for a name."""

from __future__ import annotations

import pytest

from capfilt.errors import UserError
from capfilt.tables.contracts import SIGNALS
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace


def test_names_live_in_the_workspace_and_paths_where_they_point(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = Workspace(tmp_path / "ws")
    assert place.part("images", "coco").path == tmp_path / "ws" / "images" / "coco"
    assert place.part("images", "./coco").path.resolve() == tmp_path / "coco"
    # A folder that happens to lie in the working directory never replaces a name.
    Part("coco").begin(SIGNALS, "test", {})
    assert place.part("images", "coco").path == tmp_path / "ws" / "images" / "coco"
    assert place.model("m").name == "m"


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_names_that_are_no_names_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="no name"):
        Workspace(tmp_path).part("images", name)


def test_unknown_tables_and_object_stores_are_refused(tmp_path):
    with pytest.raises(UserError, match="table 'imags'"):
        Workspace(tmp_path).part("imags", "x")
    with pytest.raises(UserError, match="s3://"):
        Workspace("s3://bucket/ws")


def test_parts_lists_only_parts(tmp_path):
    place = Workspace(tmp_path)
    place.part("signals", "b").begin(SIGNALS, "test", {})
    (tmp_path / "signals" / "a").mkdir()
    assert [part.name for part in place.parts("signals")] == ["b"]
    assert place.parts("pairs") == []
