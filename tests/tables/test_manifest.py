"""Catches a manifest that is taken for another's, or an account that does not add up. What a manifest vouches for is
`test_shards.py`'s."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.errors import RunError
from capfilt.tables.manifest import Counts, Manifest, Plan, numbers_of, ranges_of
from capfilt.tables.sealed import seal

MANIFEST = Manifest(
    3, "images", 2, "f", 5, 100, "e", "s", Counts(6, 5, {"no_image": 1}), 1, "p", {"timeout": 2.0}, 4, "m"
)


def test_a_manifest_comes_back_as_it_was_and_names_its_file():
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST
    assert MANIFEST.file == "00003.parquet"
    assert dataclasses.replace(MANIFEST, shard=123456).file == "123456.parquet"


def test_a_manifest_of_before_there_were_generations_is_read():
    values = dataclasses.asdict(MANIFEST)
    for name in ("generation", "previous", "changed", "batch_size", "part"):
        del values[name]
    assert Manifest.of(values).generation == 0
    assert Manifest.of(values).part == ""


@pytest.mark.parametrize(
    "change",
    [
        {"rows": "5"}, {"rows": True}, {"rows": -1}, {"rows": 5.0}, {"sha256": 5}, {"changed": []}, {"extra": 1},
        {"counts": {"rows_in": 6, "kept": -5, "dropped": {}, "failed": {}}},
        {"counts": {"rows_in": 6, "kept": 5, "dropped": {"no_image": "1"}, "failed": {}}},
        {"counts": {"rows_in": 6}}, {"counts": None},
    ],
)  # fmt: skip
def test_values_that_no_manifest_has_are_refused(change):
    values = {**json.loads(json.dumps(dataclasses.asdict(MANIFEST))), **change}
    with pytest.raises((ValueError, KeyError, TypeError)):
        Manifest.from_json(seal(values))


@pytest.mark.parametrize(
    ("counts", "good"),
    [
        (Counts(0, 0), True), (Counts(6, 3, {"a": 1, "b": 1}, {"c": 1}), True), (Counts(6, 6, {"a": 1}), False),
        (Counts(6, 5), False), (Counts(5, 6), False),
    ],
)  # fmt: skip
def test_an_account_adds_up_or_is_refused(counts, good):
    if good:
        counts.check()
    else:
        with pytest.raises(RunError, match=f"{counts.rows_in} in"):
            counts.check()


@given(st.sets(st.integers(0, 60)))
def test_numbers_survive_their_short_form(numbers):
    assert numbers_of(ranges_of(sorted(numbers))) == sorted(numbers)


@pytest.mark.parametrize("text", ["x", "-1", "1-x", "1.5"])
def test_what_is_no_short_form_is_refused(text):
    with pytest.raises(ValueError, match="invalid literal"):
        numbers_of(text)


def test_a_plan_is_short_and_tells_gaps():
    assert Plan(range(3), 7, {"images/web": "1 of 2 shards"}).to_json() == {
        "planned": "0-2", "planned_rows": 7, "gaps": {"images/web": "1 of 2 shards"}
    }  # fmt: skip
