"""Would catch: a list whose texts are lost, or joined with another picture."""

from __future__ import annotations

import gzip
import json

import pytest

from tests.formats.sources import listed, write_json
from tests.refusals import refused


def test_a_tsv_does_not_quote(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text('file_name\tcaption\na.jpg\t"Quoted" she said\n')
    assert listed(path)[0].captions == ('"Quoted" she said',)


BLIP = [
    {"image": "0.jpg", "caption": "a cat", "image_id": "coco_0"},
    {"image": "0.jpg", "caption": "one cat", "image_id": "coco_0"},
    {"image": "sub/1.jpg", "caption": ["a dog", "one dog"]},
]


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train.json.gz", "lines.json"])
def test_annotation_lists_of_blip_albef_and_lavis(tmp_path, name):
    lines = "".join(json.dumps(record) + "\n" for record in BLIP)
    data = (lines if "line" in name or "jsonl" in name else json.dumps(BLIP)).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    rows = listed(path, images=str(tmp_path), save_additional_columns=("image_id",))
    assert [(row.key, row.captions, row.file, row.extra["image_id"]) for row in rows] == [
        ("0.jpg", ("a cat", "one cat"), tmp_path / "0.jpg", "coco_0"),
        ("sub/1.jpg", ("a dog", "one dog"), tmp_path / "sub/1.jpg", None),
    ]


def test_albefs_lists_of_retrieval_and_of_the_web(tmp_path):
    """Flickr30k's test list has no image_id, a web list has URLs too, nocaps' has no texts."""
    flickr = [{"image": "flickr30k-images/1.jpg", "caption": ["a", "b", "c", "d", "e"]}]
    assert listed(write_json(tmp_path / "flickr30k_test.json", flickr))[0].captions == tuple("abcde")
    web = [{"image": "1.jpg", "caption": "a", "url": "http://a"}]
    assert listed(write_json(tmp_path / "cc3m.json", web))[0].url == "http://a"
    path = write_json(tmp_path / "nocaps_test.json", [{"image": "1.jpg", "img_id": 1}])
    with refused("--caption-col", "image, img_id"):
        listed(path)
    assert listed(path, caption_col=("",))[0].captions == ()


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("file_name, text", "0.jpg,a cat"),
        ("file_name,TEXT", "0.jpg,a cat"),
        ("Image ,Caption", "0.jpg,a cat"),
        (" texts,image_path", "a cat,0.jpg"),
        ("text, file_name", "a cat, 0.jpg"),
        ("file_name|text", "0.jpg|a cat"),
    ],
)
def test_columns_are_found_however_they_are_spelled(tmp_path, header, line):
    (tmp_path / "0.jpg").touch()
    for name, separator in (("list.csv", ","), ("list.tsv", "\t")):
        (tmp_path / name).write_text(f"{header}\n{line}\n".replace(",", separator))
        (row,) = listed(tmp_path / name)
        assert row.captions == ("a cat",)
        assert row.file == tmp_path / "0.jpg"


def test_fields_of_a_record_become_the_rows(tmp_path):
    record = {"file_name": "0.jpg", "text": "a", "URL": "http://a", "License": "CC0", "split": "validation"}
    (row,) = listed(write_json(tmp_path / "list.json", [record]))
    assert (row.url, row.license, row.split) == ("http://a", "CC0", "val")


def test_a_quote_left_open_takes_no_picture_along(tmp_path):
    (tmp_path / "list.csv").write_text('file_name,text\n0.jpg,"a 5\n1.jpg,a cat\n2.jpg,"a\nb"\n')
    assert {row.key: row.captions for row in listed(tmp_path / "list.csv")} == {
        "#0": (),
        "1.jpg": ("a cat",),
        "2.jpg": ("a\nb",),
    }
