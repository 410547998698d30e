"""BLIP (arXiv 2201.12086): its record."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.data.rows import EXAMPLE_ROWS, PAIR_ROWS
from capfilt.models.common.options import MomentumOptions, TowerOptions
from capfilt.models.family import ANSWERS, CAPTIONING, CLASSES, PAIRS, RETRIEVAL, Family, Kind
from capfilt.options import TEXTS, option

_CODE, _TASKS = "capfilt.models.blip.model", "capfilt.models.blip.tasks"


@dataclass(frozen=True)
class Options(TowerOptions, MomentumOptions):
    """A BLIP's own options in pretraining."""

    label_smoothing: float = option(
        0.1, "label smoothing of the texts (BLIP's code: 0.1)", most=0.99, rare=True
    )
    # The captioner's own mistakes would be taught as language: on Flickr8k CIDEr fell with them.
    lm_synthetic: bool = option(
        False, "LM learns synthetic texts too, as BLIP's does; ITC and ITM always do", later=True, panel=TEXTS
    )


FAMILY = Family(
    "blip",
    _CODE,
    (
        Kind(
            "blip",
            f"{_CODE}:BlipConfig",
            f"{_CODE}:Blip",
            "BLIP",
            "captions and scores",
            (PAIR_ROWS,),
            "blip",
            learns={CAPTIONING: f"{_CODE}:captioning", RETRIEVAL: f"{_CODE}:retrieval"},
            starts={
                ANSWERS: f"{_TASKS}:vqa_from_blip",
                CLASSES: f"{_TASKS}:classifier_from_blip",
                PAIRS: f"{_TASKS}:nlvr_from_blip",
            },
        ),
        Kind(
            "blip_vqa",
            "capfilt.models.common.answering:VqaConfig",
            f"{_TASKS}:BlipVqa",
            "BLIP for questions",
            "answers questions",
            (EXAMPLE_ROWS,),
            "blip-questions",
            forms=(ANSWERS,),
        ),
        Kind(
            "blip_nlvr",
            f"{_TASKS}:NlvrConfig",
            f"{_TASKS}:BlipNlvr",
            "BLIP for statements",
            "judges statements about pictures",
            (EXAMPLE_ROWS,),
            "blip",
            forms=(PAIRS,),
        ),
        Kind(
            "blip_classifier",
            "capfilt.models.common.classifier:ClassifierConfig",
            f"{_TASKS}:BlipClassifier",
            "BLIP with a classifier",
            "classifies pictures with texts",
            (EXAMPLE_ROWS,),
            "blip",
            starts={CLASSES: f"{_TASKS}:classifier_from_blip"},
            forms=(CLASSES,),
        ),
    ),
    Options,
    ("tiny", "small", "trunk", "base", "large"),
    ("itc", "itm", "lm", "itm_balanced_accuracy"),
    3,  # LM learns no synthetic text unless asked
    layouts="capfilt.models.blip.layouts:LAYOUTS",
    heeds=("weights", "negatives", "soft"),
)
