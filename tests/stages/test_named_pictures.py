"""Catches a question that is given another picture than its own: by a name that two pictures have, a folder that is left out, a
number of another data set; and a picture that never came, given as if it had."""

from __future__ import annotations

import pytest

from capfilt.formats.examples.row import ExampleRow
from capfilt.stages.named_pictures import NamedPictures
from capfilt.tables.contracts import IMAGES
from capfilt.tables.manifest import Counts
from capfilt.tables.workspace import Workspace


@pytest.fixture
def part(tmp_path):
    def made(*keys, lost=()):
        part = Workspace(tmp_path / "ws").part("images", "pictures")
        rows = [
            {
                "image_id": key, "dataset": "d", "key": key, "url": None, "source": "web", "captions": [],
                "status": "failed_to_download" if key in lost else "success",
                "failure": "not_found" if key in lost else None, "image": None,
            }
            for key in keys
        ]  # fmt: skip
        mark = part.begin(IMAGES, "test", {})
        part.commit(0, IMAGES.table(rows), Counts(len(rows), len(rows)), mark, 0.0)
        return part

    return made


def found(part, *names, named=None, subset=""):
    row = ExampleRow("x", images=names, subset=subset)
    return NamedPictures([part], named or [name for name in names if isinstance(name, str)]).find(row)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("1.jpg", "1.jpg"),
        ("train/1.jpg", "1.jpg"),
        ("1.jpg", "train/1.jpg"),
        ("images/train/1.jpg", "train/1.jpg"),
        ("1.png", "1.jpg"),
        ("1.jpg", "1"),
        ("e\u0301.jpg", "\u00e9.jpg"),
        ("a/COCO_val2014_000000000042.jpg", "b/COCO_val2014_000000000042.jpg"),
        ("VG_100K_2/7.jpg", "VG_100K/7.jpg"),
        ("one/train-10171-0-img0.png", "two/train-10171-0-img0.png"),
    ],
)
def test_a_name_means_the_picture_whose_path_is_its_tail_or_its_head(part, key, name):
    assert found(part(key), name) == ([key], "")


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["a/1.jpg"], "b/1.jpg"),
        (["a/1.jpg", "b/1.jpg"], "1.jpg"),
        (["1.jpg"], "11.jpg"),
        (["a/x/1.jpg"], "a/1.jpg"),
        (["1.png", "1.jpg"], "1"),
    ],
)
def test_another_picture_or_one_of_several_is_none(part, keys, name):
    ids, words = found(part(*keys), name)
    assert ids == []
    assert name in words


def test_a_key_with_fewer_folders_is_nobodys_where_the_source_has_the_name_twice(part):
    made = part("1.jpg")
    assert found(made, "a/1.jpg", named=["a/1.jpg"]) == (["1.jpg"], "")
    assert found(made, "a/1.jpg", named=["a/1.jpg", "b/1.jpg"])[0] == []


def test_the_exact_key_wins_over_what_it_may_stand_for(part):
    made = part("1.jpg", "a/1.jpg", "1.png")
    assert found(made, "1.jpg") == (["1.jpg"], "")
    assert found(made, "a/1.jpg") == (["a/1.jpg"], "")


def test_a_number_is_cocos_of_its_subset_first(part):
    made = part(
        "COCO_train2014_000000000009.jpg", "COCO_val2014_000000000009.jpg", "000000000025.jpg", "30.jpg"
    )
    assert found(made, 9, subset="val2014") == (["COCO_val2014_000000000009.jpg"], "")
    assert found(made, 9)[0] == []  # of two subsets, and none is said
    assert found(made, 25) == (["000000000025.jpg"], "")
    assert found(made, 30) == (["30.jpg"], "")
    assert found(made, 31)[0] == []


def test_pictures_come_in_the_examples_order_and_one_that_is_missing_takes_all(part):
    made = part("a.jpg", "b.jpg", "lost.jpg", lost=("lost.jpg",))
    assert found(made, "b.jpg", "a.jpg", "b.jpg") == (["b.jpg", "a.jpg", "b.jpg"], "")
    ids, words = found(made, "a.jpg", "lost.jpg")
    assert ids == []
    assert "not_found" in words
    assert found(made)[0] == []
