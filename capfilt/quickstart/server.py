"""The generated web on a loopback port: pictures drawn when asked for, with the troubles their pages have.

Pages are made by web.py; here is only HTTP. `serve` answers from a process of its own, so that drawing does not compete with
the run for one interpreter. The port is part of every URL, and so of what a resumed run recognises.
"""

from __future__ import annotations

import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from capfilt.errors import RunError
from capfilt.quickstart.web import WebPage, build_web, troubled_bytes

HOST = "127.0.0.1"
# Below the ports that Linux (from 32768) and others (from 49152) lend to outgoing connections: a port in that
# range may be in use by anybody when a stopped run comes back for it.
PORTS = range(20_000, 32_768)
_LIVE = "/live"
_TAKEN_PATIENCE_S = 5.0
_START_LIMIT_S = 120.0


@contextmanager
def serve(seed: int, images: int, port: int | None = None) -> Iterator[str]:
    """Serve the web of (seed, images) inside the `with`. Yields its address, for example http://127.0.0.1:20000.

    Without `port` a free one is taken. The serving process ends with the `with`, and by itself when this process dies in
    whatever way. Raises RunError, naming the port, where it is taken, and where the process does not answer.
    """
    with _listen(port) as listener:
        port = int(listener.getsockname()[1])
        arguments = [listener.fileno(), seed, images, os.getpid()]
        process = subprocess.Popen(
            [sys.executable, "-m", "capfilt.quickstart.server", *map(str, arguments)],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            pass_fds=arguments[:1],
            start_new_session=True,  # Ctrl-C is for the run, whose downloads may still be reading
        )
    try:
        # http.client: whatever proxy the environment names, the loopback is not behind it.
        connection = http.client.HTTPConnection(HOST, port, timeout=_START_LIMIT_S)
        try:
            connection.request("GET", "/")
            connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise RunError(
                f"the generated web does not answer on port {port} of {HOST} ({error}); run again"
            ) from error
        finally:
            connection.close()
        yield f"http://{HOST}:{port}"
    finally:
        process.kill()
        process.wait()


def _listen(port: int | None) -> socket.socket:
    if port is None:
        # Not seeded: two runs with one seed on one machine must not want one port.
        for candidate in random.SystemRandom().sample(PORTS, 50):
            with suppress(OSError):
                return _bound(candidate)
        raise RunError(f"none of 50 ports tried between {PORTS[0]} and {PORTS[-1]} on {HOST} is free")
    deadline = time.monotonic() + _TAKEN_PATIENCE_S
    while True:
        # The server of a run that was just killed takes a moment to notice and let go.
        try:
            return _bound(port)
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"port {port} on {HOST} is taken ({error.strerror}), and the URLs of this quickstart name it; "
                    "stop the process that holds it and run again"
                ) from error
            time.sleep(0.25)


def _bound(port: int) -> socket.socket:
    # A downloader opens dozens of connections at once; socketserver's backlog of 5 would make them wait a second for a retry.
    return socket.create_server((HOST, port), backlog=512)


class WebServer(ThreadingHTTPServer):
    """Answers for the pages on a socket that listens already.

    `slow_seconds` bounds how long a slow body stalls before the connection is closed unfinished; a reader whose own
    deadline is shorter gives up first, so such a page never arrives.
    """

    def __init__(self, listener: socket.socket, pages: Sequence[WebPage], slow_seconds: float = 10.0) -> None:
        super().__init__(listener.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.pages = {page.path: page for page in pages}
        self.slow_seconds = slow_seconds

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Readers hang up whenever they like; that is their right, and no news.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One request: HTTP/1.0, so the connection closes behind each answer."""

    server: WebServer
    timeout = 30.0

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        page = self.server.pages.get(path.removeprefix(_LIVE))
        trouble = "dead_link" if page is None else page.trouble
        if path.startswith(_LIVE):
            trouble = "none" if trouble == "redirect" else "dead_link"
        status, body, content_type = 200, b"", "text/html"
        if trouble == "dead_link" or page is None:
            status = 404
        elif trouble == "server_error":
            status = 500
        elif trouble == "redirect":
            status = 301 if page.number % 2 == 0 else 302
        else:
            body, content_type = troubled_bytes(page)
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if trouble == "redirect":
            self.send_header("Location", _LIVE + path)
        self.end_headers()
        if trouble == "slow":
            self.wfile.write(body[:256])
            time.sleep(self.server.slow_seconds)
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a web of thousands of pages would drown the run's own lines."""


def main() -> None:
    """Serve on the socket that `serve` opened, until the process that called it is gone."""
    listener, seed, images, parent = map(int, sys.argv[1:])
    pages = build_web(seed, images)
    server = WebServer(socket.socket(fileno=listener), pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while os.getppid() == parent:
        time.sleep(0.5)


if __name__ == "__main__":
    main()
