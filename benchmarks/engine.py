"""Captioning and scoring: images/s of the engines, their share of a floor, and transformers' BLIP doing the same work.

Work per image: a vision pass, a caption of 20 tokens drawn from the nucleus, another vision pass, two texts scored. The floor
is the arithmetic of that work at the rate of a plain matrix product here. Weights are random, with the language model's
logits spread as a trained one's are; what the engines answer is first held against the model called plainly. "shared" is
both with one vision pass, "int8" both in 8 bits (on processors), with how far its scores are off. "stages": `caption` and
`score` from Parquet shards of 512-pixel JPEGs, some of them broken, to Parquet shards, and the engine's share of their wall
time (on a GPU, that it computes). A batch that memory does not hold is done in halves; `batch` is what was used.

With --vs-transformers the same weights and pictures go through transformers in the same run, in turn. "called", as its model
cards do: `generate` for a picture, then an ITM forward per pair, each with its own vision pass (on a GPU in batches of the
same size as ours). "best": `generate` in batches, and one vision pass per image, in batches too, for all of its texts. It
gives ITM alone; the engine's scores are ITM and ITC. On a GPU the targets are over all batch sizes, each side at its best.

On a GPU: python benchmarks/engine.py --preset base --vs-transformers
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from _device import kernel_seconds, matmul_rate, timed, twins
from _form import Record, main, peak_memory
from _stages import stages
from torch import Tensor

from capfilt.data.tokenizer import ADDED, SPECIALS, Tokenizer
from capfilt.inference.captioner import Captioner
from capfilt.inference.decode_attention import DecodeAttention, suits
from capfilt.inference.engine import Encoded
from capfilt.inference.filter import Filter
from capfilt.inference.lowbit import FP8_CAPABILITY
from capfilt.models import build, preset
from capfilt.models.blip.model import Blip, BlipConfig

VOCABULARY = {"tiny": 4096, "base": 30524}
"""What `capfilt pretrain` learns from a corpus unless told otherwise, and the published one."""
PIXELS = {"tiny": 48, "base": 384}
BATCHES = {
    "cpu": {"tiny": [64], "base": [4]},
    "cuda": {"tiny": [64], "base": [32, 64, 128, 256, 512]},
}
"""Images at a time, each in turn, where nobody says."""
TOKENS = 20
TEXTS = 2
SPREAD = 8.0
"""Random logits have a deviation of about 0.5, trained ones of several: a nucleus of most of the vocabulary is nobody's."""


def config_of(name: str) -> BlipConfig:
    """The preset at its finetuning size, without what transformers lacks (a convolutional stem)."""
    config = preset("blip", name, VOCABULARY[name])
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
    """The engines' work by name, each on all rows as one batch, through whatever they are made to go through."""
    rows = len(data.pixels)
    encoded = captioner.encode(data.pixels)

    def encode() -> object:
        return captioner.encode(data.pixels)

    def caption(images: Tensor | Encoded = data.pixels) -> list[str]:
        # As many tokens as there may be: random weights end when they like.
        found = captioner.caption(
            images, max_new_tokens=TOKENS, min_new_tokens=TOKENS, batch_size=rows, seed=1
        )
        return [each.text for each in found]

    def decode() -> object:
        return caption(encoded)

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


@dataclasses.dataclass
class Sweep:
    """Images/s of captioning and scoring at each batch size: ours, and transformers' where it was run and had the memory."""

    ours: dict[int, float] = dataclasses.field(default_factory=dict)
    called: dict[int, float] = dataclasses.field(default_factory=dict)
    best: dict[int, float] = dataclasses.field(default_factory=dict)

    def targets(self, name: str, record: Record) -> None:
        """What a GPU is to reach: each side at the batch that is best for it, but transformers as called at `CALLED_AT`."""
        ours = max(self.ours.values())
        if name == "base":
            record.target(f"{name}_at_best_images_per_second", ours, ">=", IMAGES_PER_SECOND)
        for what, theirs, least in (
            (f"called_at_{CALLED_AT}", self.called.get(CALLED_AT), TIMES_CALLED),
            ("at_its_best", max({**self.called, **self.best}.values(), default=None), TIMES_BEST),
        ):
            if theirs is not None:
                record.target(f"{name}_times_transformers_{what}", ours / theirs, ">=", least)


