"""Would catch: restval taken for no split, a picture looked for in a folder that is not there."""

from __future__ import annotations

import pytest

from tests.formats.sources import listed, write_json


def test_karpathy(tmp_path):
    for folder in ("val2014", "flat"):
        (tmp_path / "images" / folder).mkdir(parents=True)
    data = {
        "dataset": "coco",
        "images": [
            {
                "filepath": "val2014",
                "filename": "COCO_val2014_1.jpg",
                "split": "restval",
                "cocoid": 1,
                "sentences": [{"raw": "A dog.", "tokens": ["a", "dog"]}, {"raw": "Two dogs."}],
            },
            {"filepath": "gone", "filename": "2.jpg", "split": "test", "sentences": []},
            {"filename": "3.jpg", "split": "val", "sentences": [{"raw": None}, {}]},
            {"filepath": "..", "filename": "4.jpg", "sentences": [{"raw": "out"}]},
        ],
    }
    rows = listed(write_json(tmp_path / "dataset_coco.json", data))
    assert [(row.key, row.split, row.captions) for row in rows] == [
        ("val2014/COCO_val2014_1.jpg", "train", ("A dog.", "Two dogs.")),
        ("gone/2.jpg", "test", ()),
        ("3.jpg", "val", ()),
        ("../4.jpg", None, ("out",)),
    ]
    images = tmp_path / "images"
    assert [row.file for row in rows] == [
        images / "val2014" / "COCO_val2014_1.jpg",
        images / "2.jpg",
        images / "3.jpg",
        None,
    ]


@pytest.mark.parametrize("sentences", [1.5, True, "text", {"raw": "a"}, [7]])
def test_sentences_that_are_none_are_no_texts(tmp_path, sentences):
    """A number in the place of the list ended the stage with a traceback."""
    data = {
        "images": [
            {"filename": "a.jpg", "sentences": sentences},
            {"filename": "b.jpg", "sentences": [{"raw": "b"}]},
        ]
    }
    assert [row.captions for row in listed(write_json(tmp_path / "d.json", data), "karpathy")] == [(), ("b",)]
