"""The human pairs that a calibration is fitted on: which they are, and that nothing of the filter saw them.

Not here: their scores (`judge.py`), the fit (`stage.py`).
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capfilt.data.cleaning import clean
from capfilt.errors import UserError, naming
from capfilt.models import checkpoint
from capfilt.stages.calibrate import CalibrateOptions
from capfilt.stages.folds import members
from capfilt.stages.inputs import captions_of, shards_of
from capfilt.stages.subset.words import Swaps
from capfilt.stages.training import EXPOSURES
from capfilt.tables.contracts import MAX_TEXT_CHARACTERS
from capfilt.tables.ids import fold_of, text_id
from capfilt.tables.shards import Part
from capfilt.tables.texts import FOUND_COLUMNS, folded, found_texts, texts_of
from capfilt.tables.workspace import Workspace

LEAST_IMAGES = 50
"""Fewer pictures give a slope that nobody should trust."""
MOST_IMAGES = 5000
"""More pictures move no figure that is printed, and every worker embeds them to find near ones."""
MOST_EXPOSURES = 5
"""A web text that is seen more often is learned by heart (docs/decisions/0007-small-corpora.md)."""
NEAREST = 20
"""Pictures whose texts are near ones."""

Vectors = npt.NDArray[np.float32]

DRAWS = 4
"""Foreign texts are looked for among so many times as many, of which the picture's own and repeated ones are left out."""

Pairs = dict[str, list[dict[str, Any]]]
"""By image, its texts: rows as of `texts_of`, whether each is the image's `own`, and whether it is a `near` picture's."""


def pairs_of(rows: Sequence[dict[str, Any]], negatives: int, seed: int, given: str) -> Pairs:
    """Each picture of `rows`, as of `texts_of`, with all of its texts, and with `negatives` texts drawn from those of others.

    A picture's draw depends on the seed, the picture and the texts of all, in no order of shards. Raises UserError where fewer
    than LEAST_IMAGES pictures have a text, or where all have the same one.
    """
    own: Pairs = {}
    for row in rows:
        own.setdefault(row["image_id"], []).append({**row, "own": True, "near": False})
    if len(own) < LEAST_IMAGES:
        raise UserError(f"{given}: {len(own):,} pictures have such a text; give {LEAST_IMAGES} or more")
    pairs: Pairs = {}
    for image in of_smallest_hash(own, MOST_IMAGES, seed):
        texts = own[image]
        said = {folded(row["text"]) for row in texts}
        rng = np.random.default_rng([seed, *_hashed(image)])
        drawn = [rows[place] for place in rng.integers(len(rows), size=DRAWS * negatives)]
        # A text that stands with this picture too is true of it, whoever else has it.
        able = {row["text_id"]: row for row in drawn if folded(row["text"]) not in said}
        foreign = [_foreign(row, image, near=False) for row in [*able.values()][:negatives]]
        pairs[image] = [*texts, *foreign]
    if not any(not row["own"] for some in pairs.values() for row in some):
        raise UserError(f"{given}: all pictures have one text, so that none is wrong; give others")
    return pairs


def written_for(images: Part, captions: Sequence[Part]) -> Iterator[dict[str, Any]]:
    """The texts that captioners wrote for an images part, as rows of `texts_of`; those that failed are left out."""
    for shard in shards_of(images, *captions):
        found = images.read(shard, FOUND_COLUMNS)
        written = captions_of(images, found["image_id"], captions, shard)
        for row in texts_of(found.slice(0, 0), written).to_pylist():
            if row["failure"] is None and row["text"]:
                yield row


def synthetic_pairs(rows: Iterable[dict[str, Any]], negatives: int, seed: int, given: str) -> Pairs:
    """As `pairs_of`, of texts that a captioner wrote. Near ones are own ones with one word changed."""
    usable = sorted((row for row in rows if _usable(row["text"])), key=lambda row: row["text_id"])
    pairs = pairs_of(usable, negatives, seed, given)
    swaps = Swaps(row["text"] for row in usable)
    for image, texts in pairs.items():
        rng = np.random.default_rng([seed, 2, *_hashed(image)])
        own = [row for row in texts if row["own"]]
        said = [row["text"] for row in own]
        for place, row in enumerate(own):
            if (text := swaps.changed(row["text"], said, rng)) is not None:
                name = text_id(image, "changed", text, "", place)
                texts.append(_foreign({**row, "text": text, "text_id": name}, image, near=True))
    if not any(row["near"] for some in pairs.values() for row in some):
        raise UserError(f"{given}: no caption has a word for which another one stands; give more captions")
    return pairs


