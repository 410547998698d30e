"""HTTP GET within limits, in the shape of a urllib opener: what `urllib.request.urlopen` does once it is installed.

Only http and https; every address is checked at the moment of connecting, after every redirect too, and what was
checked is what is connected to, so a name that resolves differently the second time gains nothing. Caps on the body,
on silence, on the whole download and on redirects. No proxies, no cookies, no credentials. What is done with the body
is `engine.py`.
"""

from __future__ import annotations

import http.client
import math
import socket
import ssl
import threading
import time
import urllib.request
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

from capfilt.stages.download.addresses import AddressPolicy
from capfilt.stages.download.budget import STEP_BYTES, Budget, Share
from capfilt.stages.download.resolver import Resolver
from capfilt.stages.download.rests import Rests
from capfilt.stages.download.robots import MAX_BYTES, RobotsCache, Rules, parse_robots
from capfilt.stages.download.settings import Settings
from capfilt.stages.download.urls import Fault, Target, parse_url, redirected, short

MAX_REDIRECTS = 10
"""As urllib's HTTPRedirectHandler.max_redirections."""

MAX_ADDRESSES = 3
"""How many of a name's addresses are tried."""

_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 1 << 16


@dataclass
class Deadline:
    """No single wait passes `idle` seconds, and none the moment `until`."""

    until: float = math.inf
    idle: float = math.inf

    def left(self) -> float:
        """Seconds that the next wait may take. Raises TimeoutError where there are none."""
        left = min(self.idle, self.until - time.monotonic())
        if left <= 0:
            raise TimeoutError("past its deadline")
        return left


class _Timed:
    """Mixed into a socket: it keeps its deadline."""

    deadline = Deadline()

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        self.settimeout(self.deadline.left())  # type: ignore[attr-defined]
        return int(super().recv_into(*arguments, **options))  # type: ignore[misc]


class _Socket(_Timed, socket.socket):
    pass


class _TLSSocket(_Timed, ssl.SSLSocket):
    pass


