"""The report: one HTML file about a workspace that asks for nothing outside itself.

Everything read from tables, logs and results is data: `report.html.jinja` makes the page of it, and pictures reach the
page only as JPEGs encoded here. Pixels are read for the sampled rows alone. What the numbers are is in `funnel.py`,
`yields.py`, `artefacts.py` and the views; how charts are drawn is in `plots.py`.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb

from capfilt.catalog.artefacts import (
    Model,
    Run,
    is_number,
    leaves,
    mapping,
    number,
    origins,
    read_json,
    read_models,
    read_runs,
    shown_figures,
)
from capfilt.catalog.funnel import Account, accounts
from capfilt.catalog.pages import template
from capfilt.catalog.plots import Curve, Reference, colour, curves, histogram, share, stacked_bar
from capfilt.catalog.views import open_catalog
from capfilt.catalog.yields import yields
from capfilt.data.images import BadImage, decode, encode_jpeg
from capfilt.errors import RunError, UserError
from capfilt.tables.calibrations import read as read_calibration
from capfilt.tables.contracts import SOURCES
from capfilt.tables.publish import replace
from capfilt.tables.visible import shortened, visible
from capfilt.tables.workspace import Workspace

HISTOGRAM_BINS = 50
SAMPLES_PER_GROUP = 6
TEXTS_PER_SOURCE = 2
THUMBNAIL_PIXELS = 240
THUMBNAIL_QUALITY = 80
LONGEST_TEXT = 220

_SCORE = "itm_score"
_PRIOR = Reference(0.6365, "knows only its prior: 0.6365")
"""ITM's cross-entropy for a head that always answers one match in three: -(1/3 ln 1/3 + 2/3 ln 2/3)."""


def write_report(workspace: Workspace, out_path: Path | str) -> None:
    """Write the report on `workspace` to the HTML file `out_path`, replacing an older one in one step.

    The same workspace gives the same bytes: samples are chosen by a hash of their image_id, and the date is that of the
    newest shard. Sections for which there is nothing yet are left out.

    Raises:
        UserError: when there is no such workspace, nothing in it, or a part does not agree with its manifests.
        RunError: when a shard cannot be read or the file cannot be written.
    """
    page = render(workspace)
    path = Path(out_path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, page.encode("utf-8"))
    except OSError as error:
        raise RunError(f"{path}: the report could not be written ({error.strerror or error})") from error


def render(workspace: Workspace) -> str:
    """The report as text; see `write_report`."""
    if not workspace.path.is_dir():
        raise UserError(f"{workspace.path}: no such directory; name the workspace with --workspace")
    found = accounts(workspace)
    models = list(read_models(workspace.path / "models"))
    runs = list(read_runs(workspace.path / "runs"))
    summary = read_json(workspace.path / "summary.json")
    if not (found or models or runs or summary):
        raise UserError(
            f"{workspace.path}: holds no parts, models or runs; run a stage first, or name the workspace"
        )
    verdicts = [account for account in found if account.table == "verdicts"]
    with open_catalog(workspace, found) as connection:
        try:
            rules_shown = [_rule(connection, account) for account in verdicts]
            yielded = list(yields(connection, found))
            scorers = [
                _scorer(connection, account)
                for account in found
                if account.table == "scores" and not verdicts
            ]
        except duckdb.Error as error:
            # Manifests vouch for a file's end; what lies before it is read here first.
            message = " ".join(visible(str(error)).split())
            raise RunError(
                f"{workspace.path}: a shard could not be read ({message}); `capfilt doctor --verify` names it"
            ) from error
    drawn = [model for model in models if model.series]
    page = template("report.html.jinja").render(
        name=workspace.path.resolve().name,
        newest=max((account.finished for account in found if account.finished), default=None),
        tiles=list(_tiles(found, rules_shown)),
        evaluation=_evaluation(mapping(summary.get("evaluation"))),
        figures=list(_summary_figures(summary)),
        found=found,
        yields=yielded,
        rules=rules_shown,
        scorers=scorers,
        calibrations=list(_calibrations(found)),
        drawn=drawn,
        curves=list(_curves(drawn)),
        runs=runs,
        run_figures=dict.fromkeys(name for run in runs for name in run.figures),
        lineage=list(_lineage(found, models, runs)),
        bar=stacked_bar,
        colour=colour,
        share=share,
        shortened=shortened,
        longest_text=LONGEST_TEXT,
    )
    return f"{page}\n"


# -- at a glance ---------------------------------------------------------------------------------------------