def near_texts(pairs: Pairs, image_ids: Sequence[str], vectors: Vectors, count: int, seed: int) -> Pairs:
    """Of each picture `count` texts of its NEAREST ones, of unit vectors [N, D]; fewer where those have no other texts.

    Texts that the picture has already, as its own or drawn by `pairs_of`, are left out.
    """
    found: Pairs = {}
    order = sorted(range(len(image_ids)), key=image_ids.__getitem__)
    ids, seen = [image_ids[place] for place in order], vectors[order]
    for place, image in enumerate(ids):
        alike = seen @ seen[place]
        alike[place] = -np.inf
        nearest = np.argsort(-alike, kind="stable")[:NEAREST]
        has = {folded(row["text"]) for row in pairs[image]}
        able = {
            folded(row["text"]): row
            for other in nearest
            for row in pairs[ids[other]]
            if row["own"] and folded(row["text"]) not in has
        }
        rows = [*able.values()]
        rng = np.random.default_rng([seed, 1, *_hashed(image)])
        found[image] = [_foreign(rows[one], image, near=True) for one in rng.permutation(len(rows))[:count]]
    return found


def _foreign(row: Mapping[str, Any], image: str, *, near: bool) -> dict[str, Any]:
    return {**row, "image_id": image, "own": False, "near": near}


def of_smallest_hash(ids: Iterable[str], most: int, seed: int) -> list[str]:
    """At most so many of the ids, in order: those of the smallest hashes with the seed."""
    mark = str(seed).encode()
    return sorted(
        heapq.nsmallest(
            most, ids, key=lambda each: hashlib.blake2b(each.encode(), key=mark, digest_size=8).digest()
        )
    )


def _hashed(image: str) -> bytes:
    return hashlib.blake2b(image.encode(), digest_size=8).digest()


def human_texts(part: Part) -> list[dict[str, Any]]:
    """The human texts of pictures that are there, as rows of `texts_of`, by text_id."""
    rows: list[dict[str, Any]] = []
    for shard in part.shards():
        images = part.read(shard, [*FOUND_COLUMNS, "status"])
        human = pc.and_(pc.equal(images["status"], "success"), pc.equal(images["source"], "human"))
        rows += [row for row in found_texts(images.filter(human)).to_pylist() if _usable(row["text"])]
    return sorted(rows, key=lambda row: row["text_id"])


def _usable(text: str | None) -> bool:
    return bool(text and len(text) <= MAX_TEXT_CHARACTERS and clean(text))


def check_unseen(options: CalibrateOptions, workspace: Workspace, held_out: Part, judged: Part) -> list[str]:
    """Warnings. UserError where a calibration picture trained a filter, is a neighbour, or lies in the judged part; where a
    neighbour lies in the judged part; and where a filter of a set saw pictures of its own fold.
    """
    given = f"--calibration {options.calibration}"
    here, there = _present(held_out), _present(judged)
    if count := _shared(here, there):
        raise UserError(
            f"{given}: {count:,} of its pictures are in --images {options.images} too; give others"
        )
    for name in options.neighbours:
        bank = _present(workspace.input("images", name))
        for other, said in ((here, given), (there, f"--images {options.images}")):
            if count := _shared(bank, other):
                raise UserError(
                    f"--neighbours {name}: {count:,} of its pictures are in {said} too; give others"
                )
    held, corpus = (set(each["image_id"].to_pylist()) for each in (here, there))
    warned: list[str] = []
    for name in options.filter:
        paths = members(name, workspace)
        if len(paths) > 1 and len(paths) != options.folds:
            raise UserError(f"--filter {name}: has {len(paths)} checkpoints; give --folds {len(paths)}")
        for fold, path in enumerate(paths):
            seen = trained_on(path, workspace)
            if seen is None:
                warned.append(
                    f"{path} does not say which pictures trained it; none of {given} may be among them"
                )
                continue
            if both := len(seen & held):
                raise UserError(
                    f"{given}: {both:,} of its {len(held):,} pictures trained {path.name}; give pictures that it never saw"
                )
            own = {image for image in corpus & seen if len(paths) == 1 or fold_of(image, len(paths)) == fold}
            if own and len(paths) > 1:
                raise UserError(
                    f"--filter {name}: {len(own):,} pictures of fold {fold} trained {path.name}, which judges them; train it "
                    f"on verdicts of select --require 'fold <> {fold}'"
                )
            if (mean := _mean_exposures(path)) > MOST_EXPOSURES:
                warned.append(
                    f"{path.name} saw each web text {mean:.0f} times; from {MOST_EXPOSURES} on it knows wrong ones by heart"
                )
            if own:
                warned.append(
                    f"{len(own):,} of the pictures that are judged trained {path.name}: it may know them by heart"
                )
    return warned


