"""Results of `evaluate` for people: one run's figures, or several side by side, in the terminal, as Markdown, as JSON.

What the figures and their differences are is `tasks/comparison.py`'s.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from capfilt.catalog.terminal import write_table
from capfilt.errors import UserError
from capfilt.tables.visible import visible
from capfilt.tables.workspace import Workspace
from capfilt.tasks.comparison import (
    Result,
    counts_told,
    difference,
    read_result,
    shared_metrics,
    unlike,
)

FORMATS = ("table", "markdown", "json")


@dataclass(frozen=True)
class Shown:
    """A table with lines around it: all text."""

    before: tuple[str, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    after: tuple[str, ...]
    plain: Any


def show(workspace: Workspace, names: Sequence[str], form: str, out: TextIO) -> None:
    """Print one result, or several side by side. Raises UserError for a name or a form that is none."""
    if form not in FORMATS:
        raise UserError(f"--format {form!r}: choose {', '.join(FORMATS)}")
    results = _named_apart([read_result(workspace.result(name)) for name in names], names)
    told = one_run(results[0]) if len(results) == 1 else side_by_side(results)
    if form == "json":
        out.write(json.dumps(told.plain, indent=1) + "\n")
    elif form == "markdown":
        out.write(markdown(told))
    else:
        _print(told, out)


def _named_apart(results: Sequence[Result], given: Sequence[str]) -> list[Result]:
    """The results, those of one name called as they were asked for, and numbered where that is the same too."""
    counts = Counter(result.name for result in results)
    named: list[Result] = []
    for result, asked in zip(results, given, strict=True):
        name = wanted = result.name if counts[result.name] == 1 else asked
        taken, number = {each.name for each in named}, 1
        while name in taken:
            number += 1
            name = f"{wanted} ({number})"
        named.append(replace(result, name=name))
    return named


def shown_after(path: Path, options: Any, quiet: bool, out: TextIO) -> None:
    """After `evaluate`: the table, unless `quiet`, and the Markdown file that was asked for."""
    told = one_run(read_result(path))
    if options.markdown:
        target = Path(options.markdown)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(markdown(told), encoding="utf-8")
    if not quiet:
        _print(told, out)


def one_run(result: Result) -> Shown:
    """The figures of one run by task, with intervals and baselines."""
    rows, after = [], []
    listed: set[str] = set()
    for task, said in result.tasks.items():
        metrics = [metric for metric in said.get("metrics", ()) if metric in result.metrics]
        listed |= set(metrics)
        for number, metric in enumerate(metrics):
            rows.append((task if number == 0 else "", *_figures(result, metric)))
        after.append(f"{task}: {said.get('protocol')} ({counts_told(said)})")
        # Rows of other tasks and splits are nobody's loss.
        lost = {
            name: count for name, count in said.get("left_out", {}).items() if name not in ("task", "split")
        }
        if lost:
            after.append(
                f"{task}: left out: " + ", ".join(f"{count:,} {name}" for name, count in lost.items())
            )
        skipped = said.get("details", {}).get("skipped", {})
        after += [f"{task}: {name} skipped: {reason}" for name, reason in skipped.items()]
    rows += [("", *_figures(result, metric)) for metric in result.metrics if metric not in listed]
    resamples, seed, level = result.bootstrap
    after.append(
        f"intervals: {level:.0%}, {resamples:,} resamples of whole images where a task says no other, seed {seed}"
    )
    return Shown(
        (_heading(result),),
        ("task", "figure", "value", "interval", "baseline"),
        tuple(rows),
        tuple(after),
        {key: value for key, value in result.content.items() if key not in ("units", "queries", "captions")},
    )


def side_by_side(results: Sequence[Result]) -> Shown:
    """Every figure of every run, and the other runs' differences from the first."""
    first, *others = results
    rows = []
    plain: dict[str, Any] = {}
    level, apart, bare, sized = first.bootstrap[2], False, False, False
    for metric in shared_metrics(results):
        cells = [metric, *(_value(result.metrics.get(metric)) for result in results)]
        told: dict[str, Any] = {"values": {result.name: result.metrics.get(metric) for result in results}}
        for other in others:
            if metric not in other.metrics or metric not in first.metrics:
                cells.append("–")
                continue
            found = difference(other, first, metric)
            cells.append(_difference(found.value, found.interval, found.verdict, found.paired))
            apart |= found.interval is not None and not found.paired
            bare |= found.interval is None and not found.sized
            sized |= found.sized
            told.setdefault("differences", {})[other.name] = {
                "value": round(found.value, 3),
                "interval": None if found.interval is None else found.interval.as_dict(),
                "verdict": found.verdict or None,
                "paired": found.paired,
            }
        rows.append(tuple(cells))
        plain[metric] = told
    notes = [
        f"above, below: the {level:.0%} interval of the difference from {first.name} excludes 0; within: it does not",
        *(["~: not over the same queries, resampled apart"] if apart else []),
        *(["no interval: a run holds the figure without what it is made of"] if bare else []),
        *(
            ["no verdict: the figure depends on how much it is measured over, and that differs"]
            if sized
            else []
        ),
        *unlike(results),
    ]
    return Shown(
        tuple(_heading(result) for result in results),
        ("figure", *(result.name for result in results), *(f"{o.name} − {first.name}" for o in others)),
        tuple(rows),
        tuple(notes),
        {
            "runs": [{"name": result.name, **_identity(result)} for result in results],
            "figures": plain,
            "notes": notes,
        },
    )


