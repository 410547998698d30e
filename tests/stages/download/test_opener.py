"""Would catch: a request to an address that was not checked, a URL that is no request, a wait without an end."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.errors import UserError
from capfilt.stages.download.addresses import AddressPolicy, parse_allowed_host, special_kind
from capfilt.stages.download.opener import SafeOpener
from capfilt.stages.download.resolver import Resolver
from capfilt.stages.download.settings import Settings
from capfilt.stages.download.urls import Fault, parse_url
from tests.stages.download.web import (
    GOOD,
    make,
    needs_img2dataset,
    run,
)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1", "loopback"),
        ("127.255.255.254", "loopback"),
        ("10.1.2.3", "private"),
        ("172.31.0.1", "private"),
        ("192.168.1.1", "private"),
        ("100.100.100.200", "metadata service"),
        ("169.254.169.254", "metadata service"),
        ("168.63.129.16", "metadata service"),
        ("192.0.0.192", "reserved"),
        ("0.0.0.0", "unspecified"),
        ("224.0.0.1", "multicast"),
        ("255.255.255.255", "reserved"),
        ("198.18.0.1", "reserved"),
        ("8.8.8.8", None),
        ("172.32.0.1", None),
        ("::1", "loopback"),
        ("::", "unspecified"),
        ("::7f00:1", "reserved"),
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:8.8.8.8", None),
        ("64:ff9b::169.254.169.254", "metadata service"),
        ("64:ff9b::8.8.8.8", None),
        ("64:ff9b:1::a00:1", "reserved"),
        ("2002:7f00:1::", "loopback"),
        ("2002:a9fe:a9fe::1", "metadata service"),
        ("2001:0:7f00:1::1", "loopback"),  # Teredo
        ("::ffff:0:10.0.0.1", "private"),
        ("fd00:ec2::254", "metadata service"),
        ("fe80::1", "link-local"),
        ("fec0::1", "private"),
        ("ff02::1", "multicast"),
        ("2001:db8::1", "reserved"),
        ("2606:4700:4700::1111", None),
    ],
)
def test_special_addresses(address, kind):
    import ipaddress

    assert special_kind(ipaddress.ip_address(address)) == kind


def test_allowing_a_host_allows_that_host_and_port():
    policy = AddressPolicy.of(["LocalHost:80", "[::1]:8080"], False)
    assert policy.objection("localhost", 80, "127.0.0.1") is None
    assert policy.objection("::1", 8080, "::1") is None
    assert "--allow-host [::1]:80" in policy.objection("::1", 80, "::1")
    assert policy.objection("localhost", 81, "127.0.0.1") is not None
    assert policy.objection("other", 80, "127.0.0.1") is not None
    assert policy.objection("other", 80, "fe80::1%eth0") is not None
    for bad in ("", "host", ":80", "host:", "host:0", "host:65536", "host:x"):
        with pytest.raises(UserError):
            parse_allowed_host(bad)


def test_an_intranet_is_no_metadata_service():
    policy = AddressPolicy.of(["169.254.1.1:80"], True)
    for address in ("10.1.2.3", "192.168.1.1", "127.0.0.1", "::1", "fd00::1", "100.64.0.1", "1.1.1.1"):
        assert policy.objection("here", 80, address) is None
    services = (
        "169.254.169.254",
        "fd00:ec2::254",
        "168.63.129.16",
        "100.100.100.200",
        "::ffff:169.254.169.254",
    )
    for address in (*services, "fe80::1", "0.0.0.0", "224.0.0.1"):
        assert "--allow-host" in policy.objection("here", 80, address)
    assert policy.objection("169.254.1.1", 80, "169.254.1.1") is None


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_target_or_a_bad_url(text):
    for url in (text, f"http://{text}", f"http://example.com/{text}", f"http://example.com:{text}/"):
        try:
            target = parse_url(url)
        except Fault as fault:
            assert fault.failure == "bad_url"  # noqa: PT017 - some texts are targets
        else:
            assert target.path.isascii()
            assert target.path.isprintable()
            assert " " not in target.path
            assert target.host.isascii()


def test_a_name_is_resolved_once_and_what_was_checked_is_connected_to(server, monkeypatch):
    """DNS rebinding: the second answer would be the private address."""
    asked = []

    def resolve(host):
        asked.append(host)
        return ["8.8.8.8"] if len(asked) == 1 else ["127.0.0.1"]

    connected = []
    monkeypatch.setattr("capfilt.stages.download.resolver._resolve", resolve)
    monkeypatch.setattr(
        "capfilt.stages.download.opener._Socket.connect",
        lambda self, address: connected.append(address) or (_ for _ in ()).throw(ConnectionRefusedError()),
    )
    opener = SafeOpener(Settings(timeout=1, total_timeout=2))
    for _ in range(2):
        with pytest.raises(Fault) as caught:
            opener.open(f"http://rebinding.example:{server.port}/good")
        assert caught.value.failure == "connection"
    assert asked == ["rebinding.example"]
    assert connected == [("8.8.8.8", server.port)] * 2


def test_a_name_server_without_an_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("capfilt.stages.download.resolver._resolve", lambda host: time.sleep(3))
    start = time.monotonic()
    with pytest.raises(Fault) as caught:
        SafeOpener(Settings(timeout=0.2, total_timeout=1)).open("http://slow.example/")
    assert caught.value.failure == "dns"
    assert time.monotonic() - start < 1


def test_proxies_of_the_environment_are_not_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    opener = SafeOpener(Settings(allow_host=(f"127.0.0.1:{server.port}",)))
    with opener.open(server.url("good")) as body:
        assert body.read() == GOOD


def test_tls_wants_a_certificate_it_can_verify():
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse():
        with contextlib.suppress(OSError, ssl.SSLError):
            connection, _ = listener.accept()
            connection.recv(10)
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            connection.close()

    threading.Thread(target=refuse, daemon=True).start()
    port = listener.getsockname()[1]
    opener = SafeOpener(Settings(allow_host=(f"localhost:{port}",), timeout=2, total_timeout=3))
    with pytest.raises(Fault) as caught:
        opener.open(f"https://localhost:{port}/")
    listener.close()
    assert caught.value.failure == "connection"
    assert caught.value.message.startswith("TLS")


@needs_img2dataset
def test_retries_are_for_what_may_pass(tmp_path, server):
    urls = [server.url(path) for path in ("flaky/a", "busy/b", "404", "cut")]
    server.log.clear()
    start = time.monotonic()
    rows = run(make(tmp_path, urls, server, retries=1))
    assert [row["failure"] for row in rows] == [None, None, "not_found", "truncated"]
    assert Counter(server.log) == {"/flaky/a": 2, "/busy/b": 2, "/404": 1, "/cut": 1}
    assert time.monotonic() - start >= 1.0  # Retry-After


@pytest.mark.parametrize(("code", "asked"), [(socket.EAI_AGAIN, 2), (socket.EAI_NONAME, 1)])
def test_a_names_passing_fault_is_forgotten_in_a_second_and_a_lasting_one_kept(monkeypatch, code, asked):
    """Would catch: a resolver's bad moment that costs every URL of the host for two minutes, retries included; a name that
    there is not, asked for once per URL.
    """
    calls = []

    def getaddrinfo(host, *arguments, **options):
        calls.append(host)
        if len(calls) == 1:
            raise socket.gaierror(code, "no")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    resolver = Resolver(threads=2)
    for _ in range(2):  # the second of them at once: from memory
        with pytest.raises(Fault) as caught:
            resolver.addresses("somewhere.example", 5.0)
        assert (caught.value.failure, caught.value.transient) == ("dns", code == socket.EAI_AGAIN)
    assert len(calls) == 1
    time.sleep(1.0)
    if asked == 2:
        assert resolver.addresses("somewhere.example", 5.0) == ["192.0.2.1"]
        assert resolver.addresses("somewhere.example", 5.0) == ["192.0.2.1"]
    else:
        with pytest.raises(Fault):
            resolver.addresses("somewhere.example", 5.0)
    assert len(calls) == asked
