"""What each stage can be told: one frozen dataclass per stage, the source of the CLI's flags and of recipes' keys.

Only names, types, defaults and help live here, on the standard library alone, so that `--help` loads nothing heavy.
A field's metadata holds `help`; `kind` says what a string names, so that a recipe can tell which options are inputs:
PARTS, "model" (a checkpoint), "path" (a file
or directory). `unless` names an option that, when set, makes it needless to give this one.
`later` marks an option that came after checkpoints were made without it: at its default it stays out of fingerprints, so
that those still count as done. `told` marks one that changes what a run says or keeps, and no result. `models` names those of
RETRAINED that it means something to, where not all of them: see `foreign`.
`choices`, and of numbers `least` (0, where nobody says), `most`, `above` and `below`, say which values there are: options
that are made with others raise UserError, so that no stage sees them. A number is finite, unless its default is not.
"""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, field, fields
from typing import Any, Self

from capfilt.errors import UserError
from capfilt.formats import FORMATS

PARTS = ("images", "captions", "scores", "signals", "verdicts", "pairs", "examples")
"""The values of `kind` that name parts of tables."""

REQUIRED = "\0"
"""The default of an option that must be given; never a valid name or path."""


RETRAINED = ("blip", "clip", "vilt", "albef")
"""What `retrain` trains."""

SOURCES, SPLITS = ("web", "human", "synthetic"), ("train", "val", "test")
"""Those of `capfilt.tables.contracts`, which would load pyarrow."""


