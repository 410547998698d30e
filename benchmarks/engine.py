"""Captioning and scoring: images/s of the engines, their share of a floor, and transformers' BLIP doing the same work.

Work per image: a vision pass, a caption of 20 tokens drawn from the nucleus, another vision pass, two texts scored. The floor
is the arithmetic of that work at the rate of a plain matrix product here. Weights are random, with the language model's
logits spread as a trained one's are; what the engines answer is first held against the model called plainly. "shared" is
both with one vision pass, "int8" both in 8 bits (on processors), with how far its scores are off. "stages": `caption` and
`score` from Parquet shards of 512-pixel JPEGs to Parquet shards, and the engine's share of their wall time.

With --vs-transformers the same weights and pictures go through transformers in the same run, in turn. "called", as its model
cards do: `generate` for a picture, then an ITM forward per pair, each with its own vision pass (on a GPU in batches of the
same size as ours). "best": `generate` in batches, and one vision pass per image, in batches too, for all of its texts. It
gives ITM alone; the engine's scores are ITM and ITC.

On a GPU: python benchmarks/engine.py --preset base --batch-size 32 64 128 256 512 --vs-transformers
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from _device import matmul_rate, timed, twins
from _form import Record, main, peak_memory
from torch import Tensor

from capfilt.data.tokenizer import ADDED, SPECIALS, Tokenizer
from capfilt.inference.captioner import Captioner
from capfilt.inference.filter import Filter
from capfilt.inference.lowbit import FP8_CAPABILITY
from capfilt.models.blip import Blip, BlipConfig, build
from capfilt.models.presets import preset

VOCABULARY = {"tiny": 4096, "base": 30524}
"""What `capfilt pretrain` learns from a corpus unless told otherwise, and the published one."""
PIXELS = {"tiny": 48, "base": 384}
TOKENS = 20
TEXTS = 2
SPREAD = 8.0
"""Random logits have a deviation of about 0.5, trained ones of several: a nucleus of most of the vocabulary is nobody's."""


def config_of(name: str) -> BlipConfig:
    """The preset at its finetuning size, without what transformers lacks (a convolutional stem)."""
    config = preset(name, VOCABULARY[name])
    vision = dataclasses.replace(config.vision, stem="patch", image_size=PIXELS[name])
    return dataclasses.replace(config, vision=vision)


def made(name: str, seed: int, device: torch.device) -> tuple[Blip, Tokenizer]:
    """A model of random weights and a tokenizer of as many words."""
    config = config_of(name)
    model = build(config, seed)
    with torch.no_grad():
        model.text_decoder.cls.predictions.transform.LayerNorm.weight.fill_(SPREAD)
    count = config.vocab_size - len(SPECIALS) - len(ADDED) - 3
    tokenizer = Tokenizer([*SPECIALS, "a", "picture", "of", *(f"w{i}" for i in range(count)), *ADDED])
    return model.to(device).eval(), tokenizer


@dataclasses.dataclass(frozen=True)
class Given:
    """Pictures, and two texts for each: 6 to 24 words, as captions and alt-texts are."""

    pixels: Tensor
    texts: list[str]
    image_index: list[int]


