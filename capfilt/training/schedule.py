"""Learning rates by step: a warmed-up cosine or line, and the two schedules by epoch of the released BLIP.

Not here: what a rate is applied to (`optim.py`), other ramps (`capfilt.models.objectives`).
"""

from __future__ import annotations

import math

BY_STEP = ("cosine", "linear")
SCHEDULES = (*BY_STEP, "epoch-cosine", "epoch-decay")


def learning_rate(
    step: int, steps: int, peak: float, min_lr: float, warmup_steps: int, shape: str = "cosine"
) -> float:
    """The rate of `step` (counted from 0) of `steps`: linear warm-up to `peak`, then half a cosine towards `min_lr`, or with
    `shape` "linear" a straight line (BERT; ViLT, arXiv 2102.03334, sec. 4.2).

    Warm-up takes at most half of the steps, so that a short run reaches its peak. No step has rate 0: step 0 has
    peak / (warm-up + 1), and `min_lr` itself would be the rate of step number `steps`. The released BLIP decays per
    epoch (see below); per step is smoother, and means the same on any corpus.
    """
    warmup = min(warmup_steps, steps // 2)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    progress = min(1.0, progress)
    left = 1.0 - progress if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_lr + (peak - min_lr) * left


def epoch_cosine(epoch: int, epochs: int, peak: float, min_lr: float) -> float:
    """The rate of all steps of `epoch` (counted from 0) of `epochs`: half a cosine, without warm-up.

    What the released BLIP finetunes with: its first epoch has the peak, its last one is still above `min_lr`.
    """
    return min_lr + (peak - min_lr) * 0.5 * (1.0 + math.cos(math.pi * epoch / max(1, epochs)))


def epoch_decay(
    step: int, epoch: int, peak: float, min_lr: float, warmup_steps: int, warmup_lr: float, decay_rate: float
) -> float:
    """What the released BLIP pretrains with: epoch 0 rises linearly from `warmup_lr` over `warmup_steps` and stays at
    the peak; every later epoch has peak * decay_rate ** epoch, and never less than `min_lr`.
    """
    if epoch == 0:
        return min(peak, warmup_lr + (peak - warmup_lr) * step / max(1, warmup_steps))
    return max(min_lr, peak * decay_rate**epoch)
