"""Catches shards that are joined though they do not belong together, and one that is left out without a word."""

from __future__ import annotations

import pyarrow as pa
import pytest

from capfilt.errors import MissingInput, UserError
from capfilt.stages.inputs import captions_of, input_hashes, shards_of
from capfilt.tables.contracts import CAPTIONS, IMAGES
from capfilt.tables.ids import text_id
from capfilt.tables.manifest import Counts, Plan
from capfilt.tables.workspace import Workspace
from tests.worlds import image_rows


@pytest.fixture
def place(tmp_path):
    return Workspace(tmp_path / "ws")


def part(place, table, name, shards, planned=None):
    """A part with these shards; of captions, of the pictures in the same shard."""
    contract = {"images": IMAGES, "captions": CAPTIONS}[table]
    made = place.part(table, name)
    mark = made.begin(contract, "test", {}, plan=Plan(planned if planned is not None else shards))
    for shard in shards:
        rows = image_rows("web", 2, start=10 * shard)
        if table == "captions":
            rows = [
                {
                    "text_id": text_id(row["image_id"], "synthetic", "a", name, 0), "image_id": row["image_id"], "text": "a",
                    "sample_index": 0, "captioner": name, "decoding": "greedy", "logprob": None, "failure": None,
                }
                for row in rows
            ]  # fmt: skip
        made.commit(shard, contract.table(rows), Counts(2, 2), mark, 0.0)
    return made


def test_the_first_parts_shards_are_those_to_make(place):
    images = part(place, "images", "web", [0, 1, 3])
    assert shards_of(images) == [0, 1, 3]
    assert shards_of(images, part(place, "captions", "more", [0, 1, 2, 3])) == [0, 1, 3]


def test_a_shard_that_a_whole_part_lacks_is_an_error_and_of_a_part_in_the_making_not(place):
    images = part(place, "images", "web", [0, 1])
    with pytest.raises(MissingInput, match=r"00001.*web"):
        shards_of(images, part(place, "captions", "short", [0]))
    assert shards_of(images, part(place, "captions", "begun", [0], planned=[0, 1])) == [0]
    with pytest.raises(MissingInput, match="empty"):
        shards_of(part(place, "images", "empty", [], planned=[0]))


def test_hashes_are_the_manifests_in_the_parts_order(place):
    images, captions = part(place, "images", "web", [0, 1]), part(place, "captions", "a", [0, 1])
    expected = [images.manifest(1).sha256, captions.manifest(1).sha256]
    assert input_hashes(1, images, captions) == expected
    assert input_hashes(1, captions, images) == expected[::-1]
    with pytest.raises(MissingInput, match="00002"):
        input_hashes(2, images)


def test_captions_of_other_pictures_are_refused_by_part_and_picture(place):
    images, captions = part(place, "images", "web", [0, 1]), part(place, "captions", "a", [0, 1])
    ids = images.read(0, ["image_id"])["image_id"]
    assert [table.num_rows for table in captions_of(images, ids, [captions, captions], 0)] == [2, 2]
    with pytest.raises(UserError, match=r"captions/a.*00001"):
        list(captions_of(images, ids, [captions], 1))
    assert list(captions_of(images, ids, [], 0)) == []
    nothing = pa.chunked_array([], pa.string())
    with pytest.raises(UserError, match="captions/a"):
        list(captions_of(images, nothing, [captions], 0))
