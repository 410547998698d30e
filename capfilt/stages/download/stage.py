"""The `download` stage: one slice of the list of URLs becomes one shard of an images part.

Fetching and resizing happen in a child process (`worker.py`); here is what goes in and how rows come out.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from capfilt.errors import UserError
from capfilt.formats.values import check_further
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.download import DownloadOptions
from capfilt.stages.download.addresses import AddressPolicy
from capfilt.stages.download.lists import Slice, as_text, open_list
from capfilt.stages.download.presets import layout
from capfilt.stages.download.rows import answered, counts_of, stats_of
from capfilt.stages.download.settings import settings_of
from capfilt.stages.download.tally import DownloadTally
from capfilt.stages.download.worker import MISSING, close_shared_worker, failed, shared_worker
from capfilt.tables.contracts import IMAGES
from capfilt.tables.ids import image_id
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace

WITHOUT = ("thread_count",)
"""Options that change no row: how many fetches are in flight changes the order of answers, which are put back in order."""

SHARD_DIGITS = 5
"""Digits of the shard's number in a key (img2dataset's `oom_shard_count`)."""


class Fetching(ShardStage):
    """What fetches share: the child process they have it done in, and how they are watched."""

    name = "download"
    version = 3
    contract = IMAGES
    rows_per_second = 100.0
    options: DownloadOptions

    def most_workers(self) -> int | None:
        # Each has a share of the connections that a host is to bear, and less than one there is not.
        return self.options.host_concurrency or None

    def setup(self) -> None:
        shared_worker().start()

    def teardown(self) -> None:
        # Inline, the same process goes on to train; the child's memory is better spent there.
        close_shared_worker()

    def tally(self) -> DownloadTally:
        return DownloadTally()


class Download(Fetching):
    """Fetches a list of URLs. Every URL is one row, in the order of the list; what fails is a row that says why.

    A list's `license` column, where it is among the additional columns, fills the table's own.
    """

    def __init__(self, options: DownloadOptions, workspace: Workspace, output: Part | None = None) -> None:
        check(options)
        if importlib.util.find_spec("img2dataset") is None:
            raise UserError(MISSING)
        self.options = options
        self.output = workspace.dataset("images", options.dataset, output)
        found = layout(options.preset, options.url_col, options.caption_col)
        asked = [*options.save_additional_columns, options.license_col, options.verify_hash]
        self.list = open_list(
            options.url_list,
            options.input_format,
            found,
            [name for name in dict.fromkeys(asked) if name],
            options.number_sample_per_shard,
        )
        candidates = (options.license_col, "license", *found.license_cols)
        self.license_col = next((name for name in candidates if name and name in self.list.extra), "")
        # What only fills or checks a column of the table's own is not carried by its own name as well.
        unnamed = {*found.license_cols, options.license_col, options.verify_hash} - {
            *options.save_additional_columns
        }
        self.carried = [
            name for name in self.list.extra if name not in unnamed and name not in IMAGES.schema.names
        ]

    def identity(self) -> Mapping[str, Any]:
        options = option_values(self.options, without=WITHOUT)
        if self.output.exists:
            # A format that was named then, and is told by the names now, or the other way round, is the same list.
            made = self.output.info.get("identity", {}).get("options", {}).get("input_format")
            if {made, options["input_format"]} <= self.list.formats:
                options["input_format"] = made
        return {"options": options, "url_list": self.list.digest}

    def shards(self) -> list[int]:
        if not self.list.rows:
            raise UserError(f"{self.list.path}: has no URLs")
        return list(range(self.list.slices))

    def expected_rows(self, shard: int) -> int:
        start, stop = self.list.bounds(shard)
        return stop - start

    def process(self, shard: int) -> Produced:
        listed = self.list.read(shard)
        answers = {
            row: failed("bad_url", words) for row, words in enumerate(listed.faults) if words is not None
        }
        wanted = [(row, url) for row, url in enumerate(listed.urls) if row not in answers]
        settings = settings_of(self.options, self.workers)
        answers |= shared_worker().run(wanted, settings, self._hashes(listed))
        rows = []
        for row, url in enumerate(listed.urls):
            key = self.key(shard, row)
            rows.append(
                {
                    "image_id": image_id(self.options.dataset, key),
                    "dataset": self.options.dataset,
                    "key": key,
                    "url": url,
                    "source": "web",
                    "captions": listed.captions[row],
                    **answered(answers[row], key, self.options.encode_format),
                }
            )
        table = IMAGES.table(rows)
        if self.license_col:
            place = table.schema.get_field_index("license")
            column = as_text(listed.extra[self.license_col])
            table = table.set_column(place, table.schema.field("license"), column)
        for name in self.carried:
            column = listed.extra[name]
            table = table.append_column(pa.field(name, column.type), column)
        return Produced(table, counts_of(table), stats_of(table, answers.values()))

    def expected_hashes(self, shard: int) -> dict[int, str]:
        """The SHA-256 that bodies of a shard must have, by row; where there is none, any may come."""
        return self._hashes(self.list.read(shard))

    def _hashes(self, listed: Slice) -> dict[int, str]:
        if not self.options.verify_hash:
            return {}
        column = listed.extra[self.options.verify_hash].to_pylist()
        return {row: str(value) for row, value in enumerate(column) if value is not None}

    def key(self, shard: int, row: int) -> str:
        """img2dataset's key (its `compute_key`): the shard's number, then the row's within it, zero-padded."""
        digits = math.ceil(math.log10(self.options.number_sample_per_shard))
        return f"{10**digits * shard + row:0{digits + SHARD_DIGITS}d}"


def check(options: DownloadOptions) -> None:
    """Raise UserError for the first option that cannot be."""
    for name in ("url_col",) if options.retry else ("url_list", "url_col"):
        if getattr(options, name).strip("\0") == "":
            # The list is the one that has no flag.
            raise UserError(f"download: {'URL_LIST' if name == 'url_list' else '--url-col'} must be given")
    if options.failure and not options.retry:
        raise UserError("--failure: only with --retry failed")
    # cv2 takes PNG's number as a compression level, and img2dataset refuses levels it has not.
    if options.encode_format == "png" and options.encode_quality > 9:
        raise UserError(
            f"--encode-quality {options.encode_quality}: for png it is the compression level, give 0 to 9"
        )
    AddressPolicy.of(options.allow_host, options.allow_private)
    own = [name for name in IMAGES.schema.names if name != "license"]
    check_further(options.save_additional_columns, own)
