"""`capfilt quickstart`: makes the world, serves it, runs `pipelines/quickstart.yaml`, grades what came out.

The stages are everybody's: nothing here trains, captions, scores or selects.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from capfilt import recipe as recipes
from capfilt.catalog.report import write_report
from capfilt.errors import UserError
from capfilt.quickstart import grading
from capfilt.quickstart.memory import peak_memory
from capfilt.quickstart.server import serve
from capfilt.quickstart.web import build_human, build_web, write_human, write_web
from capfilt.tables.publish import replace
from capfilt.tables.visible import say
from capfilt.tables.workspace import Workspace


@dataclass(frozen=True)
class Size:
    """How much of everything: pages of the web, human images by split, captions each, and the recipe's inputs."""

    web: int
    human: dict[str, int]
    captions: int
    settings: dict[str, float]


def _settings(pretrain: int, captioner: int, filter: int, retrain: int, **more: float) -> dict[str, float]:
    """The recipe's inputs: the steps of its trainings, and more by name."""
    steps = {"pretrain": pretrain, "captioner": captioner, "filter": filter, "retrain": retrain}
    return {**{f"{name}_steps": count for name, count in steps.items()}, **more}


# Small: so little training may keep nothing at a probability of 0.5. Miniature is not for people: the same path, as short as
# it gets.
SIZES = {
    "full": Size(4000, {"train": 600, "test": 500}, 5, _settings(480, 450, 250, 430, shard=500)),
    "small": Size(
        800, {"train": 300, "test": 100}, 5, _settings(60, 40, 30, 40, shard=200, keep_fraction=0.5)
    ),
    "miniature": Size(60, {"train": 40, "test": 20}, 2, _settings(4, 3, 3, 3, shard=40, keep_fraction=0.5)),
}

MODELS = ("raw", "human_only", "curated")