def markdown(told: Shown) -> str:
    """The table as Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(visible(cell).replace("|", "\\|") for cell in cells) + " |"

    table = [line(told.header), "|" + "---|" * len(told.header), *(line(row) for row in told.rows)]
    around = [map(visible, lines) for lines in (told.before, told.after)]
    return "\n\n".join([*around[0], "\n".join(table), *around[1]]) + "\n"


def _print(told: Shown, out: TextIO) -> None:
    # Figures are for reading and copying: not cut where the terminal is narrow or there is none.
    out.writelines(f"{visible(line)}\n" for line in told.before)
    right = [place > 1 or "–" in name for place, name in enumerate(told.header)]
    write_table(told.header, told.rows, right, out)
    out.writelines(f"{visible(line)}\n" for line in told.after)


def _heading(result: Result) -> str:
    said = _identity(result)
    mark = f"({str(said['checkpoint'])[:12]})" if said["checkpoint"] else ""
    model = " ".join(filter(None, (said["model"], said["given"], mark))) or "unknown checkpoint"
    return f"{result.name}: {model}, split {said['split'] or 'all'}"


def _identity(result: Result) -> dict[str, Any]:
    content = result.content
    origins = content.get("origins")
    identity = content.get("identity")
    # Results of earlier versions name the checkpoint in their identity alone.
    mark = content.get("checkpoint") or (identity.get("model") if isinstance(identity, dict) else "") or ""
    origin = origins.get(mark, {}) if isinstance(origins, dict) else {}
    return {
        "model": content.get("model") or "",
        "given": origin.get("given", ""),
        "checkpoint": mark,
        "split": content.get("split"),
        "fingerprint": content.get("fingerprint"),
    }


def _figures(result: Result, metric: str) -> tuple[str, str, str, str]:
    interval, baseline = result.interval(metric), result.baseline(metric)
    return (
        metric,
        _value(result.metrics[metric]),
        "" if interval is None else f"[{_value(interval[0])}, {_value(interval[1])}]",
        "" if baseline is None else _value(baseline),
    )


def _value(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _difference(value: float, interval: Any, verdict: str, paired: bool) -> str:
    if interval is None:
        return f"{value:+.2f}"
    apart = "" if paired else " ~"
    return f"{value:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}] {verdict}{apart}"
