"""What a URL asks of whom, and `Fault`: why a download failed."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urljoin, urlsplit


class Fault(Exception):
    """Why a download failed: `failure` from the closed list, `message` in words, and whether it may pass.

    `retry_after` are the seconds that `host` asked to be left alone for.
    """

    def __init__(
        self,
        failure: str,
        message: str,
        *,
        transient: bool = False,
        retry_after: float = 0.0,
        host: str = "",
    ) -> None:
        super().__init__(f"{failure}: {message}")
        self.failure = failure
        self.message = message
        self.transient = transient
        self.retry_after = retry_after
        self.host = host


@dataclass(frozen=True)
class Target:
    """A URL taken apart, with everything in it that HTTP can say."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def address(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


_PORTS = {"http": 80, "https": 443}


def parse_url(url: Any) -> Target:
    """The target of a URL. Raises Fault `bad_url` for whatever is not http or https with a host.

    What a list from the web has in it and HTTP has not (spaces, letters beyond ASCII) is percent-encoded; a name in
    other letters becomes its IDNA form. A user name and password in the URL are not sent.
    """
    if not isinstance(url, str) or not url.strip():
        raise Fault("bad_url", "there is no URL")
    return _parse(url)


# The schedule asks for a URL's host, the engine whether it can be fetched, the opener what to fetch.
@functools.lru_cache(16_384)
def _parse(url: str) -> Target:
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
        if parts.scheme not in _PORTS:
            raise Fault("bad_url", f"{short(url)}: neither http nor https")
        if not host:
            raise Fault("bad_url", f"{short(url)}: names no host")
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
    except ValueError as error:
        raise Fault("bad_url", f"{short(url)}: {error}") from None
    if not all(character.isalnum() or character in "-._:" for character in host):
        raise Fault("bad_url", f"{short(url)}: {short(host)} is no host name")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._", errors="replace")
    if parts.query:
        path += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?[]|", errors="replace")
    return Target(parts.scheme, host, port if port is not None else _PORTS[parts.scheme], path)


def redirected(url: str, place: str) -> str:
    """The URL that a Location header means. Raises Fault `bad_url`."""
    with contextlib.suppress(UnicodeError):
        # http.client decodes headers as Latin-1; what servers send unescaped is mostly UTF-8.
        place = place.encode("latin-1").decode("utf-8")
    try:
        new = urljoin(url, place.strip())
        scheme = urlsplit(new).scheme
    except ValueError as error:
        raise Fault("bad_url", f"redirected to {short(place)}: {error}") from None
    if scheme not in _PORTS:
        raise Fault("bad_url", f"redirected to {short(new)}: neither http nor https")
    return new


def short(text: str) -> str:
    """A piece of a hostile text that fits into a message."""
    clean = "".join(character if character.isprintable() else "?" for character in text)
    return clean if len(clean) <= 120 else clean[:117] + "..."
