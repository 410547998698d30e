"""What `download` tells while it runs and at its end: rates, success, why rows failed, and which hosts are worst."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from capfilt.tables.manifest import Counts, Manifest

LINES = 8
"""Failures and hosts shown at the end, each."""

_HOST_WIDTH = 48


class DownloadTally:
    """Adds up committed shards. Hosts are counted from the worst of each shard: exact for few hosts, a bound for many."""

    def __init__(self) -> None:
        self._counts = Counts(0, 0)
        self._bytes = 0
        self._hosts: dict[str, Counter[str]] = {"asked": Counter(), "failed": Counter()}

    def add(self, manifest: Manifest, stats: Mapping[str, Any]) -> None:
        """One more shard was committed."""
        self._counts = self._counts + manifest.counts
        self._bytes += int(stats.get("bytes_received") or 0)
        for host, (asked, failed) in (stats.get("hosts") or {}).items():
            self._hosts["asked"][host] += asked
            self._hosts["failed"][host] += failed

    def figures(self, seconds: float) -> Mapping[str, Any]:
        """Success rate, bytes per second, the top failure and the worst host."""
        found: dict[str, Any] = {"success": _share(self._counts.kept, self._counts.rows_in)}
        found["received"] = f"{_bytes(self._bytes / max(seconds, 1e-9))}/s"
        for failure, rows in self._failures()[:1]:
            found[failure] = _share(rows, self._counts.rows_in)
        for host, asked, failed in self._worst()[:1]:
            found[_shown(host)] = f"{failed:,} of {asked:,} failed"
        return found

    def lines(self, seconds: float) -> Sequence[str]:
        """The final table."""
        counts, seconds = self._counts, max(seconds, 1e-9)
        if not counts.rows_in:
            return ()
        lines = [
            (
                f"{counts.kept:,} of {counts.rows_in:,} images ({_share(counts.kept, counts.rows_in)}), "
                f"{counts.rows_in / seconds:,.1f} URLs/s; received {_bytes(self._bytes)}, {_bytes(self._bytes / seconds)}/s"
            )
        ]
        lines += [
            f"{failure:<20} {rows:>12,}  {_share(rows, counts.rows_in):>6}"
            for failure, rows in self._failures()[:LINES]
        ]
        worst = self._worst()[:LINES]
        if worst:
            lines.append(f"{'worst hosts':<{_HOST_WIDTH}} {'failed':>9} {'asked':>9}")
            lines += [
                f"{_shown(host):<{_HOST_WIDTH}} {failed:>9,} {asked:>9,}" for host, asked, failed in worst
            ]
        return lines

    def _failures(self) -> list[tuple[str, int]]:
        return sorted(self._counts.failed.items(), key=lambda item: (-item[1], item[0]))

    def _worst(self) -> list[tuple[str, int, int]]:
        """(host, asked, failed), most failed rows first."""
        asked, failed = self._hosts["asked"], self._hosts["failed"]
        hosts = sorted(failed, key=lambda host: (-failed[host], -asked[host], host))
        return [(host, asked[host], failed[host]) for host in hosts if failed[host]]


def _shown(host: str) -> str:
    # From a list off the web: a terminal must not obey it.
    clean = "".join(character if character.isprintable() else "?" for character in host)
    return clean if len(clean) <= _HOST_WIDTH else clean[: _HOST_WIDTH - 3] + "..."


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "none"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
