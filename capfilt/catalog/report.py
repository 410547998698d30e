"""The report: one HTML file about a workspace that asks for nothing outside itself.

Everything read from tables, logs and results is data: text becomes markup only through `html.py`, pictures reach the
page only as JPEGs encoded here. Pixels are read for the sampled rows alone. What the numbers are is in `funnel.py`,
`artefacts.py` and the views; how charts are drawn is in `plots.py`.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from capfilt.catalog.html import Html, element, join, section, table
from capfilt.catalog.plots import (
    CURVE_COLOURS,
    Curve,
    Reference,
    curves,
    histogram,
    share,
    stacked_bar,
)
from capfilt.catalog.views import open_catalog
from capfilt.catalog.yields import yield_section
from capfilt.data.images import BadImage, decode, encode_jpeg
from capfilt.errors import RunError, UserError
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

_CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(
    workspace: Workspace,
    out_path: Path | str,
    runs_dir: Path | str | None = None,
    rules: Sequence[str] | None = None,
) -> None:
    """Write the report on `workspace` to `out_path`, replacing an older one in one step.

    The same workspace gives the same bytes: samples are chosen by a hash of their image_id, and the date is that of the
    newest shard. Sections for which there is nothing yet are left out.

    Args:
        workspace: the workspace.
        out_path: the HTML file.
        runs_dir: directory of the evaluations' JSON files; default: `runs/` of the workspace.
        rules: names of the verdicts parts to show; default: all.

    Raises:
        UserError: when there is no such workspace, nothing in it, no such rule, or a part does not agree with its
            manifests.
        RunError: when a shard cannot be read or the file cannot be written.
    """
    page = render(workspace, Path(runs_dir) if runs_dir is not None else workspace.path / "runs", rules)
    path = Path(out_path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, page.encode("utf-8"))
    except OSError as error:
        raise RunError(f"{path}: the report could not be written ({error.strerror or error})") from error


def render(workspace: Workspace, runs_dir: Path, rules: Sequence[str] | None = None) -> str:
    """The report as text; see `write_report`."""
    if not workspace.path.is_dir():
        raise UserError(f"{workspace.path}: no such directory; name the workspace with --workspace")
    found = accounts(workspace)
    models = list(read_models(workspace.path / "models"))
    runs = list(read_runs(runs_dir))
    summary = read_json(workspace.path / "summary.json")
    if not (found or models or runs or summary):
        raise UserError(
            f"{workspace.path}: holds no parts, models or runs; run a stage first, or name the workspace"
        )
    chosen = _chosen_rules(found, rules)
    names = _names(found, models, runs)
    scorers = [account for account in found if account.table == "scores"]
    judged = any(account.table == "verdicts" for account in found)
    with open_catalog(workspace, found) as connection:
        try:
            sections: list[Html] = [
                _summary_section(summary),
                _funnel_section(found),
                yield_section(connection, found),
                *(_rule_section(connection, account) for account in chosen),
                *(_scorer_section(connection, account) for account in scorers if not judged),
            ]
            tiles = _tiles(connection, found, chosen)
        except duckdb.Error as error:
            # Manifests vouch for a file's end; what lies before it is read here first.
            message = " ".join(visible(str(error)).split())
            raise RunError(
                f"{workspace.path}: a shard could not be read ({message}); `capfilt doctor --verify` names it"
            ) from error
    sections += [_curves_section(models), _runs_section(runs), _lineage_section(found, models, runs, names)]
    return _page(workspace, found, tiles, sections)


def _page(workspace: Workspace, found: Sequence[Account], tiles: Html, sections: Iterable[Html]) -> str:
    name = workspace.path.resolve().name
    dates = [account.finished for account in found if account.finished]
    newest = f"newest shard of {max(dates):%Y-%m-%d %H:%M} UTC" if dates else "no shard yet"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_CSP}">'),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{name}: capfilt report"),
        Html(f"<style>{Path(__file__).with_name('report.css').read_text(encoding='utf-8')}</style>"),
    )
    lead = element("p", f"capfilt report, {newest}", class_="lead")
    body = element("body", element("main", element("header", element("h1", name), lead, tiles), *sections))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _legend(*kinds: str) -> Html:
    return element(
        "div",
        *(element("span", element("i", class_=f"swatch {kind}"), kind) for kind in kinds),
        class_="legend",
    )


# -- at a glance ---------------------------------------------------------------------------------------------


def _tiles(
    connection: duckdb.DuckDBPyConnection, found: Sequence[Account], chosen: Sequence[Account]
) -> Html:
    tiles: list[tuple[str, str]] = []
    images = [account for account in found if account.table == "images"]
    if images:
        asked = sum(account.counts.rows_in for account in images)
        kept = sum(account.counts.kept for account in images)
        tiles += [(f"{asked:,}", "images asked for"), (share(kept, asked), "of them usable")]
    written = sum(account.counts.kept for account in found if account.table == "captions")
    if written:
        tiles.append((f"{written:,}", "images captioned"))
    if chosen:
        rule = chosen[0].part.name
        rows = connection.execute(
            "SELECT source, count(*), count(*) FILTER (WHERE keep) FROM verdicts WHERE rule = ? GROUP BY source",
            [rule],
        ).fetchall()
        counts = {source: (texts, kept) for source, texts, kept in rows}
        suffix = f" by {rule}" if len(chosen) > 1 else ""
        for source in SOURCES:
            if source in counts:
                texts, kept = counts[source]
                tiles.append((share(kept, texts), f"of {texts:,} {source} texts kept{suffix}"))
    for account in found:
        if account.table == "pairs" and account.part.name in {rule.part.name for rule in chosen}:
            tiles.append((f"{account.rows_out:,}", f"images in the corpus {account.part.name}"))
    if not tiles:
        return Html("")
    boxes = (element("div", element("b", big), element("span", small), class_="tile") for big, small in tiles)
    return element("div", *boxes, class_="tiles")


def _summary_section(summary: Mapping[str, Any]) -> Html:
    """The headline figures of a `summary.json`: noise, filter, captioner, and the models side by side."""
    children: list[Html] = []
    evaluation = summary.get("evaluation")
    if isinstance(evaluation, Mapping):
        children.append(_evaluation_table(evaluation))
    boxes = []
    for key in ("noise", "filter", "captioner"):
        figures = list(shown_figures(summary.get(key)))
        if figures:
            rows = [(name or "rate", shown) for name, shown in figures]
            boxes.append(element("figure", element("h3", key.capitalize()), table((), rows, numeric=(1,))))
    if boxes:
        children.append(element("div", *boxes, class_="charts"))
    return section("Summary", *children) if children else Html("")


def _evaluation_table(evaluation: Mapping[str, Any]) -> Html:
    """Models by metric, the best of each column bold; the metrics of a summary are all better when higher."""
    models = {name: metrics for name, metrics in evaluation.items() if isinstance(metrics, Mapping)}
    columns = list(
        dict.fromkeys(
            key for metrics in models.values() for key, value in metrics.items() if is_number(value)
        )
    )
    if not columns:
        return Html("")
    best = {
        key: max(metrics[key] for metrics in models.values() if is_number(metrics.get(key)))
        for key in columns
    }

    def cell(metrics: Mapping[str, Any], key: str) -> Html | str:
        value: Any = metrics.get(key)
        if not is_number(value):
            return "–"
        shown = f"{value:.1f}" if max(abs(best[key]), abs(value)) >= 10 else number(value)
        return element("b", shown) if value == best[key] and len(models) > 1 else shown

    rows = [
        (name.replace("_", " "), *(cell(metrics, key) for key in columns)) for name, metrics in models.items()
    ]
    shown = table(("trained on", *columns), rows, numeric=range(1, len(columns) + 1), class_="narrow")
    return element("div", element("h3", "Evaluation"), shown)


# -- funnel --------------------------------------------------------------------------------------------------


def _funnel_section(found: Sequence[Account]) -> Html:
    if not found:
        return Html("")
    most = max(account.counts.rows_in for account in found)
    rows: list[Html] = []
    for account in found:
        rows += _funnel_rows(account, most)
    headers = ("stage", "part", "rows in", "kept", "dropped", "failed", "rows out", "")
    head = element(
        "tr",
        *(element("th", name, class_="n" if 2 <= place <= 6 else None) for place, name in enumerate(headers)),
    )
    return section(
        "Funnel",
        element(
            "p",
            "What each stage did with its input rows: rows in = kept + dropped + failed. Bars share one scale.",
            class_="quiet",
        ),
        _legend("kept", "dropped", "failed"),
        element(
            "div",
            element("table", element("thead", head), element("tbody", *rows), class_="lines"),
            class_="scroll",
        ),
    )


def _funnel_rows(account: Account, most: int) -> Iterator[Html]:
    counts = account.counts
    dropped, failed = sum(counts.dropped.values()), sum(counts.failed.values())
    reasons = [item for item in account.outcomes() if item[1] is not None]
    bar = stacked_bar([("kept", counts.kept), ("dropped", dropped), ("failed", failed)], most or 1)
    cells = [
        element("td", account.stage),
        element("td", f"{account.table}/{account.part.name}"),
        *(
            element("td", f"{value:,}", class_="n")
            for value in (counts.rows_in, counts.kept, dropped, failed, account.rows_out)
        ),
        element("td", bar, class_="wide"),
    ]
    yield element("tr", *cells, class_="parthead" if reasons else None)
    for place, (outcome, reason, rows) in enumerate(reasons):
        known = 0 if outcome == "missing" or rows is None else rows
        cells = [
            element("td", element("i", class_=f"swatch {outcome}"), outcome),
            element("td", f"{reason}, {share(known, counts.rows_in)}" if known else reason, colspan="3"),
            element("td", f"{known:,}" if outcome == "dropped" else "", class_="n"),
            element("td", f"{known:,}" if outcome == "failed" else "", class_="n"),
            element("td"),
            element("td", stacked_bar([(outcome, known)], most or 1), class_="wide"),
        ]
        yield element("tr", *cells, class_="reason last" if place == len(reasons) - 1 else "reason")


# -- scores and samples --------------------------------------------------------------------------------------


def _chosen_rules(found: Sequence[Account], rules: Sequence[str] | None) -> list[Account]:
    known = {account.part.name: account for account in found if account.table == "verdicts"}
    if rules is None:
        return list(known.values())
    for rule in rules:
        if rule not in known:
            raise UserError(
                f"rule {rule!r}: no verdicts part of that name; there is {', '.join(known) or 'none'}"
            )
    return [known[rule] for rule in dict.fromkeys(rules)]


def _rule_section(connection: duckdb.DuckDBPyConnection, account: Account) -> Html:
    rule = account.part.name
    options = account.identity.get("options")
    by = options.get("by") if isinstance(options, Mapping) else None
    score = by if by in account.part.contract.score_names else _SCORE
    cut = account.identity.get("threshold") if by in (None, score) else None
    if not is_number(cut):
        row = connection.execute(
            f'SELECT min("{score}") FILTER (WHERE keep) FROM verdicts WHERE rule = ?',  # noqa: S608 - a column of the part
            [rule],
        ).fetchone()
        cut = row[0] if row and by in (None, score) else None
    parts = [f"Texts are judged by {by or score}"]
    if isinstance(options, Mapping) and options.get("keep_fraction"):
        parts.append(
            f"keeping the best {share(options['keep_fraction'], 1)} of the scored texts that may be kept"
        )
    if cut is not None:
        parts.append(f"kept from {number(cut)}")
    figures = _histograms(
        connection,
        score,
        cut,
        f'SELECT source, keep, "{score}" AS score FROM verdicts WHERE rule = ?',  # noqa: S608 - as above
        [rule],
    )
    return section(
        f"Scores and samples: {rule}",
        element("p", ", ".join(parts) + ".", class_="quiet"),
        _legend("kept", "dropped"),
        figures,
        _source_table(connection, rule, score),
        *_sample_groups(connection, rule, score),
    )


def _scorer_section(connection: duckdb.DuckDBPyConnection, account: Account) -> Html:
    score = next(iter(account.part.contract.further), _SCORE)
    figures = _histograms(
        connection,
        score,
        None,
        f'SELECT source, true AS keep, "{score}" AS score FROM texts JOIN scores USING (text_id) '  # noqa: S608 - as above
        "WHERE scorer = ?",
        [account.part.name],
    )
    return section(
        f"Scores: {account.part.name}", element("p", "Nothing is selected yet.", class_="quiet"), figures
    )


def _histograms(
    connection: duckdb.DuckDBPyConnection, score: str, cut: float | None, rows: str, parameters: list[Any]
) -> Html:
    """One histogram per source of the texts, all over the same range of scores."""
    low, high = 0.0, 1.0
    finite = f"SELECT * FROM ({rows}) WHERE isfinite(score)"  # noqa: S608 - the callers' own text, values are bound
    if score != "itm_score":
        row = connection.execute(f"SELECT min(score), max(score) FROM ({finite})", parameters).fetchone()  # noqa: S608
        if row and row[0] is not None:
            low, high = math.floor(row[0] * 20) / 20, math.ceil(row[1] * 20 + 1e-9) / 20
            high = max(high, low + 0.05)
    counted = connection.execute(
        "SELECT source, keep, CAST(greatest(0, least(? - 1, floor((score - ?) / (? - ?) * ?))) AS INTEGER) AS bin, "  # noqa: S608
        f"count(*) FROM ({finite}) GROUP BY ALL",
        [HISTOGRAM_BINS, low, high, low, HISTOGRAM_BINS, *parameters],
    ).fetchall()
    figures = []
    for source in SOURCES:
        kept, dropped = [0] * HISTOGRAM_BINS, [0] * HISTOGRAM_BINS
        for text_source, keep, place, count in counted:
            if text_source == source:
                (kept if keep else dropped)[place] += count
        total = sum(kept) + sum(dropped)
        if total:
            title = element("h4", f"{source} texts")
            caption = element(
                "figcaption", f"{score} of {total:,} {source} texts, {share(sum(kept), total)} kept"
            )
            if cut is None:
                caption = element("figcaption", f"{score} of {total:,} {source} texts")
            chart = histogram(kept, dropped, low, high, cut, f"histogram of {score} of {source} texts")
            figures.append(element("figure", title, chart, caption))
    return element("div", *figures, class_="charts large") if figures else Html("")


def _source_table(connection: duckdb.DuckDBPyConnection, rule: str, score: str) -> Html:
    totals = connection.execute(
        f'SELECT source, count(*), count(*) FILTER (WHERE keep), median("{score}") FROM verdicts '  # noqa: S608
        "WHERE rule = ? GROUP BY source",
        [rule],
    ).fetchall()
    reasons: dict[str, list[tuple[str, int]]] = {}
    for source, reason, count in connection.execute(
        "SELECT source, reason, count(*) FROM verdicts WHERE rule = ? AND NOT keep GROUP BY ALL ORDER BY 3 DESC, 2",
        [rule],
    ).fetchall():
        reasons.setdefault(source, []).append((reason, count))
    rows = [
        (
            source,
            f"{texts:,}",
            f"{kept:,}",
            share(kept, texts),
            "–" if median is None else number(round(median, 4)),
            ", ".join(f"{reason} {count:,}" for reason, count in reasons.get(source, [])),
        )
        for source, texts, kept, median in sorted(totals, key=lambda row: _source_place(row[0]))
    ]
    headers = ("source", "texts", "kept", "share", f"median {score}", "not kept because")
    return table(headers, rows, numeric=(1, 2, 3, 4), class_="narrow")


def _source_place(source: str) -> int:
    return SOURCES.index(source) if source in SOURCES else len(SOURCES)


@dataclass
class _Sample:
    """A sampled image: the verdicts on its texts as (source, text, score, keep, reason)."""

    image_id: str
    texts: list[tuple[str, str | None, float | None, bool, str]] = field(default_factory=list)


def _sample_groups(connection: duckdb.DuckDBPyConnection, rule: str, score: str) -> Iterator[Html]:
    """Images by what became of their web and synthetic texts, a few of each (BLIP, arXiv 2201.12086, figure 4)."""
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
    samples = {image: _Sample(image) for _, _, _, images in groups for image in images}
    chosen = list(samples)
    for image, *text in connection.execute(
        f'SELECT image_id, source, text, "{score}", keep, reason FROM verdicts '  # noqa: S608 - as above
        f'WHERE rule = ? AND image_id IN (SELECT unnest(?)) ORDER BY image_id, "{score}" DESC NULLS LAST, text_id',
        [rule, chosen],
    ).fetchall():
        samples[image].texts.append((text[0], text[1], text[2], text[3], text[4]))
    pictures = _pictures(connection, chosen)
    if groups:
        yield element("h3", "Samples")
    for web, synthetic, count, images in groups:
        pair = (("web", web), ("synthetic", synthetic))
        said = [f"{source} {'kept' if kept else 'dropped'}" for source, kept in pair if kept is not None]
        noun = "image" if count == 1 else "images"
        yield element("h4", ", ".join(said), " ", element("span", f"{count:,} {noun}", class_="quiet"))
        cards = (_card(samples[image], pictures.get(image)) for image in images)
        yield element("div", *cards, class_="samples")


def _pictures(connection: duckdb.DuckDBPyConnection, images: Sequence[str]) -> dict[str, Html]:
    """An <img> for each image whose picture can be decoded, else what is wrong with it."""
    rows = connection.execute(
        "SELECT image_id, any_value(image.bytes) FROM raw.images WHERE image_id IN (SELECT unnest(?)) "
        "GROUP BY image_id",
        [list(images)],
    ).fetchall()
    return {image: _thumbnail(data) for image, data in rows if data is not None}


def _thumbnail(data: bytes) -> Html:
    try:
        picture = decode(data, draft_size=THUMBNAIL_PIXELS)
    except BadImage as error:
        return element("span", str(error))
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    # Encoded anew, so that bytes of the web never reach the browser's own decoders.
    text = base64.b64encode(encode_jpeg(picture, THUMBNAIL_QUALITY)).decode()
    small = max(picture.size) <= THUMBNAIL_PIXELS // 2
    return element("img", src=f"data:image/jpeg;base64,{text}", alt="", class_="small" if small else None)


def _card(sample: _Sample, picture: Html | None) -> Html:
    texts: list[Html] = []
    left_out = 0
    for source in sorted({text[0] for text in sample.texts}, key=lambda name: (_source_place(name), name)):
        own = [text for text in sample.texts if text[0] == source]
        left_out += max(0, len(own) - TEXTS_PER_SOURCE)
        texts += [_text(*text) for text in own[:TEXTS_PER_SOURCE]]
    more = element("div", f"{left_out:,} more", class_="more") if left_out else ""
    shown = picture if picture is not None else element("span", "the picture is not in this workspace")
    return element("article", element("div", shown, class_="picture"), *texts, more, class_="sample")


def _text(source: str, text: str | None, score: float | None, keep: bool, reason: str) -> Html:
    mark = element("span", "✓" if keep else "✗", class_="mark")
    value = reason if score is None else f"{score:.3f}"
    words = element("span", shortened(text, LONGEST_TEXT) if text else "no text", class_="what", dir="auto")
    who = element("div", element("span", mark, f" {source}"), element("span", value), class_="who")
    return element("div", who, words, class_="text yes" if keep else "text no", title=reason)


# -- models and runs -----------------------------------------------------------------------------------------


def _curves_section(models: Sequence[Model]) -> Html:
    """One chart per figure, one curve per model."""
    drawn = [model for model in models if model.series]
    if not drawn:
        return Html("")
    figures = []
    keys = dict.fromkeys(key for model in drawn for key in model.series)
    for key in sorted(keys, key=_figure_place):
        lines = [
            Curve(model.name, model.series[key], place)
            for place, model in enumerate(drawn)
            if key in model.series
        ]
        reference = _PRIOR if key == "itm" else None
        chart = curves(lines, f"{key} by step", "step", reference)
        figures.append(element("figure", element("h4", key), chart))
    legend = [
        element(
            "span",
            element("i", class_=f"key c{place % CURVE_COLOURS}{' dash' if place >= CURVE_COLOURS else ''}"),
            model.name,
        )
        for place, model in enumerate(drawn)
    ]
    warnings = [
        element("p", f"{model.name}: {warning}", class_="warning")
        for model in drawn
        for warning in model.extra.get("warnings") or ()
    ]
    return section(
        "Learning curves",
        element("div", *legend, class_="legend"),
        *warnings,
        element("div", *figures, class_="charts"),
    )


def _figure_place(key: str) -> tuple[int, str]:
    first = ("loss", "itc", "itm", "lm", "itm_accuracy")
    return (first.index(key) if key in first else len(first), key)


def _runs_section(runs: Sequence[Run]) -> Html:
    if not runs:
        return Html("")
    names = dict.fromkeys(name for run in runs for name in run.figures)
    rows = [(name, *(run.figures.get(name, "–") for run in runs)) for name in names]
    shown = table(("", *(run.name for run in runs)), rows, numeric=range(1, len(runs) + 1), class_="narrow")
    return section("Evaluations", shown)


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


@dataclass(frozen=True)
class _Made:
    """An output of a stage, as one row of the lineage."""

    name: str
    stage: str
    holds: str
    seconds: float
    fingerprint: str
    identity: Mapping[str, Any]


def _lineage_section(
    found: Sequence[Account], models: Sequence[Model], runs: Sequence[Run], names: Mapping[str, str]
) -> Html:
    made = [
        _Made(
            f"{account.table}/{account.part.name}",
            account.stage,
            f"{account.rows_out:,} rows, {_bytes(account.size)}",
            account.seconds,
            account.fingerprint,
            account.identity,
        )
        for account in found
    ]
    for model in models:
        if "stage" in model.extra:
            figures = mapping(model.extra.get("figures"))
            steps, seconds = figures.get("steps"), figures.get("seconds")
            holds = f"{steps:,} steps" if isinstance(steps, int) else ""
            made.append(_other(f"models/{model.name}", model.extra, holds, seconds))
    made += [_other(f"runs/{run.name}", run.content, "", None) for run in runs if "stage" in run.content]
    if not made:
        return Html("")
    headers = ("output", "stage", "made from", "holds", "seconds", "fingerprint", "options")
    return section("Lineage", table(headers, [_lineage_row(row, names) for row in made], numeric=(4,)))


def _other(name: str, said: Mapping[str, Any], holds: str, seconds: Any) -> _Made:
    return _Made(
        name,
        str(said.get("stage", "")),
        holds,
        float(seconds) if is_number(seconds) else 0.0,
        str(said.get("fingerprint", "")),
        mapping(said.get("identity")),
    )


def _lineage_row(made: _Made, names: Mapping[str, str]) -> tuple[Html | str, ...]:
    inputs: dict[str, None] = {}
    options: list[Html] = []
    for name, values in leaves(made.identity):
        known = [names[value] for value in values if isinstance(value, str) and value in names]
        inputs |= dict.fromkeys(known)
        rest = [value for value in values if not (isinstance(value, str) and value in names)]
        if rest or not values:
            label = "code version" if name == "version" else name.removeprefix("options.")
            options += [element("dt", label), element("dd", ", ".join(map(_option, rest)) or "none")]
    count = len(options) // 2
    summary = element("summary", "1 value" if count == 1 else f"{count} values")
    return (
        made.name,
        made.stage,
        join([element("div", name) for name in inputs]) if inputs else element("span", "–", class_="quiet"),
        made.holds,
        number(round(made.seconds, 1)) if made.seconds else "",
        element("code", made.fingerprint[:12]),
        element("details", summary, element("dl", *options)) if options else "",
    )


def _option(value: Any) -> str:
    return shortened(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 200)


def _bytes(size: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB")
    place = 0
    while size >= 1000 and place < len(units) - 1:
        size, place = size / 1000, place + 1
    return f"{number(round(size, 1))} {units[place]}"
