"""A workspace: one directory with everything of a run, and how names become paths in it."""

from __future__ import annotations

import os
from pathlib import Path

from capfilt.errors import MissingInput, UserError
from capfilt.tables.contracts import CONTRACTS
from capfilt.tables.shards import Part
from capfilt.tables.visible import visible

LONGEST_NAME = 200
"""Bytes of a name, at most: file systems take 255, of which temporary files need some for themselves."""


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

    def dataset(self, table: str, name: str, output: Part | None = None) -> Part:
        """The part that the dataset `name` is written to: the table's of that name, or `output` where it is given.

        Raises UserError where `name`, which every row has, cannot be a name; a path is none.
        """
        check_name(name, "--dataset")
        return output or self.part(table, name)

    def model(self, name: str) -> Path:
        """The directory of the checkpoint called `name`; with a separator it is a path instead."""
        return self._place("models", name)

    def result(self, name: str) -> Path:
        """The file of the result called `name`, `runs/<name>.json`; with a separator it is a path instead."""
        path = self._place("runs", name)
        return path if os.sep in name and path.suffix == ".json" else path.with_name(f"{path.name}.json")

    def _place(self, kind: str, name: str) -> Path:
        return as_path(name) if os.sep in name else self.path / kind / check_name(name, kind)

    def parts(self, table: str) -> list[Part]:
        """Every part of `table` in this workspace, by name. Raises UserError where an earlier capfilt wrote one."""
        return [part for part in map(Part, self.folders(table)) if part.exists]

    def folders(self, table: str) -> list[Path]:
        """The folders in which parts of `table` lie, by name, also those that are no parts."""
        directory = self.path / table
        found = directory.iterdir() if directory.is_dir() else ()
        return sorted(child for child in found if child.is_dir() and not child.name.startswith("."))


def check_name(name: str, what: str) -> str:
    """`name`, which becomes a folder's or a file's; `what` says of what. Raises UserError where it is no name."""
    if not name:
        fault = "it is empty"
    elif os.sep in name:
        fault = f"it has a {os.sep}"
    elif not name.isprintable():
        fault = "it has characters that nobody sees"
    elif name[0] in ".-_~ ":
        fault = f"it begins with {name[0]!r}"
    elif name[-1] == " ":
        fault = "it ends with a space"
    elif len(name.encode()) > LONGEST_NAME:
        fault = f"it is longer than {LONGEST_NAME} bytes"
    else:
        return name
    raise UserError(
        f"{what} {_short(name)} is no name: {fault}; give a name such as web, or, where a path will do, ./web"
    )


def expanded(text: str) -> Path:
    """The path with a leading `~` or `~user` replaced by that home. Raises UserError where there is no such user."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{text}: begins with ~ and names no user of this machine; write the path out"
        ) from error


def as_path(text: str) -> Path:
    """The path that somebody wrote. Raises UserError for a path that no file system has, or that nobody can read."""
    if visible(text) != text:
        raise UserError(f"{_short(text)} is no path, because it has characters that nobody sees; rename it")
    if "://" in text:
        raise UserError(
            f"{_short(text)} is an address, where a path is needed; mount the store, or copy from it"
        )
    path = expanded(text)
    if any(len(part.encode()) > LONGEST_NAME for part in path.parts):
        raise UserError(
            f"{_short(text)} is no path, because a name in it is longer than {LONGEST_NAME} bytes"
        )
    return path


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
