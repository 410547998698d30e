"""The command line: one command per stage, made from the stage's option dataclass, plus run, quickstart, query, compare,
report, doctor, convert, recipe and export.

Only typer and the standard library are imported here; what a command needs is imported when it runs. Options are
declared once, in `stages/options.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Annotated, Any, get_type_hints

import typer

from capfilt import commands
from capfilt.errors import RunError, UserError
from capfilt.stages import options as stage_options
from capfilt.stages.command import StageCommand
from capfilt.stages.registry import STAGES, installed, stage_command
from capfilt.tables.visible import say, visible
from capfilt.training.launched import launched_rank

WORKSPACE_HELP = "directory of everything of a run: images/ captions/ scores/ signals/ verdicts/ pairs/ examples/ models/ runs/"

OTHERS = {
    "run": "Run a recipe: its stages in order, skipping what is done.",
    "quickstart": "Run the whole loop on a generated world, end to end, on this machine.",
    "query": "Ask a workspace in SQL.",
    "compare": "Show a result of evaluate, or set several side by side.",
    "report": "Write one HTML file about a workspace.",
    "doctor": "Check this machine, and a workspace's shards against their manifests.",
    "convert": "Convert a workspace that an earlier capfilt wrote to today's layout.",
    "recipe list": "List the recipes that come with capfilt.",
    "recipe show": "Print a recipe as it is written, or with every option resolved.",
    "export": "Write a checkpoint in transformers' layout, the original repository's, or capfilt's.",
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parameters(command: StageCommand) -> list[inspect.Parameter]:
    """The typer parameters of a stage: its options, then those every stage has."""
    hints = get_type_hints(command.options)
    parameters = [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    ]
    for field in dataclasses.fields(command.options):
        kind: Any = hints[field.name]
        text = field.metadata["help"]
        default: Any = field.default
        if kind == tuple[str, ...]:
            kind, default = list[str], [*default]
        if field.name == command.positional:
            annotation: Any = Annotated[
                kind, typer.Argument(help=text, show_default=False, metavar=field.name.upper())
            ]
            # One that another option makes needless is asked for by the stage.
            default = stage_options.REQUIRED if field.metadata["unless"] else ...
        else:
            declaration = (
                f"{_flag(field.name)}/--no-{field.name.replace('_', '-')}"
                if kind is bool
                else _flag(field.name)
            )
            required = field.default == stage_options.REQUIRED
            show = bool(default) or kind in (int, float, bool)
            annotation = Annotated[kind, typer.Option(declaration, help=text, show_default=show)]
            if required:
                default = ...
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
            )
        )
    for name, (annotation, default) in _shared(command).items():
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        )
    # typer wants parameters without a default first among equals only for positionals; keyword-only ones need no order.
    return parameters


def _shared(command: StageCommand) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of the parameters that are no options of the stage's own."""
    workspace = typer.Option("--workspace", "-w", envvar="CAPFILT_WORKSPACE", help=WORKSPACE_HELP)
    execution = typer.Option("--execution", help=commands.EXECUTION_HELP)
    shared: dict[str, tuple[Any, Any]] = {
        "workspace": (Annotated[str, workspace], "."),
        "execution": (Annotated[str, execution], "auto"),
        "quiet": (Annotated[bool, typer.Option("--quiet", "-q", help="no progress")], False),
    }
    if any(field.metadata["kind"] in stage_options.PARTS for field in dataclasses.fields(command.options)):
        text = "read parts that are not whole; the output says so"
        allow = typer.Option("--allow-incomplete", help=text)
        shared = {"allow_incomplete": (Annotated[bool, allow], False), **shared}
    over = typer.Option("--overwrite", help="first remove the output that stands, after asking")
    yes = typer.Option("--yes", help="with --overwrite: do not ask")
    shared |= {"overwrite": (Annotated[bool, over], False), "yes": (Annotated[bool, yes], False)}
    if command.out:
        text = "directory to write the part to, in place of the workspace's"
        shared = {"out": (Annotated[str, typer.Option("--out", help=text, show_default=False)], ""), **shared}
    return shared


