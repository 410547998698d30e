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
from capfilt.tables.manifest import Plan
from capfilt.tables.publish import one_line, replace, sync_directory
from capfilt.tables.sealed import seal
from capfilt.tables.shards import Part, etag_of, record_of

_OLD = "_part.json"
_MANIFEST = re.compile(r"\d{5,}(\.g\d+)?\.manifest\.json")
_GENERATION = re.compile(r"_(\d{5,}\.g\d+\.parquet)")
_STATS = re.compile(r"(\d{5,})_stats\.json")
_INDEX = "_index.json"


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
    standing = record / "part.json"
    mark = _read(path / _OLD).get("fingerprint")
    with one_line(path):
        record.mkdir(parents=True, exist_ok=True)
        # The record of a part that was here before says nothing of this one.
        if standing.is_file() and _read(standing).get("fingerprint") != mark:
            for child in record.iterdir():
                child.unlink()
        for name in sorted(os.listdir(path)):
            source = path / name
            if _MANIFEST.fullmatch(name):
                values = _read(source)
                values.pop("file", None)
                standard = {"generation": 0, "previous": "", "changed": {}, "batch_size": 0, "part": ""}
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
            elif name.startswith(".") and name.endswith(".tmp"):
                source.unlink()
            elif name.startswith("_") and name.endswith(".json") and name not in (_OLD, _INDEX):
                replace(record / name[1:], seal(_read(source)))
                source.unlink()
        sync_directory(record)
        # Last: while `_part.json` stands among the shards, the part is of the earlier layout and is converted again.
        if not standing.is_file():
            replace(standing, seal(_read(path / _OLD) | _plan(path / _INDEX)))
        (path / _INDEX).unlink(missing_ok=True)
        (path / _OLD).unlink()
        sync_directory(path)


def _old_file(values: dict[str, Any]) -> str:
    shard, generation = values.get("shard"), values.get("generation", 0)
    return f"_{shard:05d}.g{generation}.parquet" if generation else f"{shard:05d}.parquet"


def _plan(index: Path) -> dict[str, Any]:
    """The plan of a part whose run ended: an index was written then, of all its shards."""
    try:
        listed = {
            int(each["shard"]): int(each["counts"]["rows_in"]) for each in json.loads(index.read_bytes())
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return Plan(sorted(listed), sum(listed.values())).to_json()


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
        values.keys()
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it, or remove the part") from error
    return dict(values)
