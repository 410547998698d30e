"""Options that families share: of vision and text towers, of momentum towers and their queue. On the standard library alone."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.options import Checked, option


@dataclass(frozen=True)
class VisionStart(Checked):
    """A vision side that may start from published weights."""

    vision_init: str = option(
        "", "directory of a transformers ViT or DeiT to start the vision tower from", kind="path"
    )


@dataclass(frozen=True)
class TowerOptions(VisionStart):
    """A vision tower and a BERT."""

    stem: str = option(
        "",
        "patch (as published, needed to export the model) or conv; default: the preset's",
        choices=("", "patch", "conv"),
        later=True,
    )
    text_init: str = option(
        "",
        "directory of a transformers BERT to start the text side from; --vocab must be its own",
        kind="path",
    )


@dataclass(frozen=True)
class MomentumOptions(Checked):
    """ITC and ITM with momentum towers and a queue (ALBEF, arXiv 2107.07651, section 3; BLIP, section 3.2)."""

    queue_size: int = option(57600, "momentum features kept as candidates (BLIP's released code: 57600)")
    momentum: float = option(0.995, "of the momentum towers (BLIP's released code); 0 for none", below=1)
    momentum_batch_size: int = option(
        0,
        "the batch that `momentum` is meant for: with another it is scaled (BLIP, section 4.1: 2880); 0: as given",
        later=True,
    )
    alpha: float = option(0.4, "weight of the momentum towers' soft targets (BLIP's released code)", most=1)
    alpha_ramp_epochs: float = option(2.0, "alpha grows over this many epochs (BLIP's released code: 2)")
    hardness_ramp_steps: int = option(
        0, "ITM's negatives go from uniform to hard over this many steps (BLIP: hard from the start)"
    )
    multi_positive: bool = option(
        True,
        "candidates of the same image or with the same text count as matches (not in BLIP's released pretraining)",
        later=True,
    )
    global_negatives: bool = option(
        True,
        "with several ranks, ITC and ITM draw on the whole batch, as one process would; off: on each rank's own texts, "
        "and the queue (BLIP's released pretraining)",
        later=True,
    )
