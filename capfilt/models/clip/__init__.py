"""CLIP (arXiv 2103.00020): its record."""

from __future__ import annotations

from capfilt.models.family import PAIR_ROWS, Family, Kind

_CODE = "capfilt.models.clip.model"

FAMILY = Family(
    "clip",
    "CLIP",
    _CODE,
    (
        Kind(
            "clip",
            f"{_CODE}:ClipConfig",
            f"{_CODE}:Clip",
            "CLIP",
            "embeds pictures and texts",
            PAIR_ROWS,
            "clip",
            "byte-pair",
        ),
    ),
)
