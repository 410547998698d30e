"""The frozen trunk on processors: a batch through it a few pictures at a time, against the batch as one.

Same weights, same pictures, in pairs; the features agree to rounding. What it buys is the rate at which every stage of
`pipelines/photographs.yaml` reads pictures.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from _form import Record, in_pairs, main

from capfilt.models.common.presets import TRUNK_VISION
from capfilt.models.common.trunk import TRUNKS, Trunk


def measure(args: argparse.Namespace, record: Record) -> None:
    """Images per second of both ways, the median ratio, the largest difference."""
    size = TRUNK_VISION.image_size
    batch = 16 if args.quick else 64
    recipe = TRUNKS[TRUNK_VISION.trunk]
    trunk = Trunk(recipe, size, frozen=True).eval()
    generator = torch.Generator().manual_seed(args.seed)
    pixels = torch.randn(batch, 3, size, size, generator=generator)

    @torch.no_grad()
    def whole() -> torch.Tensor:
        features: torch.Tensor = trunk.net.extract_features(pixels)
        return features.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def pieces() -> torch.Tensor:
        out: torch.Tensor = trunk(pixels)
        return out

    difference = float((whole() - pieces()).abs().max())
    pairs = in_pairs(pieces, whole, 3 if args.quick else 7)
    record.figure("images", batch)
    record.figure("pieces_images_per_second", batch / statistics.median(pairs.first))
    record.figure("whole_images_per_second", batch / statistics.median(pairs.second))
    record.target("times_faster", pairs.ratio, ">=", 1.0)
    record.target("largest_difference", difference, "<=", 1e-3)


if __name__ == "__main__":
    main(__doc__, measure)
