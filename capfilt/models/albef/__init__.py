"""ALBEF (arXiv 2107.07651): its record."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.data.rows import EXAMPLE_ROWS, PAIR_ROWS
from capfilt.models.common.options import MomentumOptions, TowerOptions
from capfilt.models.family import ANSWERS, CLASSES, PAIRS, RETRIEVAL, Family, Kind
from capfilt.options import option

_CODE, _TASKS = "capfilt.models.albef.model", "capfilt.models.albef.tasks"


@dataclass(frozen=True)
class Options(TowerOptions, MomentumOptions):
    """An ALBEF's own options, with its published defaults (section 4)."""

    learning_rate: float = option(1e-4, "peak (ALBEF: 1e-4)", above=0)
    min_lr: float = option(1e-5, "learning rate at the end (ALBEF: 1e-5)")
    weight_decay: float = option(0.02, "weight decay of AdamW (ALBEF: 0.02)")
    epochs: float = option(30.0, "passes over the texts (ALBEF: 30)")
    # 25 in the released code, and the [SEP] that an ALBEF does not read.
    max_text_tokens: int = option(26, "cut texts to N tokens (ALBEF's code: 25, without [SEP])", least=2)
    queue_size: int = option(65536, "momentum features kept as candidates (ALBEF: 65536)")
    alpha_ramp_epochs: float = option(1.0, "epochs over which alpha grows (ALBEF: 1)", rare=True)
    mask_share: float = option(
        0.15, "share of tokens to hide (ALBEF: 0.15)", later=True, above=0, below=1, rare=True
    )


FAMILY = Family(
    "albef",
    _CODE,
    (
        Kind(
            "albef",
            f"{_CODE}:AlbefConfig",
            f"{_CODE}:Albef",
            "ALBEF",
            "embeds and matches pictures and texts",
            (PAIR_ROWS,),
            "albef",
            learns={RETRIEVAL: f"{_CODE}:retrieval"},
            starts={
                ANSWERS: f"{_TASKS}:vqa_from_albef",
                CLASSES: f"{_TASKS}:classifier_from_albef",
                PAIRS: f"{_TASKS}:nlvr_from_albef",
            },
        ),
        Kind(
            "albef_vqa",
            f"{_TASKS}:AlbefVqaConfig",
            f"{_TASKS}:AlbefVqa",
            "ALBEF for questions",
            "answers questions",
            (EXAMPLE_ROWS,),
            "albef-questions",
            forms=(ANSWERS,),
        ),
        Kind(
            "albef_nlvr",
            f"{_TASKS}:AlbefNlvrConfig",
            f"{_TASKS}:AlbefNlvr",
            "ALBEF for statements",
            "judges statements about pictures",
            (EXAMPLE_ROWS,),
            "albef",
            starts={PAIRS: f"{_TASKS}:nlvr_from_albef"},
            forms=(PAIRS,),
        ),
        Kind(
            "albef_classifier",
            f"{_TASKS}:AlbefClassifierConfig",
            f"{_TASKS}:AlbefClassifier",
            "ALBEF with a classifier",
            "classifies pictures with texts",
            (EXAMPLE_ROWS,),
            "albef",
            starts={CLASSES: f"{_TASKS}:classifier_from_albef"},
            forms=(CLASSES,),
        ),
    ),
    Options,
    ("tiny", "small", "trunk", "base"),
    ("itc", "itm", "mlm", "itm_balanced_accuracy"),
    3,  # texts are cleaned by ALBEF's rule
    layouts="capfilt.models.albef.layouts:LAYOUTS",
    heeds=("weights", "negatives"),
)
