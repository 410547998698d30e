"""Which stages there are: capfilt's own, and those that installed packages add.

Light: nothing of a stage is imported before it runs, and nothing of another package before its stage is asked for.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from capfilt.errors import UserError
from capfilt.models import FAMILIES, families
from capfilt.stages import (
    calibrate,
    caption,
    download,
    duplicates,
    evaluate,
    examples,
    grade,
    ingest,
    prove,
    score,
    select,
    subset,
    task_options,
    training_options,
)
from capfilt.stages.command import StageCommand

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "capfilt.stages"
"""The group of entry points by which a package adds stages; each names a StageCommand."""

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
    calibrate.COMMAND,
    prove.COMMAND,
    select.COMMAND,
    *map(training_options.retrain, FAMILIES),
    evaluate.COMMAND,
    grade.COMMAND,
)


def stages() -> tuple[StageCommand, ...]:
    """All stages, those of model families of other packages last."""
    return (*STAGES, *map(training_options.retrain, families()[len(FAMILIES) :]))


def installed() -> dict[str, list[EntryPoint]]:
    """The entry points of the stages that other packages add, by name; capfilt's own names are not theirs to take."""
    # Not at the top: a command of capfilt's own needs no look at what is installed.
    from importlib.metadata import entry_points

    found: dict[str, list[EntryPoint]] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        if entry.name not in {command.name for command in STAGES}:
            found.setdefault(entry.name, []).append(entry)
    return found


def stage_command(name: str) -> StageCommand:
    """The stage called `name`, its words joined by `-`.

    Raises UserError naming the stages there are, and for a package's stage that cannot be had.
    """
    for command in stages():
        if command.name == name:
            return command
    others = installed()
    if name not in others:
        names = [*(command.name for command in stages()), *others]
        raise UserError(f"no stage is called {name!r}; the stages are {', '.join(names)}")
    values = {entry.value: entry for entry in others[name]}
    if len(values) > 1:
        raise UserError(f"stage {name!r}: declared twice, as {' and '.join(values)}; uninstall one package")
    ((value, entry),) = values.items()
    where = f"stage {name!r} ({value} of the package {entry.dist.name if entry.dist else '?'})"
    try:
        command = entry.load()
    except Exception as error:
        raise UserError(f"{where}: cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(command, StageCommand) or command.words != (name,):
        raise UserError(f"{where}: is no StageCommand of that one word")
    plain = [field.name for field in fields(command.options) if "help" not in field.metadata]
    if plain:
        raise UserError(f"{where}: its option {plain[0]!r} is not made by `capfilt.options.option`")
    return command
