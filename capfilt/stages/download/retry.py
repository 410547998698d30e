"""`download --retry failed`: the failed rows of a part that stands are fetched again, as a new generation of their shards.

What a generation is, and that none replaces another, is `capfilt/tables/shards.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import pyarrow as pa

from capfilt.errors import UserError
from capfilt.options import REQUIRED
from capfilt.stages.base import Produced
from capfilt.stages.download import DownloadOptions
from capfilt.stages.download.rows import ANSWERED, answered, counts_of, stats_of
from capfilt.stages.download.settings import settings_of
from capfilt.stages.download.stage import WITHOUT, Download, Fetching, check
from capfilt.stages.download.worker import shared_worker
from capfilt.tables.contracts import DOWNLOAD_FAILURES, IMAGE_FAILURES
from capfilt.tables.manifest import Manifest, Successor
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace

FETCHING = (
    "timeout", "total_timeout", "retries", "host_concurrency", "host_rate", "robots", "max_bytes", "max_pixels",
    "user_agent_token", "allow_host", "allow_private",
)  # fmt: skip
"""Options that a retry may give otherwise than the part was made with: they decide whether a row succeeds, and nothing
of what it then looks like. Each generation's manifest names those that changed."""


class Retry(Fetching):
    """Fetches failed rows again. A shard in which no row's outcome changed keeps its generation.

    URLs are the part's, and so are all options that are not given (on the command line, in a recipe, or to
    `DownloadOptions`); one that shapes rows cannot be given otherwise. A row whose body came once keeps what is known of
    it where the retry gets no body.
    """

    def __init__(self, options: DownloadOptions, workspace: Workspace, output: Part | None = None) -> None:
        known = (*DOWNLOAD_FAILURES, *IMAGE_FAILURES)
        for failure in options.failure:
            if failure not in known:
                raise UserError(f"--failure {failure!r}: choose {', '.join(known)}")
        check(options)
        self.output = workspace.dataset("images", options.dataset, output)
        self.output.expect("images")
        identity = self.output.info.get("identity", {})
        if self.output.info.get("stage") != self.name or identity.get("version") != self.version:
            raise UserError(f"{self.output.path}: was not written by this version of `capfilt download`")
        self.failures = frozenset(options.failure or known)
        self.options, self.changed = _merged(options, identity["options"], self.output)
        self.list = self._list(options, workspace, identity["url_list"])

    def outputs(self) -> list[Part]:
        return []

    def _list(self, options: DownloadOptions, workspace: Workspace, digest: str) -> Download | None:
        if options.url_list in (REQUIRED, ""):
            if self.options.verify_hash:
                raise UserError(
                    f"--retry: {self.output.path} was made with --verify-hash {self.options.verify_hash}; name the list, "
                    "which has the hashes"
                )
            return None
        download = Download(
            replace(self.options, url_list=options.url_list, retry="", failure=()), workspace, self.output
        )
        if download.list.digest != digest:
            raise UserError(
                f"{options.url_list}: {self.output.path} was made from another list; leave it out"
            )
        return download

    def identity(self) -> Mapping[str, Any]:
        return dict(self.output.info["identity"])

    def shards(self) -> list[int]:
        return self.output.shards()

    def plan(self) -> None:
        return None  # as the download planned it

    def renews(self, manifest: Manifest) -> bool:
        return any(rows for failure, rows in manifest.counts.failed.items() if failure in self.failures)

    def expected_rows(self, shard: int) -> int:
        manifest = self.output.manifest(shard)
        failed = manifest.counts.failed if manifest else {}
        return sum(rows for failure, rows in failed.items() if failure in self.failures)

    def process(self, shard: int) -> Produced:
        manifest = self.output.manifest(shard)
        if manifest is None:
            raise UserError(f"{self.output.path}: shard {shard:05d} is gone")
        table = self.output.read(shard)
        urls, keys = table["url"].to_pylist(), table["key"].to_pylist()
        old = table["failure"].to_pylist()
        # A row without a URL has nothing to ask for, and knows best why.
        wanted = [
            (row, urls[row]) for row, why in enumerate(old) if why in self.failures and urls[row] is not None
        ]
        hashes = self.list.expected_hashes(shard) if self.list is not None else {}
        answers = shared_worker().run(wanted, settings_of(self.options, self.workers), hashes)
        came = table["sha256"].to_pylist()
        new = {
            row: answered(answer, keys[row], self.options.encode_format)
            for row, answer in answers.items()
            # Of a body that came once, a fetch that brings none knows less.
            if answer.columns.get("sha256") is not None or came[row] is None
        }
        if all(old[row] == columns["failure"] for row, columns in new.items()):
            same = Successor(manifest.generation, manifest.previous, manifest.changed)
            return Produced(table, manifest.counts, successor=same)
        for name in ANSWERED:
            values = table[name].to_pylist()
            for row, columns in new.items():
                values[row] = columns[name]
            place = table.schema.get_field_index(name)
            table = table.set_column(
                place, table.schema.field(name), pa.array(values, table.schema.field(name).type)
            )
        after = Successor(manifest.generation + 1, manifest.sha256, self.changed)
        return Produced(table, counts_of(table), stats_of(table, answers.values()), after)


def _merged(
    options: DownloadOptions, made: Mapping[str, Any], part: Part
) -> tuple[DownloadOptions, dict[str, Any]]:
    """The options to fetch with, and those of them that are not the part's. Raises UserError."""
    values: dict[str, Any] = {}
    changed = {}
    for field in fields(options):
        name, value = field.name, getattr(options, field.name)
        if field.metadata["kind"] or field.metadata["told"] or name in WITHOUT:
            continue
        # The part has no value for an option that came later and was at its default.
        standing = made.get(name, field.default)
        if name == "max_aspect_ratio":
            standing = float(standing)
        standing = tuple(standing) if isinstance(field.default, tuple) else standing
        if name not in options.given or value == standing:
            values[name] = standing
        elif name in FETCHING:
            changed[name] = list(value) if isinstance(value, tuple) else value
        else:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{part.path}: was made with {flag} {standing}; a retry cannot make other rows")
    return replace(options, **values), changed
