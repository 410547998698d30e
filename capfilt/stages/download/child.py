"""The child process of `download`: reads slices of URLs on standard input, writes rows on what was standard output.

It lives as long as its parent: at the end of standard input it is gone at once, in the middle of whatever it does.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import signal
import sys
import threading
from typing import Any

from capfilt.stages.download import wire
from capfilt.stages.download.engine import Engine
from capfilt.stages.download.settings import Settings


def main() -> None:
    """Serve slices until the parent is gone."""
    # img2dataset's resizer points descriptors 1 and 2 at /dev/null and back around every picture, and libraries print:
    # the frames go out, and a crash's traceback goes to the log, through descriptors of their own.
    out, log = os.dup(1), os.dup(2)
    os.dup2(2, 1)
    faulthandler.enable(os.fdopen(log, "w"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    said: list[bytes] = []

    def say(message: dict[str, Any], payload: bytes = b"") -> None:
        said.extend(wire.pack(message, payload))

    def flush() -> None:
        frames = memoryview(b"".join(said))
        said.clear()
        while frames:
            frames = frames[os.write(out, frames) :]

    slices: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(slices,), daemon=True).start()
    try:
        engine = Engine()
    except ImportError as error:
        say({"missing": str(error)})
        flush()
        return
    try:
        say({"ready": engine.version})
        while True:
            flush()
            work = slices.get()
            hashes = {int(row): value for row, value in work["hashes"].items()}
            settings = Settings.of(work["settings"])
            for message, payload in engine.run(work["rows"], settings, idle=flush, hashes=hashes):
                say(message, payload)
                # An answer goes out with the word that the next picture is begun: half the writes, half the wake-ups.
                if "begin" in message:
                    flush()
            say({"done": len(work["rows"])})
    except BrokenPipeError:
        os._exit(0)


def _listen(slices: queue.SimpleQueue[dict[str, Any]]) -> None:
    def read(size: int) -> bytes:
        data = sys.stdin.buffer.read(size)
        if len(data) < size:
            # Threads may sit in fetches for half a minute more; nobody is left to hear of them.
            os._exit(0)
        return data

    while True:
        slices.put(wire.unpack(read)[0])


def command(path: list[str]) -> list[str]:
    """The command line of a child that imports from the same places as this process."""
    start = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    # -P: a json.py in the working directory is not the standard library's.
    return [sys.executable, "-P", "-c", f"{start}from {__name__} import main; main()", json.dumps(path)]
