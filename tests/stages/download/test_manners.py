"""Would catch: a host asked more often than told, a URL that waits in a thread's way, a robots.txt read otherwise than
RFC 9309 has it, asked for per URL or not obeyed after a redirect, a body that is not the one the list means.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from email.message import Message
from email.utils import formatdate
from functools import partial
from pathlib import Path

import pytest

from capfilt.stages.download import DownloadOptions, wire
from capfilt.stages.download.opener import _retry_after
from capfilt.stages.download.rests import Rests
from capfilt.stages.download.retry import Retry
from capfilt.stages.download.robots import RobotsCache, Rules, parse_robots
from capfilt.stages.download.schedule import Errand, Schedule
from capfilt.stages.download.settings import settings_of
from capfilt.stages.download.stage import Download
from capfilt.stages.download.urls import Fault, parse_url
from capfilt.stages.download.worker import close_shared_worker, shared_worker
from capfilt.tables.workspace import Workspace
from tests.loopback import UNAVAILABLE
from tests.stages.download.web import BODIES, GOOD, Server, make, needs_img2dataset, redirect, run

ROOT = Path(__file__).resolve().parents[3]

# -- the schedule ------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def errands(hosts):
    return [Errand(row, f"http://{host}/", host) for row, host in enumerate(hosts)]


def test_without_limits_urls_come_in_the_lists_order():
    schedule = Schedule(errands("aabca"))
    taken = [schedule.take() for _ in range(5)]
    assert [each.row for each in taken] == [0, 1, 2, 3, 4]
    for each in taken:
        schedule.done(each)
    assert schedule.take() is None


def test_a_host_at_its_limit_does_not_hold_up_the_others():
    schedule = Schedule(errands("aaabb"), concurrency=1)
    first, second = schedule.take(), schedule.take()
    assert [(each.host, each.row) for each in (first, second)] == [("a", 0), ("b", 3)]
    schedule.done(first)
    third = schedule.take()
    assert third.row == 1
    schedule.done(second)
    schedule.done(third)
    assert {schedule.take().row, schedule.take().row} == {2, 4}


def test_a_rate_spaces_a_hosts_requests_retries_included():
    clock = Clock()
    schedule = Schedule(errands("aab"), rate=2.0, clock=clock)
    first, other = schedule.take(), schedule.take()
    assert (first.host, other.host) == ("a", "b")
    schedule.again(first, 0.1)  # due before the second's turn, so it has that turn
    clock.now = 0.5
    assert (schedule.take() is first, first.attempt) == (True, 1)
    found = []
    waiter = threading.Thread(target=lambda: found.append(schedule.take()), daemon=True)
    waiter.start()
    time.sleep(0.05)
    assert not found
    clock.now = 1.0
    schedule.done(other)  # wakes who waits
    waiter.join(30)
    assert [(each.row, each.attempt) for each in found] == [(1, 0)]


@pytest.mark.parametrize("limits", [{}, {"concurrency": 1}, {"rate": 2.0}])
def test_a_due_retry_comes_before_what_was_not_tried_yet(limits):
    clock = Clock()
    schedule = Schedule(errands("aaaa"), clock=clock, **limits)
    first = schedule.take()
    schedule.again(first, 0.5)
    clock.now = 0.5
    assert schedule.take() is first
    schedule.done(first)
    order = []
    for _ in range(3):
        clock.now += 0.5
        order.append(schedule.take())
        schedule.done(order[-1])
    assert [each.row for each in order] == [1, 2, 3]
    assert schedule.take() is None


@needs_img2dataset
def test_a_hosts_limits_hold_on_the_wire(tmp_path, server):
    server.log.clear()
    start = time.monotonic()
    rows = run(
        make(tmp_path, [server.url("good")] * 6, server, host_rate=5.0, host_concurrency=1, total_timeout=9.0)
    )
    assert [row["failure"] for row in rows] == [None] * 6
    assert time.monotonic() - start >= 1.0


def test_a_rate_holds_from_one_slice_to_the_next():
    clock = Clock()
    first = Schedule(errands("aab"), rate=0.5, clock=clock)
    assert [first.take().host, first.take().host] == ["a", "b"]
    clock.now = 3.0
    first.done(first.take())
    second = Schedule(errands("ba"), rate=0.5, free_at=first.free_at(), clock=clock)
    assert second.take().host == "b"
    assert first.free_at() == {"a": 5.0}


def test_workers_share_what_a_host_is_to_bear(tmp_path):
    stage = make(tmp_path, ["http://a/"], host_concurrency=5, host_rate=3.0)
    assert stage.most_workers() == 5
    for workers, concurrency in ((1, 5), (2, 2), (5, 1)):
        settings = settings_of(stage.options, workers)
        assert (settings.host_concurrency, settings.host_rate) == (concurrency, 3.0 / workers)
    assert make(tmp_path, ["http://a/"]).most_workers() is None


# On Ray in a network namespace of its own, as tests/loopback.py says why; the server says what reached it.
ON_RAY = """
import pathlib, sys
from capfilt.execution.run import executor, run_shards
from tests.stages.download import web
root, options = pathlib.Path(sys.argv[1]), eval(sys.argv[2])
server = web.Server()
urls = [server.url(f"together/{row // 8}") for row in range(16)]
stage = web.make(root, urls, server, number_sample_per_shard=8, timeout=90.0, total_timeout=90.0, **options)
with executor("ray") as work:
    summary = run_shards(stage, work, quiet=True)
