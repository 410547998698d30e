"""Small parts and checkpoints for the tests of stages, execution and recipes."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
from PIL import Image

from capfilt.models.common.ranks import Ranks
from capfilt.tables.contracts import IMAGES, VERDICTS
from capfilt.tables.ids import image_id
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part
from capfilt.tables.texts import found_texts
from capfilt.tables.workspace import Workspace
from capfilt.training import distributed

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}


def jpeg(colour: str, size: int = 32, seed: int = 0) -> bytes:
    """A noisy picture of one colour."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 12, (size, size, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def image_rows(
    dataset: str, count: int, *, source: str = "web", start: int = 0, texts: int = 1, split=None
) -> list[dict]:
    """Rows of an images table: pictures of one colour, captions that name it."""
    rows = []
    names = list(COLOURS)
    for number in range(start, start + count):
        colour = names[number % len(names)]
        rows.append(
            {
                "image_id": image_id(dataset, f"{number:05d}"), "dataset": dataset, "key": f"{number:05d}",
                "url": f"http://example.org/{number}.jpg", "source": source,
                "captions": [f"a {colour} square number {k}" for k in range(texts)], "split": split,
                "status": "success", "image": {"bytes": jpeg(colour, seed=number), "path": None},
                "width": 32, "height": 32, "original_width": 32, "original_height": 32,
            }
        )  # fmt: skip
    return rows


def failed_row(dataset: str, key: str, failure: str = "not_found", **changes) -> dict:
    """A row whose picture never came."""
    row = {
        "image_id": image_id(dataset, key), "dataset": dataset, "key": key, "url": None, "source": "web",
        "captions": ["a lost picture"], "status": "failed_to_download", "failure": failure, "image": None,
    }  # fmt: skip
    return {**row, **changes}


def each_rank(monkeypatch, worlds=(1, 2)) -> Iterator[None]:
    """One step for every rank of some numbers of them; a training that is run meanwhile takes itself for that one."""
    for world in worlds:
        for rank in range(world):
            monkeypatch.setattr(
                distributed, "joined", lambda rank=rank, world=world: nullcontext(Ranks(rank, world))
            )
            yield


def write_images(part: Part, shards: list[list[dict]], identity: dict | None = None) -> Part:
    """Commit an images part, one list of rows per shard."""
    mark = part.begin(IMAGES, "test", identity or {"made": "by a test"})
    for number, rows in enumerate(shards):
        good = sum(row["status"] == "success" for row in rows)
        failed: dict[str, int] = {}
        for row in rows:
            if row["status"] != "success":
                failed[row["failure"]] = failed.get(row["failure"], 0) + 1
        part.commit(number, IMAGES.table(rows), Counts(len(rows), good, {}, failed), mark, 0.01)
    return part


def tiny_checkpoint(
    directory, seed: int = 0, texts=("a red green blue white square number 0 1 2 3 4",) * 3
) -> None:
    """An untrained tiny BLIP with a vocabulary of its own."""
    # Here and below: whoever makes pictures alone needs no torch.
    from capfilt.data.tokenizer import Tokenizer
    from capfilt.models import build, checkpoint, preset

    tokenizer = Tokenizer.train(list(texts), 200)
    config = preset("blip", "tiny", tokenizer.vocab_size)
    vision = dataclasses.replace(config.vision, width=32, depth=1, heads=2, hidden=64)
    text = dataclasses.replace(config.text, width=32, depth=1, heads=2, hidden=64)
    model = build(dataclasses.replace(config, vision=vision, text=text, embed_dim=16), seed=seed)
    checkpoint.save(directory, model, tokenizer, {})


def tiny_vilt(
    directory, seed: int = 0, texts=("a red green blue white square number 0 1 2 3 4",) * 3
) -> None:
    """An untrained tiny ViLT with a vocabulary of its own."""
    from capfilt.data.tokenizer import Tokenizer
    from capfilt.models import build, checkpoint, preset

    tokenizer = Tokenizer.train(list(texts), 200)
    config = dataclasses.replace(
        preset("vilt", "tiny", tokenizer.vocab_size), width=32, depth=1, heads=2, hidden=64
    )
    checkpoint.save(directory, build(config, seed=seed), tokenizer, {})


def judged(
    workspace: Workspace,
    images: str,
    name: str,
    probabilities: list[float | None],
    reasons: dict[int, str] | None = None,
    by: str = "match_probability",
) -> Part:
    """Verdicts on the found texts of an images part: kept at a probability of 0.5; `reasons` drop a text whatever it has."""
    part, rule = workspace.part("images", images), workspace.part("verdicts", name)
    contract = VERDICTS.extended({"match_probability": "that the text fits"})
    mark = rule.begin(contract, "test", {"options": {"by": by}})
    left = iter(enumerate(probabilities))
    for shard in part.shards():
        rows = []
        for row in found_texts(part.read(shard)).to_pylist():
            number, p = next(left)
            keep, why = bool(p and p >= 0.5), (reasons or {}).get(number, "")
            decided = "no_score" if p is None else f"{by}_{'at' if keep else 'below'}_threshold"
            texts = {each: row[each] for each in ("text_id", "image_id", "source", "text")}
            rows.append({**texts, "match_probability": p, "keep": keep, "reason": why or decided})
        kept = sum(row["keep"] for row in rows)
        lost = len(rows) - kept
        rule.commit(
            shard, contract.table(rows), Counts(len(rows), kept, {"no": lost} if lost else {}), mark, 0.1
        )
    return rule
