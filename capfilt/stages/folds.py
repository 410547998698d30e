"""A set of checkpoints, one per fold of the images, under one name: `judge-{fold}` is judge-0, judge-1, ...

Checkpoint k judges the pictures of fold k (`capfilt.tables.ids.fold_of`), which it never saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from capfilt.errors import MissingInput
from capfilt.models import checkpoint
from capfilt.tables.workspace import Workspace

FOLD = "{fold}"


def members(name: str, workspace: Workspace) -> list[Path]:
    """The checkpoints of a set, by fold, or the one of a plain name. MissingInput for a set of fewer than 2."""
    if FOLD not in name:
        return [workspace.model(name)]
    found: list[Path] = []
    while (path := workspace.model(name.replace(FOLD, str(len(found))))).is_dir():
        found.append(path)
    if len(found) < 2:
        raise MissingInput(f"{name}: a set has a checkpoint per fold, from 0; {path} is not there")
    return found


def origins(names: Iterable[str], workspace: Workspace) -> dict[str, Mapping[str, str]]:
    """The checkpoints of plain names and of sets, as a record's origins."""
    found: dict[str, Mapping[str, str]] = {}
    for name in names:
        for fold, path in enumerate(members(name, workspace)):
            found |= checkpoint.origin(path, name.replace(FOLD, str(fold)))
    return found
