"""The commands that are not stages: run, quickstart, query, compare, report, doctor, convert, recipe list, recipe show, export.

Light: each imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from capfilt.options import INPUTS, MACHINE
from capfilt.tables.visible import say


def completer(kind: str, choices: Sequence[str] = ()) -> Callable[[typer.Context, str], list[str]]:
    """The words that a shell offers for an option: its `choices`, or the workspace's names of a `kind`.

    `kind` is a table, "model", "result" or "recipe". Where nothing is offered, a shell offers files.
    """
    folder = {"model": "models", "result": "runs"}.get(kind, kind)

    def complete(context: typer.Context, incomplete: str) -> list[str]:
        if kind == "recipe":
            from capfilt.resources import list_recipes

            return list_recipes()
        place = Path(context.params.get("workspace") or ".") / folder
        if choices or kind in ("", "path") or not place.is_dir():
            return [*choices]
        names = sorted(each.stem if kind == "result" else each.name for each in place.iterdir())
        return [name for name in names if not name.startswith(".")]

    return complete


WORKSPACE = Annotated[
    str,
    typer.Option(
        "--workspace",
        "-w",
        envvar="CAPFILT_WORKSPACE",
        help="directory of everything of a run",
        rich_help_panel=INPUTS,
    ),
]
ALLOW_INCOMPLETE = Annotated[
    bool,
    typer.Option(
        "--allow-incomplete", help="read parts that are not whole; the output says so", rich_help_panel=INPUTS
    ),
]
EXECUTION = Annotated[
    Literal["auto", "ray", "inline"],
    typer.Option(
        "--execution",
        help="inline: in this process; ray: on a cluster or this machine; auto: ray for long work",
        rich_help_panel=MACHINE,
    ),
]
QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="no progress", rich_help_panel=MACHINE)]
SETTINGS = Annotated[
    list[str] | None,
    typer.Option("--set", help="INPUT=VALUE or STEP.OPTION=VALUE; repeatable", show_default=False),
]
RECIPE = Annotated[
    str,
    typer.Argument(
        help="name of a recipe that comes with capfilt, or a YAML file", autocompletion=completer("recipe")
    ),
]

EXAMPLES = {
    "run": (
        "capfilt run photographs --set data=flickr -w photographs",
        "capfilt run my-recipe.yaml --from score --set select.threshold=0.4",
        "capfilt run photographs --set data=DIR --dry-run",
    ),
    "quickstart": ("capfilt quickstart --out quickstart", "capfilt quickstart --out quickstart --size small"),
    "query": (
        'capfilt query "SELECT scorer, source, count(*), avg(itm_score) FROM texts JOIN scores USING (text_id) GROUP BY 1, 2"',
        'capfilt query "SELECT quantile_cont(itm_score, 0.3) FROM scores" --format json',
        "capfilt query",
    ),
    "compare": (
        "capfilt compare curated",
        "capfilt compare human_only curated raw",
        "capfilt compare human_only curated --format markdown > table.md",
    ),
    "report": ("capfilt report -w quickstart --out report.html",),
    "doctor": ("capfilt doctor", "capfilt doctor -w quickstart --verify"),
    "convert": ("capfilt convert my-workspace", "capfilt convert my-workspace/images/web"),
    "export": (
        "capfilt export captioner --to transformers --only captioner --out captioner-hf",
        "capfilt export ./model_base.pth --to transformers --out blip-base",
        "capfilt export ./blip-itm-base-coco --to capfilt --out models/filter",
    ),
    "recipe list": ("capfilt recipe list",),
    "recipe show": (
        "capfilt recipe show blip-base-14m",
        "capfilt recipe show photographs --resolved --set data=DIR",
    ),
}


def run(
    recipe: RECIPE,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="only this step; repeatable", show_default=False)
    ] = None,
    start: Annotated[
        str, typer.Option("--from", help="this step and those after it", show_default=False)
    ] = "",
    settings: SETTINGS = None,
    allow_incomplete: ALLOW_INCOMPLETE = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be done, and on how many rows")
    ] = False,
    workspace: WORKSPACE = ".",
    execution: EXECUTION = "auto",
    quiet: QUIET = False,
) -> None:
    """Run a recipe: its stages in order, skipping what is done."""
    from capfilt import recipe as recipes
    from capfilt.tables.workspace import Workspace

    name, content = recipes.load_recipe(recipe)
    steps = recipes.chosen_steps(recipes.resolve(content, settings or []), only or [], start)
    place = Workspace(workspace, allow_incomplete=allow_incomplete)
    if dry_run:
        for line in recipes.dry_run(steps, place):
            say(line)
        return
    for _, summary in recipes.run_recipe(name, steps, place, execution, quiet=quiet):
        say(*summary.lines())


def quickstart(
    out: Annotated[str, typer.Option("--out", help="directory to make the workspace in")] = "quickstart",
    size: Annotated[
        Literal["full", "small", "miniature"],
        typer.Option("--size", help="full: a quarter of an hour; small: minutes; miniature: a try"),
    ] = "full",
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="of the generated world and of the training")
    ] = 0,
    execution: EXECUTION = "auto",
    quiet: QUIET = False,
) -> None:
    """Run the whole loop on a generated world, on this machine."""
    from capfilt.quickstart.run import run_quickstart

    run_quickstart(out, size=size, seed=seed, execution=execution, quiet=quiet)


def query(
    sql: Annotated[
        str, typer.Argument(help="a query over the views; without one, the views and their columns")
    ] = "",
    format: Annotated[
        Literal["table", "json", "csv"],
        typer.Option("--format", help="a terminal gets escapes in place of controls"),
    ] = "table",
    workspace: WORKSPACE = ".",
) -> None:
    """Ask a workspace in SQL. Without a query, list the views and their columns."""
    from capfilt.catalog.query import print_query
    from capfilt.tables.workspace import Workspace

    print_query(Workspace(workspace), sql, format, sys.stdout)


def compare(
    results: Annotated[
        list[str],
        typer.Argument(
            help="results in runs/, or paths; others are compared with the first",
            metavar="RUN...",
            autocompletion=completer("result"),
        ),
    ],
    format: Annotated[
        Literal["table", "markdown", "json"], typer.Option("--format", help="how to print")
    ] = "table",
    workspace: WORKSPACE = ".",
) -> None:
    """Compare results of `evaluate`. Says which differences are outside their interval."""
    from capfilt.results import show
    from capfilt.tables.workspace import Workspace

    show(Workspace(workspace), results, format, sys.stdout)


def report(
    out: Annotated[
        str, typer.Option("--out", help="file to write; default: report.html in the workspace")
    ] = "",
    workspace: WORKSPACE = ".",
) -> None:
    """Write one HTML file about a workspace. Funnel, scores, samples, learning curves, evaluations, lineage."""
    from pathlib import Path

    from capfilt.catalog.report import write_report
    from capfilt.tables.workspace import Workspace

    place = Workspace(workspace)
    path = Path(out) if out else place.path / "report.html"
    write_report(place, path)
    say(f"wrote {path}")


def doctor(
    workspace: Annotated[
        str,
        typer.Option(
            "--workspace",
            "-w",
            envvar="CAPFILT_WORKSPACE",
            help="also check its shards (with --verify: the current directory's)",
            show_default=False,
        ),
    ] = "",
    verify: Annotated[bool, typer.Option("--verify", help="read and hash every byte of every shard")] = False,
) -> None:
    """Check this machine and the shards of a workspace."""
    from capfilt import doctor as checks

    healthy = True
    workspace = workspace or ("." if verify else "")
    if workspace:
        checks.existing(workspace)
    for line in checks.machine():
        say(line)
    if workspace:
        for good, line in checks.workspace(workspace, full=verify):
            healthy &= good
            say(line)
    if not healthy:
        raise typer.Exit(1)


def convert(
    path: Annotated[str, typer.Argument(help="a workspace, or one part")] = ".",
) -> None:
    """Convert a workspace of an earlier capfilt. Rows, files and ids stay, records move to .capfilt."""
    from pathlib import Path

    from capfilt.tables.convert import convert as convert_parts

    found = convert_parts(Path(path))
    for part in found:
        say(f"converted {part}")
    if not found:
        say(f"{path}: nothing to convert")


def recipe_list() -> None:
    """List the recipes that come with capfilt."""
    from capfilt import recipe as module
    from capfilt.resources import list_recipes

    for each in list_recipes():
        _, content = module.load_recipe(each)
        say(f"{each:<24} {' '.join(content.description.split())}")


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="checkpoint, in any layout: a name in the workspace, or a path (./NAME)",
            autocompletion=completer("model"),
        ),
    ],
    to: Annotated[
        Literal["transformers", "original", "openai", "capfilt"],
        typer.Option("--to", help="layout to write; original: a .pth; openai: of a CLIP"),
    ],
    out: Annotated[str, typer.Option("--out", help="directory to make")],
    only: Annotated[
        Literal["captioner", "filter"] | None, typer.Option("--only", help="this half of the model alone")
    ] = None,
    image_size: Annotated[
        int,
        typer.Option("--image-size", min=0, help="resize the position embedding to this side; 0: as it is"),
    ] = 0,
    workspace: WORKSPACE = ".",
) -> None:
    """Convert a checkpoint between capfilt's and other layouts."""
    from capfilt.models.export import export as write
    from capfilt.tables.workspace import Workspace

    for line in write(Workspace(workspace).model(model), to, out, only or "", image_size):
        say(line)


def recipe_show(
    name: RECIPE,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="every option of every step, defaults included")
    ] = False,
    settings: SETTINGS = None,
) -> None:
    """Print a recipe as it is written, or with every option resolved."""
    from capfilt import recipe as module
    from capfilt.errors import UserError
    from capfilt.resources import find_recipe

    _, content = module.load_recipe(name)
    if settings and not resolved:
        raise UserError("recipe show: --set changes what --resolved prints; give both")
    text = module.show(content, settings or []) if resolved else module.text_of(find_recipe(name))
    if sys.stdout.isatty():
        say(*text.removesuffix("\n").split("\n"))
    else:
        sys.stdout.write(text)
