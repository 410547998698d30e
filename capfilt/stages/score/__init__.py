"""`score`: its options and its record; the stage is stage.py."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.options import INPUTS, REQUIRED, TEXTS, option
from capfilt.stages.command import StageCommand
from capfilt.stages.engine_options import EngineOptions


@dataclass(frozen=True)
class ScoreOptions(EngineOptions):
    """Step 2: judge web and synthetic texts alike with the filter."""

    images: str = option(REQUIRED, "images part whose texts to score", kind="images")
    captions: tuple[str, ...] = option((), "captions part of the same images; repeatable", kind="captions")
    filter: str = option(
        "filter", "checkpoint of the filter, or NAME:ARGUMENT of a plug-in, such as clip:DIR", kind="model"
    )
    filter_option: tuple[str, ...] = option(
        (), "KEY=VALUE, an option of the plug-in; repeatable", later=True, panel=INPUTS
    )
    out: str = option("", "name of the scores part to write; default: the filter's")
    max_text_tokens: int = option(35, "cut texts to N tokens (BLIP's code: 35)", least=2, panel=TEXTS)


COMMAND = StageCommand(
    ("score",),
    ScoreOptions,
    ("capfilt.stages.score.stage:ScoreStage",),
    (
        "capfilt score --images cc12m --captions captioner --filter filter",
        "capfilt score --images cc12m --captions captioner --filter clip:./clip-vit-base-patch32",
    ),
)
