"""The child process of `download` from the outside: started, spoken to, replaced when it dies or falls silent."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from capfilt.errors import RunError, UserError
from capfilt.stages.download import wire
from capfilt.stages.download.child import command
from capfilt.stages.download.settings import Settings

START_SECONDS = 300.0
"""How long a child may take to import img2dataset; seconds on an idle machine."""

PIPE_BYTES = 1 << 20
"""What Linux lets any user ask for."""

DECODE_SECONDS = 20.0
"""How long one picture may take from its body to its row: ten times what the largest that is let through takes."""

MAX_DEATHS = 10
"""After so many children that died over pictures, a slice gives no picture a second one."""

MAX_BARREN = 20
"""After so many children in a row that died without a word and over no picture, a slice is given up. Halving finds one URL
of a million sooner."""

MISSING = "download needs img2dataset (Python below 3.13): pip install 'capfilt[img2dataset]'"


@dataclass(frozen=True)
class Row:
    """What came of one URL: the columns of the images table that downloading decides, and the encoded picture."""

    columns: dict[str, Any]
    picture: bytes


def failed(failure: str, words: str) -> Row:
    """The answer for a URL that was never asked for, or that nobody lived to answer."""
    return Row({"status": "failed_to_download", "failure": failure, "error_message": words}, b"")


class _Died(Exception):
    """The child ended or fell silent; `begun` is the row it was decoding, if any."""

    def __init__(self, begun: int | None, words: str) -> None:
        super().__init__(words)
        self.begun = begun
        self.row = failed("worker_died", f"the process that fetched it died: {words}")


class Worker:
    """One child process, started when first needed. Not for several threads at once: `run` takes turns."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._ready = False
        self._heard = bytearray()
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Of the child that runs now."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start the child, without waiting for its imports."""
        if self.pid is not None:
            return
        self.close()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        environment = {
            **os.environ,
            "NO_ALBUMENTATIONS_UPDATE": "1",
            "WANDB_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            # Dozens of threads that each allocate bodies would each keep an arena of glibc's for ever.
            "MALLOC_ARENA_MAX": "2",
            # Without these, glibc gives a picture's pixels back to the kernel and has them zeroed again for the next.
            "MALLOC_MMAP_THRESHOLD_": str(16 << 20),
            "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
        }
        self._process = subprocess.Popen(
            command(sys.path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            # Ctrl-C is for the parent; the child goes when the parent is gone.
            start_new_session=True,
            # Several pictures: with the usual 64 KiB the child stops in the middle of each until this process wakes.
            pipesize=PIPE_BYTES,
        )

    def close(self) -> None:
        """End the child."""
        process, self._process, self._ready = self._process, None, False
        self._heard.clear()
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        if self._log is not None:
            self._log.close()
            self._log = None

    def run(
        self,
        rows: Sequence[tuple[int, str | None]],
        settings: Settings,
        hashes: Mapping[int, str] | None = None,
    ) -> dict[int, Row]:
        """Fetch (row, URL) pairs: what came of each, by row; every row is there. `hashes` are the SHA-256 that bodies must
        have, by row; any other is `hash_mismatch`.

        A child that dies is replaced, and what it had not answered is asked again. A picture that costs two children
        failed with `worker_died`. Where no picture is to blame, fewer URLs are asked for at once, half as many each
        time; one that costs a child by itself failed the same way. Raises UserError where img2dataset is missing and
        RunError where no child can be started.
        """
        with self._lock:
            answers: dict[int, Row] = {}
            blame = Counter[int]()
            barren, size = 0, len(rows)
            while missing := [pair for pair in rows if pair[0] not in answers]:
                asked, before = missing[:size], len(answers)
                try:
                    # Not `answers |=`: what came before the child died counts.
                    for row, answer in self._ask(asked, settings, hashes or {}):
                        answers[row] = answer  # noqa: PERF403
                    barren, size = 0, 2 * size
                except _Died as death:
                    barren = 0 if death.begun is not None or len(answers) > before else barren + 1
                    if death.begun is not None:
                        blame[death.begun] += 1
                        if blame[death.begun] == 2 or blame.total() > MAX_DEATHS:
                            answers[death.begun] = death.row
                    else:
                        if len(asked) == 1:
                            answers[asked[0][0]] = death.row
                        size = max(1, len(asked) // 2)
                    if barren == MAX_BARREN:
                        answers |= {row: death.row for row, _ in missing if row not in answers}
            return answers

    def _ask(
        self, rows: Sequence[tuple[int, str | None]], settings: Settings, hashes: Mapping[int, str]
    ) -> Iterator[tuple[int, Row]]:
        begun: int | None = None
        finished = False
        try:
            self._await_ready()
            known = {row: hashes[row] for row, _ in rows if row in hashes}
            self._write(b"".join(wire.pack({"rows": rows, "settings": asdict(settings), "hashes": known})))
            listening, decoding = self._reader(settings.longest_silence), self._reader(DECODE_SECONDS)
            while True:
                message, picture = wire.unpack(listening if begun is None else decoding)
                if "done" in message:
                    finished = True
                    return
                if "begin" in message:
                    begun = message["begin"]
                    continue
                if "attempts" in message:
                    continue
                begun = None
                yield message.pop("row"), Row(message, picture)
        except (EOFError, OSError) as error:
            raise _Died(begun, self._last_words(error)) from None
        finally:
            # Also when the caller goes away in the middle: the next slice must not read this one's answers.
            if not finished:
                self.close()

    def _await_ready(self) -> None:
        words = ""
        for _ in range(2):
            self.start()
            if self._ready:
                return
            try:
                message, _ = wire.unpack(self._reader(START_SECONDS))
            except (EOFError, OSError) as error:
                words = self._last_words(error)
                self.close()
                continue
            if "missing" in message:
                raise UserError(f"{MISSING} ({message['missing']})")
            self._ready = True
            return
        raise RunError(f"download: its child process does not start ({words})")

    def _write(self, data: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def _reader(self, patience: float) -> Any:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)

        heard = self._heard

        def read(size: int) -> bytes:
            if len(heard) < size:
                until = time.monotonic() + patience
                while len(heard) < size:
                    if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                        raise TimeoutError(f"silent for {patience:.0f} s")
                    # All there is, not only what is asked for now: the small frames come along with a large one.
                    chunk = os.read(descriptor, PIPE_BYTES)
                    if not chunk:
                        raise EOFError
                    heard.extend(chunk)
            data = bytes(memoryview(heard)[:size])
            del heard[:size]
            return data

        return read

    def _last_words(self, error: Exception) -> str:
        words = str(error)
        if self._process is not None and not isinstance(error, TimeoutError):
            try:
                words = f"exit status {self._process.wait(timeout=5)}"
            except subprocess.TimeoutExpired:
                words = words or "its pipe broke"
        if self._log is not None:
            self._log.seek(0, os.SEEK_END)
            self._log.seek(max(0, self._log.tell() - 2000))
            lines = self._log.read().decode(errors="replace").strip().splitlines()
            if lines:
                words = f"{words}: {lines[-1].strip()[:200]}"
        return words


# By process id: a forked process must neither speak into its parent's pipes nor end its parent's child.
_workers: dict[int, Worker] = {}


def shared_worker() -> Worker:
    """This process's worker: whatever stages run here share one child and pay for its imports once."""
    return _workers.setdefault(os.getpid(), Worker())


@atexit.register
def close_shared_worker() -> None:
    """End this process's child, if it has one; the next slice starts another."""
    worker = _workers.get(os.getpid())
    if worker is not None:
        worker.close()
