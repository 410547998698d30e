"""Names to addresses, within a deadline. Whether an address may be asked is `addresses.py`."""

from __future__ import annotations

import concurrent.futures
import ipaddress
import socket
import threading
import time

from capfilt.stages.download.urls import Fault

KEEP_SECONDS = 120.0
"""How long an answer, or the lack of one, is remembered."""

TRANSIENT_SECONDS = 0.4
"""How long a fault that may pass is: for the URLs that ask at once, and less than an attempt waits for the next."""


class Resolver:
    """Names to addresses, off the calling thread (getaddrinfo has no timeout of its own), remembered for a while."""

    def __init__(self, threads: int = 64) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, "resolve")
        self._lock = threading.Lock()
        self._answers: dict[str, tuple[float, concurrent.futures.Future[list[str]]]] = {}

    def addresses(self, host: str, seconds: float) -> list[str]:
        """The addresses of `host`, in the system's order. Raises Fault."""
        try:
            return [str(ipaddress.ip_address(host))]
        except ValueError:
            pass
        with self._lock:
            now = time.monotonic()
            expires, answer = self._answers.get(host, (0.0, None))
            if answer is None or expires < now:
                if len(self._answers) > 50_000:
                    self._answers.clear()
                answer = self._pool.submit(_resolve, host)
                self._answers[host] = (now + KEEP_SECONDS, answer)
        try:
            return answer.result(max(0.0, seconds))
        except concurrent.futures.TimeoutError:
            raise Fault("dns", f"{host}: no answer in {seconds:.0f} s", transient=True) from None
        except socket.gaierror as error:
            again = error.errno == socket.EAI_AGAIN
            if again:
                with self._lock:
                    expires, latest = self._answers.get(host, (0.0, None))
                    if latest is answer:
                        self._answers[host] = (min(expires, time.monotonic() + TRANSIENT_SECONDS), answer)
            raise Fault("dns", f"{host}: {error.strerror or error}", transient=again) from None
        except (UnicodeError, OSError) as error:
            raise Fault("dns", f"{host}: {error}") from None


def _resolve(host: str) -> list[str]:
    answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))
