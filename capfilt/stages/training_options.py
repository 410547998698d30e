"""The options of the stages that train on pairs, and their records; what every training has is `LoopOptions`."""

from __future__ import annotations

from dataclasses import dataclass, fields, make_dataclass
from typing import Any, ClassVar

from capfilt.data.rows import IMAGE_ROWS, PAIR_ROWS, TEXT_ROWS
from capfilt.errors import UserError
from capfilt.models import families
from capfilt.models.blip import FAMILY as BLIP
from capfilt.models.blip import Options as BlipOptions
from capfilt.models.common.options import MomentumOptions
from capfilt.models.family import Family
from capfilt.options import AUGMENTATION, INPUTS, MACHINE, MODEL, OPTIMISER, SCHEDULE, Checked, option
from capfilt.stages.command import StageCommand


def refuse_foreign(options: Any, family: Family) -> None:
    """UserError naming an option of other families that is given and means nothing to this one."""
    own = {each.name for each in fields(family.options)}
    for each in fields(options):
        value = getattr(options, each.name)
        if (
            each.name in MomentumOptions.__dataclass_fields__
            and each.name not in own
            and value != each.default
        ):
            raise UserError(
                f"--{each.name.replace('_', '-')} {value}: does not apply to {family.name}; remove it"
            )


@dataclass(frozen=True)
class ModelOptions(Checked):
    """The architecture, where a model is made from scratch."""

    panel = MODEL

    # A family has choices of its own; trunk is a frozen ImageNet trunk.
    preset: str = option("small", "size of the model", choices=BLIP.presets)
    image_size: int = option(0, "side of the input in pixels; 0: the preset's")
    patch_size: int = option(0, "side of a patch in pixels; 0: the preset's", later=True, rare=True)
    vocab: str = option(
        "corpus",
        "vocab.txt, tokenizer.json or .model; corpus: learn one on the texts",
        kind="path",
        panel=MODEL,
    )
    vocab_size: int = option(4096, "largest size of a learned vocabulary", least=1)


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

    augment: bool = option(True, "random resized crops: of whole pictures; of examples, as squares")
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
    freeze: tuple[str, ...] = option((), "part to keep as it is: vision or text; repeatable")


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
    weights: str = option(
        "draws",
        "texts.weight: a text's share of the epochs, its weight in the losses, or nothing",
        later=True,
        choices=("draws", "loss", "ignore"),
        panel=INPUTS,
        rare=True,
    )
    stream: bool = option(False, "keep no decoded pictures: memory does not grow with the corpus", told=True)
    loader_workers: int = option(0, "with --stream: processes that decode; 0: threads", told=True, rare=True)
    cache_features: bool = option(False, "compute the frozen trunk's feature maps once", rare=True)
    # The loss at ITM's class prior is 0.6365.
    stuck_steps: int = option(
        2000,
        "warn after N steps of ITM at chance; 0: never",
        told=True,
        rare=True,
    )
    collapse_steps: int = option(
        500,
        "warn after N steps of embeddings that are all alike; 0: never",
        told=True,
        rare=True,
    )


@dataclass(frozen=True)
class PretrainOptions(BlipOptions, OptimisationOptions, ModelOptions):
    """Step 1: train a BLIP on web pairs and human pairs. It learns ITC, ITM and LM."""

    family: ClassVar[str] = "blip"

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
class FinetuneFilterOptions(MomentumOptions, OptimisationOptions):
    """Step 2: finetune the filter (ITC and ITM) on human pairs."""

    init: str = option("pretrained", "checkpoint to start from", kind="model")
    human: tuple[str, ...] = option((), "images part with human captions; repeatable", kind="images")
    learning_rate: float = option(1e-5, "peak (BLIP's retrieval: 1e-5 for ViT-B)", above=0)
    min_lr: float = option(0.0, "learning rate at the end (BLIP's retrieval: 0)")
    epochs: float = option(6.0, "passes over the texts (BLIP's retrieval: 6)")
    max_text_tokens: int = option(35, "cut texts to N tokens (BLIP's code: 35)", least=2)
    alpha_ramp_epochs: float = option(1.0, "epochs over which alpha grows (BLIP's retrieval: 1)", rare=True)
    image_size: int = option(
        0, "side of the input in pixels; 0: the checkpoint's (BLIP's code: 384)", later=True
    )
    held_out: str = option("", "images part of human pairs to compare judges on", kind="images", later=True)
    against: tuple[str, ...] = option(
        (), "with --held-out: another judge, such as a locked; repeatable", kind="model", later=True
    )
    out: str = option("filter", "name of the checkpoint to write")


