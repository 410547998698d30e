"""Would catch: a host's yield that counts wrongly, forgets a host, or names another failure each time two are as many."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

from capfilt.catalog.funnel import accounts
from capfilt.catalog.views import open_catalog
from capfilt.catalog.yields import yields
from capfilt.tables.contracts import IMAGES
from capfilt.tables.ids import image_id
from capfilt.tables.manifest import Counts
from capfilt.tables.workspace import Workspace
from tests.catalog.conftest import picture

ASKED = [
    ("https://user:pass@Good.example:8443/a.jpg", ""),
    ("http://good.example/b.jpg?from=http://dead.example/", ""),
    ("http://[2001:db8::1]:80/a.jpg", "timeout"),
    *[
        (f"http://even.example/{n}.jpg", failure)
        for n, failure in enumerate(["timeout", "not_found"] * 3 + [""])
    ],
    *[
        (f"http://dead.example/{n}.jpg", failure)
        for n, failure in enumerate(["dns", "dns", "blocked_address"])
    ],
    (None, "truncated"),
]


def test_hosts_are_counted_and_ties_are_always_told_alike(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    part = workspace.part("images", "web")
    mark = part.begin(IMAGES, "download", {"version": 1})
    rows = [
        {
            "image_id": image_id("web", str(place)),
            "dataset": "web",
            "key": str(place),
            "url": url,
            "source": "web",
            "captions": [],
            "status": "failed_to_download" if failure else "success",
            "failure": failure or None,
            "image": None if failure else {"bytes": picture(place), "path": None},
        }
        for place, (url, failure) in enumerate(ASKED)
    ]
    failed = {
        kind: sum(failure == kind for _, failure in ASKED)
        for kind in {failure for _, failure in ASKED} - {""}
    }
    part.commit(
        0, IMAGES.table(rows), Counts(len(rows), len(rows) - sum(failed.values()), {}, failed), mark, 1.0
    )

    told = []
    for _ in range(5):
        with open_catalog(workspace) as connection:
            told.append(list(yields(connection, accounts(workspace))))
    assert all(each == told[0] for each in told)
    ((name, outcomes, hosts),) = map(astuple, told[0])
    assert name == "images/web"
    assert outcomes[0] == ("success", None, 3, None)
    assert sum(count for _, _, count, _ in outcomes) == len(ASKED)
    # Lost most first, then asked most, then by name; 4 hosts, of which 2 gave nothing.
    assert hosts == [
        ("even.example", 7, 6, "not_found", 4, 2),
        ("dead.example", 3, 3, "dns", 4, 2),
        ("[2001:db8::1]", 1, 1, "timeout", 4, 2),
        ("good.example", 2, 0, None, 4, 2),
    ]
