"""Sources written by tests, and every row of a source."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

from PIL import Image

from capfilt.formats import Reading
from capfilt.formats.source import SourceRow, open_source
from capfilt.tables.contracts import FAILURES, SPLITS, STATUSES


def listed(path, format="auto", **reading) -> list[SourceRow]:
    """Every row, through the pickling that takes a source to its workers; whatever the shard size, the same."""
    return found(path, format, **reading)[0]


def found(path, format="auto", **reading) -> tuple[list[SourceRow], dict[str, int]]:
    """Every row, and how many of which kind are left out."""
    source = open_source(str(path), format, Reading(**reading))
    source.digest()
    source = pickle.loads(pickle.dumps(source))
    shards = [source.read(shard) for shard in range(source.shard_count())]
    assert [len(each.rows) for each in shards] == [source.count(shard) for shard in range(len(shards))]
    rows = [row for each in shards for row in each.rows]
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        assert row.status in STATUSES
        assert (row.failure in FAILURES) if row.status != "success" else row.failure is None
        assert row.split is None or row.split in SPLITS
    left_out: dict[str, int] = {}
    for each in shards:
        for kind, count in each.left_out.items():
            left_out[kind] = left_out.get(kind, 0) + count
    return rows, left_out


def write_json(path: Path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


def write_tar(path: Path, members) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def picture(format="JPEG", colour=(1, 2, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(buffer, format)
    return buffer.getvalue()
