"""The account of a workspace: what each part was made from, and where its stage's input rows went.

It is read from descriptions, manifests and stats alone; no Parquet file's rows are touched. Views over it are in
`schemas/views.sql`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from capfilt.tables.contracts import CONTRACTS
from capfilt.tables.manifest import Counts, Manifest
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace


@dataclass(frozen=True)
class Account:
    """One part and what its manifests say, all shards together.

    Attributes:
        table: the part's table.
        part: the part itself.
        manifests: of the committed shards, each checked against its file.
        counts: in its stage's input rows.
        seconds: work on its shards, summed over workers.
        finished: when the newest shard was committed, in UTC; None where no stats say so.
    """

    table: str
    part: Part
    manifests: tuple[Manifest, ...]
    counts: Counts
    seconds: float
    finished: datetime | None

    @property
    def name(self) -> str:
        """The part's, behind its table's: images/web."""
        return f"{self.table}/{self.part.name}"

    @property
    def stage(self) -> str:
        return str(self.part.info.get("stage", ""))

    @property
    def identity(self) -> dict[str, Any]:
        identity = self.part.info.get("identity")
        return identity if isinstance(identity, dict) else {}

    @property
    def fingerprint(self) -> str:
        return str(self.part.info.get("fingerprint", ""))

    @property
    def rows_out(self) -> int:
        return sum(manifest.rows for manifest in self.manifests)

    @property
    def size(self) -> int:
        return sum(manifest.size for manifest in self.manifests)

    def outcomes(self) -> Iterator[tuple[str, str | None, int | None]]:
        """(kept, dropped or failed; the reason; rows), the kept first, then by number of rows.

        Of a part that is not whole the last is "missing": its reason is `Part.gap`, its rows are None where nobody knows them.
        """
        yield "kept", None, self.counts.kept
        for outcome, reasons in (("dropped", self.counts.dropped), ("failed", self.counts.failed)):
            for reason, rows in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
                yield outcome, reason, rows
        if self.part.gap:
            planned = self.part.planned_rows
            yield "missing", self.part.gap, None if planned is None else planned - self.counts.rows_in


def accounts(workspace: Workspace) -> list[Account]:
    """The account of every part, in the order of the tables, then by name.

    Raises UserError naming the first part whose description is unreadable or of another table than its directory's,
    or whose files do not agree with their manifests.
    """
    found = []
    for table in CONTRACTS:
        for part in map(Part, workspace.folders(table)):
            if part.exists:
                found.append(_account(table, part))
            elif any(part.path.glob("*.parquet")):
                warnings.warn(
                    f"{part.path}: holds shards but has no record in {part.record}, so it is passed over",
                    RuntimeWarning,
                    stacklevel=3,
                )
    return found


def _account(table: str, part: Part) -> Account:
    manifests = tuple(part.expect(table).manifests())
    if any(part.problem(manifest) for manifest in manifests):
        part.check()
    seconds, finished = 0.0, 0.0
    for manifest in manifests:
        stats = part.stats(manifest.shard)
        seconds += _number(stats.get("seconds"))
        finished = max(finished, _number(stats.get("end_time")))
    counts = sum((manifest.counts for manifest in manifests), Counts(0, 0))
    return Account(
        table, part, manifests, counts, seconds, datetime.fromtimestamp(finished, UTC) if finished else None
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def parts_table(found: Sequence[Account]) -> pa.Table:
    """One row per part; `identity` is JSON text."""
    columns = {
        "ordinal": pa.array(range(len(found)), pa.int32()),
        "table_name": pa.array([account.table for account in found], pa.string()),
        "part": pa.array([account.part.name for account in found], pa.string()),
        "stage": pa.array([account.stage for account in found], pa.string()),
        "shards": pa.array([len(account.manifests) for account in found], pa.int64()),
        "planned_shards": pa.array([len(account.part.planned) for account in found], pa.int64()),
        "rows_in": pa.array([account.counts.rows_in for account in found], pa.int64()),
        "rows_out": pa.array([account.rows_out for account in found], pa.int64()),
        "size": pa.array([account.size for account in found], pa.int64()),
        "seconds": pa.array([account.seconds for account in found], pa.float64()),
        "finished": pa.array([account.finished for account in found], pa.timestamp("us", "UTC")),
        "fingerprint": pa.array([account.fingerprint for account in found], pa.string()),
        "identity": pa.array(
            [json.dumps(account.identity, sort_keys=True) for account in found], pa.string()
        ),
    }
    return pa.table(columns)


def funnel_table(found: Sequence[Account]) -> pa.Table:
    """One row per part, outcome and reason; the rows of a part add up to its stage's input rows."""
    rows = [(place, account, *said) for place, account in enumerate(found) for said in account.outcomes()]
    columns = {
        "ordinal": pa.array([row[0] for row in rows], pa.int32()),
        "stage": pa.array([row[1].stage for row in rows], pa.string()),
        "table_name": pa.array([row[1].table for row in rows], pa.string()),
        "part": pa.array([row[1].part.name for row in rows], pa.string()),
        "outcome": pa.array([row[2] for row in rows], pa.string()),
        "reason": pa.array([row[3] for row in rows], pa.string()),
        "rows": pa.array([row[4] for row in rows], pa.int64()),
    }
    return pa.table(columns)
