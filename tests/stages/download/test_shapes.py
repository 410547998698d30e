"""Would catch: a picture of a few bytes that is blown up to hundreds of megapixels, a shape judged after it was resized."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from capfilt.data.images import BadImage
from capfilt.stages.download import DownloadOptions
from capfilt.stages.download.engine import Engine
from capfilt.stages.download.settings import settings_of
from capfilt.stages.download.shapes import check_shape
from tests.stages.download.web import encoded, picture

PLAIN = settings_of(DownloadOptions(url_list="x"))


@pytest.mark.parametrize(
    ("size", "changes", "failure"),
    [
        ((6000, 1), {}, None),
        ((6000, 1), {"resize_only_if_bigger": False}, "too_many_pixels"),
        ((1, 6000), {"resize_only_if_bigger": False, "resize_mode": "center_crop"}, "too_many_pixels"),
        ((6000, 1), {"resize_only_if_bigger": False, "resize_mode": "border"}, None),
        ((6000, 1), {"resize_only_if_bigger": False, "resize_mode": "keep_ratio_largest"}, None),
        ((6000, 1), {"resize_only_if_bigger": False, "max_aspect_ratio": 3.0}, "bad_aspect_ratio"),
        ((300, 1), {"resize_only_if_bigger": False, "max_pixels": 10**9}, "too_many_pixels"),
        ((65_501, 900), {"resize_mode": "no"}, "too_many_pixels"),
        ((65_501, 900), {"resize_mode": "no", "encode_format": "png"}, None),
        ((16_384, 100), {"encode_format": "webp"}, "too_many_pixels"),
        ((16_384, 600), {"encode_format": "webp"}, None),
        # A limit on what comes in does not forbid the size that was asked for.
        ((40, 40), {"resize_only_if_bigger": False, "max_pixels": 10_000}, None),
    ],
)
def test_what_the_resizer_would_make_is_judged_first(size, changes, failure):
    settings = replace(PLAIN, **changes)
    if failure is None:
        check_shape(*size, settings)
        return
    with pytest.raises(BadImage) as bad:
        check_shape(*size, settings)
    assert bad.value.failure == failure
    assert f"{size[0]}x{size[1]}" in bad.value.message


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_resizer_never_sees_a_bomb(kind):
    engine = object.__new__(Engine)  # without img2dataset, whose modules stay in the process
    engine._watch = SimpleNamespace()
    seen = []
    resizer = lambda stream: seen.append(stream) or (b"x", 1, 1, 1, 1, None)
    settings = replace(PLAIN, resize_only_if_bigger=False)
    frame, encoded_picture = engine._picture(0, encoded(Image.new("RGB", (6000, 1)), kind), resizer, settings)
    assert (frame["failure"], encoded_picture, seen) == ("too_many_pixels", b"", [])
    assert (frame["original_width"], frame["original_height"]) == (6000, 1)
    narrow = replace(PLAIN, max_aspect_ratio=3.0)
    assert (
        engine._picture(0, encoded(picture(400, 20), kind), resizer, narrow)[0]["failure"]
        == "bad_aspect_ratio"
    )
    assert seen == []
