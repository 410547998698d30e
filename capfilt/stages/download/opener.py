"""HTTP GET within limits, in the shape of a urllib opener: what `urllib.request.urlopen` does once it is installed.

Only http and https; every address is checked at the moment of connecting, after every redirect too, and what was
checked is what is connected to, so a name that resolves differently the second time gains nothing. Caps on the body,
on silence, on the whole download and on redirects. No proxies, no cookies, no credentials. What is done with the body
is `engine.py`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import http.client
import ipaddress
import math
import socket
import ssl
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urljoin, urlsplit

from capfilt.stages.download.addresses import AddressPolicy
from capfilt.stages.download.robots import MAX_BYTES, Rules, parse_robots

MAX_REDIRECTS = 10
"""As urllib's HTTPRedirectHandler.max_redirections."""

MAX_ADDRESSES = 3
"""How many of a name's addresses are tried."""

DNS_SECONDS = 120.0
"""How long an answer, or the lack of one, is remembered."""

ROBOTS_SECONDS = 86_400.0
"""How long a robots.txt is remembered (RFC 9309, section 2.4: at most a day)."""

MAX_ROBOTS = 20_000
"""Of how many hosts."""

_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 1 << 16


class Fault(Exception):
    """Why a download failed: `failure` from the closed list, `message` in words, and whether it may pass."""

    def __init__(
        self, failure: str, message: str, *, transient: bool = False, retry_after: float | None = None
    ) -> None:
        super().__init__(f"{failure}: {message}")
        self.failure = failure
        self.message = message
        self.transient = transient
        self.retry_after = retry_after


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
            raise Fault("bad_url", f"{_short(url)}: neither http nor https")
        if not host:
            raise Fault("bad_url", f"{_short(url)}: names no host")
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
    except ValueError as error:
        raise Fault("bad_url", f"{_short(url)}: {error}") from None
    if not all(character.isalnum() or character in "-._:" for character in host):
        raise Fault("bad_url", f"{_short(url)}: {_short(host)} is no host name")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._", errors="replace")
    if parts.query:
        path += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?[]|", errors="replace")
    return Target(parts.scheme, host, port if port is not None else _PORTS[parts.scheme], path)


class _Deadline:
    """Mixed into a socket: no single wait passes `idle` seconds, and none the moment `until`."""

    until: float = math.inf
    idle: float = math.inf

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        left = min(self.idle, self.until - time.monotonic())
        if left <= 0:
            raise TimeoutError("past its deadline")
        self.settimeout(left)  # type: ignore[attr-defined]
        return int(super().recv_into(*arguments, **options))  # type: ignore[misc]


class _Socket(_Deadline, socket.socket):
    pass


class _TLSSocket(_Deadline, ssl.SSLSocket):
    pass


class _Resolver:
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
                self._answers[host] = (now + DNS_SECONDS, answer)
        try:
            return answer.result(max(0.0, seconds))
        except concurrent.futures.TimeoutError:
            raise Fault("dns", f"{host}: no answer in {seconds:.0f} s", transient=True) from None
        except socket.gaierror as error:
            again = error.errno == socket.EAI_AGAIN
            raise Fault("dns", f"{host}: {error.strerror or error}", transient=again) from None
        except (UnicodeError, OSError) as error:
            raise Fault("dns", f"{host}: {error}") from None


def _resolve(host: str) -> list[str]:
    answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


@dataclass(frozen=True)
class Limits:
    """Bounds on one download: seconds of silence, seconds in all, bytes of body."""

    timeout: float = 10.0
    total_timeout: float = 30.0
    max_bytes: int = 50_000_000


