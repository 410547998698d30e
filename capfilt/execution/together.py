"""Runs a stage in several processes of this machine that train together, started by torch.multiprocessing.

Not here: ranks on a Ray cluster (`ray_train.py`), what the ranks do (`capfilt.training.distributed`).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import distributed as dist
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessException, start_processes

from capfilt.errors import RunError, UserError
from capfilt.stages.base import ModelStage, Report
from capfilt.training.interrupt import PATIENCE, Interrupt

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HOST = "127.0.0.1"


def run_here(stage: ModelStage, ranks: int, report: Report) -> Mapping[str, Any]:
    """`stage.run` in `ranks` processes; what the first of them returns.

    SIGINT and SIGTERM go to all ranks, which are waited for as long as `PATIENCE` while they save; a second one ends them.

    Raises what a rank raised, where it is an error of ours; RunError where one of them was lost, KeyboardInterrupt where
    they were stopped.
    """
    # Not torchrun's launcher: it kills ranks that take longer than 30 seconds to save.
    store = meeting_point(_HOST)
    posts = multiprocessing.get_context("spawn").SimpleQueue()
    failures: list[tuple[type[Exception], str]] = []
    results: list[Mapping[str, Any]] = []
    steps: list[Any] = []
    reader = threading.Thread(target=_read, args=(posts, steps, failures, results), daemon=True)
    reader.start()
    interrupt = Interrupt()
    asked = 0.0
    with interrupt.listening(True):
        with _held(), _threads(ranks):
            running = start_processes(  # type: ignore[no-untyped-call]
                _rank, (stage, ranks, store.port, posts), ranks, join=False, start_method="spawn"
            )
        try:
            while not running.join(timeout=0.2):
                _show(steps, report)
                if interrupt.number is None:
                    continue
                if not asked:
                    asked = time.monotonic()
                    for process in running.processes:
                        if process.is_alive():
                            os.kill(process.pid, interrupt.number)
                elif time.monotonic() - asked > PATIENCE:
                    break
        except ProcessException as error:
            _finish(posts, reader)
            if failures:
                kind, message = failures[0]
                raise kind(message) from None
            if interrupt.number is None:
                said = error.msg.strip().splitlines()[-1]
                raise RunError(
                    f"{stage.name}: rank {error.error_index} of {ranks} was lost ({said}); run again to go on from the "
                    "last state"
                ) from error
        finally:
            for process in running.processes:
                process.kill()
                process.join()
    _finish(posts, reader)
    _show(steps, report)
    if not results:
        raise KeyboardInterrupt
    return results[0]


def meeting_point(host: str) -> dist.TCPStore:  # type: ignore[name-defined]
    """The store by which ranks find each other, listening at `host` only, on a port of its own choice."""
    # Its socket is made here: the store's own listens on every address of the machine.
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listener.getsockname()[1]
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def keep_to_loopback() -> None:
    """Has this process speak to other ranks over the loopback, unless whoever started it said otherwise."""
    for backend in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{backend}_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")


@contextmanager
def _held() -> Iterator[None]:
    """Inside, signals wait, and so they do in processes that are started, until `_rank` has handlers for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _threads(ranks: int) -> Iterator[None]:
    """Inside, processes are started with their share of the processors, unless whoever started this said otherwise."""
    name = "OMP_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(max(1, _cpus() // ranks))
    try:
        yield
    finally:
        del os.environ[name]


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _show(steps: list[Any], report: Report) -> None:
    if steps:
        report(*steps.pop())


def _read(
    posts: Any,
    steps: list[Any],
    failures: list[tuple[type[Exception], str]],
    results: list[Mapping[str, Any]],
) -> None:
    """Takes what ranks say, which would wait for ever with no one to take it: of steps the last, to be shown by whoever waits
    for the ranks, and can end them where that fails.
    """
    while (post := posts.get()) is not None:
        kind, *values = post
        if kind == "step":
            steps[:] = [values]
        elif kind == "result":
            results.append(values[0])
        else:
            failures.append((values[0], values[1]))


def _finish(posts: Any, reader: threading.Thread) -> None:
    posts.put(None)
    reader.join()


def _rank(rank: int, stage: ModelStage, ranks: int, port: int, posts: Any) -> None:
    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # Either ends a rank as Ctrl-C does, quietly: a rank that died of a signal would count as lost.
    for number in _SIGNALS:
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    # As torchrun says it; the store is that of the process that started this one.
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": _HOST, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    keep_to_loopback()
    try:
        result = stage.run(lambda step, total, figures: posts.put(("step", step, total, dict(figures))))
    except (UserError, RunError) as error:
        posts.put(("failure", type(error), str(error)))
        raise
    if rank == 0:
        posts.put(("result", dict(result)))
