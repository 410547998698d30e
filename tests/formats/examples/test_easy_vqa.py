"""Catches: an entry that is no question taken for one."""

from __future__ import annotations

from tests.formats.examples.written import read
from tests.refusals import refused


def test_easy_vqa(tmp_path):
    task, rows = read(
        tmp_path, [["what shape is in the image?", "circle", 3], ["is there a red shape?", "no", 3]]
    )
    assert task == "vqa"
    assert [(row.text, row.answers, row.images) for row in rows] == [
        ("what shape is in the image?", (("circle", 1),), (3,)),
        ("is there a red shape?", (("no", 1),), (3,)),
    ]
    assert len({row.key for row in rows}) == 2
    with refused("entry 1"):
        read(tmp_path, [["what?", "circle", 3], ["what?", "circle"]])
