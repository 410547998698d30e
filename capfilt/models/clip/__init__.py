"""CLIP (arXiv 2103.00020): its record."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.data.rows import PAIR_ROWS
from capfilt.models.family import Family, Kind
from capfilt.options import MODEL, Checked, option

_CODE = "capfilt.models.clip.model"


@dataclass(frozen=True)
class Options(Checked):
    """A CLIP's own options, with its published defaults (section 2.5, tables 18 and 20, of ViT-B/32)."""

    panel = MODEL

    learning_rate: float = option(5e-4, "peak (CLIP: 5e-4 for ViT-B/32)", above=0)
    min_lr: float = option(0.0, "learning rate at the end (CLIP: 0)")
    weight_decay: float = option(0.2, "weight decay of AdamW (CLIP: 0.2)")
    beta2: float = option(
        0.98, "second beta of AdamW (CLIP: 0.98 for ViTs, 0.999 for ResNets)", later=True, below=1, rare=True
    )
    epochs: float = option(32.0, "passes over the texts (CLIP: 32)")
    max_text_tokens: int = option(77, "cut texts to N tokens (CLIP's code: 77)", least=2)
    contrast: str = option(
        "softmax",
        "loss: softmax over the batch, or sigmoid of each pair (SigLIP)",
        later=True,
        choices=("softmax", "sigmoid"),
    )
    contrast_chunk: int = option(0, "rows of the logits at a time; 0: all", told=True, rare=True)


FAMILY = Family(
    "clip",
    _CODE,
    (
        Kind(
            "clip",
            f"{_CODE}:ClipConfig",
            f"{_CODE}:Clip",
            "CLIP",
            "embeds pictures and texts",
            (PAIR_ROWS,),
            "clip",
            "byte-pair",
        ),
    ),
    Options,
    ("tiny", "small", "trunk", "base", "large"),
    ("contrast", "accuracy", "scale"),
    # Since 2, texts are no longer cut to their first 30 words; since 3, a ResNet's running statistics follow what trains; since
    # 4, texts are repaired and the image side is initialised as released.
    4,
    layouts="capfilt.models.clip.layouts:LAYOUTS",
    heeds=("weights", "negatives", "soft"),
)
