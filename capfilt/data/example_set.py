"""Rows of examples tables with their pictures, to be evaluated on: facts as the tables have them, nothing weighted or cut.

What is trained on, in batches, is `task_corpus.py`'s. What cannot be evaluated on is left out and counted, never raised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import pyarrow as pa
import torch
from torch import Tensor

from capfilt.data.examples import slices
from capfilt.data.pictures import BuildOptions, Pictures
from capfilt.data.store import Rows
from capfilt.tables.contracts import OWN_CAPTION, TASKS
from capfilt.tables.texts import folded

NEEDED = ("example_id", "key", "task", "image_ids", "text", "answers", "label", "failure")
OPTIONAL = ("split", "wrong_texts", "category")


@dataclass
class ExampleSet:
    """E examples of one task over N pictures, by column.

    Attributes:
        task: one of `contracts.TASKS`.
        images: pixels of the pictures, uint8 [3, S, S] each.
        image_ids: N strings.
        pictures: E tuples of rows in `images`, in the order the text means them.
        example_ids, keys: E strings each; a key is the source's own name of an example.
        texts: E strings as found; None where the task has none.
        answers: of each example, what annotators said and how many did.
        labels: E names of classes, None where there is none.
        wrong_texts: of each example, texts that are not right for its picture.
        categories: E kinds of example by the source's own names, None where it has none.
        skipped: how many were left out for a fault, by failure: pictures by theirs, examples by theirs or `no_image`.
        deselected: how many were left out without a fault: as `split`, `task`, `limit`, `own_caption`.
        support: examples to learn from, where a task does.
    """

    task: str
    images: Rows
    image_ids: list[str]
    pictures: list[tuple[int, ...]]
    example_ids: list[str]
    keys: list[str]
    texts: list[str | None]
    answers: list[tuple[tuple[str, int], ...]]
    labels: list[str | None]
    wrong_texts: list[tuple[str, ...]]
    categories: list[str | None]
    skipped: dict[str, int] = field(default_factory=dict)
    deselected: dict[str, int] = field(default_factory=dict)
    support: ExampleSet | None = None

    def __len__(self) -> int:
        return len(self.example_ids)

    def image_batches(self, size: int) -> PixelBatches:
        """The pictures, uint8 [B, 3, S, S] at a time, in their order; can be iterated over again."""
        return PixelBatches(self.images, len(self.image_ids), size)


class PixelBatches:
    """The first `count` pictures of a store, uint8 [B, 3, S, S] at a time; can be iterated over again."""

    def __init__(self, images: Rows, count: int, batch_size: int) -> None:
        self.images, self.count, self.batch_size = images, count, batch_size

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.count, self.batch_size):
            rows = torch.arange(start, min(start + self.batch_size, self.count)).numpy()
            yield torch.from_numpy(self.images.read(rows))


def read_examples(
    example_tables: Iterable[pa.Table],
    image_tables: Callable[[pa.Array], Iterable[pa.Table]],
    task: str,
    splits: Sequence[str | None] | None,
    *,
    size: int,
    limit: int = 0,
    **options: Unpack[BuildOptions],
) -> ExampleSet:
    """The examples of one task that can be evaluated on.

    Args:
        example_tables: Arrow tables with the columns of the examples contract, of any version.
        image_tables: called with the ids of the pictures that are needed, gives Arrow tables that hold them, with the
            columns of the images contract; read one at a time.
        task: one of `contracts.TASKS`.
        splits: only examples of these splits, None meaning rows without one; all where the argument is None.
        size: side of the pictures in pixels.
        limit: only so many of them, a sample that is always the same; 0 for all.
        **options: as in `corpus.from_images`.

    A rating whose text is one of the picture's own captions is left out: by its category, or because the images table has
    that text with the picture, but for case and white space.

    Raises UserError for a column that is missing or wrong, RunError for a full disk.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is none of {', '.join(TASKS)}")
    skipped, deselected = Counter[str](), Counter[str]()
    rows = []
    for row in (row for rows in slices(example_tables, "examples", NEEDED, OPTIONAL) for row in rows):
        if row["task"] != task:
            deselected["task"] += 1
        elif splits is not None and row.get("split") not in splits:
            deselected["split"] += 1
        elif row["failure"] is not None:
            skipped[row["failure"]] += 1
        elif task == "rating" and row.get("category") == OWN_CAPTION:
            deselected[OWN_CAPTION] += 1
        else:
            rows.append(row)
    if limit and len(rows) > limit:
        # Ids are hashes, so the smallest are a random sample.
        deselected["limit"] = len(rows) - limit
        rows = sorted(rows, key=lambda row: str(row["example_id"]))[:limit]
    found = Pictures(size, options, skipped)
    wanted = pa.array(sorted({key for row in rows for key in row["image_ids"]}), pa.string())
    further = ("split", "captions") if task == "rating" else ("split",)
    own: dict[str, set[str]] = {}
    for some in slices(image_tables(wanted), "images", ("image_id", "image"), further, wanted):
        found.add(some)
        if task == "rating":
            for row in some:
                own.setdefault(row["image_id"], set()).update(map(folded, row.get("captions") or ()))
    kept: list[tuple[dict[str, Any], tuple[int, ...]]] = []
    for row in rows:
        places = [found.row_of.get(key) for key in row["image_ids"]]
        here = tuple(place for place in places if place is not None)
        if not here or len(here) < len(places):
            skipped["no_image"] += 1
        elif task == "rating" and folded(row["text"] or "") in own[row["image_ids"][0]]:
            deselected[OWN_CAPTION] += 1
        else:
            kept.append((row, here))
    return ExampleSet(
        task=task,
        images=found.store,
        image_ids=found.image_ids,
        pictures=[places for _, places in kept],
        example_ids=[row["example_id"] for row, _ in kept],
        keys=[row["key"] for row, _ in kept],
        texts=[row["text"] for row, _ in kept],
        answers=[tuple((each["answer"], each["count"]) for each in row["answers"] or ()) for row, _ in kept],
        labels=[row["label"] for row, _ in kept],
        wrong_texts=[tuple(row.get("wrong_texts") or ()) for row, _ in kept],
        categories=[row.get("category") for row, _ in kept],
        skipped={reason: count for reason, count in sorted(skipped.items()) if count},
        deselected={reason: count for reason, count in sorted(deselected.items()) if count},
    )
