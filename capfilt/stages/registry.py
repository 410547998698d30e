"""Which stages there are."""

from __future__ import annotations

from capfilt.errors import UserError
from capfilt.models import FAMILIES, families
from capfilt.stages import (
    caption,
    download,
    duplicates,
    evaluate,
    examples,
    grade,
    ingest,
    score,
    select,
    subset,
    task_options,
    training_options,
)
from capfilt.stages.command import StageCommand

STAGES: tuple[StageCommand, ...] = (
    download.COMMAND,
    ingest.COMMAND,
    examples.COMMAND,
    duplicates.COMMAND,
    subset.COMMAND,
    training_options.PRETRAIN,
    training_options.FINETUNE_CAPTIONER,
    training_options.FINETUNE_FILTER,
    training_options.FINETUNE_TEXT_ASSIGNMENT,
    task_options.FINETUNE_VQA,
    task_options.FINETUNE_NLVR,
    task_options.FINETUNE_ENTAILMENT,
    task_options.FINETUNE_CLASSIFICATION,
    caption.COMMAND,
    score.COMMAND,
    select.COMMAND,
    *map(training_options.retrain, FAMILIES),
    evaluate.COMMAND,
    grade.COMMAND,
)


def stages() -> tuple[StageCommand, ...]:
    """All stages, those of model families of other packages last."""
    return (*STAGES, *map(training_options.retrain, families()[len(FAMILIES) :]))


def stage_command(name: str) -> StageCommand:
    """The stage called `name`, its words joined by `-`. Raises UserError naming the stages there are."""
    for command in stages():
        if command.name == name:
            return command
    raise UserError(
        f"no stage is called {name!r}; the stages are {', '.join(command.name for command in stages())}"
    )
