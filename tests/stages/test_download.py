"""Would catch: a URL without a row, a row out of order, a request that reaches a private address, a download without an
end, a picture stored turned or miscoloured, a dead child that takes its rows along, a second run that asks again.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import json
import os
import pickle
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capfilt.errors import RunError, UserError
from capfilt.stages.download import Download
from capfilt.stages.download.addresses import AddressPolicy, parse_allowed_host, special_kind
from capfilt.stages.download.engine import Settings
from capfilt.stages.download.lists import open_list
from capfilt.stages.download.opener import Fault, Limits, SafeOpener, parse_url
from capfilt.stages.download.presets import Layout
from capfilt.stages.download.worker import Worker, close_shared_worker, shared_worker
from capfilt.stages.options import DownloadOptions
from capfilt.tables.contracts import FAILURES, IMAGES, STATUSES
from capfilt.tables.workspace import Workspace

needs_img2dataset = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("img2dataset") is None, reason="img2dataset is not installed"
)


ROOT = Path(__file__).resolve().parents[2]


# -- pictures and a server with the web's manners -------------------------------------------------------------------


def picture(width=64, height=48, seed=0):
    """A smooth picture: JPEG keeps it nearly as it is."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    phases = np.random.default_rng(seed).uniform(0, 6, 3)
    planes = [127 + 120 * np.sin(3 * x + 5 * y + phase) for phase in phases]
    return Image.fromarray(np.stack(planes, axis=2).astype(np.uint8))


