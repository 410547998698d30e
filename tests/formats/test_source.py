"""Would catch: a source taken for another format's, a change that the digest does not see."""

from __future__ import annotations

import pytest

from capfilt.errors import UserError
from capfilt.formats.source import Reading, open_source
from tests.formats.sources import listed, touch, write_tar


def test_sources_are_told_apart_and_the_rest_is_named(tmp_path):
    for path, words in (
        ("nowhere", "no such file"),
        ("s3://bucket/x", "shared file system"),
    ):
        with pytest.raises(UserError, match=words):
            open_source(path, "auto", Reading())
    (tmp_path / "x.zip").touch()
    with pytest.raises(UserError, match="give --format"):
        open_source(str(tmp_path / "x.zip"), "auto", Reading())
    with pytest.raises(UserError, match="--images"):
        open_source(str(tmp_path), "folder", Reading(images=tmp_path / "gone"))
    with pytest.raises(UserError, match=r"has no \.tar or \.tgz files"):
        open_source(str(tmp_path), "webdataset", Reading())
    write_tar(tmp_path / "t.tar", [("a.jpg", b"A")])
    with pytest.raises(UserError, match="give --split"):
        open_source(str(tmp_path), "webdataset", Reading(splits=("train",)))
    assert listed(tmp_path, split="val")[0].split == "val"


def test_a_digest_changes_with_what_is_listed(tmp_path):
    touch(tmp_path, "a.jpg")

    def digest():
        return open_source(str(tmp_path), "folder", Reading()).digest()

    first = digest()
    assert digest() == first
    touch(tmp_path, "b.jpg")
    second = digest()
    (tmp_path / "b.jpg").write_bytes(b"longer than before")
    assert len({first, second, digest()}) == 3
