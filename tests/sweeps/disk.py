"""Every operation of this process on the files below one folder: recorded, and ended by SIGKILL at the one that is asked for.

CPython announces opening, linking, renaming, removing and making folders to audit hooks. Writes and fsync are seen through
files and a function put in place of its own; Arrow and safetensors write through such files too. A folder changes by nothing
else, so that a kill before each operation, and one in the middle of each write, is a kill everywhere.
"""

from __future__ import annotations

import builtins
import io
import os
import re
import signal
import sys
from pathlib import Path

import pyarrow.parquet as pq

_CHANGES = {"os.link": 1, "os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.truncate": 0}
"""Events by the argument that is the path which changes."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Disk:
    """What happens below one folder, from `watch` on.

    Attributes:
        kill_at: the operation to die before; 0: none.
        torn: die in the middle of it, which must be a write.
    """

    def __init__(self, folder: Path, log: Path, kill_at: int = 0, torn: bool = False) -> None:
        self.folder = os.path.realpath(folder)
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.kill_at, self.torn, self.count = kill_at, torn, 0

    def watch(self) -> None:
        """Begin. There is no end: this process is for one run."""
        real_open, real_fsync = io.open, os.fsync

        def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **named):
            binary = "b" in mode
            if not self.below(file) or not set(mode) & set("wax+") or (binary and not buffering):
                return real_open(file, mode, buffering, encoding, errors, newline, **named)
            raw = _Written(self, file, mode.replace("b", "").replace("t", ""))
            buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffer if binary else io.TextIOWrapper(buffer, encoding, errors, newline)

        def synced(descriptor):
            self.point("fsync", Path(f"/proc/self/fd/{descriptor}").readlink())
            real_fsync(descriptor)

        io.open = builtins.open = opened
        os.fsync = synced
        _through_python(opened)
        sys.addaudithook(self.hear)

    def below(self, path) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return _whole(path).startswith(self.folder + os.sep)

    def hear(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & _WRITING and self.below(path):
                self.point("open", path)
        elif event in _CHANGES:
            path = arguments[_CHANGES[event]]
            if self.below(path):
                self.point(event.removeprefix("os."), path)

    def point(self, kind: str, path) -> bool:
        """One operation, which has not happened yet. Returns whether to die in the middle of it."""
        path = _whole(path)
        if not path.startswith(self.folder):
            return False
        self.count += 1
        os.write(self.log, f"{kind} {os.path.relpath(path, self.folder)}\n".encode())
        if self.count != self.kill_at:
            return False
        if not self.torn:
            die()
        return True


def _whole(path) -> str:
    # Path.resolve would look at the disk for every file that is opened anywhere.
    return os.path.abspath(os.fsdecode(path))  # noqa: PTH100


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _Written(io.FileIO):
    def __init__(self, disk: Disk, file, mode: str) -> None:
        super().__init__(file, mode)
        self.disk = disk

    def write(self, data) -> int:
        if self.disk.point("write", self.name):
            super().write(memoryview(data).cast("B")[: len(data) // 2])
            die()
        return super().write(data)


def _through_python(opened) -> None:
    """Have libraries that write files themselves write them with `opened`."""

    class Writer(pq.ParquetWriter):
        def __init__(self, where, *arguments, **named):
            self.sink = opened(where, "wb")
            super().__init__(self.sink, *arguments, **named)

        def close(self):
            super().close()
            self.sink.close()

    pq.ParquetWriter = Writer

    tensors_of = sys.modules.get("safetensors.torch")
    if tensors_of is None:
        return  # a stage that writes none, or the sweep would have imported it by now

    def save_file(tensors, filename, metadata=None):
        with opened(filename, "wb") as file:
            file.write(tensors_of.save(tensors, metadata))

    theirs = tensors_of.save_file
    for module in [*sys.modules.values()]:
        if getattr(module, "save_file", None) is theirs:
            module.save_file = save_file


def durable_steps(patch, folder: Path) -> list[str]:
    """The steps that make bytes and names below `folder` durable, as they are taken from now on, attempts without their ids.

    `patch` is pytest's monkeypatch.
    """
    steps: list[str] = []
    fsync, link, replace = os.fsync, os.link, os.replace

    def named(path) -> str:
        name = os.path.relpath(path, folder)
        return re.sub(
            r"(\.[0-9a-f]{12})?\.(tmp|part)$", " attempt", re.sub(r"\.partial-\w+/", "partial/", name)
        )

    def synced(descriptor):
        steps.append(f"sync {named(Path(f'/proc/self/fd/{descriptor}').readlink())}")
        fsync(descriptor)

    def linked(source, path):
        steps.append(f"name {named(path)}")
        link(source, path)

    def replaced(source, path):
        steps.append(f"name {named(path)}")
        replace(source, path)

    for name, function in (("fsync", synced), ("link", linked), ("replace", replaced)):
        patch.setattr(os, name, function)
    return steps
