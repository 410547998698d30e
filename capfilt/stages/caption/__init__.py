"""`caption`: its options and its record; the stages are stage.py and, with --filter, and_score.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

from capfilt.options import INPUTS, REQUIRED, TEXTS, option
from capfilt.stages.command import StageCommand
from capfilt.stages.engine_options import EngineOptions


@dataclass(frozen=True)
class CaptionOptions(EngineOptions):
    """Step 2: write synthetic texts for every image of a part."""

    panel = TEXTS

    images: str = option(REQUIRED, "images part to caption", kind="images")
    captioner: str = option(
        "captioner", "checkpoint of the captioner, or NAME:ARGUMENT of a plug-in", kind="model"
    )
    captioner_option: tuple[str, ...] = option(
        (), "KEY=VALUE, an option of the plug-in; repeatable", later=True, panel=INPUTS
    )
    filter: str = option(
        "", "also score in the same pass, with a filter of the same vision tower", kind="model"
    )
    out: str = option("", "name of the captions part to write; default: the captioner's")
    method: str = option("nucleus", "how to decode (BLIP: nucleus)", choices=("nucleus", "beam", "greedy"))
    samples: int = option(1, "texts per image (BLIP: 1)", least=1)
    prompt: str = option("a picture of ", "put before the text, not part of it (BLIP's caption prompt)")
    top_p: float = option(0.9, "nucleus: share of the probability to draw from (BLIP: 0.9)", above=0, most=1)
    top_k: int = option(
        0, "nucleus: draw from at most N tokens; 0: no limit (BLIP's code: 50)", later=True, rare=True
    )
    temperature: float = option(
        1.0, "nucleus: above 1 flattens the probabilities, below 1 sharpens", later=True, above=0, rare=True
    )
    num_beams: int = option(3, "beam: width (BLIP: 3)", least=1)
    length_penalty: float = option(
        1.0, "beam: log probability / length**N; higher: longer texts", later=True, least=-math.inf, rare=True
    )
    beam_rule: str = option(
        "transformers",
        "beam: released counts the prompt, not [SEP], and stops as BLIP's code does",
        later=True,
        choices=("transformers", "released"),
        rare=True,
    )
    # BLIP's 20 and 5 count its 4 prompt slots; these do not.
    max_new_tokens: int = option(20, "longest text in tokens, with [SEP], without the prompt", least=1)
    min_new_tokens: int = option(1, "shortest text in tokens, without [SEP] and prompt")
    repetition_penalty: float = option(
        1.0, "above 1 discourages repeated tokens (BLIP's sampling: 1.1)", above=0, rare=True
    )
    seed: int = option(0, "seed of sampling; each text has its own stream")


COMMAND = StageCommand(
    ("caption",),
    CaptionOptions,
    ("capfilt.stages.caption.stage:CaptionStage",),
    (
        "capfilt caption --images cc12m --captioner captioner",
        "capfilt caption --images cc12m --method beam --num-beams 3 --out captioner-beam",
        "capfilt caption --images cc12m --captioner my-vlm:./checkpoint --captioner-option style=short",
        "capfilt caption --images cc12m --captioner captioner --filter filter",
    ),
    instead=("filter", "capfilt.stages.caption.and_score:CaptionAndScore"),
)
