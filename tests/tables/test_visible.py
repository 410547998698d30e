"""Would catch: a terminal or a browser obeying what a web text says, or two texts that look alike but are not."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.tables.visible import shortened, visible, visible_json


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünï 日本 🎉", "plain ünï 日本 🎉"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\x00\x1b[31m\x9b", r"\u0000\u001b[31m\u009b"),
        ("\u202egpj\u202c\u2066x\u2069", r"\u202egpj\u202c\u2066x\u2069"),
        ("\u2028\ufeff\U000e0041", r"\u2028\ufeff\U000e0041"),
        ("lone \ud800", r"lone \ud800"),
        ("\u05e9\u05dc\u05d5\u05dd", "\u05e9\u05dc\u05d5\u05dd"),
    ],
)
def test_known_characters(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text(st.characters()))
def test_nothing_that_controls_is_left(text: str) -> None:
    left = visible(text)
    assert not [c for c in left if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    assert not [
        c
        for c in left
        if unicodedata.bidirectional(c) in ("RLO", "LRO", "RLE", "LRE", "PDF", "RLI", "LRI", "FSI", "PDI")
    ]
    left.encode("utf-8")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_json_means_the_same(text: str) -> None:
    line = visible_json(json.dumps({"a": text}, ensure_ascii=False))
    assert json.loads(line) == {"a": text}
    assert visible(line) == line


def test_shortened_keeps_what_fits_and_marks_what_does_not() -> None:
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "abcde…"
    assert shortened("abc  efg", 6) == "abc…"
    assert shortened("abc", 0) == "…"
