"""The options of the stages that train on pairs, and their records; what every training has is `LoopOptions`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from capfilt.stages.command import StageCommand
from capfilt.stages.options import AUGMENTATION, INPUTS, MACHINE, MODEL, OPTIMISER, SCHEDULE, Checked, option

RETRAINED = ("blip", "clip", "vilt", "albef")
"""What `retrain` trains."""

_TOWERS = ("blip", "albef")
"""Models with a vision tower, a queue and momentum towers."""


def foreign(options: Any, model: str) -> list[str]:
    """The names of the options that mean nothing to `model`, one of RETRAINED, and are not what they are by default."""
    return [
        each.name
        for each in fields(options)
        if model not in (each.metadata["models"] or RETRAINED) and getattr(options, each.name) != each.default
    ]


@dataclass(frozen=True)
class ModelOptions(Checked):
    """The architecture, where a model is made from scratch."""

    panel = MODEL

    preset: str = option("small", "tiny, small, trunk (a frozen ImageNet trunk), base or large")
    image_size: int = option(0, "side of the input in pixels; 0: the preset's")
    patch_size: int = option(0, "side of a patch in pixels; 0: the preset's", later=True, rare=True)
    stem: str = option(
        "",
        "first layers; patch is as published and can be exported; default: the preset's",
        choices=("", "patch", "conv"),
        later=True,
        models=_TOWERS,
        rare=True,
    )
    vocab: str = option(
        "corpus", "vocab.txt or tokenizer.json; corpus: learn one on the texts", kind="path", panel=MODEL
    )
    vocab_size: int = option(4096, "largest size of a learned vocabulary", least=1)
    vision_init: str = option(
        "",
        "transformers ViT or DeiT directory to start the vision tower from",
        kind="path",
        models=("blip", "vilt", "albef"),
        panel=MODEL,
        rare=True,
    )
    text_init: str = option(
        "",
        "transformers BERT directory to start the text side from; needs its own --vocab",
        kind="path",
        models=_TOWERS,
        panel=MODEL,
        rare=True,
    )


@dataclass(frozen=True)
class ScheduleOptions(Checked):
    """How long to train, on how much at a time."""

    panel = SCHEDULE

    steps: int = option(0, "optimiser steps; 0: by --epochs")
    epochs: float = option(20.0, "passes over the texts (BLIP: 20)")
    batch_size: int = option(64, "texts per step", least=1)
    micro_batch: int = option(
        0, "most texts per GPU per forward pass (instead of --accumulate); 0: no limit", later=True
    )
    accumulate: int = option(
        1, "split a step into N micro-batches; ITC, ITM compare within one", later=True, least=1, rare=True
    )
    warmup_steps: int = option(100, "steps of linear warm-up")
    schedule: str = option(
        "cosine",
        "learning rate; epoch-cosine is BLIP's finetuning, epoch-decay BLIP's pretraining",
        later=True,
        choices=("cosine", "linear", "epoch-cosine", "epoch-decay"),
    )
    decay_rate: float = option(
        0.9, "epoch-decay: factor per epoch (BLIP's code: 0.9, paper: 0.85)", later=True, most=1, rare=True
    )
    save_every: int = option(500, "steps between the states that a killed run resumes from; 0: none")
    keep_states: int = option(1, "keep the N newest states until the end", told=True, least=1, rare=True)
    keep_best: bool = option(
        False, "keep best/, the saved weights with the lowest training loss", told=True, rare=True
    )
    seed: int = option(0, "seed of initialisation, order, crops and negatives")


@dataclass(frozen=True)
class OptimiserOptions(Checked):
    """How the weights are updated."""

    panel = OPTIMISER

    learning_rate: float = option(3e-4, "peak (BLIP: 3e-4 for ViT-B)", above=0)
    min_lr: float = option(1e-6, "learning rate at the end (BLIP: 1e-6)")
    weight_decay: float = option(0.05, "weight decay of AdamW (BLIP: 0.05)")
    decay: str = option(
        "matrices",
        "weights that decay; all: biases, norms and temperature too (BLIP's code)",
        later=True,
        choices=("matrices", "all"),
        rare=True,
    )
    beta2: float = option(
        0.999, "second beta of AdamW (BLIP: 0.999; ViLT, CLIP: 0.98)", later=True, below=1, rare=True
    )
    clip_norm: float = option(1.0, "largest gradient norm; 0: no limit", rare=True)
    ema: float = option(
        0.0, "EMA decay; the checkpoint has the EMA weights, live/ the raw", later=True, below=1, rare=True
    )


@dataclass(frozen=True)
class AugmentationOptions(Checked):
    """How pictures are changed from epoch to epoch."""

    panel = AUGMENTATION

    augment: bool = option(True, "random resized crops")
    crop_scale: float = option(
        0.5, "smallest share of the picture in a crop (BLIP: 0.2, finetuning: 0.5)", least=0.001, most=1
    )
    flip: bool = option(False, "random horizontal flips, where the text names no side")
    randaugment: int = option(
        0, "RandAugment operations per picture, after the crop (BLIP's code: 2)", later=True
    )
    randaugment_level: float = option(
        5.0, "strength of RandAugment (BLIP's code: 5)", later=True, most=10, rare=True
    )


@dataclass(frozen=True)
class MachineOptions(Checked):
    """How the machine is used."""

    panel = MACHINE

    ranks: int = option(
        0, "processes that train together, one per GPU; 0: as many GPUs as divide the batch", told=True
    )
    shard: bool = option(
        False, "split weights and optimiser states over the ranks (FSDP2)", told=True, rare=True
    )
    precision: str = option(
        "auto", "arithmetic; auto: bf16 on GPUs that have it, else fp32", choices=("auto", "fp32", "bf16")
    )
    recompute: bool = option(
        False, "recompute activations in the backward pass: less memory, a third slower", told=True, rare=True
    )
    tensorboard: bool = option(False, "also write tensorboard/ beside the checkpoint", told=True, rare=True)


@dataclass(frozen=True)
class LoopOptions(MachineOptions, AugmentationOptions, OptimiserOptions, ScheduleOptions):
    """How long and how to train, whatever is learned."""

    panel = MODEL

    max_text_tokens: int = option(30, "cut texts to N tokens (BLIP's code: 30)", least=2)
    freeze_vision: bool = option(False, "do not train the vision tower")


@dataclass(frozen=True)
class OptimisationOptions(LoopOptions):
    """How long and how to train on pairs."""

    panel = MACHINE

    max_words: int = option(
        0, "cut texts to N words first; 0: the model's own", later=True, panel=MODEL, rare=True
    )
    mix: tuple[str, ...] = option(
        (), "SOURCE=WEIGHT of web, human, synthetic texts; repeatable", later=True, panel=INPUTS, rare=True
    )
    stream: bool = option(
        False, "read pictures when needed: memory does not grow with the corpus", later=True
    )
    loader_workers: int = option(0, "with --stream: processes that decode; 0: threads", told=True, rare=True)
    cache_features: bool = option(False, "compute the frozen trunk's feature maps once", rare=True)
    # The loss at ITM's class prior is 0.6365.
    stuck_steps: int = option(
        2000,
        "warn after N steps of ITM at chance; 0: never",
        told=True,
        models=("blip", "vilt", "albef"),
        rare=True,
    )
    collapse_steps: int = option(
        500,
        "warn after N steps of embeddings that are all alike; 0: never",
        told=True,
        models=("blip", "clip", "albef"),
        rare=True,
    )


@dataclass(frozen=True)
class PretrainingObjectiveOptions(Checked):
    """ITC, ITM and LM (BLIP, section 3.2)."""

    panel = MODEL

    queue_size: int = option(
        57600, "momentum features kept as candidates (BLIP's code: 57600)", models=_TOWERS
    )
    momentum: float = option(
        0.995, "momentum of the momentum towers (BLIP's code: 0.995); 0: no towers", models=_TOWERS, below=1
    )
    momentum_batch_size: int = option(
        0,
        "batch that `momentum` is meant for; other batches scale it (BLIP: 2880); 0: no scaling",
        later=True,
        models=_TOWERS,
        rare=True,
    )
    alpha: float = option(
        0.4, "weight of the momentum towers' targets (BLIP's code: 0.4)", models=_TOWERS, most=1, rare=True
    )
    alpha_ramp_epochs: float = option(
        2.0, "epochs over which alpha grows (BLIP's code: 2)", models=_TOWERS, rare=True
    )
    hardness_ramp_steps: int = option(
        0, "steps over which ITM's negatives go from uniform to hard (BLIP: 0)", models=_TOWERS, rare=True
    )
    multi_positive: bool = option(
        True,
        "texts and pictures that occur twice count as matches (BLIP's pretraining: off)",
        later=True,
        models=_TOWERS,
        rare=True,
    )
    global_negatives: bool = option(
        True,
        "compare the batch of all ranks; off: each rank's own texts and the queue (BLIP's code)",
        later=True,
        models=_TOWERS,
        rare=True,
    )
    label_smoothing: float = option(
        0.1, "label smoothing of the texts (BLIP's code: 0.1)", models=("blip",), most=0.99, rare=True
    )


@dataclass(frozen=True)
class PretrainOptions(PretrainingObjectiveOptions, OptimisationOptions, ModelOptions):
    """Step 1: train a BLIP on noisy web pairs and human pairs with ITC, ITM and LM."""

    human: tuple[str, ...] = option((), "images part with human captions; repeatable", kind="images")
    web: tuple[str, ...] = option((), "images part with web texts; repeatable", kind="images")
    out: str = option("pretrained", "name of the checkpoint to write")


@dataclass(frozen=True)
class FinetuneCaptionerOptions(OptimisationOptions):
    """Step 2: finetune the captioner (LM) on human pairs."""

    panel = MODEL

    init: str = option("pretrained", "checkpoint to start from", kind="model")
    human: tuple[str, ...] = option((), "images part with human captions; repeatable", kind="images")
    prompt: str = option("a picture of ", "put before every text, not learned (BLIP's caption prompt)")
    label_smoothing: float = option(
        0.1, "label smoothing of the texts' tokens (BLIP's code: 0.1)", most=0.99, rare=True
    )
    learning_rate: float = option(1e-5, "peak (BLIP's captioning: 1e-5 for ViT-B)", above=0)
    min_lr: float = option(0.0, "learning rate at the end (BLIP's captioning: 0)")
    epochs: float = option(5.0, "passes over the texts (BLIP's captioning: 5)")
    max_text_tokens: int = option(40, "cut texts to N tokens (BLIP's code: 40)", least=2)
    image_size: int = option(
        0, "side of the input in pixels; 0: the checkpoint's (BLIP's code: 384)", later=True
    )
    out: str = option("captioner", "name of the checkpoint to write")


@dataclass(frozen=True)
class FinetuneFilterOptions(PretrainingObjectiveOptions, OptimisationOptions):
    """Step 2: finetune the filter (ITC and ITM) on human pairs."""

    panel = MODEL

    init: str = option("pretrained", "checkpoint to start from", kind="model")
    human: tuple[str, ...] = option((), "images part with human captions; repeatable", kind="images")
    learning_rate: float = option(1e-5, "peak (BLIP's retrieval: 1e-5 for ViT-B)", above=0)
    min_lr: float = option(0.0, "learning rate at the end (BLIP's retrieval: 0)")
    epochs: float = option(6.0, "passes over the texts (BLIP's retrieval: 6)")
    max_text_tokens: int = option(35, "cut texts to N tokens (BLIP's code: 35)", least=2)
    alpha_ramp_epochs: float = option(
        1.0, "epochs over which alpha grows (BLIP's retrieval: 1)", models=_TOWERS, rare=True
    )
    image_size: int = option(
        0, "side of the input in pixels; 0: the checkpoint's (BLIP's code: 384)", later=True
    )
    out: str = option("filter", "name of the checkpoint to write")


@dataclass(frozen=True)
class FinetuneTextAssignmentOptions(OptimisationOptions):
    """Let an ALBEF learn which of two pictures a text belongs to, before `finetune nlvr` (ALBEF, section 5)."""

    panel = MODEL

    init: str = option("albef", "pretrained ALBEF to start from", kind="model")
    human: tuple[str, ...] = option((), "images part with human captions; repeatable", kind="images")
    web: tuple[str, ...] = option((), "images part with web texts; repeatable", kind="images")
    drop_path: float = option(0.0, "drop path of the vision tower (ALBEF's code: 0)", below=1, rare=True)
    learning_rate: float = option(2e-5, "peak (ALBEF: 2e-5)", above=0)
    min_lr: float = option(1e-5, "learning rate at the end (ALBEF: 1e-5)")
    epochs: float = option(1.0, "passes over the texts (ALBEF: 1)")
    weight_decay: float = option(0.02, "weight decay of AdamW (ALBEF: 0.02)")
    # ALBEF's 25, and the [SEP] that it does not read.
    max_text_tokens: int = option(26, "cut texts to N tokens", least=2)
    image_size: int = option(0, "side of the input in pixels; 0: the checkpoint's (ALBEF: 256)")
    out: str = option("text-assignment", "name of the checkpoint to write")


@dataclass(frozen=True)
class RetrainOptions(PretrainOptions):
    """Step 3: train a new model on human, kept web and kept synthetic pairs."""

    panel = MODEL

    model: str = option("blip", "which model to train", choices=RETRAINED)
    pairs: tuple[str, ...] = option((), "pairs part; repeatable", kind="pairs")
    verdicts: tuple[str, ...] = option(
        (), "IMAGES=VERDICTS: images part with its verdicts part, instead of pairs; repeatable", panel=INPUTS
    )
    continue_from: str = option("", "checkpoint to continue from, not a new initialisation", kind="model")
    out: str = option("retrained", "name of the checkpoint to write")
    contrast: str = option(
        "softmax",
        "clip: loss; sigmoid judges each pair by itself (SigLIP)",
        later=True,
        models=("clip",),
        choices=("softmax", "sigmoid"),
    )
    contrast_chunk: int = option(
        0, "clip: rows of the logits at a time; 0: all", told=True, models=("clip",), rare=True
    )
    mask_share: float = option(
        0.15,
        "vilt, albef: share of words or tokens to hide (both papers: 0.15)",
        later=True,
        models=("vilt", "albef"),
        above=0,
        below=1,
        rare=True,
    )
    alignment: float = option(
        0.1,
        "vilt: weight of word-patch alignment (ViLT's code: 0.1)",
        later=True,
        models=("vilt",),
        rare=True,
    )
    # ViLT, section 4.2, of pictures of up to 384x640. Squares have 144 at 384 px, and more than 200 from 480 px.
    max_patches: int = option(
        200, "vilt: patches per picture and step (ViLT: 200); 0: all", later=True, models=("vilt",), rare=True
    )


PRETRAIN = StageCommand(
    ("pretrain",),
    PretrainOptions,
    ("capfilt.stages.train:Pretrain",),
    ("capfilt pretrain --human coco --web cc12m --preset base --epochs 20",),
)

FINETUNE_CAPTIONER = StageCommand(
    ("finetune", "captioner"),
    FinetuneCaptionerOptions,
    ("capfilt.stages.train:FinetuneCaptioner",),
    ("capfilt finetune captioner --init pretrained --human coco",),
)

FINETUNE_FILTER = StageCommand(
    ("finetune", "filter"),
    FinetuneFilterOptions,
    ("capfilt.stages.train:FinetuneFilter",),
    ("capfilt finetune filter --init pretrained --human coco",),
)

FINETUNE_TEXT_ASSIGNMENT = StageCommand(
    ("finetune", "text-assignment"),
    FinetuneTextAssignmentOptions,
    ("capfilt.stages.text_assignment:FinetuneTextAssignment",),
    ("capfilt finetune text-assignment --init albef --human coco --web cc3m",),
)

RETRAIN = StageCommand(
    ("retrain",),
    RetrainOptions,
    ("capfilt.stages.train:Retrain",),
    (
        "capfilt retrain --human coco --pairs capfilt --preset base",
        "capfilt retrain --human coco --verdicts cc12m=top30 --out retrained-top30",
        "capfilt retrain --model clip --human coco --pairs capfilt --preset base --out clip",
        "capfilt retrain --model vilt --human coco --pairs capfilt --preset base --out vilt",
        "capfilt retrain --model albef --human coco --pairs capfilt --preset base --out albef",
    ),
    kinds=(
        "model",
        {
            "clip": "capfilt.stages.retrain_clip:RetrainClip",
            "vilt": "capfilt.stages.retrain_vilt:RetrainVilt",
            "albef": "capfilt.stages.retrain_albef:RetrainAlbef",
        },
    ),
)
