"""A workspace: one directory with everything of a run, and how names become paths in it."""

from __future__ import annotations

import os
from pathlib import Path

from capfilt.errors import MissingInput, UserError
from capfilt.tables.contracts import CONTRACTS
from capfilt.tables.shards import Part


class Workspace:
    """One directory holding `images/ captions/ scores/ signals/ verdicts/ pairs/ examples/ models/ runs/`."""

    def __init__(self, path: str | os.PathLike[str], *, allow_incomplete: bool = False) -> None:
        if "://" in str(path):
            raise UserError(
                f"{path}: a workspace lives on a local or shared file system; mount the object store there"
            )
        self.path = Path(path)
        self.allow_incomplete = allow_incomplete
        self.gaps: dict[str, str] = {}

    def noting(self) -> Workspace:
        """The same workspace; its `gaps` will hold the incomplete parts that `input` gives from now on, by path."""
        return Workspace(self.path, allow_incomplete=self.allow_incomplete)

    def part(self, table: str, name: str) -> Part:
        """The part of `table` called `name`; with a separator (`./name`, `/data/name`) it is a path instead."""
        if table not in CONTRACTS:
            raise UserError(f"table {table!r} does not exist; the tables are {', '.join(CONTRACTS)}")
        return Part(self._place(table, name))

    def input(self, table: str, name: str) -> Part:
        """The part of `table` called `name`, to be read by a stage.

        Raises MissingInput where it is not there, or is not whole and the workspace does not allow that, and UserError where
        it is of another table.
        """
        part = self.part(table, name).expect(table)
        gap = part.gap
        if gap and not self.allow_incomplete:
            raise MissingInput(
                f"{part.path}: {gap}; run the stage that writes it to the end, or give --allow-incomplete"
            )
        if gap:
            self.gaps[str(part.path)] = gap
        return part

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
        """Every part of `table` in this workspace, by name. Raises UserError where an earlier capfilt wrote one."""
        return [part for part in map(Part, self.folders(table)) if part.exists]

    def folders(self, table: str) -> list[Path]:
        """The folders in which parts of `table` lie, by name, also those that are no parts."""
        directory = self.path / table
        return sorted(child for child in directory.iterdir() if child.is_dir()) if directory.is_dir() else []
