"""Recipes: YAML files that name stages and their options. Parsing, validation, `--set`, and running one.

A recipe has no machine's paths in it: what differs between machines is an `input`, given by `--set NAME=VALUE` and
written `${NAME}` where it is used.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from capfilt.errors import MissingInput, UserError, naming
from capfilt.execution.run import Executor, SharedExecutor, Summary, executor, outlook, run_command
from capfilt.options import missing, offered
from capfilt.resources import find_recipe
from capfilt.stages.registry import stage_command
from capfilt.tables.publish import replace
from capfilt.tables.workspace import Workspace
from capfilt.training.interrupt import Interrupt

_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Input(BaseModel):
    """Something a recipe needs from outside: a folder of data, say."""

    model_config = ConfigDict(extra="forbid")
    help: str
    default: str | int | float | bool | None = None


class Step(BaseModel):
    """One stage of a recipe. `name` tells two steps of one stage apart; by default it is the stage's.

    Neighbours with the same word as `together` read nothing of each other's: where the executor can, they run at the
    same time, on equal shares of the machine.
    """

    model_config = ConfigDict(extra="forbid")
    stage: str
    name: str = ""
    together: str = ""
    options: dict[str, Any] = {}

    @property
    def label(self) -> str:
        return self.name or self.stage


class Recipe(BaseModel):
    """A recipe file."""

    model_config = ConfigDict(extra="forbid")
    version: Literal[1]
    description: str = ""
    inputs: dict[str, Input] = {}
    stages: list[Step]


MOST_BYTES, MOST_VALUES, MOST_DIGITS = 100_000, 10_000, 100
"""Of a recipe: of its text, of the values that its aliases stand for, of a number. Those that come with capfilt have a tenth
of each; a small file with more could keep the parser busy for years.
"""


def text_of(path: Path) -> str:
    """A recipe's text. UserError where it is no UTF-8, or larger than MOST_BYTES."""
    with naming(path), path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UserError(f"{path}: larger than {MOST_BYTES:,} bytes, which no recipe is")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from error


