"""Which classes of models there are: one table for checkpoints, finetuning and evaluation.

A model that is added gets a line in `KINDS`, and one in `STARTS` for each task that it can be finetuned for. Not here:
other projects' layouts (`interop`), what a model is evaluated through (`capfilt.tasks.adapters`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from capfilt.data import cleaning
from capfilt.data.bpe import BpeTokenizer
from capfilt.data.tokenizer import Tokenizer
from capfilt.models.albef import Albef, AlbefConfig
from capfilt.models.albef_tasks import (
    AlbefClassifier,
    AlbefClassifierConfig,
    AlbefNlvr,
    AlbefNlvrConfig,
    AlbefVqa,
    AlbefVqaConfig,
    classifier_from_albef,
    nlvr_from_albef,
    vqa_from_albef,
)
from capfilt.models.blip import Blip, BlipConfig
from capfilt.models.classifier import BlipClassifier, ClassifierConfig, classifier_from_blip
from capfilt.models.clip import Clip, ClipConfig
from capfilt.models.config import Shape
from capfilt.models.nlvr import BlipNlvr, NlvrConfig, nlvr_from_blip
from capfilt.models.vilt import Vilt, ViltConfig
from capfilt.models.vilt_classifier import (
    ViltClassifier,
    ViltClassifierConfig,
    classifier_from_vilt,
    pair_from_vilt,
)
from capfilt.models.vqa import BlipVqa, VqaConfig, vqa_from_blip

Answers = BlipVqa | AlbefVqa
"""What answers questions in words: `VqaTraining` trains it."""
Judges = BlipNlvr | BlipClassifier | ViltClassifier | AlbefNlvr | AlbefClassifier
"""What judges texts with pictures: `labels`, `pictures` (per text), and `judge(ids int64 [B, L], mask bool [B, L], images
[B, pictures, 3, S, S])`, fp32 logits [B, labels]. `ClassifierTraining` trains it."""
BlipModel = Blip | BlipVqa | BlipNlvr | BlipClassifier
AlbefModel = Albef | AlbefVqa | AlbefNlvr | AlbefClassifier
Model = BlipModel | Clip | Vilt | ViltClassifier | AlbefModel


PAIR_ROWS, EXAMPLE_ROWS = "pairs", "examples"
"""What a model's training reads: pictures with texts that are theirs, or a task's examples (questions with answers, texts or
pictures with classes). A stage's loader yields the one or the other."""


@dataclass(frozen=True)
class Kind:
    """A class of models.

    Attributes:
        name: `model_type` in a checkpoint's config.json.
        config, model: the classes.
        who: what it is called in messages.
        does: what it does, after its name.
        rows: what it learns from, PAIR_ROWS or EXAMPLE_ROWS.
        tokenizer: the class of its tokenizer.
        cleaning: how the released code cleans its texts, one of `cleaning.CLEANINGS`.
    """

    name: str
    config: type[Shape]
    model: type[Model]
    who: str
    does: str
    rows: str
    tokenizer: type[Tokenizer | BpeTokenizer] = Tokenizer
    cleaning: str = cleaning.BLIP

    @property
    def one(self) -> str:
        """One of them, for messages."""
        return f"{'an' if self.who[0] in 'AEIOU' else 'a'} {self.who}"

    @property
    def what(self) -> str:
        """What it does and is, for messages."""
        return f"{self.does} ({self.model.__name__})"


