"""The options of the stages that finetune for a task, and their records."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.options import INPUTS, OPTIMISER, SPLITS, option
from capfilt.stages.command import StageCommand
from capfilt.stages.training_options import LoopOptions


@dataclass(frozen=True)
class TaskOptions(LoopOptions):
    """What the stages that finetune for a task share: the recipes of BLIP's VQA and NLVR2 are these defaults."""

    examples: tuple[str, ...] = option((), "examples part; repeatable", kind="examples")
    images: tuple[str, ...] = option((), "images part with their pictures; repeatable", kind="images")
    init: str = option("pretrained", "pretrained BLIP, ViLT or ALBEF, or a model of the task", kind="model")
    splits: tuple[str, ...] = option(
        ("train",), "split to train on, beside rows without a split; repeatable", choices=SPLITS, panel=INPUTS
    )
    validate: int = option(
        2000, "judge N examples of the split val at the end; 0: none", told=True, panel=INPUTS, rare=True
    )
    image_size: int = option(0, "side of the input in pixels; 0: the checkpoint's")
    head_rate: float = option(
        1.0,
        "factor on the head's rate (ViLT's code for VQA: 10)",
        later=True,
        above=0,
        panel=OPTIMISER,
        rare=True,
    )
    drop_path: float = option(
        0.1, "drop path of the vision tower (BLIP's code: 0.1; ALBEF's: 0)", below=1, rare=True
    )
    momentum: float = option(
        0.0, "momentum of a teaching copy (ALBEF: 0.995); 0: no copy", later=True, below=1, rare=True
    )
    alpha: float = option(0.4, "weight of the copy's targets (ALBEF: 0.4)", later=True, most=1, rare=True)
    alpha_ramp_epochs: float = option(
        1.0, "epochs over which alpha grows (ALBEF: 1, SNLI-VE: 0)", later=True, rare=True
    )
    min_lr: float = option(0.0, "learning rate at the end (BLIP's code: 0)")
    flip: bool = option(True, "random horizontal flips, where neither text nor answer names a side")


@dataclass(frozen=True)
class FinetuneVqaOptions(TaskOptions):
    """Finetune a model to answer questions about pictures. It writes (BLIP, section 5.3), or chooses."""

    answer_weight: tuple[str, ...] = option(
        (), "PART=WEIGHT of its answers (BLIP's code: Visual Genome 0.2); repeatable", panel=INPUTS, rare=True
    )
    label_smoothing: float = option(
        0.1, "label smoothing of answers (BLIP's code: 0.1); not with --closed", most=0.99, rare=True
    )
    closed: bool = option(False, "choose among the frequent answers (ViLT) instead of writing", later=True)
    softmax: bool = option(
        False, "with --closed: softmax cross-entropy, not one sigmoid per answer", later=True, rare=True
    )
    min_answers: int = option(
        9, "keep top answers of N questions or more (ViLT's code: 9)", later=True, least=1, rare=True
    )
    learning_rate: float = option(2e-5, "peak (BLIP's VQA: 2e-5)", above=0)
    epochs: float = option(10.0, "passes over the questions (BLIP's VQA: 10)")
    max_text_tokens: int = option(35, "cut questions to N tokens (BLIP's code: 35)", least=2)
    max_words: int = option(50, "cut questions to N words first (BLIP's code: 50)", least=1, rare=True)
    out: str = option("vqa", "name of the checkpoint to write")


@dataclass(frozen=True)
class FinetuneNlvrOptions(TaskOptions):
    """Finetune a model to judge statements about pictures. Two pictures: NLVR2 (BLIP, section 5.4); one: NLVR."""

    single: bool = option(False, "statements about one picture: a classifier, not a pair encoder", later=True)
    swap: float = option(
        0.5, "chance of showing a pair in the other order (BLIP's code: 0.5)", most=1, rare=True
    )
    learning_rate: float = option(3e-5, "peak (BLIP's NLVR2: 3e-5)", above=0)
    epochs: float = option(15.0, "passes over the statements (BLIP's NLVR2: 15)")
    max_text_tokens: int = option(128, "cut statements to N tokens (BLIP's code: no limit)", least=2)
    max_words: int = option(40, "cut statements to N words first (BLIP's code: 40)", least=1, rare=True)
    out: str = option("nlvr", "name of the checkpoint to write")


@dataclass(frozen=True)
class FinetuneEntailmentOptions(TaskOptions):
    """Finetune a model for visual entailment. SNLI-VE, as ALBEF does."""

    learning_rate: float = option(2e-5, "peak (ALBEF's SNLI-VE: 2e-5)", above=0)
    epochs: float = option(5.0, "passes over the hypotheses (ALBEF's SNLI-VE: 5)")
    min_lr: float = option(1e-6, "learning rate at the end (ALBEF's SNLI-VE: 1e-6)")
    max_text_tokens: int = option(64, "cut hypotheses to N tokens (ALBEF's code: no limit)", least=2)
    max_words: int = option(30, "cut hypotheses to N words first (ALBEF's code: 30)", least=1, rare=True)
    out: str = option("entailment", "name of the checkpoint to write")


@dataclass(frozen=True)
class FinetuneClassificationOptions(TaskOptions):
    """Finetune a vision tower to classify pictures. A linear head on [CLS]; every weight is trained."""

    learning_rate: float = option(3e-5, "peak (none is published for classes)", above=0)
    epochs: float = option(10.0, "passes over the pictures")
    max_text_tokens: int = option(2, "no text is read", told=True, least=2, rare=True)
    max_words: int = option(1, "no text is read", told=True, least=1, rare=True)
    out: str = option("classification", "name of the checkpoint to write")


FINETUNE_VQA = StageCommand(
    ("finetune", "vqa"),
    FinetuneVqaOptions,
    ("capfilt.stages.task_training:FinetuneVqa",),
    (
        "capfilt finetune vqa --init pretrained --examples vqav2 --images coco",
        "capfilt finetune vqa --closed --examples vqav2 --images coco --out vqa-closed",
        "capfilt finetune vqa --examples vqav2 --examples vg --answer-weight vg=0.2 --images coco --images vg",
    ),
    instead=("closed", "capfilt.stages.task_training:FinetuneClosedVqa"),
)

FINETUNE_NLVR = StageCommand(
    ("finetune", "nlvr"),
    FinetuneNlvrOptions,
    ("capfilt.stages.task_training:FinetuneNlvr",),
    (
        "capfilt finetune nlvr --init pretrained --examples nlvr2 --images nlvr2",
        "capfilt finetune nlvr --single --init pretrained --examples nlvr --images nlvr",
    ),
    instead=("single", "capfilt.stages.task_training:FinetuneSingleNlvr"),
)

FINETUNE_ENTAILMENT = StageCommand(
    ("finetune", "entailment"),
    FinetuneEntailmentOptions,
    ("capfilt.stages.task_training:FinetuneEntailment",),
    ("capfilt finetune entailment --init pretrained --examples snli-ve --images flickr30k",),
)

FINETUNE_CLASSIFICATION = StageCommand(
    ("finetune", "classification"),
    FinetuneClassificationOptions,
    ("capfilt.stages.task_training:FinetuneClassification",),
    ("capfilt finetune classification --init pretrained --examples cifar10 --images cifar10",),
)
