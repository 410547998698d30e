"""The human pairs that a calibration is fitted on: which they are, and that nothing of the filter saw them.

Not here: their scores (`judge.py`), the fit (`stage.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capfilt.data.cleaning import clean
from capfilt.errors import UserError, naming
from capfilt.models import checkpoint
from capfilt.stages.calibrate import CalibrateOptions
from capfilt.stages.training import EXPOSURES
from capfilt.tables.contracts import MAX_TEXT_CHARACTERS
from capfilt.tables.shards import Part
from capfilt.tables.texts import FOUND_COLUMNS, folded, found_texts
from capfilt.tables.workspace import Workspace

LEAST_IMAGES = 50
"""Fewer pictures give a slope that nobody should trust."""

DRAWS = 4
"""Foreign texts are looked for among so many times as many, of which the picture's own and repeated ones are left out."""

Pairs = dict[str, list[dict[str, Any]]]
"""By image, its texts: rows as of `texts_of`, and whether each is the image's `own`."""


def pairs_of(part: Part, negatives: int, seed: int, given: str) -> Pairs:
    """Each picture that has human texts with all of them, and with `negatives` texts drawn from those of other pictures.

    What is drawn for a picture depends on the seed, the picture and the texts of all, in no order of shards. Raises UserError
    where fewer than LEAST_IMAGES pictures have a human text.
    """
    rows = human_texts(part)
    own: Pairs = {}
    for row in rows:
        own.setdefault(row["image_id"], []).append({**row, "own": True})
    if len(own) < LEAST_IMAGES:
        raise UserError(
            f"{given}: {len(own):,} pictures with a human text; give {LEAST_IMAGES} or more (ingest --source human)"
        )
    pairs: Pairs = {}
    for image, texts in own.items():
        said = {folded(row["text"]) for row in texts}
        rng = np.random.default_rng([seed, *hashlib.blake2b(image.encode(), digest_size=8).digest()])
        drawn = [rows[place] for place in rng.integers(len(rows), size=DRAWS * negatives)]
        # A text that stands with this picture too is true of it, whoever else has it.
        able = {row["text_id"]: row for row in drawn if folded(row["text"]) not in said}
        foreign = [{**row, "image_id": image, "own": False} for row in [*able.values()][:negatives]]
        pairs[image] = [*texts, *foreign]
    if not any(not row["own"] for some in pairs.values() for row in some):
        raise UserError(f"{given}: all of its pictures have one text, so that none is wrong; give others")
    return pairs


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
    """Warnings. UserError where a training behind the filter saw a calibration picture, or the judged part has it too."""
    given = f"--calibration {options.calibration}"
    columns = ["image_id", "sha256", "status"]
    here, there = (pa.concat_tables(part.tables(columns)) for part in (held_out, judged))
    here, there = (each.filter(pc.equal(each["status"], "success")) for each in (here, there))
    ids = here["image_id"]
    shared = pc.or_(
        pc.is_in(ids, value_set=there["image_id"]),
        # The same file under another name; a picture whose hash nobody took is like no other.
        pc.and_(pc.is_valid(here["sha256"]), pc.is_in(here["sha256"], value_set=there["sha256"])),
    )
    if count := pc.sum(shared).as_py():
        raise UserError(
            f"{given}: {count:,} of its pictures are in --images {options.images} too; give others"
        )
    path = workspace.model(options.filter)
    seen = trained_on(path, workspace)
    if seen is None:
        return [f"{path} does not say which pictures trained it; none of {given} may be among them"]
    if both := len(seen & set(ids.to_pylist())):
        raise UserError(
            f"{given}: {both:,} of its {len(ids):,} pictures trained {options.filter}; give pictures that it never saw"
        )
    return []


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
        origins = checkpoint.read_config(place)["extra"].get("origins")
        for mark, said in origins.items() if isinstance(origins, dict) else ():
            try:
                parent = workspace.model(said["given"])
                if parent.is_dir() and checkpoint.fingerprint(parent) == mark:
                    waiting.append(parent)
            except (UserError, KeyError, TypeError):
                continue  # it moved, or is a plug-in's
