"""What stands in a workspace beside its tables: checkpoints with their logs, results in `runs/`, `summary.json`.

Only JSON is read, never weights. A file that is torn or of another shape is passed over: it does not stop a report.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capfilt.tables.ids import file_sha256

Points = tuple[tuple[float, float], ...]

# Not figures of learning: the axis itself, clocks, counters and schedules that the options tell.
_NO_CURVES = frozenset({"step", "epoch", "seconds", "images_per_second", "skipped_steps", "alpha"})

_LONGEST_GIVEN = 80

_CHECKPOINT_FILES = ("config.json", "model.safetensors", "tokenizer.json")


@dataclass(frozen=True)
class Model:
    """A checkpoint's directory.

    Attributes:
        name: of the directory under `models/`.
        series: each figure of its `log.jsonl` as points (step, value) in order of the steps.
        extra: what its stage wrote into `config.json`: stage, fingerprint, identity, figures, warnings.
        fingerprint: of the checkpoint's files; "" where it is not told.
    """

    name: str
    series: Mapping[str, Points] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""


@dataclass(frozen=True)
class Run:
    """One result in `runs/`: its name, its flat figures as shown, and the whole object."""

    name: str
    figures: Mapping[str, str]
    content: Mapping[str, Any]


def read_models(directory: Path) -> Iterator[Model]:
    """The checkpoints in `directory` by name, those without a log and those still in training too."""
    if not directory.is_dir():
        return
    for child in sorted(directory.iterdir()):
        config = read_json(child / "config.json")
        log, extra = child / "log.jsonl", mapping(config.get("extra"))
        series = read_log(log)
        digest = mapping(config.get("files")).get(log.name)
        if series and digest and file_sha256(log) != digest:
            told = f"{log.name} changed since the checkpoint was written; its curves are left out"
            series, extra = {}, {**extra, "warnings": [*(extra.get("warnings") or ()), told]}
        if config or series:
            yield Model(child.name, series, extra, checkpoint_fingerprint(child))


def read_log(path: Path) -> dict[str, Points]:
    """Each numeric figure of a `log.jsonl` over its `step`."""
    series: dict[str, list[tuple[float, float]]] = {}
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                figures = json.loads(line)
            except ValueError:
                continue
            if not isinstance(figures, dict) or not is_number(figures.get("step")):
                continue
            for key, value in figures.items():
                if key not in _NO_CURVES and is_number(value):
                    series.setdefault(key, []).append((float(figures["step"]), float(value)))
    return {key: tuple(sorted(points)) for key, points in series.items()}


def read_runs(directory: Path) -> Iterator[Run]:
    """The results in `directory` that hold a number, by file name."""
    if not directory.is_dir():
        return
    for path in sorted(directory.glob("*.json")):
        content = read_json(path)
        metrics = content.get("metrics", content)
        if isinstance(metrics, Mapping):
            # Where a figure has an interval, that says all of it.
            intervals = mapping(content.get("intervals"))
            metrics = {name: _with_interval(value, intervals.get(name)) for name, value in metrics.items()}
        figures = dict(shown_figures(metrics))
        if figures:
            yield Run(str(content.get("name") or path.stem), figures, content)


def _with_interval(value: Any, interval: Any) -> Any:
    found = mapping(interval)
    whole = all(is_number(found.get(key)) for key in ("value", "low", "high"))
    return {key: found[key] for key in ("value", "low", "high")} if whole else value


def checkpoint_fingerprint(directory: Path) -> str:
    """What `capfilt.models.checkpoint.fingerprint` says of a checkpoint, or "" where that cannot be told.

    It believes the digests that the config carries, so no weights are hashed, and imports no torch. Other projects'
    layouts carry none: what was made with them says so itself (`origins`).
    """
    config = directory / _CHECKPOINT_FILES[0]
    files = mapping(read_json(config).get("files"))
    if not files:
        return ""
    digests = {**files, config.name: hashlib.sha256(config.read_bytes()).hexdigest()}
    # Of a model without a text side there is no tokenizer.
    lines = "".join(f"{name}:{digests[name]}\n" for name in _CHECKPOINT_FILES if name in digests)
    return hashlib.sha256(lines.encode()).hexdigest()


def origins(said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(mark, name) of the checkpoints and plug-ins that a part's description or a result says it was made with.

    The name is how each was given, its layout and the beginning of its fingerprint, as in `./blip (transformers, 1f0c...)`:
    what is outside of the workspace, or is no checkpoint of capfilt's, has no other.
    """
    for mark, origin in mapping(said.get("origins")).items():
        found = mapping(origin)
        given, layout = found.get("given"), found.get("layout")
        if isinstance(given, str) and isinstance(layout, str):
            # A plug-in's mark begins with its name, which is given already.
            fingerprint = mark.removeprefix(f"{given.partition(':')[0]}:")
            # Of a long path the end tells most.
            shown = given if len(given) <= _LONGEST_GIVEN else f"…{given[1 - _LONGEST_GIVEN :]}"
            yield mark, f"{shown} ({layout}, {fingerprint[:12]})"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` where it is a JSON object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number (true and false are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: float) -> str:
    """A number for people: thousands separated; a fraction has at most four significant digits and decimals."""
    if not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1e-3 <= abs(value) < 1e6:
        digits = max(0, min(4, 3 - math.floor(math.log10(abs(value)))))
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.3g}"


def shown_figures(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and text of each number in nested objects; an interval is one figure, `value [low, high]`."""
    if isinstance(value, Mapping):
        if all(is_number(value.get(key)) for key in ("value", "low", "high")):
            yield name, f"{number(value['value'])} [{number(value['low'])}, {number(value['high'])}]"
            return
        for key, item in value.items():
            yield from shown_figures(item, f"{name}.{key}" if name else str(key))
    elif is_number(value):
        yield name, number(value)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Dotted name and values of each leaf of nested objects: a list is several values, anything else is one."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, list(value) if isinstance(value, list) else [value]