@dataclass
class SafeOpener:
    """Stands in for urllib's opener: `urllib.request.install_opener(SafeOpener(...))`.

    Attributes:
        policy: which addresses may be asked.
        limits: bounds on each download.
        user_agent: what every request says it is.
    """

    policy: AddressPolicy = field(default_factory=AddressPolicy)
    limits: Limits = field(default_factory=Limits)
    user_agent: str = "capfilt"
    robots_token: str = ""

    def __post_init__(self) -> None:
        self._resolver = _Resolver()
        self._robots: dict[tuple[str, str, int], tuple[float, concurrent.futures.Future[Rules]]] = {}
        self._robots_lock = threading.Lock()
        self._faults = threading.local()
        self._tls = ssl.create_default_context()
        self._tls.sslsocket_class = _TLSSocket

    def take_fault(self) -> Fault | None:
        """The last fault of this thread, forgotten by asking: urllib's callers keep only its words."""
        fault: Fault | None = getattr(self._faults, "last", None)
        self._faults.last = None
        return fault

    def remember(self, fault: Fault) -> Fault:
        self._faults.last = fault
        return fault

    def open(self, fullurl: str | urllib.request.Request, data: Any = None, timeout: Any = None) -> Body:
        """The body of a GET, redirects followed, not read yet. Raises Fault, and remembers it.

        The headers of the request and urllib's timeout are not taken over: the limits are this opener's.
        """
        url = fullurl.full_url if isinstance(fullurl, urllib.request.Request) else fullurl
        until = time.monotonic() + self.limits.total_timeout
        try:
            return self._accept(self._follow(url, until, obey=bool(self.robots_token)), until)
        except Fault as fault:
            raise self.remember(fault) from None
        except Exception as error:  # noqa: BLE001 - whatever a hostile server brings about is this row's failure
            raise self.remember(self.fault_of(error, until)) from None

    def _follow(self, url: str, until: float, *, obey: bool) -> http.client.HTTPResponse:
        """The answer at the end of the redirects. With `obey`, robots.txt is asked before every one of them."""
        for _ in range(MAX_REDIRECTS + 1):
            target = parse_url(url)
            if obey and not self._rules(target, until).allows(target.path):
                raise Fault("opted_out", f"{target.address}: robots.txt forbids {_short(target.path)}")
            response = self._get(target, until)
            place = response.headers.get("Location") if response.status in _REDIRECTS else None
            if place is None:
                return response
            response.close()
            url = _redirected(url, place)
        raise Fault("too_many_redirects", f"more than {MAX_REDIRECTS} redirects")

    def _rules(self, target: Target, until: float) -> Rules:
        """The rules of the target's host, asked for once. Raises Fault where they could not be had."""
        origin = (target.scheme, target.host, target.port)
        with self._robots_lock:
            expires, answer = self._robots.get(origin, (0.0, None))
            mine = answer is None or (answer.done() and expires < time.monotonic())
            if answer is None or mine:
                if len(self._robots) > MAX_ROBOTS:
                    self._robots.clear()
                answer = concurrent.futures.Future()
                self._robots[origin] = (math.inf, answer)
        if mine:
            try:
                rules, keep = self._ask_robots(target), ROBOTS_SECONDS
                answer.set_result(rules)
            except BaseException as error:  # noqa: BLE001 - whoever waits for the answer raises it
                keep = DNS_SECONDS
                answer.set_exception(error)
            with self._robots_lock:
                self._robots[origin] = (time.monotonic() + keep, answer)
        try:
            return answer.result(max(0.0, until - time.monotonic()))
        except concurrent.futures.TimeoutError:
            raise Fault("timeout", f"{target.address}: waited for its robots.txt", transient=True) from None

    def _ask_robots(self, target: Target) -> Rules:
        # A deadline of its own: it serves every URL of the host, not only the one that came first.
        until = time.monotonic() + self.limits.total_timeout
        try:
            response = self._follow(f"{target.scheme}://{target.address}/robots.txt", until, obey=False)
            with response:
                if 400 <= response.status < 500:
                    return Rules()
                if not 200 <= response.status < 300:
                    # RFC 9309, section 2.3.1.4: what cannot be asked is taken for forbidden.
                    raise Fault("http_error", f"HTTP {response.status}", transient=True)
                data = b""
                while len(data) < MAX_BYTES and (chunk := response.read1(_CHUNK)):
                    data += chunk
            return parse_robots(data, self.robots_token)
        except Exception as error:  # noqa: BLE001 - as in `open`
            fault = error if isinstance(error, Fault) else self.fault_of(error, until)
            words = f"{target.address}: robots.txt: {fault.message}"
            raise Fault(fault.failure, words, transient=fault.transient) from None

    def _get(self, target: Target, until: float) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(target.host, target.port)
        # Set from outside, so that http.client never resolves or connects by itself.
        connection.sock = self._connect(target, until)
        try:
            connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
            for name, value in (
                ("Host", target.address),
                ("User-Agent", self.user_agent),
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

    def _connect(self, target: Target, until: float) -> socket.socket:
        left = min(self.limits.timeout, until - time.monotonic())
        addresses = self._resolver.addresses(target.host, left)
        objections = [self.policy.objection(target.host, target.port, address) for address in addresses]
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
                left = min(self.limits.timeout, until - time.monotonic())
                if left <= 0:
                    raise TimeoutError("past its deadline")
                sock.settimeout(left)
                sock.connect((address, target.port))
                return self._ready(sock, target, until)
            except OSError as failed:
                sock.close()
                error = failed
            except BaseException:
                sock.close()
                raise
        assert error is not None
        raise error

    def _ready(self, sock: _Socket, target: Target, until: float) -> socket.socket:
        ready: Any = sock
        if target.scheme == "https":
            ready = self._tls.wrap_socket(sock, server_hostname=target.host)
        ready.idle, ready.until = self.limits.timeout, until
        return ready  # type: ignore[no-any-return]

    def _accept(self, response: http.client.HTTPResponse, until: float) -> Body:
        status = response.status
        if 200 <= status < 300:
            length = response.length
            if length is not None and length > self.limits.max_bytes:
                response.close()
                raise Fault("too_large", f"{length} bytes announced, more than {self.limits.max_bytes}")
            return Body(self, response, until)
        words = f"HTTP {status} {_short(response.reason or '')}".rstrip()
        retry_after = _retry_after(response.headers)
        response.close()
        if status in (404, 410):
            raise Fault("not_found", words)
        if status == 429:
            raise Fault("rate_limited", words, transient=True, retry_after=retry_after)
        transient = status in (408, 425, 500, 502, 503, 504)
        raise Fault("http_error", words, transient=transient, retry_after=retry_after)

    def fault_of(self, error: Exception, until: float) -> Fault:
        """An exception of the socket, TLS or HTTP layer as a Fault."""
        if isinstance(error, TimeoutError):
            if time.monotonic() >= until:
                return Fault("timeout", f"not finished after {self.limits.total_timeout:g} s", transient=True)
            return Fault("timeout", f"silent for {self.limits.timeout:g} s", transient=True)
        if isinstance(error, ssl.SSLError):
            words = getattr(error, "verify_message", "") or error.reason or str(error)
            return Fault("connection", f"TLS: {words}")
        if isinstance(error, OSError):
            words = error.strerror or str(error) or type(error).__name__
            return Fault("connection", words, transient=True)
        if isinstance(error, http.client.IncompleteRead):
            return Fault("truncated", "the body broke off", transient=True)
        if isinstance(error, http.client.HTTPException):
            return Fault("http_error", f"no proper HTTP: {type(error).__name__}: {_short(str(error))}")
        return Fault("http_error", f"{type(error).__name__}: {_short(str(error))}")


class Body:
    """A response as img2dataset uses one: a context manager with `.headers` and `.read()`."""

    def __init__(self, opener: SafeOpener, response: http.client.HTTPResponse, until: float) -> None:
        self.headers: Message = response.headers
        self.status = response.status
        self._opener = opener
        self._response = response
        self._until = until

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._response.close()

    def read(self) -> bytes:
        """The whole body, at most `max_bytes`. Raises Fault, and remembers it."""
        try:
            return self._read()
        except Fault as fault:
            raise self._opener.remember(fault) from None
        except Exception as error:  # noqa: BLE001 - as in SafeOpener.open
            raise self._opener.remember(self._opener.fault_of(error, self._until)) from None

    def _read(self) -> bytes:
        announced, most = self._response.length, self._opener.limits.max_bytes
        chunks: list[bytes] = []
        size = 0
        # One system call at a time: a drip of single bytes meets the deadline instead of filling a buffer for hours.
        while announced is None or size < announced:
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


def _redirected(url: str, place: str) -> str:
    with contextlib.suppress(UnicodeError):
        # http.client decodes headers as Latin-1; what servers send unescaped is mostly UTF-8.
        place = place.encode("latin-1").decode("utf-8")
    try:
        new = urljoin(url, place.strip())
        scheme = urlsplit(new).scheme
    except ValueError as error:
        raise Fault("bad_url", f"redirected to {_short(place)}: {error}") from None
    if scheme not in _PORTS:
        raise Fault("bad_url", f"redirected to {_short(new)}: neither http nor https")
    return new


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


def _short(text: str) -> str:
    clean = "".join(character if character.isprintable() else "?" for character in text)
    return clean if len(clean) <= 120 else clean[:117] + "..."
