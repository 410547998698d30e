"""Publishing one file so that it is either wholly there or not there, and never replaces another.

Local and shared POSIX file systems only. A killed process can leave a file whose name starts with `.`; nothing reads it.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from capfilt.errors import RunError


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_attempt(path: Path, write: Callable[[Path], None]) -> Path:
    attempt = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        write(attempt)
        descriptor = os.open(attempt, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException as error:
        attempt.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"{path}: no space left on the disk; what was committed is valid, free space and run again"
            ) from error
        raise
    return attempt


def publish_new(path: Path, write: Callable[[Path], None]) -> bool:
    """Write a file under an attempt's own name, then give it the name `path` unless that name is taken.

    `write` is called with the path to write to. Returns False, leaving the existing file as it is, when another
    attempt was first. Raises RunError when the disk is full or the file system cannot publish without overwriting.
    """
    attempt = _write_attempt(path, write)
    try:
        # link(2) fails when the name exists; rename(2) would replace it silently.
        os.link(attempt, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise RunError(
            f"{path}: this file system has no hard links ({error.strerror}), so a shard cannot be published without "
            "the risk of overwriting another; put the workspace on a POSIX file system"
        ) from error
    finally:
        attempt.unlink(missing_ok=True)
    sync_directory(path.parent)
    return True


def replace(path: Path, data: bytes) -> None:
    """Write `data` to `path`, replacing what is there in one step. Only for files that can be derived again."""
    attempt = _write_attempt(path, lambda temporary: _write_bytes(temporary, data))
    os.replace(attempt, path)
    sync_directory(path.parent)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def publish_new_bytes(path: Path, data: bytes) -> bool:
    """`publish_new` for bytes in hand."""
    return publish_new(path, lambda temporary: _write_bytes(temporary, data))
