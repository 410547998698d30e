"""Publishing one file so that it is either wholly there or not there, and never replaces another by accident.

Local and shared POSIX file systems only. A killed process can leave a file whose name starts with `.`; nothing reads it.
Errors of the system are RunErrors here: one line that names the file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from capfilt.errors import RunError

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Turn an error of the operating system in the body into a RunError about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = "no space left on the disk"
        elif error.errno == errno.EXDEV:
            why = "its folder and the workspace's .capfilt are on different file systems"
        elif error.errno in _NO_LINKS:
            why = f"this file system has no hard links ({error.strerror}), which the workspace needs"
        else:
            why = f"cannot be written ({error.strerror or error})"
        raise RunError(f"{path}: {why}; mend that and run again, committed shards are valid") from error


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _attempt_name(path: Path) -> str:
    # As much of the name as leaves room: the file's own may be as long as the system takes.
    return f".{path.name[:48]}.{uuid.uuid4().hex[:12]}.tmp"


def attempt_at(path: Path, write: Callable[[Path], object]) -> Path:
    """Write a file beside `path` under a name of its own, and sync its bytes. Returns where it is.

    `write` is called with the path to write to. An attempt that fails leaves no file.
    """
    attempt = path.with_name(_attempt_name(path))
    try:
        with one_line(path):
            write(attempt)
            _sync(attempt)
    except BaseException:
        attempt.unlink(missing_ok=True)
        raise
    return attempt


def link_new(attempt: Path, path: Path) -> bool:
    """Give a written file the further name `path`, durably. Returns False where that name is taken.

    link(2) fails when the name exists; rename(2) would replace it silently.
    """
    with one_line(path):
        try:
            os.link(attempt, path)
        except (FileExistsError, FileNotFoundError):
            # The attempt is gone where another process published it for us.
            if path.exists():
                return False
            raise
        sync_directory(path.parent)
    return True


def publish_new(path: Path, write: Callable[[Path], object]) -> bool:
    """Write the file `path` unless that name is taken. Returns whether it was free; an existing file stays as it is."""
    attempt = attempt_at(path, write)
    try:
        return link_new(attempt, path)
    finally:
        attempt.unlink(missing_ok=True)


def publish_new_bytes(path: Path, data: bytes) -> bool:
    """`publish_new` for bytes in hand."""
    return publish_new(path, lambda place: place.write_bytes(data))


def replace(path: Path, data: bytes) -> None:
    """Write `data` to `path`, replacing the file there in one step. Only for files that can be derived again.

    A link stays, and its target is replaced; a device or a pipe is written to.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        with one_line(path):
            path.write_bytes(data)
        return
    attempt = attempt_at(path, lambda place: place.write_bytes(data))
    try:
        with one_line(path):
            os.replace(attempt, path)
            sync_directory(path.parent)
    finally:
        attempt.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a lock that one process has at a time, by a file in `folder`; a file system without locks has none."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def point(path: Path, target: Path, scratch: Path) -> None:
    """Make `path` a name of the file `target`, in one step, in place of the file that had it.

    The new name is made in the folder `scratch` first, so that `path`'s own folder never holds another file.
    """
    attempt = scratch / _attempt_name(path)
    with one_line(path):
        os.link(target, attempt)
        try:
            os.replace(attempt, path)
        finally:
            # rename(2) does nothing where both names are one file already.
            attempt.unlink(missing_ok=True)
        sync_directory(path.parent)