def read_yaml(text: str, where: str) -> Any:
    """The value that a YAML text stands for. UserError in one line with `where` for a text that is none, or says too much."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MOST_VALUES:
            raise UserError(f"{where}: its aliases stand for more than {MOST_VALUES:,} values; write less")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not readable as YAML ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise UserError(f"{where}: too deeply nested, or part of itself; write it flat") from error
    except (
        ValueError,
        TypeError,
        OverflowError,
        AttributeError,
    ) as error:  # PyYAML's own, of a date that is none
        raise UserError(f"{where}: holds a value that is none ({error})") from error


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for once each alias has a copy. ValueError for a number of many digits."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith((":int", ":float")) and len(node.value) > MOST_DIGITS:
            raise ValueError(f"a number of {len(node.value):,} characters")
        return 1
    if id(node) not in known:
        children = (
            [each for pair in node.value for each in pair]
            if isinstance(node, yaml.MappingNode)
            else node.value
        )
        known[id(node)] = 1 + sum(_values(each, known) for each in children)
    return known[id(node)]


def load_recipe(name_or_path: str) -> tuple[str, Recipe]:
    """The recipe's name and content. Raises UserError with one line that names the file and the key."""
    path = find_recipe(name_or_path)
    try:
        recipe = Recipe.model_validate(read_yaml(text_of(path), str(path)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(piece) for piece in first["loc"]) or "the file"
        raise UserError(f"{path}: {where}: {first['msg']}") from error
    labels = [step.label for step in recipe.stages]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise UserError(f"{path}: two steps are called {twice!r}; give one a `name`")
    return path.stem, recipe


def resolve(recipe: Recipe, settings: Sequence[str]) -> list[tuple[Step, Any]]:
    """Each step with its options as the stage's dataclass, inputs and `--set` filled in. Raises UserError."""
    values = {name: item.default for name, item in recipe.inputs.items()}
    overrides: dict[str, dict[str, Any]] = {}
    labels = [step.label for step in recipe.stages]
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write NAME=VALUE or STAGE.OPTION=VALUE")
        value = read_yaml(text, f"--set {key}") if text else ""
        label, dot, option = key.rpartition(".")
        if not dot:
            if key not in values:
                raise UserError(f"--set {key}: the recipe has no such input{_near(key, values)}")
            values[key] = value if not isinstance(value, list | dict) else text
        elif label not in labels:
            raise UserError(f"--set {key}: the recipe has no step {label!r}{_near(label, labels)}")
        else:
            overrides.setdefault(label, {})[option.replace("-", "_")] = value
    absent = [name for name, value in values.items() if value is None and _is_used(recipe, name)]
    if absent:
        raise UserError(f"the recipe needs --set {absent[0]}=VALUE: {recipe.inputs[absent[0]].help}")
    steps = []
    for step in recipe.stages:
        chosen = {**_fill(step.options, values), **overrides.get(step.label, {})}
        steps.append((step, _options(step, chosen)))
    return steps


def _is_used(recipe: Recipe, name: str) -> bool:
    return f"${{{name}}}" in json.dumps([step.options for step in recipe.stages], default=str)


def _near(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(names) or 'none'}"


def _fill(value: Any, values: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return {key: _fill(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, values) for item in value]
    if isinstance(value, str):
        whole = _REFERENCE.fullmatch(value)
        if whole and whole[1] in values:
            return values[whole[1]]  # a number stays a number
        for name in _REFERENCE.findall(value):
            if name not in values:
                raise UserError(
                    f"the recipe uses ${{{name}}}, which is not among its inputs{_near(name, values)}"
                )
        if sum(len(str(values[name])) for name in _REFERENCE.findall(value)) > MOST_BYTES:
            raise UserError(
                f"the recipe's inputs make a text of more than {MOST_BYTES:,} characters; write less"
            )
        return _REFERENCE.sub(lambda match: str(values[match[1]]), value)
    return value


def _options(step: Step, chosen: dict[str, Any]) -> Any:
    kind = stage_command(step.stage).options
    fields = {field.name: field for field in offered(kind)}
    for name in chosen:
        if name not in fields:
            raise UserError(
                f"step {step.label!r}: the stage {step.stage} has no option {name!r}{_near(name, fields)}"
            )
    for name, value in chosen.items():
        if any(
            "\0" in text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)
        ):
            raise UserError(f"step {step.label!r}: option {name!r} has a NUL, which no option may have")
    chosen = {
        name: (value,) if str(fields[name].type).startswith("tuple") and isinstance(value, str) else value
        for name, value in chosen.items()
    }
    try:
        options: Any = TypeAdapter(kind).validate_python(chosen)
    except UserError as error:
        raise UserError(f"step {step.label!r}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(piece) for piece in first["loc"])
        raise UserError(
            f"step {step.label!r}: option {where}: {first['msg']}, got {first['input']!r:.80}"
        ) from error
    # Made anew of what was given, so that they can tell.
    options = kind(**{name: getattr(options, name) for name in chosen})
    open_ = missing(options)
    if open_:
        raise UserError(f"step {step.label!r}: option {open_[0]!r} must be given")
    return options


def show(recipe: Recipe, settings: Sequence[str]) -> str:
    """The whole resolved recipe as YAML: every option of every step, defaults included.

    An input that was not given and has no default stands as its reference, `${NAME}`, and is an input of what is shown,
    which is a recipe itself. Raises UserError as `resolve`.
    """
    given = {setting.partition("=")[0] for setting in settings}
    open_inputs = {
        name: item for name, item in recipe.inputs.items() if item.default is None and name not in given
    }
    steps = []
    for step, options in resolve(recipe, [*(f"{name}=${{{name}}}" for name in open_inputs), *settings]):
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(options).items()
        }
        together = {"together": step.together} if step.together else {}
        steps.append({"stage": step.stage, "name": step.label, **together, "options": values})
    content: dict[str, Any] = {"version": recipe.version}
    if open_inputs:
        content["inputs"] = {name: {"help": item.help} for name, item in open_inputs.items()}
    return str(yaml.safe_dump({**content, "stages": steps}, sort_keys=False, allow_unicode=True))


def chosen_steps(
    steps: list[tuple[Step, Any]], only: Sequence[str] = (), start: str = ""
) -> list[tuple[Step, Any]]:
    """The steps that `--only` and `--from` leave. Raises UserError for a step that is not in the recipe."""
    labels = [step.label for step, _ in steps]
    for name in [*only, *([start] if start else [])]:
        if name not in labels:
            raise UserError(f"the recipe has no step {name!r}{_near(name, labels)}")
    if only:
        return [(step, options) for step, options in steps if step.label in only]
    return steps[labels.index(start) :] if start else steps


def run_recipe(
    name: str,
    steps: list[tuple[Step, Any]],
    workspace: Workspace,
    execution: str | Executor,
    *,
    quiet: bool = False,
) -> Iterator[tuple[Step, Summary]]:
    """Run the steps in order, yielding the account of each stage; `runs/recipes/<name>.json` keeps them all.

    What is wrong with a later step ends it before the first (UserError), as far as that can be known so early. Steps that
    run together yield in the order in which they end; where one fails, the others are stopped.
    """
    for step, options in steps:
        command = stage_command(step.stage)
        for kind in command.classes(options):
            with suppress(MissingInput):
                command.build(kind, options, workspace)
    record: dict[str, Any] = {}
    path: Path = workspace.path / "runs" / "recipes" / f"{name}.json"
    with executor(execution) if isinstance(execution, str) else nullcontext(execution) as work:
        for step, summary in _run_steps(steps, workspace, work, quiet):
            record[title(step, summary)] = account(summary)
            yield step, summary
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(path, (json.dumps(record, indent=1) + "\n").encode())


def _run_steps(
    steps: list[tuple[Step, Any]], workspace: Workspace, work: Executor, quiet: bool
) -> Iterator[tuple[Step, Summary]]:
    for _, group in itertools.groupby(enumerate(steps), key=lambda item: item[1][0].together or item[0]):
        members = [member for _, member in group]
        shared = work.share(len(members)) if len(members) > 1 else None
        if shared is None:
            for step, options in members:
                for summary in run_command(stage_command(step.stage), options, workspace, work, quiet=quiet):
                    yield step, summary
        else:
            yield from _run_together(members, workspace, shared, quiet)


def _run_together(
    members: list[tuple[Step, Any]], workspace: Workspace, shared: SharedExecutor, quiet: bool
) -> Iterator[tuple[Step, Summary]]:
    def run(step: Step, options: Any) -> list[Summary]:
        return list(run_command(stage_command(step.stage), options, workspace, shared, quiet=quiet))

    # Threads have no handlers for signals: here a first one has all of them stopped, and waits until they have saved.
    interrupt = Interrupt()
    with (
        interrupt.listening(True),
        ThreadPoolExecutor(len(members), thread_name_prefix="capfilt-step") as pool,
    ):
        running = {pool.submit(run, step, options): step for step, options in members}
        left = set(running)
        try:
            while left and interrupt.number is None:
                ended, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
                for each in ended:
                    for summary in each.result():
                        yield running[each], summary
        except BaseException:
            shared.stop()
            raise
        if left:
            shared.stop()


def title(step: Step, summary: Summary) -> str:
    """What an account is filed under: the step's label, and for a step's further stages what they add to its name."""
    return step.label + summary.stage.partition(step.stage)[2]


def account(summary: Summary) -> dict[str, Any]:
    """A stage's account as JSON-able values."""
    values: dict[str, Any] = {
        "stage": summary.stage,
        "output": summary.output,
        "seconds": round(summary.seconds, 3),
    }
    if summary.counts is not None:
        values |= {
            "rows_in": summary.counts.rows_in,
            "kept": summary.counts.kept,
            "dropped": summary.counts.dropped,
            "failed": summary.counts.failed,
            "rows_out": summary.rows_out,
        }
    return {**values, "figures": dict(summary.figures)}


def dry_run(steps: list[tuple[Step, Any]], workspace: Workspace) -> Iterator[str]:
    """A line per stage: done, to do on how many rows, or waiting for what is not there yet. Writes nothing.

    Raises UserError for whatever else is wrong with a step.
    """
    pending: set[str] = set()
    for step, options in steps:
        command = stage_command(step.stage)
        for path in command.classes(options):
            label = f"{step.label:<20}"
            try:
                stage = command.build(path, options, workspace)
                text = outlook(stage)
            except MissingInput as error:
                if not pending:
                    raise
                text = f"waits for an earlier step ({error})"
            if not text.startswith("done"):
                pending.add(step.label)
            yield f"{label} {text}"
