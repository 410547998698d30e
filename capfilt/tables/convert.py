"""Converting parts of earlier versions, which kept their records among their shards, to today's layout.

Rows, file bytes and ids stay as they are. A conversion that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from capfilt.errors import UserError
from capfilt.tables.contracts import CONTRACTS
from capfilt.tables.publish import one_line, replace, sync_directory
from capfilt.tables.sealed import seal
from capfilt.tables.shards import Part, etag_of, record_of

_OLD = "_part.json"
_MANIFEST = re.compile(r"\d{5,}(\.g\d+)?\.manifest\.json")
_GENERATION = re.compile(r"_(\d{5,}\.g\d+\.parquet)")
_STATS = re.compile(r"(\d{5,})_stats\.json")
_LEFTOVER = re.compile(r"\..*\.tmp|_index\.json")


def convert(place: Path) -> list[Path]:
    """Convert the part or the whole workspace at `place`. Returns the parts that were converted, by path.

    Raises UserError where there is nothing of capfilt's, or a record that cannot be read.
    """
    if not place.is_dir():
        raise UserError(f"{place}: no such folder; name a workspace or a part")
    children = [child for table in CONTRACTS for child in sorted((place / table).glob("*/"))]
    old = [path for path in (place, *children) if (path / _OLD).is_file()]
    for path in old:
        _convert(path)
    for part in map(Part, (place, *children)):
        if part.exists:
            part.finish()
    return old


def _convert(path: Path) -> None:
    record = record_of(path)
    with one_line(path):
        record.mkdir(parents=True, exist_ok=True)
        for name in sorted(os.listdir(path)):
            source = path / name
            if _MANIFEST.fullmatch(name):
                values = _read(source)
                values.pop("file", None)
                standard = {"generation": 0, "previous": "", "changed": {}, "batch_size": 0}
                shard = path / _old_file(values)
                if shard.is_file() and etag_of(shard, 65536)[1] == values.get("etag"):
                    values["etag"] = etag_of(shard)[1]  # of a footer above 64 KiB it covers all now
                replace(record / name, seal(standard | values))
                source.unlink()
            elif stats := _STATS.fullmatch(name):
                os.replace(source, record / f"{stats[1]}.stats.json")
            elif generation := _GENERATION.fullmatch(name):
                first = f"{generation[1].partition('.')[0]}"
                aside = record / f"{first}.g0.parquet"
                if not aside.exists():
                    os.link(path / f"{first}.parquet", aside)
                os.replace(source, record / generation[1])
            elif _LEFTOVER.fullmatch(name):
                source.unlink()
            elif name.startswith("_") and name.endswith(".json") and name != _OLD:
                replace(record / name[1:], seal(_read(source)))
                source.unlink()
        sync_directory(record)
        # Last: while it stands among the shards, the part is of the earlier layout and is converted again.
        replace(record / "part.json", seal(_read(path / _OLD)))
        (path / _OLD).unlink()
        sync_directory(path)


def _old_file(values: dict[str, Any]) -> str:
    shard, generation = values.get("shard"), values.get("generation", 0)
    return f"_{shard:05d}.g{generation}.parquet" if generation else f"{shard:05d}.parquet"


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
        values.keys()
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it, or remove the part") from error
    return dict(values)
