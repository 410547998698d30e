"""Would catch: a text of another picture, a picture without a row, a file name that leads out of its folder."""

from __future__ import annotations

import gzip
import json

import pytest

from tests.formats.sources import listed, write_json
from tests.refusals import refused

COCO = {
    "licenses": [{"id": 4, "name": "CC BY"}],
    "images": [
        {"id": 7, "file_name": "b.jpg", "license": 4, "split": "restval", "place": {"x": 1}},
        {"id": 3, "file_name": "a.jpg", "split": "dev", "place": None},
        {"id": 5, "file_name": "sub/../../secret.jpg"},
        {"id": 6, "file_name": "/etc/passwd"},
        {"id": 8, "file_name": "a.jpg", "split": "nowhere"},
        {"id": 9},
        "not an object",
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "caption": " second? no: first "},
        {"id": 2, "image_id": 7, "caption": "a \ud83d"},
        {"id": 3, "image_id": 3, "caption": ""},
        {"id": 4, "image_id": 99, "caption": "of nothing"},
        {"id": 5, "image_id": [1], "caption": "of a list"},
        {"id": 6, "image_id": 3},
    ],
}


def test_coco_has_a_row_per_image_and_texts_in_order(tmp_path):
    rows = listed(write_json(tmp_path / "captions.json", COCO), save_additional_columns=("place",))
    assert [(row.key, row.captions, row.split, row.license) for row in rows] == [
        ("b.jpg", ("a \ufffd",), "train", "CC BY"),
        ("a.jpg", (" second? no: first ", ""), "val", None),
        ("sub/../../secret.jpg", (), None, None),
        ("/etc/passwd", (), None, None),
        ("a.jpg#2", (), None, None),
        ("#5", (), None, None),
        ("#6", (), None, None),
        ("#99", ("of nothing",), None, None),
        ("#[1]", ("of a list",), None, None),
    ]
    assert [row.file for row in rows] == [
        tmp_path / "b.jpg",
        tmp_path / "a.jpg",
        None,
        None,
        tmp_path / "a.jpg",
        *[None] * 4,
    ]
    assert {row.failure for row in rows if row.file is None} == {"file_missing"}
    assert rows[0].extra == {"place": {"x": 1}}


def test_pictures_are_beside_the_file_in_images_or_where_it_is_said(tmp_path):
    path = write_json(tmp_path / "captions.json", COCO)
    (tmp_path / "images").mkdir()
    assert listed(path)[0].file == tmp_path / "images" / "b.jpg"
    assert listed(path, images=str(tmp_path))[0].file == tmp_path / "b.jpg"


def test_splits_limits_and_shards_cut_the_same_list(tmp_path):
    images = [
        {"id": i, "file_name": f"{i}.jpg", "split": ("train", "val", "test", None)[i % 4]} for i in range(23)
    ]
    path = write_json(tmp_path / "captions.json", {"images": images, "annotations": []})
    assert [row.key for row in listed(path, shard_size=5)] == [f"{i}.jpg" for i in range(23)]
    assert [row.key for row in listed(path, shard_size=2, splits=("val",), limit=3)] == [
        "1.jpg",
        "5.jpg",
        "9.jpg",
    ]
    assert {row.split for row in listed(path, split="test")} == {"train", "val", "test"}
    assert len(listed(path, split="test", splits=("test",))) == 6 + 5


@pytest.mark.parametrize(
    ("content", "format", "words"),
    [
        ("{", "auto", "JSON"),
        ("[1, 2]", "auto", "JSON object"),
        ("[" * 100_000, "auto", "JSON"),
        ('{"images": []}', "auto", "JSON object images"),
        ('{"images": [], "annotations": []}', "auto", "pictures"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": []}]}', "auto", "`caption`"),
        ('{"images": [{"sentences": []}]}', "coco", "--format"),
        ('{"images": [{"id": 1}], "annotations": []}', "karpathy", "--format"),
        (
            '{"images": [{"id": 1, "file_name": "x", "split": "val"}], "annotations": []}',
            "no such",
            "--format 'no such'",
        ),
    ],
)
def test_a_broken_annotation_file_is_named(tmp_path, content, format, words):
    path = tmp_path / "captions.json"
    path.write_text(content)
    with refused(words) as caught:
        listed(path, format)
    assert str(path) in str(caught.value) or "--format" in str(caught.value)


@pytest.mark.parametrize(
    ("listed_id", "meant"),
    [("7", 7), (7, "7"), (7.0, 7), ("000000000007", 7), (" 7", "7")],
)
def test_ids_find_each_other_as_text_and_as_numbers(tmp_path, listed_id, meant):
    """Catches: texts that are lost, each a row without a picture, because one list has ids as text."""
    images = [{"id": listed_id, "file_name": "0.jpg", "license": "4"}]
    annotations = [{"image_id": meant, "caption": "a cat"}]
    data = {"images": images, "annotations": annotations, "licenses": [{"id": 4, "name": "CC"}]}
    (row,) = listed(write_json(tmp_path / "captions.json", data))
    assert (row.captions, row.license) == (("a cat",), "CC")


def test_ids_that_differ_by_zeros_alone_stay_apart(tmp_path):
    images = [{"id": "7", "file_name": "a.jpg"}, {"id": "07", "file_name": "b.jpg"}]
    annotations = [{"image_id": "07", "caption": "b"}, {"image_id": 7, "caption": "a"}]
    rows = listed(write_json(tmp_path / "captions.json", {"images": images, "annotations": annotations}))
    assert [(row.key, row.captions) for row in rows] == [("a.jpg", ("a",)), ("b.jpg", ("b",))]


@pytest.mark.parametrize("name", ["captions.json.gz", "captions.json"])
def test_a_compressed_or_utf16_file_is_told_by_its_content(tmp_path, name):
    data = json.dumps(
        {"images": [{"id": 1, "file_name": "ü.jpg"}], "annotations": [{"image_id": 1, "caption": "ü"}]}
    )
    content = gzip.compress(data.encode()) if name.endswith(".gz") else data.encode("utf-16")
    (tmp_path / name).write_bytes(content)
    assert [(row.key, row.captions) for row in listed(tmp_path / name)] == [("ü.jpg", ("ü",))]


def test_captions_may_be_told_to_be_left_out(tmp_path):
    data = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": []}]}
    assert listed(write_json(tmp_path / "instances.json", data), caption_col=("",))[0].captions == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["annotations"][0].update(image_id="\ud800"),
        lambda data: data["licenses"][0].update(name="\ud800"),
        lambda data: data["licenses"][0].update(name=["\ud800"], url=7),
        lambda data: data["images"][0].update(id="\udfff", file_name="\ud800.jpg"),
    ],
)
def test_a_text_that_utf_8_cannot_hold_ends_no_ingest(tmp_path, change):
    """A lone surrogate in an id or a licence ended the stage with a traceback."""
    data = json.loads(json.dumps(COCO))
    change(data)
    for row in listed(write_json(tmp_path / "captions.json", data)):
        for text in (row.key, row.license or "", row.message or "", *row.captions):
            text.encode()