def _stage_function(command: StageCommand) -> Callable[..., None]:
    def run(context: typer.Context, **values: Any) -> None:
        shared = {name: values.pop(name) for name in _shared(command)}
        # The others are at their defaults; `download --retry` needs to know which were given.
        chosen = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if _given(context, name)
        }
        run_stages(command, command.options(**chosen), **shared)

    run.__signature__ = inspect.Signature(_parameters(command))  # type: ignore[attr-defined]
    run.__doc__ = inspect.getdoc(command.options)
    return run


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is None or source.name not in ("DEFAULT", "DEFAULT_MAP")


def run_stages(
    command: StageCommand,
    options: Any,
    workspace: str,
    *,
    execution: str,
    quiet: bool = False,
    out: str = "",
    allow_incomplete: bool = False,
    overwrite: bool = False,
    yes: bool = False,
) -> None:
    """Run one command's stages and print a line about each."""
    from functools import partial

    from capfilt.execution.overwrite import clear
    from capfilt.execution.run import run_command
    from capfilt.tables.shards import Part
    from capfilt.tables.workspace import Workspace, as_path

    output = Part(as_path(out)) if out else None
    place = Workspace(workspace, allow_incomplete=allow_incomplete)
    if yes and not overwrite:
        raise UserError("--yes answers the question of --overwrite: give both")
    agree = {"clear": partial(clear, options=options, workspace=place, agreed=yes)} if overwrite else {}
    for summary in run_command(command, options, place, execution, output=output, quiet=quiet, **agree):
        say(*summary.lines())
        if command.shows:
            _show(command.shows, summary.output, options, quiet)


def _show(path: str, output: str, options: Any, quiet: bool) -> None:
    """What a command has to show of the result it wrote."""
    import importlib
    from pathlib import Path

    module, _, name = path.partition(":")
    getattr(importlib.import_module(module), name)(Path(output), options, quiet, sys.stdout)


def _epilog(examples: Sequence[str]) -> str:
    # \b keeps click from re-wrapping the lines.
    return "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)


def _settings() -> dict[str, Any]:
    return {
        # Fingers know img2dataset's --url_col; --url-col is the same option.
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
    }


def _app(help_text: str) -> typer.Typer:
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=_settings(),
    )


def build_app(arguments: Sequence[str] = ()) -> typer.Typer:
    """The typer application.

    Only the command that `arguments` begin with gets its options: building all of them costs more time than help may
    take, and the overview shows none.
    """
    app = _app(
        "Noisy web image-text pairs in, a bootstrapped corpus and retrained models out (BLIP's CapFilt)."
    )
    words = tuple(argument for argument in arguments if not argument.startswith("-"))

    @app.callback(invoke_without_command=True)
    def main_callback(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
    ) -> None:
        if version:
            import capfilt

            say(f"capfilt {capfilt.__version__}")
            raise typer.Exit

    groups = {
        "finetune": _app(
            "Step 2: finetune the captioner or the filter on clean pairs; or a model for a task."
        ),
        "recipe": _app("List the recipes that come with capfilt, or print one."),
    }
    for command in STAGES:
        target = groups[command.words[0]] if len(command.words) == 2 else app
        name = command.words[-1]
        wanted = words[: len(command.words)] == command.words
        function = _stage_function(command) if wanted else _without_options(command)
        target.command(name, epilog=_epilog(command.examples), no_args_is_help=False)(function)
    own = {*groups, *OTHERS, *(command.words[0] for command in STAGES)}
    others = {} if words and words[0] in own else installed()
    for name in [name for name in others if name not in own]:
        found = others[name][0].dist
        function = _bare(f"A stage of the package {found.name if found else '?'}.")
        epilog = None
        if words[:1] == (name,):
            command = stage_command(name)
            function, epilog = _stage_function(command), _epilog(command.examples)
        app.command(name, epilog=epilog)(function)
    for name, text in OTHERS.items():
        path = tuple(name.split())
        target = groups[path[0]] if len(path) == 2 else app
        function = getattr(commands, "_".join(path)) if words[: len(path)] == path else _bare(text)
        target.command(path[-1], help=text, epilog=_epilog(commands.EXAMPLES[name]))(function)
    for name, group in groups.items():
        app.add_typer(group, name=name)
    return app


