"""Which model families there are, and the class of models that a checkpoint or a config belongs to.

Light: a family's classes are imported when they are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from capfilt.models import albef, blip, clip, vilt
from capfilt.models.family import Family, Kind

Model = Any
"""A model of any family: a torch module with a `config`. Any, since families from elsewhere have classes of their own."""

FAMILIES: tuple[Family, ...] = (blip.FAMILY, clip.FAMILY, vilt.FAMILY, albef.FAMILY)


def kinds() -> Iterator[Kind]:
    """The classes of models of all families."""
    for family in FAMILIES:
        yield from family.kinds


def kind_named(name: str) -> Kind:
    """The kind with this `model_type`. Raises KeyError where there is none."""
    return {kind.name: kind for kind in kinds()}[name]


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
    return next(family for family in FAMILIES if kind in family.kinds)


def build(config: Any, seed: int = 0) -> Any:
    """A freshly initialised model of the class that `config` belongs to.

    The same config and seed give the same weights, whatever was drawn before.
    """
    from capfilt.models.common.layers import seeded

    return seeded(kind_of(config).model, config, seed)


def preset(family: str, name: str, vocab_size: int) -> Any:
    """The config of a family's preset for a tokenizer of `vocab_size`; UserError for an unknown name."""
    from capfilt.errors import UserError
    from capfilt.models.family import found

    record = {each.name: each for each in FAMILIES}[family]
    presets = found(f"{record.code}:PRESETS")
    if name not in presets:
        raise UserError(f"--preset {name!r} of {family}: choose {', '.join(presets)}")
    return presets[name].for_vocabulary(vocab_size)
