"""ViLT (arXiv 2102.03334): its record."""

from __future__ import annotations

from capfilt.models.family import CLASSES, EXAMPLE_ROWS, PAIR_ROWS, PAIRS, Family, Kind

_CODE, _TASKS = "capfilt.models.vilt.model", "capfilt.models.vilt.tasks"
_STARTS = {CLASSES: f"{_TASKS}:classifier_from_vilt", PAIRS: f"{_TASKS}:pair_from_vilt"}

FAMILY = Family(
    "vilt",
    "ViLT",
    _CODE,
    (
        Kind(
            "vilt",
            f"{_CODE}:ViltConfig",
            f"{_CODE}:Vilt",
            "ViLT",
            "matches pictures with texts",
            PAIR_ROWS,
            "as-found",
            starts=_STARTS,
        ),
        Kind(
            "vilt_classifier",
            f"{_TASKS}:ViltClassifierConfig",
            f"{_TASKS}:ViltClassifier",
            "ViLT with a classifier",
            "classifies pictures with texts",
            EXAMPLE_ROWS,
            "as-found",
            starts=_STARTS,
            forms=(CLASSES, PAIRS),
        ),
    ),
)