print(summary.counts.kept, stage.workers, server.most_flying, server.moments[-1] - server.moments[0])
server.stop()
"""


def on_ray(tmp_path, **options):
    """What two slices of 8 URLs of one host come to: rows kept, workers, most fetches at once, seconds of fetching."""
    pytest.importorskip("ray")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "loopback.py"), sys.executable, "-c", ON_RAY, str(tmp_path), repr(options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if done.returncode == UNAVAILABLE:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-4000:]
    return [float(word) for word in done.stdout.split()[-4:]]


@needs_img2dataset
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor, so one worker")
def test_a_hosts_rate_holds_over_all_workers(tmp_path):
    kept, workers, _, seconds = on_ray(tmp_path, host_rate=4.0, host_concurrency=2)
    assert (kept, workers) == (16, 2)
    # 8 in each, 2 a second, of which the second may be due when both have begun; unshared it is 1.75 s.
    assert seconds >= 2.75


@needs_img2dataset
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor, so one worker")
def test_a_hosts_concurrency_holds_over_all_workers(tmp_path):
    kept, workers, most, _ = on_ray(tmp_path, host_concurrency=2)
    assert (kept, workers) == (16, 2)
    assert most == 2


# -- robots.txt --------------------------------------------------------------------------------------------------------

ROBOTS = b"""\xef\xbb\xbf# a comment
User-agent: otherbot
User-Agent: CapFilt/2.0   # us
Disallow: /private
Allow: /private/open$
Disallow: /*.php
Disallow: /caf%C3%A9
Disallow:

Sitemap: http://example.com/
User-agent: *
Disallow: /
"""


@pytest.mark.parametrize(
    ("path", "own", "others"),
    [
        ("/good", True, False),
        ("/private", False, False),
        ("/private/x", False, False),
        ("/private/open", True, False),
        ("/private/open/x", False, False),
        ("/a/b.php?x=1", False, False),
        ("/caf\u00e9", False, False),
        ("/%70rivate", False, False),
        ("/robots.txt", True, True),
    ],
)
def test_the_longest_rule_of_the_crawlers_own_group_decides(path, own, others):
    assert parse_robots(ROBOTS, "capfilt").allows(path) == own
    assert parse_robots(ROBOTS, "somebot").allows(path) == others


def test_a_hostile_robots_txt_costs_nothing():
    pattern = b"User-agent: *\nDisallow: /" + b"*a" * 5_000 + b"b\n"
    start = time.process_time()
    assert parse_robots(pattern * 20, "x").allows("/" + "a" * 5_000)
    assert parse_robots(b"\0\xff:\n" * 100_000 + b"no colon", "x").allows("/")
    assert time.process_time() - start < 5


@pytest.mark.parametrize("token", ["capfilt", "CapFilt", "capfilt/0.1.0", " capfilt "])
def test_the_crawlers_token_is_its_product_in_any_case(token):
    """Would catch: a group for `CapFilt/2.0` that `capfilt` does not obey, or one for `capfiltering` that it does."""
    rules = b"User-agent: capfiltering\nDisallow: /a\nUser-agent: CAPFILT/9 (x)\nDisallow: /b\nUser-agent: *\nDisallow: /c"
    own = parse_robots(rules, token)
    assert [own.allows(path) for path in ("/a", "/b", "/c")] == [True, False, True]


def target_of(number):
    return parse_url(f"http://host{number}.example/x")


def test_robots_txts_are_remembered_up_to_a_cap_the_last_asked_for():
    """Would catch: a crawl of millions of hosts that keeps every robots.txt it ever read."""
    asked = []

    def ask(target):
        asked.append(target.host)
        return Rules(((False, "/private"), (False, "/secret")))

    cache = RobotsCache(ask, most=9)  # three files of two rules
    for number in (0, 1, 2, 0, 3):
        assert not cache.rules(target_of(number), time.monotonic() + 9).allows("/private")
    assert len(asked) == 4
    cache.rules(target_of(0), time.monotonic() + 9)  # asked for again before the fourth came
    cache.rules(target_of(2), time.monotonic() + 9)
    assert len(asked) == 4
    cache.rules(target_of(1), time.monotonic() + 9)
    assert asked[4:] == ["host1.example"]
    assert cache._held <= 9

    huge = RobotsCache(lambda target: Rules(((False, "/x"),) * 50), most=9)
    for number in range(5):
        huge.rules(target_of(number), time.monotonic() + 9)
    assert len(huge._known) == 1


def test_a_robots_txts_passing_fault_is_forgotten_at_once_and_a_lasting_one_kept(monkeypatch):
    """Would catch: a server's bad second that forbids the whole host for two minutes."""
    monkeypatch.setattr("capfilt.stages.download.remembered.TRANSIENT_SECONDS", 0.05)
    faults = [Fault("http_error", "HTTP 503", transient=True), Fault("connection", "TLS: no")]
    asked = []

    def ask(target):
        asked.append(target.host)
        raise faults[len(asked) - 1]

    cache = RobotsCache(ask)
    for pause, count in ((0.0, 1), (0.1, 2), (0.1, 2)):
        time.sleep(pause)
        with pytest.raises(Fault):
            cache.rules(target_of(0), time.monotonic() + 9)
        assert len(asked) == count


@needs_img2dataset
def test_robots_txt_is_asked_once_per_host_and_obeyed_after_redirects(tmp_path, server, monkeypatch):
    import tests.stages.download.web as web

    other, broken = Server(), Server()
    robots = b"User-agent: *\nDisallow: /big\nDisallow: /wide"
    monkeypatch.setitem(web.BODIES, "robots.txt", robots)
    broken.failing = True
    try:
        urls = [other.url(name) for name in ("good", "wide", "good")] + [redirect(server, other.url("big"))]
        urls += [server.url("good"), broken.url("good")]
        allow = tuple(f"127.0.0.1:{each.port}" for each in (server, other, broken))
        server.log.clear()
        rows = run(make(tmp_path, urls, allow_host=allow, robots=True, total_timeout=9.0))
        expected = [None, "opted_out", None, "opted_out", None, "http_error"]
        assert [row["failure"] for row in rows] == expected
        assert "robots.txt" in rows[1]["error_message"]
        assert "robots.txt" in rows[5]["error_message"]
        assert Counter(other.log) == {"/robots.txt": 1, "/good": 2}
        assert server.log.count("/robots.txt") == 1
        assert broken.log == ["/robots.txt"]
        # Unasked, nobody's robots.txt is fetched.
        other.log.clear()
        run(make(tmp_path, [other.url("wide")], allow_host=allow, name="plain", dataset="plain"))
        assert other.log == ["/wide"]
    finally:
        other.stop()
        broken.stop()


# -- waiting and verifying ---------------------------------------------------------------------------------------------


def test_retry_after_is_a_number_or_a_date():
    # Dates are made here: between the collection of tests and this one, a busy machine takes many minutes.
    soon = formatdate(time.time() + 3600, usegmt=True)
    for value, low, high in (("7", 7, 7), (soon, 3500, 3600), (formatdate(0, usegmt=True), 0, 0)):
        headers = Message()
        headers["Retry-After"] = value
        assert low <= _retry_after(headers) <= high


@pytest.mark.parametrize("value", ["", "soon", "-3", "9" * 40, "\u0663", "Mon, 99 Foo 2026"])
def test_a_retry_after_that_says_nothing_is_none(value):
    headers = Message()
    headers["Retry-After"] = value
    assert _retry_after(headers) is None


def test_a_rest_that_was_asked_for_keeps_all_of_a_hosts_urls():
    clock = Clock()
    schedule = Schedule(errands("aabab"), clock=clock)
    first = schedule.take()
    schedule.rest("a", 5.0)
    schedule.again(first, 0.5)
    assert [schedule.take().row for _ in range(2)] == [2, 4]
    clock.now = 5.0
    assert sorted(schedule.take().row for _ in range(3)) == [0, 1, 3]
    schedule.rest("a", 4.0)
    assert schedule.free_at() == {"a": 9.0}


def test_a_host_is_waited_for_until_it_has_asked_for_too_much():
    """Would catch: a host that says `Retry-After: 20` for ever and is waited for as long."""
    clock = Clock()
    rests = Rests(clock)
    assert rests.ask("a", 20.0)
    assert rests.ask("a", 20.0)  # of the same moment
    with pytest.raises(Fault) as wait:
        rests.check("a", scheduled=False)
    assert (wait.value.transient, wait.value.retry_after, wait.value.host) == (True, 20.0, "a")
    rests.check("a", scheduled=True)
    rests.check("b", scheduled=False)
    clock.now = 20.0
    rests.answered("a")
    assert rests.ask("a", 30.0)
    clock.now = 50.0
    assert not rests.ask("a", 1.0)
    with pytest.raises(Fault) as end:
        rests.check("a", scheduled=True)
    assert (end.value.failure, end.value.transient) == ("rate_limited", False)
    rests.answered("a")  # of what was in flight: the rest that was asked for stands
    with pytest.raises(Fault):
        rests.check("a", scheduled=True)
    clock.now = 51.0
    rests.check("a", scheduled=True)
    assert not rests.ask("c", 3600.0)


@needs_img2dataset
@pytest.mark.parametrize("status", [429, 503])
def test_a_host_that_asks_for_a_rest_has_it_from_all_of_its_urls(tmp_path, server, status):
    """Would catch: a Retry-After that binds one URL, while the host's other URLs go on asking."""
    server.once.clear()
    first = server.url(f"later/{status}/1/{tmp_path.name}")
    make_one = partial(make, tmp_path, server=server, thread_count=1, total_timeout=9.0)
    run(make_one([None], dataset="warm", name="warm"))
    for retries, expected in ((0, ["rate_limited", None, None]), (1, [None] * 3)):
        server.once.clear()
        server.log.clear()
        server.asked.clear()
        urls = [first, server.url("good"), server.url("wide")]
        rows = run(make_one(urls, dataset=f"d{retries}", name=f"d{retries}", retries=retries))
        assert [row["failure"] for row in rows] == expected
        assert server.asked[1] - server.asked[0] >= 1.0
        assert len(server.log) == 3 + retries


@needs_img2dataset
@pytest.mark.parametrize("status", [429, 503])
def test_a_rest_too_long_to_wait_for_ends_the_hosts_rows_at_once(tmp_path, server, status):
    """Would catch: an hour's Retry-After cut to half a minute and asked again, a URL of the host asked meanwhile, also by
    way of another host; a retry that does not get them.
    """
    other = Server()
    try:
        other.once.clear()
        allow = tuple(
            f"{host}:{each.port}" for each in (server, other) for host in ("127.0.0.1", "localhost")
        )
        shut = [other.url(path, "localhost") for path in (f"later/{status}/3600/x", "good", "wide")]
        urls = [*shut, server.url("good"), redirect(server, other.url("big", "localhost"))]
        start = time.monotonic()
        stage = make(tmp_path, urls, allow_host=allow, thread_count=1, retries=3, total_timeout=9.0)
        rows = run(stage)
        assert [row["failure"] for row in rows] == [*["rate_limited"] * 3, None, "rate_limited"]
        assert len(other.log) == 1
        assert "3600 s" in rows[0]["error_message"]
        assert time.monotonic() - start < 25

        close_shared_worker()  # another day
        again = Retry(replace(stage.options, retry="failed"), Workspace(tmp_path / "ws"))
        table = again.process(0).table
        assert table["failure"].to_pylist() == [None] * 5
    finally:
        other.stop()


@needs_img2dataset
def test_a_body_that_is_not_the_lists_is_a_mismatch(tmp_path, server):
    right = hashlib.sha256(GOOD).hexdigest()
    lines = [("good", right.upper()), ("good", "0" * 64), ("good", ""), ("404", right), ("html", "0" * 64)]
    (tmp_path / "urls.csv").write_text(
        "url,caption,sha256,LICENCE\n"
        + "".join(f"{server.url(path)},t,{value},CC-{path}\n" for path, value in lines)
    )
    options = DownloadOptions(
        url_list=str(tmp_path / "urls.csv"), verify_hash="sha256", license_col="LICENCE",
        allow_host=(f"127.0.0.1:{server.port}",),
    )  # fmt: skip
    rows = run(Download(options, Workspace(tmp_path / "ws")))
    assert [row["failure"] for row in rows] == [
        None, "hash_mismatch", "hash_mismatch", "not_found", "hash_mismatch",
    ]  # fmt: skip
    assert [row["license"] for row in rows] == [f"CC-{path}" for path, _ in lines]
    assert rows[1]["image"] is None
    assert rows[1]["sha256"] == right
    assert rows[1]["status"] == "failed_to_download"
    assert "LICENCE" not in rows[0]


@needs_img2dataset
def test_a_body_that_is_not_the_lists_is_not_decoded(tmp_path, server):
    """Would catch: a mismatch that is found out after the decode that it is to save, or that a broken picture hides."""
    frames = {}
    worker = shared_worker()
    plain = settings_of(
        DownloadOptions(
            url_list="x", allow_host=(f"127.0.0.1:{server.port}",), timeout=5.0, total_timeout=9.0
        )
    )
    worker.run([(0, None)], plain)  # imports first
    paths = ["html", "bomb", "good"]
    urls = [(row, server.url(path)) for row, path in enumerate(paths)]
    hashes = dict.fromkeys(range(3), "0" * 64)
    with pytest.MonkeyPatch.context() as patch:
        unpack = wire.unpack

        def heard(read):
            message, payload = unpack(read)
            for kind in ("begin", "row"):
                if kind in message:
                    frames.setdefault(kind, set()).add(message[kind])
            return message, payload

        patch.setattr(wire, "unpack", heard)
        answers = worker.run(urls, plain, hashes)
    assert [answers[row].columns["failure"] for row in range(3)] == ["hash_mismatch"] * 3
    assert answers[1].columns["sha256"] == hashlib.sha256(BODIES["bomb"]).hexdigest()
    assert frames == {"row": {0, 1, 2}}
