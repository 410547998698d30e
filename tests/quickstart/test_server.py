"""Catches a web that serves troubles wrongly, hangs a reader or its own end, or moves to another address on resume."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from capfilt.quickstart.server import HOST, PORTS, WebServer, serve
from capfilt.quickstart.web import build_web, picture_bytes, troubled_bytes
from tests.refusals import failed

PAGES = build_web(11, 800)


def page_with(trouble):
    return next(page for page in PAGES if page.trouble == trouble)


def get(url, timeout=5.0):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=timeout) as answer:
        return answer.read(), answer.headers, answer.url


@pytest.fixture(scope="module")
def server():
    """The address of a server in this process, with bodies that stall for half a second."""
    with WebServer(socket.create_server((HOST, 0)), PAGES, slow_seconds=0.5) as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://{HOST}:{running.server_address[1]}"
        running.shutdown()


def test_an_untroubled_page_is_its_picture(server):
    page = page_with("none")
    body, headers, _ = get(server + page.path)
    assert (body, headers["Content-Type"]) == picture_bytes(page)
    assert int(headers["Content-Length"]) == len(body)
    assert get(server + page.path + "?utm_source=feed")[0] == body


@pytest.mark.parametrize(("trouble", "status"), [("dead_link", 404), ("server_error", 500)])
def test_errors_are_http_errors(server, trouble, status):
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(server + page_with(trouble).path)
    assert caught.value.code == status
    caught.value.close()


def test_redirects_lead_to_the_live_picture(server):
    codes = set()
    for page in [page for page in PAGES if page.trouble == "redirect"]:
        body, headers, address = get(server + page.path)
        assert (body, headers["Content-Type"]) == picture_bytes(page)
        assert address.startswith(server + "/")
        assert address != server + page.path
        connection = http.client.HTTPConnection(server.removeprefix("http://"), timeout=5)
        connection.request("GET", page.path)
        codes.add(connection.getresponse().status)
        connection.close()
    assert codes == {301, 302}


@pytest.mark.parametrize("trouble", ["cut_short", "corrupt", "wrong_type", "tiny"])
def test_bad_bodies_come_with_status_200_and_their_own_length(server, trouble):
    page = page_with(trouble)
    body, headers, _ = get(server + page.path)
    assert (body, headers["Content-Type"]) == troubled_bytes(page)


def test_a_slow_body_outlasts_an_impatient_reader_and_never_completes_for_a_patient_one(server):
    url = server + page_with("slow").path
    with pytest.raises(TimeoutError):
        get(url, timeout=0.2)
    began = time.monotonic()
    with pytest.raises(http.client.IncompleteRead):
        get(url, timeout=20)
    assert time.monotonic() - began < 10


def test_unknown_paths_and_live_paths_of_ordinary_pages_are_404(server):
    for path in ("/nothing.jpg", "/", "/live" + page_with("none").path, "/live/" + "x" * 3000):
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(server + path)
        assert caught.value.code == 404
        caught.value.close()


def test_many_readers_at_once_are_all_answered(server):
    pages = [page for page in PAGES[:60] if page.trouble == "none"] * 10
    with ThreadPoolExecutor(64) as pool:
        bodies = list(pool.map(lambda page: get(server + page.path, 30)[0], pages))
    assert bodies[: len(pages) // 10] == [picture_bytes(page)[0] for page in pages[: len(pages) // 10]]


def test_a_reader_that_hangs_up_leaves_no_trace(server, capfd):
    host, port = server.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=5) as reader:
            reader.sendall(f"GET {page_with('none').path} HTTP/1.0\r\n\r\n".encode())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    time.sleep(0.2)
    assert capfd.readouterr().err == ""
    assert get(server + page_with("none").path)[0]


def test_a_process_serves_the_same_web_and_comes_back_to_its_port():
    page = next(page for page in build_web(5, 30) if page.trouble == "none")
    with serve(5, 30) as address:
        host, port = address.removeprefix("http://").split(":")
        assert host == "127.0.0.1"
        assert int(port) in PORTS
        assert get(address + page.path)[0] == picture_bytes(page)[0]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)
    with serve(5, 30, int(port)) as again:
        assert again == address


def test_a_taken_port_is_named(monkeypatch):
    monkeypatch.setattr("capfilt.quickstart.server._TAKEN_PATIENCE_S", 0.3)
    with socket.create_server((HOST, 0)) as holder:
        port = holder.getsockname()[1]
        with failed(str(port)), serve(0, 3, port):
            pass


def test_a_process_that_cannot_start_is_a_failed_run(capfd):
    with failed("does not answer"), serve(-1, 3):
        pass
    assert "ValueError" in capfd.readouterr().err


def test_the_process_hears_no_ctrl_c_and_ends_when_its_parent_is_killed():
    script = (
        "import signal, time\nfrom capfilt.quickstart.server import serve\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with serve(0, 3) as address:\n    print(address, flush=True)\n    time.sleep(60)\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    address = parent.stdout.readline().strip()
    os.killpg(parent.pid, signal.SIGINT)
    time.sleep(0.2)
    assert get(address + next(page for page in build_web(0, 3) if page.trouble == "none").path)[0]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    host, port = address.removeprefix("http://").split(":")
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
