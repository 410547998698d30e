"""Would catch: a source taken for another format's, a change that the digest does not see."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from capfilt.formats import EXAMPLE_FORMATS, FORMATS, Reading
from capfilt.formats.source import open_source
from tests.formats.sources import found, listed, touch, write_tar
from tests.refusals import refused


def test_sources_are_told_apart_and_the_rest_is_named(tmp_path):
    for path in ("nowhere", "s3://bucket/x"):
        with refused(path):
            open_source(path, "auto", Reading())
    (tmp_path / "x.zip").touch()
    with refused("x.zip", "--format"):
        open_source(str(tmp_path / "x.zip"), "auto", Reading())
    with refused("--images", tmp_path / "gone"):
        open_source(str(tmp_path), "folder", Reading(images=str(tmp_path / "gone")))
    with refused(".tar", ".tgz"):
        open_source(str(tmp_path), "webdataset", Reading())
    write_tar(tmp_path / "t.tar", [("a.jpg", b"A")])
    with refused("--splits", "--split"):
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


def test_a_link_to_a_shard_elsewhere_is_named(tmp_path):
    """Catches: shards that vanish without a word, for their folder holds links to them."""
    (tmp_path / "store").mkdir()
    shard = write_tar(tmp_path / "store" / "0.tar", [("a.jpg", b"A")])
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "0.tar").symlink_to(shard)
    with refused(tmp_path / "links" / "0.tar", "link", shard.parent):
        listed(tmp_path / "links")


def test_every_format_is_a_module_with_detect_and_read():
    """Catches: a name in the lists of formats without its file, or a file without its name."""
    for names, folder in ((FORMATS, "capfilt.formats"), (EXAMPLE_FORMATS, "capfilt.formats.examples")):
        modules = {name: import_module(f"{folder}.{name}") for name in names}
        assert all(callable(module.detect) and callable(module.read) for module in modules.values())
        files = {path.stem for path in Path(import_module(folder).__file__).parent.glob("*.py")}
        having = {
            name for name in files - {"__init__"} if hasattr(import_module(f"{folder}.{name}"), "detect")
        }
        assert having == set(names)


def test_files_beside_shards_are_counted(tmp_path):
    """Catches: pictures, or shards of another kind, that vanish because they lie beside tars."""
    write_tar(tmp_path / "0.tar", [("a.jpg", b"A")])
    touch(tmp_path, "b.jpg", "sub/c.jpg", "captions.csv", ".hidden", "notes")
    assert found(tmp_path)[1] == {".jpg": 2, ".csv": 1, "other files": 1}
    assert not found(tmp_path / "0.tar")[1]
