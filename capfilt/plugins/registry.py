"""From `--captioner my-vlm:ARGUMENT` to the object behind it: checkpoints, the plug-ins that come with capfilt, entry points.

What a plug-in hands over is checked here and nowhere else; what it is asked for is in `interface.py`.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from capfilt.errors import RunError, UserError
from capfilt.models.checkpoint import layout_of
from capfilt.plugins.interface import CaptionerPlugin, Plugin, ScorerPlugin
from capfilt.tables.contracts import CONTRACTS, IDENTIFIER, SCORES, Contract

CAPTIONERS, SCORERS = "capfilt.captioners", "capfilt.scorers"
"""The groups of entry points."""

BUILT_IN: Mapping[str, Mapping[str, str]] = {
    CAPTIONERS: {},
    SCORERS: {"clip": "capfilt.plugins.clip:ClipScorer", "siglip": "capfilt.plugins.clip:SiglipScorer"},
}
"""The plug-ins that come with capfilt. pyproject.toml declares the same; a plain checkout has no metadata to find them in."""

_CHECKPOINTS = {
    CAPTIONERS: "capfilt.plugins.checkpoints:BlipCaptioner",
    SCORERS: "capfilt.plugins.checkpoints:open_filter",
}
_ASKED = {CAPTIONERS: "caption", SCORERS: "score"}

# No separator can come before the colon, so no path with a separator is ever taken for a plug-in.
_REFERENCE = re.compile(r"([a-z0-9][a-z0-9._-]*):(.*)", re.DOTALL)
_VIEW_COLUMNS = frozenset({"part", "scorer", "rule", "signal"})
"""What the analyst's views add to the tables' columns."""

T = TypeVar("T")


@dataclass(frozen=True)
class Reference:
    """What `--captioner` or `--filter` names: a checkpoint, or a plug-in with its argument. Workers open it anew.

    Attributes:
        group: CAPTIONERS or SCORERS.
        given: the option as it was written.
        plugin: the plug-in's name; "" for a checkpoint.
        argument: what follows the plug-in's name; a checkpoint's path.
        options: the plug-in's own, KEY=VALUE; of a checkpoint, how it is computed.
    """

    group: str
    given: str
    plugin: str
    argument: str
    options: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """What the output part is called where nobody says."""
        return self.plugin or Path(self.argument).name

    @property
    def who(self) -> str:
        """The name in messages."""
        return f"plug-in {self.plugin!r}" if self.plugin else self.argument

    def mark(self, opened: Plugin) -> str:
        """What goes into a stage's identity. Raises UserError where the plug-in has no fingerprint to give."""
        if not self.plugin:
            return opened.fingerprint()
        found: Any = _asked(f"{self.who}: fingerprint of {self.argument!r}", opened.fingerprint)
        if not isinstance(found, str) or not found:
            raise UserError(f"{self.who}: its fingerprint is {found!r}, not a text")
        return f"{self.plugin}:{found}"

    def origin(self) -> dict[str, str]:
        """How it was `given`, and the `layout` of what was found there (of a plug-in, "plug-in")."""
        return {"given": self.given, "layout": "plug-in" if self.plugin else layout_of(self.argument)}


def reference(
    group: str,
    given: str,
    options: Sequence[str],
    option: str,
    model: Callable[[str], Path],
    precision: str = "auto",
    compiled: bool = False,
    draft: bool = False,
) -> Reference:
    """What `given` names.

    Args:
        group: CAPTIONERS or SCORERS.
        given: NAME:ARGUMENT of a plug-in; else a checkpoint. One that has a colon in its name is written as a path.
        options: KEY=VALUE each, for the plug-in.
        option: the name of the option that `options` were given by.
        model: from a checkpoint's name to its path.
        precision, compiled: how a checkpoint is computed. draft: whether decoders scale large JPEGs for it.

    Raises:
        UserError: where an option is not KEY=VALUE, or there is no plug-in to give it to, or a plug-in is given what is for
            checkpoints; and fp8 without `compiled`.
    """
    found = _REFERENCE.fullmatch(given)
    if found is None:
        if options:
            raise UserError(
                f"{option} {options[0]}: {given} is a checkpoint, and only plug-ins have options of their own"
            )
        if precision == "fp8" and not compiled:
            raise UserError(
                "--precision fp8 needs --compile: without it every quantisation is kernels of its own, which bf16 does without"
            )
        how = (
            ("precision", precision),
            ("compiled", "yes" if compiled else ""),
            ("draft", "yes" if draft else ""),
        )
        return Reference(group, given, "", str(model(given)), how)
    for option_given, name in (
        (precision != "auto", "--precision"),
        (compiled, "--compile"),
        (draft, "--draft"),
    ):
        if option_given:
            raise UserError(
                f"{name} is for checkpoints; {given} is a plug-in, and may have an option of its own"
            )
    pairs = {}
    for item in options:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"{option} {item}: write KEY=VALUE")
        pairs[key] = value
    return Reference(group, given, found[1], found[2], tuple(sorted(pairs.items())))


def open_captioner(named: Reference) -> CaptionerPlugin:
    """The captioner, not set up yet. Raises UserError where there is none, or where it is none."""
    opened: CaptionerPlugin = _open(named)
    return opened


def open_scorer(named: Reference) -> ScorerPlugin:
    """The scorer, not set up yet, its columns checked. Raises UserError where there is none, or where it is none."""
    opened: ScorerPlugin = _open(named)
    _check_columns(named, opened.columns)
    return opened