class SafeOpener:
    """Stands in for urllib's opener: `urllib.request.install_opener(SafeOpener(...))`.

    Attributes:
        settings: which addresses may be asked, bounds on each download, and how requests name the crawler.
        budget: of the bytes of bodies.
    """

    def __init__(self, settings: Settings | None = None, budget: Budget | None = None) -> None:
        self.settings = settings or Settings()
        self.budget = budget or Budget()
        self._policy = AddressPolicy.of(self.settings.allow_host, self.settings.allow_private)
        self._resolver = Resolver()
        self._rests = Rests()
        self._robots = RobotsCache(self._ask_robots)
        self._here = threading.local()
        self._tls = ssl.create_default_context()
        self._tls.sslsocket_class = _TLSSocket

    def take_fault(self) -> Fault | None:
        """The last fault of this thread, forgotten by asking: urllib's callers keep only its words."""
        fault: Fault | None = getattr(self._here, "fault", None)
        self._here.fault = None
        return fault

    def take_share(self) -> Share:
        """What the last body of this thread has booked; whoever takes it closes it."""
        share: Share = self._here.share
        return share

    def remember(self, fault: Fault) -> Fault:
        self._here.fault = fault
        return fault

    def deadline(self) -> Deadline:
        """Of a download that begins now."""
        return Deadline(time.monotonic() + self.settings.total_timeout, self.settings.timeout)

    def open(self, fullurl: str | urllib.request.Request, data: Any = None, timeout: Any = None) -> Body:
        """The body of a GET, redirects followed, not read yet. Raises Fault, and remembers it.

        The headers of the request and urllib's timeout are not taken over: the limits are this opener's.
        """
        url = fullurl.full_url if isinstance(fullurl, urllib.request.Request) else fullurl
        deadline = self.deadline()
        share = self._here.share = Share(self.budget)
        try:
            target, response = self._follow(url, deadline, obey=self.settings.robots)
            return self._accept(target, response, deadline, share)
        except Fault as fault:
            raise self.remember(fault) from None
        except Exception as error:  # noqa: BLE001 - whatever a hostile server brings about is this row's failure
            raise self.remember(self.fault_of(error, deadline)) from None

    def _follow(self, url: str, deadline: Deadline, *, obey: bool) -> tuple[Target, http.client.HTTPResponse]:
        """Who answered at the end of the redirects, and what. With `obey`, robots.txt is asked before each of them."""
        for hop in range(MAX_REDIRECTS + 1):
            target = parse_url(url)
            self._rests.check(target.host, scheduled=hop == 0)
            if obey and not self._robots.rules(target, deadline.until).allows(target.path):
                raise Fault("opted_out", f"{target.address}: robots.txt forbids {short(target.path)}")
            response = self._get(target, deadline)
            place = response.headers.get("Location") if response.status in _REDIRECTS else None
            if place is None:
                return target, response
            response.close()
            url = redirected(url, place)
        raise Fault("too_many_redirects", f"more than {MAX_REDIRECTS} redirects")

    def _ask_robots(self, target: Target) -> Rules:
        # A deadline of its own: it serves every URL of the host, not only the one that came first.
        deadline = self.deadline()
        try:
            place = f"{target.scheme}://{target.address}/robots.txt"
            asked, response = self._follow(place, deadline, obey=False)
            with response:
                if 400 <= response.status < 500:
                    return Rules()
                if not 200 <= response.status < 300:
                    # RFC 9309, section 2.3.1.4: what cannot be asked is taken for forbidden.
                    raise self._later(asked, response, f"HTTP {response.status}")
                data = b""
                while len(data) < MAX_BYTES and (chunk := response.read1(_CHUNK)):
                    data += chunk
            return parse_robots(data, self.settings.user_agent_token or "capfilt")
        except Exception as error:  # noqa: BLE001 - as in `open`
            fault = error if isinstance(error, Fault) else self.fault_of(error, deadline)
            words = f"{target.address}: robots.txt: {fault.message}"
            raise Fault(
                fault.failure,
                words,
                transient=fault.transient,
                retry_after=fault.retry_after,
                host=fault.host,
            ) from None

    def _get(self, target: Target, deadline: Deadline) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(target.host, target.port)
        # Set from outside, so that http.client never resolves or connects by itself.
        connection.sock = self._connect(target, deadline)
        try:
            connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
            for name, value in (
                ("Host", target.address),
                ("User-Agent", self.settings.user_agent),
                ("Accept", "image/jpeg,image/png,image/webp,image/*;q=0.8,*/*;q=0.5"),
                ("Accept-Encoding", "identity"),
                ("Connection", "close"),
            ):
                connection.putheader(name, value)
            connection.endheaders()
            sock, response = connection.sock, connection.getresponse()
            # The response's own file keeps the socket open until the response is closed.
            sock.close()
            return response
        except BaseException:
            connection.close()
            raise

    def _connect(self, target: Target, deadline: Deadline) -> socket.socket:
        left = min(deadline.idle, deadline.until - time.monotonic())
        addresses = self._resolver.addresses(target.host, left)
        objections = [self._policy.objection(target.host, target.port, address) for address in addresses]
        allowed = [
            address for address, objection in zip(addresses, objections, strict=True) if objection is None
        ]
        if not allowed:
            raise Fault("blocked_address", next(filter(None, objections), f"{target.host} has no address"))
        error: OSError | None = None
        for address in allowed[:MAX_ADDRESSES]:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            sock = _Socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(deadline.left())
                sock.connect((address, target.port))
                return self._ready(sock, target, deadline)
            except OSError as failed:
                sock.close()
                error = failed
            except BaseException:
                sock.close()
                raise
        assert error is not None
        raise error

    def _ready(self, sock: _Socket, target: Target, deadline: Deadline) -> socket.socket:
        ready: Any = sock
        if target.scheme == "https":
            ready = self._tls.wrap_socket(sock, server_hostname=target.host)
        ready.deadline = deadline
        return ready  # type: ignore[no-any-return]

    def _accept(
        self, target: Target, response: http.client.HTTPResponse, deadline: Deadline, share: Share
    ) -> Body:
        status = response.status
        if 200 <= status < 300:
            self._rests.answered(target.host)
            length = response.length
            if length is not None and length > self.settings.max_bytes:
                response.close()
                raise Fault("too_large", f"{length} bytes announced, more than {self.settings.max_bytes}")
            return Body(self, response, deadline, share)
        words = f"HTTP {status} {short(response.reason or '')}".rstrip()
        response.close()
        if status in (404, 410):
            raise Fault("not_found", words)
        if status in (408, 425, 429, 500, 502, 503, 504):
            raise self._later(target, response, words)
        raise Fault("http_error", words)

    def _later(self, target: Target, response: http.client.HTTPResponse, words: str) -> Fault:
        """The fault of an answer that may be another one later. Its host rests where it asks to (RFC 9110, 10.2.3)."""
        status = response.status
        seconds = _retry_after(response.headers) if status in (429, 503) else None
        if not seconds:
            return Fault("rate_limited" if status == 429 else "http_error", words, transient=True)
        words += f", Retry-After {seconds:.0f} s"
        waits = self._rests.ask(target.host, seconds)
        return Fault("rate_limited", words, transient=waits, retry_after=seconds, host=target.host)

    def fault_of(self, error: Exception, deadline: Deadline) -> Fault:
        """An exception of the socket, TLS or HTTP layer as a Fault."""
        if isinstance(error, TimeoutError):
            if time.monotonic() >= deadline.until:
                return Fault(
                    "timeout", f"not finished after {self.settings.total_timeout:g} s", transient=True
                )
            return Fault("timeout", f"silent for {self.settings.timeout:g} s", transient=True)
        if isinstance(error, ssl.SSLError):
            words = getattr(error, "verify_message", "") or error.reason or str(error)
            return Fault("connection", f"TLS: {words}")
        if isinstance(error, OSError):
            words = error.strerror or str(error) or type(error).__name__
            return Fault("connection", words, transient=True)
        if isinstance(error, http.client.IncompleteRead):
            return Fault("truncated", "the body broke off", transient=True)
        if isinstance(error, http.client.HTTPException):
            return Fault("http_error", f"no proper HTTP: {type(error).__name__}: {short(str(error))}")
        return Fault("http_error", f"{type(error).__name__}: {short(str(error))}")


