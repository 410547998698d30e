"""`download`: a list of URLs becomes an images part, one row per URL, failures included.

img2dataset is the engine: its `download_image` fetches and its `Resizer` resizes and encodes, in a child process.
    __init__.py   its options and its record
    stage.py      the stage: slices of the list in, rows out
    retry.py      the same for failed rows of a part that stands: a new generation of their shards
    rows.py       answers as rows, accounts and figures
    tally.py      what is told while it runs, and at the end
    lists.py      a list of URLs, a file or a folder, cut into slices; presets.py what published ones look like
    worker.py     the child process as its parent sees it: started, spoken to, replaced when it dies
    child.py      the child process from the inside; wire.py is what the two say to each other
    engine.py     what the child does with a slice: fetch, decode within limits, hand on to img2dataset
    schedule.py   which URL is fetched next, within what a host is to bear
    opener.py     what img2dataset's urllib calls really do: HTTP within limits
    rests.py      which hosts asked to be left alone (Retry-After), and for how long
    addresses.py  which addresses may be asked at all
    robots.py     what a robots.txt says; remembered.py keeps it for a while, as it does addresses
"""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.options import INPUTS, NETWORK, PICTURES, REQUIRED, ROWS, Remembering, option
from capfilt.stages.command import StageCommand
from capfilt.stages.download.presets import PRESETS

INPUT_FORMATS = ("txt", "csv", "tsv", "json", "jsonl", "parquet")
"""Formats of a list of URLs."""


@dataclass(frozen=True)
class ListOptions(Remembering):
    """Which rows a list of URLs has."""

    panel = ROWS

    url_list: str = option(
        REQUIRED,
        "list of URLs: file, folder or fsspec URL; optional with --retry",
        kind="path",
        unless="retry",
    )
    dataset: str = option("web", "name of the images part to write")
    retry: str = option(
        "",
        "failed: fetch failed rows again; other options default to those of the first run",
        told=True,
        choices=("", "failed"),
        panel=INPUTS,
    )
    failure: tuple[str, ...] = option(
        (), "with --retry: only rows with this failure; repeatable", told=True, panel=INPUTS
    )
    input_format: str = option(
        "auto", "format of the list; auto: by its name (img2dataset: txt)", choices=("auto", *INPUT_FORMATS)
    )
    preset: str = option("", "layout of a published list", later=True, choices=("", *PRESETS))
    url_col: str = option("url", "column of the URLs; case matters only between two such columns")
    caption_col: str = option("caption", "text column, else captions, text or texts; empty: none")
    save_additional_columns: tuple[str, ...] = option((), "further column of the list to keep; repeatable")
    license_col: str = option("", "column of the licences; default: license", later=True, rare=True)
    verify_hash: str = option(
        "", "column of SHA-256; a body with another fails as hash_mismatch", later=True, rare=True
    )
    # A killed run loses a shard at most, and a worker holds the pictures of a shard in memory.
    number_sample_per_shard: int = option(
        1000, "rows per shard, the unit of resume (img2dataset: 10000)", least=1, rare=True
    )


@dataclass(frozen=True)
class PictureOptions(Remembering):
    """How pictures are stored."""

    panel = PICTURES

    image_size: int = option(256, "target size in pixels", least=1)
    resize_mode: str = option(
        "keep_ratio",
        "how to resize (img2dataset: border, whose padding a model learns)",
        choices=("border", "keep_ratio", "keep_ratio_largest", "center_crop", "no"),
    )
    # Enlarging costs bytes and shows nothing more.
    resize_only_if_bigger: bool = option(
        True, "leave smaller pictures as they are (img2dataset: off)", rare=True
    )
    encode_format: str = option("jpg", "format of the stored pictures", choices=("jpg", "png", "webp"))
    encode_quality: int = option(95, "quality of the stored pictures; png: compression level, to 9", most=100)
    min_image_size: int = option(0, "a shorter side below N pixels fails as too_small")
    max_aspect_ratio: float = option(
        float("inf"), "a longer to shorter side above this fails as bad_aspect_ratio", least=1
    )
    # Some megabytes decode to gigabytes.
    max_pixels: int = option(
        64_000_000, "a larger picture fails as too_many_pixels (img2dataset: no limit)", least=1, rare=True
    )


@dataclass(frozen=True)
class NetworkOptions(Remembering):
    """How URLs are fetched."""

    panel = NETWORK

    # More of them want a DNS resolver of their own (img2dataset's README); slow hosts are worth it.
    thread_count: int = option(32, "fetches in flight per worker (img2dataset: 256)", least=1)
    timeout: float = option(10.0, "seconds a connection may be silent", above=0)
    # A byte now and then would hold a thread for ever.
    total_timeout: float = option(
        30.0, "seconds one download may take, redirects included (img2dataset: no limit)", above=0
    )
    # A host's Retry-After of up to 30 s is waited for, also by its other URLs.
    retries: int = option(0, "further attempts at a URL, after failures that may pass")
    # img2dataset has neither; a list sorted by host is otherwise an attack on that host.
    host_concurrency: int = option(0, "fetches in flight per host; 0: --thread-count per worker", later=True)
    host_rate: float = option(0.0, "URLs per second per host, over all workers; 0: no limit", later=True)
    robots: bool = option(False, "obey robots.txt (RFC 9309); a forbidden URL fails as opted_out", later=True)
    # An endless body fills the memory.
    max_bytes: int = option(
        50_000_000, "a larger body fails as too_large (img2dataset: no limit)", least=1, rare=True
    )
    # img2dataset sends the User-Agent of a browser; hosts are to know who asks.
    user_agent_token: str = option("capfilt", "name in the User-Agent and in opt-out headers", rare=True)
    disallowed_header_directives: tuple[str, ...] = option(
        ("noai", "noimageai", "noindex", "noimageindex"), "X-Robots-Tag that opts out; repeatable", rare=True
    )
    allow_host: tuple[str, ...] = option(
        (), "HOST:PORT that may have a private address; repeatable; '' for none", rare=True
    )
    allow_private: bool = option(False, "allow private and loopback addresses, for intranets", rare=True)


@dataclass(frozen=True)
class DownloadOptions(NetworkOptions, PictureOptions, ListOptions):
    """Fetch a list of URLs into an images part. Every URL is one row, failures included.

    Flag names and defaults are img2dataset's (its README, "API"); where one is another, its help says why.
    """


COMMAND = StageCommand(
    ("download",),
    DownloadOptions,
    ("capfilt.stages.download.stage:Download",),
    (
        "capfilt download urls.parquet --dataset cc12m --image-size 384",
        "capfilt download urls.tsv --url-col URL --caption-col TEXT --out images/laion",
        "capfilt download s3://bucket/laion/ --preset laion --robots --host-rate 2 --retries 2",
        "capfilt download --dataset cc12m --retry failed --failure timeout --failure dns --timeout 30",
    ),
    positional="url_list",
    out=True,
    instead=("retry", "capfilt.stages.download.retry:Retry"),
)
