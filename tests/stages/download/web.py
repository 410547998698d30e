"""A server with the web's manners on the loopback, pictures for it to serve, and a stage to ask it."""

from __future__ import annotations

import contextlib
import http.server
import io
import socket
import threading
import time
import zlib
from collections import Counter
from typing import ClassVar
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capfilt.stages.download import DownloadOptions
from capfilt.stages.download.stage import Download
from capfilt.tables.workspace import Workspace

needs_img2dataset = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("img2dataset") is None, reason="img2dataset is not installed"
)


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


def see_through():
    """A palette picture whose first colour is transparent: left half that, right half blue."""
    image = Image.new("P", (64, 32), 0)
    image.putpalette([220, 20, 20, 20, 20, 220] + [0] * 762)
    image.paste(1, (32, 0, 64, 32))
    return image


def chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(width, height, depth, colour, lines):
    """A PNG whose compressed lines are `lines`; Pillow writes neither 16-bit colour nor what it would not open."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def deep_colour():
    """16 bits per channel: (40000, 10000, 60000)."""
    pixel = b"".join(value.to_bytes(2, "big") for value in (40000, 10000, 60000))
    return png(40, 30, 16, 2, zlib.compress((b"\0" + pixel * 40) * 30))


def giant():
    """50,000 x 50,000 pixels in about a megabyte, whole and valid as far as anybody reads."""
    packer = zlib.compressobj(1)
    line = bytes(6251)
    return png(
        50_000, 50_000, 1, 0, b"".join([packer.compress(line * 1000) for _ in range(50)] + [packer.flush()])
    )


def rescanned():
    """A JPEG of so many scans that decoding takes minutes where the picture is large."""
    data = encoded(picture(), progressive=True)
    last = data.rindex(b"\xff\xc4")
    return data[:-2] + data[last:-2] * 100 + data[-2:]


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
    "palette": encoded(halves().convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
    "see-through": encoded(see_through(), "PNG", transparency=0),
    "deep-colour": deep_colour(),
    "grey-alpha": encoded(Image.new("LA", (40, 30), (0, 0)), "PNG"),
    "giant": giant(),
    "cut": GOOD[: len(GOOD) // 2],
    "html": b"<!doctype html><title>404</title>" * 20,
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>',
    "empty": b"",
    "rescanned": rescanned(),
    "bomb": encoded(Image.new("1", (20_000, 20_000)), "PNG"),
}


class Server(http.server.ThreadingHTTPServer):
    """Serves BODIES by name and misbehaves at other paths; `log` has every path asked for."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, family=socket.AF_INET, host="127.0.0.1"):
        self.address_family = family
        self.log, self.asked = [], []
        self.agents = set()
        self.once = Counter()
        self.failing = False
        self.flying = self.most_flying = 0
        self.callers, self.moments = set(), []
        self.counting = threading.Condition()
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
    alias: ClassVar[dict[str, str]] = {}  # paths that answer as another does

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
        name = self.alias.get(name, name)
        self.server.log.append(self.path)
        self.server.asked.append(time.monotonic())
        self.server.agents.add(self.headers["User-Agent"])
        if self.server.failing:
            self.answer(503, b"later")
        elif name in BODIES:
            self.answer(body=BODIES[name], Content_Type="image/jpeg")
        elif name.isdigit():
            self.answer(int(name), b"no")
        elif name == "together":
            # Whoever comes first waits for the other.
            with self.server.counting:
                self.server.flying += 1
                self.server.most_flying = max(self.server.most_flying, self.server.flying)
                self.server.callers.add(rest)
                self.server.counting.notify_all()
                self.server.counting.wait_for(lambda: len(self.server.callers) > 1, 60)
                self.server.moments.append(time.monotonic())
            time.sleep(0.2)
            with self.server.counting:
                self.server.flying -= 1
            self.answer(body=GOOD)
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
        elif name == "later":
            # later/STATUS/SECONDS/...: at first that status with that Retry-After, then a picture.
            self.server.once[rest] += 1
            status, seconds, *_ = rest.split("/")
            if self.server.once[rest] > 1:
                self.answer(body=GOOD)
            else:
                self.answer(int(status), b"later", Retry_After=seconds)
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
