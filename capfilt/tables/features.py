"""Features of frozen encoders, kept between runs: the parts `features/<encoder>` of a workspace.

They are derived. A part that cannot be read, or a shard of it, is left aside with a warning, and its features are made again.
Two runs may write to one part: where both want the same shard, one of them keeps its features to itself.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capfilt.errors import RunError, UserError
from capfilt.tables.contracts import FEATURES
from capfilt.tables.manifest import Counts
from capfilt.tables.workspace import Workspace

Features = Mapping[bytes, npt.NDArray[np.float16]]


def kept(workspace: Workspace, encoder: str) -> dict[bytes, npt.NDArray[np.float16]]:
    """The features that earlier runs kept of an encoder, by key."""
    part, found = workspace.part("features", encoder), {}
    for shard in part.shards():
        try:
            table = part.read(shard)
            columns = [table[name].to_pylist() for name in ("key", "feature", "shape")]
            for key, feature, shape in zip(*columns, strict=True):
                found[key] = np.frombuffer(feature, np.float16).reshape(shape)
        except (UserError, RunError, ValueError) as error:
            warnings.warn(f"{error}; its features are computed again", RuntimeWarning, stacklevel=2)
    return found


def keep(workspace: Workspace, encoder: str, features: Features) -> None:
    """Keep new features, as a shard of their own."""
    part = workspace.part("features", encoder)
    rows: dict[str, list[Any]] = {
        "key": list(features),
        "feature": [each.tobytes() for each in features.values()],
        "shape": [list(each.shape) for each in features.values()],
    }
    table = FEATURES.conform(pa.table(rows))
    mark = part.begin(FEATURES, "features", {"encoder": encoder})
    shard = max(part.shards(), default=-1) + 1
    part.commit(shard, table, Counts(table.num_rows, table.num_rows, {}, {}), mark, time.perf_counter())
