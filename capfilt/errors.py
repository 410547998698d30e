"""The two ways capfilt stops: the user's input is wrong, or the run failed. Faults of single rows are not errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath


class UserError(Exception):
    """An option, part, column, checkpoint or recipe key is missing or wrong. One line; the CLI exits with 2."""


class MissingInput(UserError):
    """What a stage reads is not there, or not wholly: it may be that the step which writes it has not run yet."""


class RunError(Exception):
    """The run itself failed (a full disk, a dead worker after its retries). One line; the CLI exits with 1."""


@contextmanager
def naming(path: str | PathLike[str]) -> Iterator[None]:
    """An OSError inside names `path` where it names no file: those of reading and writing an open one do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = fspath(path)
        raise
