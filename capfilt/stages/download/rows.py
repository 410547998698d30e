"""What the child's answers are as rows of the images table: columns, accounts, and figures for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from capfilt.formats.values import storable
from capfilt.stages.download.worker import Row
from capfilt.tables.manifest import Counts

HOSTS_TOLD = 50
"""How many hosts a shard's stats name: those with most failed rows."""

ANSWERED = (
    "status", "failure", "error_message", "image", "width", "height", "original_width", "original_height", "sha256",
    "phash",
)  # fmt: skip
"""The columns of the images table that fetching decides."""


def answered(answer: Row, key: str, encode_format: str) -> dict[str, Any]:
    """The answer as the columns ANSWERED."""
    columns = {name: answer.columns.get(name) for name in ANSWERED}
    words = columns["error_message"]
    columns["error_message"] = None if words is None else storable(words)
    columns["image"] = {"bytes": answer.picture, "path": f"{key}.{encode_format}"} if answer.picture else None
    return columns


def counts_of(table: pa.Table) -> Counts:
    """The account of a shard of images."""
    failed = Counter(failure for failure in table["failure"].to_pylist() if failure is not None)
    return Counts(table.num_rows, table.num_rows - failed.total(), {}, dict(sorted(failed.items())))


def stats_of(table: pa.Table, answers: Iterable[Row]) -> dict[str, Any]:
    """For the shard's stats: bytes received now, and its worst hosts as {host: [rows, failed rows]}."""
    asked, failed = Counter[str](), Counter[str]()
    for url, failure in zip(table["url"].to_pylist(), table["failure"].to_pylist(), strict=True):
        host = host_of(url)
        asked[host] += 1
        failed[host] += failure is not None
    worst = sorted(asked, key=lambda host: (-failed[host], -asked[host], host))[:HOSTS_TOLD]
    return {
        "bytes_received": sum(answer.columns.get("received") or 0 for answer in answers),
        "hosts": {host: [asked[host], failed[host]] for host in worst if host},
    }


def host_of(url: str | None) -> str:
    """The host that a URL names, in lower case; empty where it names none."""
    try:
        return urlsplit((url or "").strip()).hostname or ""
    except ValueError:
        return ""
