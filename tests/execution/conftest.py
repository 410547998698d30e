"""What runs in several processes starts from."""

from __future__ import annotations

import pytest

from capfilt.tables.workspace import Workspace
from tests.worlds import image_rows, tiny_checkpoint, write_images


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A workspace with nine pictures of two human texts each, and a filter to go on from."""
    place = Workspace(tmp_path_factory.mktemp("ranks"))
    rows = image_rows("human", 9, source="human", texts=2, split="train")
    write_images(place.part("images", "human"), [rows])
    tiny_checkpoint(place.model("filter"), seed=2)
    return place