@dataclass(frozen=True)
class FinetuneTextAssignmentOptions(OptimisationOptions):
    """Teach an ALBEF which of two pictures a text belongs to. `finetune nlvr` follows (ALBEF, section 5)."""

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
class RetrainOptions(OptimisationOptions, ModelOptions):
    """The options of `retrain` that all families share."""

    family: ClassVar[str]

    human: tuple[str, ...] = option((), "images part with human captions; repeatable", kind="images")
    web: tuple[str, ...] = option((), "images part with web texts; repeatable", kind="images")
    pairs: tuple[str, ...] = option((), "pairs part; repeatable", kind="pairs")
    verdicts: tuple[str, ...] = option(
        (), "IMAGES=VERDICTS: images part with its verdicts part, instead of pairs; repeatable", panel=INPUTS
    )
    dropped: str = option(
        "leave-out",
        "pictures whose texts --verdicts drop: negatives of ITC, or with a soft target too",
        choices=("leave-out", "negatives", "soft"),
        later=True,
        panel=INPUTS,
        rare=True,
    )
    synthetic_share: float = option(
        1.0, "largest share of draws that synthetic texts take", later=True, most=1, panel=INPUTS
    )
    init: str = option("", "checkpoint to start from, in place of a new model", kind="model")
    out: str = option("retrained", "name of the checkpoint to write")


def retrain(family: Family) -> StageCommand:
    """`retrain FAMILY`."""
    name = family.name
    return StageCommand(
        ("retrain", name),
        globals().get(_class_of(name)) or _made(family),
        ("capfilt.stages.train:Retrain",),
        (
            f"capfilt retrain {name} --human coco --pairs capfilt --preset base --out {name}",
            f"capfilt retrain {name} --human coco --verdicts cc12m=top30 --out {name}-top30",
        ),
    )


def _made(family: Family) -> Any:
    """The options of `retrain FAMILY`: the family's own, whose defaults win, and the shared ones."""
    name = _class_of(family.name)
    default = "small" if "small" in family.presets else family.presets[0]
    alone = [rows for rows in family.kinds[0].rows if rows in _ALONE]
    preset = option(default, "size of the model", choices=family.presets, panel=MODEL)
    made = make_dataclass(
        name,
        [
            ("preset", "str", preset),
            *((rows, "tuple[str, ...]", option((), _ALONE[rows], kind="images")) for rows in alone),
        ],
        bases=(family.options, RetrainOptions),
        frozen=True,
        namespace={
            "family": family.name,
            "without": without(family.kinds[0].rows) | getattr(family.options, "without", frozenset()),
        },
    )
    made.__doc__ = f"Step 3: train {family.kinds[0].one} on {_LEARNED[family.kinds[0].rows[0]]}."
    # Other processes unpickle options by the name of their class.
    made.__module__ = __name__
    globals()[name] = made
    return made


_ALONE = {
    IMAGE_ROWS: "part of pictures alone: of images, or pairs/NAME; repeatable",
    TEXT_ROWS: "part of texts alone: images, pairs/NAME, captions/NAME; repeatable",
}
"""The inputs of rows that are no pairs, with their help."""

_LEARNED = {
    PAIR_ROWS: "human, kept web and kept synthetic pairs",
    IMAGE_ROWS: "pictures",
    TEXT_ROWS: "texts",
}


def without(rows: tuple[str, ...]) -> frozenset[str]:
    """The options of `RetrainOptions` that mean nothing to a model which learns from such rows."""
    left: set[str] = set()
    if PAIR_ROWS not in rows:
        left |= {"human", "web", "pairs", "verdicts", "mix", "dropped", "synthetic_share"}
    if not {PAIR_ROWS, IMAGE_ROWS} & {*rows}:
        pictures = ("image_size", "patch_size", "cache_features")
        left |= {*pictures, *(each.name for each in fields(AugmentationOptions))}
    if not {PAIR_ROWS, TEXT_ROWS} & {*rows}:
        left |= {"vocab", "vocab_size", "max_text_tokens", "max_words"}
    return frozenset(left)


def _class_of(family: str) -> str:
    return f"Retrain_{family}"


def __getattr__(name: str) -> Any:
    for family in families() if name.startswith(_class_of("")) else ():
        if name == _class_of(family.name):
            return _made(family)
    raise AttributeError(name)


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
    (
        "capfilt finetune filter --init pretrained --human coco",
        "capfilt finetune filter --init pretrained --human coco --held-out kept-back --against judge",
    ),
)

FINETUNE_TEXT_ASSIGNMENT = StageCommand(
    ("finetune", "text-assignment"),
    FinetuneTextAssignmentOptions,
    ("capfilt.stages.train:FinetuneTextAssignment",),
    ("capfilt finetune text-assignment --init albef --human coco --web cc3m",),
)
