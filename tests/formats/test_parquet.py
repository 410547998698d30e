"""Would catch: two pictures with one key, a column of pictures unseen."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.errors import UserError
from capfilt.formats import Reading
from capfilt.formats.source import open_source
from tests.formats.sources import listed
from tests.refusals import refused


def test_a_parquet_file_of_the_hugging_face_kind(tmp_path):
    records = [{"image": {"bytes": b"x", "path": None}, "text": ["a", "b"]}, {"image": None, "text": None}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "train-00000-of-00001.parquet")
    rows = listed(tmp_path)
    assert [(row.key, row.captions, row.picture, row.failure) for row in rows] == [
        ("train-00000-of-00001/000000", ("a", "b"), b"x", None),
        ("train-00000-of-00001/000001", (), None, "file_missing"),
    ]


def write(path, keys, **columns):
    path.parent.mkdir(exist_ok=True, parents=True)
    table = {"key": keys} if keys is not None else {}
    count = len(next(iter(columns.values()), keys))
    columns = {"jpg": [b"x"] * count, "caption": ["a"] * count, **columns}
    pq.write_table(pa.table({**table, **columns}), path)


def test_keys_that_begin_anew_in_each_file_get_its_name(tmp_path):
    """Catches: two pictures with one image_id, where several outputs of a tool lie in one folder."""
    for name in ("00000.parquet", "00001.parquet", "more/00000.parquet"):
        write(tmp_path / name, ["000000000", "000000001"])
    assert [row.key for row in listed(tmp_path)] == [
        "00000/000000000", "00000/000000001", "00001/000000000", "00001/000000001", "more/00000/000000000",
        "more/00000/000000001",
    ]  # fmt: skip
    source = open_source(str(tmp_path), "auto", Reading())
    assert "number their pictures anew (000000000 is in 00000.parquet and in" in source.remarks()[0]


@pytest.mark.parametrize(
    "keys",
    [
        [["000000000", "000000001"], ["000010000", "000010001"]],
        [["cat", "dog"], ["cow", "00001"]],
        [[5, 6], [7, 8]],
    ],
)
def test_keys_that_are_all_different_stay_as_they_are(tmp_path, keys):
    for number, each in enumerate(keys):
        write(tmp_path / f"{number:05d}.parquet", each)
    assert [row.key for row in listed(tmp_path)] == [str(key) for each in keys for key in each]
    assert not open_source(str(tmp_path), "auto", Reading()).remarks()


def test_one_key_twice_in_a_file_and_none_are_told_apart(tmp_path):
    write(tmp_path / "a.parquet", ["x", "x", None])
    write(tmp_path / "b.parquet", None, caption=["a"])
    assert [row.key for row in listed(tmp_path)] == ["x", "x#2", "a/000002", "b/000000"]
    write(tmp_path / "b.parquet", ["a/000002", "x"])
    assert [row.key for row in listed(tmp_path)] == ["a/x", "a/x#2", "a/000002", "b/a/000002", "b/x"]


def test_a_number_put_behind_a_key_is_no_other_files_key(tmp_path):
    write(tmp_path / "a.parquet", ["x", "x"])
    write(tmp_path / "b.parquet", ["x#2"])
    assert [row.key for row in listed(tmp_path)] == ["a/x", "a/x#2", "b/x#2"]


def test_keys_do_not_depend_on_the_limit(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", ["0", "1"])
    assert [row.key for row in listed(tmp_path, limit=1)] == ["a/0"]


@pytest.mark.parametrize(
    "column",
    [
        {"img": [{"bytes": b"x", "path": None}]},
        {"pixels": [b"x"]},
        {"image_bytes": [b"x"]},
    ],
)
def test_a_column_of_pictures_is_told_by_its_type(tmp_path, column):
    pq.write_table(
        pa.table({"text": ["a"], **{name: pa.array(v) for name, v in column.items()}}), tmp_path / "a.parquet"
    )
    assert [row.picture for row in listed(tmp_path)] == [b"x"]


def test_a_file_that_names_its_pictures_is_a_list(tmp_path):
    pq.write_table(pa.table({"image": ["0.jpg"], "text": ["a"]}), tmp_path / "a.parquet")
    assert [(row.key, row.captions) for row in listed(tmp_path / "a.parquet")] == [("0.jpg", ("a",))]


@pytest.mark.parametrize("column", ["TEXT", "Caption", "texts"])
def test_texts_are_found_and_their_want_is_told(tmp_path, column):
    table = {"image_bytes": [b"x"], "label": [3]}
    pq.write_table(pa.table({**table, column: ["a"]}), tmp_path / "a.parquet")
    assert listed(tmp_path)[0].captions == ("a",)
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with refused("--caption-col", "image_bytes, label"):
        listed(tmp_path)
    assert listed(tmp_path, caption_col=("",))[0].captions == ()


def test_hugging_faces_files_have_their_split_in_their_name(tmp_path):
    for name in ("data/train-00000-of-00001", "data/validation-00000-of-00001", "data/test-00000-of-00001"):
        write(tmp_path / f"{name}.parquet", None, caption=["a"])
    assert [row.split for row in listed(tmp_path)] == ["test", "train", "val"]
    assert [row.key for row in listed(tmp_path, splits=("val",))] == ["data/validation-00000-of-00001/000000"]


def test_every_damaged_byte_of_a_parquet_file_is_read_or_refused_by_name(tmp_path):
    """A damaged page, or a column's name or text that is no UTF-8, ended the stage with Arrow's own error."""
    path = tmp_path / "in" / "a.parquet"
    write(path, ["one", "two", "three"], license=["x", "y", "z"])
    whole, refused = path.read_bytes(), []
    for place in range(4, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x80]) + whole[place + 1 :])
        try:
            assert len(listed(path, save_additional_columns=("license",))) == 3
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all(str(path) in each for each in refused)
