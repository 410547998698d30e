"""The report's yield: what became of the images that were asked for, by outcome and by host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import duckdb

from capfilt.catalog.funnel import Account

HOSTS = 15
"""Hosts shown by rows lost, of all that lost any."""

# A URL's host as RFC 3986 has it: behind the scheme and whoever is named before an @.
_HOST = r"^\s*[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?(\[[^\]]*\]|[^/?#:]*)"

_OUTCOMES = (
    "SELECT status, failure, count(*), min(error_message) FROM images WHERE part = ? "
    "GROUP BY status, failure ORDER BY status = 'success' DESC, 3 DESC, 1, 2"
)

_HOSTS = f"""
WITH asked AS (
    SELECT lower(regexp_extract(url, '{_HOST}', 1)) AS host, failure, count(*) AS images
    FROM images WHERE part = ? AND url IS NOT NULL GROUP BY ALL
)
SELECT host, sum(images)::BIGINT, coalesce(sum(images) FILTER (WHERE failure IS NOT NULL), 0)::BIGINT,
    first(failure ORDER BY images DESC, failure) FILTER (WHERE failure IS NOT NULL), count(*) OVER (),
    count(*) FILTER (WHERE bool_and(failure IS NOT NULL)) OVER ()
FROM asked WHERE host <> '' GROUP BY host
ORDER BY 3 DESC, 2 DESC, 1 LIMIT {HOSTS}
"""  # noqa: S608 - our own constants


@dataclass(frozen=True)
class Yield:
    """The outcomes of the images of one part.

    Attributes:
        name: the part's, behind its table's.
        outcomes: (status, failure, images, an error's message), the successes first, then the most.
        hosts: (host, images asked, failed, what most of those failed of, number of hosts, of those that gave nothing)
            of the hosts that lost most; empty where no row has a URL.
    """

    name: str
    outcomes: Sequence[tuple[str, str | None, int, str | None]]
    hosts: Sequence[tuple[str, int, int, str | None, int, int]]


def yields(connection: duckdb.DuckDBPyConnection, found: Sequence[Account]) -> Iterator[Yield]:
    """The yield of each images part in which some failed or that was downloaded."""
    for account in found:
        if account.table == "images" and (account.stage == "download" or account.counts.failed):
            part = [account.part.name]
            yield Yield(
                account.name,
                connection.execute(_OUTCOMES, part).fetchall(),
                connection.execute(_HOSTS, part).fetchall(),
            )
