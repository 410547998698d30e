"""Would catch: a URL without a row, a row out of order, a request that reaches a private address, a picture stored turned or
miscoloured, a second run that asks again, a wrong option that is found out late.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import pickle
import socket
import time
from collections import Counter
from dataclasses import replace
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_stage
from capfilt.stages.download import DownloadOptions
from capfilt.stages.download.stage import Download
from capfilt.stages.duplicates import DuplicatesOptions
from capfilt.stages.duplicates.stage import Duplicates
from capfilt.tables.contracts import FAILURES, IMAGES, STATUSES
from capfilt.tables.workspace import Workspace
from tests.refusals import refused
from tests.stages.download.web import (
    BODIES,
    Server,
    encoded,
    make,
    needs_img2dataset,
    picture,
    redirect,
    run,
)


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
        (here("deep-colour"), None),
        (here("grey-alpha"), None),
        (here("palette"), None),
        (here("see-through"), None),
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
        (here("rescanned"), "decode_error"),
        (here("tiny"), "too_small"),
        (here("strip"), "bad_aspect_ratio"),
        (here("bomb"), "too_many_pixels"),
        (here("giant"), "too_many_pixels"),
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
        f"{shard * 100 + i:07d}" for shard in (0, 1) for i in range((40, 22)[shard])
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
    assert np.allclose(pixel("grey-alpha", 0.5, 0.5), (255, 255, 255), atol=2)
    assert np.allclose(pixel("palette", 0.2, 0.5), (220, 20, 20), atol=12)
    assert np.allclose(pixel("palette", 0.8, 0.5), (20, 20, 220), atol=12)
    assert np.allclose(pixel("see-through", 0.2, 0.5), (255, 255, 255), atol=12)
    assert np.allclose(pixel("see-through", 0.8, 0.5), (20, 20, 220), atol=12)
    assert np.allclose(pixel("deep-colour", 0.5, 0.5), (156, 39, 234), atol=5)
    with Image.open(io.BytesIO(by_name["gif"]["image"]["bytes"])) as still:
        wanted = picture().quantize(256).convert("RGB")
        assert np.abs(np.asarray(still, float) - np.asarray(wanted, float)).mean() < 8
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
    with refused("image_size"):
        make(tmp_path, urls, server, number_sample_per_shard=2, image_size=99).begin()
    with refused("url_list"):
        make(tmp_path, [*urls, urls[0]], server, number_sample_per_shard=2).begin()


@needs_img2dataset
def test_two_datasets_with_the_same_keys_do_not_collide(tmp_path, server):
    urls = [server.url("good")] * 3
    rows = run(make(tmp_path, urls, server, dataset="one")) + run(make(tmp_path, urls, server, dataset="two"))
    assert [row["key"] for row in rows[:3]] == [row["key"] for row in rows[3:]]
    assert len({row["image_id"] for row in rows}) == 6


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
        ({"url_list": "nowhere.csv"}, "nowhere.csv list"),
        ({"url_list": ""}, "URL_LIST"),
        ({"dataset": "a/b"}, "--dataset 'a/b'"),
        ({"url_list": "nosuch://bucket/urls.csv"}, "nosuch://bucket/urls.csv"),
        ({"url_col": "link"}, "--url-col"),
        ({"caption_col": "TEXT"}, "--caption-col ''"),
        ({"save_additional_columns": ("nope",)}, "--save-additional-columns"),
        ({"save_additional_columns": ("width",)}, "column width"),
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
    options = DownloadOptions(url_list=str(tmp_path / "urls.csv"))
    with refused(words):
        Download(replace(options, **change), Workspace(tmp_path / "ws"))
    assert not (tmp_path / "ws").exists()


def test_a_missing_engine_is_named(tmp_path, monkeypatch):
    (tmp_path / "urls.txt").write_text("http://example.com/x.jpg\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("capfilt[img2dataset]"):
        Download(DownloadOptions(url_list=str(tmp_path / "urls.txt")), Workspace(tmp_path / "ws"))


@needs_img2dataset
def test_a_format_that_the_name_tells_may_be_named(tmp_path):
    """Would catch: a part refused, or fetched again, for --input-format csv with a file that is called .csv.gz."""
    (tmp_path / "urls.csv.gz").write_bytes(gzip.compress(b"url,caption\nhttp://example.com/x.jpg,a text\n"))
    (tmp_path / "urls").write_bytes(b"url,caption\nhttp://example.com/x.jpg,a text\n")
    made = DownloadOptions(url_list=str(tmp_path / "urls.csv.gz"))
    for name, then, now in (("a", "auto", "csv"), ("b", "csv", "auto"), ("c", "csv", "csv")):
        first = Download(replace(made, dataset=name, input_format=then), Workspace(tmp_path)).begin()
        assert Download(replace(made, dataset=name, input_format=now), Workspace(tmp_path)).begin() == first
        with refused("input_format"):
            Download(replace(made, dataset=name, input_format="txt"), Workspace(tmp_path)).begin()
    # Of a file whose name does not tell, it is what was named.
    other = replace(made, url_list=str(tmp_path / "urls"), dataset="d", input_format="csv")
    Download(other, Workspace(tmp_path)).begin()
    with refused("identity"):
        Download(replace(other, input_format="txt"), Workspace(tmp_path)).begin()


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


@needs_img2dataset
def test_copies_are_found_by_what_was_stored_of_them(tmp_path, server, monkeypatch):
    """Re-encoded, resized, in another format; downloaded larger and smaller than the stored size."""
    blocks = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8))
        for seed in (1, 2)
    ]
    one, other = (each.resize((800, 600), Image.Resampling.BICUBIC) for each in blocks)
    copies = [
        encoded(one, quality=95), encoded(one, quality=40), encoded(one.resize((500, 375))), encoded(one.resize((160, 120))),
        encoded(one.resize((400, 300)), "PNG"), encoded(other, quality=95),
    ]  # fmt: skip
    for number, body in enumerate(copies):
        monkeypatch.setitem(BODIES, f"copy-{number}", body)
    for mode in ("keep_ratio", "center_crop"):
        urls = [server.url(f"copy-{number}") for number in range(6)]
        rows = run(make(tmp_path, urls, server, dataset=mode, name=mode, resize_mode=mode))
        stage = Duplicates(DuplicatesOptions(images=mode, out=mode), Workspace(tmp_path / "ws"))
        run_stage(stage, InlineExecutor(), quiet=True)
        found = {
            row["image_id"]: row["cluster"] for table in stage.output.tables() for row in table.to_pylist()
        }
        clusters = [found[row["image_id"]] for row in rows]
        assert len(set(clusters[:5])) == 1, mode
        assert clusters[5] != clusters[0]
