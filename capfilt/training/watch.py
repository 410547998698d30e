"""What a run is warned about while there is time: losses that stay where nothing is learned, embeddings that collapse.

Fed with the figures of each log line, which are means over its steps, so that one odd batch neither starts nor ends a
stretch. Not here: steps whose loss is not finite, which the loop skips and ends a run over (`loop.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from capfilt.models.common.objectives import COLLAPSED_ITM

STUCK_WITHIN = 0.01
COLLAPSED_COSINE = 0.99
PRIORS = (COLLAPSED_ITM, math.log(2))
"""ITM losses of heads that learned nothing: with one match in three pairs (BLIP), and in two (ViLT)."""


@dataclass
class Watched:
    """How far each figure's stretch has come, in steps, and which were told. JSON-able: part of a run's state."""

    stretches: dict[str, int] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Watch:
    """A figure, when it is bad, and what to say after so many steps of it."""

    figure: str
    bad: Callable[[float], bool]
    steps: int
    advice: str

    def line(self, figures: Mapping[str, float], steps: int, state: Watched) -> str | None:
        """The warning, where this log line over `steps` steps completes the stretch; each is given once per run."""
        value = figures.get(self.figure)
        if value is None:  # nothing to go by: a module without it, or a line of skipped steps alone
            return None
        length = state.stretches.get(self.figure, 0) + steps if self.bad(value) else 0
        state.stretches[self.figure] = length
        if self.steps <= 0 or length < self.steps or self.figure in state.told:
            return None
        state.told.append(self.figure)
        return f"{self.figure} has been {value:.4f} for {length} steps: {self.advice}"


def watches(stuck_steps: int, collapse_steps: int) -> tuple[Watch, ...]:
    """The watches of a BLIP training; 0 steps switch one off. Figures a module does not report are never bad.

    ITM at its class prior (`PRIORS`) is what people report of BLIP on small corpora. Embeddings whose mean pairwise
    cosine is 1 are one point: ITC then sits at the logarithm of its candidates. Fresh models begin near that, so the
    stretch must be long.
    """
    collapse = "all {} nearly point one way; lower learning_rate, lengthen the warm-up, and look whether {} differ at all"
    return (
        Watch(
            "itm",
            lambda loss: min(abs(loss - prior) for prior in PRIORS) < STUCK_WITHIN,
            stuck_steps,
            f"the loss of a head that knows only its prior ({PRIORS[0]:.4f} or {PRIORS[1]:.4f}); try a lower learning_rate, a "
            "longer warm-up, a larger batch, hardness_ramp_steps, cleaner pairs, or a text side started from a language model",
        ),
        Watch(
            "image_cosine", _collapsed, collapse_steps, collapse.format("image embeddings", "the pictures")
        ),
        Watch("text_cosine", _collapsed, collapse_steps, collapse.format("text embeddings", "the texts")),
        Watch(
            "queue_cosine",
            _collapsed,
            collapse_steps,
            "the queue's embeddings nearly point one way, so it adds no negatives; lower learning_rate or momentum, or "
            "train without a queue until the towers tell pictures apart",
        ),
    )


def _collapsed(cosine: float) -> bool:
    return cosine > COLLAPSED_COSINE
