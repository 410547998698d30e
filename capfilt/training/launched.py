"""How this process was started: alone, or as one of several that train together. Read from torchrun's environment, which
Ray Train sets too. Light: no torch.
"""

from __future__ import annotations

import os


def started_together() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launched_rank() -> int:
    """This process's number among those started with it; 0 where it was started alone."""
    return int(os.environ.get("RANK", "0")) if started_together() else 0


def local_rank() -> int:
    """Its number among those of them on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if started_together() else 0
