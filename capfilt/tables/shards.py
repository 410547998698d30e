"""Parts and shards on disk: commit, verify, fingerprint, read.

A part is a directory:

    _part.json            what wrote it: table, contract version, further columns, stage, options, inputs, fingerprint,
                          and where checkpoints came from
    00000.parquet         shard 0
    00000.manifest.json   written last: the shard is done when this exists and agrees with the file
    00000_stats.json      counts, seconds, rows per second
    _index.json           the manifests in one file, written when a run ends
    _precision.json       of some parts: what all their shards were computed in, written by the first worker

A shard whose failed rows were tried again has further generations, each a whole shard with a manifest of its own:

    _00000.g1.parquet     generation 1 of shard 0: its failed rows may have succeeded, all others are as before
    00000.g1.manifest.json

Readers see the newest committed generation; the older ones stay as they are and may be deleted. The name begins with `_`
so that a reader which knows no manifests, and takes every *.parquet, has each row once: the first generation's.

What the columns mean is in `contracts.py`; which process writes which shard is the business of `execution/`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.errors import MissingInput, RunError, UserError
from capfilt.tables.contracts import CONTRACTS, Contract
from capfilt.tables.ids import file_sha256
from capfilt.tables.publish import publish_new, publish_new_bytes, replace

_MANIFEST = re.compile(r"^(\d{5,})\.manifest\.json$")
_FOOTER_KEY = b"capfilt"

IMAGE_ROW_GROUP = 100
"""Rows per row group where a table holds pictures: what the Hugging Face viewer and `datasets` settled on."""


def fingerprint(value: Mapping[str, Any]) -> str:
    """Return 32 hex digits that change when anything in the JSON-able `value` changes; key order does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Counts:
    """The accounting of one shard, in the stage's input rows: rows_in = kept + dropped + failed.

    Attributes:
        rows_in: input rows the stage was given.
        kept: input rows that came through.
        dropped: input rows left out on purpose, by reason.
        failed: input rows that failed, by failure (from the closed list).
    """

    rows_in: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    def check(self) -> None:
        """Raise RunError unless every input row is accounted for."""
        total = self.kept + sum(self.dropped.values()) + sum(self.failed.values())
        if total != self.rows_in:
            raise RunError(
                f"rows do not add up: {self.rows_in} in, but {self.kept} kept + {sum(self.dropped.values())} dropped + "
                f"{sum(self.failed.values())} failed = {total}"
            )

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.rows_in + other.rows_in,
            self.kept + other.kept,
            _add(self.dropped, other.dropped),
            _add(self.failed, other.failed),
        )


def _add(left: Mapping[str, int], right: Mapping[str, int]) -> dict[str, int]:
    return {key: left.get(key, 0) + right.get(key, 0) for key in sorted({*left, *right})}


@dataclass(frozen=True)
class Manifest:
    """What a committed shard is: see the module docstring. `etag` is a hash of the file's last 64 KiB and its size.

    Of a generation above 0, `previous` is the SHA-256 of the one it was made from, and `changed` the options that it was
    made with otherwise than the part. `batch_size`: images at a time, where a stage's engine chose that itself or memory
    forced fewer than the options say; 0 where it was as they say.
    """

    shard: int
    file: str
    table: str
    contract_version: int
    fingerprint: str
    rows: int
    size: int
    etag: str
    sha256: str
    counts: Counts
    generation: int = 0
    previous: str = ""
    changed: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 0

    def to_json(self) -> bytes:
        values = asdict(self)
        if not self.generation:
            # As before there were generations: a part that was never retried has the bytes it always had.
            for name in ("generation", "previous", "changed"):
                del values[name]
        if not self.batch_size:
            del values["batch_size"]
        return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()

    @staticmethod
    def from_json(data: bytes) -> Manifest:
        """Raises ValueError, KeyError or TypeError when `data` is not a manifest."""
        fields = json.loads(data)
        return Manifest(**{**fields, "counts": Counts(**fields["counts"])})


