"""Which pictures are too large or too long: judged by their sizes, before anybody resizes them."""

from __future__ import annotations

from capfilt.data.images import BadImage
from capfilt.stages.download.settings import Settings

MOST_SIDE = {"jpg": 65_500, "png": 65_535, "webp": 16_383}
"""Pixels per side that an encoder takes: libjpeg's JPEG_MAX_DIMENSION, WebP's format; PNG has no limit of its own."""


def check_shape(width: int, height: int, settings: Settings) -> None:
    """Raise BadImage where a picture of this size must not go to the resizer.

    `bad_aspect_ratio` by the picture itself; `too_many_pixels` by what the resizer would make of it.
    """
    shorter, longer = sorted((width, height))
    if longer > settings.max_aspect_ratio * shorter:
        words = f"{width}x{height} pixels, more than {settings.max_aspect_ratio:g} to 1"
        raise BadImage("bad_aspect_ratio", words)
    resized = f"{width}x{height} pixels would be resized to " + "{0}x{1}, more than {2}"
    width, height = _resized(width, height, settings)
    # What was asked for by name is let through.
    most = max(settings.max_pixels, settings.image_size**2)
    if width * height > most:
        raise BadImage("too_many_pixels", resized.format(width, height, most))
    side = MOST_SIDE[settings.encode_format]
    if max(width, height) > side:
        words = resized.format(width, height, f"{side} per side of a {settings.encode_format}")
        raise BadImage("too_many_pixels", words)


def shape_fits(width: int, height: int, settings: Settings) -> bool:
    """Whether a picture of this size may go to the resizer."""
    try:
        check_shape(width, height, settings)
    except BadImage:
        return False
    return True


def _resized(width: int, height: int, settings: Settings) -> tuple[int, int]:
    """The largest that img2dataset's Resizer makes of the picture on its way, before it crops."""
    if settings.resize_mode == "no":
        return width, height
    by_shorter = settings.resize_mode in ("keep_ratio", "center_crop")
    side = min(width, height) if by_shorter else max(width, height)
    if settings.resize_only_if_bigger and side <= settings.image_size:
        return width, height
    scale = settings.image_size / side
    return max(1, round(width * scale)), max(1, round(height * scale))
