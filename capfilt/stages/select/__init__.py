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

    The rule each judges every text alone (BLIP). With fallback, a picture that keeps no found text gets its best synthetic
    text (Nguyen et al. 2023). With best, found and synthetic texts of a picture are ranked together, and the first --best are
    kept (BLIP-2, which has no threshold). Every rule keeps only texts at their threshold.
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
    rule: str = option(
        "each",
        "keeps each text at its threshold, synthetic ones as fallback, or a picture's best",
        choices=("each", "fallback", "best"),
        later=True,
    )
    best: int = option(
        1, "texts a picture keeps at most: of all (BLIP-2: 2), with fallback synthetic", least=1, later=True
    )
    synthetic_threshold: float = option(
        0.0, "score from which a synthetic text may be kept; 0: as other texts", least=-math.inf, later=True
    )
    distinct: bool = option(
        False, "drop degenerate and repeated captions; fallback and best always do", later=True
    )
    caption_share: float = option(
        0.0, "drop a caption that more than this share of pictures has; 0: no bound", most=1, later=True
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
        "capfilt select --images cc12m --captions captioner --rule fallback --keep-fraction 0.3 --synthetic-threshold 0.7",
        "capfilt select --images cc12m --captions captioner --rule best --best 2 --by itc_score --threshold -1",
    ),
    without="pairs",
)
