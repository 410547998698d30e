"""Names to addresses, within a deadline. Whether an address may be asked is `addresses.py`."""

from __future__ import annotations

import concurrent.futures
import ipaddress
import socket
import time

from capfilt.stages.download.remembered import Remembered
from capfilt.stages.download.urls import Fault

MAX_REMEMBERED = 50_000
"""Names remembered."""


class Resolver:
    """Names to addresses, off the calling thread (getaddrinfo has no timeout of its own), remembered for a while."""

    def __init__(self, threads: int = 64) -> None:
        pool = concurrent.futures.ThreadPoolExecutor(threads, "resolve")
        self._answers = Remembered(_found, MAX_REMEMBERED, start=pool.submit)

    def addresses(self, host: str, seconds: float) -> list[str]:
        """The addresses of `host`, in the system's order. Raises Fault."""
        try:
            return [str(ipaddress.ip_address(host))]
        except ValueError:
            pass
        try:
            return self._answers.get(host, time.monotonic() + seconds)
        except TimeoutError:
            raise Fault("dns", f"{host}: no answer in {seconds:.0f} s", transient=True) from None


def _found(host: str) -> list[str]:
    try:
        return _resolve(host)
    except (UnicodeError, OSError) as error:
        words = getattr(error, "strerror", None) or error
        again = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        raise Fault("dns", f"{host}: {words}", transient=again) from None


def _resolve(host: str) -> list[str]:
    answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))
