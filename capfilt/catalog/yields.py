"""The report's yield: what became of the images that were asked for, by outcome and by host."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from capfilt.catalog.funnel import Account
from capfilt.catalog.html import Html, element, section, table
from capfilt.catalog.plots import share, stacked_bar
from capfilt.tables.visible import shortened

HOSTS = 15
"""Hosts shown by rows lost, of all that lost any."""

# A URL's host as RFC 3986 has it: behind the scheme and whoever is named before an @.
_HOST = r"^\s*[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?(\[[^\]]*\]|[^/?#:]*)"


def yield_section(connection: duckdb.DuckDBPyConnection, found: Sequence[Account]) -> Html:
    """What became of the images asked for, per images part in which some failed or that was downloaded."""
    blocks = []
    for account in found:
        if account.table != "images" or not (account.stage == "download" or account.counts.failed):
            continue
        rows = connection.execute(
            "SELECT status, failure, count(*), min(error_message) FROM images WHERE part = ? "
            "GROUP BY status, failure ORDER BY status = 'success' DESC, 3 DESC, 1, 2",
            [account.part.name],
        ).fetchall()
        total = sum(count for _, _, count, _ in rows)
        lines = [
            (
                failure or status,
                status if failure else "",
                f"{count:,}",
                share(count, total),
                stacked_bar([("kept" if status == "success" else "failed", count)], total or 1),
                element("span", shortened(message, 90), class_="quiet") if message else "",
            )
            for status, failure, count, message in rows
        ]
        headers = ("outcome", "status", "images", "share", "", "for example")
        shown = table(headers, lines, numeric=(2, 3), class_="lines")
        blocks += [element("h3", f"images/{account.part.name}"), shown, _hosts(connection, account.part.name)]
    return section("Yield", *blocks) if blocks else Html("")


def _hosts(connection: duckdb.DuckDBPyConnection, part: str) -> Html:
    """The hosts that lost most rows, and what most of those failed of; nothing where no row has a URL."""
    rows = connection.execute(
        f"""
        WITH asked AS (
            SELECT lower(regexp_extract(url, '{_HOST}', 1)) AS host, failure, count(*) AS images
            FROM images WHERE part = ? AND url IS NOT NULL GROUP BY ALL
        )
        SELECT host, sum(images)::BIGINT, coalesce(sum(images) FILTER (WHERE failure IS NOT NULL), 0)::BIGINT,
            first(failure ORDER BY images DESC, failure) FILTER (WHERE failure IS NOT NULL), count(*) OVER (),
            count(*) FILTER (WHERE bool_and(failure IS NOT NULL)) OVER ()
        FROM asked WHERE host <> '' GROUP BY host
        ORDER BY 3 DESC, 2 DESC, 1 LIMIT {HOSTS}
        """,  # noqa: S608 - our own constants
        [part],
    ).fetchall()
    if not rows:
        return Html("")
    hosts, dead = rows[0][4], rows[0][5]
    most = max(asked for _, asked, *_ in rows)
    lines = [
        (
            shortened(host, 60),
            f"{asked:,}",
            share(asked - failed, asked),
            f"{failed:,}",
            mode or "",
            stacked_bar([("kept", asked - failed), ("failed", failed)], most),
        )
        for host, asked, failed, mode, _, _ in rows
    ]
    headers = ("host", "images", "yield", "failed", "mostly", "")
    said = f"{hosts:,} hosts, of which {dead:,} gave nothing; those that lost most rows:"
    return element(
        "div", element("p", said, class_="quiet"), table(headers, lines, numeric=(1, 2, 3), class_="lines")
    )
