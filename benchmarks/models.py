"""The models that `retrain` knows, side by side: how fast each judges a picture with a text.

ViLT's claim is that a picture need not be read by a network of its own before the text meets it: no regions, no convolutions,
no vision tower (arXiv 2102.03334, figure 1 and table 6, where region features take 810 of 900 ms and its own linear patches
0.4 of 15). So for every model, random weights, one text per picture:

    pairs per second      pictures not seen before, each with a text, in batches: BLIP and ALBEF encode it and match the text by
                          cross-attention, ViLT runs its one transformer, CLIP compares two vectors
    image share           how much of that goes into the picture before the text is looked at
    further texts         per second, once a picture is encoded: what ranking costs, where ViLT starts over
    milliseconds          of one pair alone
    GFLOPs                of one pair

All models take turns in every round, each first in another one; medians. Bases at the sizes they are published for in retrieval
(BLIP, ALBEF and ViLT 384 pixels, CLIP ViT-B/32 224), texts of 20 tokens; bf16 on a GPU, fp32 elsewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _device import timed
from _form import Record, main
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from capfilt.models import build, preset

SIZES = {"base": {"blip": 384, "albef": 384, "vilt": 384, "clip": 224}, "tiny": {}}
TOKENS = 20


@dataclass(frozen=True)
class Judge:
    """A model as two steps: what a picture becomes before a text is looked at, and the text's score with it."""

    model: nn.Module
    image_size: int
    see: Callable[[Tensor], Any]
    score: Callable[[Any, Tensor], Tensor]

    def pair(self, images: Tensor, ids: Tensor) -> Tensor:
        """Scores of texts `ids` [B, L] with pictures [B, 3, S, S]."""
        return self.score(self.see(images), ids)


def judges(size: str, vocab: int, device: torch.device) -> dict[str, Judge]:
    """Each model as a Judge, on the device, in evaluation mode."""
    made: dict[str, Judge] = {}
    for name in ("blip", "albef", "vilt", "clip"):
        config = preset(name, size, 49408 if name == "clip" and size == "base" else vocab)
        image_size = SIZES[size].get(name, config.image_size)
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=image_size))
        model = build(config).eval().to(device)
        see, score = {"blip": by_cross, "albef": by_cross, "vilt": by_stream, "clip": by_cosine}[name](model)
        made[name] = Judge(model, image_size, see, score)
    return made


def by_cross(model: Any) -> tuple[Callable[[Tensor], Any], Callable[[Any, Tensor], Tensor]]:
    """BLIP and ALBEF: the picture's keys and values for every layer that looks at them, then a pass of the text."""
    return (
        lambda images: model.prefill_cross(model.encode_image(images)),
        lambda cross, ids: model.match_logits(ids, None, cross),
    )


def by_stream(model: Any) -> tuple[Callable[[Tensor], Any], Callable[[Any, Tensor], Tensor]]:
    """ViLT: patches through a linear map, then everything."""
    return model.encode_image, lambda image, ids: model.match_logits(model.fuse(ids, None, image, first=True))


def by_cosine(model: Any) -> tuple[Callable[[Tensor], Any], Callable[[Any, Tensor], Tensor]]:
    """CLIP: two vectors."""
    return model.embed_image, lambda image, ids: (image * model.embed_text(ids)).sum(dim=1)


def texts(count: int, judge: Judge, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random texts of TOKENS tokens, int64 [count, TOKENS]; a CLIP's end with its end."""
    config: Any = judge.model.config
    words = config.text.vocab_size
    ids = torch.randint(5, words - 2, (count, TOKENS), generator=generator)
    if hasattr(config.text, "end_id"):
        ids[:, -1] = config.text.end_id
    return ids.to(device)


def gflops(judge: Judge, images: Tensor, ids: Tensor) -> float:
    """Of one pair, counted by torch as matrix products and convolutions."""
    # Counted as products, which the fused kernels of some devices are not.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        judge.pair(images[:1], ids[:1])
    return counter.get_total_flops() / 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--batch-size", type=int, default=0, help="pairs at a time (default 8, on a GPU 128)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--markdown", action="store_true", help="also print the table as Markdown")


def measure(args: argparse.Namespace, record: Record) -> None:
    """Every model, in turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, rounds = ("tiny", 3) if args.quick else ("base", args.rounds)
    batch = args.batch_size or (128 if device.type == "cuda" else 8)
    generator = torch.Generator().manual_seed(args.seed)
    known = judges(size, 1000 if args.quick else 30524, device)
    inputs = {}
    for name, judge in known.items():
        pixels = torch.randint(0, 256, (batch, 3, judge.image_size, judge.image_size), generator=generator)
        inputs[name] = (pixels.to(torch.uint8).to(device), texts(batch, judge, generator, device))
    seconds: dict[str, dict[str, list[float]]] = {
        name: {what: [] for what in ("pair", "see", "score", "alone")} for name in known
    }
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for turn in range(rounds + 1):
            names = list(known)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                judge, (images, ids) = known[name], inputs[name]
                seen = judge.see(images)
                work: dict[str, Callable[[], object]] = {
                    "pair": lambda judge=judge, images=images, ids=ids: judge.pair(images, ids),
                    "see": lambda judge=judge, images=images: judge.see(images),
                    "score": lambda judge=judge, seen=seen, ids=ids: judge.score(seen, ids),
                    "alone": lambda judge=judge, images=images, ids=ids: judge.pair(images[:1], ids[:1]),
                }
                for what, call in work.items():
                    spent = timed(call, device)
                    if turn:  # the first round warms up
                        seconds[name][what].append(spent)
        counted = {name: gflops(judge, *inputs[name]) for name, judge in known.items()}
    head = (
        "model",
        "million parameters",
        "pixels",
        "GFLOPs",
        "pairs/s",
        "image share",
        "further texts/s",
        "ms, one pair",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, judge in known.items():
        spent = {what: statistics.median(each) for what, each in seconds[name].items()}
        # Tied weights are in `parameters` once.
        row = {
            "million_parameters": sum(each.numel() for each in judge.model.parameters()) / 1e6,
            "pixels": judge.image_size,
            "gflops": counted[name],
            "pairs_per_second": batch / spent["pair"],
            "image_share": statistics.median(a / b for a, b in zip(seconds[name]["see"], seconds[name]["pair"], strict=True)),
            "further_texts_per_second": batch / spent["score"],
            "milliseconds_alone": 1000 * spent["alone"],
        }  # fmt: skip
        for what, value in row.items():
            record.figure(f"{name}_{what}", value)
        lines.append(f"| {name} | " + " | ".join(f"{value:.3g}" for value in row.values()) + " |")
    for other in ("blip", "albef", "clip"):
        times = [b / a for a, b in zip(seconds["vilt"]["pair"], seconds[other]["pair"], strict=True)]
        record.figure(f"vilt_times_{other}", statistics.median(times))
    record.target("vilt_image_share", record.figures["vilt_image_share"], "<=", 0.1)
    if args.markdown:
        print("\n".join(lines))


if __name__ == "__main__":
    main(__doc__, measure, add_arguments)
