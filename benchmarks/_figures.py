"""Bootstrapping on real photographs: figures, tables and targets of the draws.

`measure`, the figures of a judge and the headroom of a row live here. The steps do not (`_photographs.py`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from _form import Record
from _photographs import (
    FAMILIES,
    JUDGE,
    JUDGED,
    METRICS,
    PRECISIONS,
    QUICK,
    ROWS,
    Draw,
    Parts,
    Protocol,
    precision_name,
    run_draw,
)
from _recipes import for_seeds, spread

from capfilt.calibration.share import calibration_error
from capfilt.errors import UserError
from capfilt.tasks.filter_quality import at_threshold, roc_auc
from capfilt.tasks.intervals import RESAMPLES, Headroom, bootstrap_means, headroom, percentile_interval

TARGETS: Mapping[str, Sequence[tuple[str, str, float]]] = {
    "clip": (),
    "locked": (
        ("auc", ">=", 0.955),
        ("share error", "<=", 0.03),
        ("ece", "<=", 0.03),
        ("kept true", ">=", 0.85),
        ("precision", ">=", 0.83),
        ("precision shortfall", "<=", 0.03),
        ("headroom", ">=", 0.7),
        ("recalls above every trivial row", ">=", 3),
    ),
    "blip": (("headroom", ">=", 0.5), ("recalls above every trivial row", ">=", 3)),
}
"""Figures that a family must reach, as means over the draws."""


def protocol_of(args: argparse.Namespace) -> Protocol:
    """The protocol that the options describe. UserError for a row without which there is no judge or no headroom."""
    family = FAMILIES[args.family]
    rows = tuple(dict.fromkeys(args.rows or family.rows or ROWS))
    absent = {JUDGE, "oracle", *(ROWS[row].like for row in rows if ROWS[row].like)} - {*rows}
    if absent:
        raise UserError(f"--rows {' '.join(rows)}: judge and headroom need {' and '.join(sorted(absent))}")
    quick = args.quick
    return Protocol(
        data=args.data,
        family=args.family,
        human=max(args.human, 0.4) if quick else args.human,
        wrong=args.wrong,
        truncated=args.truncated,
        file_name=args.file_name,
        rows=rows,
        grid=tuple(map(_trial, args.grid)) or (QUICK if quick else family.grid),
        quick=quick,
    )


def _trial(text: str) -> tuple[int, float]:
    steps, _, rate = text.partition(":")
    try:
        return int(steps), float(rate)
    except ValueError as error:
        raise UserError(f"--grid {text}: write STEPS:RATE, such as 400:1e-3") from error


def measure(args: argparse.Namespace, record: Record) -> None:
    """All draws, then means and spreads, the judge's figures and the headroom of every row."""
    protocol = protocol_of(args)
    count = 1 if args.quick else args.seeds
    draws = for_seeds(args, count, partial(run_draw, protocol=protocol))
    if any(draw.keys != draws[0].keys for draw in draws):
        raise UserError(f"--data {args.data}: the draws have other test pictures; give another --workspace")
    lines = [
        *rows_table(draws, record, args.seed),
        "",
        *judge_table(draws, record),
        "",
        *changes_table(draws, record),
    ]
    print("\n".join(lines if args.markdown else plain(lines)))
    record.target("rows measured", sum(len(draw.rows) for draw in draws), "==", len(protocol.rows) * count)
    if not args.quick:
        for name, comparison, limit in TARGETS[protocol.family]:
            record.target(name, record.figures[name], comparison, limit)


