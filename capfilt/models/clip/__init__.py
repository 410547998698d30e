"""CLIP (arXiv 2103.00020): its record."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.models.family import PAIR_ROWS, Family, Kind
from capfilt.options import Checked, option

_CODE = "capfilt.models.clip.model"


@dataclass(frozen=True)
class Options(Checked):
    """A CLIP's own options, with its published defaults (section 2.5, tables 18 and 20, of ViT-B/32)."""

    learning_rate: float = option(5e-4, "peak (table 20: 5e-4 for ViT-B/32)", above=0)
    min_lr: float = option(0.0, "the schedule's end (section 2.5: a cosine)")
    weight_decay: float = option(0.2, "AdamW's (table 18)")
    beta2: float = option(
        0.98, "AdamW's second beta (table 18: 0.98 for ViTs, 0.999 for ResNets)", later=True, below=1
    )
    epochs: float = option(32.0, "passes over the texts, where `steps` is 0 (table 18: 32)")
    max_text_tokens: int = option(77, "texts are cut to this many tokens (code: 77)", least=2)
    contrast: str = option(
        "softmax",
        "softmax over the batch, or sigmoid of each pair (SigLIP)",
        choices=("softmax", "sigmoid"),
        later=True,
    )
    contrast_chunk: int = option(
        0, "rows of the batch's logits at a time, for large batches; 0 for all", told=True
    )


FAMILY = Family(
    "clip",
    "CLIP",
    _CODE,
    (
        Kind(
            "clip",
            f"{_CODE}:ClipConfig",
            f"{_CODE}:Clip",
            "CLIP",
            "embeds pictures and texts",
            PAIR_ROWS,
            "clip",
            "byte-pair",
        ),
    ),
    Options,
    ("contrast", "accuracy", "scale"),
    # Since 2, texts are no longer cut to their first 30 words; since 3, a ResNet's running statistics follow what trains; since
    # 4, texts are repaired and the image side is initialised as released.
    4,
)