@dataclass(frozen=True)
class Successor:
    """What the rows of a further generation come after; see Manifest."""

    generation: int = 0
    previous: str = ""
    changed: dict[str, Any] = field(default_factory=dict)


def _file_name(shard: int, generation: int) -> str:
    return f"_{shard:05d}.g{generation}.parquet" if generation else f"{shard:05d}.parquet"


def _etag(path: Path) -> tuple[int, str]:
    """Size and etag: cheap to compute for a file of any size, and different for any two Parquet files of interest.

    The footer at the end holds every column chunk's offset, size and statistics.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 65536))
        tail = file.read()
    return size, hashlib.blake2b(tail + size.to_bytes(8, "little"), digest_size=16).hexdigest()


class Part:
    """One part of a table: a directory of shards. Creating the object touches nothing on disk."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if "://" in str(path):
            raise UserError(
                f"{path}: parts live on a local or shared file system; mount the object store or copy it"
            )
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Part({str(self.path)!r})"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def exists(self) -> bool:
        return (self.path / "_part.json").is_file()

    @cached_property
    def info(self) -> dict[str, Any]:
        """The part's `_part.json`. Raises UserError when the directory is not a part."""
        path = self.path / "_part.json"
        if not path.is_file():
            if not self.path.exists():
                raise MissingInput(
                    f"{self.path}: no such part; run the stage that writes it, or name another"
                )
            raise UserError(
                f"{self.path}: not a part (no _part.json); bring other tools' data in with `capfilt ingest`"
            )
        try:
            info = json.loads(path.read_bytes())
            contract = CONTRACTS[info["table"]]
            if info["contract_version"] > contract.version:
                raise UserError(
                    f"{path}: contract version {info['contract_version']} of {contract.name} is newer than this "
                    f"capfilt's {contract.version}; upgrade capfilt"
                )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not readable as a part's description ({error!r}); restore or remove it"
            ) from error
        try:
            contract.extended(info.get("columns", {}))
        except (UserError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: `columns` cannot be ({error}); restore or remove it") from error
        return dict(info)

    @property
    def contract(self) -> Contract:
        """The table's, with the further columns this part was begun with."""
        return CONTRACTS[self.info["table"]].extended(self.info.get("columns", {}))

    def expect(self, table: str) -> Part:
        """Return self, or raise UserError when the part is of another table."""
        if self.info["table"] != table:
            raise UserError(
                f"{self.path}: is a part of table {self.info['table']}, but one of {table} is needed"
            )
        return self

    # -- writing ----------------------------------------------------------------------------------------------------

    def begin(
        self,
        contract: Contract,
        stage: str,
        identity: Mapping[str, Any],
        origins: Mapping[str, Mapping[str, str]] | None = None,
    ) -> str:
        """Create the part, or continue it when it was begun with the same identity. Returns its fingerprint.

        `origins` says of marks in `identity` what they stand for; it is written down and takes part in nothing.

        Raises UserError when the part was written with another identity: rows of different options, inputs,
        checkpoints or code are never mixed.
        """
        mark = self.identity_fingerprint(contract, stage, identity)
        info = {
            "table": contract.name,
            "contract_version": contract.version,
            "stage": stage,
            "identity": identity,
            "fingerprint": mark,
        }
        if contract.further:
            info["columns"] = contract.further
        if origins:
            info["origins"] = origins
        if not self.exists:
            if self.path.is_dir() and any(name for name in os.listdir(self.path) if not name.startswith(".")):
                raise UserError(f"{self.path}: is not empty and not a part; name another output")
            self.path.mkdir(parents=True, exist_ok=True)
            publish_new_bytes(
                self.path / "_part.json", (json.dumps(info, indent=1, sort_keys=True) + "\n").encode()
            )
        self.__dict__.pop("info", None)
        # Another process may have begun the part between the two looks.
        return self.identity_fingerprint(contract, stage, identity)

    def withdraw(self) -> None:
        """Take the part back where nothing was committed to it: what a refused call began claims no name."""
        names = os.listdir(self.path) if self.path.is_dir() else []
        if all(name.startswith(("_", ".")) for name in names):
            for name in names:
                if name.endswith(".json"):
                    (self.path / name).unlink(missing_ok=True)
            with suppress(OSError):  # files of killed attempts may lie there
                self.path.rmdir()
            self.__dict__.pop("info", None)

    def settle(self, name: str, value: str) -> str:
        """What all of the part's shards have under `name`: `value` where nobody said anything before, and then for good.

        For what only a worker knows, and no identity can hold. The first worker's word stands in `_<name>.json`.
        """
        path = self.path / f"_{name}.json"
        if not path.is_file():
            publish_new_bytes(path, (json.dumps({name: value}) + "\n").encode())
        try:
            return str(json.loads(path.read_bytes())[name])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not readable ({error!r}); restore it, or make the part again"
            ) from error

    def identity_fingerprint(self, contract: Contract, stage: str, identity: Mapping[str, Any]) -> str:
        """The fingerprint the part has, or would have, under this identity. Writes nothing.

        Raises UserError when the part stands and was written with another identity.
        """
        identity = json.loads(json.dumps(identity))
        # Parts without further columns keep the fingerprints they had before there were any.
        written = [contract.name, contract.version, *contract.further]
        mark = fingerprint({"stage": stage, "contract": written, **identity})
        if self.exists and self.info["fingerprint"] != mark:
            change = _first_difference(
                {"contract_version": self.info["contract_version"], **self.info.get("identity", {})},
                {"contract_version": contract.version, **identity},
            )
            raise UserError(
                f"{self.path}: was written with another identity ({change}); name another output, or remove the part "
                "to make it again"
            )
        return mark

    def commit(
        self,
        shard: int,
        table: pa.Table,
        counts: Counts,
        mark: str,
        seconds: float,
        *,
        stats: Mapping[str, Any] | None = None,
        successor: Successor | None = None,
        batch_size: int = 0,
    ) -> Manifest:
        """Publish one shard: file, then manifest, then stats, which say `stats` too. Returns the manifest that stands.

        A late attempt at a shard that is already committed leaves it as it is. A file that an earlier attempt
        published without its manifest is adopted when its footer carries the same fingerprint: it is whole, because it
        was synced before it got its name.

        Args:
            shard: its number.
            table: the rows.
            counts: the account, in the stage's input rows.
            mark: the shard's fingerprint.
            seconds: how long it took.
            stats: what else its stats say; JSON-able.
            successor: where the rows are a further generation of a committed shard.
            batch_size: see Manifest.
        """
        counts.check()
        after = successor or Successor()
        standing = self._read_manifest(shard, after.generation)
        if standing is not None:
            return standing
        contract = self.contract
        table = contract.conform(table)
        path = self.path / _file_name(shard, after.generation)
        said: dict[str, Any] = {"fingerprint": mark, "shard": shard, "counts": asdict(counts)}
        if after.generation:
            said |= asdict(after)
        if batch_size:
            said["batch_size"] = batch_size
        footer = json.dumps(said, sort_keys=True)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _FOOTER_KEY: footer.encode()})

        if not publish_new(path, lambda attempt: _write_parquet(table, attempt)):
            standing = self._read_manifest(shard, after.generation)
            if standing is not None:
                return standing
            counts, after, batch_size = self._orphan(path, shard, mark)
        manifest = self._publish_manifest(path, shard, mark, counts, after, batch_size)
        self._write_stats(manifest, seconds, stats or {})
        return manifest

    def _orphan(self, path: Path, shard: int, mark: str) -> tuple[Counts, Successor, int]:
        try:
            footer = json.loads((pq.read_schema(path).metadata or {})[_FOOTER_KEY])
            if footer["fingerprint"] == mark and footer["shard"] == shard:
                known = {name: footer[name] for name in Successor.__dataclass_fields__ if name in footer}
                return Counts(**footer["counts"]), Successor(**known), footer.get("batch_size", 0)
        except (pa.ArrowInvalid, KeyError, ValueError, TypeError):
            pass
        raise RunError(
            f"{path}: a file of other origin stands where shard {shard} belongs; remove it and run again"
        )

    def _publish_manifest(
        self, path: Path, shard: int, mark: str, counts: Counts, after: Successor, batch_size: int
    ) -> Manifest:
        size, etag = _etag(path)
        contract = self.contract
        manifest = Manifest(
            shard=shard,
            file=path.name,
            table=contract.name,
            contract_version=contract.version,
            fingerprint=mark,
            rows=pq.read_metadata(path).num_rows,
            size=size,
            etag=etag,
            sha256=file_sha256(path),
            counts=counts,
            **asdict(after),
            batch_size=batch_size,
        )
        if not publish_new_bytes(self._manifest_path(shard, after.generation), manifest.to_json()):
            standing = self._read_manifest(shard, after.generation)
            assert standing is not None
            return standing
        return manifest

    def _write_stats(self, manifest: Manifest, seconds: float, further: Mapping[str, Any]) -> None:
        stats = {
            "count": manifest.counts.rows_in,
            "kept": manifest.counts.kept,
            "dropped": manifest.counts.dropped,
            "failed": manifest.counts.failed,
            "rows_out": manifest.rows,
            "seconds": round(seconds, 3),
            "rows_per_second": round(manifest.counts.rows_in / seconds, 1) if seconds > 0 else None,
            "end_time": time.time(),
            **further,
        }
        replace(self.path / f"{manifest.shard:05d}_stats.json", (json.dumps(stats, indent=1) + "\n").encode())

    def stats(self, shard: int) -> dict[str, Any]:
        """The stats of a shard; empty where a crash came between its manifest and them, for they are a courtesy."""
        try:
            stats = json.loads((self.path / f"{shard:05d}_stats.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return stats if isinstance(stats, dict) else {}

    def write_index(self) -> None:
        """Write `_index.json`, all manifests in one file. Derived: it may be deleted at any time."""
        index = [asdict(manifest) for manifest in self.manifests()]
        replace(self.path / "_index.json", (json.dumps(index, sort_keys=True) + "\n").encode())

    # -- reading ----------------------------------------------------------------------------------------------------

    def _manifest_path(self, shard: int, generation: int = 0) -> Path:
        suffix = f".g{generation}" if generation else ""
        return self.path / f"{shard:05d}{suffix}.manifest.json"

    def shards(self) -> list[int]:
        """The numbers of the committed shards, ascending."""
        if not self.path.is_dir():
            return []
        return sorted(int(match[1]) for name in os.listdir(self.path) if (match := _MANIFEST.match(name)))

    def manifest(self, shard: int) -> Manifest | None:
        """The manifest of `shard`'s newest generation, or None when it is not committed.

        Raises UserError when it is not readable.
        """
        manifest = self._read_manifest(shard, 0)
        while manifest is not None:
            # Each generation was made from the one before it, so that there is none without it.
            newer = self._read_manifest(shard, manifest.generation + 1)
            if newer is None:
                return manifest
            manifest = newer
        return None

    def _read_manifest(self, shard: int, generation: int) -> Manifest | None:
        path = self._manifest_path(shard, generation)
        try:
            manifest = Manifest.from_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not readable as a manifest; remove it and its shard, then run again"
            ) from error
        expected = (shard, generation, _file_name(shard, generation))
        if (manifest.shard, manifest.generation, manifest.file) != expected:
            raise UserError(
                f"{path}: names shard {manifest.shard} in {manifest.file!r}; remove it and run again"
            )
        return manifest

    def manifests(self) -> Iterator[Manifest]:
        for shard in self.shards():
            manifest = self.manifest(shard)
            if manifest is not None:
                yield manifest

    @property
    def rows(self) -> int:
        """Committed rows, all shards together."""
        return sum(manifest.rows for manifest in self.manifests())

    def counts(self) -> Counts:
        """The accounting of all committed shards together."""
        total = Counts(0, 0)
        for manifest in self.manifests():
            total = total + manifest.counts
        return total

    def digest(self) -> str:
        """A fingerprint of what the part holds now: its own, and the hash of every committed shard."""
        return fingerprint(
            {"part": self.info["fingerprint"], "shards": [[m.shard, m.sha256] for m in self.manifests()]}
        )

    def problem(self, manifest: Manifest, *, full: bool = False) -> str | None:
        """Why the file does not agree with its manifest, in words, or None. `full` reads and hashes every byte."""
        path = self.path / manifest.file
        if manifest.table != self.info["table"]:
            return f"{path}: the manifest is of table {manifest.table}, the part of {self.info['table']}"
        if not path.is_file():
            return f"{path}: the manifest stands but the file is gone"
        size, etag = _etag(path)
        if size != manifest.size:
            return f"{path}: {size} bytes, the manifest says {manifest.size}"
        if etag != manifest.etag or (full and file_sha256(path) != manifest.sha256):
            return f"{path}: the bytes are not those the manifest was written for"
        return None

    def check(self) -> Part:
        """Return self, or raise UserError naming the first shard whose file does not agree with its manifest."""
        for manifest in self.manifests():
            problem = self.problem(manifest)
            if problem is not None:
                raise UserError(
                    f"{problem}; restore it, or remove the shard and its manifest and run the stage again"
                )
        return self

    def read(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one committed shard. Raises UserError when it is not committed or does not agree."""
        return pa.Table.from_batches(*_batches(self.open(shard), columns))

    def batches(self, shard: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of one committed shard, a row group at a time: memory stays flat in the size of the shard."""
        file = self.open(shard)
        for group in range(file.num_row_groups):
            yield from file.read_row_group(group, columns=_known(file, columns)).to_batches()

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Each committed shard in turn."""
        for shard in self.shards():
            yield self.read(shard, columns)

    def open(self, shard: int) -> pq.ParquetFile:
        """One committed shard, to be read by row groups. Raises UserError where it is not committed or does not agree."""
        manifest = self.manifest(shard)
        if manifest is None:
            raise MissingInput(
                f"{self.path}: shard {shard:05d} is not committed; run the stage that writes it to the end"
            )
        problem = self.problem(manifest)
        if problem is not None:
            raise UserError(
                f"{problem}; restore it, or remove the shard and its manifest and run the stage again"
            )
        try:
            return pq.ParquetFile(self.path / manifest.file)
        except pa.ArrowInvalid as error:
            raise UserError(f"{self.path / manifest.file}: not a Parquet file ({error})") from error


def _known(file: pq.ParquetFile, columns: Sequence[str] | None) -> list[str] | None:
    if columns is None:
        return None
    names = set(file.schema_arrow.names)
    return [column for column in columns if column in names]


def _batches(file: pq.ParquetFile, columns: Sequence[str] | None) -> tuple[list[pa.RecordBatch], pa.Schema]:
    table = file.read(columns=_known(file, columns))
    return table.to_batches(), table.schema


def _write_parquet(table: pa.Table, path: Path) -> None:
    pictures = "image" in table.column_names
    plain = [name for name in table.column_names if name != "image"]
    with pq.ParquetWriter(
        path,
        table.schema,
        # JPEGs do not get smaller; trying costs more than writing them.
        compression={name: "none" if name == "image.bytes" else "zstd" for name in _leaves(table.schema)},
        use_dictionary=plain if pictures else True,
        write_page_index=True,
    ) as file:
        # A shard that kept nothing has no row group: one without rows is what `datasets` cannot load.
        if table.num_rows:
            file.write_table(table, IMAGE_ROW_GROUP if pictures else 65536)


def _leaves(schema: pa.Schema) -> list[str]:
    """The Parquet columns of a schema, structs taken apart: `image.bytes`, `image.path`, ..."""
    leaves: list[str] = []
    for field_ in schema:
        if pa.types.is_struct(field_.type):
            leaves += [f"{field_.name}.{inner.name}" for inner in field_.type]
        else:
            leaves.append(field_.name)
    return leaves


def _first_difference(old: Any, new: Any, prefix: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    return f"{prefix or 'fingerprint'} was {_short(old)}, is now {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
