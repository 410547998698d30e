"""Which model families there are, and the class of models that a checkpoint or a config belongs to.

Light: a family's classes are imported when they are used.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from capfilt.errors import UserError
from capfilt.models import albef, blip, clip, locked, vilt
from capfilt.models.family import Family, Kind

Model = Any
"""A model of any family: a torch module with a `config`. Any, since families from elsewhere have classes of their own."""

FAMILIES: tuple[Family, ...] = (blip.FAMILY, clip.FAMILY, vilt.FAMILY, albef.FAMILY, locked.FAMILY)


GROUP = "capfilt.models"
"""The entry points by which anybody's package adds a family: a name, and the record's place as "module:FAMILY"."""


def families() -> tuple[Family, ...]:
    """All families, those of other packages last. A record that cannot be loaded is left out, with a warning."""
    return (*FAMILIES, *_foreign())


@lru_cache(maxsize=1)
def _foreign() -> tuple[Family, ...]:
    from importlib.metadata import entry_points

    found: list[Family] = []
    for point in entry_points(group=GROUP):
        try:
            record = point.load()
        except Exception as error:  # noqa: BLE001 - whatever the package raises, the other families work
            record, why = None, f"cannot be loaded ({type(error).__name__}: {error})"
        else:
            taken = {each.name for each in (*FAMILIES, *found)}
            why = "" if isinstance(record, Family) else "is no Family"
            if not why and record.name in taken:
                why = f"has the name of another family, {record.name}"
        if why:
            warnings.warn(f"model family {point.name}: {point.value} {why}", RuntimeWarning, stacklevel=2)
        else:
            found.append(record)
    return tuple(found)


def kinds() -> Iterator[Kind]:
    """The classes of models of all families."""
    for family in FAMILIES:
        yield from family.kinds
    for family in _foreign():
        yield from family.kinds


def kind_named(name: str) -> Kind:
    """The kind with this `model_type`. Raises KeyError where there is none."""
    for kind in kinds():
        if kind.name == name:
            return kind
    raise KeyError(name)


def kind_of(model_or_config: object) -> Kind:
    """The kind of a model, of a config, or of a class of either. Raises KeyError for anything else."""
    each = model_or_config if isinstance(model_or_config, type) else type(model_or_config)
    path = f"{each.__module__}:{each.__qualname__}"
    for kind in kinds():
        if path in (kind.model_path, kind.config_path):
            return kind
    raise KeyError(each.__name__)


def family_of(model_or_config: object) -> Family:
    """The family of a model, of a config, or of a class of either. Raises KeyError for anything else."""
    kind = kind_of(model_or_config)
    return next(family for family in families() if kind in family.kinds)


def build(config: Any, seed: int = 0) -> Any:
    """A freshly initialised model of the class that `config` belongs to.

    The same config and seed give the same weights, whatever was drawn before.
    """
    from capfilt.models.common.layers import seeded

    return seeded(kind_of(config).model, config, seed)


def family_named(name: str) -> Family:
    """The family of this name; UserError for an unknown one."""
    for family in families():
        if family.name == name:
            return family
    raise UserError(f"model family {name!r}: choose {', '.join(each.name for each in families())}")


def preset(family: str, name: str, vocab_size: int) -> Any:
    """The config of a family's preset for a tokenizer of `vocab_size`; UserError for an unknown name."""
    return family_named(family).preset(name, vocab_size)
