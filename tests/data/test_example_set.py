"""Would catch: an example judged with another's picture, one lost without being counted, a sample that changes from run to
run, and a part of the first version, which has fewer columns, refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from capfilt.data.example_set import read_examples
from capfilt.tables.contracts import EXAMPLES
from capfilt.tables.convert import convert
from capfilt.tables.shards import Part
from tests.refusals import refused
from tests.worlds import image_rows

OLD = Path(__file__).parents[1] / "tables" / "fixtures" / "examples-1"
"""A part of contract version 1, as the first capfilt wrote it."""


def example(number, image_ids, **changes):
    row = {
        "example_id": f"{number:032d}", "dataset": "d", "key": str(number), "task": "match", "image_ids": image_ids,
        "text": f"text {number}", "answers": [], "label": "match", "split": "test",
    }  # fmt: skip
    return {**row, **changes}


@pytest.fixture(scope="module")
def images():
    return pa.Table.from_pylist(image_rows("pictures", 4))


def read(rows, images, **options):
    options = {"splits": ("test",), "size": 16, **options}
    splits = options.pop("splits")
    return read_examples(
        [EXAMPLES.table(rows)], lambda wanted: [images], options.pop("task", "match"), splits, **options
    )


def test_every_row_is_there_or_counted(images):
    ids = images["image_id"].to_pylist()
    rows = [
        example(0, [ids[2]]),
        example(1, [ids[0], ids[2]], wrong_texts=["no"], category="swap"),
        example(2, ["f" * 32]),
        example(3, [ids[1]], task="rating"),
        example(4, [ids[1]], split="train"),
        example(5, [], failure="no_image"),
        example(6, [ids[2]], label=None, text=None, answers=[{"answer": "4", "count": 2}]),
    ]
    found = read(rows, images)
    assert found.example_ids == [f"{number:032d}" for number in (0, 1, 6)]
    assert [[found.image_ids[place] for place in each] for each in found.pictures] == [
        [ids[2]],
        [ids[0], ids[2]],
        [ids[2]],
    ]
    assert (found.texts, found.labels) == (["text 0", "text 1", None], ["match", "match", None])
    assert (found.wrong_texts, found.categories) == ([(), ("no",), ()], [None, "swap", None])
    assert found.answers[2] == (("4", 2),)
    assert found.skipped == {"no_image": 2}
    assert found.deselected == {"split": 1, "task": 1}
    assert len(found) + sum(found.skipped.values()) + sum(found.deselected.values()) == len(rows)
    sizes = [tuple(batch.shape) for batch in found.image_batches(1)]
    assert sizes == [(1, 3, 16, 16)] * 2
    batches = found.image_batches(5)
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in batches]


def test_own_captions_are_not_rated(images):
    """Would catch: a tau-c that is flattered by the picture's own captions; one that a capital or a space hides."""
    ids = images["image_id"].to_pylist()
    rows = images.to_pylist()
    rows[0]["captions"] = ["A dog  runs .", "another"]
    rows[1]["captions"] = ["a cat"]
    table = pa.Table.from_pylist(rows, images.schema)
    rated = {"task": "rating", "answers": [{"answer": "4", "count": 3}]}
    pairs = [(0, "a dog runs ."), (0, "a cat"), (1, "a dog runs ."), (1, "a cat"), (2, "a cat")]
    examples = [example(n, [ids[image]], text=text, **rated) for n, (image, text) in enumerate(pairs)]
    examples.append(example(9, [ids[2]], text="told by its category", category="own_caption", **rated))
    found = read(examples, table, task="rating")
    assert found.example_ids == [f"{number:032d}" for number in (1, 2, 4)]
    assert found.deselected == {"own_caption": 3}
    assert len(read(examples, table.drop(["captions"]), task="rating")) == 5
    matches = [{**each, "task": "match", "answers": []} for each in examples]
    assert len(read(matches, table)) == 6, "a match is asked about own captions"


def test_a_sample_is_always_the_same(images):
    ids = images["image_id"].to_pylist()
    rows = [example(number, [ids[number % 4]]) for number in range(9)]
    assert read(rows, images, limit=3).example_ids == read(rows[::-1], images, limit=3).example_ids
    assert read(rows, images, limit=3).deselected == {"limit": 6}


def test_a_part_of_the_first_version_is_read(tmp_path):
    shutil.copytree(OLD, tmp_path / OLD.name)
    (part,) = map(Part, convert(tmp_path / OLD.name))
    assert part.check().info["contract_version"] == 1
    found = read_examples(
        part.tables(), lambda wanted: [pa.Table.from_pylist(image_rows("x", 1))], "vqa", None, size=8
    )
    assert found.skipped == {"no_image": 1}
    picture = pa.Table.from_pylist([{**image_rows("x", 1)[0], "image_id": "b" * 32}])
    found = read_examples(part.tables(), lambda wanted: [picture], "vqa", ("test",), size=8)
    assert (found.texts, found.wrong_texts, found.categories) == (["what is it"], [()], [None])
    assert found.answers == [(("a dog", 2),)]


def test_tables_without_what_is_needed_are_named(images):
    with refused("column", "label"):
        read_examples([EXAMPLES.table([]).drop(["label"])], lambda wanted: [images], "match", None, size=8)
    with pytest.raises(ValueError, match="guessing"):
        read([], images, task="guessing")