def _option(
    default: Any,
    help: str,
    *,
    kind: str = "",
    later: bool = False,
    told: bool = False,
    unless: str = "",
    models: tuple[str, ...] = RETRAINED,
    choices: tuple[str, ...] = (),
    least: float = 0,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> Any:
    known = {"help": help, "kind": kind, "later": later, "told": told, "unless": unless, "models": models}
    bounds = {"choices": choices, "least": least, "most": most, "above": above, "below": below}
    return field(default=default, metadata={**known, **bounds})


_MOST_WHOLE = 2**63 - 1
"""The range of 64 bits, which every library wants of a whole number."""


def check(each: Field[Any], value: Any) -> None:
    """UserError naming the option where `value` is none that its metadata allows."""
    marks, name = each.metadata, f"--{each.name.replace('_', '-')}"
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and "\0" in text and not (text == each.default == REQUIRED):
            raise UserError(f"{name} {text!r}: give a text without NUL characters")
        if marks["choices"] and text not in marks["choices"]:
            raise UserError(f"{name} {text!r}: choose {', '.join(filter(None, marks['choices']))}")
    if type(value) not in (int, float):
        return
    whole = type(value) is int
    least, most, above, below = (marks[bound] for bound in ("least", "most", "above", "below"))
    good = abs(value) <= _MOST_WHOLE if whole else math.isfinite(value) or each.default == math.inf
    # What is no number is in no range.
    if good and least <= value <= most and above < value and (value < below or math.isinf(below)):
        return
    least = -math.inf if above >= least else least
    ends = {"{:g} or more": least, "more than {:g}": above, "at most {:g}": most, "below {:g}": below}
    said = [] if good else ["at most 64 bits" if whole else "a finite number"]
    said += [words.format(bound) for words, bound in ends.items() if math.isfinite(bound)]
    shown = f"{value:g}" if not whole else value if good else "of more than 64 bits"
    raise UserError(f"{name} {shown}: give {', '.join(said)}")


_TOWERS = ("blip", "albef")
"""Models with a vision tower, a queue and momentum towers."""


def missing(options: Any) -> list[str]:
    """The names of the options that must be given and were not."""
    fields = type(options).__dataclass_fields__
    open_ = [name for name in fields if getattr(options, name) == REQUIRED]
    return [name for name in open_ if not getattr(options, fields[name].metadata["unless"] or "_", "")]


def foreign(options: Any, model: str) -> list[str]:
    """The names of the options that mean nothing to `model`, one of RETRAINED, and are not what they are by default."""
    return [
        each.name
        for each in fields(options)
        if model not in each.metadata["models"] and getattr(options, each.name) != each.default
    ]


class Checked:
    """Options that are what their metadata allows: making others raises UserError."""

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            check(each, getattr(self, each.name))


class _Remembering(Checked):
    """Options that know which of them were given to the constructor, be it what they are by default."""

    given: frozenset[str]

    def __new__(cls, *values: Any, **named: Any) -> Self:
        self = super().__new__(cls)
        names = [each.name for each in fields(cls)]  # type: ignore[arg-type]
        # Past a frozen dataclass's own guard; no field, so neither compared nor fingerprinted.
        object.__setattr__(self, "given", frozenset([*names[: len(values)], *named]))
        return self


@dataclass(frozen=True)
class DownloadOptions(_Remembering):
    """Fetch a list of URLs into an images part, one row per URL, failures included.

    Flag names and defaults are img2dataset's (its README, "API"); where one is another, its help says why.
    """

    url_list: str = _option(
        REQUIRED,
        "URLs: a txt, csv, tsv, json, jsonl or parquet file (.gz, .zst), a folder, or an fsspec URL; not for --retry",
        kind="path",
        unless="retry",
    )
    dataset: str = _option("web", "name of the images part to write")
    input_format: str = _option(
        "auto",
        "auto, txt, csv, tsv, json, jsonl or parquet (img2dataset: txt; a file's name says what it is)",
    )
    preset: str = _option(
        "",
        "the layout of a published list: laion (URL, TEXT), datacomp (url, text), cc3m or cc12m (tsv without a header)",
        later=True,
    )
    url_col: str = _option("url", "column of the URLs; capitals do not matter where only one column is meant")
    caption_col: str = _option(
        "caption",
        "column of the texts, else captions, text or texts; empty for none (img2dataset: none; here texts matter)",
    )
    save_additional_columns: tuple[str, ...] = _option((), "further columns of the list to carry through")
    license_col: str = _option(
        "", "column of the licences, for the table's own; default: `license`", later=True
    )
    verify_hash: str = _option(
        "", "column of SHA-256 that bodies must have, else the failure hash_mismatch", later=True
    )
    image_size: int = _option(256, "target size in pixels", least=1)
    resize_mode: str = _option(
        "keep_ratio",
        "border, keep_ratio, keep_ratio_largest, center_crop or no (img2dataset: border, whose padding a model learns)",
        choices=("border", "keep_ratio", "keep_ratio_largest", "center_crop", "no"),
    )
    resize_only_if_bigger: bool = _option(
        True,
        "leave smaller pictures as they are (img2dataset: off; enlarging costs bytes and shows nothing more)",
    )
    encode_format: str = _option("jpg", "jpg, png or webp", choices=("jpg", "png", "webp"))
    encode_quality: int = _option(95, "quality of the stored picture, 0 to 100", most=100)
    min_image_size: int = _option(0, "shorter sides below this many pixels are the failure too_small")
    max_aspect_ratio: float = _option(
        float("inf"), "longer to shorter side above this is the failure bad_aspect_ratio", least=1
    )
    number_sample_per_shard: int = _option(
        1000,
        "rows per shard: the unit of resume (img2dataset: 10000, of which a killed run loses more and a worker holds "
        "all pictures in memory)",
        least=1,
    )
    thread_count: int = _option(
        32,
        "fetches in flight per worker (img2dataset: 256, for which its README asks for a DNS resolver of one's own; "
        "where hosts are slow, more fetch more)",
        least=1,
    )
    timeout: float = _option(10.0, "seconds a connection may be silent", above=0)
    total_timeout: float = _option(
        30.0,
        "seconds one download may take, redirects included (img2dataset: no limit; a byte now and then holds a thread "
        "for ever)",
        above=0,
    )
    retries: int = _option(
        0,
        "further attempts at each URL, only after failures that may pass, ever later; a host's Retry-After up to 30 s is "
        "waited for, also by its other URLs",
    )
    # img2dataset has neither; a list sorted by host is otherwise an attack on that host.
    host_concurrency: int = _option(
        0,
        "fetches in flight per host, and so at most this many workers; 0: as many as `thread_count` in each worker",
        later=True,
    )
    host_rate: float = _option(
        0.0,
        "URLs fetched per second per host, retries included, all workers together; 0: no limit",
        later=True,
    )
    robots: bool = _option(
        False,
        "obey robots.txt (RFC 9309), asked for once per host and worker; what it forbids is opted_out",
        later=True,
    )
    max_bytes: int = _option(
        50_000_000,
        "a body above this many bytes is the failure too_large (img2dataset: no limit; an endless one fills the memory)",
        least=1,
    )
    max_pixels: int = _option(
        64_000_000,
        "a picture above this many pixels is the failure too_many_pixels (img2dataset: no limit; some megabytes decode "
        "to gigabytes)",
        least=1,
    )
    user_agent_token: str = _option(
        "capfilt",
        "named in the User-Agent header and in opt-out headers (img2dataset: none, and a browser's User-Agent; hosts "
        "are to know who asks)",
    )
    disallowed_header_directives: tuple[str, ...] = _option(
        ("noai", "noimageai", "noindex", "noimageindex"), "X-Robots-Tag values that mean hands off"
    )
    allow_host: tuple[str, ...] = _option(
        (), "HOST:PORT that may have a private address; repeatable; '' for none"
    )
    allow_private: bool = _option(
        False,
        "allow private addresses and the loopback (intranets), but no link-local ones nor metadata services",
    )
    retry: str = _option(
        "",
        "failed: fetch the failed rows of the part again, as a new generation of their shards; options not given are "
        "those the part was made with, given ones win, at their defaults too",
        told=True,
    )
    failure: tuple[str, ...] = _option((), "with --retry: only rows with this failure; repeatable", told=True)


@dataclass(frozen=True)
class IngestOptions(Checked):
    """Bring images and captions made by other tools into an images part."""

    source_path: str = _option(
        REQUIRED,
        "captions JSON (COCO, Karpathy, BLIP), a folder of images or a list of them, img2dataset's output, tars, Parquet",
        kind="path",
    )
    dataset: str = _option(REQUIRED, "name of the images part to write")
    format: str = _option("auto", f"auto, {', '.join(FORMATS)}")
    images: str = _option("", "folder of the pictures a file names; default: `images` beside it", kind="path")
    image_col: str = _option("", "column of the pictures' paths in a list; default: file_name, else image")
    caption_col: tuple[str, ...] = _option(
        (),
        "columns of the texts; repeatable; default: caption, captions, text or texts; '' for none",
    )
    save_additional_columns: tuple[str, ...] = _option((), "further columns of the metadata to carry through")
    source: str = _option("human", "who wrote the texts: human or web", choices=("human", "web"))
    splits: tuple[str, ...] = _option(
        (), "keep only these splits (train, val, test); default: all", choices=SPLITS
    )
    split: str = _option(
        "", "put every row into this split, where the source names none", choices=("", *SPLITS)
    )
    limit: int = _option(0, "only the first so many images; 0 for all")
    shard_size: int = _option(1000, "rows per shard: the unit of resume", least=1)
    max_side: int = _option(
        0, "shrink pictures whose longer side is above this many pixels; 0 keeps the bytes as found"
    )
    max_pixels: int = _option(
        64_000_000, "a picture above this many pixels is the failure too_many_pixels", least=1
    )


@dataclass(frozen=True)
class DuplicatesOptions(Checked):
    """Find exact and near duplicates among the pictures of an images part; no pixels are read, no model is needed."""

    images: str = _option(REQUIRED, "images part", kind="images")
    out: str = _option("duplicates", "name of the signals part to write")
    # Equal pictures saved at other sizes and qualities differ in 0 to 4 bits; unrelated ones in 32 on average.
    distance: int = _option(
        4, "perceptual hashes that differ in at most so many of 64 bits are near, 0 to 10", most=10
    )


@dataclass(frozen=True)
class ExamplesOptions(Checked):
    """Bring questions, statements or labels of ingested pictures into an examples part."""

    source_path: str = _option(
        REQUIRED,
        "VQA v2's questions; NLVR's, NLVR2's, SNLI-VE's, DAQUAR's or easy-VQA's file; a folder of class folders; or records "
        "(JSON Lines or a JSON list): image or images; question, sentence, hypothesis or caption; answers, ratings, "
        "negative_caption or label; split",
        kind="path",
    )
    dataset: str = _option(REQUIRED, "name of the examples part to write")
    images: tuple[str, ...] = _option(
        (), "images parts that hold the pictures, found by their keys; repeatable", kind="images"
    )
    annotations: str = _option("", "VQA v2's answers, where they are public", kind="path")
    answer_parts: bool = _option(
        False,
        "a record's answers are the parts of one answer, so a set (DAQUAR), and not several people's",
        later=True,
    )
    task: str = _option(
        "auto", "auto (by the fields), vqa, nlvr, entailment, classification, match, rating or choice"
    )
    splits: tuple[str, ...] = _option(
        (), "keep only these splits (train, val, test); default: all", choices=SPLITS
    )
    split: str = _option(
        "", "put every row into this split, where the source names none", choices=("", *SPLITS)
    )
    limit: int = _option(0, "only the first so many examples; 0 for all")
    shard_size: int = _option(10_000, "rows per shard: the unit of resume", least=1)


@dataclass(frozen=True)
class ModelOptions(Checked):
    """The architecture, where a model is made from scratch."""

    preset: str = _option("small", "tiny, small, trunk (a frozen ImageNet trunk), base or large")
    image_size: int = _option(0, "pixels; 0 for the preset's")
    patch_size: int = _option(0, "pixels per side of what becomes one token; 0 for the preset's", later=True)
    stem: str = _option(
        "",
        "patch (as published, needed to export the model) or conv; default: the preset's",
        choices=("", "patch", "conv"),
        later=True,
        models=_TOWERS,
    )
    vocab: str = _option(
        "corpus", "corpus (learn a WordPiece vocabulary), or a vocab.txt / tokenizer.json", kind="path"
    )
    vocab_size: int = _option(4096, "largest size of a vocabulary learned on the corpus", least=1)
    vision_init: str = _option(
        "",
        "directory of a transformers ViT or DeiT to start the vision tower from",
        kind="path",
        models=("blip", "vilt", "albef"),
    )
    text_init: str = _option(
        "",
        "directory of a transformers BERT to start the text side from; --vocab must be its own",
        kind="path",
        models=_TOWERS,
    )


_PRECISION = "auto (bf16 on GPUs that have it, else fp32), fp32 or bf16"


@dataclass(frozen=True)
class LoopOptions(Checked):
    """How long and how to train, whatever is learned."""

    steps: int = _option(0, "optimiser steps; 0: use `epochs`")
    epochs: float = _option(20.0, "passes over the texts, where `steps` is 0 (BLIP, section 4.1: 20)")
    batch_size: int = _option(64, "texts per step", least=1)
    accumulate: int = _option(
        1,
        "micro-batches per step, for batches that do not fit; ITC and ITM see each by itself, and the queue",
        later=True,
        least=1,
    )
    micro_batch: int = _option(
        0,
        "in place of `accumulate`: texts per rank and forward pass, at most; the batch comes in equal parts, shared by as many "
        "ranks as divide them; 0 for none",
        later=True,
    )
    learning_rate: float = _option(3e-4, "peak (BLIP, section 4.1: 3e-4 for ViT-B)", above=0)
    min_lr: float = _option(1e-6, "the schedule's end (BLIP's released pretraining configuration)")
    warmup_steps: int = _option(100, "linear warm-up")
    schedule: str = _option(
        "cosine",
        "cosine or linear (by step, warmed up), epoch-cosine (BLIP's finetuning, no warm-up) or epoch-decay (BLIP's "
        "pretraining)",
        later=True,
        choices=("cosine", "linear", "epoch-cosine", "epoch-decay"),
    )
    decay_rate: float = _option(
        0.9,
        "epoch-decay: factor per epoch (BLIP's released code; its section 4.1 says 0.85)",
        later=True,
        most=1,
    )
    weight_decay: float = _option(0.05, "AdamW's (BLIP, section 4.1)")
    decay: str = _option(
        "matrices",
        "what decays: matrices, or all (biases, LayerNorms, temperature: BLIP's released code)",
        later=True,
        choices=("matrices", "all"),
    )
    beta2: float = _option(0.999, "AdamW's second beta (BLIP: 0.999; ViLT, CLIP: 0.98)", later=True, below=1)
    clip_norm: float = _option(1.0, "largest gradient norm; 0 for none")
    ema: float = _option(
        0.0,
        "decay of averaged weights, which then are the checkpoint; live/ beside it has the others",
        later=True,
        below=1,
    )
    recompute: bool = _option(
        False, "recompute activations in the backward pass: less memory, about a third slower", told=True
    )
    max_text_tokens: int = _option(
        30, "texts are cut to this many tokens (BLIP's released code: 30)", least=2
    )
    augment: bool = _option(
        True, "random resized crops: of whole pictures, bicubic; of examples' pictures, as squares"
    )
    crop_scale: float = _option(
        0.5, "smallest share of the picture a crop may show (BLIP: 0.2, finetuning 0.5)", least=0.001, most=1
    )
    flip: bool = _option(False, "random horizontal flips, where the text names no side")
    randaugment: int = _option(
        0,
        "RandAugment: so many operations drawn per picture, after the crop (BLIP's released code: 2)",
        later=True,
    )
    randaugment_level: float = _option(
        5.0, "RandAugment: strength, 0 to 10 (BLIP's released code: 5)", later=True, most=10
    )
    ranks: int = _option(
        0,
        "processes that train together, each with a GPU of its own; 0: as many GPUs as divide the batch, or one CPU process",
        told=True,
    )
    shard: bool = _option(
        False,
        "split weights, gradients and optimiser states over the ranks (FSDP2), in place of a copy in each (DDP)",
        told=True,
    )
    freeze_vision: bool = _option(False, "keep the vision tower as it is")
    precision: str = _option("auto", _PRECISION)
    save_every: int = _option(
        500, "steps between the states that an interrupted run continues from; 0 for none"
    )
    keep_states: int = _option(
        1, "so many of the newest states are kept until the checkpoint is made", told=True, least=1
    )
    keep_best: bool = _option(
        False,
        "keep best/, the weights with the lowest training loss whenever a state is saved, from where queue and ramps are "
        "full",
        told=True,
    )
    tensorboard: bool = _option(
        False, "also write tensorboard/ beside the checkpoint (capfilt[tensorboard])", told=True
    )
    seed: int = _option(0, "of initialisation, order, crops and negatives")


@dataclass(frozen=True)
class OptimisationOptions(LoopOptions):
    """How long and how to train on pairs."""

    max_words: int = _option(
        0,
        "and before that to this many words; 0: the model's own (30 in the released BLIP, ALBEF; clip, vilt: all)",
        later=True,
    )
    cache_features: bool = _option(False, "compute the frozen trunk's feature maps once")
    stream: bool = _option(
        False,
        "keep no decoded pictures: memory does not grow with the corpus",
        told=True,
    )
    loader_workers: int = _option(0, "with `stream`: processes that decode; 0 for threads", told=True)
    mix: tuple[str, ...] = _option(
        (),
        "SOURCE=WEIGHT, the share of web, human or synthetic texts in every batch; repeatable",
        later=True,
    )
    stuck_steps: int = _option(
        2000,
        "warn after so many steps of ITM at its class prior, 0.6365; 0: never",
        told=True,
        models=("blip", "vilt", "albef"),
    )
    collapse_steps: int = _option(
        500,
        "warn after so many steps of embeddings that are one point; 0: never",
        told=True,
        models=("blip", "clip", "albef"),
    )


@dataclass(frozen=True)
class PretrainingObjectiveOptions(Checked):
    """ITC, ITM and LM (BLIP, section 3.2)."""

    queue_size: int = _option(
        57600, "momentum features kept as candidates (BLIP's released code: 57600)", models=_TOWERS
    )
    momentum: float = _option(
        0.995, "of the momentum towers (BLIP's released code); 0 for none", models=_TOWERS, below=1
    )
    momentum_batch_size: int = _option(
        0,
        "the batch that `momentum` is meant for: with another it is scaled (BLIP, section 4.1: 2880); 0: as given",
        later=True,
        models=_TOWERS,
    )
    alpha: float = _option(
        0.4, "weight of the momentum towers' soft targets (BLIP's released code)", models=_TOWERS, most=1
    )
    alpha_ramp_epochs: float = _option(
        2.0, "alpha grows over this many epochs (BLIP's released code: 2)", models=_TOWERS
    )
    hardness_ramp_steps: int = _option(
        0,
        "ITM's negatives go from uniform to hard over this many steps (BLIP: hard from the start)",
        models=_TOWERS,
    )
    multi_positive: bool = _option(
        True,
        "candidates of the same image or with the same text count as matches (not in BLIP's released pretraining)",
        later=True,
        models=_TOWERS,
    )
    global_negatives: bool = _option(
        True,
        "with several ranks, ITC and ITM draw on the whole batch, as one process would; off: on each rank's own texts, "
        "and the queue (BLIP's released pretraining)",
        later=True,
        models=_TOWERS,
    )
    label_smoothing: float = _option(
        0.1, "of the language model's targets (BLIP's released code)", models=("blip",), most=0.99
    )


@dataclass(frozen=True)
class PretrainOptions(ModelOptions, OptimisationOptions, PretrainingObjectiveOptions):
    """Step 1: train a BLIP on noisy web pairs and human pairs with ITC, ITM and LM."""

    human: tuple[str, ...] = _option((), "images parts with human captions; repeatable", kind="images")
    web: tuple[str, ...] = _option((), "images parts with web texts; repeatable", kind="images")
    out: str = _option("pretrained", "name of the checkpoint to write")


@dataclass(frozen=True)
class FinetuneCaptionerOptions(OptimisationOptions):
    """Step 2: finetune the captioner (LM) on human pairs."""

    init: str = _option("pretrained", "checkpoint to start from", kind="model")
    human: tuple[str, ...] = _option((), "images parts with human captions; repeatable", kind="images")
    prompt: str = _option(
        "a picture of ", "put before every text, not learned (BLIP's caption configuration)"
    )
    label_smoothing: float = _option(0.1, "of the language model's targets (BLIP's released code)", most=0.99)
    learning_rate: float = _option(1e-5, "peak (BLIP's caption configuration: 1e-5 for ViT-B)", above=0)
    min_lr: float = _option(0.0, "the schedule's end (BLIP's caption configuration: 0)")
    epochs: float = _option(
        5.0, "passes over the texts, where `steps` is 0 (BLIP's caption configuration: 5)"
    )
    max_text_tokens: int = _option(
        40, "texts are cut to this many tokens (BLIP's released code: 40)", least=2
    )
    image_size: int = _option(0, "pixels; 0 for the checkpoint's (BLIP's released code: 384)", later=True)
    out: str = _option("captioner", "name of the checkpoint to write")


@dataclass(frozen=True)
class FinetuneFilterOptions(OptimisationOptions, PretrainingObjectiveOptions):
    """Step 2: finetune the filter (ITC and ITM) on human pairs."""

    init: str = _option("pretrained", "checkpoint to start from", kind="model")
    human: tuple[str, ...] = _option((), "images parts with human captions; repeatable", kind="images")
    learning_rate: float = _option(1e-5, "peak (BLIP's retrieval configuration: 1e-5 for ViT-B)", above=0)
    min_lr: float = _option(0.0, "the schedule's end (BLIP's retrieval configuration: 0)")
    epochs: float = _option(
        6.0, "passes over the texts, where `steps` is 0 (BLIP's retrieval configuration: 6)"
    )
    max_text_tokens: int = _option(
        35, "texts are cut to this many tokens (BLIP's released code: 35)", least=2
    )
    alpha_ramp_epochs: float = _option(
        1.0, "alpha grows over this many epochs (BLIP's retrieval finetuning: 1)", models=_TOWERS
    )
    image_size: int = _option(0, "pixels; 0 for the checkpoint's (BLIP's released code: 384)", later=True)
    out: str = _option("filter", "name of the checkpoint to write")


@dataclass(frozen=True)
class FinetuneTextAssignmentOptions(OptimisationOptions):
    """Let an ALBEF learn which of two pictures a text belongs to, before `finetune nlvr` (ALBEF, section 5)."""

    init: str = _option("albef", "pretrained ALBEF to start from", kind="model")
    human: tuple[str, ...] = _option((), "images parts with human captions; repeatable", kind="images")
    web: tuple[str, ...] = _option((), "images parts with web texts; repeatable", kind="images")
    drop_path: float = _option(0.0, "of the vision tower (ALBEF's released code: none)", below=1)
    learning_rate: float = _option(2e-5, "peak (ALBEF's configuration)", above=0)
    min_lr: float = _option(1e-5, "the schedule's end (ALBEF's configuration)")
    epochs: float = _option(1.0, "passes over the texts, where `steps` is 0 (ALBEF's configuration: 1)")
    weight_decay: float = _option(0.02, "AdamW's (ALBEF's configuration)")
    # ALBEF's 25, and the [SEP] that it does not read.
    max_text_tokens: int = _option(26, "texts are cut to this many tokens", least=2)
    image_size: int = _option(0, "pixels; 0 for the checkpoint's (ALBEF's configuration: 256)")
    out: str = _option("text-assignment", "name of the checkpoint to write")


@dataclass(frozen=True)
class TaskOptions(LoopOptions):
    """What the stages that finetune for a task share: the recipes of BLIP's VQA and NLVR2 are these defaults."""

    examples: tuple[str, ...] = _option((), "examples parts; repeatable", kind="examples")
    images: tuple[str, ...] = _option((), "images parts with their pictures; repeatable", kind="images")
    init: str = _option(
        "pretrained",
        "checkpoint to start from: a pretrained BLIP, ViLT or ALBEF, or a model of the task",
        kind="model",
    )
    splits: tuple[str, ...] = _option(
        ("train",), "splits to train on; rows without one always are", choices=SPLITS
    )
    validate: int = _option(
        2000,
        "so many examples of the split val are judged at the end, where it is not trained on; 0 for none",
        told=True,
    )
    image_size: int = _option(0, "pixels; 0 for the checkpoint's")
    head_rate: float = _option(
        1.0, "factor on the head's learning rate (ViLT's released code for VQA: 10)", later=True, above=0
    )
    drop_path: float = _option(
        0.1, "of the vision tower (BLIP's released code for both tasks; ALBEF's: 0)", below=1
    )
    momentum: float = _option(
        0.0,
        "of a copy that follows the model and teaches it (ALBEF's configurations: 0.995); 0 for none",
        later=True,
        below=1,
    )
    alpha: float = _option(
        0.4, "with `momentum`: weight of the copy's word (ALBEF's configurations)", later=True, most=1
    )
    alpha_ramp_epochs: float = _option(
        1.0, "alpha grows over this many epochs (ALBEF's configurations: 1, for SNLI-VE 0)", later=True
    )
    min_lr: float = _option(0.0, "the schedule's end (BLIP's released code: 0)")
    flip: bool = _option(True, "random horizontal flips, where neither text nor answer names a side")


@dataclass(frozen=True)
class FinetuneVqaOptions(TaskOptions):
    """Finetune a BLIP to answer questions about pictures: by writing (BLIP, section 5.3), or from a closed list."""

    answer_weight: tuple[str, ...] = _option(
        (),
        "PART=WEIGHT, what all answers of a part weigh (BLIP's released code: Visual Genome's 0.2); repeatable",
    )
    label_smoothing: float = _option(
        0.1, "of the answers' tokens (BLIP's released code); not with --closed", most=0.99
    )
    closed: bool = _option(
        False,
        "choose among the frequent answers, a classifier on soft targets (ViLT), in place of writing",
        later=True,
    )
    softmax: bool = _option(
        False,
        "with `closed`: an answer takes from the others, cross-entropy of their shares (arXiv 1704.03162), in place of "
        "each judged by itself",
        later=True,
    )
    min_answers: int = _option(
        9,
        "answers that are the most frequent of so many questions make the closed list, and the one to rank (ViLT's code: 9)",
        later=True,
        least=1,
    )
    learning_rate: float = _option(2e-5, "peak (BLIP's VQA configuration)", above=0)
    epochs: float = _option(
        10.0, "passes over the questions, where `steps` is 0 (BLIP's VQA configuration: 10)"
    )
    max_text_tokens: int = _option(
        35, "questions are cut to this many tokens (BLIP's released code: 35)", least=2
    )
    max_words: int = _option(50, "and before that to this many words (BLIP's released code: 50)", least=1)
    out: str = _option("vqa", "name of the checkpoint to write")


@dataclass(frozen=True)
class FinetuneNlvrOptions(TaskOptions):
    """Finetune a BLIP to judge statements about two pictures (NLVR2; BLIP, section 5.4), or about one (NLVR)."""

    single: bool = _option(
        False, "statements are about one picture: a classifier of it and the text, seen once", later=True
    )
    swap: float = _option(
        0.5,
        "chance of showing a pair in the other order, left and right exchanged (BLIP's released code)",
        most=1,
    )
    learning_rate: float = _option(3e-5, "peak (BLIP's NLVR2 configuration)", above=0)
    epochs: float = _option(
        15.0, "passes over the statements, where `steps` is 0 (BLIP's NLVR2 configuration: 15)"
    )
    max_text_tokens: int = _option(
        128, "statements are cut to this many tokens (BLIP's released code has no limit)", least=2
    )
    max_words: int = _option(40, "and before that to this many words (BLIP's released code: 40)", least=1)
    out: str = _option("nlvr", "name of the checkpoint to write")


@dataclass(frozen=True)
class FinetuneEntailmentOptions(TaskOptions):
    """Finetune a BLIP to tell whether a picture entails a text, contradicts it, or neither (SNLI-VE; as ALBEF does)."""

    learning_rate: float = _option(2e-5, "peak (ALBEF's SNLI-VE configuration)", above=0)
    epochs: float = _option(
        5.0, "passes over the hypotheses, where `steps` is 0 (ALBEF's SNLI-VE configuration: 5)"
    )
    min_lr: float = _option(1e-6, "the schedule's end (ALBEF's SNLI-VE configuration)")
    max_text_tokens: int = _option(
        64, "hypotheses are cut to this many tokens (ALBEF's released code has no limit)", least=2
    )
    max_words: int = _option(30, "and before that to this many words (ALBEF's released code: 30)", least=1)
    out: str = _option("entailment", "name of the checkpoint to write")


@dataclass(frozen=True)
class FinetuneClassificationOptions(TaskOptions):
    """Finetune a vision tower to tell the classes of pictures apart: a linear head on [CLS], every weight trained."""

    learning_rate: float = _option(
        3e-5, "peak (as BLIP's NLVR2 configuration; none is published for classes)", above=0
    )
    epochs: float = _option(10.0, "passes over the pictures, where `steps` is 0")
    max_text_tokens: int = _option(2, "no text is read", told=True, least=2)
    max_words: int = _option(1, "no text is read", told=True, least=1)
    out: str = _option("classification", "name of the checkpoint to write")


_ENGINE_BATCH = "images per batch; 0: as many as fit; halved where a GPU's memory is too small"
_ENGINE_PRECISION = (
    "of a checkpoint: auto (bf16 on GPUs that have it, else fp32), fp32, bf16, int8 (CPUs) or fp8 (vision "
    "tower, newer GPUs, with --compile)"
)
_ENGINE_COMPILE = (
    "have torch.compile make the vision tower's kernels: for GPUs; takes a minute, once: ~/.cache/capfilt "
    "keeps them"
)


_ENGINE_DRAFT = (
    "of a checkpoint: let decoders scale JPEGs of 4 times the model's size or more: faster, but pixels are not quite the "
    "released code's, and scores move (docs/performance.md)"
)
_BEAM_RULES = ("transformers", "released")
_BEAM_RULE = (
    "transformers: count new tokens with [SEP]; or released: count the prompt, not [SEP], as BLIP's released code does, "
    "and stop as it does"
)


@dataclass(frozen=True)
class CaptionOptions(Checked):
    """Step 2: write synthetic texts for every image of a part."""

    captioner: str = _option(
        "captioner",
        "checkpoint of the captioner; or NAME:ARGUMENT of a plug-in (docs/plugins.md)",
        kind="model",
    )
    captioner_option: tuple[str, ...] = _option(
        (), "KEY=VALUE, an option of the plug-in's own; repeatable", later=True
    )
    images: str = _option(REQUIRED, "images part to caption", kind="images")
    out: str = _option("", "name of the captions part to write; default: the captioner's")
    method: str = _option(
        "nucleus",
        "nucleus, beam or greedy (BLIP, section 4.2: nucleus)",
        choices=("nucleus", "beam", "greedy"),
    )
    top_p: float = _option(
        0.9, "nucleus: share of the probability to draw from (BLIP, section 4.2)", above=0, most=1
    )
    top_k: int = _option(
        0, "nucleus: draw from at most so many tokens; 0: no limit (BLIP's released code: 50)", later=True
    )
    temperature: float = _option(
        1.0,
        "nucleus: above 1 flattens the probabilities, below 1 sharpens them",
        later=True,
        above=0,
    )
    num_beams: int = _option(3, "beam: width (BLIP's caption configuration: 3)", least=1)
    length_penalty: float = _option(
        1.0,
        "beam: a text's score is its log probability over length ** this; higher favours longer",
        later=True,
        least=-math.inf,
    )
    beam_rule: str = _option("transformers", f"beam: {_BEAM_RULE}", later=True, choices=_BEAM_RULES)
    filter: str = _option(
        "",
        "also score, in the same pass over the pictures: a filter with the captioner's vision tower, as `finetune "
        "--freeze-vision` makes them",
        kind="model",
    )
    samples: int = _option(1, "texts per image (BLIP: 1)", least=1)
    prompt: str = _option(
        "a picture of ", "put before the text, not part of it (BLIP's caption configuration)"
    )
    # BLIP's 20 and 5 count its 4 prompt slots; these do not.
    max_new_tokens: int = _option(
        20, "longest text in tokens, without the prompt, with the closing [SEP]", least=1
    )
    min_new_tokens: int = _option(1, "shortest text in tokens, without the prompt and the closing [SEP]")
    repetition_penalty: float = _option(
        1.0, "above 1 discourages repeated tokens (BLIP's sampling used 1.1)", above=0
    )
    batch_size: int = _option(0, _ENGINE_BATCH)
    precision: str = _option("auto", _ENGINE_PRECISION, later=True)
    compile: bool = _option(False, _ENGINE_COMPILE, later=True)
    draft: bool = _option(False, _ENGINE_DRAFT, later=True)
    seed: int = _option(0, "of sampling; each text has its own stream")


@dataclass(frozen=True)
class ScoreOptions(Checked):
    """Step 2: judge web and synthetic texts alike with the filter."""

    filter: str = _option(
        "filter",
        "checkpoint of the filter; or NAME:ARGUMENT of a plug-in, such as clip:DIR (docs/plugins.md)",
        kind="model",
    )
    filter_option: tuple[str, ...] = _option(
        (), "KEY=VALUE, an option of the plug-in's own; repeatable", later=True
    )
    images: str = _option(REQUIRED, "images part whose texts to score", kind="images")
    captions: tuple[str, ...] = _option((), "captions parts of the same images; repeatable", kind="captions")
    out: str = _option("", "name of the scores part to write; default: the filter's")
    max_text_tokens: int = _option(
        35,
        "texts are cut to this many tokens (BLIP's released code: 35); a plug-in may have its own limit",
        least=2,
    )
    batch_size: int = _option(0, _ENGINE_BATCH)
    precision: str = _option("auto", _ENGINE_PRECISION, later=True)
    compile: bool = _option(False, _ENGINE_COMPILE, later=True)
    draft: bool = _option(False, _ENGINE_DRAFT, later=True)


@dataclass(frozen=True)
class SelectOptions(Checked):
    """Step 2: turn scores into verdicts and into the corpus. No model, no GPU."""

    images: str = _option(REQUIRED, "images part", kind="images")
    captions: tuple[str, ...] = _option((), "captions parts; repeatable", kind="captions")
    scores: str = _option("filter", "scores part", kind="scores")
    out: str = _option("capfilt", "name of the rule: of the verdicts part and the pairs part")
    by: str = _option(
        "itm_score", "itm_score, itc_score or itm_probability; of a plug-in's part, a column of its own"
    )
    threshold: float = _option(
        0.5, "keep texts that score at least this (BLIP's author: 0.5 of the softmax)", least=-math.inf
    )
    keep_fraction: float = _option(
        0.0,
        "instead: keep this share of the scored texts of --sources (a global quantile); 0 for none",
        most=1,
    )
    sources: tuple[str, ...] = _option(("web", "synthetic"), "which texts may be kept", choices=SOURCES)
    duplicates: str = _option(
        "",
        "signals part of `capfilt duplicates`: texts are kept of one image per cluster only",
        kind="signals",
    )
    pairs: bool = _option(True, "also write the pairs part, with pictures")


@dataclass(frozen=True)
class RetrainOptions(PretrainOptions):
    """Step 3: train a new model on human, kept web and kept synthetic pairs."""

    pairs: tuple[str, ...] = _option((), "pairs parts; repeatable", kind="pairs")
    verdicts: tuple[str, ...] = _option(
        (), "IMAGES=VERDICTS: images part joined with a verdicts part, in place of pairs; repeatable"
    )
    model: str = _option("blip", f"which model to train: {', '.join(RETRAINED)}", choices=RETRAINED)
    contrast: str = _option(
        "softmax",
        "clip's loss: softmax over the batch, or sigmoid of each pair (SigLIP)",
        later=True,
        models=("clip",),
    )
    contrast_chunk: int = _option(
        0,
        "clip: rows of the batch's logits at a time, for large batches; 0 for all",
        told=True,
        models=("clip",),
    )
    mask_share: float = _option(
        0.15,
        "vilt, albef: share of a text's words, or tokens, that are hidden (0.15 in both papers)",
        later=True,
        models=("vilt", "albef"),
        above=0,
        below=1,
    )
    alignment: float = _option(
        0.1,
        "vilt: weight of word-patch alignment, 0 for none (released code: 0.1)",
        later=True,
        models=("vilt",),
    )
    max_patches: int = _option(
        200,
        "vilt: patches of a picture that a step sees at most, 0 for all (section 4.2: 200, of pictures of up to 384x640; the "
        "squares here have 144 at 384 px, so it leaves none out before 480 px)",
        later=True,
        models=("vilt",),
    )
    continue_from: str = _option(
        "", "checkpoint to continue from, in place of a new initialisation", kind="model"
    )
    out: str = _option("retrained", "name of the checkpoint to write")


@dataclass(frozen=True)
class EvaluateOptions(Checked):
    """Measure what a checkpoint can do, task by task, on one split: see docs/evaluation.md."""

    model: str = _option("retrained", "checkpoint", kind="model")
    images: str = _option(
        REQUIRED,
        "images part: with human captions for retrieval and captioning, else with the examples' pictures",
        kind="images",
    )
    examples: tuple[str, ...] = _option(
        (),
        "examples parts for the other tasks, each of which takes its own rows; repeatable",
        kind="examples",
    )
    pictures: tuple[str, ...] = _option(
        (), "further images parts that hold pictures of the examples; repeatable", kind="images"
    )
    split: str = _option("test", "split to evaluate on; empty for every row", choices=("", *SPLITS))
    support_split: str = _option(
        "",
        "split to learn from (few-shot: train) or to choose a threshold on (match: val)",
        choices=("", *SPLITS),
    )
    tasks: tuple[str, ...] = _option(
        (),
        "retrieval, captioning, zero-shot, few-shot, classification, match, rating, choice, vqa, nlvr, entailment; repeatable; "
        "default: every task that model, images and examples allow",
    )
    rerank: int = _option(
        128, "re-rank so many candidates by ITM (BLIP, Flickr30K: 128, COCO: 256); 0: rank by ITC alone"
    )
    method: str = _option(
        "beam", "captioning: beam, greedy or nucleus", choices=("nucleus", "beam", "greedy")
    )
    num_beams: int = _option(3, "captioning, vqa: beams (BLIP's configurations of both: 3)", least=1)
    beam_rule: str = _option(
        "transformers", f"captioning, vqa: {_BEAM_RULE}", later=True, choices=_BEAM_RULES
    )
    prompt: str = _option("", "captioning: prompt; pretrained models learned none")
    max_new_tokens: int = _option(20, "captioning: longest text in tokens", least=1)
    answer_list: str = _option(
        "",
        "vqa: answers to rank, a JSON list or lines, such as the answers.json of a finetuned checkpoint; default: none",
        kind="path",
    )
    answer_k: int = _option(
        128, "vqa: so many answers are compared whole when ranking (BLIP's released code: 128)", least=1
    )
    caption_scorer: str = _option(
        "capfilt", "captioning: capfilt (no Java), or pycocoevalcap (METEOR and SPICE too, where Java is)"
    )
    templates: str = _option(
        "cifar", "zero-shot: prompts, single, cifar or imagenet (CLIP's), or a file with one {} per line", kind="path"
    )  # fmt: skip
    shots: str = _option("1,2,4,8,16", "few-shot: numbers of examples per class, with commas")
    draws: int = _option(3, "few-shot: how often the examples are drawn", least=1)
    limit: int = _option(0, "only so many images, or examples; 0 for all")
    batch_size: int = _option(64, "images per batch", least=1)
    precision: str = _option("auto", _PRECISION, later=True)
    out: str = _option("", "name of the result in runs/; default: the model's")
    seed: int = _option(0, "of the bootstrap intervals, and of few-shot draws")
    resamples: int = _option(2000, "of the bootstrap intervals, by image; 0: no intervals")
    markdown: str = _option("", "also write the figures to this file, as a Markdown table", told=True)


@dataclass(frozen=True)
class SubsetOptions(Checked):
    """Take a share of an images part, and plant known noise in its texts: for measuring a filter where truth is known.

    The column `planted` of the new part says of each text what was done to it: true, other_image, truncated or
    file_name. Nothing but `grade` reads it.
    """

    images: str = _option(REQUIRED, "images part to take from", kind="images")
    dataset: str = _option(REQUIRED, "name of the images part to write")
    role: str = _option("human", "human or web: what the new part's texts count as", choices=("human", "web"))
    splits: tuple[str, ...] = _option((), "keep only these splits; default: all", choices=SPLITS)
    share_from: float = _option(0.0, "keep images whose place in [0, 1), by a hash, is at least this", most=1)
    share_to: float = _option(1.0, "keep images whose place in [0, 1), by a hash, is below this", most=1)
    texts: int = _option(0, "keep at most so many texts per image; 0 for all")
    wrong: float = _option(0.0, "share of images whose texts are replaced by another image's", most=1)
    truncated: float = _option(0.0, "share of images whose texts are cut short", most=1)
    file_name: float = _option(0.0, "share of images whose texts become a camera's file name", most=1)
    seed: int = _option(0, "of the planted noise")


@dataclass(frozen=True)
class GradeOptions(Checked):
    """Grade scores and verdicts against known truth: planted noise, expert ratings."""

    images: str = _option(REQUIRED, "images part with a `planted` column", kind="images")
    verdicts: str = _option("capfilt", "verdicts part over the same images", kind="verdicts")
    filter: str = _option("", "checkpoint of the filter, where expert ratings are to be scored", kind="model")
    expert: str = _option("", "JSON Lines of image, caption, ratings (Flickr8k-Expert)", kind="path")
    expert_root: str = _option("", "folder that the images of `expert` are relative to", kind="path")
    out: str = _option("grade", "name of the result in runs/")
    seed: int = _option(0, "of the bootstrap intervals")
