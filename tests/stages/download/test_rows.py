"""Catches a row that says more or less than its answer, a host's failures told of another, and a child that is told otherwise
than the options say."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest

from capfilt.stages.download import DownloadOptions
from capfilt.stages.download.rows import (
    ANSWERED,
    HOSTS_TOLD,
    answered,
    counts_of,
    host_of,
    stats_of,
)
from capfilt.stages.download.settings import settings_of
from capfilt.stages.download.worker import Row, failed


def table(*pairs):
    return pa.table(
        {
            "url": [url for url, _ in pairs],
            "failure": pa.array([failure for _, failure in pairs], pa.string()),
        }
    )


def test_an_answer_fills_the_columns_that_fetching_decides_and_no_other():
    answer = Row({"status": "success", "width": 3, "received": 9, "host": "x", "failure": None}, b"picture")
    columns = answered(answer, "000000007", "webp")
    assert set(columns) == set(ANSWERED)
    assert columns["image"] == {"bytes": b"picture", "path": "000000007.webp"}
    assert (columns["width"], columns["height"]) == (3, None)
    lost = answered(failed("bad_url", "no URL here"), "1", "jpg")
    assert (lost["status"], lost["failure"], lost["image"]) == ("failed_to_download", "bad_url", None)
    assert lost["error_message"] == "no URL here"


def test_an_error_that_no_text_column_can_hold_is_told_readably():
    words = answered(failed("bad_url", "lone \ud800 and nul \0"), "1", "jpg")["error_message"]
    words.encode("utf-8")
    assert "lone" in words


def test_every_row_is_kept_or_failed_by_its_failure():
    found = table(("http://a/1", None), ("http://a/2", "dns"), ("http://b/3", "dns"), (None, "bad_url"))
    counts = counts_of(found)
    counts.check()
    assert (counts.rows_in, counts.kept, counts.failed) == (4, 1, {"bad_url": 1, "dns": 2})


def test_the_worst_hosts_are_told_with_their_rows():
    rows = (
        [("http://good.org/1", None)] * 5
        + [("http://BAD.org:80/1", "dns")] * 2
        + [("http://bad.org/2", None)]
    )
    found = stats_of(
        table(*rows, (None, "bad_url"), ("http://[", "bad_url")), [Row({"received": 7}, b""), Row({}, b"")]
    )
    assert found["bytes_received"] == 7
    assert found["hosts"] == {"bad.org": [3, 2], "good.org": [5, 0]}
    assert list(found["hosts"]) == ["bad.org", "good.org"]
    many = [(f"http://{number}.org/", "dns") for number in range(HOSTS_TOLD + 5)]
    assert len(stats_of(table(*many), [])["hosts"]) == HOSTS_TOLD


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("HTTP://Example.ORG:8/x", "example.org"),
        (" http://a.b/ ", "a.b"),
        (None, ""),
        ("", ""),
        ("x", ""),
        ("http://[", ""),
    ],
)
def test_a_host_is_named_in_one_spelling(url, host):
    assert host_of(url) == host


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_share_out_what_a_host_bears(workers):
    options = DownloadOptions(url_list="urls.txt", host_concurrency=6, host_rate=3.0, timeout=7.0)
    settings = settings_of(options, workers)
    assert settings.host_concurrency * workers == 6
    assert settings.host_rate * workers == pytest.approx(3.0)
    assert settings.timeout == 7.0


@pytest.mark.parametrize(
    ("token", "agent", "program"),
    [
        ("capfilt", "capfilt/", "capfilt"),
        ("", "capfilt/", ""),
        (" MyBot ", "MyBot capfilt/", "mybot"),
        ("CapFilt", "capfilt/", "capfilt"),
    ],
)
def test_the_crawler_says_who_it_is(token, agent, program):
    settings = settings_of(
        DownloadOptions(
            url_list="urls.txt", user_agent_token=token, disallowed_header_directives=(" NoAI ", "noindex")
        )
    )
    assert settings.user_agent.startswith(agent)
    assert settings.user_agent_token == program
    assert Counter(settings.disallowed_header_directives) == Counter(["noai", "noindex"])
