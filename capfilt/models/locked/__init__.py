"""A CLIP with locked towers: small heads on frozen encoders of pictures and texts (LiT, arXiv 2111.07991): its record."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.data.rows import PAIR_ROWS
from capfilt.errors import UserError
from capfilt.models.family import Family, Kind
from capfilt.options import AUGMENTATION, MACHINE, MODEL, OPTIMISER, SCHEDULE, Checked, option

_CODE, _OVER = "capfilt.models.locked.model", "capfilt.models.locked.over"


@dataclass(frozen=True)
class Options(Checked):
    """Its own options. The defaults are those of benchmarks/bootstrapping.py on photographs: seconds on a processor."""

    panel = MODEL
    without = frozenset({"patch_size"})

    learning_rate: float = option(1e-3, "peak", above=0, panel=OPTIMISER)
    min_lr: float = option(0.0, "learning rate at the end", panel=OPTIMISER)
    weight_decay: float = option(0.1, "weight decay of AdamW", panel=OPTIMISER)
    beta2: float = option(0.98, "second beta of AdamW", later=True, below=1, rare=True, panel=OPTIMISER)
    batch_size: int = option(256, "texts per step", least=1, panel=SCHEDULE)
    epochs: float = option(10.0, "passes over the texts", panel=SCHEDULE)
    warmup_steps: int = option(20, "steps of linear warm-up", panel=SCHEDULE)
    max_text_tokens: int = option(64, "cut texts to N tokens", least=2)
    encoders: str = option(
        "", "checkpoint of a CLIP, which takes the place of both encoders", kind="path", later=True
    )
    encoder_lr: float = option(
        0.0, "peak of pretrained encoders; 0: frozen; else needs --no-cache-features", least=0, later=True
    )
    cache_features: bool = option(
        True, "compute the frozen encoder's features once", rare=True, panel=MACHINE
    )
    augment: bool = option(False, "random resized crops; needs --no-cache-features", panel=AUGMENTATION)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoders and getattr(self, "init", ""):
            raise UserError(
                f"--encoders {self.encoders}: a checkpoint (--init) has its own; give one of them"
            )
        if self.encoder_lr and self.cache_features:
            raise UserError(
                f"--cache-features: with --encoder-lr {self.encoder_lr:g} pictures have other features after every step; "
                "add --no-cache-features"
            )


FAMILY = Family(
    "locked",
    _CODE,
    (
        Kind(
            "locked",
            f"{_CODE}:LockedConfig",
            f"{_CODE}:Locked",
            "locked-tower CLIP",
            "embeds pictures and texts",
            (PAIR_ROWS,),
            "as-found",
            parts={"text": ("text_encoder",)},
        ),
        Kind(
            "locked_over",
            f"{_OVER}:OverConfig",
            f"{_OVER}:Over",
            "locked-tower CLIP over a CLIP",
            "embeds pictures and texts",
            (PAIR_ROWS,),
            "clip",
            "byte-pair",
            parts={"vision": ("visual_encoder",), "text": ("text_encoder",)},
        ),
    ),
    Options,
    ("lite2-minilm", "lite0-minilm", "lite2-scratch", "tiny"),
    ("contrast", "accuracy", "scale"),
)
