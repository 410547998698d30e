"""Where pixels and features are kept: in memory up to a limit, beyond it in an unnamed file.

Not here: texts and ids (`corpus.py`, `task_corpus.py`), and the pictures of pairs in training (`pairs.py`).

Design: pictures are decoded once, when they are added, because only decoding tells which are usable. Up to
`memory_limit` bytes they stay in memory as uint8 at the model's size. The rest goes to one temporary file, each as
the smaller of its encoded bytes and its pixels, and is read (and decoded) per batch by a few threads; Pillow decodes
outside the interpreter lock. Memory is therefore flat however large the corpus, and nothing is read twice into memory.
The file has no name once it is open, so a killed run leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from capfilt.data.images import MAX_PIXELS, BadImage
from capfilt.data.transforms import decode_uint8, training_uint8
from capfilt.errors import RunError

MEMORY_LIMIT = 2_000_000_000  # bytes of pixels (and of features) kept in memory: 13,000 pictures at 224 x 224
_CHUNK_BYTES = 16 * 1024 * 1024

Index = npt.NDArray[np.int64]


class Rows(Protocol):
    """Rows of one shape and dtype, wherever they are."""

    shape: tuple[int, ...]
    """Of one row."""

    def __len__(self) -> int: ...

    def read(self, rows: Index) -> npt.NDArray[Any]:
        """The rows with these numbers, [len(rows), *shape]; safe to call from several threads."""
        ...


def cpu_workers(most: int = 4) -> int:
    """How many decoding threads to start: the cores this process may use, at most `most`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(most, cores))


