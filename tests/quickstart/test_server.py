"""Catches a web that serves troubles wrongly, hangs a reader or its own end, or moves to another address on resume."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from capfilt.quickstart.server import PORTS, WebProcess, WebServer, main
from capfilt.quickstart.web import Shares, build_web, picture_bytes, troubled_bytes
from tests.refusals import failed

SHARES = Shares(
    dead_link=0.1,
    server_error=0.1,
    slow=0.1,
    cut_short=0.1,
    corrupt=0.1,
    wrong_type=0.1,
    tiny=0.1,
    redirect=0.2,
)
PAGES = build_web(11, 80, SHARES)


def page_with(trouble):
    return next(page for page in PAGES if page.trouble == trouble)


def get(url, timeout=5.0):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=timeout) as answer:
        return answer.read(), answer.headers, answer.url


@pytest.fixture(scope="module")
def server():
    with WebServer(PAGES, slow_seconds=0.5).start() as running:
        yield running


def test_an_untroubled_page_is_its_picture(server):
    page = page_with("none")
    body, headers, _ = get(page.url(server.url))
    assert (body, headers["Content-Type"]) == picture_bytes(page)
    assert int(headers["Content-Length"]) == len(body)
    assert get(page.url(server.url) + "?utm_source=feed")[0] == body


@pytest.mark.parametrize(("trouble", "status"), [("dead_link", 404), ("server_error", 500)])
def test_errors_are_http_errors(server, trouble, status):
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(page_with(trouble).url(server.url))
    assert caught.value.code == status
    caught.value.close()


def test_redirects_lead_to_the_live_picture(server):
    codes = set()
    for page in [page for page in PAGES if page.trouble == "redirect"]:
        body, headers, address = get(page.url(server.url))
        assert (body, headers["Content-Type"]) == picture_bytes(page)
        assert address.startswith(server.url + "/")
        assert address != page.url(server.url)
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=5)
        connection.request("GET", page.path)
        codes.add(connection.getresponse().status)
        connection.close()
    assert codes == {301, 302}


@pytest.mark.parametrize("trouble", ["cut_short", "corrupt", "wrong_type", "tiny"])
def test_bad_bodies_come_with_status_200_and_their_own_length(server, trouble):
    page = page_with(trouble)
    body, headers, _ = get(page.url(server.url))
    assert (body, headers["Content-Type"]) == troubled_bytes(page)


def test_a_slow_body_outlasts_an_impatient_reader_and_never_completes_for_a_patient_one(server):
    url = page_with("slow").url(server.url)
    with pytest.raises(TimeoutError):
        get(url, timeout=0.2)
    began = time.monotonic()
    with pytest.raises(http.client.IncompleteRead):
        get(url, timeout=20)
    assert time.monotonic() - began < 10


def test_unknown_paths_and_live_paths_of_ordinary_pages_are_404(server):
    for path in ("/nothing.jpg", "/", "/live" + page_with("none").path, "/live/" + "x" * 3000):
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(server.url + path)
        assert caught.value.code == 404
        caught.value.close()


def test_requests_are_counted_by_trouble():
    with WebServer(PAGES, slow_seconds=0.1) as server:
        page = page_with("none")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(get, [page.url(server.url)] * 20))
        get(page_with("redirect").url(server.url))
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(server.url + "/nothing")
        caught.value.close()
        assert server.requests() == {"live": 1, "none": 20, "redirect": 1, "unknown": 1}


def test_many_readers_at_once_are_all_answered(server):
    pages = [page for page in PAGES if page.trouble == "none"] * 10
    with ThreadPoolExecutor(64) as pool:
        bodies = list(pool.map(lambda page: get(page.url(server.url), 30)[0], pages))
    assert bodies[: len(pages) // 10] == [picture_bytes(page)[0] for page in pages[: len(pages) // 10]]


def test_it_listens_on_the_loopback_only_and_stops_while_a_body_stalls():
    server = WebServer(PAGES, slow_seconds=60).start()
    host, port = server.url.removeprefix("http://").split(":")
    assert host == "127.0.0.1"
    assert int(port) in PORTS
    with socket.create_connection((host, int(port)), timeout=5) as reader:
        reader.sendall(f"GET {page_with('slow').path} HTTP/1.0\r\n\r\n".encode())
        assert reader.recv(64)
        began = time.monotonic()
        server.stop()
        server.stop()
        assert time.monotonic() - began < 5
    with failed("served"):
        _ = server.url
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)


def test_a_reader_that_hangs_up_leaves_no_trace(server, capfd):
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=5) as reader:
            reader.sendall(f"GET {page_with('none').path} HTTP/1.0\r\n\r\n".encode())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    time.sleep(0.2)
    assert capfd.readouterr().err == ""
    assert get(page_with("none").url(server.url))[0]


def test_a_process_serves_the_same_web_and_comes_back_to_its_port(tmp_path):
    url_file = tmp_path / "world" / "web.url"
    pages = build_web(11, 30, SHARES)
    with WebProcess(11, 30, SHARES, url_file, slow_seconds=0.2).start() as first:
        url = first.url
        assert url_file.read_text().strip() == url
        page = next(page for page in pages if page.trouble == "none")
        assert get(page.url(url))[0] == picture_bytes(page)[0]
        assert first.requests() == {"none": 1}
    with WebProcess(11, 30, SHARES, url_file) as second:
        assert second.url == url
        assert second.requests() == {}


def test_a_taken_port_is_named_with_the_way_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("capfilt.quickstart.server._TAKEN_PATIENCE_S", 0.3)
    url_file = tmp_path / "web.url"
    with WebServer(PAGES) as holder:
        url_file.write_text(holder.url)
        port = holder.url.rsplit(":", 1)[1]
        assert main(["--url-file", str(url_file), "--images", "3"]) == 1
        line = capsys.readouterr().out.strip()
        assert f"port {port}" in line
        assert str(url_file) in line
        assert "\n" not in line
        with failed(f"port {port}", "127.0.0.1"):
            WebServer(PAGES, int(port)).start()


@pytest.mark.parametrize("content", ["", "http://example.com:80", "http://127.0.0.1:99999", "20000"])
def test_a_spoiled_url_file_is_named(tmp_path, capsys, content):
    url_file = tmp_path / "web.url"
    url_file.write_text(content)
    assert main(["--url-file", str(url_file), "--images", "3"]) == 1
    assert str(url_file) in capsys.readouterr().out


def test_a_process_that_cannot_start_says_why(tmp_path):
    url_file = tmp_path / "web.url"
    url_file.write_text("nonsense")
    process = WebProcess(0, 3, url_file=url_file)
    with failed(url_file, "address"):
        process.start()
    with failed("served"):
        process.requests()


def test_the_process_ends_when_its_parent_is_killed(tmp_path):
    url_file = tmp_path / "web.url"
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom capfilt.quickstart.server import WebProcess\n"
        "server = WebProcess(0, 3, url_file=Path(sys.argv[1])).start()\nprint('up', flush=True)\ntime.sleep(60)\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(url_file)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert parent.stdout.readline() == b"up\n"
    host, port = url_file.read_text().strip().removeprefix("http://").split(":")
    socket.create_connection((host, int(port)), timeout=5).close()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except ConnectionRefusedError:
            break
        except ConnectionResetError:
            pass  # accepted by the kernel while the server was ending
        time.sleep(0.1)
    else:
        pytest.fail("the server outlived the run that started it")
