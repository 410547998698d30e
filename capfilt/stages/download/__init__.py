"""`download`: a list of URLs becomes an images part, one row per URL, failures included.

img2dataset is the engine: its `download_image` fetches and its `Resizer` resizes and encodes, in a child process.
    stage.py      the stage: slices of the list in, rows out
    lists.py      the formats a list of URLs comes in
    worker.py     the child process as its parent sees it: started, spoken to, replaced when it dies
    child.py      the child process from the inside; wire.py is what the two say to each other
    engine.py     what the child does with a slice: fetch, decode within limits, hand on to img2dataset
    opener.py     what img2dataset's urllib calls really do: HTTP within limits
    addresses.py  which addresses may be asked at all
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capfilt.stages.download.stage import Download

__all__ = ["Download"]


def __getattr__(name: str) -> Any:
    # The child process imports its modules through this package and needs nothing of the stage.
    if name == "Download":
        from capfilt.stages.download.stage import Download

        return Download
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