class ImageStore:
    """Pictures at one size, uint8 [3, size, size] each, in the order they were added.

    Args:
        size: side in pixels.
        memory_limit: bytes of pixels kept in memory; the rest is spilled.
        spill_dir: where the spill file is made; the system's temporary directory where None.
        workers: decoding threads; as many as there are cores, at most four, where None.
        max_pixels: largest picture that is decoded.
        training: whether training alone sees them: `training_uint8`, which is faster than `decode_uint8`.
    """

    def __init__(
        self,
        size: int,
        *,
        memory_limit: int = MEMORY_LIMIT,
        spill_dir: str | os.PathLike[str] | None = None,
        workers: int | None = None,
        max_pixels: int = MAX_PIXELS,
        training: bool = False,
    ) -> None:
        self.size = size
        self.shape: tuple[int, ...] = (3, size, size)
        self._item = 3 * size * size
        self._decode = partial(training_uint8 if training else decode_uint8, size=size, max_pixels=max_pixels)
        self._in_memory = memory_limit // self._item
        self._per_chunk = max(1, min(_CHUNK_BYTES // self._item, self._in_memory or 1))
        self._chunks: list[npt.NDArray[np.uint8]] = []
        self._count = 0
        self._spill_dir = spill_dir
        self._spill: IO[bytes] | None = None
        self._offsets: list[int] = []  # of spilled rows, in the spill file; one more than rows
        self._pool = ThreadPoolExecutor(workers or cpu_workers(), thread_name_prefix="capfilt-decode")

    def __len__(self) -> int:
        return self._count

    @property
    def spilled_bytes(self) -> int:
        """Size of the spill file."""
        return self._offsets[-1] if self._offsets else 0

    def add(self, encoded: Sequence[bytes]) -> list[int | BadImage]:
        """Decode and keep pictures: for each its row, or why it cannot be used. Raises RunError on a full disk."""
        results: list[int | BadImage] = []
        for data, pixels in zip(encoded, self._pool.map(self._try_decode, encoded), strict=True):
            if isinstance(pixels, BadImage):
                results.append(pixels)
            else:
                results.append(self._keep(pixels, data))
        return results

    def read(self, rows: Index) -> npt.NDArray[np.uint8]:
        """uint8 [len(rows), 3, size, size]."""
        out = np.empty((len(rows), *self.shape), dtype=np.uint8)
        spilled = []
        for place, row in enumerate(rows.tolist()):
            if not 0 <= row < self._count:
                raise IndexError(f"row {row} of {self._count} pictures")
            if row < self._in_memory:
                out[place] = self._chunks[row // self._per_chunk][row % self._per_chunk]
            else:
                spilled.append((place, row - self._in_memory))
        for _ in self._pool.map(lambda at: self._read_spilled(out, *at), spilled):
            pass
        return out

    def close(self) -> None:
        """Give back memory, threads and the spill file; the store is empty afterwards."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._chunks.clear()
        self._count = 0
        if self._spill is not None:
            self._spill.close()
            self._spill = None

    def _try_decode(self, data: bytes) -> npt.NDArray[np.uint8] | BadImage:
        try:
            return self._decode(data)
        except BadImage as error:
            return error

    def _keep(self, pixels: npt.NDArray[np.uint8], data: bytes) -> int:
        row = self._count
        if row < self._in_memory:
            place = row % self._per_chunk
            if place == 0:
                self._chunks.append(np.empty((self._per_chunk, *self.shape), dtype=np.uint8))
            self._chunks[-1][place] = pixels
        else:
            # A record as long as the pixels is the pixels: encoded bytes are kept only where they are shorter.
            self._append(data if len(data) < self._item else pixels.tobytes())
        self._count += 1
        return row

    def _append(self, record: bytes) -> None:
        with _full_disk(self._spill_dir):
            if self._spill is None:
                self._spill = tempfile.TemporaryFile(  # noqa: SIM115 - stays open as long as the store
                    prefix="capfilt-", dir=self._spill_dir, buffering=0
                )
                weakref.finalize(self, self._spill.close)
                self._offsets = [0]
            view, place = memoryview(record), self._offsets[-1]
            while view:
                written = os.pwrite(self._spill.fileno(), view, place)
                view, place = view[written:], place + written
        self._offsets.append(self._offsets[-1] + len(record))

    def _read_spilled(self, out: npt.NDArray[np.uint8], place: int, row: int) -> None:
        assert self._spill is not None
        start, length = self._offsets[row], self._offsets[row + 1] - self._offsets[row]
        record = os.pread(self._spill.fileno(), length, start)
        if len(record) != length:
            raise RunError(
                f"the spill file in {self._spill_dir or tempfile.gettempdir()} lost its end: run again"
            )
        if length == self._item:
            out[place] = np.frombuffer(record, dtype=np.uint8).reshape(self.shape)
        else:
            out[place] = self._decode(record)


class ArrayStore:
    """Rows of an array made once and filled in order: in memory, or beyond `memory_limit` in an unnamed file."""

    def __init__(
        self,
        count: int,
        shape: tuple[int, ...],
        dtype: type[np.generic],
        *,
        memory_limit: int = MEMORY_LIMIT,
        spill_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.shape = shape
        self._spilled = count * int(np.prod(shape)) * np.dtype(dtype).itemsize > memory_limit
        self.array: npt.NDArray[Any]
        if self._spilled and count:
            with _full_disk(spill_dir), tempfile.TemporaryFile(prefix="capfilt-", dir=spill_dir) as file:
                total = count * int(np.prod(shape)) * np.dtype(dtype).itemsize
                # Claims the blocks now: a page that finds no room on the disk later is a SIGBUS, not an exception.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, total)
                self.array = np.memmap(file, dtype=dtype, mode="r+", shape=(count, *shape))
        else:
            self.array = np.zeros((count, *shape), dtype=dtype)

    def __len__(self) -> int:
        return len(self.array)

    def read(self, rows: Index) -> npt.NDArray[Any]:
        """[len(rows), *shape], a copy."""
        return np.asarray(self.array[rows])


class _full_disk:  # noqa: N801 - reads as a statement: `with _full_disk(directory):`
    """Turns a full or unwritable disk into one line that says which directory to change."""

    def __init__(self, directory: str | os.PathLike[str] | None) -> None:
        self._directory = directory

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            where = self._directory or tempfile.gettempdir()
            what = (
                "is full"
                if error.errno in (errno.ENOSPC, errno.EDQUOT)
                else f"cannot be written ({error.strerror})"
            )
            raise RunError(f"{where} {what} while spilling pictures: set TMPDIR to a larger disk") from error
