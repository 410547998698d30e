"""Would catch: bodies in flight that are bounded by their number only, a budget that bodies wait in for one another for ever,
a body that fails because others took its time.
"""

from __future__ import annotations

import http.server
import threading
import time

import pytest

from capfilt.stages.download.budget import Budget, Share
from capfilt.stages.download.opener import SafeOpener
from capfilt.stages.download.settings import Settings
from capfilt.stages.download.urls import Fault

BODY = bytes(1_000_000)


def test_shares_that_wait_for_one_another_end():
    budget = Budget(100)
    done, most = [], []

    def grow():
        share = Share(budget)
        for _ in range(10):
            share.grow(10)
            most.append(budget.used)
            time.sleep(0.001)
        done.append(share.size)
        share.close()

    threads = [threading.Thread(target=grow, daemon=True) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
    assert done == [100] * 8
    assert budget.used == 0
    # The budget, and one share that goes on beyond it.
    assert max(most) <= 200


@pytest.fixture
def bodies():
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY[: 100 if self.path == "/cut" else None])
            self.close_connection = True

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def settings(host, timeout, total_timeout):
    return Settings(allow_host=(host,), timeout=timeout, total_timeout=total_timeout, max_bytes=2_000_000)


def test_a_body_beyond_the_budget_waits_and_is_not_late(bodies):
    budget = Budget(1_200_000)
    opener = SafeOpener(settings(bodies, 5.0, 0.5), budget)

    def fetch():
        with opener.open(f"http://{bodies}/") as body:
            return body.read(), opener.take_share()

    _, first = fetch()
    assert len(BODY) <= budget.used <= len(BODY) + (1 << 16)
    _, second = fetch()  # one may always go on
    assert budget.over is second
    received = []
    third = threading.Thread(target=lambda: received.append(fetch()), daemon=True)
    third.start()
    time.sleep(1.0)  # twice its total timeout
    assert received == []
    second.close()
    first.close()
    third.join(10)
    assert [body for body, _ in received] == [BODY]
    received[0][1].close()
    assert budget.used == 0


def test_a_body_that_fails_gives_back_what_it_booked(bodies):
    opener = SafeOpener(settings(bodies, 1.0, 2.0))
    with pytest.raises(Fault), opener.open(f"http://{bodies}/cut") as body:
        body.read()
    assert opener.budget.used == 0
