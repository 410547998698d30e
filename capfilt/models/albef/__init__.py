"""ALBEF (arXiv 2107.07651): its record."""

from __future__ import annotations

from capfilt.models.family import ANSWERS, CLASSES, EXAMPLE_ROWS, PAIR_ROWS, PAIRS, Family, Kind

_CODE, _TASKS = "capfilt.models.albef.model", "capfilt.models.albef.tasks"

FAMILY = Family(
    "albef",
    "ALBEF",
    _CODE,
    (
        Kind(
            "albef",
            f"{_CODE}:AlbefConfig",
            f"{_CODE}:Albef",
            "ALBEF",
            "embeds and matches pictures and texts",
            PAIR_ROWS,
            "albef",
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
            EXAMPLE_ROWS,
            "albef-questions",
            forms=(ANSWERS,),
        ),
        Kind(
            "albef_nlvr",
            f"{_TASKS}:AlbefNlvrConfig",
            f"{_TASKS}:AlbefNlvr",
            "ALBEF for statements",
            "judges statements about pictures",
            EXAMPLE_ROWS,
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
            EXAMPLE_ROWS,
            "albef",
            starts={CLASSES: f"{_TASKS}:classifier_from_albef"},
            forms=(CLASSES,),
        ),
    ),
)