def captioners(workspace: Workspace, names: Iterable[str]) -> set[str]:
    """The marks of the captioners that wrote captions parts."""
    return {json.dumps(workspace.input("captions", name).info["identity"].get("captioner")) for name in names}


def check_captioners(options: CalibrateOptions, workspace: Workspace, held_out: Part) -> None:
    """UserError where --calibration-captions are by another captioner than --captions, where a calibration picture trained the
    captioner, and where captioner and filter came from each other: such a judge knows what the captioner gets wrong no better.
    """
    if captioners(workspace, options.captions) != captioners(workspace, options.calibration_captions):
        raise UserError(
            f"--calibration-captions {' '.join(options.calibration_captions)}: not by the captioner of --captions "
            f"{' '.join(options.captions)}; caption both alike"
        )
    filters = [path for name in options.filter for path in members(name, workspace)]
    held = set(_present(held_out)["image_id"].to_pylist())
    for name in options.calibration_captions:
        for path in parents(workspace.input("captions", name).info, workspace):
            if count := len(held & (trained_on(path, workspace) or set())):
                raise UserError(
                    f"--calibration {options.calibration}: {count:,} of its pictures trained the captioner {path.name}; give "
                    "pictures that it never saw"
                )
            for judge in filters:
                if path in _ancestry(judge, workspace) or judge in _ancestry(path, workspace):
                    raise UserError(
                        f"--filter {judge.name}: it and the captioner {path.name} come from one another; finetune each alone"
                    )


def _present(part: Part) -> pa.Table:
    """The ids and hashes of the pictures that are there."""
    table = pa.concat_tables(part.tables(["image_id", "sha256", "status"]))
    return table.filter(pc.equal(table["status"], "success"))


def _shared(one: pa.Table, other: pa.Table) -> int:
    """How many pictures of one table are in the other, by id or by the hash of the file."""
    both = pc.or_(
        pc.is_in(one["image_id"], value_set=other["image_id"]),
        # The same file under another name; a picture whose hash nobody took is like no other.
        pc.and_(pc.is_valid(one["sha256"]), pc.is_in(one["sha256"], value_set=other["sha256"])),
    )
    return int(pc.sum(both).as_py() or 0)


def trained_on(path: Path, workspace: Workspace) -> set[str] | None:
    """The image_ids that trained a checkpoint, and those that trained the checkpoints it started from, while they stand.

    None where the checkpoint itself does not say.
    """
    found: set[str] | None = None
    for place in _ancestry(path, workspace):
        exposures = place / EXPOSURES
        if exposures.is_file():
            with naming(exposures):
                table = pq.read_table(exposures)
            if "image_id" in table.column_names:
                ids = table.filter(pc.greater(table["exposures"], 0))["image_id"].to_pylist()
                found = (found or set()) | set(ids)
        if place == path and found is None:
            return None
    return found


def _mean_exposures(path: Path) -> float:
    """How often a training showed a text of the web that it showed at all; 0 where it had none, or does not say."""
    place = path / EXPOSURES
    if not place.is_file():
        return 0.0
    with naming(place):
        table = pq.read_table(place)
    if not {"source", "exposures"} <= {*table.column_names}:
        return 0.0
    web = pc.and_(pc.equal(table["source"], "web"), pc.greater(table["exposures"], 0))
    return float(pc.mean(table.filter(web)["exposures"]).as_py() or 0.0)


def _ancestry(path: Path, workspace: Workspace) -> Iterator[Path]:
    """A checkpoint and, as far as they are where its record says and are what they were, those that it came from."""
    known: set[Path] = set()
    waiting = [path]
    while waiting:
        place = waiting.pop()
        if place in known:
            continue
        known.add(place)
        yield place
        waiting += parents(checkpoint.read_config(place)["extra"], workspace)


def parents(record: Mapping[str, Any], workspace: Workspace) -> Iterator[Path]:
    """The checkpoints of a record's origins, as far as they are where it says and are what they were."""
    origins = record.get("origins")
    for mark, said in origins.items() if isinstance(origins, dict) else ():
        try:
            parent = workspace.model(said["given"])
            if parent.is_dir() and checkpoint.fingerprint(parent) == mark:
                yield parent
        except (UserError, KeyError, TypeError):
            continue  # it moved, or is a plug-in's
