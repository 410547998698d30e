"""How far `--draft` moves captions and scores: what a JPEG scaled by its decoder does to a filter and a captioner.

Large photographs are made of small ones: half of them are one enlarged, half are tiles of sixteen. Their sides are 4.1 to 10
times the model's, for a decoder scales none below 4 times. Each is decoded whole and scaled; the same texts are scored and a
greedy caption is written under both. Without --checkpoint the model is a tiny one of random weights, which tells pictures
apart more sharply than a trained one.

python benchmarks/draft.py --data ../shared/data/clean/images --checkpoint ws/models/filter
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from _form import Record, main
from engine import made
from PIL import Image

from capfilt.data.transforms import decode_uint8
from capfilt.inference.captioner import Captioner
from capfilt.inference.filter import Filter
from capfilt.models import checkpoint

TILES = 4
TEXTS = ("a dog runs on the beach", "two people sit at a table", "a red bus in a street", "a cat")


def photographs(folder: Path, count: int, side: int, seed: int) -> Iterator[bytes]:
    """JPEGs of quality 90."""
    rng = np.random.default_rng(seed)
    names = sorted(folder.iterdir())
    for number in range(count):
        width, height = (int(side * rng.uniform(4.1, 10)) for _ in range(2))
        tiles = 1 if number % 2 == 0 else TILES
        large = Image.new("RGB", (width, height))
        for place in range(tiles**2):
            left, top = width * (place % tiles) // tiles, height * (place // tiles) // tiles
            right, bottom = width * (place % tiles + 1) // tiles, height * (place // tiles + 1) // tiles
            with Image.open(names[int(rng.integers(len(names)))]) as small:
                tile = small.convert("RGB").resize((right - left, bottom - top), Image.Resampling.LANCZOS)
            large.paste(tile, (left, top))
        buffer = io.BytesIO()
        large.save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def measure(args: argparse.Namespace, record: Record) -> None:
    """Differences of all answers, and the seconds of both decodings."""
    if args.checkpoint:
        model, tokenizer, _ = checkpoint.load(args.checkpoint)
    else:
        model, tokenizer = made("tiny", args.seed, torch.device("cpu"))
    size = model.config.image_size
    pixels: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for data in photographs(args.data, 20 if args.quick else args.count, size, args.seed):
        for draft, rows in pixels.items():
            rows.append(decode_uint8(data, size, draft=draft))
    whole, scaled = (np.stack(pixels[draft]) for draft in (False, True))
    record.figure("photographs", len(whole))
    record.figure("mean_difference_of_pixels", np.abs(whole.astype(int) - scaled).mean())
    if model.config.half != "captioner":
        scorer = Filter(model, tokenizer, "fp32")
        index = [row for row in range(len(whole)) for _ in TEXTS]
        texts = list(TEXTS) * len(whole)
        found = [scorer.score_texts(each, index, texts, batch_size=32) for each in (whole, scaled)]
        for name in ("itm_score", "itc_score"):
            one, other = (np.array([getattr(score, name) for score in scores]) for scores in found)
            apart = np.abs(one - other)
            record.figure(f"{name}_standard_deviation", one.std())
            record.figure(f"{name}_mean_difference", apart.mean())
            record.figure(f"{name}_difference_99th_percentile", np.quantile(apart, 0.99))
            record.figure(f"{name}_largest_difference", apart.max())
            record.figure(f"{name}_share_moved_by_0.001", (apart >= 1e-3).mean())
    if model.config.half != "filter":
        captioner = Captioner(model, tokenizer, "fp32")
        said = [captioner.caption(each, method="greedy", batch_size=32) for each in (whole, scaled)]
        changed = [one.text != other.text for one, other in zip(*said, strict=True)]
        record.figure("share_of_greedy_captions_changed", np.mean(changed))


def arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--data", type=Path, required=True, help="folder of small photographs")
    parser.add_argument("--checkpoint", default="", help="a BLIP; default: a tiny one of random weights")
    parser.add_argument("--count", type=int, default=200, help="large photographs to make")


if __name__ == "__main__":
    main(__doc__, measure, arguments)
