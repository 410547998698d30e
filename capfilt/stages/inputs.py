"""What shard stages share about the parts they read: which shards line up, and what bytes they hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.errors import MissingInput, UserError
from capfilt.tables.shards import Part


def shards_of(first: Part, *others: Part) -> list[int]:
    """The committed shards of `first` that the other parts have too.

    Raises MissingInput when there is none, or when a part that is whole lacks one of them.
    """
    shards = first.shards()
    if not shards:
        raise MissingInput(f"{first.path}: has no committed shard; run the stage that writes it first")
    for part in others:
        missing = sorted(set(shards) - set(part.shards()))
        if missing and part.gap:
            shards = [shard for shard in shards if shard not in missing]
        elif missing:
            raise MissingInput(
                f"{part.path}: shard {missing[0]:05d} of {first.path} is not in it; run the stage that writes it to the end"
            )
    return shards


def input_hashes(shard: int, *parts: Part) -> list[str]:
    """SHA-256 of the given shard of each part, as its manifest has it."""
    hashes = []
    for part in parts:
        manifest = part.manifest(shard)
        if manifest is None:
            raise MissingInput(
                f"{part.path}: shard {shard:05d} is not committed; run the stage that writes it to the end"
            )
        hashes.append(manifest.sha256)
    return hashes


def captions_of(
    images: Part, ids: pa.ChunkedArray, captions: Sequence[Part], shard: int
) -> Iterator[pa.Table]:
    """The given shard of each captions part; `ids` are the images of the same shard of `images`.

    Raises UserError as `of_images`.
    """
    for part in captions:
        yield of_images(part.read(shard), part, images, ids, shard)


def of_images(table: pa.Table, part: Part, images: Part, ids: pa.ChunkedArray, shard: int) -> pa.Table:
    """`table`, rows of a shard of `part`; `ids` are the images of the same shard of `images`.

    Raises UserError where a row is of an image that is not among them: parts made from different lists have shards of the
    same numbers.
    """
    known = pc.is_in(table["image_id"], value_set=ids)
    if pc.all(known, min_count=0).as_py():
        return table
    image = table["image_id"].filter(pc.invert(known))[0].as_py()
    raise UserError(
        f"{part.path}: shard {shard:05d} has a row of image {image}, which that shard of {images.path} has not; "
        "it was made from other images: name the parts that belong together"
    )


def rows_for(texts: pa.Table, table: pa.Table, part: Part, shard: int) -> pa.Table:
    """For each of `texts` its row of `table`, a shard of `part`: the text's own, else that of its image, else nulls.

    Raises UserError where a text or an image has several rows.
    """
    of_image = pc.is_null(table["text_id"])
    pieces, place, before = [], pa.nulls(texts.num_rows, pa.int32()), 0
    for key, chosen in (("text_id", pc.invert(of_image)), ("image_id", of_image)):
        rows = table.filter(chosen)
        if pc.count_distinct(rows[key]).as_py() < rows.num_rows:
            raise UserError(
                f"{part.path}: shard {shard:05d} has several rows of one {key}; make the part again"
            )
        found = pc.index_in(texts[key], value_set=rows[key])
        place = pc.coalesce(place, pc.add(found, pa.scalar(before, pa.int32())))
        pieces.append(rows)
        before += rows.num_rows
    return pa.concat_tables(pieces).take(place)
