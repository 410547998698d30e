"""Catches a picture that is stored as found though readers would see it turned, see-through, or as another kind."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from capfilt.stages.pictures import Header, read_header


def encoded(mode="RGB", format="PNG", size=(6, 4), **options):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "format"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("RGB", "WEBP")],
)
def test_the_header_is_what_the_file_says(mode, format):
    assert read_header(encoded(mode, format)) == Header(format, mode, 6, 4, upright=True, transparent=False)


@pytest.mark.parametrize("turn", range(10))
def test_a_turned_picture_keeps_its_own_sides_and_is_not_upright(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    header = read_header(encoded(format="JPEG", exif=exif))
    assert (header.width, header.height) == (6, 4)
    assert header.upright == (turn in (0, 1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_broken_exif_says_nothing():
    body = encoded(format="JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05broken")
    assert read_header(body).upright


def test_a_clear_colour_is_seen_whatever_the_mode():
    assert read_header(encoded("P", transparency=0)).transparent
    assert read_header(encoded("RGB", transparency=(0, 0, 0))).transparent
    assert read_header(encoded("L", transparency=0)).transparent


def test_a_jpeg_with_further_pictures_is_a_jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (6, 4))])
    assert read_header(buffer.getvalue()).format == "JPEG"


def test_formats_that_are_not_asked_for_do_not_open():
    with pytest.raises(OSError, match="cannot identify"):
        read_header(encoded(format="PNG"), ("JPEG",))
