"""Catches a file that the system refuses to write, sync or name, told without saying which file, or left half-written."""

from __future__ import annotations

import errno
import os
import resource
import stat
from pathlib import Path

import pytest

from capfilt.errors import RunError
from capfilt.tables.publish import publish_new_bytes, replace

WRITERS = [publish_new_bytes, replace]


def refused(write, path):
    with pytest.raises((RunError, OSError)) as caught:
        write(path, b"x" * 10_000)
    told = str(caught.value)
    assert path.name in told
    assert "\n" not in told
    assert not [name for name in os.listdir(path.parent) if name.startswith(".")]


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_that_may_not_grow_is_named(tmp_path, write):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        refused(write, tmp_path / "shard")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "shard").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("of", [stat.S_ISREG, stat.S_ISDIR], ids=["file", "directory"])
@pytest.mark.parametrize("write", WRITERS)
def test_a_sync_that_fails_names_the_file(tmp_path, monkeypatch, write, of, number):
    """No file system here can be made to fail so: the call itself is."""
    real = os.fsync

    def fsync(descriptor):
        if of(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    refused(write, tmp_path / "shard")


@pytest.mark.parametrize("write", WRITERS)
def test_a_name_may_be_as_long_as_the_system_takes(tmp_path, write):
    """Catches an attempt's own name that is too long where the file's is not."""
    path = tmp_path / ("x" * 255)
    write(path, b"x")
    assert path.read_bytes() == b"x"


def test_what_is_no_plain_file_is_written_to_and_not_replaced(tmp_path):
    """Catches `--out /dev/stdout`, which would become a plain file for all of the machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    replace(pipe, b"text")
    assert os.read(reader, 10) == b"text"
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    link = tmp_path / "link"
    link.symlink_to("target")
    replace(link, b"text")
    assert link.is_symlink()
    assert Path(tmp_path / "target").read_bytes() == b"text"
