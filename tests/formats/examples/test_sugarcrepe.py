"""Catches: a record lost, a wrong caption taken for the right one."""

from __future__ import annotations

import json

import pytest

from tests.formats.examples.written import read


@pytest.mark.parametrize("indent", [None, 4])
def test_sugarcrepes_own_files(tmp_path, indent):
    data = {
        str(number): {"filename": f"00000000000{number}.jpg", "caption": f"a {number}", "negative_caption": f"no {number}"}
        for number in range(2)
    }  # fmt: skip
    task, rows = read(tmp_path, json.dumps({**data, "2": "odd"}, indent=indent), "swap_att.json")
    assert task == "choice"
    assert [(row.key, row.images, row.text, row.wrong_texts, row.category) for row in rows] == [
        ("swap_att:0", ("000000000000.jpg",), "a 0", ("no 0",), "swap_att"),
        ("swap_att:1", ("000000000001.jpg",), "a 1", ("no 1",), "swap_att"),
        ("swap_att:2", (), None, (), "swap_att"),
    ]