def measure_one(
    name: str,
    rows: int,
    rounds: int,
    args: argparse.Namespace,
    record: Record,
    device: torch.device,
    sweep: Sweep,
) -> None:
    """One preset at one batch size."""
    model, tokenizer = made(name, args.seed, device)
    data = given(model.config, rows, args.seed, device)
    if f"{name}_greedy_agreement" not in record.targets:
        check(name, Captioner(model, tokenizer, "fp32"), Filter(model, tokenizer, "fp32"), data, record)
    captioner = Captioner(model, tokenizer, args.precision, args.compile)
    scorer = Filter(model, tokenizer, args.precision, args.compile)
    label = f"{name}_{rows}" if len(args.batch_size) > 1 else name
    ours = works(captioner, scorer, data)
    lengths = [len(row) for row in tokenizer.encode_ragged(data.texts)]
    flops = flops_of(model.config, statistics.mean(lengths), 4)
    # The floor, and transformers, in what the engines compute the most in: fp8 is for the vision tower alone.
    low = captioner.low_precision
    rate = matmul_rate(device, torch.bfloat16 if low else torch.float32)
    record.figure(f"{label}_matmul_gflops", rate / 1e9)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with peak_memory() as peak:
        # Recorded, compiled and checked before anything is timed.
        ours["both"]()
        both = ours.pop("both") if args.vs_transformers else ours["both"]
        seconds = in_turn(ours, rounds, device)
    gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else peak.gib
    if args.vs_transformers:
        found = compare(name, label, rounds, both, Transformers(model, tokenizer, data, low), scorer, record)
        seconds["both"] = found.pop("ours")
        for what, times in found.items():
            getattr(sweep, what)[rows] = rows / statistics.median(times)
    sweep.ours[rows] = rows / statistics.median(seconds["both"])
    # What memory did not hold was done in halves: this many at a time.
    record.figure(f"{label}_batch", min(rows, *(each.fits or rows for each in (captioner, scorer))))
    record.figure(f"{label}_peak_gib", gib)
    for what, times in seconds.items():
        speed = rows / statistics.median(times)
        record.figure(f"{label}_{what}_images_per_second", speed)
        record.figure(f"{label}_{what}_share_of_floor", speed * flops[what] / rate)
    if captioner.reader is not None:
        attentions(label, model.config, rows, captioner.reader, record)
    others(label, model, tokenizer, data, captioner, scorer, rounds, args.compile, record)


@torch.inference_mode()
def attentions(label: str, config: BlipConfig, rows: int, reader: DecodeAttention, record: Record) -> None:
    """What a decode step's reading of the image takes in one layer, by PyTorch's attention and by the kernel."""
    heads, width = config.text.heads, config.text.width // config.text.heads
    for queries in (1, 4):
        query, keys, values = (
            torch.randn(rows, heads, length, width, device="cuda", dtype=torch.bfloat16)
            for length in (queries, config.vision.tokens, config.vision.tokens)
        )
        if suits(query, keys):
            for what, attend in (("sdpa", F.scaled_dot_product_attention), ("kernel", reader.attend)):
                took = kernel_seconds(partial(attend, query, keys, values))
                record.figure(f"{label}_{queries}_queries_{what}_microseconds", took * 1e6)