def score_contract(columns: Mapping[str, str]) -> Contract:
    """The contract of a scores part with these columns (name, meaning); those of the table itself have their place."""
    return SCORES.extended({name: doc for name, doc in columns.items() if name not in SCORES.score_names})


def checked_captions(named: Reference, made: Any, wanted: int) -> list[tuple[str, float | None]]:
    """What a captioner returned, as the interface says. Raises RunError naming it where it is not."""
    pairs = _listed(named, made, "(text, log-probability or None)")
    if len(pairs) != wanted:
        raise RunError(f"{named.who}: returned {len(pairs)} captions where {wanted} were asked for")
    for pair in pairs:
        good = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
        if not good or not (pair[1] is None or isinstance(pair[1], int | float)):
            raise RunError(
                f"{named.who}: returned {_short(pair)} where (text, log-probability or None) belongs"
            )
    return pairs


def checked_scores(
    named: Reference, made: Any, wanted: int, columns: Sequence[str]
) -> npt.NDArray[np.float32]:
    """What a scorer returned, float32 [wanted, columns]. Raises RunError naming it where it is not that."""
    try:
        scores = np.asarray(made, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise RunError(
            f"{named.who}: returned {_short(made)} where rows of numbers belong ({error})".splitlines()[0]
        ) from error
    if scores.shape != (wanted, len(columns)):
        raise RunError(
            f"{named.who}: returned scores of shape {list(scores.shape)}; {wanted} texts by {len(columns)} columns "
            f"({', '.join(columns)}) were asked for"
        )
    return scores


def _open(named: Reference) -> Any:
    if not named.plugin:
        return pkgutil.resolve_name(_CHECKPOINTS[named.group])(named.argument, **dict(named.options))
    load = _loader(named)
    options = dict(named.options)
    try:
        inspect.signature(load).bind(named.argument, **options)
    except TypeError as error:
        raise UserError(f"{named.who}: cannot be called with its options: {error}") from error
    except ValueError:
        pass  # what is written in C may not say what it takes
    opened = _asked(
        f"{named.who}: {named.argument!r} cannot be opened", lambda: load(named.argument, **options)
    )
    wanted = ("fingerprint", "setup", "prepare", _ASKED[named.group])
    missing = [name for name in wanted if not callable(getattr(opened, name, None))]
    missing += ["columns"] if named.group == SCORERS and not hasattr(opened, "columns") else []
    if missing:
        raise UserError(f"{named.who}: {type(opened).__name__} has no {', '.join(missing)}")
    return opened


def _loader(named: Reference) -> Callable[..., Any]:
    built_in = BUILT_IN[named.group]
    if named.plugin in built_in:
        return _imported(named, built_in[named.plugin], lambda: pkgutil.resolve_name(built_in[named.plugin]))
    entries = importlib.metadata.entry_points(group=named.group)
    found = {entry.value: entry for entry in entries if entry.name == named.plugin}
    if not found:
        names = sorted({*built_in, *(entry.name for entry in entries)})
        kind = "captioner" if named.group == CAPTIONERS else "scorer"
        raise UserError(
            f"{named.given}: no {kind} plug-in is called {named.plugin!r}; installed: {', '.join(names) or 'none'} "
            f"(a checkpoint with a colon in its name is written ./{named.given})"
        )
    if len(found) > 1:
        raise UserError(f"{named.who}: declared twice, as {' and '.join(sorted(found))}; uninstall one")
    (value, entry), *_ = found.items()
    return _imported(named, value, entry.load)


def _imported(named: Reference, value: str, load: Callable[[], Any]) -> Callable[..., Any]:
    loader: Callable[..., Any] = _asked(f"{named.who} ({value}): cannot be imported", load)
    if not callable(loader):
        raise UserError(f"{named.who} ({value}): is {_short(loader)}, which cannot be called")
    return loader


def _asked(what: str, call: Callable[[], T]) -> T:
    """What `call` returns. An error of somebody else's code is one line, with the code's own as its cause."""
    try:
        return call()
    except (UserError, RunError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise UserError(f"{what}: {type(error).__name__}: {said}") from error


def _check_columns(named: Reference, columns: Any) -> None:
    if not isinstance(columns, Mapping) or not columns:
        raise UserError(f"{named.who}: its columns are {_short(columns)}, not names with their meaning")
    taken = {field.name for contract in CONTRACTS.values() for field in contract.schema} | _VIEW_COLUMNS
    for name, doc in columns.items():
        if not isinstance(name, str) or not IDENTIFIER.fullmatch(name):
            raise UserError(f"{named.who}: column {name!r} is no plain SQL name (a to z, 0 to 9 and _)")
        if name in taken - set(SCORES.score_names):
            raise UserError(
                f"{named.who}: column {name!r} is another column's name already; choose one of its own"
            )
        if not isinstance(doc, str) or not doc:
            raise UserError(f"{named.who}: column {name!r} has no meaning written beside it")


def _listed(named: Reference, made: Any, of: str) -> list[Any]:
    if isinstance(made, str | bytes | Mapping):
        raise RunError(f"{named.who}: returned {_short(made)} where a list of {of} belongs")
    try:
        return list(made)
    except TypeError as error:
        raise RunError(f"{named.who}: returned {_short(made)} where a list of {of} belongs") from error


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