KINDS = (
    Kind("blip", BlipConfig, Blip, "BLIP", "captions and scores", PAIR_ROWS),
    Kind(
        "blip_vqa",
        VqaConfig,
        BlipVqa,
        "BLIP for questions",
        "answers questions",
        EXAMPLE_ROWS,
        cleaning=cleaning.BLIP_QUESTIONS,
    ),
    Kind(
        "blip_nlvr",
        NlvrConfig,
        BlipNlvr,
        "BLIP for statements",
        "judges statements about pictures",
        EXAMPLE_ROWS,
    ),
    Kind(
        "blip_classifier",
        ClassifierConfig,
        BlipClassifier,
        "BLIP with a classifier",
        "classifies pictures with texts",
        EXAMPLE_ROWS,
    ),
    Kind(
        "clip", ClipConfig, Clip, "CLIP", "embeds pictures and texts", PAIR_ROWS, BpeTokenizer, cleaning.CLIP
    ),
    Kind(
        "vilt", ViltConfig, Vilt, "ViLT", "matches pictures with texts", PAIR_ROWS, cleaning=cleaning.AS_FOUND
    ),
    Kind(
        "vilt_classifier",
        ViltClassifierConfig,
        ViltClassifier,
        "ViLT with a classifier",
        "classifies pictures with texts",
        EXAMPLE_ROWS,
        cleaning=cleaning.AS_FOUND,
    ),
    Kind(
        "albef",
        AlbefConfig,
        Albef,
        "ALBEF",
        "embeds and matches pictures and texts",
        PAIR_ROWS,
        cleaning=cleaning.ALBEF,
    ),
    Kind(
        "albef_vqa",
        AlbefVqaConfig,
        AlbefVqa,
        "ALBEF for questions",
        "answers questions",
        EXAMPLE_ROWS,
        cleaning=cleaning.ALBEF_QUESTIONS,
    ),
    Kind(
        "albef_nlvr",
        AlbefNlvrConfig,
        AlbefNlvr,
        "ALBEF for statements",
        "judges statements about pictures",
        EXAMPLE_ROWS,
        cleaning=cleaning.ALBEF,
    ),
    Kind(
        "albef_classifier",
        AlbefClassifierConfig,
        AlbefClassifier,
        "ALBEF with a classifier",
        "classifies pictures with texts",
        EXAMPLE_ROWS,
        cleaning=cleaning.ALBEF,
    ),
)


def named(name: str) -> Kind:
    """The kind with this `model_type`. Raises KeyError where there is none."""
    return {kind.name: kind for kind in KINDS}[name]


def of(model_or_config: object) -> Kind:
    """The kind of a model, or of a config. Raises KeyError for anything else."""
    for kind in KINDS:
        if type(model_or_config) in (kind.model, kind.config):
            return kind
    raise KeyError(type(model_or_config).__name__)


def of_class(model: type[Model]) -> Kind:
    """The kind of a class of models. Raises KeyError for anything else."""
    return {kind.model: kind for kind in KINDS}[model]


def empty(config: Shape) -> Model:
    """A model of the class that `config` is the configuration of."""
    build: Any = of(config).model
    model: Model = build(config)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """A vision tower's blocks, or those of a transformer for everything: what is run as a whole, once per pass, and so can
    have its weights gathered just then.
    """
    where: Any = model if hasattr(model, "blocks") else model.visual_encoder
    return list(where.blocks)


# ---------------------------------------------------------------------- finetuning

ANSWERS, CLASSES, PAIRS = "answers", "classes", "pairs"
"""The forms that a task takes: answers in words, classes of a text with one picture, statements about two pictures."""

Start = Callable[..., Any]
"""(pretrained model, seed=, drop_path=) -> the task's model; for CLASSES with task= and classes= beside them."""

STARTS: dict[str, dict[type[Model], Start]] = {
    ANSWERS: {Blip: vqa_from_blip, Albef: vqa_from_albef},
    CLASSES: {
        Blip: classifier_from_blip,
        BlipClassifier: classifier_from_blip,
        Vilt: classifier_from_vilt,
        ViltClassifier: classifier_from_vilt,
        Albef: classifier_from_albef,
        AlbefClassifier: classifier_from_albef,
    },
    PAIRS: {
        Blip: nlvr_from_blip,
        Vilt: pair_from_vilt,
        ViltClassifier: pair_from_vilt,
        Albef: nlvr_from_albef,
        AlbefNlvr: nlvr_from_albef,
    },
}
"""By the task's form and the class of what it starts from."""

FINETUNED: dict[str, tuple[type[Model], ...]] = {
    ANSWERS: (BlipVqa, AlbefVqa),
    CLASSES: (BlipClassifier, ViltClassifier, AlbefClassifier),
    PAIRS: (BlipNlvr, ViltClassifier, AlbefNlvr),
}
"""What a task of this form ends with, and can be gone on from."""