def run_quickstart(
    out: str, *, size: str = "full", seed: int = 0, execution: str = "auto", quiet: bool = False
) -> dict[str, Any]:
    """Run the whole loop into the workspace `out`. Returns what `summary.json` holds.

    A second call continues where the first stopped. Raises UserError for a directory that holds a quickstart of
    another size or seed.
    """
    began = time.monotonic()
    console = Console()
    workspace = Workspace(out)
    world = workspace.path / "world"
    chosen = SIZES[size]

    def tell(line: str) -> None:
        if not quiet:
            say(line)

    tell(f"capfilt quickstart ({size}) into {workspace.path}")
    ended: list[tuple[int, str, dict[str, Any]]] = []
    with peak_memory() as peak, open_world(workspace, chosen, size, seed) as settings:
        tell(
            f"a web of {chosen.web:,} pages at http://{settings['host']}, {sum(chosen.human.values()):,} human images"
        )
        _, content = recipes.load_recipe("quickstart")
        given = {**settings, **chosen.settings, "seed": seed}
        steps = recipes.resolve(content, [f"{name}={value}" for name, value in given.items()])
        places = {step.label: place for place, (step, _) in enumerate(steps)}
        for step, done in recipes.run_recipe("quickstart", steps, workspace, execution, quiet=quiet):
            ended.append((places[step.label], recipes.title(step, done), recipes.account(done)))
            tell(done.line())
    # Steps that run together end in any order; people read them in the recipe's.
    accounts = {name: account for _, name, account in sorted(ended, key=itemgetter(0))}
    captions = world / "human" / "captions.json"
    summary = _summary(workspace, world, captions, accounts, seed)
    summary["size"] = size
    summary["peak_memory_gb"] = round(peak[0], 2)
    summary["seconds"]["total"] = round(time.monotonic() - began, 1)
    # Smaller sizes show the way, not what it leads to.
    summary["targets"] = grading.met(summary) if size == "full" else {}
    replace(workspace.path / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    write_report(workspace, workspace.path / "report.html")
    if not quiet:
        _show(console, summary)
        tell(f"{summary['seconds']['total']:,.0f} s in all, {summary['peak_memory_gb']} GB of memory at most")
        tell(f"wrote {workspace.path / 'summary.json'} and {workspace.path / 'report.html'}")
        tell(f"next: capfilt query -w {workspace.path}, or open the report")
    return summary


@contextmanager
def open_world(workspace: Workspace, chosen: Size, size: str, seed: int) -> Iterator[dict[str, str]]:
    """Make the world in `workspace`/world unless it stands, and serve its web. Yields the recipe's inputs for it."""
    world = workspace.path / "world"
    _claim(world, {"size": size, "seed": seed})
    captions = world / "human" / "captions.json"
    if not captions.is_file():
        write_human(world / "human", build_human(seed, chosen.human, chosen.captions))
    urls = world / "urls.parquet"
    # The addresses of a list that stands are what a resumed run recognises.
    port = urlsplit(pq.read_table(urls)["url"][0].as_py()).port if urls.is_file() else None
    with serve(seed, chosen.web, port) as address:
        if port is None:
            write_web(world, build_web(seed, chosen.web), address)
        yield {"url_list": str(urls), "captions": str(captions), "host": address.removeprefix("http://")}


def _claim(world: Path, identity: dict[str, Any]) -> None:
    path = world / "quickstart.json"
    if path.is_file():
        found = json.loads(path.read_bytes())
        if found != identity:
            raise UserError(
                f"{world.parent}: holds a quickstart of size {found.get('size')!r} and seed {found.get('seed')}; "
                "name another --out, or remove it"
            )
        return
    if world.parent.is_dir() and any(not name.startswith(".") for name in os.listdir(world.parent)):
        raise UserError(f"{world.parent}: is not empty and holds no quickstart; name another --out")
    world.mkdir(parents=True, exist_ok=True)
    replace(path, (json.dumps(identity) + "\n").encode())


def _summary(
    workspace: Workspace, world: Path, captions: Path, accounts: dict[str, dict[str, Any]], seed: int
) -> dict[str, Any]:
    web, synthetic = grading.read_texts(workspace, world / "truth.parquet", "web", "captioner", "capfilt")
    return {
        "rows": {name: _rows(account) for name, account in accounts.items()},
        "seconds": _seconds(workspace, accounts),
        "noise": grading.noise(web),
        "filter": grading.filter_figures(web, seed),
        "captioner": grading.captioner_figures(synthetic, grading.human_captions(captions)),
        "evaluation": grading.evaluation_figures(workspace, MODELS),
    }


def _rows(account: dict[str, Any]) -> dict[str, Any]:
    """A stage's input rows, in = kept + dropped + failed; a training stage's are texts, an evaluation's images."""
    if "rows_in" in account:
        return {
            "in": account["rows_in"],
            "kept": account["kept"],
            "dropped": sum(account["dropped"].values()),
            "failed": sum(account["failed"].values()),
            "out": account["rows_out"],
            "by_reason": account["dropped"],
            "by_failure": account["failed"],
        }
    texts = int(account["figures"].get("texts", 0))  # a done stage run again reports none
    counts = {"in": texts, "kept": texts, "dropped": 0, "failed": 0, "out": 0}
    return {**counts, "by_reason": {}, "by_failure": {}}


def _seconds(workspace: Workspace, accounts: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Wall seconds per stage, added up over the runs that it took."""
    path = workspace.path / "world" / "seconds.json"
    before: dict[str, float] = json.loads(path.read_bytes()) if path.is_file() else {}
    total = {name: round(before.get(name, 0.0) + account["seconds"], 2) for name, account in accounts.items()}
    replace(path, (json.dumps(total, indent=1) + "\n").encode())
    return total


def _show(console: Console, summary: dict[str, Any]) -> None:
    rows = Table("stage", "in", "kept", "dropped", "failed", "rows out", "seconds", title="What happened")
    for name, each in summary["rows"].items():
        numbers = [f"{each[key]:,}" for key in ("in", "kept", "dropped", "failed", "out")]
        rows.add_row(name, *numbers, f"{summary['seconds'].get(name, 0.0):,.1f}")
    console.print(rows)
    evaluation = Table("trained on", *next(iter(summary["evaluation"].values())), title="Held-out human test")
    for name, each in summary["evaluation"].items():
        evaluation.add_row(name, *(f"{value:.1f}" for value in each.values()))
    console.print(evaluation)
    figures = Table("figure", "value", "target", "", title="Against the truth of the world")
    for name, each in grading.met(summary).items():
        value = "-" if each["value"] is None else f"{each['value']:.3f}"
        verdict = (each["target"], "met" if each["met"] else "not met") if summary["targets"] else ("", "")
        figures.add_row(name, value, *verdict)
    console.print(figures)
