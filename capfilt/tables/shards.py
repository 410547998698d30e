"""Parts and shards on disk: commit, verify, read.

A part is two folders. Its data is a folder of Parquet shards and nothing else, so that any reader opens it:

    <workspace>/<table>/<part>/00000.parquet             shard 0

Its record is kept apart, in the workspace's `.capfilt`:

    <workspace>/.capfilt/<table>/<part>/part.json        who wrote the part: table, contract version, further columns, stage,
                                                         options, inputs, fingerprint, planned shards and rows, and
                                                         where checkpoints came from
                                        00000.manifest.json  written last: a shard is done when its manifest exists and
                                                         agrees with the file
                                        00000.stats.json counts, seconds, rows per second
                                        index.json       all manifests in one file, written when a run ends
                                        precision.json   of some parts: the precision of all shards, written by the first worker

The record of a part that lies outside of a workspace (`--out DIR`) is beside it, in `.capfilt/DIR/`.

A shard whose failed rows were tried again has further generations, each a whole shard with a manifest of its own. Their
files are in the record: `00000.g0.parquet`, the first, set aside; `00000.g1.parquet` and `00000.g1.manifest.json`, in
which failed rows may have succeeded and all others are as before. The name `00000.parquet` follows to the newest
committed generation in one step. Readers here open the generation's own file, which never changes.

What the columns mean is in `contracts.py`; which process writes which shard is the business of `execution/`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capfilt.errors import MissingInput, RunError, UserError
from capfilt.tables.contracts import CONTRACTS, Contract
from capfilt.tables.ids import file_sha256
from capfilt.tables.manifest import Counts, Manifest, Plan, Successor, numbers_of
from capfilt.tables.publish import (
    alone,
    attempt_at,
    link_new,
    point,
    publish_new_bytes,
    replace,
    sync_directory,
)
from capfilt.tables.sealed import fingerprint, read_sealed, seal

RECORDS = ".capfilt"
"""The folder of parts' records in a workspace, or beside a part outside of one."""

_MANIFEST = re.compile(r"^(\d{5,})\.manifest\.json$")
_FOOTER_KEY = b"capfilt"

IMAGE_ROW_GROUP = 100
"""Rows per row group where a table holds pictures: the size that the Hugging Face viewer and `datasets` settled on."""


