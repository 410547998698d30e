"""The command line: one command per stage, made from the stage's option dataclass, plus run, quickstart, query, compare,
report, doctor, convert, recipe and export.

Only typer and the standard library are imported here; what a command needs is imported when it runs. Options are
declared once, beside their stage.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from capfilt import commands
from capfilt.errors import RunError, UserError
from capfilt.options import INPUTS, PANELS, PARTS, REQUIRED, offered, panel_of
from capfilt.stages.command import StageCommand
from capfilt.stages.registry import STAGES, installed, stage_command, stages
from capfilt.tables.visible import say, visible
from capfilt.training.launched import launched_rank


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parameters(command: StageCommand) -> list[inspect.Parameter]:
    """The typer parameters of a stage: its options, then those every stage has."""
    hints = get_type_hints(command.options)
    found: dict[str, tuple[Any, Any]] = {"context": (typer.Context, inspect.Parameter.empty)}
    # The argument, inputs and the rest, whichever class declares them.
    for field in sorted(
        offered(command.options),
        key=lambda each: (each.name != command.positional, each.metadata["kind"] not in (*PARTS, "model")),
    ):
        kind: Any = hints[field.name]
        default: Any = field.default
        if kind == tuple[str, ...]:
            kind, default = list[str], [*default]
        about: dict[str, Any] = {
            "help": _help(field),
            "show_default": False,
            "rich_help_panel": panel_of(command.options, field),
            "autocompletion": commands.completer(field.metadata["kind"], field.metadata["choices"]),
        }
        if field.name == command.positional:
            declared = typer.Argument(metavar=field.name.upper(), **about)
            # One that another option makes needless is asked for by the stage.
            default = REQUIRED if field.metadata["unless"] else ...
        else:
            off = f"/--no-{field.name.replace('_', '-')}" if kind is bool else ""
            declared = typer.Option(_flag(field.name) + off, **about)
            default = ... if default == REQUIRED else default
        found[field.name] = (Annotated[kind, declared], default)
    every = typer.Option(
        "--help-all", is_eager=True, callback=_help_all, help="show the rare options too, and exit"
    )
    shared = {**_shared(command), "help_all": (Annotated[bool, every], False)}
    return [
        # typer wants parameters without a default first among equals only for positionals; keyword-only ones need no order.
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for name, (annotation, default) in {**found, **shared}.items()
    ]


def _help(field: dataclasses.Field[Any]) -> str:
    """An option's help, and what follows from its metadata: choices or range, and default."""
    marks, default = field.metadata, field.default
    facts = [", ".join(filter(None, marks["choices"]))]
    if math.isfinite(marks["most"]):
        facts.append(f"{max(marks['least'], marks['above']):g} to {marks['most']:g}")
    if isinstance(default, bool):
        facts.append("default: on" if default else "")
    elif isinstance(default, tuple):
        facts.append(f"default: {', '.join(default)}" if default else "")
    elif default not in ("", REQUIRED):
        facts.append(f"default: {default:g}" if isinstance(default, float) else f"default: {default}")
    said = "; ".join(filter(None, facts))
    return f"{marks['help']} [{said}]" if said else marks["help"]


def _shared(command: StageCommand) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of the parameters that are no options of the stage's own."""
    shared: dict[str, tuple[Any, Any]] = {}
    if command.out:
        text = "directory to write the part to, in place of the workspace's"
        out = typer.Option("--out", help=text, show_default=False, rich_help_panel=INPUTS)
        shared["out"] = (Annotated[str, out], "")
    shared["workspace"] = (commands.WORKSPACE, ".")
    if any(field.metadata["kind"] in PARTS for field in offered(command.options)):
        shared["allow_incomplete"] = (commands.ALLOW_INCOMPLETE, False)
    over = typer.Option(
        "--overwrite", help="first remove the output that stands, after asking", rich_help_panel=INPUTS
    )
    yes = typer.Option("--yes", help="with --overwrite: do not ask", rich_help_panel=INPUTS)
    shared |= {"overwrite": (Annotated[bool, over], False), "yes": (Annotated[bool, yes], False)}
    return shared | {"execution": (commands.EXECUTION, "auto"), "quiet": (commands.QUIET, False)}