def rows_table(draws: Sequence[Draw], record: Record, seed: int) -> list[str]:
    """The rows' table in Markdown; every figure of it goes into the record."""
    names = [
        *METRICS,
        "sum",
        *(["cider"] if all("cider" in _metrics(draw, "oracle") for draw in draws) else []),
    ]
    recovered, of_both = recovery(draws, seed), recovery(draws, seed, both=True)
    heads = [
        "trained on",
        "steps, rate",
        *(each.upper() if "@" in each else each for each in names),
        "headroom",
        "on val and test",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in draws[0].rows:
        cells = []
        for name in names:
            mean, deviation = spread([_metrics(draw, row)[name] for draw in draws])
            record.figure(f"{row} {name}", mean)
            record.figure(f"{row} {name} spread", deviation)
            cells.append(f"{mean:.1f} +- {deviation:.1f}")
        found = recovered[row]
        for name in ("value", "low", "high"):
            record.figure(f"{row} headroom {name}".removesuffix(" value"), getattr(found, name))
        trials = "; ".join(f"{draw.rows[row].trial.steps}, {draw.rows[row].trial.rate:g}" for draw in draws)
        record.figure(f"{row} headroom on val and test", of_both[row].value)
        cells += [_shown(found), _shown(of_both[row])]
        lines.append(f"| {ROWS[row].title} | {trials} | {' | '.join(cells)} |")
    curated = [row for row in draws[0].rows if not (ROWS[row].trivial or ROWS[row].like or row == "oracle")]
    if curated:
        # The val split says which curated row stands for curation, as it chose each row's steps.
        best = max(curated, key=lambda row: sum(_sum(draw.rows[row].val).mean() for draw in draws))
        record.figure("headroom", recovered[best].value)
        lines += ["", f"Curated, by the val split: {ROWS[best].title}. Above the best trivial row by:"]
        beyond = 0
        for name, (value, low, high) in above(draws, best, seed).items():
            for end, number in (("", value), (" low", low), (" high", high)):
                record.figure(f"above trivial {name}{end}", number)
            beyond += low > 0
            lines[-1] += f" {name.upper()} {value:.1f} [{low:.1f}, {high:.1f}]"
        record.figure("recalls above every trivial row", beyond)
    record.figure("oracle above trivial", recovered["oracle"].gap)
    record.figure("oracle above trivial, in standard errors", recovered["oracle"].separation)
    for name in draws[0].seconds:
        record.figure(f"{name} seconds", spread([draw.seconds[name] for draw in draws])[0])
    return lines


def recovery(draws: Sequence[Draw], seed: int, both: bool = False) -> dict[str, Headroom]:
    """Every row's headroom, over the best trivial row; test pictures are resampled once for all draws, or test and val ones."""

    def figures(row: str) -> list[Parts]:
        found = [draw.rows[row] for draw in draws]
        return [
            _sum(np.concatenate([each.pictures, each.val], axis=1) if both else each.pictures)
            for each in found
        ]

    rows = {row: [np.stack(figures(row))] for row in draws[0].rows}
    keys = [*draws[0].keys, *(draws[0].val_keys if both else ())]
    return headroom(rows, [keys], [row for row in rows if ROWS[row].trivial], seed=seed)


def _sum(pictures: Parts) -> Parts:
    """Each picture's part of the sum of the recalls, [N]."""
    out: Parts = pictures.sum(axis=0)
    return out


def _shown(found: Headroom) -> str:
    return "n/a" if math.isnan(found.value) else f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def above(draws: Sequence[Draw], row: str, seed: int) -> dict[str, tuple[float, float, float]]:
    """By recall, by how much the row is above the best trivial row of that recall, and its interval as that of `recovery`."""
    names = [row, *(each for each in draws[0].rows if ROWS[each].trivial)]
    found = {}
    for place, metric in enumerate(METRICS):
        values = [np.mean([draw.rows[name].pictures[place] for draw in draws], axis=0) for name in names]
        means, drawn = bootstrap_means(values, np.arange(len(values[0])), resamples=RESAMPLES, seed=seed)
        gaps = drawn[:, 0] - drawn[:, 1:].max(axis=1)
        interval = percentile_interval(float(means[0] - means[1:].max()), gaps, 0.95)
        found[metric] = (interval.value, interval.low, interval.high)
    return found


def _metrics(draw: Draw, row: str) -> dict[str, float]:
    found = draw.rows[row]
    return {**found.metrics, "sum": float(_sum(found.pictures).mean())}


def judge_table(draws: Sequence[Draw], record: Record) -> list[str]:
    """The judge's table in Markdown, a column per draw; means go into the record."""
    found = [judge_figures(draw.texts[JUDGED]) for draw in draws]
    lines = [
        f"| judge | {' | '.join(f'draw {n}' for n in range(len(draws)))} | mean |",
        "|---" * (len(draws) + 2) + "|",
    ]
    for name in found[0]:
        values = [each[name] for each in found]
        mean, deviation = spread(values)
        record.figure(name, mean)
        record.figure(f"{name} spread", deviation)
        lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} | {mean:.3f} |")
    return lines


def changes_table(draws: Sequence[Draw], record: Record) -> list[str]:
    """One change a row, in Markdown: ranking, error of the share, and the headroom that `rows_table` recorded."""
    lines = ["| web pairs drawn | ROC-AUC | error of the share | headroom |", "|---|---|---|---|"]
    for row in draws[0].rows:
        scores = ROWS[row].scores
        if not scores:
            continue
        found = [judge_figures(draw.texts[scores]) for draw in draws]
        area, error = (spread([each[name] for each in found])[0] for name in ("auc", "share error"))
        record.figure(f"{row} auc", area)
        record.figure(f"{row} share error", error)
        recovered = record.figures[f"{row} headroom"]
        lines.append(f"| {ROWS[row].title} | {area:.3f} | {error:.3f} | {recovered:.2f} |")
    return lines


def judge_figures(texts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """A judge's figures over web texts whose truth is known: shares and areas in [0, 1].

    Truncated texts and file names are told apart: neither true nor another image's, they are in no other figure.
    """
    plain = [each for each in texts if each["kind"] in ("true", "other_image")]
    true = np.array([each["kind"] == "true" for each in plain])
    judged = np.array([each["probability"] for each in plain], dtype=np.float64)
    cut = at_threshold(judged, true, 0.5)
    found = {
        "auc": roc_auc(judged, true),
        "share planted": float(true.mean()),
        "share estimated": float(judged.mean()),
        "share error": abs(float(judged.mean() - true.mean())),
        "ece": calibration_error(judged, true),
        "kept true": cut.kept_true,
        "precision": cut.precision,
    }
    for asked in PRECISIONS:
        kept = np.array([each[precision_name(asked)] for each in plain])
        found[f"precision at {asked:g}"] = float(true[kept].mean()) if kept.any() else math.nan
        found[f"kept true at {asked:g}"] = float(kept[true].mean())
    # NaN, which meets no target, where a precision keeps nothing.
    short = [asked - found[f"precision at {asked:g}"] for asked in PRECISIONS]
    found["precision shortfall"] = float(np.clip(short, 0.0, None).max())
    for kind in ("truncated", "file_name"):
        of_kind = [each["probability"] >= 0.5 for each in texts if each["kind"] == kind]
        if of_kind:
            found[f"kept {kind}"] = float(np.mean(of_kind))
    return found


def plain(lines: Sequence[str]) -> list[str]:
    """Markdown tables as columns for a terminal."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")
    ]
    widths = [
        max((len(row[n]) for row in rows if len(row) > max(1, n)), default=0)
        for n in range(max(map(len, rows)))
    ]
    return ["  ".join(f"{cell:<{widths[n]}}" for n, cell in enumerate(row)).rstrip() for row in rows]