def others(
    label: str,
    model: Blip,
    tokenizer: Tokenizer,
    data: Given,
    captioner: Captioner,
    scorer: Filter,
    rounds: int,
    compiled: bool,
    record: Record,
) -> None:
    """What the same work takes with one vision pass for both, and in 8 bits; how far each precision is from fp32."""
    rows, device = len(data.pixels), data.pixels.device
    captioner.share_vision(scorer)

    def shared() -> None:
        encoded = captioner.encode(data.pixels)
        captioner.caption(encoded, max_new_tokens=TOKENS, min_new_tokens=TOKENS, batch_size=rows, seed=1)
        scorer.score_texts(encoded, data.image_index, data.texts, batch_size=rows)

    seconds = in_turn({"shared": shared}, rounds, device)["shared"]
    record.figure(f"{label}_shared_images_per_second", rows / statistics.median(seconds))
    lows = ["bf16", "int8"] if device.type == "cpu" else ["bf16"]
    if device.type == "cuda" and torch.cuda.get_device_capability() >= FP8_CAPABILITY:
        lows.append("fp8")
    exact = Captioner(model, tokenizer, "fp32"), Filter(model, tokenizer, "fp32")
    for low in lows:
        made = compiled or low == "fp8"
        engines = Captioner(model, tokenizer, low, made), Filter(model, tokenizer, low, made)
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


AT_LEAST = {"tiny": (5.0, 2.0), "base": (1.4, 1.0)}
"""On a processor: how many times as fast as transformers as called, and at its best, in the same batch."""

IMAGES_PER_SECOND, CALLED_AT, TIMES_CALLED, TIMES_BEST = 1000.0, 32, 8.0, 3.0
"""On a GPU, over all batch sizes; see `Sweep.targets`."""


def compare(
    name: str,
    label: str,
    rounds: int,
    ours: Callable[[], object],
    theirs: Transformers,
    scorer: Filter,
    record: Record,
) -> dict[str, list[float]]:
    """Caption and score by both sides in turn; returns seconds of ours, and of transformers' ways that had the memory."""
    data, device = theirs.data, theirs.device
    rows = len(data.pixels)
    mine = [each.itm_score for each in scorer.score_texts(data.pixels, data.image_index, data.texts, rows)]
    at_once = rows if device.type == "cuda" else 1

    def called() -> None:
        theirs.caption(at_once)
        theirs.score_called(at_once)

    def best() -> None:
        theirs.caption(rows)
        theirs.score_best()

    sides: dict[str, Callable[[], object]] = {"ours": ours}
    for what, work in {"called": called, "best": best}.items():
        try:
            if device.type == "cuda":
                work()
            if what == "best":
                apart = (torch.tensor(mine) - torch.tensor(theirs.score_best())).abs().max()
                record.figure(f"{label}_itm_difference_from_transformers", float(apart))
            sides[what] = work
        except torch.OutOfMemoryError:
            record.figure(f"{label}_transformers_{what}_out_of_memory", 1)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    seconds = in_turn(sides, rounds, device)
    for what in list(sides)[1:]:
        times = statistics.median(b / a for a, b in zip(seconds["ours"], seconds[what], strict=True))
        speed = rows / statistics.median(seconds[what])
        record.figure(f"{label}_transformers_{what}_images_per_second", speed)
        if device.type == "cuda":
            record.figure(f"{label}_times_faster_than_{what}", times)
        else:
            least = dict(zip(("called", "best"), AT_LEAST[name], strict=True))[what]
            record.target(f"{label}_times_faster_than_{what}", times, ">=", least)
    return seconds


def measure(args: argparse.Namespace, record: Record) -> None:
    """The presets asked for; `tiny` alone with --quick."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record.figure("threads", torch.get_num_threads())
    asked = args.batch_size
    for name in ["tiny"] if args.quick else args.preset:
        args.batch_size = asked or BATCHES[device.type][name]
        rounds = 2 if name == "base" and device.type == "cpu" else 3 if args.quick else 7
        sweep = Sweep()
        for rows in args.batch_size:
            measure_one(name, rows, rounds, args, record, device, sweep)
            if device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
        if device.type == "cuda":
            sweep.targets(name, record)
        count = 8192 if device.type == "cuda" else {"tiny": 256, "base": 8}[name]
        model, tokenizer = made(name, args.seed, device)
        stages(name, model, tokenizer, count, TOKENS, args.seed, args.precision, args.compile, record)


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
