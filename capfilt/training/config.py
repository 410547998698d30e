"""What a training run is told and what it gives back. The loop itself is `loop.py`.

Light enough to be read first: every number that decides the weights is here, with where its default comes from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from capfilt.data.loader import Batch
from capfilt.errors import UserError
from capfilt.training import schedule

PRECISIONS = ("auto", "fp32", "bf16")

Batches = Iterable[Batch] | Callable[[int], Iterable[Batch]]
OnStep = Callable[[int, Mapping[str, float]], bool | None]
"""Called after every step with the number of steps done and that step's figures (losses, "lr", "grad_norm", ...); True
asks the run to save and stop, as a signal does."""
OnBest = Callable[[int, float], None]
"""Called with the number of steps done and the mean loss of the last log line, where that is the lowest so far; the
module then holds the weights to keep, the averaged ones where there is an average."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Two runs with the same config, module and batches on the same CPU give the same weights."""

    steps: int
    batch_size: int = 64  # for the record and the schedules by epoch; the batches decide
    accumulate: int = 1  # micro-batches that each batch is split into; one update after the last
    micro_batch: int = 0  # their texts, where `accumulate` follows from that and the ranks; for the record
    learning_rate: float = 3e-4  # BLIP, arXiv 2201.12086, sec. 4.1: ViT-B
    min_lr: float = 1e-6  # BLIP, released pretraining configuration
    warmup_steps: int = 3000  # BLIP, released pretraining configuration; at most half of `steps` of a cosine
    schedule: str = "cosine"  # by step, as "linear"; "epoch-cosine", "epoch-decay": the released BLIP's finetuning, pretraining
    warmup_lr: float = 1e-6  # where epoch-decay's warm-up starts (BLIP, released pretraining configuration)
    decay_rate: float = 0.9  # epoch-decay's factor per epoch (BLIP, released code; its paper says 0.85)
    epoch_texts: int = 0  # texts in an epoch, for the schedules by epoch
    weight_decay: float = 0.05  # BLIP, sec. 4.1
    decay: str = (
        "matrices"  # "all" decays biases, LayerNorms and the temperature too, as the released BLIP does
    )
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's own, which the released BLIP uses
    head_rate: float = 1.0  # factor on the learning rate of a task's head (ViLT, released code, for VQA: 10)
    clip_norm: float = 1.0  # 0 for none, as the released BLIP; clipping is the cure users found for stuck ITM
    ema: float = 0.0  # decay of averaged weights; 0 for none, as the released BLIP
    seed: int = 0  # of dropout, augmentation and hard negatives
    alpha: float = 0.4  # weight of the momentum's soft targets: ALBEF, arXiv 2107.07651, sec. 4
    alpha_ramp_steps: int = 0  # BLIP, released code: two epochs in pretraining, one in finetuning
    hardness_ramp_steps: int = (
        0  # ITM's negatives from uniform to the published draw; 0: published from the start
    )
    precision: str = (
        "auto"  # bf16 autocast on GPUs that have it, fp32 elsewhere: on many CPUs bf16 is emulated
    )
    log_every: int = 50  # steps per log line; its figures are means over those steps
    save_every: int = 0  # steps between saved states; 0: only when interrupted
    keep_states: int = 1  # so many of the newest states are kept
    stuck_steps: int = 2000  # warn when ITM has been at its class prior for so long; 0: never
    collapse_steps: int = 500  # warn when all embeddings of batches or queue have been one point for so long

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "accumulate", "keep_states"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: give 1 or more")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision {self.precision!r}: use one of {', '.join(PRECISIONS)}")
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and not 0.0 <= value < math.inf:
                raise UserError(f"{each.name} {value}: give a finite number, 0 or more")
        if not self.learning_rate:
            raise UserError("learning_rate 0: give a number above 0")
        if not 0.0 <= self.ema < 1.0:
            raise UserError(f"ema {self.ema}: give a number in [0, 1), 0 for no average")
        if self.schedule not in schedule.SCHEDULES:
            raise UserError(f"schedule {self.schedule!r}: use one of {', '.join(schedule.SCHEDULES)}")
        if self.schedule not in schedule.BY_STEP and self.epoch_texts < 1:
            raise UserError(f"schedule {self.schedule}: epoch_texts must say how many texts an epoch has")

    def identity(self) -> dict[str, Any]:
        """What decides the weights, JSON-able: a saved state continues only under an equal identity."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        for name in ("log_every", "save_every", "keep_states", "stuck_steps", "collapse_steps"):
            del values[name]
        if self.micro_batch:
            # With other ranks it is another number, and the same run.
            del values["accumulate"]
        return {**values, "betas": list(self.betas)}

    def rate(self, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
        if self.schedule in schedule.BY_STEP:
            return schedule.learning_rate(
                step, self.steps, self.learning_rate, self.min_lr, self.warmup_steps, self.schedule
            )
        # As the loader counts: an epoch begins with the batch whose first text is its first.
        epoch = step * self.batch_size // self.epoch_texts
        if self.schedule == "epoch-cosine":
            # That of the last step: the last batch of a run may reach a few texts into an epoch that it has not.
            epochs = (self.steps - 1) * self.batch_size // self.epoch_texts + 1
            return schedule.epoch_cosine(epoch, epochs, self.learning_rate, self.min_lr)
        return schedule.epoch_decay(
            step, epoch, self.learning_rate, self.min_lr, self.warmup_steps, self.warmup_lr, self.decay_rate
        )


@dataclass(frozen=True)
class TrainResult:
    """What a run did.

    Attributes:
        steps: optimiser steps, skipped ones included.
        seconds: wall-clock seconds of training, those before an interruption included.
        exposures: int64 [examples], how often each corpus example was trained on (skipped steps do not count).
        losses: figures of the last log line.
        skipped_steps: steps left out because of a non-finite loss or gradient.
        warnings: what the run warned about, one line each.
        average: fp32 averaged weights and running statistics by name, empty without `ema`; the module holds the live ones
            (`capfilt.training.average.swapped` exchanges them).
    """

    steps: int
    seconds: float
    exposures: npt.NDArray[np.int64]
    losses: Mapping[str, float]
    skipped_steps: int
    warnings: tuple[str, ...] = ()
    average: Mapping[str, Tensor] = field(default_factory=dict)
