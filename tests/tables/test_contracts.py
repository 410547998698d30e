"""Catches a contract that accepts wrong columns, loses an extra one, or that `datasets` opens without decoding pictures."""

from __future__ import annotations

import io

import pyarrow as pa
import pytest
from PIL import Image

from capfilt.errors import UserError
from capfilt.tables.contracts import CAPTIONS, CONTRACTS, FAILURES, IMAGES, PAIRS
from capfilt.tables.shards import Counts, Part


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
    with pytest.raises(UserError, match="'text_id' is missing"):
        CAPTIONS.conform(pa.table({"text": ["x"]}))
    with pytest.raises(UserError, match="'captions' is string"):
        IMAGES.conform(pa.table({**{k: [v] for k, v in image_row().items()}, "captions": ["x"]}))
    row = {"text_id": "t", "image_id": "i", "sample_index": 0, "captioner": "c", "decoding": "greedy"}
    with pytest.raises(UserError, match="'extra' is not in the contract"):
        CAPTIONS.conform(pa.table({**{k: [v] for k, v in row.items()}, "extra": [1]}))
    with pytest.raises(UserError, match="'dataset' has 1 nulls"):
        IMAGES.table([image_row(dataset=None)])


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
    rows = datasets.load_dataset(
        "parquet", data_files=str(part.path / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows[0]["image"].size == (9, 7)
    assert rows[0]["image"].convert("RGB").getpixel((0, 0)) == (255, 0, 0)
