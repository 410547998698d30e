"""The stages whose fingerprints must not move, over inputs that are the same bytes on every machine.

The parts of `tests/fixtures/workspace-2` are what these stages wrote: `make.py --fixtures` runs them, the tests compare.
"""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from capfilt.stages.base import ShardStage
from capfilt.stages.caption import CaptionOptions
from capfilt.stages.caption.stage import CaptionStage
from capfilt.stages.download import DownloadOptions
from capfilt.stages.download.stage import Download
from capfilt.stages.duplicates import DuplicatesOptions
from capfilt.stages.duplicates.stage import Duplicates
from capfilt.stages.examples import ExamplesOptions
from capfilt.stages.examples.stage import Examples
from capfilt.stages.ingest import IngestOptions
from capfilt.stages.ingest.stage import Ingest
from capfilt.stages.score import ScoreOptions
from capfilt.stages.score.stage import ScoreStage
from capfilt.stages.select import SelectOptions
from capfilt.stages.select.stage import Select, WritePairs
from capfilt.stages.subset import SubsetOptions
from capfilt.stages.subset.stage import Subset
from capfilt.tables.workspace import Workspace
from tests.golden.families import SIZE

HOST, PORT = "127.86.4.21", 18621
"""Of the local server: its address is in the list of URLs, so in a fingerprint."""

TEXTS = (
    "a red square",
    "two blue circles on a square",
    "green left",
    "a white square",
    "two circles",
    "red on white",
)


def png(number: int, size: int = SIZE) -> bytes:
    """A picture of noise. No compressor made it, so its bytes are the same whatever library there is."""
    noise = random.Random(number)
    lines = b"".join(b"\0" + noise.randbytes(3 * size) for _ in range(size))
    length = len(lines).to_bytes(2, "little")
    stored = b"\x78\x01\x01" + length + bytes(255 - byte for byte in length) + lines
    header = size.to_bytes(4, "big") * 2 + bytes((8, 2, 0, 0, 0))
    chunks = ((b"IHDR", header), (b"IDAT", stored + zlib.adler32(lines).to_bytes(4, "big")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in chunks
    )


BODIES: Mapping[str, bytes] = {
    "1.png": png(11),
    "2.png": png(12, 24),
    "page.html": b"<!doctype html><title>no</title>",
}
"""What the local server has."""


@contextlib.contextmanager
def server() -> Iterator[None]:
    """BODIES, served at HOST and PORT; waits for another test run that holds the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = BODIES.get(self.path[1:])
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: Any) -> None:
            pass

    end = time.monotonic() + 60
    while True:
        try:
            web = http.server.ThreadingHTTPServer((HOST, PORT), Handler)
            break
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        web.shutdown()
        web.server_close()


def write_sources(folder: Path) -> None:
    """What ingest, download and examples read: a folder of pictures, a list of URLs, questions."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    # The fifth shows what the first shows; the sixth is broken, the seventh is not there.
    for number, picture in enumerate((1, 2, 3, 4, 1)):
        (pictures / f"{number}.png").write_bytes(png(picture))
    (pictures / "5.png").write_bytes(png(5)[:200])
    lines = ["file_name,text,license,split,camera"]
    lines += [f"{number}.png,{TEXTS[number % len(TEXTS)]},CC0,train,{number}" for number in range(7)]
    (pictures / "metadata.csv").write_text("\n".join(lines) + "\n")
    urls = [f"http://{HOST}:{PORT}/{name}" for name in (*BODIES, "gone.png")] + ["ftp://example.org/1.png"]
    listed = ["url,caption,page"] + [
        f"{url},{text},{url[-3:]}" for url, text in zip(urls, TEXTS, strict=False)
    ]
    (folder / "urls.csv").write_text("\n".join(listed) + "\n")
    asked = [
        {
            "image": "0.png",
            "question": "red or blue?",
            "answers": ["red"] * 6 + ["Blue."] * 4,
            "split": "train",
        },
        {"image": "3.png", "question": "how many circles?", "answers": ["two"] * 10, "split": "val"},
        {"image": "nowhere.png", "question": "what is there?", "answers": ["no"], "split": "train"},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))


RULE = {"images": "web", "captions": ("blip",), "scores": "blip"}
WRITTEN = {"captioner": "blip", "images": "web", "prompt": "a red", "max_new_tokens": 5, "batch_size": 4}
FP32 = {"precision": "fp32"}

STAGES: Mapping[str, Callable[[Workspace, Path], ShardStage]] = {
    "ingest": lambda ws, folder: Ingest(
        IngestOptions(
            source_path=str(folder / "pictures"), dataset="web", source="web", shard_size=4,
            save_additional_columns=("camera",),
        ),
        ws,
    ),
    "download": lambda ws, folder: Download(
        DownloadOptions(
            url_list=str(folder / "urls.csv"), dataset="downloaded", number_sample_per_shard=3, image_size=32,
            resize_mode="keep_ratio", resize_only_if_bigger=True, encode_format="png", encode_quality=9,
            save_additional_columns=("page",), allow_host=(f"{HOST}:{PORT}",), timeout=5.0, total_timeout=10.0, retries=0,
        ),
        ws,
    ),
    "caption": lambda ws, _: CaptionStage(CaptionOptions(**WRITTEN, **FP32, samples=2, seed=3, out="blip"), ws),
    "caption by beams": lambda ws, _: CaptionStage(CaptionOptions(**WRITTEN, **FP32, method="beam", out="beams"), ws),
    "score": lambda ws, _: ScoreStage(
        ScoreOptions(filter="blip", images="web", captions=("blip",), batch_size=4, out="blip", **FP32), ws
    ),
    "duplicates": lambda ws, _: Duplicates(DuplicatesOptions(images="web"), ws),
    "select": lambda ws, _: Select(SelectOptions(**RULE, threshold=0.18, out="capfilt"), ws),
    "select-pairs": lambda ws, _: WritePairs(SelectOptions(**RULE, threshold=0.18, out="capfilt"), ws),
    "select a share": lambda ws, _: Select(SelectOptions(**RULE, keep_fraction=0.5, by="itc_score", out="share"), ws),
    "subset": lambda ws, _: Subset(
        SubsetOptions(images="web", dataset="noisy", share_to=0.9, wrong=0.3, truncated=0.3, file_name=0.2, seed=1), ws
    ),
    "examples": lambda ws, folder: Examples(
        ExamplesOptions(source_path=str(folder / "questions.jsonl"), dataset="questions", images=("web",)), ws
    ),
}  # fmt: skip
"""In an order in which each finds what it reads."""


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the pixels of its picture in the place of its bytes, which an encoder's version decides."""
    image = row.get("image")
    if image and image["bytes"]:
        with Image.open(io.BytesIO(image["bytes"])) as opened:
            image = [image["path"], opened.format, opened.size, opened.convert("RGB").tobytes()]
    return {**row, "image": image} if "image" in row else row
