"""Options that families share: of vision and text towers, of momentum towers and their queue. On the standard library alone."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.options import MODEL, Checked, option


@dataclass(frozen=True)
class VisionStart(Checked):
    """A vision side that may start from published weights."""

    panel = MODEL

    vision_init: str = option(
        "",
        "transformers ViT or DeiT directory to start the vision tower from",
        kind="path",
        panel=MODEL,
        rare=True,
    )


@dataclass(frozen=True)
class TowerOptions(VisionStart):
    """A vision tower and a BERT."""

    stem: str = option(
        "",
        "first layers; patch is as published and can be exported; default: the preset's",
        choices=("", "patch", "conv"),
        later=True,
        rare=True,
    )
    text_init: str = option(
        "",
        "transformers BERT directory to start the text side from; needs its own --vocab",
        kind="path",
        panel=MODEL,
        rare=True,
    )


@dataclass(frozen=True)
class MomentumOptions(Checked):
    """ITC and ITM with momentum towers and a queue (ALBEF, arXiv 2107.07651, section 3; BLIP, section 3.2)."""

    panel = MODEL

    queue_size: int = option(57600, "momentum features kept as candidates (BLIP's code: 57600)")
    momentum: float = option(
        0.995, "momentum of the momentum towers (BLIP's code: 0.995); 0: no towers", below=1
    )
    momentum_batch_size: int = option(
        0,
        "batch that `momentum` is meant for; other batches scale it (BLIP: 2880); 0: no scaling",
        later=True,
        rare=True,
    )
    alpha: float = option(0.4, "weight of the momentum towers' targets (BLIP's code: 0.4)", most=1, rare=True)
    alpha_ramp_epochs: float = option(2.0, "epochs over which alpha grows (BLIP's code: 2)", rare=True)
    hardness_ramp_steps: int = option(
        0, "steps over which ITM's negatives go from uniform to hard (BLIP: 0)", rare=True
    )
    multi_positive: bool = option(
        True,
        "texts and pictures that occur twice count as matches (BLIP's pretraining: off)",
        later=True,
        rare=True,
    )
    global_negatives: bool = option(
        True,
        "compare the batch of all ranks; off: each rank's own texts and the queue (BLIP's code)",
        later=True,
        rare=True,
    )
