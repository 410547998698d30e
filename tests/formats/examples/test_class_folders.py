"""Catches: a picture of a class that vanishes for its name, a split taken for a class."""

from __future__ import annotations

from capfilt.formats.examples.row import example_rows
from tests.formats.sources import picture, touch
from tests.refusals import refused


def test_every_picture_of_a_folder_is_of_its_class(tmp_path):
    touch(tmp_path, "train/cat/1.jpg", "val2017/dog/2.jfif", "cow/3.avif", "cow/notes.txt", "alone.jpg")
    (tmp_path / "cow/4").write_bytes(picture("PNG"))
    task, rows = example_rows(tmp_path)
    assert task == "classification"
    assert [(row.key, row.images, row.label, row.split) for row in rows] == [
        ("cow/3.avif", ("cow/3.avif",), "cow", None),
        ("cow/4", ("cow/4",), "cow", None),
        ("train/cat/1.jpg", ("train/cat/1.jpg",), "cat", "train"),
        ("val2017/dog/2.jfif", ("val2017/dog/2.jfif",), "dog", "val"),
    ]


def test_a_folder_without_classes_is_named(tmp_path):
    touch(tmp_path, "1.jpg")
    with refused(tmp_path, "class"):
        example_rows(tmp_path)