def given(config: BlipConfig, rows: int, seed: int, device: torch.device) -> Given:
    generator = torch.Generator().manual_seed(seed)
    side = config.image_size
    pixels = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=generator)
    lengths = torch.randint(6, 25, (rows * TEXTS,), generator=generator).tolist()
    texts = [
        " ".join(f"w{i}" for i in torch.randint(0, 1000, (length,), generator=generator).tolist())
        for length in lengths
    ]
    return Given(pixels.to(device), texts, [i // TEXTS for i in range(rows * TEXTS)])


def flops_of(config: BlipConfig, text_tokens: float, prompt: int) -> dict[str, float]:
    """FLOPs per image of each kind of work: multiplications and additions of its matrix products."""
    v, t = config.vision, config.text
    n = v.tokens
    block = n * (4 * v.width**2 + 2 * v.width * v.hidden) + 2 * n * n * v.width
    encode = 2 * (v.depth * block + (n - 1) * 3 * v.patch_size**2 * v.width)
    cross = 2 * t.depth * n * 2 * v.width * t.width

    def text(length: float, with_image: bool) -> float:
        layer = length * (4 * t.width**2 + 2 * t.width * t.hidden) + 2 * length * length * t.width
        if with_image:
            layer += length * (2 * t.width**2 + 2 * n * t.width)
        return 2 * t.depth * layer

    head = 2 * TOKENS * (t.width**2 + t.width * t.vocab_size)
    decode = cross + text(TOKENS + prompt - 1, True) + head
    score = cross + TEXTS * (text(text_tokens, True) + text(text_tokens, False))
    return {
        "encode": encode,
        "decode": decode,
        "caption": encode + decode,
        "score": encode + score,
        "both": 2 * encode + decode + score,
    }


def works(captioner: Captioner, scorer: Filter, data: Given) -> dict[str, Callable[[], object]]:
    """The engines' work by name, each on all rows as one batch."""
    rows = len(data.pixels)
    model = captioner.model
    with torch.inference_mode(), captioner.autocast():
        encoded = model.encode_image(data.pixels)

    @torch.inference_mode()
    def encode() -> object:
        with captioner.autocast():
            return model.encode_image(data.pixels)

    def caption() -> list[str]:
        # As many tokens as there may be: random weights end when they like.
        found = captioner.caption(
            data.pixels, max_new_tokens=TOKENS, min_new_tokens=TOKENS, batch_size=rows, seed=1
        )
        return [each.text for each in found]

    def decode() -> object:
        saved = captioner.model.encode_image
        captioner.model.encode_image = lambda _: encoded  # type: ignore[method-assign,assignment]
        try:
            return caption()
        finally:
            captioner.model.encode_image = saved  # type: ignore[method-assign]

    def score() -> object:
        return scorer.score_texts(data.pixels, data.image_index, data.texts, batch_size=rows)

    def both() -> object:
        caption()
        return score()

    return {"encode": encode, "decode": decode, "caption": caption, "score": score, "both": both}


class Transformers:
    """transformers' captioner and retrieval model with the same weights, and what one writes around them."""

    def __init__(self, model: Blip, tokenizer: Tokenizer, data: Given, half: bool) -> None:
        self.tokenizer, self.data = tokenizer, data
        self.device = data.pixels.device
        self.dtype = torch.bfloat16 if half else torch.float32
        self.captioner, self.filter = (
            twin.to(self.device, self.dtype).eval() for twin in twins(model, tokenizer.sep_id)
        )
        self.mean, self.std = model.visual_encoder.mean, model.visual_encoder.std
        self.prompt = tokenizer.encode([model.config.prompt])[0].to(self.device)

    def normalised(self, chosen: slice) -> Tensor:
        return ((self.data.pixels[chosen].float() / 255 - self.mean) / self.std).to(self.dtype)

    def chunks(self, rows: int) -> list[slice]:
        return [slice(at, at + rows) for at in range(0, len(self.data.pixels), rows)]

    @torch.inference_mode()
    def caption(self, rows: int) -> None:
        """Samples; `generate` overwrites position 0 with [DEC] and drops the prompt's [SEP]."""
        length = self.prompt.shape[1] - 1 + TOKENS
        for chunk in self.chunks(rows):
            pixels = self.normalised(chunk)
            self.captioner.generate(
                pixels, self.prompt.repeat(len(pixels), 1),
                do_sample=True, top_p=0.9, top_k=0, max_length=length, min_length=length,
            )  # fmt: skip

    def texts(self, chosen: slice) -> dict[str, Tensor]:
        ids, mask = self.tokenizer.encode(self.data.texts[chosen])
        ids[:, 0] = self.tokenizer.enc_id
        return {"input_ids": ids.to(self.device), "attention_mask": mask.long().to(self.device)}

    @torch.inference_mode()
    def score_called(self, rows: int) -> None:
        """All pairs, one call for the images' first texts and one for the second."""
        for chunk in self.chunks(rows):
            for number in range(TEXTS):
                texts = self.texts(slice(chunk.start * TEXTS + number, chunk.stop * TEXTS, TEXTS))
                self.filter(pixel_values=self.normalised(chunk), **texts)[0].softmax(-1)[:, 1].tolist()

    @torch.inference_mode()
    def score_best(self) -> list[float]:
        """P(match) of all pairs, the vision pass shared by an image's texts."""
        tokens = self.filter.vision_model(pixel_values=self.normalised(slice(None))).last_hidden_state
        states = self.filter.text_encoder(
            **self.texts(slice(None)), encoder_hidden_states=tokens.repeat_interleave(TEXTS, 0)
        ).last_hidden_state
        found: list[float] = self.filter.itm_head(states[:, 0]).softmax(-1)[:, 1].tolist()
        return found


def in_turn(
    works: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each, all run once per round, each going first in turn, so that drift hits all alike."""
    names = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for at in range(len(names)):
            name = names[(number + at) % len(names)]
            seconds[name].append(timed(works[name], device))
    return seconds


@torch.no_grad()
def check(name: str, captioner: Captioner, scorer: Filter, data: Given, record: Record) -> None:
    """Greedy tokens and match probabilities of the engines against the model called plainly, without any cache."""
    model, tokenizer = captioner.model, captioner.tokenizer
    few = data.pixels[:2]
    said = captioner.caption(few, method="greedy", max_new_tokens=6)
    ids = captioner.prompt_ids(model.config.prompt).expand(2, -1)
    tokens = model.encode_image(few)
    for _ in range(6):
        ids = torch.cat([ids, model.lm_logits(ids, None, tokens)[:, -1].argmax(-1)[:, None]], dim=1)
    prompt = tokenizer.decode(captioner.prompt_ids(model.config.prompt).cpu())
    ended = ids.cpu()[:, :]
    plain = []
    for row in ended.tolist():
        row = row[: row.index(tokenizer.sep_id)] if tokenizer.sep_id in row else row
        plain.append(tokenizer.decode(torch.tensor(row)).removeprefix(prompt).strip())
    same = [a.text == b for a, b in zip(said, plain, strict=True)]
    record.target(f"{name}_greedy_agreement", sum(same) / len(same), "==", 1.0)
    scores = scorer.score_texts(data.pixels, data.image_index[:4], data.texts[:4])
    worst = 0.0
    for text, image, score in zip(data.texts, data.image_index, scores, strict=False):
        ids, mask = tokenizer.encode([text], max_length=model.config.max_text_tokens)
        one = model.encode_image(data.pixels[image : image + 1])
        plain_score = model.match_logits(ids.to(one.device), mask.to(one.device), one).softmax(-1)[0, 1]
        worst = max(worst, abs(score.itm_score - float(plain_score)))
    record.target(f"{name}_itm_difference", worst, "<=", 1e-4)


def measure_one(
    name: str, rows: int, rounds: int, args: argparse.Namespace, record: Record, device: torch.device
) -> None:
    """One preset at one batch size."""
    model, tokenizer = made(name, args.seed, device)
    data = given(model.config, rows, args.seed, device)
    if f"{name}_greedy_agreement" not in record.targets:
        plain = [kind(model, tokenizer, "fp32") for kind in (Captioner, Filter)]
        check(name, plain[0], plain[1], data, record)  # type: ignore[arg-type]
    captioner, scorer = (kind(model, tokenizer, args.precision, args.compile) for kind in (Captioner, Filter))
    label = f"{name}_{rows}" if len(args.batch_size) > 1 else name
    ours = works(captioner, scorer, data)  # type: ignore[arg-type]
    lengths = [len(row) for row in tokenizer.encode_ragged(data.texts)]
    flops = flops_of(model.config, statistics.mean(lengths), 4)
    low = device.type == "cuda" and args.precision == "auto"
    rate = matmul_rate(device, torch.bfloat16 if low else torch.float32)
    record.figure(f"{label}_batch", rows)
    record.figure(f"{label}_matmul_gflops", rate / 1e9)
    both = ours.pop("both") if args.vs_transformers else ours["both"]
    both()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with peak_memory() as peak:
        seconds = in_turn(ours, rounds, device)
    if args.vs_transformers:
        theirs = Transformers(model, tokenizer, data, low)
        seconds["both"] = compare(name, label, rounds, both, theirs, scorer, record)  # type: ignore[arg-type]
    for what, found in seconds.items():
        speed = rows / statistics.median(found)
        record.figure(f"{label}_{what}_images_per_second", speed)
        record.figure(f"{label}_{what}_share_of_floor", speed * flops[what] / rate)
    for shape, (plain, kernel) in getattr(captioner.reader, "seconds", {}).items():
        record.figure(f"{label}_{shape[2]}_queries_sdpa_microseconds", plain * 1e6)
        record.figure(f"{label}_{shape[2]}_queries_kernel_microseconds", kernel * 1e6)
    others(label, model, tokenizer, data, captioner, scorer, rounds, record)  # type: ignore[arg-type]
    gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else peak.gib
    record.figure(f"{label}_peak_gib", gib)


def others(
    label: str,
    model: Blip,
    tokenizer: Tokenizer,
    data: Given,
    captioner: Captioner,
    scorer: Filter,
    rounds: int,
    record: Record,
) -> None:
    """What the same work takes with one vision pass for both, and in 8 bits; how far each precision is from fp32."""
    rows, device = len(data.pixels), data.pixels.device
    captioner.share_vision(scorer)

    def shared() -> None:
        encoded = captioner.encode(data.pixels)
        captioner.caption(
            encoded,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            batch_size=rows,
            seed=1,  # type: ignore[arg-type]
        )
        scorer.score_texts(encoded, data.image_index, data.texts, batch_size=rows)

    seconds = in_turn({"shared": shared}, rounds, device)["shared"]
    record.figure(f"{label}_shared_images_per_second", rows / statistics.median(seconds))
    lows = ["bf16", "int8"] if device.type == "cpu" else ["bf16"]
    if device.type == "cuda" and torch.cuda.get_device_capability() >= FP8_CAPABILITY:
        lows.append("fp8")
    exact = Captioner(model, tokenizer, "fp32"), Filter(model, tokenizer, "fp32")
    for low in lows:
        engines = Captioner(model, tokenizer, low), Filter(model, tokenizer, low)
        if low != "bf16":
            work = works(*engines, data)["both"]
            work()
            seconds = in_turn({low: work}, rounds, device)[low]
            record.figure(f"{label}_{low}_images_per_second", rows / statistics.median(seconds))
        differences(f"{label}_{low}", data, engines, exact, record)


def differences(
    label: str,
    data: Given,
    engines: tuple[Captioner, Filter],
    exact: tuple[Captioner, Filter],
    record: Record,
) -> None:
    """How far a precision is from fp32: the share of greedy captions that are the same, and its scores."""
    few = data.pixels[:64]
    texts, index = data.texts[: len(few) * TEXTS], data.image_index[: len(few) * TEXTS]
    said = [
        [
            each.text
            for each in each_captioner.caption(
                few, method="greedy", max_new_tokens=TOKENS, min_new_tokens=TOKENS
            )
        ]
        for each_captioner in (engines[0], exact[0])
    ]
    record.figure(f"{label}_greedy_agreement", statistics.mean(a == b for a, b in zip(*said, strict=True)))
    words = [
        statistics.mean(a == b for a, b in zip(one.split(), other.split(), strict=False))
        for one, other in zip(*said, strict=True)
        if one and other
    ]
    record.figure(f"{label}_greedy_word_agreement", statistics.mean(words) if words else 1.0)
    found, plain = (scorer.score_texts(few, index, texts) for scorer in (engines[1], exact[1]))
    for score in ("itm_score", "itc_score"):
        apart = [abs(getattr(a, score) - getattr(b, score)) for a, b in zip(plain, found, strict=True)]
        record.figure(f"{label}_{score}_mean_difference", statistics.mean(apart))
        record.figure(f"{label}_{score}_largest_difference", max(apart))


def stages(name: str, count: int, args: argparse.Namespace, record: Record, device: torch.device) -> None:
    """From Parquet shards to Parquet shards: images/s of each stage, and the engine's share of its wall time."""
    import io
    import json
    import tempfile
    from pathlib import Path

    import numpy as np
    from PIL import Image

    from capfilt.execution.run import process_and_commit
    from capfilt.models import checkpoint
    from capfilt.stages.caption import CaptionStage
    from capfilt.stages.options import CaptionOptions, ScoreOptions
    from capfilt.stages.score import ScoreStage
    from capfilt.tables.contracts import IMAGES
    from capfilt.tables.ids import image_id
    from capfilt.tables.shards import Counts
    from capfilt.tables.workspace import Workspace

    rng = np.random.default_rng(args.seed)
    model, tokenizer = made(name, args.seed, device)
    with tempfile.TemporaryDirectory() as directory:
        workspace = Workspace(Path(directory))
        checkpoint.save(Path(directory) / "models" / "both", model, tokenizer)
        pictures = []
        for _ in range(min(count, 256)):
            blocks = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(blocks).resize((512, 512), Image.Resampling.BICUBIC).save(
                buffer, "JPEG", quality=90
            )
            pictures.append(buffer.getvalue())
        images = workspace.part("images", "web")
        mark = images.begin(IMAGES, "benchmark", {})
        for shard in range(2):
            rows = []
            for number in range(count // 2):
                key = f"{shard:05d}{number:04d}"
                rows.append(
                    {
                        "image_id": image_id("web", key), "dataset": "web", "key": key, "status": "success", "source": "web",
                        "captions": [" ".join(f"w{i}" for i in rng.integers(0, 1000, 12))],
                        "image": {"bytes": pictures[number % len(pictures)], "path": f"{key}.jpg"},
                    }
                )  # fmt: skip
            images.commit(shard, IMAGES.table(rows), Counts(len(rows), len(rows)), mark, 1.0)
        # Two batches at least in each shard, so that one can be made ready while another is worked on.
        batch = 0 if device.type == "cuda" else 2 if name == "base" else 64
        caption = CaptionStage(
            CaptionOptions(captioner="both", images="web", min_new_tokens=TOKENS, batch_size=batch), workspace
        )
        score_options = ScoreOptions(filter="both", images="web", captions=("both",), batch_size=batch)
        for stage in (caption, lambda: ScoreStage(score_options, workspace)):
            stage = stage() if callable(stage) else stage
            begun = stage.begin()
            stage.setup()
            start = time.perf_counter()
            for shard in stage.shards():
                process_and_commit(stage, begun, shard)
            seconds = time.perf_counter() - start
            engine = sum(
                json.loads(path.read_text())["engine_seconds"]
                for path in stage.output.path.glob("*_stats.json")
            )
            record.figure(f"{name}_stage_{stage.name}_images_per_second", count / seconds)
            share = engine / seconds
            if name == "base":
                record.target(f"{name}_stage_{stage.name}_engine_share", share, ">=", 0.85)
            else:
                record.figure(f"{name}_stage_{stage.name}_engine_share", share)


AT_LEAST = {"tiny": (5.0, 2.0), "base": (1.4, 1.0)}
AT_LEAST_ON_GPU = {"tiny": (8.0, 3.0), "base": (8.0, 3.0)}


def compare(
    name: str,
    label: str,
    rounds: int,
    ours: Callable[[], object],
    theirs: Transformers,
    scorer: Filter,
    record: Record,
) -> list[float]:
    """Caption and score by both sides in turn; returns our seconds."""
    data, device = theirs.data, theirs.device
    mine = torch.tensor(
        [each.itm_score for each in scorer.score_texts(data.pixels, data.image_index, data.texts)]
    )
    record.figure(
        f"{label}_itm_difference_from_transformers",
        float((mine - torch.tensor(theirs.score_best())).abs().max()),
    )

    at_once = len(data.pixels) if device.type == "cuda" else 1

    def called() -> None:
        theirs.caption(at_once)
        theirs.score_called(at_once)

    def best() -> None:
        theirs.caption(len(data.pixels))
        theirs.score_best()

    seconds = in_turn({"ours": ours, "called": called, "best": best}, rounds, device)
    limits = AT_LEAST_ON_GPU if device.type == "cuda" else AT_LEAST
    for what, limit in zip(("called", "best"), limits[name], strict=True):
        times = statistics.median(b / a for a, b in zip(seconds["ours"], seconds[what], strict=True))
        record.figure(
            f"{label}_transformers_{what}_images_per_second",
            len(data.pixels) / statistics.median(seconds[what]),
        )
        record.target(f"{label}_times_faster_than_{what}", times, ">=", limit)
    return seconds["ours"]


def measure(args: argparse.Namespace, record: Record) -> None:
    """The presets asked for; `tiny` alone with --quick."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record.figure("threads", torch.get_num_threads())
    for name in ["tiny"] if args.quick else args.preset:
        default = {"tiny": 64, "base": 32 if device.type == "cuda" else 4}[name]
        args.batch_size = args.batch_size or [default]
        for rows in args.batch_size:
            rounds = 2 if name == "base" and device.type == "cpu" else 3 if args.quick else 7
            measure_one(name, rows, rounds, args, record, device)
        stages(name, 8192 if device.type == "cuda" else {"tiny": 256, "base": 8}[name], args, record, device)
        if args.batch_size == [default]:
            args.batch_size = []


def arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--preset", nargs="+", choices=["tiny", "base"], default=["tiny", "base"])
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=[], help="images per batch, each in turn"
    )
    parser.add_argument("--precision", default="auto", help="of the engines")
    parser.add_argument("--compile", action="store_true", help="the engines' vision towers")
    parser.add_argument("--vs-transformers", action="store_true", help="and transformers, in the same run")


if __name__ == "__main__":
    main(__doc__, measure, arguments)