_ALL = "capfilt.help_all"


def _help_all(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        context.meta[_ALL] = True
        typer.echo(context.get_help())
        raise typer.Exit


class _Panelled(TyperCommand):
    """A stage's command. Its help has a panel for each group of options; the rare ones are for `--help-all`."""

    rare: frozenset[str]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {name: [] for name in (*PANELS, "Help")}
        for parameter in self.get_params(ctx):
            if ctx.meta.get(_ALL) or parameter.name not in self.rare:
                names, text = parameter.get_help_record(ctx) or ("", "")
                names = re.sub(r"--(\S+) / --no-\1", r"--[no-]\1", names)
                panels[getattr(parameter, "rich_help_panel", None) or "Help"].append((names, text))
        for name, records in panels.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


def _command_class(command: StageCommand) -> type[_Panelled]:
    rare = {field.name for field in offered(command.options) if field.metadata["rare"]}
    return type("Command", (_Panelled,), {"rare": frozenset(rare | {"allow_incomplete", "yes"})})


def _stage_function(command: StageCommand) -> Callable[..., None]:
    def run(context: typer.Context, **values: Any) -> None:
        shared = {name: values.pop(name) for name in _shared(command)}
        del values["help_all"]
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
    import pkgutil
    from pathlib import Path

    pkgutil.resolve_name(path)(Path(output), options, quiet, sys.stdout)


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
        "finetune": _app("Step 2: finetune the captioner, the filter, or for a task."),
        "retrain": _app("Step 3: train a model of a family on the bootstrapped corpus."),
        "recipe": _app("List the recipes that come with capfilt, or print one."),
    }
    # Families of other packages are looked for where they can be meant: looking costs more time than help may take.
    for command in stages() if words[:1] == ("retrain",) else STAGES:
        target = groups[command.words[0]] if len(command.words) == 2 else app
        name = command.words[-1]
        wanted = words[: len(command.words)] == command.words
        function = _stage_function(command) if wanted else _bare(command.options)
        target.command(name, cls=_command_class(command), epilog=_epilog(command.examples))(function)
    own = {*groups, *commands.EXAMPLES, *(command.words[0] for command in STAGES)}
    others = {} if words and words[0] in own else installed()
    for name in [name for name in others if name not in own]:
        found = others[name][0].dist
        package = found.name if found else "?"
        shown: dict[str, Any] = {"help": f"A stage of the package {package}."}
        function = _bare(None)
        if words[:1] == (name,):
            command = stage_command(name)
            function = _stage_function(command)
            shown = {"cls": _command_class(command), "epilog": _epilog(command.examples)}
        app.command(name, **shown)(function)
    for name, examples in commands.EXAMPLES.items():
        path = tuple(name.split())
        target = groups[path[0]] if len(path) == 2 else app
        function = getattr(commands, "_".join(path))
        wanted = words[: len(path)] == path
        target.command(path[-1], epilog=_epilog(examples))(function if wanted else _bare(function))
    for name, group in groups.items():
        app.add_typer(group, name=name)
    return app


def _bare(described: object) -> Callable[[], None]:
    def command() -> None:
        raise AssertionError

    command.__doc__ = inspect.getdoc(described)
    return command


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
        # A shell that completes a command line puts it in the environment, the program's name first: bash, and the others.
        completed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
        app = build_app(arguments or completed.split()[1:])
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
    if context is not None and where and text.startswith("No such command"):
        text += f" Choose {', '.join(context.command.list_commands(context))}"
    return f"{where}: {text} (see capfilt {where} --help)" if where else f"{text} (see capfilt --help)"
