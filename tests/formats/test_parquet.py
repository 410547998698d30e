"""Would catch: two pictures with one key, a column of pictures unseen."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from tests.formats.sources import listed


def test_a_parquet_file_of_the_hugging_face_kind(tmp_path):
    records = [{"image": {"bytes": b"x", "path": None}, "text": ["a", "b"]}, {"image": None, "text": None}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "train-00000-of-00001.parquet")
    rows = listed(tmp_path)
    assert [(row.key, row.captions, row.picture, row.failure) for row in rows] == [
        ("train-00000-of-00001/000000", ("a", "b"), b"x", None),
        ("train-00000-of-00001/000001", (), None, "file_missing"),
    ]
