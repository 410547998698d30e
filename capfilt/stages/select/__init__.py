"""`select`: its options and its record; the stages are in stage.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

from capfilt.options import INPUTS, REQUIRED, ROWS, SOURCES, Checked, option
from capfilt.stages.command import StageCommand


@dataclass(frozen=True)
class SelectOptions(Checked):
    """Step 2: turn scores into verdicts and into the corpus. No model, no GPU.

    The condition of --require is one SQL expression on a text. It names text_id, image_id, source and text; columns of the
    image, such as width or license; scores, such as itc_score; and columns of signals, as PART.column, or column where one
    table alone has it.
    """

    panel = ROWS

    images: str = option(REQUIRED, "images part", kind="images")
    captions: tuple[str, ...] = option((), "captions part; repeatable", kind="captions")
    scores: str = option("filter", "scores part", kind="scores")
    signals: tuple[str, ...] = option((), "signals part for --require to name; repeatable", kind="signals")
    out: str = option("capfilt", "name of the verdicts part and of the pairs part to write")
    pairs: bool = option(True, "also write the pairs part, with pictures", panel=INPUTS)
    by: str = option("itm_score", "score to judge by; of a calibrated part match_probability, unless given")
    threshold: float = option(
        0.5, "keep texts that score at least this (BLIP's author: 0.5 of the softmax)", least=-math.inf
    )
    keep_fraction: float = option(
        0.0, "keep this share of all scored texts instead; 0: by --threshold", most=1
    )
    precision: float = option(
        0.0, "keep the most texts whose mean match_probability is at least this", most=1, later=True
    )
    weight: str = option("", "score that weighs a kept text in trainings, from 0 to 1", later=True)
    sources: tuple[str, ...] = option(
        ("web", "synthetic"), "texts that may be kept, by source; repeatable", choices=SOURCES
    )
    require: str = option(
        "", "drop a text for which this SQL is not true, such as duplicates.first", later=True
    )


COMMAND = StageCommand(
    ("select",),
    SelectOptions,
    ("capfilt.stages.select.stage:Select", "capfilt.stages.select.stage:WritePairs"),
    (
        "capfilt select --images cc12m --captions captioner --scores filter --threshold 0.5",
        "capfilt select --images cc12m --captions captioner --keep-fraction 0.3 --out top30 --no-pairs",
        "capfilt select --images cc12m --scores clip --by clip_score --threshold 0.28 --out clip28",
        "capfilt select --images cc12m --scores calibrated --precision 0.9 --weight match_probability",
        "capfilt select --images cc12m --signals duplicates --require 'first AND width >= 200' --out unique",
    ),
    without="pairs",
)
