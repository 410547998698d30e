"""The generated web on a loopback port: pictures drawn when asked for, with the troubles their pages have.

Pages are made by web.py; here is only HTTP. `WebServer` runs in this process (tests), `WebProcess` in one of
its own, so that drawing does not compete with the run for one interpreter; `python -m
capfilt.quickstart.server` serves by hand.

The address is part of every URL, and so of what a resumed run recognises: `WebProcess` writes it to a file
and takes the same port again from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from capfilt.errors import RunError
from capfilt.quickstart.web import Shares, WebPage, build_web, picture_bytes, troubled_bytes

HOST = "127.0.0.1"
# Below the ports that Linux (from 32768) and others (from 49152) lend to outgoing connections: a port in that
# range may be in use by anybody when a stopped run comes back for it.
PORTS = range(20_000, 32_768)
_LIVE = "/live"
_REQUESTS = "/-/requests"
_TAKEN_PATIENCE_S = 5.0
_START_LIMIT_S = 120.0


class WebServer:
    """The pages on a loopback port, in threads of this process; a context manager.

    `port` 0 takes a free one. `slow_seconds` bounds how long a slow body stalls before the connection is
    closed unfinished; a reader whose own deadline is shorter gives up first, so such a page never arrives.
    Every answer closes its connection.
    """

    def __init__(self, pages: Sequence[WebPage], port: int = 0, slow_seconds: float = 10.0) -> None:
        self._pages = {page.path: page for page in pages}
        self._port = port
        self._slow_seconds = slow_seconds
        self._http: _Http | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Listen and answer until `stop`. Returns itself. Raises RunError, naming the port, where it is taken."""
        self._http = _bind(self._port, self._pages, self._slow_seconds)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Close the port; bodies that are stalling end now. Does nothing on a stopped server."""
        if self._http is None or self._thread is None:
            return
        self._http.stopping.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        self._http = self._thread = None

    @property
    def url(self) -> str:
        """The server's address, for example http://127.0.0.1:20000. Raises RunError before `start`."""
        return f"http://{HOST}:{self._running.server_address[1]}"

    def requests(self) -> dict[str, int]:
        """How many requests were answered so far, by the trouble of the page ("unknown" for paths of no page)."""
        return self._running.counted()

    @property
    def _running(self) -> _Http:
        if self._http is None:
            raise RunError("the generated web is not being served: start the server first")
        return self._http

    def __enter__(self) -> Self:
        return self if self._http is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class WebProcess:
    """The same server in a process of its own; a context manager.

    The process makes the pages itself from (seed, images, shares). `url_file` holds the address: where it
    exists its port is taken again, else a free one is chosen and written there. The process ends with `stop`,
    and by itself when this process dies in whatever way.
    """

    def __init__(
        self,
        seed: int,
        images: int,
        shares: Shares | None = None,
        url_file: Path | None = None,
        slow_seconds: float = 10.0,
    ) -> None:
        self._arguments = ["--seed", str(seed), "--images", str(images), "--slow-seconds", str(slow_seconds)]
        self._arguments += ["--shares", json.dumps(dataclasses.asdict(shares or Shares()))]
        if url_file is not None:
            self._arguments += ["--url-file", str(url_file)]
        self._process: subprocess.Popen[str] | None = None
        self._url: str | None = None

    def start(self) -> Self:
        """Start the process and wait until it listens. Returns itself. Raises RunError, saying why it does not."""
        package_root = str(Path(__file__).resolve().parents[2])
        search = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        process = subprocess.Popen(
            [sys.executable, "-m", "capfilt.quickstart.server", "--attached", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
        )
        self._process = process
        assert process.stdout is not None
        watchdog = threading.Timer(_START_LIMIT_S, process.kill)
        watchdog.start()
        last = ""
        for line in process.stdout:
            last = line.strip() or last
            if last.startswith("serving "):
                break
        watchdog.cancel()
        if not last.startswith("serving "):
            self.stop()
            reason = last.removeprefix("error: ") or "its process ended without a word"
            raise RunError(f"the generated web could not be served: {reason}")
        self._url = last.split()[-1]
        return self

    def stop(self) -> None:
        """End the process and wait for its end. Does nothing on a stopped one."""
        process, self._process, self._url = self._process, None, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    @property
    def url(self) -> str:
        """The server's address, for example http://127.0.0.1:20000. Raises RunError before `start`."""
        if self._url is None:
            raise RunError("the generated web is not being served: start the server first")
        return self._url

    def requests(self) -> dict[str, int]:
        """How many requests were answered so far, by the trouble of the page ("unknown" for paths of no page)."""
        port = int(self.url.rsplit(":", 1)[1])
        # A plain socket: whatever proxy the environment names, the loopback is not behind it.
        with socket.create_connection((HOST, port), timeout=10) as connection:
            connection.sendall(f"GET {_REQUESTS} HTTP/1.0\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        counts: dict[str, int] = json.loads(answer.partition(b"\r\n\r\n")[2])
        return counts

    def __enter__(self) -> Self:
        return self if self._process is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Http(ThreadingHTTPServer):
    """The listening socket, the pages by path, and the counts."""

    daemon_threads = True
    # A downloader opens dozens of connections at once; socketserver's backlog of 5 would make them wait a
    # second for a retry.
    request_queue_size = 512

    def __init__(self, port: int, pages: dict[str, WebPage], slow_seconds: float) -> None:
        self.pages = pages
        self.slow_seconds = slow_seconds
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()
        super().__init__((HOST, port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own would ask the resolver for this machine's name, which can take seconds and is not
        # needed.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Readers hang up whenever they like; that is their right, and no news.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def count(self, name: str) -> None:
        with self._lock:
            self._requests[name] += 1

    def counted(self) -> dict[str, int]:
        with self._lock:
            return dict(sorted(self._requests.items()))


class _Handler(BaseHTTPRequestHandler):
    """One request: HTTP/1.0, so the connection closes behind each answer."""

    server: _Http
    timeout = 30.0

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == _REQUESTS:
            self._send(200, json.dumps(self.server.counted()).encode(), "application/json")
            return
        live = path.startswith(_LIVE + "/")
        page = self.server.pages.get(path.removeprefix(_LIVE) if live else path)
        self.server.count("unknown" if page is None else "live" if live else page.trouble)
        if page is None or (live and page.trouble != "redirect"):
            self._send(404, b"not found", "text/plain")
        elif live or page.trouble == "none":
            self._send(200, *picture_bytes(page))
        elif page.trouble == "dead_link":
            self._send(404, b"<html><body>404: this page has moved on</body></html>", "text/html")
        elif page.trouble == "server_error":
            self._send(500, b"<html><body>500: come back later</body></html>", "text/html")
        elif page.trouble == "redirect":
            status = 301 if page.number % 2 == 0 else 302
            self._send(status, b"", "text/html", {"Location": _LIVE + page.path})
        elif page.trouble == "slow":
            self._stall(*picture_bytes(page))
        else:
            self._send(200, *troubled_bytes(page))

    def _send(
        self, status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _stall(self, body: bytes, content_type: str) -> None:
        """Promise the whole body, send its beginning, then nothing; close without the rest when the time is over."""
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:256])
        self.wfile.flush()
        self.server.stopping.wait(self.server.slow_seconds)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a web of thousands of pages would drown the run's own lines; `requests` counts them."""


def _bind(port: int, pages: dict[str, WebPage], slow_seconds: float) -> _Http:
    if port == 0:
        # Not seeded: two runs with one seed on one machine must not want one port.
        for candidate in random.SystemRandom().sample(PORTS, 50):
            try:
                return _Http(candidate, pages, slow_seconds)
            except OSError:
                continue
        raise RunError(f"none of 50 ports tried between {PORTS[0]} and {PORTS[-1]} on {HOST} is free")
    deadline = time.monotonic() + _TAKEN_PATIENCE_S
    while True:
        # The server of a run that was just killed takes a moment to notice and let go.
        try:
            return _Http(port, pages, slow_seconds)
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(f"port {port} on {HOST} is taken ({error.strerror})") from error
            time.sleep(0.25)


def _port_of(url_file: Path) -> int:
    """The port in a file that holds an address, or 0 where there is no file."""
    if not url_file.exists():
        return 0
    text = url_file.read_text(encoding="utf-8").strip()
    head, _, port = text.rpartition(":")
    if head != f"http://{HOST}" or not port.isdigit() or not 0 < int(port) < 65536:
        raise RunError(
            f"{url_file} does not hold an address like http://{HOST}:20000: delete it to take a new one"
        )
    return int(port)


def _wait_for_end_of_input(over: threading.Event) -> None:
    sys.stdin.read()
    over.set()


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted or, attached, until the parent is gone. Returns the exit status: 0, or 1 with a line."""
    parser = argparse.ArgumentParser(
        prog="python -m capfilt.quickstart.server", description="Serve the generated web."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=1000, help="how many pages")
    parser.add_argument(
        "--shares", type=json.loads, default={}, help="JSON object: shares that differ from the defaults"
    )
    parser.add_argument("--url-file", type=Path, help="where the address is kept; its port is taken again")
    parser.add_argument("--port", type=int, default=0, help="0 takes the port of --url-file, or a free one")
    parser.add_argument("--slow-seconds", type=float, default=10.0, help="how long a slow body stalls")
    parser.add_argument(
        "--attached", action="store_true", help="end when stdin closes or the parent process does"
    )
    options = parser.parse_args(arguments)
    parent = os.getppid()
    url_file: Path | None = options.url_file
    try:
        port = options.port or (_port_of(url_file) if url_file else 0)
        pages = build_web(options.seed, options.images, Shares(**options.shares))
        server = WebServer(pages, port, options.slow_seconds).start()
    except (RunError, TypeError, ValueError) as error:
        hint = f"; stop what holds it, or delete {url_file} to take another port, which changes every URL"
        taken = (
            isinstance(error, RunError)
            and "is taken" in str(error)
            and url_file is not None
            and not options.port
        )
        print(f"error: {error}{hint if taken else ''}", flush=True)
        return 1
    with server:
        if url_file is not None:
            url_file.parent.mkdir(parents=True, exist_ok=True)
            waiting = url_file.with_name(f"{url_file.name}.{os.getpid()}.tmp")
            waiting.write_text(server.url + "\n", encoding="utf-8")
            waiting.replace(url_file)
        print(f"serving {len(pages)} pages at {server.url}", flush=True)
        over = threading.Event()
        if options.attached:
            # stdin closes with the parent, however it died; its process id covers children that inherited the
            # pipe.
            threading.Thread(target=_wait_for_end_of_input, args=(over,), daemon=True).start()
        try:
            while not over.wait(0.5):
                if options.attached and os.getppid() != parent:
                    break
        except KeyboardInterrupt:
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
