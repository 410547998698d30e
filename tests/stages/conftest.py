"""A workspace with two shards of pictures (one never came, one is broken) and an untrained captioner and filter."""

from __future__ import annotations

import pytest

from capfilt.tables.workspace import Workspace
from tests.worlds import failed_row, image_rows, tiny_checkpoint, write_images


@pytest.fixture
def workspace(tmp_path):
    place = Workspace(tmp_path / "ws")
    broken = image_rows("web", 1, start=90)[0]
    broken["image"] = {"bytes": broken["image"]["bytes"][:200], "path": None}
    empty = image_rows("web", 1, start=91)[0] | {"captions": ["", "x" * 20_000, "..."]}
    write_images(
        place.part("images", "web"),
        [
            [*image_rows("web", 5), failed_row("web", "lost")],
            [broken, empty, *image_rows("web", 4, start=20)],
        ],
    )
    tiny_checkpoint(place.model("captioner"), seed=1)
    tiny_checkpoint(place.model("filter"), seed=2)
    return place