def etag_of(path: Path, most: int | None = None) -> tuple[int, str]:
    """Size and etag: cheap to compute for a file of any size, and different for any two Parquet files of interest.

    The etag covers the last 64 KiB and the whole footer, at most the last `most` bytes. The footer holds every column
    chunk's offset, size and statistics.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 8))
        footer = int.from_bytes(file.read(4), "little") + 8
        file.seek(max(0, size - (most or max(65536, footer))))
        tail = file.read()
    return size, hashlib.blake2b(tail + size.to_bytes(8, "little"), digest_size=16).hexdigest()


def record_of(path: Path) -> Path:
    """The folder of the record of the part at `path`; see the module docstring.

    A folder named after a table is taken for a workspace's, so that a part has one record under whatever path it is named.
    """
    real = Path(os.path.realpath(path))
    if real.parent.name in CONTRACTS:
        return real.parent.parent / RECORDS / real.parent.name / real.name
    return real.parent / RECORDS / real.name


class Part:
    """One part of a table: a directory of shards. Creating the object touches nothing on disk."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if "://" in str(path):
            raise UserError(
                f"{path}: parts live on a local or shared file system; mount the object store or copy it"
            )
        self.path = Path(path)
        self._hashed: dict[Path, tuple[int, int]] = {}

    def __repr__(self) -> str:
        return f"Part({str(self.path)!r})"

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def record(self) -> Path:
        """The folder of the part's manifests and of all else that is no shard."""
        return record_of(self.path)

    @property
    def exists(self) -> bool:
        """Whether the part was begun. Raises UserError where an earlier version of capfilt wrote it."""
        if (self.path / "_part.json").is_file():
            place = self.path.parent.parent if self.path.parent.name in CONTRACTS else self.path
            raise UserError(
                f"{self.path}: was written by an earlier capfilt; convert it with `capfilt convert {place}`"
            )
        # Without its folder a part is gone, whatever its record says.
        return self.path.is_dir() and (self.record / "part.json").is_file()

    @cached_property
    def info(self) -> dict[str, Any]:
        """The part's record, `part.json`. Raises UserError when the directory is not a part."""
        if not self.exists:
            if not self.path.exists():
                raise MissingInput(
                    f"{self.path}: no such part; run the stage that writes it, or name another"
                )
            raise UserError(
                f"{self.path}: not a part (no {self.record / 'part.json'}); bring other tools' data in with "
                "`capfilt ingest`, and move a part together with its record"
            )
        path = self.record / "part.json"
        cure = "restore it from a copy, or remove the part and make it again"
        info = read_sealed(path, cure) or {}
        try:
            contract, version = CONTRACTS[info["table"]], info["contract_version"]
            newer = version > contract.version
            contract.extended(info.get("columns", {}))
            numbers_of(info.get("planned", ""))
            mark = _mark(
                info["stage"], [contract.name, version, *sorted(info.get("columns", {}))], info["identity"]
            )
        except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not readable as a part's record ({error}); {cure}") from error
        if newer:
            raise UserError(
                f"{path}: contract version {version} of {contract.name} is newer than this capfilt's {contract.version}; "
                "upgrade capfilt"
            )
        if mark != info["fingerprint"]:
            raise UserError(f"{path}: its fingerprint is not that of its options and inputs; {cure}")
        return info

    @property
    def ways_out(self) -> str:
        """The two ways out where a part stands in the way, for the end of a message."""
        return f"name another output (--out NAME), or remove {self.path} and {self.record} to make it again (--overwrite does)"

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

    @property
    def planned(self) -> list[int]:
        """The shards that the part has when it is whole; the committed ones where its record does not tell."""
        planned = self.info.get("planned")
        return self.shards() if planned is None else numbers_of(planned)

    @property
    def planned_rows(self) -> int | None:
        """The input rows of all planned shards; None where they are not known."""
        return self.info.get("planned_rows")

    @property
    def gap(self) -> str:
        """Why the part is not whole, as in "1 of 2 shards"; "" where it is. A part made from such a part is not either."""
        planned, here = set(self.planned), set(self.shards())
        if not planned <= here:
            return f"{len(planned & here):,} of {len(planned):,} shards"
        return ", ".join(f"made from {gap} of {path}" for path, gap in self.info.get("gaps", {}).items())

    # -- writing ----------------------------------------------------------------------------------------------------

    def begin(
        self,
        contract: Contract,
        stage: str,
        identity: Mapping[str, Any],
        origins: Mapping[str, Mapping[str, str]] | None = None,
        plan: Plan | None = None,
    ) -> str:
        """Create the part, or continue it when it was begun with the same identity. Returns its fingerprint.

        `origins` says of marks in `identity` what they stand for. It and `plan` are written down and take part in nothing.

        Raises UserError when the part was written with another identity: rows of different options, inputs,
        checkpoints or code are never mixed.
        """
        mark = self.identity_fingerprint(contract, stage, identity)
        info: dict[str, Any] = {
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
        whole = plan.to_json() if plan else {}
        path = self.record / "part.json"
        if not self.exists:
            self._create(path, seal(info | whole))
        self.__dict__.pop("info", None)
        # Another process may have begun the part between the two looks.
        mark = self.identity_fingerprint(contract, stage, identity)
        if any(self.info.get(name) != value for name, value in whole.items()):
            replace(path, seal(self.info | whole))
            self.__dict__.pop("info", None)
        return mark

    def _create(self, path: Path, data: bytes) -> None:
        with alone(self.record.parent):
            if self.exists:
                return
            if self.path.is_dir() and any(name for name in os.listdir(self.path) if not name.startswith(".")):
                raise UserError(f"{self.path}: is not empty and not a part; name another output")
            # A record whose part was removed says nothing of the part that begins here.
            if not self.path.is_dir():
                self._forget()
            self.path.mkdir(parents=True, exist_ok=True)
            self.record.mkdir(parents=True, exist_ok=True)
            publish_new_bytes(path, data)

    def withdraw(self) -> None:
        """Take the part back where nothing was committed to it: a refused call claims no name."""
        with alone(self.record.parent):
            if not self.shards() and self.path.is_dir():
                with suppress(OSError):  # a shard that no manifest vouches for may lie there
                    self.path.rmdir()
                    self._forget()
        self.__dict__.pop("info", None)

    def _forget(self) -> None:
        """Remove the record's own files, and its folder where that held nothing else: records may lie in records."""
        if self.record.is_dir():
            for child in self.record.iterdir():
                if child.is_file():
                    child.unlink(missing_ok=True)
            with suppress(OSError):
                self.record.rmdir()

    def settle(self, name: str, value: str) -> str:
        """Return the value that all of the part's shards have under `name`: `value` where none stands yet, and then for good.

        For a fact that only a worker knows, and no identity can hold. The first worker's word stands in `<name>.json`.
        """
        path = self.record / f"{name}.json"
        if not path.is_file():
            publish_new_bytes(path, seal({name: value, "part": self.info["fingerprint"]}))
        return str(self.settled(path).get(name, value))

    def settled(self, path: Path) -> dict[str, Any]:
        """The values of a file of the record that `settle` wrote. Raises UserError where it changed, or is another part's."""
        cure = "restore it, or make the part again"
        values = read_sealed(path, cure) or {}
        if values.get("part", self.info["fingerprint"]) != self.info["fingerprint"]:
            raise UserError(f"{path}: is of another part or run; {cure}")
        return values

    def identity_fingerprint(self, contract: Contract, stage: str, identity: Mapping[str, Any]) -> str:
        """The fingerprint the part has, or would have, under this identity. Writes nothing.

        Raises UserError when the part stands and was written with another identity.
        """
        identity = json.loads(json.dumps(identity))
        # Parts without further columns keep the fingerprints they had before there were any. Records have columns in order.
        mark = _mark(stage, [contract.name, contract.version, *sorted(contract.further)], identity)
        if self.exists and self.info["fingerprint"] != mark:
            change = _first_difference(
                {"contract_version": self.info["contract_version"], **self.info.get("identity", {})},
                {"contract_version": contract.version, **identity},
            )
            raise UserError(f"{self.path}: was written with another identity ({change}); {self.ways_out}")
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

        A late attempt at a shard that is already committed leaves it as it is. The manifest is prepared and synced before the
        file gets its name. So a file that a killed attempt published without its manifest is adopted when a prepared
        manifest agrees with all of its bytes, and refused otherwise.

        Args:
            shard: its number.
            table: the rows.
            counts: the account, in the stage's input rows.
            mark: the shard's fingerprint.
            seconds: how long it took.
            stats: further figures of its stats; JSON-able.
            successor: where the rows are a further generation of a committed shard.
            batch_size: see Manifest.
        """
        counts.check()
        after = successor or Successor()
        standing = self._read_manifest(shard, after.generation)
        if standing is not None:
            return standing
        table = self.contract.conform(table)
        said = {
            "fingerprint": mark,
            "shard": shard,
            "contract_version": self.contract.version,
            "counts": asdict(counts),
        }
        footer = json.dumps(said, sort_keys=True).encode()
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _FOOTER_KEY: footer})
        path = self.path / f"{shard:05d}.parquet"
        if after.generation:
            self._set_aside(shard)
            path = self._generation(shard, after.generation)
        final = self._manifest_path(shard, after.generation)
        attempt = attempt_at(self.record / path.name, lambda place: _write_parquet(table, place))
        prepared, keep = None, False
        try:
            size, etag = etag_of(attempt)
            manifest = Manifest(
                shard=shard,
                table=self.contract.name,
                contract_version=self.contract.version,
                fingerprint=mark,
                rows=table.num_rows,
                size=size,
                etag=etag,
                sha256=file_sha256(attempt),
                counts=counts,
                **asdict(after),
                batch_size=batch_size,
                part=self.info["fingerprint"],
            )
            prepared = vouched = attempt_at(final, lambda place: place.write_bytes(manifest.to_json()))
            sync_directory(self.record)
            # An error from here on may leave a file that only this manifest vouches for.
            keep = True
            if not link_new(attempt, path):
                keep = False
                # Looked for first: a run that goes on beside this one removes it once its manifest stands.
                found = self._vouched(path, final, mark)
                standing = self._read_manifest(shard, after.generation)
                if standing is not None:
                    return standing
                if found is None:
                    raise RunError(
                        f"{path}: no run of this stage vouches for its bytes; delete it and run again"
                    )
                vouched, manifest = found
            if not link_new(vouched, final):
                manifest = self._read_manifest(shard, after.generation) or manifest
            vouched.unlink(missing_ok=True)
            keep = False
        finally:
            attempt.unlink(missing_ok=True)
            if prepared is not None and not keep:
                prepared.unlink(missing_ok=True)
        self._write_stats(manifest, seconds, stats or {})
        self.follow(shard)
        return manifest

    def _vouched(self, path: Path, final: Path, mark: str) -> tuple[Path, Manifest] | None:
        """The prepared manifest that agrees with every byte of a file without one, and its values."""
        digest = file_sha256(path)
        for prepared in sorted(self.record.glob(f".{final.name}.*.tmp")):
            with suppress(OSError, ValueError, KeyError, TypeError):
                manifest = Manifest.from_json(prepared.read_bytes())
                if (manifest.sha256, manifest.fingerprint) == (digest, mark):
                    return prepared, manifest
        return None

    # -- generations ------------------------------------------------------------------------------------------------

    def _generation(self, shard: int, generation: int) -> Path:
        return self.record / f"{shard:05d}.g{generation}.parquet"

    def file(self, manifest: Manifest) -> Path:
        """The file of a committed shard: of a retried one its generation's own, which never changes."""
        own = self._generation(manifest.shard, manifest.generation)
        return own if own.exists() else self.path / manifest.file

    def _set_aside(self, shard: int) -> None:
        """Keep the first generation under a name of its own before there is a second."""
        first = self.manifest(shard)
        if first is not None and not first.generation:
            problem = self.problem(first)
            if problem is not None:
                raise UserError(self._refusal(problem, first))
            if not self._generation(shard, 0).exists():
                link_new(self.path / first.file, self._generation(shard, 0))

    def behind(self, manifest: Manifest) -> bool:
        """Whether the name that other tools read is not yet that of this newest generation."""
        plain = self.path / manifest.file
        own = self._generation(manifest.shard, manifest.generation)
        if not own.exists() or (plain.exists() and plain.samefile(own)):
            return False
        # A copied part has files of its own under both names.
        return not plain.exists() or etag_of(plain) != (manifest.size, manifest.etag)

    def follow(self, shard: int) -> None:
        """Make `00000.parquet` the newest generation's name, in one step, where it is still an older one's."""
        manifest = self.manifest(shard)
        if manifest is not None and self.behind(manifest):
            point(self.path / manifest.file, self.file(manifest), self.record)

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
        replace(self._stats_path(manifest.shard), (json.dumps(stats, indent=1) + "\n").encode())

    def _stats_path(self, shard: int) -> Path:
        return self.record / f"{shard:05d}.stats.json"

    def stats(self, shard: int) -> dict[str, Any]:
        """The stats of a shard; empty where a crash came between its manifest and them, for they are a courtesy."""
        try:
            stats = json.loads(self._stats_path(shard).read_bytes())
        except (OSError, ValueError):
            return {}
        return stats if isinstance(stats, dict) else {}

    def finish(self) -> None:
        """Put in order whatever a run leaves at its end: every shard's name, and the index.

        The index, `index.json`, has all manifests in one file. It is derived: it may be deleted at any time.
        """
        manifests = list(self.manifests())
        for manifest in manifests:
            if self.behind(manifest):
                self.follow(manifest.shard)
        path = self.record / "index.json"
        data = seal({"manifests": [asdict(manifest) for manifest in manifests]})
        if not path.is_file() or path.read_bytes() != data:
            replace(path, data)

    def index_problem(self) -> str | None:
        """Why the index is no index of this part, in words, or None. No index is none, nor is an older one."""
        path, cure = self.record / "index.json", "delete it, then run the part's stage again"
        try:
            stands = read_sealed(path, cure)
            for entry in stands["manifests"] if stands is not None else []:
                manifest = self._read_manifest(entry["shard"], entry["generation"])
                if manifest is None or asdict(manifest) != entry:
                    return f"{path}: does not agree with the manifests; {cure}"
        except (UserError, KeyError, TypeError) as error:
            return str(error) if isinstance(error, UserError) else f"{path}: not readable as an index; {cure}"
        return None

    def unfinished(self) -> str:
        """Work that a killed run left to the next, in words; "" where it left none."""
        manifests = list(self.manifests())
        if any(self.behind(manifest) for manifest in manifests):
            return "a shard's name is still that of an older generation"
        stands = read_sealed(self.record / "index.json", "delete it")
        if stands is not None and stands["manifests"] != [asdict(manifest) for manifest in manifests]:
            return "the index is older than the shards"
        return ""

    # -- reading ----------------------------------------------------------------------------------------------------

    def _manifest_path(self, shard: int, generation: int = 0) -> Path:
        suffix = f".g{generation}" if generation else ""
        return self.record / f"{shard:05d}{suffix}.manifest.json"

    def shards(self) -> list[int]:
        """The numbers of the committed shards, ascending."""
        if not self.record.is_dir():
            return []
        return sorted(int(match[1]) for name in os.listdir(self.record) if (match := _MANIFEST.match(name)))

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
        cure = "restore it, or delete it and its shard, then run again"
        values = read_sealed(path, cure)
        if values is None:
            return None
        try:
            manifest = Manifest.of(values)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not readable as a manifest ({error}); {cure}") from error
        if (manifest.shard, manifest.generation) != (shard, generation):
            raise UserError(f"{path}: is of shard {manifest.shard}, generation {manifest.generation}; {cure}")
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
        """A fingerprint of the part's present rows: its own, and the hash of every committed shard."""
        return fingerprint(
            {"part": self.info["fingerprint"], "shards": [[m.shard, m.sha256] for m in self.manifests()]}
        )

    def problem(self, manifest: Manifest, *, full: bool = False) -> str | None:
        """Why the file does not agree with its manifest, in words, or None. `full` reads and hashes every byte."""
        path = self.file(manifest)
        info = self.info
        if (manifest.table, manifest.contract_version) != (info["table"], info["contract_version"]):
            return (
                f"{path}: its manifest is of table {manifest.table}, version {manifest.contract_version}, the part of "
                f"{info['table']}, version {info['contract_version']}"
            )
        if manifest.part not in ("", info["fingerprint"]):
            return f"{path}: its manifest is of another run than {self.record / 'part.json'}"
        try:
            size, etag = etag_of(path)
            if size != manifest.size:
                return f"{path}: {size} bytes, the manifest says {manifest.size}"
            if etag != manifest.etag or (full and not self._hashes(path, manifest)):
                return f"{path}: the bytes are not those the manifest was written for"
        except FileNotFoundError:
            return f"{path}: the manifest stands but the file is gone"
        except OSError as error:
            raise RunError(f"{path}: cannot be read ({error.strerror})") from error
        return None

    def _hashes(self, path: Path, manifest: Manifest) -> bool:
        """Whether all bytes have the manifest's hash; a file that did not change since is not read again."""
        stat = path.stat()
        seen = (stat.st_size, stat.st_mtime_ns)
        if self._hashed.get(path) != seen:
            if file_sha256(path) != manifest.sha256:
                return False
            self._hashed[path] = seen
        return True

    def _refusal(self, problem: str, manifest: Manifest) -> str:
        record = self._manifest_path(manifest.shard, manifest.generation)
        return f"{problem}; restore it, or delete it and {record}, then run its stage again"

    def check(self) -> Part:
        """Return self, or raise UserError naming the first shard whose file does not agree with its manifest."""
        for manifest in self.manifests():
            problem = self.problem(manifest)
            if problem is not None:
                raise UserError(self._refusal(problem, manifest))
        return self

    def read(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one committed shard. Raises UserError when it is not committed or does not agree."""
        file, manifest = self._opened(shard, columns)
        with self._reading(manifest):
            return file.read(columns=_known(file, columns))

    def batches(self, shard: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of one committed shard, a row group at a time: memory stays flat in the size of the shard."""
        file, manifest = self._opened(shard, columns)
        for group in range(file.num_row_groups):
            with self._reading(manifest):
                batches = file.read_row_group(group, columns=_known(file, columns)).to_batches()
            yield from batches

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Each committed shard in turn."""
        for shard in self.shards():
            yield self.read(shard, columns)

    def holding(self, images: pa.Array, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Each committed shard in turn that has a row of one of these images; of the others only the ids are read."""
        for shard in self.shards():
            ids = self.read(shard, ["image_id"])["image_id"]
            if pc.any(pc.is_in(ids, value_set=images)).as_py():
                yield self.read(shard, columns)

    def schemas(self) -> list[pa.Schema]:
        """The schemas of the committed shards, each once; they may differ in what an open table carries along."""
        found = (self._opened(shard, ())[0].schema_arrow.remove_metadata() for shard in self.shards())
        return list(dict.fromkeys(found))

    def open(self, shard: int) -> pq.ParquetFile:
        """One committed shard, to be read by row groups. Raises UserError where it is not committed or does not agree."""
        return self._opened(shard, None)[0]

    def _opened(self, shard: int, columns: Sequence[str] | None) -> tuple[pq.ParquetFile, Manifest]:
        """A committed shard's file, checked as far as is cheap beside reading `columns`, and its manifest."""
        manifest = self.manifest(shard)
        if manifest is None:
            raise MissingInput(
                f"{self.path}: shard {shard:05d} is not committed; run the stage that writes it to the end"
            )
        # Pictures are nearly all of a shard that has them: text alone is read under the checksums of its pages.
        pictures = "image" in CONTRACTS[self.info["table"]].schema.names
        full = not pictures or columns is None or "image" in columns
        problem = self.problem(manifest, full=full)
        if problem is not None:
            raise UserError(self._refusal(problem, manifest))
        with self._reading(manifest):
            file = pq.ParquetFile(self.file(manifest), page_checksum_verification=True)
            self._agrees(file, manifest)
        return file, manifest

    def _agrees(self, file: pq.ParquetFile, manifest: Manifest) -> None:
        """Raise ValueError where the footer is not of the shard, the rows and the columns that the records say."""
        if file.metadata.num_rows != manifest.rows:
            raise ValueError(f"{file.metadata.num_rows} rows, the manifest says {manifest.rows}")
        said = json.loads((file.schema_arrow.metadata or {}).get(_FOOTER_KEY, b"{}"))
        if (said.get("fingerprint"), said.get("shard")) != (manifest.fingerprint, manifest.shard):
            raise ValueError("its footer is of another shard or run")
        contract = self.contract
        if manifest.contract_version == contract.version:
            for each in contract.schema:
                place = file.schema_arrow.get_field_index(each.name)
                found = file.schema_arrow.field(place).type if place >= 0 else "not there"
                if found != each.type:
                    raise ValueError(f"column {each.name!r} is {found}, the contract says {each.type}")

    @contextmanager
    def _reading(self, manifest: Manifest) -> Iterator[None]:
        """Name the shard in any error of reading it."""
        path = self.file(manifest)
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise RunError(f"{path}: cannot be read ({error.strerror})") from error
            raise UserError(
                self._refusal(f"{path}: cannot be read ({str(error).splitlines()[0]})", manifest)
            ) from error


def _mark(stage: str, written: Sequence[Any], identity: Mapping[str, Any]) -> str:
    """A part's fingerprint; `written` is its table, contract version and further columns."""
    return fingerprint({"stage": stage, "contract": list(written), **identity})


def _known(file: pq.ParquetFile, columns: Sequence[str] | None) -> list[str] | None:
    if columns is None:
        return None
    names = set(file.schema_arrow.names)
    return [column for column in columns if column in names]


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
        write_page_checksum=True,
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