def _bare(text: str) -> Callable[[], None]:
    def command() -> None:
        raise AssertionError

    command.__doc__ = text
    return command


def _without_options(command: StageCommand) -> Callable[[], None]:
    return _bare(inspect.getdoc(command.options) or "")


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. Exit codes: 0 done, 1 the run failed, 2 the call was wrong, 130 interrupted by Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if launched_rank():
        # Of the processes that torchrun starts, the first speaks; errors are everyone's.
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    _show_all()
    sys.exit(_run(arguments))


def _show_all() -> None:
    """Have Python's own warnings and tracebacks, which may quote a file, made visible too."""

    def as_warning(message: Warning | str, category: type[Warning], *where: Any, **_more: Any) -> str:
        # capfilt's own need no place in its code; a library's say whose they are.
        file, number = where[0], where[1]
        whose = "" if category is RuntimeWarning else f" ({category.__name__}, {file}:{number})"
        return f"capfilt: warning: {visible(' '.join(str(message).split()) + whose)}\n"

    def as_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        say(*text.rstrip().split("\n"), err=True)

    warnings.formatwarning = as_warning
    sys.excepthook = as_traceback


def _run(arguments: Sequence[str]) -> int:
    try:
        # A shell that completes a command line puts it in the environment, the program's name first.
        app = build_app(arguments or os.environ.get("COMP_WORDS", "").split()[1:])
        result = app(args=list(arguments), prog_name="capfilt", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        # What some releases of typer make of Ctrl-C; others let it through.
        return _interrupted() if code == _INTERRUPTED else code
    except typer.Exit as error:
        return error.exit_code
    except (UserError, RunError) as error:
        # A name in it, of a file or in one, may be of several lines.
        say(f"capfilt: {' '.join(str(error).splitlines())}", err=True)
        return 2 if isinstance(error, UserError) else 1
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:
        # The reader of a pipe (head, less) went away; not a failure, and Python must not try to flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        say(f"capfilt: {_system(error)}", err=True)
        return 1
    except MemoryError:
        say(f"capfilt: {_MENDED.format('not enough memory')}", err=True)
        return 1
    except Exception as error:
        # typer's usage errors (its own click or the installed one, by version) share this method.
        if (
            type(error).__name__ == "NoArgsIsHelpError"
        ):  # a group without a command: its help, as people read it
            print(error.format_message())  # type: ignore[attr-defined]
            return 2
        if hasattr(error, "format_message"):
            say(f"capfilt: {_usage(error)}", err=True)
            return 2
        raise


_INTERRUPTED = 128 + signal.SIGINT
"""The exit code that shells give a command which Ctrl-C ended."""

_MENDED = "{}; what was committed is valid: mend that, and run the same command again"


def _system(error: OSError) -> str:
    """One line: the refusal of the operating system, its file, and the next step."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    # A library's own words may be several lines, and hold no number of the system's.
    words = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return _MENDED.format(f"{' -> '.join(names)}: {words}" if names else words)


def _interrupted() -> int:
    say("capfilt: interrupted; what was committed is valid, run the same command again to go on", err=True)
    return _INTERRUPTED


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    where = context.command_path.removeprefix("capfilt").strip() if context is not None else ""
    text = " ".join(error.format_message().split())
    return f"{where}: {text} (see capfilt {where} --help)" if where else f"{text} (see capfilt --help)"
