"""`download`: a list of URLs becomes an images part, one row per URL, failures included.

img2dataset is the engine: its `download_image` fetches and its `Resizer` resizes and encodes, in a child process.
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
    robots.py     what a robots.txt says
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capfilt.stages.download.retry import Retry
    from capfilt.stages.download.stage import Download

__all__ = ["Download", "Retry"]


def __getattr__(name: str) -> Any:
    # The child process imports its modules through this package and needs nothing of the stage.
    if name == "Download":
        from capfilt.stages.download.stage import Download

        return Download
    if name == "Retry":
        from capfilt.stages.download.retry import Retry

        return Retry
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
