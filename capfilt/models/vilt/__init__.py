"""ViLT (arXiv 2102.03334): its record."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.data.rows import EXAMPLE_ROWS, PAIR_ROWS
from capfilt.models.common.options import VisionStart
from capfilt.models.family import CLASSES, PAIRS, RETRIEVAL, Family, Kind
from capfilt.options import option

_CODE, _TASKS = "capfilt.models.vilt.model", "capfilt.models.vilt.tasks"
_PARTS = {"vision": ("visual_encoder",), "text": ("text_embeddings",)}
_STARTS = {CLASSES: f"{_TASKS}:classifier_from_vilt", PAIRS: f"{_TASKS}:pair_from_vilt"}


@dataclass(frozen=True)
class Options(VisionStart):
    """A ViLT's own options, with its published defaults (section 4.2 and code)."""

    learning_rate: float = option(1e-4, "peak (ViLT: 1e-4)", above=0)
    min_lr: float = option(0.0, "learning rate at the end (ViLT's code: 0)")
    schedule: str = option(
        "linear",
        "learning rate (ViLT: linear)",
        later=True,
        choices=("cosine", "linear", "epoch-cosine", "epoch-decay"),
    )
    weight_decay: float = option(0.01, "weight decay of AdamW (ViLT: 0.01)")
    beta2: float = option(0.98, "second beta of AdamW (ViLT's code: 0.98)", later=True, below=1, rare=True)
    max_text_tokens: int = option(40, "cut texts to N tokens (ViLT's code: 40)", least=2)
    mask_share: float = option(
        0.15, "share of words to hide (ViLT: 0.15)", later=True, above=0, below=1, rare=True
    )
    alignment: float = option(
        0.1, "weight of word-patch alignment; 0: none (ViLT's code: 0.1)", later=True, rare=True
    )
    # Of pictures of up to 384x640. Squares have 144 patches at 384 px, and more than 200 from 480 px.
    max_patches: int = option(200, "patches per picture and step (ViLT: 200); 0: all", later=True, rare=True)


FAMILY = Family(
    "vilt",
    _CODE,
    (
        Kind(
            "vilt",
            f"{_CODE}:ViltConfig",
            f"{_CODE}:Vilt",
            "ViLT",
            "matches pictures with texts",
            (PAIR_ROWS,),
            "as-found",
            starts=_STARTS,
            learns={RETRIEVAL: f"{_TASKS}:retrieval"},
            parts=_PARTS,
        ),
        Kind(
            "vilt_classifier",
            f"{_TASKS}:ViltClassifierConfig",
            f"{_TASKS}:ViltClassifier",
            "ViLT with a classifier",
            "classifies pictures with texts",
            (EXAMPLE_ROWS,),
            "as-found",
            starts=_STARTS,
            parts=_PARTS,
            forms=(CLASSES, PAIRS),
        ),
    ),
    Options,
    ("tiny", "small", "trunk", "base"),
    ("itm", "mlm", "wpa", "itm_balanced_accuracy"),
    3,  # texts are read as found, however many words they have
    layouts="capfilt.models.vilt.layouts:LAYOUTS",
    heeds=("weights",),
)
