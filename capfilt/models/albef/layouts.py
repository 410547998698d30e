"""ALBEF's layout: the original repository's `.pth`, pretrained, or finetuned for retrieval, VQA, NLVR2 or SNLI-VE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from capfilt.models.albef.model import Albef, AlbefConfig, alone
from capfilt.models.albef.tasks import (
    AlbefClassifier,
    AlbefClassifierConfig,
    AlbefNlvr,
    AlbefNlvrConfig,
    AlbefVqa,
    AlbefVqaConfig,
    second_half,
)
from capfilt.models.common.layouts import original
from capfilt.models.common.layouts.contents import NoHome
from capfilt.models.common.layouts.engine import Found, Sizes
from capfilt.models.common.layouts.names import Rows
from capfilt.models.common.layouts.original import DECODER, ENCODER, HEADS, TOWER, bert, contrast, measured
from capfilt.tables.contracts import LABELS

PRETRAINED = f"{ENCODER}bert."
"""In pretraining the BERT is inside one with a language head."""


def _names(config: Any) -> Rows:
    head = "text_decoder.cls.predictions."
    if isinstance(config, AlbefConfig) and config.words:
        texts = bert(ENCODER, PRETRAINED, "mlm_head.", f"{ENCODER}cls.predictions.", types=True)
    else:
        texts = (*bert(ENCODER, ENCODER, types=True), *bert(DECODER, DECODER, head, head, types=True))
    return (*TOWER, *texts, *HEADS)


def _doubled(before: int, seeing: int) -> bool:
    """Whether these numbers of layers, without and with cross-attention, are those of a model of two pictures: with one the
    second half sees (ALBEF, code: 6 and 6, and 6 and 12).
    """
    return seeing > before + 1


def _from_tensors(
    path: Path, content: None, found: Mapping[str, Tensor] | None, settings: dict[str, Any]
) -> Found:
    tensors = Sizes(path, found or {})
    if tensors.any(PRETRAINED):
        return AlbefConfig, {**measured(tensors, settings, PRETRAINED), **contrast(tensors, settings)}
    layer = f"{ENCODER}encoder.layer."
    depth = tensors.count(layer)
    seeing = sum(tensors.any(f"{layer}{index}.crossattention.") for index in range(depth))
    before = depth - seeing
    if tensors.any(DECODER):
        return AlbefVqaConfig, measured(tensors, settings, ENCODER)
    if not tensors.any("cls_head."):
        return AlbefConfig, {
            **measured(tensors, settings, ENCODER),
            **contrast(tensors, settings),
            "words": False,
        }
    if _doubled(before, seeing):
        return AlbefNlvrConfig, measured(tensors, settings, ENCODER, before + (seeing + 1) // 2)
    classes = {"task": "entailment", "classes": list(LABELS["entailment"])}
    return AlbefClassifierConfig, {**measured(tensors, settings, ENCODER), **classes}


def _refuse(config: Any, tokenizer: Any) -> None:
    if isinstance(config, AlbefNlvrConfig):
        if config.classes != AlbefNlvrConfig().classes:
            raise NoHome(
                "an AlbefNlvr that has learned text assignment has no home in the original layout, whose class of it has "
                "other names: finetune it for statements first"
            )
        if not _doubled(alone(config.text), 2 * second_half(config.text).depth):
            raise NoHome(
                "an AlbefNlvr of so few layers would be read back as a classifier: keep it as capfilt saved it"
            )
    elif isinstance(config, AlbefClassifierConfig) and config.task != "entailment":
        raise NoHome(
            f"an AlbefClassifier for {config.task} has no home in the original layout: ALBEF released only that for "
            "entailment; keep it as capfilt saved it"
        )
    original.refuse(config, tokenizer)


ORIGINAL = original.layout(
    "ALBEF",
    {
        AlbefConfig: Albef, AlbefVqaConfig: AlbefVqa, AlbefNlvrConfig: AlbefNlvr, AlbefClassifierConfig: AlbefClassifier
    },
    _names, _from_tensors,
    refusals=_refuse, holds=original.is_albef,
)  # fmt: skip

LAYOUTS = (ORIGINAL,)
