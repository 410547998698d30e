"""What the header of an encoded picture says, for the two stages that bring pictures in.

Decoding, and everything that must withstand hostile bytes, is `capfilt.data.images`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from capfilt.data.images import FORMATS

_ORIENTATION = 0x0112
"""EXIF's tag for how the picture is turned."""


@dataclass(frozen=True)
class Header:
    """Of a picture as received.

    Attributes:
        format: JPEG, PNG, ...; a JPEG with further pictures behind the first is a JPEG.
        mode: Pillow's name for the kind of pixels.
        width: pixels, before any EXIF rotation.
        height: pixels, before any EXIF rotation.
        upright: whether EXIF leaves the picture as it lies.
        transparent: whether one of its colours is clear, which `mode` does not say.
    """

    format: str
    mode: str
    width: int
    height: int
    upright: bool
    transparent: bool


def read_header(body: bytes, formats: tuple[str, ...] = FORMATS) -> Header:
    """The header of a picture. Raises whatever Pillow raises: ask about bytes that decode, or be ready for anything."""
    with Image.open(io.BytesIO(body), formats=formats) as image:
        kind = "JPEG" if image.format == "MPO" else str(image.format)
        return Header(kind, image.mode, *image.size, _is_upright(image), "transparency" in image.info)


def _is_upright(image: Image.Image) -> bool:
    try:
        return bool(image.getexif().get(_ORIENTATION, 1) in (0, 1))
    except Exception:  # noqa: BLE001 - broken EXIF says nothing about the picture
        return True
