"""A child process that asks DuckDB about tables in memory: no files, no settings, and bounds of time and memory.

A thread would not do: DuckDB heeds an interrupt between blocks of rows alone, and one block may take for ever, or all memory.
What is asked, and whether it is a condition on one row, is `require.py`'s.
"""

from __future__ import annotations

import atexit
import json
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from threading import Lock

import duckdb
import pyarrow as pa

from capfilt.formats.columns import connected, lock, quoted, refusal

MEMORY = 4 * 2**30
"""Bytes of data that the child may have: `repeat(text, 300000000)` is an error there, and nothing is lost here."""

_SETTINGS = {
    # An answer never depends on how rows are shared out among threads.
    "threads": "1",
    "memory_limit": f"{MEMORY // 2}B",
    "temp_directory": "",
}


class NoAnswer(Exception):
    """Why there is no answer, in one line."""


class Sandbox:
    """The child of this process, started by its first question."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._one_by_one = Lock()
        atexit.register(self.end)

    def ask(self, sql: str, tables: Mapping[str, pa.Table], seconds: float) -> pa.Table:
        """The rows of `SELECT {sql}` over `tables`, which have as many rows each and stand beside each other, row by row.

        Raises NoAnswer where DuckDB refuses, and where an answer takes longer than `seconds`, or more than MEMORY.
        """
        with self._one_by_one:
            # The end of a Ray session takes all children along.
            if self._child is not None and self._child.poll() is not None:
                self.end()
            child = self._child = self._child or _started()
            assert child.stdin is not None
            assert child.stdout is not None
            answer = None
            try:
                pickle.dump((sql, dict(tables), seconds), child.stdin)
                child.stdin.flush()
                answer = pickle.load(child.stdout)  # noqa: S301 - of capfilt's own child
            except (EOFError, BrokenPipeError):
                late = child.wait() == -signal.SIGALRM
                why = (
                    f"no answer within {seconds:g} s"
                    if late
                    else f"it needs more than {MEMORY:,} bytes of memory"
                )
                raise NoAnswer(f"{why}; make it simpler") from None
            finally:
                if answer is None:
                    self.end()
        if isinstance(answer, str):
            raise NoAnswer(answer)
        return answer

    def end(self) -> None:
        """End the child, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in filter(None, (child.stdin, child.stdout)):
                with suppress(BrokenPipeError):  # what the child never read
                    pipe.close()


SANDBOX = Sandbox()


def _started() -> subprocess.Popen[bytes]:
    start = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    start += "from capfilt.stages.sandbox import serve; serve()"
    command = [sys.executable, "-c", start, json.dumps(sys.path)]
    # Ctrl-C is for this process; the child goes when its input ends.
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)


def serve() -> None:
    """What the child does until its input ends."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            sql, tables, seconds = pickle.load(sys.stdin.buffer)  # noqa: S301 - of the parent
        except EOFError:
            return
        # Its default action ends the process, whatever the process is at.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        answer = _answer(sql, tables)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


def _answer(sql: str, tables: Mapping[str, pa.Table]) -> pa.Table | str:
    try:
        with connected(**_SETTINGS) as connection:
            for number, table in enumerate(tables.values()):
                connection.register(f"given{number}", table)
            lock(connection)
            joined = " POSITIONAL JOIN ".join(f"given{n} AS {quoted(name)}" for n, name in enumerate(tables))
            return connection.sql(f"SELECT {sql} FROM {joined}").to_arrow_table()  # noqa: S608
    except (duckdb.Error, pa.ArrowException, MemoryError) as error:
        return refusal(str(error)) or type(error).__name__