class Body:
    """A response as img2dataset uses one: a context manager with `.headers` and `.read()`."""

    def __init__(
        self, opener: SafeOpener, response: http.client.HTTPResponse, deadline: Deadline, share: Share
    ) -> None:
        self.headers: Message = response.headers
        self.status = response.status
        self._opener = opener
        self._response = response
        self._deadline = deadline
        self._share = share

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._response.close()

    def read(self) -> bytes:
        """The whole body, at most `max_bytes`; what it has booked is `take_share`. Raises Fault, and remembers it."""
        try:
            return self._read()
        except Exception as error:  # noqa: BLE001 - as in SafeOpener.open
            self._share.close()
            fault = error if isinstance(error, Fault) else self._opener.fault_of(error, self._deadline)
            raise self._opener.remember(fault) from None

    def _read(self) -> bytes:
        announced, most = self._response.length, self._opener.settings.max_bytes
        chunks: list[bytes] = []
        size = 0
        # One system call at a time: a drip of single bytes meets the deadline instead of filling a buffer for hours.
        while announced is None or size < announced:
            if size + _CHUNK > self._share.size:
                left = (most if announced is None else announced) + _CHUNK - self._share.size
                # The time that other bodies take is not the server's.
                self._deadline.until += self._share.grow(min(left, max(STEP_BYTES, self._share.size)))
            chunk = self._response.read1(_CHUNK)
            if not chunk:
                break
            size += len(chunk)
            if size > most:
                raise Fault("too_large", f"more than {most} bytes")
            chunks.append(chunk)
        if announced is not None and size < announced:
            raise Fault("truncated", f"the body ended after {size} of {announced} bytes", transient=True)
        return b"".join(chunks)


def _retry_after(headers: Message) -> float | None:
    """Seconds that the header asks for, as a number or as a date (RFC 9110, section 10.2.3); None without one."""
    value = str(headers.get("Retry-After") or "").strip()
    if value.isascii() and value.isdigit() and len(value) < 10:
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
        return max(0.0, moment.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