def _tiles(found: Sequence[Account], rules: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    images = [account for account in found if account.table == "images"]
    if images:
        asked = sum(account.counts.rows_in for account in images)
        kept = sum(account.counts.kept for account in images)
        yield f"{asked:,}", "images asked for"
        yield share(kept, asked), "of them usable"
    written = sum(account.counts.kept for account in found if account.table == "captions")
    if written:
        yield f"{written:,}", "images captioned"
    for source, texts, kept, *_ in rules[0]["sources"] if rules else ():
        if source in SOURCES:
            suffix = f" by {rules[0]['name']}" if len(rules) > 1 else ""
            yield share(kept, texts), f"of {texts:,} {source} texts kept{suffix}"
    for account in found:
        if account.table == "pairs" and account.part.name in {rule["name"] for rule in rules}:
            yield f"{account.rows_out:,}", f"images in the corpus {account.part.name}"


def _summary_figures(summary: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The headline figures of a `summary.json`, those of each key together."""
    for key in ("noise", "filter", "captioner"):
        if figures := list(shown_figures(summary.get(key))):
            yield key, figures


def _evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Models by metric; a cell is its text, and whether it is the best of several: higher is better in a summary."""
    models = {name: metrics for name, metrics in evaluation.items() if isinstance(metrics, Mapping)}
    columns: dict[str, list[Any]] = {}
    for metrics in models.values():
        for key, value in metrics.items():
            if is_number(value):
                columns.setdefault(key, []).append(value)

    def cell(key: str, value: Any) -> tuple[str, bool]:
        best = max(columns[key])
        if not is_number(value):
            return "–", False
        shown = f"{value:.1f}" if max(abs(best), abs(value)) >= 10 else number(value)
        return shown, value == best and len(models) > 1

    rows = [
        (name.replace("_", " "), [cell(key, metrics.get(key)) for key in columns])
        for name, metrics in models.items()
    ]
    return {"columns": list(columns), "rows": rows} if columns else {}


# -- scores and samples --------------------------------------------------------------------------------------


def _rule(connection: duckdb.DuckDBPyConnection, account: Account) -> dict[str, Any]:
    rule = account.part.name
    options = mapping(account.identity.get("options"))
    by = options.get("by")
    score = by if by in account.part.contract.score_names else _SCORE
    cut = account.identity.get("threshold") if by in (None, score) else None
    if not is_number(cut):
        row = connection.execute(
            f'SELECT min("{score}") FILTER (WHERE keep) FROM verdicts WHERE rule = ?',  # noqa: S608 - a column of the part
            [rule],
        ).fetchone()
        cut = row[0] if row and by in (None, score) else None
    rows = f'SELECT source, keep, "{score}" AS score FROM verdicts WHERE rule = ?'  # noqa: S608 - as above
    return {
        "name": rule,
        "by": by or score,
        "keep_fraction": options.get("keep_fraction"),
        "cut": cut,
        "score": score,
        "charts": list(_histograms(connection, score, cut, rows, rule)),
        "sources": _sources(connection, score, rule),
        "groups": list(_groups(connection, score, rule)),
    }


def _scorer(connection: duckdb.DuckDBPyConnection, account: Account) -> dict[str, Any]:
    score = next(iter(account.part.contract.further), _SCORE)
    rows = f'SELECT source, true AS keep, "{score}" AS score FROM texts JOIN scores USING (text_id) WHERE scorer = ?'  # noqa: S608
    name = account.part.name
    charts = list(_histograms(connection, score, None, rows, name))
    return {"name": name, "cut": None, "score": score, "charts": charts}


def _calibrations(found: Sequence[Account]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(part, calibration, reliability curve) of every scores part that has a probability."""
    for account in found:
        made = read_calibration(account.part) if account.table == "scores" else None
        if made is None:
            continue
        points = tuple((point["predicted"], point["observed"]) for point in made["curve"])
        lines = [Curve("calibration pairs", points, 0), Curve("perfect", ((0.0, 0.0), (1.0, 1.0)), 1)]
        label = f"observed share over predicted probability of {account.part.name}"
        yield account.part.name, made, curves(lines, label, "predicted probability")


def _histograms(
    connection: duckdb.DuckDBPyConnection, score: str, cut: float | None, rows: str, part: str
) -> Iterator[tuple[str, int, int, str]]:
    """(source, texts kept, texts, histogram) per source of the texts, all over the same range of scores."""
    low, high = 0.0, 1.0
    finite = f"SELECT * FROM ({rows}) WHERE isfinite(score)"  # noqa: S608 - the callers' own text, values are bound
    if score != "itm_score":
        row = connection.execute(f"SELECT min(score), max(score) FROM ({finite})", [part]).fetchone()  # noqa: S608
        if row and row[0] is not None:
            low, high = math.floor(row[0] * 20) / 20, math.ceil(row[1] * 20 + 1e-9) / 20
            high = max(high, low + 0.05)
    counted = connection.execute(
        "SELECT source, CAST(greatest(0, least(? - 1, floor((score - ?) / (? - ?) * ?))) AS INTEGER) AS bin, "  # noqa: S608
        f"count(*) FILTER (keep), count(*) FILTER (NOT keep) FROM ({finite}) GROUP BY ALL",
        [HISTOGRAM_BINS, low, high, low, HISTOGRAM_BINS, part],
    ).fetchall()
    for source in SOURCES:
        bins = {place: counts for found, place, *counts in counted if found == source}
        if bins:
            kept, dropped = zip(*(bins.get(place, (0, 0)) for place in range(HISTOGRAM_BINS)), strict=True)
            chart = histogram(kept, dropped, low, high, cut, f"histogram of {score} of {source} texts")
            yield source, sum(kept), sum(kept) + sum(dropped), chart


def _sources(connection: duckdb.DuckDBPyConnection, score: str, rule: str) -> list[tuple[Any, ...]]:
    """(source, texts, texts kept, median score, why the others were not kept) per source."""
    totals = connection.execute(
        f'SELECT source, count(*), count(*) FILTER (WHERE keep), median("{score}") FROM verdicts '  # noqa: S608
        "WHERE rule = ? GROUP BY source",
        [rule],
    ).fetchall()
    found = connection.execute(
        "SELECT source, string_agg(format('{} {:,}', reason, texts), ', ' ORDER BY texts DESC, reason) FROM ("
        "SELECT source, reason, count(*) AS texts FROM verdicts WHERE rule = ? AND NOT keep GROUP BY ALL) GROUP BY 1",
        [rule],
    ).fetchall()
    reasons = dict(found)
    return sorted(((*row, reasons.get(row[0], "")) for row in totals), key=_source_place)


def _source_place(row: Sequence[Any]) -> tuple[int, str]:
    """Where a row that begins with a source stands."""
    return (SOURCES.index(row[0]) if row[0] in SOURCES else len(SOURCES), row[0])


def _groups(
    connection: duckdb.DuckDBPyConnection, score: str, rule: str
) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    """(heading, images, samples of them) by what became of the images' web and synthetic texts.

    As in BLIP's figure 4 (arXiv 2201.12086).
    """
    groups = connection.execute(
        # Images that failed have nothing to show. Hashing makes the choice fair where ids are no hashes themselves.
        "WITH judged AS (SELECT image_id, bool_or(keep) FILTER (WHERE source = 'web') AS web, "
        "bool_or(keep) FILTER (WHERE source = 'synthetic') AS synthetic FROM verdicts WHERE rule = ? "
        "GROUP BY image_id) "
        "SELECT web, synthetic, count(*), arg_min(image_id, md5(image_id), ?) FROM judged "
        "WHERE coalesce(web, synthetic) IS NOT NULL "
        "AND image_id NOT IN (SELECT image_id FROM images WHERE status <> 'success') "
        "GROUP BY ALL ORDER BY web DESC NULLS LAST, synthetic DESC NULLS LAST",
        [rule, SAMPLES_PER_GROUP],
    ).fetchall()
    cards = dict(_cards(connection, score, rule, [image for *_, images in groups for image in images]))
    for web, synthetic, count, images in groups:
        pair = (("web", web), ("synthetic", synthetic))
        said = [f"{source} {'kept' if kept else 'dropped'}" for source, kept in pair if kept is not None]
        yield ", ".join(said), count, [cards[image] for image in images]


def _cards(
    connection: duckdb.DuckDBPyConnection, score: str, rule: str, images: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each image with its picture, the best of its texts, and how many are left out."""
    shown = connection.execute(
        "SELECT image_id, any_value(image.bytes) FROM raw.images WHERE image_id IN (SELECT unnest(?)) "
        "GROUP BY image_id",
        [images],
    ).fetchall()
    texts = connection.execute(
        "SELECT image_id, source, list({'source': source, 'text': text, 'keep': keep, 'reason': reason, "  # noqa: S608 - as above
        f'\'score\': "{score}"}} ORDER BY "{score}" DESC NULLS LAST, text_id) '
        "FROM verdicts WHERE rule = ? AND image_id IN (SELECT unnest(?)) GROUP BY image_id, source",
        [rule, images],
    ).fetchall()
    pictures = dict(shown)
    for image in images:
        own = [found for _, found in sorted((row[1:] for row in texts if row[0] == image), key=_source_place)]
        data = pictures.get(image)
        yield (
            image,
            {
                "picture": "the picture is not in this workspace" if data is None else _thumbnail(data),
                "texts": [text for found in own for text in found[:TEXTS_PER_SOURCE]],
                "left_out": sum(len(found[TEXTS_PER_SOURCE:]) for found in own),
            },
        )


def _thumbnail(data: bytes) -> dict[str, Any] | str:
    """The picture as base64 of a small JPEG; what is wrong with it, where it cannot be decoded."""
    try:
        picture = decode(data, draft_size=THUMBNAIL_PIXELS)
    except BadImage as error:
        return str(error)
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    # Encoded anew, so that bytes of the web never reach the browser's own decoders.
    text = base64.b64encode(encode_jpeg(picture, THUMBNAIL_QUALITY)).decode()
    return {"jpeg": text, "small": max(picture.size) <= THUMBNAIL_PIXELS // 2}


# -- models and runs -----------------------------------------------------------------------------------------


def _curves(drawn: Sequence[Model]) -> Iterator[tuple[str, str]]:
    """One chart per figure, one curve per model."""
    keys = dict.fromkeys(key for model in drawn for key in model.series)
    for key in sorted(keys, key=_figure_place):
        lines = [
            Curve(model.name, model.series[key], place)
            for place, model in enumerate(drawn)
            if key in model.series
        ]
        yield key, curves(lines, f"{key} by step", "step", _PRIOR if key == "itm" else None)


def _figure_place(key: str) -> tuple[int, str]:
    first = ("loss", "itc", "itm", "lm", "itm_accuracy")
    return (first.index(key) if key in first else len(first), key)


# -- lineage -------------------------------------------------------------------------------------------------


def _names(found: Sequence[Account], models: Sequence[Model], runs: Sequence[Run]) -> dict[str, str]:
    """What each fingerprint and digest of this workspace is the mark of."""
    names: dict[str, str] = {}
    # First, so that what stands in the workspace is called by its place there.
    for said in (*(a.part.info for a in found), *(m.extra for m in models), *(run.content for run in runs)):
        names |= dict(origins(said))
    for model in models:
        for mark in (model.fingerprint, str(model.extra.get("fingerprint", ""))):
            names[mark] = f"models/{model.name}"
    for account in found:
        name = f"{account.table}/{account.part.name}"
        names[account.part.digest()] = name
        names[account.fingerprint] = name
    names.pop("", None)
    return names


def _lineage(
    found: Sequence[Account], models: Sequence[Model], runs: Sequence[Run]
) -> Iterator[dict[str, Any]]:
    """Each output of a stage: what it was made from, and with which options."""
    names = _names(found, models, runs)
    for account in found:
        holds = f"{account.rows_out:,} rows, {_bytes(account.size)}"
        yield _made(account.name, account.part.info, names, holds, account.seconds)
    for model in models:
        if "stage" in model.extra:
            figures = mapping(model.extra.get("figures"))
            steps = figures.get("steps")
            holds = f"{steps:,} steps" if isinstance(steps, int) else ""
            yield _made(f"models/{model.name}", model.extra, names, holds, figures.get("seconds"))
    for run in runs:
        if "stage" in run.content:
            yield _made(f"runs/{run.name}", run.content, names)


def _made(
    name: str, said: Mapping[str, Any], names: Mapping[str, str], holds: str = "", seconds: Any = None
) -> dict[str, Any]:
    inputs: dict[str, None] = {}
    options: list[tuple[str, str]] = []
    for key, values in leaves(mapping(said.get("identity"))):
        known = [names[value] for value in values if isinstance(value, str) and value in names]
        inputs |= dict.fromkeys(known)
        rest = [value for value in values if not (isinstance(value, str) and value in names)]
        if rest or not values:
            label = "code version" if key == "version" else key.removeprefix("options.")
            options.append((label, ", ".join(map(_option, rest)) or "none"))
    return {
        "name": name,
        "stage": str(said.get("stage", "")),
        "inputs": list(inputs),
        "holds": holds,
        "seconds": seconds if is_number(seconds) else None,
        "fingerprint": str(said.get("fingerprint", "")),
        "options": options,
    }


def _option(value: Any) -> str:
    return shortened(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 200)


def _bytes(size: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB")
    place = 0
    while size >= 1000 and place < len(units) - 1:
        size, place = size / 1000, place + 1
    return f"{number(round(size, 1))} {units[place]}"
