"""The training loader from shards to batches, beside a plain PyTorch DataLoader over the same Parquet, on one core.

Made pictures, 512 pixels wide, JPEG quality 90, in shards of 100-row groups. Ours is `Pairs.batches` without a cache (shuffled,
tokenised, bounded window); theirs reads row groups in order, decodes with Pillow, resizes bicubic, and collates. Both
end with normalised float batches. In pairs, in one process that is pinned to one core. At 48 pixels, the tiny model's, two
workers of ours have to be ahead of that model in training (`benchmarks/training.py`'s step), each with the machine alone.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from _form import Record, in_pairs, main
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from training import stepper

from capfilt.data.pair_shards import PairInput
from capfilt.data.pairs import Pairs
from capfilt.data.tokenizer import Tokenizer
from capfilt.data.transforms import Views, normalise
from capfilt.models.common.vision import CLIP_MEAN, CLIP_STD
from capfilt.tables.contracts import IMAGES
from capfilt.tables.ids import image_id
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part

BATCH = 32
SIDE = 512


def picture(rng: np.random.Generator) -> bytes:
    """A smooth picture with detail: noise at three scales, about as large as a photograph of its size."""
    total = np.zeros((SIDE, SIDE, 3), np.float32)
    for cells, strength in ((8, 90.0), (64, 40.0), (256, 12.0)):
        coarse = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        layers = [
            Image.fromarray(coarse[..., c]).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for c in range(3)
        ]
        total += np.stack([np.asarray(layer) for layer in layers], axis=2)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write(root: Path, count: int, seed: int) -> Part:
    """A part of `count` pictures in shards of 200."""
    part = Part(root / "web")
    mark = part.begin(IMAGES, "benchmark", {"seed": seed})
    rng = np.random.default_rng(seed)
    for shard, start in enumerate(range(0, count, 200)):
        rows = []
        for number in range(start, min(start + 200, count)):
            row = {
                "image_id": image_id("web", str(number)), "dataset": "web", "key": str(number), "source": "web",
                "captions": [f"a made picture number {number} of many"], "status": "success",
                "image": {"bytes": picture(rng), "path": None}, "width": SIDE, "height": SIDE,
                "original_width": SIDE, "original_height": SIDE,
            }  # fmt: skip
            rows.append(row)
        part.commit(shard, IMAGES.table(rows), Counts(len(rows), len(rows)), mark, 1.0)
    return part


def statistics_of_clip() -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation by channel, [3, 1, 1] each."""
    return torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]


class Plain(IterableDataset[tuple[torch.Tensor, str]]):
    """What one writes without a loader."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size
        self.mean, self.std = statistics_of_clip()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, str]]:
        for path in self.paths:
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group, columns=["image", "captions"]).to_pylist():
                    image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
                    image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
                    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
                    yield (pixels - self.mean) / self.std, row["captions"][0]


def outrun(part: Part, tokenizer: Tokenizer, args: argparse.Namespace, record: Record) -> None:
    """Images per second of two workers at the tiny model's pixels, beside the model's own in training."""
    rows, turns = 64, 1 if args.quick else 3
    batches, steps = (8, 2) if args.quick else (48, 8)
    warm = 4  # batches that workers make while they start are no measure of them
    step = stepper("capfilt", "tiny", rows, args.seed, torch.device("cpu"))
    step()
    rates = []
    for _ in range(turns):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        trained = rows * steps / (time.perf_counter() - start)
        pairs = Pairs([PairInput(part)], size=48, cache=0, workers=2)
        found = pairs.batches(tokenizer, rows, steps=warm + batches, seed=args.seed)
        for _ in range(warm):
            next(found)
        start = time.perf_counter()
        delivered = sum(len(batch) for batch in found)
        rates.append((delivered / (time.perf_counter() - start), trained))
    record.figure("images_per_second_48_two_workers", statistics.median(loaded for loaded, _ in rates))
    record.figure("images_per_second_tiny_trains", statistics.median(trained for _, trained in rates))
    times = statistics.median(loaded / trained for loaded, trained in rates)
    if args.quick:
        record.figure("times_tiny_training", times)
    else:
        record.target("times_tiny_training", times, ">=", 1.0)


def measure(args: argparse.Namespace, record: Record) -> None:
    """Images per second and core at both sizes, and the median ratio of the pairs."""
    count = 100 if args.quick else 600
    with tempfile.TemporaryDirectory() as scratch:
        part = write(Path(scratch), count, args.seed)
        paths = [part.path / f"{shard:05d}.parquet" for shard in part.shards()]
        sizes = {size: Pairs([PairInput(part)], size=size, cache=0) for size in (48, 224, 384)}
        tokenizer = Tokenizer.train(sizes[48].texts(), 200)
        outrun(part, tokenizer, args, record)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        mean, std = statistics_of_clip()
        steps = count // BATCH
        delivered: list[int] = []
        for size, pairs in sizes.items():

            def ours(pairs: Pairs = pairs) -> float:
                found: Any = 0.0
                delivered.append(0)
                for batch in pairs.batches(tokenizer, BATCH, steps=steps):
                    assert batch.pixels is not None
                    delivered[-1] += len(batch)
                    found = normalise(batch.pixels, mean, std)[0, 0, 0, 0].item()
                return float(found)

            def cropping(pairs: Pairs = pairs) -> float:
                found: Any = 0.0
                views = Views((0.2, 1.0), flip=0.5, seed=args.seed)
                for batch in pairs.batches(tokenizer, BATCH, steps=steps, views=views):
                    assert batch.pixels is not None
                    found = normalise(batch.pixels, mean, std)[0, 0, 0, 0].item()
                return float(found)

            def theirs(size: int = size) -> float:
                found: Any = 0.0
                loader = DataLoader(Plain(paths, size), batch_size=BATCH, drop_last=True)
                for _, (pixels, _) in zip(range(steps), loader, strict=False):
                    found = pixels[0, 0, 0, 0].item()
                return float(found)

            ours()
            timed = in_pairs(ours, theirs, 3 if args.quick else 5)
            images = steps * BATCH
            record.figure(f"images_per_second_{size}", images / statistics.median(timed.first))
            record.figure(f"plain_images_per_second_{size}", images / statistics.median(timed.second))
            if args.quick:
                # A hundred pictures are over before the reader has read ahead: only that all arrive is asked here.
                record.figure(f"times_faster_{size}", timed.ratio)
                record.target(f"images_delivered_{size}", delivered[-1], "==", images)
                continue
            if size == 48:
                record.figure(f"times_faster_{size}", timed.ratio)
                continue
            record.target(f"times_faster_{size}", timed.ratio, ">=", 1.5)
            # Beside the same plain loader, which crops nothing.
            timed = in_pairs(cropping, theirs, 5)
            record.figure(f"cropped_images_per_second_{size}", images / statistics.median(timed.first))
            record.target(f"times_faster_cropped_{size}", timed.ratio, ">=", 1.5)


if __name__ == "__main__":
    main(__doc__, measure)
