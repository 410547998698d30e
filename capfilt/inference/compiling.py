"""The vision tower through torch.compile, whose work is kept on disk, so that only the first start waits for it."""

from __future__ import annotations

import fcntl
import functools
import itertools
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from capfilt.models.blip.model import Blip

CACHE = "TORCHINDUCTOR_CACHE_DIR"

_locks: list[IO[bytes]] = []
"""Open, and so locked, until the process ends, however it may end."""


def compiled_tower(model: Blip) -> Callable[[Tensor], Tensor]:
    """`model.encode_image`, compiled when it is first called; the model itself is left as it is.

    PyTorch keeps what it compiled in one directory for all processes. Unless the environment names a directory, each process
    has its own here: the first of ~/.cache/capfilt/torchinductor/HOST-0, HOST-1, ... that no running process has. Processes
    that start together compile each for themselves the first time, and find their work the next time.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capfilt" / "torchinductor"
    named = os.environ.get(CACHE)
    # A directory under ours was given to a parent process, and is the parent's.
    if not named or Path(named).parent == cache:
        os.environ[CACHE] = str(own_directory(cache, os.getpid()))
    compiled: Callable[[Tensor], Tensor] = torch.compile(model.visual_encoder)
    return compiled


@functools.cache
def own_directory(cache: Path, process: int) -> Path:
    """The directory under `cache` that this process has alone; a temporary one where files cannot be locked or written."""
    try:
        for number in itertools.count():
            # By host too: a home may be on a network, and what was compiled for one processor need not run on another.
            directory = cache / f"{platform.node()}-{number}"
            directory.mkdir(parents=True, exist_ok=True)
            lock = (directory / "lock").open("wb")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.close()
                if isinstance(error, BlockingIOError):
                    continue
                raise
            _locks.append(lock)
            return directory
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix=f"capfilt-torchinductor-{process}-"))