def encoded(image, format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def halves(size=64):
    """Left half red, right half blue."""
    image = Image.new("RGB", (size, size // 2), (220, 20, 20))
    image.paste((20, 20, 220), (size // 2, 0, size, size // 2))
    return image


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    return encoded(halves(), exif=exif)


GOOD = encoded(picture())
BODIES = {
    "good": GOOD,
    "wide": encoded(picture(600, 400)),
    "big": encoded(picture(1400, 1200)),
    "tiny": encoded(picture(9, 7)),
    "strip": encoded(picture(400, 20)),
    "png": encoded(picture(), "PNG"),
    "webp": encoded(picture(), "WEBP"),
    "gif": encoded(picture(), "GIF", save_all=True, append_images=[picture(seed=1)]),
    "cmyk": encoded(halves().convert("CMYK")),
    "alpha": encoded(Image.new("RGBA", (40, 30), (255, 0, 0, 0)), "PNG"),
    "deep": encoded(Image.fromarray(np.full((30, 40), 40000, np.uint16)), "PNG"),
    "grey": encoded(picture().convert("L")),
    "turned": turned(),
    "icc": encoded(picture(), icc_profile=b"not a profile at all"),
    "cut": GOOD[: len(GOOD) // 2],
    "html": b"<!doctype html><title>404</title>" * 20,
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>',
    "empty": b"",
    "bomb": encoded(Image.new("1", (20_000, 20_000)), "PNG"),
}


class Server(http.server.ThreadingHTTPServer):
    """Serves BODIES by name and misbehaves at other paths; `log` has every path asked for."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, family=socket.AF_INET, host="127.0.0.1"):
        self.address_family = family
        self.log = []
        self.agents = set()
        self.once = Counter()
        self.hold = threading.Event()
        self.hold.set()
        super().__init__((host, 0), Handler)
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    @property
    def port(self):
        return self.server_address[1]

    def url(self, path, host="127.0.0.1"):
        return f"http://{host}:{self.port}/{path}"

    def handle_error(self, request, client_address):
        """Clients that hang up are what the limits are for."""

    def stop(self):
        self.hold.set()
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_):
        pass

    def answer(self, status=200, body=b"", **headers):
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        name, _, rest = urlsplit(self.path).path[1:].partition("/")
        self.server.log.append(self.path)
        self.server.agents.add(self.headers["User-Agent"])
        if name in BODIES:
            self.answer(body=BODIES[name], Content_Type="image/jpeg")
        elif name.isdigit():
            self.answer(int(name), b"no")
        elif name == "held":
            self.server.hold.wait(20)
            self.answer(body=GOOD)
        elif name == "to":
            self.answer(302, b"", Location=self.headers_of(rest))
        elif name == "loop":
            self.answer(302, Location=f"/loop/{int(rest or 0) + 1}")
        elif name == "robots":
            self.answer(body=GOOD, X_Robots_Tag="otherbot: noindex, noai".replace("otherbot: ", rest))
        elif name == "flaky":
            self.server.once[rest] += 1
            self.answer(*((200, GOOD) if self.server.once[rest] > 1 else (503, b"later")))
        elif name == "busy":
            self.server.once[rest] += 1
            if self.server.once[rest] > 1:
                self.answer(body=GOOD)
            else:
                self.answer(429, Retry_After="1")
        elif name == "short":
            self.answer(body=GOOD, Content_Length=str(len(GOOD) + 500), Connection="close")
            self.close_connection = True
        elif name == "announced":
            self.answer(body=b"x", Content_Length=str(10**12))
            self.close_connection = True
        elif name == "endless":
            self.answer(Content_Length=None, Transfer_Encoding="chunked")
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        elif name in ("drip", "dripping-headers", "silent"):
            self.misbehave(name)
        elif name == "garbage":
            self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
            self.close_connection = True
        elif name == "hangup":
            self.close_connection = True
        else:
            self.answer(404, b"no such page")

    def headers_of(self, rest):
        return bytes.fromhex(rest).decode("latin-1")

    def misbehave(self, name):
        self.close_connection = True
        with contextlib.suppress(OSError):
            if name == "silent":
                time.sleep(15)
            elif name == "drip":
                self.answer(Content_Length="100000")
            else:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while name != "silent":
                self.wfile.write(b"x")
                time.sleep(0.2)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="module", autouse=True)
def one_child():
    """The child process is shared by this module's tests: its imports take seconds."""
    yield
    close_shared_worker()


def redirect(server, target):
    return server.url("to/" + target.encode().hex())


def run(stage, shards=None):
    """What an executor does, in this process; returns the rows, in order."""
    mark = stage.begin()
    for shard in stage.shards() if shards is None else shards:
        if stage.output.manifest(shard) is None:
            out = stage.process(shard)
            stage.output.commit(shard, out.table, out.counts, stage.shard_fingerprint(mark, shard), 1.0)
    return pa.concat_tables(stage.output.tables()).to_pylist()


def make(tmp_path, urls, server=None, name="urls", **options):
    listing = tmp_path / f"{name}.parquet"
    pq.write_table(
        pa.table({"url": pa.array(urls, pa.string()), "caption": [f"text {i}" for i in range(len(urls))]}),
        listing,
    )
    options.setdefault("allow_host", (f"127.0.0.1:{server.port}",) if server else ())
    options.setdefault("timeout", 1.0)
    options.setdefault("total_timeout", 2.0)
    return Download(DownloadOptions(url_list=str(listing), **options), Workspace(tmp_path / "ws"))


# -- the whole stage ------------------------------------------------------------------------------------------------


@needs_img2dataset
def test_every_url_is_the_row_it_should_be(tmp_path, server):
    here = server.url
    closed = socket.create_server(("127.0.0.1", 0))
    nobody = closed.getsockname()[1]
    closed.close()
    cases = [
        (here("good"), None),
        (here("wide"), None),
        (here("big"), None),
        (here("png"), None),
        (here("webp"), None),
        (here("gif"), None),
        (here("cmyk"), None),
        (here("alpha"), None),
        (here("deep"), None),
        (here("grey"), None),
        (here("turned"), None),
        (here("icc"), None),
        (here("good"), None),  # a duplicate is a row of its own
        (here("good?q=ä b|c#fragment"), None),
        (f" {here('good')} ", None),
        (redirect(server, "/good"), None),
        (redirect(server, here("good")), None),
        (here("robots/otherbot: "), None),
        (here("404"), "not_found"),
        (here("410"), "not_found"),
        (here("nowhere"), "not_found"),
        (here("403"), "http_error"),
        (here("500"), "http_error"),
        (here("429"), "rate_limited"),
        (here("garbage"), "http_error"),
        (here("hangup"), "connection"),
        (f"http://127.0.0.1:{nobody}/x", "blocked_address"),
        (here("loop"), "too_many_redirects"),
        (redirect(server, "file:///etc/passwd"), "bad_url"),
        (redirect(server, "ftp://127.0.0.1/x"), "bad_url"),
        (redirect(server, "http://[::1"), "bad_url"),
        (here("robots/"), "opted_out"),
        (here("robots/capfilt: "), "opted_out"),
        (here("short"), "truncated"),
        (here("cut"), "truncated"),
        (here("html"), "not_an_image"),
        (here("svg"), "not_an_image"),
        (here("empty"), "not_an_image"),
        (here("tiny"), "too_small"),
        (here("strip"), "bad_aspect_ratio"),
        (here("bomb"), "too_many_pixels"),
        (here("announced"), "too_large"),
        (here("endless"), "too_large"),
        (here("drip"), "timeout"),
        (here("dripping-headers"), "timeout"),
        (here("silent"), "timeout"),
        ("http://no-such-host.invalid/x.jpg", "dns"),
        ("file:///etc/passwd", "bad_url"),
        ("ftp://example.com/x.jpg", "bad_url"),
        ("data:image/png;base64,AAAA", "bad_url"),
        ("example.com/x.jpg", "bad_url"),
        ("http://", "bad_url"),
        ("http://exa mple.com/", "bad_url"),
        ("http://127.0.0.1:99999/", "bad_url"),
        ("", "bad_url"),
        (None, "bad_url"),
    ]
    stage = make(
        tmp_path, [url for url, _ in cases], server, number_sample_per_shard=40, max_bytes=2_000_000,
        min_image_size=10, max_aspect_ratio=10.0, total_timeout=3.0,
    )  # fmt: skip
    start = time.monotonic()
    rows = run(stage)
    assert [(row["url"], row["failure"]) for row in rows] == cases
    assert [row["captions"] for row in rows] == [[f"text {i}"] for i in range(len(cases))]
    assert time.monotonic() - start < 60

    assert [row["key"] for row in rows] == [
        f"{shard * 100 + i:07d}" for shard in (0, 1) for i in range((40, 16)[shard])
    ]
    assert len({row["image_id"] for row in rows}) == len(rows)
    for row in rows:
        good = row["failure"] is None
        assert row["status"] in STATUSES
        assert (
            (row["status"] == "success")
            == good
            == (row["error_message"] is None)
            == (row["image"] is not None)
        )
        assert good == (row["phash"] is not None)
        if row["failure"] is not None:
            assert row["failure"] in FAILURES
    counts = stage.output.counts()
    assert counts.rows_in == len(cases) == counts.kept + sum(counts.failed.values())
    assert counts.failed == dict(Counter(failure for _, failure in cases if failure))
    IMAGES.conform(stage.output.read(0))

    by_name = {urlsplit(row["url"]).path[1:]: row for row in rows if row["url"] and row["failure"] is None}
    for name in ("good", "wide", "big", "turned"):
        row = by_name[name]
        with (
            Image.open(io.BytesIO(BODIES[name])) as received,
            Image.open(io.BytesIO(row["image"]["bytes"])) as stored,
        ):
            assert (row["original_width"], row["original_height"]) == received.size
            assert (row["width"], row["height"]) == stored.size
            assert stored.format == "JPEG"
        assert row["sha256"] == hashlib.sha256(BODIES[name]).hexdigest()
    assert (by_name["good"]["width"], by_name["good"]["height"]) == (64, 48)
    assert (by_name["wide"]["width"], by_name["wide"]["height"]) == (384, 256)
    assert by_name["big"]["height"] == 256
    sizes = {row["failure"]: (row["original_width"], row["original_height"]) for row in rows}
    assert sizes["too_small"] == (9, 7)
    assert sizes["bad_aspect_ratio"] == (400, 20)
    assert server.agents == {"capfilt/0.1.0"}

    # As people see them: colours right, upright, transparency white, 16 bits scaled and not clipped.
    def pixel(name, x, y):
        image = Image.open(io.BytesIO(by_name[name]["image"]["bytes"])).convert("RGB")
        return image.getpixel((int(x * image.width), int(y * image.height)))

    assert np.allclose(pixel("cmyk", 0.2, 0.5), (220, 20, 20), atol=12)
    assert np.allclose(pixel("cmyk", 0.8, 0.5), (20, 20, 220), atol=12)
    assert (by_name["turned"]["width"], by_name["turned"]["height"]) == (32, 64)
    assert np.allclose(pixel("turned", 0.5, 0.2), (220, 20, 20), atol=12)
    assert np.allclose(pixel("alpha", 0.5, 0.5), (255, 255, 255), atol=2)
    assert np.allclose(pixel("deep", 0.5, 0.5), (156, 156, 156), atol=3)

    # Nothing of the file that a redirect and a row named.
    everything = b"".join(path.read_bytes() for path in (tmp_path / "ws").rglob("*") if path.is_file())
    assert b"root:" not in everything


@needs_img2dataset
def test_a_private_address_gets_no_request_whatever_leads_to_it(tmp_path, server):
    forbidden = Server()
    v6 = None
    with contextlib.suppress(OSError):
        v6 = Server(socket.AF_INET6, "::1")
    port = forbidden.port
    targets = [
        f"http://127.0.0.1:{port}/good",
        f"http://localhost:{port}/good",
        f"http://2130706433:{port}/good",
        f"http://0x7f.1:{port}/good",
        f"http://0.0.0.0:{port}/good",
        f"http://[::ffff:127.0.0.1]:{port}/good",
        f"http://[::ffff:7f00:1]:{port}/good",
        f"http://user@127.0.0.1:{port}/good",
        "http://169.254.169.254/latest/meta-data/",
        "http://[fe80::1]/x",
        f"http://[::1]:{v6.port if v6 else port}/good",
    ]
    try:
        rows = run(make(tmp_path, [*targets, *(redirect(server, target) for target in targets)], server))
        assert {row["failure"] for row in rows} == {"blocked_address"}
        assert "--allow-host" in rows[0]["error_message"]
        assert forbidden.log == []
        assert v6 is None or v6.log == []

        # Each way of allowing, and nothing but what it allows.
        both = [targets[0], targets[1]]
        options = {"name": "one", "dataset": "one", "allow_host": (f"127.0.0.1:{port}",)}
        assert [row["failure"] for row in run(make(tmp_path, both, **options))] == [None, "blocked_address"]
        rows = run(make(tmp_path, both, name="all", dataset="all", allow_host=(), allow_private=True))
        assert [row["failure"] for row in rows] == [None, None]
    finally:
        for each in (forbidden, v6):
            if each is not None:
                each.stop()


@needs_img2dataset
@pytest.mark.parametrize(
    ("mode", "size"), [("border", (32, 32)), ("center_crop", (32, 32)), ("keep_ratio_largest", (32, 21))]
)
def test_resize_modes_are_those_of_img2dataset(tmp_path, server, mode, size):
    stage = make(
        tmp_path,
        [server.url("wide")],
        server,
        resize_mode=mode,
        image_size=32,
        encode_format="png",
        encode_quality=9,
    )
    (row,) = run(stage)
    assert row["failure"] is None
    with Image.open(io.BytesIO(row["image"]["bytes"])) as stored:
        assert stored.size == (row["width"], row["height"]) == size
        assert stored.format == "PNG"
    assert row["image"]["path"].endswith(".png")


@needs_img2dataset
def test_a_second_run_asks_for_nothing_and_changes_no_byte(tmp_path, server):
    urls = [server.url(name) for name in ("good", "404", "good", "cut")]
    run(make(tmp_path, urls, server, number_sample_per_shard=2), shards=[1])
    before = len(server.log)
    run(make(tmp_path, urls, server, number_sample_per_shard=2))
    assert len(server.log) == before + 2
    files = {path: path.read_bytes() for path in (tmp_path / "ws").rglob("*") if path.is_file()}
    rows = run(make(tmp_path, urls, server, number_sample_per_shard=2, thread_count=3))
    assert len(server.log) == before + 2
    assert files == {path: path.read_bytes() for path in (tmp_path / "ws").rglob("*") if path.is_file()}
    assert [row["url"] for row in rows] == urls
    with pytest.raises(UserError, match="image_size"):
        make(tmp_path, urls, server, number_sample_per_shard=2, image_size=99).begin()
    with pytest.raises(UserError, match="url_list"):
        make(tmp_path, [*urls, urls[0]], server, number_sample_per_shard=2).begin()


@needs_img2dataset
def test_two_datasets_with_the_same_keys_do_not_collide(tmp_path, server):
    urls = [server.url("good")] * 3
    rows = run(make(tmp_path, urls, server, dataset="one")) + run(make(tmp_path, urls, server, dataset="two"))
    assert [row["key"] for row in rows[:3]] == [row["key"] for row in rows[3:]]
    assert len({row["image_id"] for row in rows}) == 6


@needs_img2dataset
def test_a_killed_child_costs_no_row(tmp_path, server):
    urls = [server.url("good")] * 8 + [server.url("held")] + [server.url("good")] * 3
    stage = make(tmp_path, urls, server, total_timeout=20.0, timeout=20.0)
    stage.setup()
    server.hold.clear()

    def kill():
        while server.log.count("/held") < 1 or len(server.log) < 12:
            time.sleep(0.02)
        time.sleep(2.0)  # for the other answers to arrive, on a busy machine too
        os.kill(shared_worker().pid, signal.SIGKILL)
        server.hold.set()

    server.log.clear()
    killer = threading.Thread(target=kill)
    killer.start()
    rows = run(stage)
    killer.join()
    assert [row["failure"] for row in rows] == [None] * 12
    assert server.log.count("/held") == 2
    # What the first child had answered was kept: fewer requests than twice the list.
    assert len(server.log) < 24


# A child that speaks the same frames and does what each URL says; its start costs nothing.
PUPPET = """
import os, sys, time
sys.path[:] = __import__("json").loads(sys.argv[1])
from capfilt.stages.download import wire
out = os.dup(1)
send = lambda *frame: os.write(out, wire.pack(*frame))
send({"ready": "0"})
while True:
    rows = wire.unpack(sys.stdin.buffer.read)[0]["rows"]
    for row, url in rows:
        if url == "exit":
            print("its last words", file=sys.stderr, flush=True)
            os._exit(7)
        send({"begin": row})
        if url == "poison":
            os.kill(os.getpid(), 11)
        if url == "hang":
            time.sleep(60)
        send({"row": row, "status": "success"}, b"x" * 100_000)
    send({"done": len(rows)})
"""

PLAIN = Settings.of(
    {
        **{field.name: getattr(DownloadOptions(url_list="x"), field.name, "") for field in fields(Settings)},
        "timeout": 0.1,
        "total_timeout": 0.1,
    }
)


@pytest.fixture
def puppet(monkeypatch):
    monkeypatch.setattr(
        "capfilt.stages.download.worker.command",
        lambda path: [sys.executable, "-S", "-c", PUPPET, json.dumps(path)],
    )
    worker = Worker()
    yield worker
    worker.close()


def failures(answers):
    return [answers[row].columns.get("failure") for row in sorted(answers)]


def test_a_picture_that_kills_its_child_costs_only_itself(puppet):
    rows = list(enumerate(["ok", "poison", "ok", "ok", "poison", "ok"]))
    answers = puppet.run(rows, PLAIN)
    assert failures(answers) == [None, "worker_died", None, None, "worker_died", None]
    assert "exit status -11" in answers[1].columns["error_message"]
    assert answers[5].picture == b"x" * 100_000


def test_a_child_that_keeps_dying_leaves_failed_rows(puppet):
    answers = puppet.run(list(enumerate(["ok", "exit", "ok"])), PLAIN)
    assert failures(answers) == [None, "worker_died", "worker_died"]
    assert "exit status 7: its last words" in answers[1].columns["error_message"]
    assert failures(puppet.run([(0, "ok")], PLAIN)) == [None]


def test_a_slice_costs_a_bounded_number_of_children(puppet):
    answers = puppet.run([(row, "poison") for row in range(40)], PLAIN)
    assert failures(answers) == ["worker_died"] * 40


def test_a_child_that_hangs_is_replaced(puppet, monkeypatch):
    monkeypatch.setattr(Settings, "longest_silence", 0.5)
    start = time.monotonic()
    assert failures(puppet.run(list(enumerate(["ok", "hang", "ok"])), PLAIN)) == [None, "worker_died", None]
    assert time.monotonic() - start < 10


def test_a_child_that_never_starts_ends_the_run(puppet, monkeypatch):
    monkeypatch.setattr(
        "capfilt.stages.download.worker.command",
        lambda path: [sys.executable, "-S", "-c", "raise SystemExit('broken')"],
    )
    with pytest.raises(RunError, match=r"does not start \(exit status 1: broken\)"):
        puppet.run([(0, "ok")], PLAIN)


def test_a_child_does_not_outlive_its_parent():
    code = (
        "from capfilt.stages.download.worker import shared_worker; import os\n"
        "shared_worker().start(); print(shared_worker().pid, flush=True); os.kill(os.getpid(), 9)"
    )
    parent = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout)
    until = time.monotonic() + 30
    while time.monotonic() < until and Path(f"/proc/{child}/stat").exists():
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()


@needs_img2dataset
def test_retries_are_for_what_may_pass(tmp_path, server):
    urls = [server.url(path) for path in ("flaky/a", "busy/b", "404", "cut")]
    server.log.clear()
    start = time.monotonic()
    rows = run(make(tmp_path, urls, server, retries=1))
    assert [row["failure"] for row in rows] == [None, None, "not_found", "truncated"]
    assert Counter(server.log) == {"/flaky/a": 2, "/busy/b": 2, "/404": 1, "/cut": 1}
    assert time.monotonic() - start >= 1.0  # Retry-After


@needs_img2dataset
def test_captions_and_columns_come_through_character_for_character(tmp_path, server):
    texts = [
        'He said "hi",\nthen\tleft; ',
        "",
        None,
        "日本語 🙂 \u202e",
        " lead and trail ",
        "a\0b",
        "1.0",
        "x" * 20_000,
    ]
    url = server.url("404")
    licences = ["CC BY", None, *["CC0"] * 6]
    listing = tmp_path / "urls.parquet"
    table = pa.table(
        {
            "URL": pa.array([url] * 8, pa.large_string()),
            "TEXT": pa.array(texts, pa.large_string()),
            "similarity": pa.array([0.5, None, *range(6)], pa.float32()),
            "license": licences,
        }
    )
    pq.write_table(table, listing, row_group_size=3)
    options = DownloadOptions(
        url_list=str(listing), url_col="URL", caption_col="TEXT", number_sample_per_shard=5,
        save_additional_columns=("similarity", "license"), allow_host=(f"127.0.0.1:{server.port}",),
    )  # fmt: skip
    stage = Download(options, Workspace(tmp_path / "ws"))
    rows = run(stage)
    assert [row["captions"] for row in rows] == [[] if text is None else [text] for text in texts]
    assert [row["license"] for row in rows] == licences
    assert [row["similarity"] for row in rows] == [0.5, None, *range(6)]
    assert stage.output.read(0).schema.field("similarity").type == pa.float32()
    assert [stage.expected_rows(shard) for shard in stage.shards()] == [5, 3]


@needs_img2dataset
def test_a_stage_travels_to_a_worker(tmp_path, server):
    stage = pickle.loads(pickle.dumps(make(tmp_path, [server.url("404")] * 3, server)))
    assert [row["failure"] for row in run(stage)] == ["not_found"] * 3


# -- options --------------------------------------------------------------------------------------------------------


@needs_img2dataset
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"url_list": "nowhere.csv"}, "--url-list nowhere.csv"),
        ({"url_list": ""}, "--url-list must be given"),
        ({"dataset": "a/b"}, "--dataset 'a/b'"),
        ({"url_list": "nosuch://bucket/urls.csv"}, "cannot be read"),
        ({"url_col": "URL"}, "--url-col"),
        ({"caption_col": "TEXT"}, "--caption-col ''"),
        ({"save_additional_columns": ("nope",)}, "--save-additional-columns"),
        ({"save_additional_columns": ("width",)}, "rename it"),
        ({"input_format": "xml"}, "--input-format"),
        ({"resize_mode": "stretch"}, "--resize-mode"),
        ({"encode_format": "avif"}, "--encode-format"),
        ({"encode_format": "png"}, "0 to 9"),
        ({"encode_quality": 101}, "--encode-quality"),
        ({"image_size": 0}, "--image-size"),
        ({"number_sample_per_shard": 0}, "--number-sample-per-shard"),
        ({"timeout": 0.0}, "--timeout"),
        ({"retries": -1}, "--retries"),
        ({"max_aspect_ratio": 0.5}, "--max-aspect-ratio"),
        ({"allow_host": ("localhost",)}, "--allow-host 'localhost'"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_written(tmp_path, change, words):
    (tmp_path / "urls.csv").write_text("url,caption\nhttp://example.com/x.jpg,a text\n")
    options = replace(DownloadOptions(url_list=str(tmp_path / "urls.csv")), **change)
    with pytest.raises(UserError) as caught:
        Download(options, Workspace(tmp_path / "ws"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ws").exists()


def test_a_missing_engine_is_named(tmp_path, monkeypatch):
    (tmp_path / "urls.txt").write_text("http://example.com/x.jpg\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'capfilt\[img2dataset\]'"):
        Download(DownloadOptions(url_list=str(tmp_path / "urls.txt")), Workspace(tmp_path / "ws"))


# -- lists ----------------------------------------------------------------------------------------------------------


def read_all(path, extra=(), rows=2, **options):
    listing = pickle.loads(pickle.dumps(open_list(str(path), "auto", Layout(), extra, rows)))
    slices = [listing.read(number) for number in range(-(-listing.rows // rows))]
    urls = [url for each in slices for url in each.urls]
    captions = [texts for each in slices for texts in each.captions]
    faults = [fault for each in slices for fault in each.faults]
    assert len(urls) == len(captions) == len(faults) == listing.rows
    return urls, captions, faults, slices


def test_txt_is_a_url_per_line(tmp_path):
    path = tmp_path / "u.txt"
    path.write_bytes(b"\xef\xbb\xbfhttp://a/1,2.jpg\r\n\n  http://a/3.jpg \nhttp://a/\xff.jpg")
    urls, captions, _, _ = read_all(path)
    assert urls == ["http://a/1,2.jpg", "http://a/3.jpg", "http://a/\ufffd.jpg"]
    assert captions == [[], [], []]


def test_csv_quotes_and_tsv_does_not(tmp_path):
    csv, tsv = tmp_path / "u.csv", tmp_path / "u.tsv"
    csv.write_bytes(b'url,caption,n\r\nu1,"a ""b"",\nc",1\r\n\r\nu2,,\nu3,too,many,commas\nu4\n')
    urls, captions, faults, slices = read_all(csv, extra=("n",))
    assert urls == ["u1", "u2", None, "u4"]
    assert captions == [['a "b",\nc'], [""], [], []]
    assert faults == [None, None, "the line has 4 fields, the header 3", None]
    assert pa.concat_tables(each.extra for each in slices)["n"].to_pylist() == ["1", "", None, None]
    tsv.write_bytes(b'caption\turl\n"Quoted" he said\tu1\n"open\tu2\n')
    assert read_all(tsv)[:2] == (["u1", "u2"], [['"Quoted" he said'], ['"open']])


def test_jsonl_and_json(tmp_path):
    lines = [
        '{"url": "u1", "caption": "a\\ud83d b", "n": 1, "tags": ["x"]}',
        "not json",
        "",
        '{"url": 5, "caption": ["one", null, "two"], "n": 2.5}',
        "[1]",
        '{"caption": null, "tags": "y"}',
    ]
    path = tmp_path / "u.jsonl"
    path.write_text("\n".join(lines))
    urls, captions, faults, slices = read_all(path, extra=("n", "tags"))
    assert urls == ["u1", None, "5", None, None]
    assert captions == [["a\ufffd b"], [], ["one", "two"], [], []]
    assert [fault is None for fault in faults] == [True, False, True, False, True]
    extra = pa.concat_tables(each.extra for each in slices)
    assert extra["n"].to_pylist() == [1.0, None, 2.5, None, None]
    assert extra["tags"].to_pylist() == ['["x"]', None, None, None, "y"]

    path = tmp_path / "u.json"
    path.write_text('[{"url": "u1", "caption": "x"}, 3, {"url": "u2"}]')
    assert read_all(path)[0] == ["u1", None, "u2"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("u.json", b'{"url": 1}', "not an array"),
        ("u.json", b"[", "is not JSON"),
        ("u.jsonl", b"<html>\n", "is not JSON"),
        ("u.csv", b"", "is empty"),
        ("u.parquet", b"PAR1 no", "not a Parquet file"),
        ("u.list", b"http://a\n", "--input-format"),
    ],
)
def test_a_broken_list_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        open_list(str(tmp_path / name), "auto", Layout(), (), 10)
    assert str(tmp_path / name) in str(caught.value)


TEXTS = st.text(st.characters(exclude_characters="\r\n\t\0", exclude_categories=("Cs",)), max_size=30)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=12), st.integers(1, 5))
def test_slices_of_any_size_are_the_list(tmp_path_factory, pairs, rows):
    """Independent writers: csv and pyarrow. A record is found by its offset, whatever quotes and newlines it has."""
    import csv

    directory = tmp_path_factory.mktemp("lists")
    pairs = [(f"u{url}", text) for url, text in pairs]
    with (directory / "u.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("url", "caption"), *((url, f"{text}\n,") for url, text in pairs)])
    assert read_all(directory / "u.csv", rows=rows)[:2] == (
        [u for u, _ in pairs],
        [[f"{t}\n,"] for _, t in pairs],
    )
    pq.write_table(
        pa.table({"url": [u for u, _ in pairs], "caption": [t for _, t in pairs]}),
        directory / "u.parquet",
        row_group_size=2,
    )
    assert read_all(directory / "u.parquet", rows=rows)[:2] == (
        [u for u, _ in pairs],
        [[t] for _, t in pairs],
    )


# -- addresses and the opener ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1", "loopback"),
        ("127.255.255.254", "loopback"),
        ("10.1.2.3", "private"),
        ("172.31.0.1", "private"),
        ("192.168.1.1", "private"),
        ("100.100.100.200", "carrier-grade NAT"),
        ("169.254.169.254", "link-local"),
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
        ("64:ff9b::169.254.169.254", "link-local"),
        ("64:ff9b::8.8.8.8", None),
        ("2002:7f00:1::", "loopback"),
        ("fd00:ec2::254", "private"),
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
    monkeypatch.setattr("capfilt.stages.download.opener._resolve", resolve)
    monkeypatch.setattr(
        "capfilt.stages.download.opener._Socket.connect",
        lambda self, address: connected.append(address) or (_ for _ in ()).throw(ConnectionRefusedError()),
    )
    opener = SafeOpener(limits=Limits(timeout=1, total_timeout=2))
    for _ in range(2):
        with pytest.raises(Fault) as caught:
            opener.open(f"http://rebinding.example:{server.port}/good")
        assert caught.value.failure == "connection"
    assert asked == ["rebinding.example"]
    assert connected == [("8.8.8.8", server.port)] * 2


def test_a_name_server_without_an_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("capfilt.stages.download.opener._resolve", lambda host: time.sleep(3))
    start = time.monotonic()
    with pytest.raises(Fault) as caught:
        SafeOpener(limits=Limits(timeout=0.2, total_timeout=1)).open("http://slow.example/")
    assert caught.value.failure == "dns"
    assert time.monotonic() - start < 1


def test_proxies_of_the_environment_are_not_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    opener = SafeOpener(AddressPolicy.of([f"127.0.0.1:{server.port}"], False))
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
    opener = SafeOpener(AddressPolicy.of([f"localhost:{port}"], False), Limits(2, 3))
    with pytest.raises(Fault) as caught:
        opener.open(f"https://localhost:{port}/")
    listener.close()
    assert caught.value.failure == "connection"
    assert caught.value.message.startswith("TLS")


@needs_img2dataset
def test_a_real_list_without_a_network_ends_with_clear_rows(tmp_path, shared_data):
    """On a machine with a network this would fetch strangers' pictures, so names are made unresolvable."""
    table = pq.read_table(shared_data / "web" / "urls.parquet").slice(0, 100)
    urls = [
        f"http://{i}.invalid/" + (urlsplit(url).path or "/") for i, url in enumerate(table["url"].to_pylist())
    ]
    start = time.monotonic()
    rows = run(make(tmp_path, urls))
    assert {row["failure"] for row in rows} == {"dns"}
    assert [row["url"] for row in rows] == urls
    assert time.monotonic() - start < 20
