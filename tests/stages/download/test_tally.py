"""Would catch: figures of `download` that do not add up, that name a host that did well, or that a host's name can forge."""

from __future__ import annotations

from types import SimpleNamespace

from capfilt.stages.download.tally import LINES, DownloadTally
from capfilt.tables.manifest import Counts


def shard(rows, failed, hosts, size):
    counts = Counts(rows, rows - sum(failed.values()), {}, failed)
    return SimpleNamespace(counts=counts), {"bytes_received": size, "hosts": hosts}


def told(*shards):
    tally = DownloadTally()
    for each in shards:
        tally.add(*each)
    return tally


def test_shards_add_up():
    tally = told(
        shard(100, {"timeout": 10, "dns": 30}, {"a.com": [60, 30], "b.com": [40, 10]}, 3_000_000),
        shard(100, {"timeout": 40}, {"b.com": [50, 40], "c.com": [50, 0]}, 1_000_000),
    )
    assert tally.figures(2.0) == {
        "success": "60.0%", "received": "2 MB/s", "timeout": "25.0%", "b.com": "50 of 90 failed",
    }  # fmt: skip
    first, *rest = tally.lines(2.0)
    assert first == "120 of 200 images (60.0%), 100.0 URLs/s; received 4 MB, 2 MB/s"
    assert [line.split() for line in rest] == [
        ["timeout", "50", "25.0%"],
        ["dns", "30", "15.0%"],
        ["worst", "hosts", "failed", "asked"],
        ["b.com", "50", "90"],
        ["a.com", "30", "60"],
    ]


def test_nothing_is_told_of_nothing_and_of_shards_without_stats():
    assert told().lines(1.0) == ()
    assert told().figures(0.0)["success"] == "none"
    bare, _ = shard(4, {}, {}, 0)
    tally = told((bare, {}))
    assert tally.figures(0.0) == {"success": "100.0%", "received": "0 B/s"}
    assert len(tally.lines(0.0)) == 1


def test_few_lines_of_a_width_a_terminal_obeys():
    hosts = {f"h{n}.example": [n + 1, n + 1] for n in range(30)}
    hosts["\x1b[2Jgone" + "x" * 90 + ".example"] = [500, 500]
    lines = told(shard(965, {"dns": 965}, hosts, 0)).lines(1.0)
    assert len(lines) == 2 + 1 + LINES
    assert lines[3].startswith("?[2Jgone")
    assert lines[3].split()[0].endswith("...")
    assert all(line.isprintable() and len(line) < 80 for line in lines)
