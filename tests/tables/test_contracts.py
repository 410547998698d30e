"""Catches a contract that accepts wrong columns, loses an extra one, or that `datasets` opens without decoding pictures."""

from __future__ import annotations

import io

import pyarrow as pa
import pytest
from PIL import Image

from capfilt.stages.base import option_values
from capfilt.stages.caption import CaptionOptions
from capfilt.stages.score import ScoreOptions
from capfilt.stages.select import SelectOptions
from capfilt.tables.contracts import CAPTIONS, CONTRACTS, FAILURES, IMAGES, PAIRS, SCORES, VERDICTS
from capfilt.tables.manifest import Counts
from capfilt.tables.sealed import seal, unseal
from capfilt.tables.shards import Part
from tests.refusals import refused


def picture(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), colour).save(buffer, "PNG")
    return buffer.getvalue()


def image_row(**changes):
    row = {
        "image_id": "a", "dataset": "d", "key": "k", "source": "web", "captions": ["x"], "status": "success",
        "image": {"bytes": picture(), "path": None},
    }  # fmt: skip
    return {**row, **changes}


def test_every_column_says_what_it_means():
    for contract in CONTRACTS.values():
        for field in contract.schema:
            assert field.metadata[b"doc"], (contract.name, field.name)
        assert set(contract.key) <= set(contract.schema.names)
    assert len(set(FAILURES)) == len(FAILURES)


def test_absent_nullable_columns_become_nulls_and_order_is_the_contract_s():
    table = IMAGES.conform(pa.table({name: [value] for name, value in reversed(image_row().items())}))
    assert table.column_names == IMAGES.schema.names
    assert table["phash"].null_count == 1


def test_missing_wrong_and_unknown_columns_are_named():
    with refused("text_id", "missing"):
        CAPTIONS.conform(pa.table({"text": ["x"]}))
    with refused("captions", "string"):
        IMAGES.conform(pa.table({**{k: [v] for k, v in image_row().items()}, "captions": ["x"]}))
    row = {"text_id": "t", "image_id": "i", "sample_index": 0, "captioner": "c", "decoding": "greedy"}
    with refused("extra", "contract"):
        CAPTIONS.conform(pa.table({**{k: [v] for k, v in row.items()}, "extra": [1]}))
    with refused("dataset", "nulls"):
        IMAGES.table([image_row(dataset=None)])


def test_a_part_s_further_columns_are_of_its_contract_and_of_no_other(tmp_path):
    contract = SCORES.extended({"clip_score": "a cosine"})
    assert contract.score_names == ("itm_score", "itc_score", "clip_score")
    assert (SCORES.further, contract.further) == ({}, {"clip_score": "a cosine"})
    row = {"text_id": "t", "image_id": "i", "clip_score": 0.25}
    part = Part(tmp_path / "clip")
    mark = part.begin(contract, "score", {"a": 1})
    part.commit(0, contract.table([row]), Counts(1, 1), mark, 0.1)
    again = Part(tmp_path / "clip")
    assert again.contract == contract
    assert again.read(0)["clip_score"].to_pylist() == [0.25]
    with refused("other_score", "contract"):
        again.commit(
            1, pa.table({**{k: [v] for k, v in row.items()}, "other_score": [1.0]}), Counts(1, 1), mark, 0.1
        )
    with refused("identity"):
        again.begin(SCORES.extended({"other_score": "a cosine"}), "score", {"a": 1})
    plain = Part(tmp_path / "plain")
    plain.begin(SCORES, "score", {"a": 1})
    assert "columns" not in plain.info
    with refused("clip_score", "contract"):
        plain.commit(0, contract.table([row]), Counts(1, 1), mark, 0.1)


@pytest.mark.parametrize("name", ["itm_score", "text_id", "Clip", "a b", 'a"b', "1st", "", "x" * 64])
def test_a_further_column_has_a_plain_name_of_its_own(name):
    with refused(repr(name), "column"):
        SCORES.extended({name: "a meaning"})


@pytest.mark.parametrize(
    "columns", [{'x"; DROP TABLE scores; --': "evil"}, ["a"], {"itm_score": "twice"}, {"a": 1}]
)
def test_a_description_with_columns_that_cannot_be_is_refused(tmp_path, columns):
    part = Part(tmp_path / "part")
    part.begin(SCORES, "score", {})
    path = part.record / "part.json"
    path.write_bytes(seal({**unseal(path.read_bytes()), "columns": columns}))
    with refused("part.json"):
        _ = Part(tmp_path / "part").contract


def test_parts_from_before_plug_ins_keep_their_fingerprints(tmp_path):
    # Written down when there were none: with any other number every part made until then would be refused.
    part = Part(tmp_path / "part")
    caption = {
        "version": 1,
        "options": option_values(CaptionOptions(images="web", batch_size=64)),
        "captioner": "c",
        "images": "i",
    }
    assert part.identity_fingerprint(CAPTIONS, "caption", caption) == "4d011f93de30835d070a1bc34f9dc08e"
    score = {
        "version": 1, "options": option_values(ScoreOptions(images="web", batch_size=64)),
        "filter": "f", "images": "i", "captions": ["c"],
    }  # fmt: skip
    assert part.identity_fingerprint(SCORES, "score", score) == "38cd9418107ce2302ec753a4c0230f1e"
    select = {
        "version": 1, "options": option_values(SelectOptions(images="web"), without=("pairs",)), "threshold": 0.5,
        "images": "i", "captions": ["c"], "scores": "s",
    }  # fmt: skip
    assert part.identity_fingerprint(VERDICTS, "select", select) == "fbde86cbf24b465bf0c22fd1e683f673"


def test_open_tables_carry_further_columns():
    assert IMAGES.table([image_row(author="me")])["author"].to_pylist() == ["me"]


@pytest.mark.parametrize("contract", [IMAGES, PAIRS])
def test_datasets_decodes_the_pictures(contract, tmp_path):
    datasets = pytest.importorskip("datasets")
    if contract is IMAGES:
        table = IMAGES.table([image_row()])
    else:
        text = {"text": "x", "source": "web", "itm_score": 0.5, "weight": 1.0}
        table = PAIRS.table([{"image_id": "a", "image": {"bytes": picture(), "path": None}, "texts": [text]}])
    part = Part(tmp_path / "part")
    mark = part.begin(contract, "test", {})
    part.commit(0, table, Counts(1, 1), mark, 0.1)
    part.commit(
        1, contract.table([]), Counts(0, 0), mark, 0.1
    )  # nothing kept: no reason for the others not to open
    rows = datasets.load_dataset(
        "parquet", data_files=str(part.path / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows[0]["image"].size == (9, 7)
    assert rows[0]["image"].convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_a_part_whose_further_columns_are_in_no_order_is_read_again(tmp_path):
    """Catches a fingerprint over columns as given, where the record has them sorted: the part could never be opened."""
    contract = SCORES.extended({"second": "one", "first": "another"})
    part = Part(tmp_path / "part")
    mark = part.begin(contract, "score", {})
    part.commit(0, contract.table([]), Counts(0, 0, {}, {}), mark, 0.01)
    assert Part(tmp_path / "part").info["fingerprint"] == mark
    assert set(Part(tmp_path / "part").contract.score_names) >= {"first", "second"}
