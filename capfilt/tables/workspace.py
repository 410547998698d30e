"""A workspace: one directory with everything of a run, and how names become paths in it."""

from __future__ import annotations

import os
from pathlib import Path

from capfilt.errors import UserError
from capfilt.tables.contracts import CONTRACTS
from capfilt.tables.shards import Part


class Workspace:
    """One directory holding `images/ captions/ scores/ signals/ verdicts/ pairs/ examples/ models/ runs/`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if "://" in str(path):
            raise UserError(
                f"{path}: a workspace lives on a local or shared file system; mount the object store there"
            )
        self.path = Path(path)

    def part(self, table: str, name: str) -> Part:
        """The part of `table` called `name`; with a separator (`./name`, `/data/name`) it is a path instead."""
        if table not in CONTRACTS:
            raise UserError(f"table {table!r} does not exist; the tables are {', '.join(CONTRACTS)}")
        return Part(self._place(table, name))

    def model(self, name: str) -> Path:
        """The directory of the checkpoint called `name`; with a separator it is a path instead."""
        return self._place("models", name)

    def _place(self, kind: str, name: str) -> Path:
        if not name or name in (".", ".."):
            raise UserError(
                f"{name!r} is no name for a part of {kind}; for a folder write ./NAME or an absolute path"
            )
        return Path(name).expanduser() if os.sep in name else self.path / kind / name

    def parts(self, table: str) -> list[Part]:
        """Every part of `table` in this workspace, by name."""
        directory = self.path / table
        if not directory.is_dir():
            return []
        found = (Part(child) for child in sorted(directory.iterdir()) if child.is_dir())
        return [part for part in found if part.exists]
