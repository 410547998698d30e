"""How options are declared: a frozen dataclass of `option`s, the source of the CLI's flags and of recipes' keys.

Light: the standard library alone, so that `--help` loads nothing heavy. The options of each stage stand beside it, those of a
model family in its record.
"""

from __future__ import annotations

import math
from dataclasses import Field, field, fields
from typing import Any, ClassVar, Self

from capfilt.errors import UserError

PARTS = ("images", "captions", "scores", "signals", "verdicts", "pairs", "examples")
"""The values of `kind` that name parts of tables."""

REQUIRED = "\0"
"""The default of an option that must be given; never a valid name or path."""

SOURCES, SPLITS = ("web", "human", "synthetic"), ("train", "val", "test")
"""Those of `capfilt.tables.contracts`, which would load pyarrow."""

INPUTS, TASKS, ROWS, PICTURES = "Inputs and outputs", "Tasks", "Rows", "Pictures"
TEXTS, NETWORK, MODEL, SCHEDULE = "Texts", "Network", "Model", "Schedule"
OPTIMISER, AUGMENTATION, MACHINE = "Optimiser", "Augmentation", "Machine"
PANELS = (
    INPUTS, TASKS, ROWS, PICTURES, TEXTS, NETWORK, MODEL, SCHEDULE, OPTIMISER, AUGMENTATION, MACHINE,
)  # fmt: skip
"""The headings of help, in order."""


def option(
    default: Any,
    help: str,
    *,
    kind: str = "",
    panel: str = "",
    rare: bool = False,
    later: bool = False,
    told: bool = False,
    unless: str = "",
    choices: tuple[str, ...] = (),
    least: float = 0,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> Any:
    """A field of an options dataclass.

    Args:
        default: its value where nobody gives one; REQUIRED for none.
        help: one line.
        kind: what a string names, so that recipes can tell inputs: one of PARTS, "model" (a checkpoint), or "path".
        panel: one of PANELS, where not as `panel_of` says.
        rare: few give it: `--help-all` shows it.
        later: it came after results were made without it: at its default it stays out of fingerprints.
        told: it changes what a run says or keeps, and no result.
        unless: an option that, when set, makes it needless to give this one.
        choices: the texts that it may be.
        least: of numbers, as `most`, `above` and `below`. A number is finite, unless its default is not.
    """
    marks = dict(locals())
    return field(default=marks.pop("default"), metadata=marks)


_MOST_WHOLE = 2**63 - 1
"""The range of 64 bits, which every library wants of a whole number."""


def check(each: Field[Any], value: Any) -> None:
    """UserError naming the option where `value` is none that its metadata allows."""
    marks, name = each.metadata, f"--{each.name.replace('_', '-')}"
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and "\0" in text and not (text == each.default == REQUIRED):
            raise UserError(f"{name} {text!r}: give a text without NUL characters")
        if marks["choices"] and text not in marks["choices"]:
            raise UserError(f"{name} {text!r}: choose {', '.join(filter(None, marks['choices']))}")
    if type(value) not in (int, float):
        return
    whole = type(value) is int
    least, most, above, below = (marks[bound] for bound in ("least", "most", "above", "below"))
    good = abs(value) <= _MOST_WHOLE if whole else math.isfinite(value) or each.default == math.inf
    # What is no number is in no range.
    if good and least <= value <= most and above < value and (value < below or math.isinf(below)):
        return
    least = -math.inf if above >= least else least
    ends = {"{:g} or more": least, "more than {:g}": above, "at most {:g}": most, "below {:g}": below}
    said = [] if good else ["at most 64 bits" if whole else "a finite number"]
    said += [words.format(bound) for words, bound in ends.items() if math.isfinite(bound)]
    shown = f"{value:g}" if not whole else value if good else "of more than 64 bits"
    raise UserError(f"{name} {shown}: give {', '.join(said)}")


def missing(options: Any) -> list[str]:
    """The names of the options that must be given and were not."""
    fields = type(options).__dataclass_fields__
    open_ = [name for name in fields if getattr(options, name) == REQUIRED]
    return [name for name in open_ if not getattr(options, fields[name].metadata["unless"] or "_", "")]


def offered(options: Any) -> list[Field[Any]]:
    """The fields that are options of a dataclass of them."""
    return [each for each in fields(options) if each.name not in getattr(options, "without", ())]


class Checked:
    """Options that are what their metadata allows: making others raises UserError.

    `panel` is the heading of the options that a class adds.
    """

    panel = INPUTS
    without: ClassVar[frozenset[str]] = frozenset()
    """Options that mean nothing here: no flag, no key of a recipe, and nothing but their default."""

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if each.name in self.without and value != each.default:
                raise UserError(f"--{each.name.replace('_', '-')} {value}: does not apply here; remove it")
            check(each, value)


class Remembering(Checked):
    """Options that know which of them were given to the constructor, be it what they are by default."""

    given: frozenset[str]

    def __new__(cls, *values: Any, **named: Any) -> Self:
        self = super().__new__(cls)
        names = [each.name for each in fields(cls)]  # type: ignore[arg-type]
        # Past a frozen dataclass's own guard; no field, so neither compared nor fingerprinted.
        object.__setattr__(self, "given", frozenset([*names[: len(values)], *named]))
        return self


def panel_of(options: type, each: Field[Any]) -> str:
    """The heading of an option in help: its own, that of inputs and outputs, or its class's.

    An option that a class declares again, for another default, stays where it was.
    """
    names = each.metadata["kind"] or each.name in ("dataset", "out")
    bases = (
        base for base in reversed(options.__mro__) if each.name in getattr(base, "__dataclass_fields__", ())
    )
    panel: str = each.metadata["panel"] or (INPUTS if names else next(bases).panel)  # type: ignore[attr-defined]
    return panel
