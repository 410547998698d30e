"""Catches: a crop or a wrong filter where BLIP squeezes, statistics on the wrong scale, views that depend on the device
or on options that are off, captions made false by a flip, and RandAugment levels that are not BLIP's.
"""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from capfilt.data import transforms
from capfilt.data.images import BadImage
from capfilt.data.transforms import (
    OPERATIONS,
    Views,
    apply_operation,
    decode_uint8,
    mentions_sides,
    normalise,
    quick_uint8,
    rand_augment,
    swap_left_right,
    to_uint8,
    training_uint8,
)
from capfilt.models.common.vision import CLIP_MEAN as MEAN
from capfilt.models.common.vision import CLIP_STD as STD


def noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    array = np.random.default_rng(seed).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    return Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)


def batch(count: int = 4, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.stack([to_uint8(noise(64, 64, seed + i), size) for i in range(count)]))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ pictures to tensors


def test_to_uint8_is_pillows_bicubic_without_a_crop() -> None:
    # Catches: a filter that is nearly Pillow's: a score moves by 2e-4, and a greedy caption in six is another one.
    for width, height in ((50, 20), (500, 375), (7, 90), (1, 1), (1, 300), (1023, 769), (23, 25)):
        image = noise(width, height)
        array = to_uint8(image, 24)
        assert (array.shape, array.dtype) == ((3, 24, 24), np.uint8)
        assert array.flags["C_CONTIGUOUS"]
        expected = np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC))
        assert np.array_equal(array.transpose(1, 2, 0), expected), "to the bit"
        # Training sees nearly that: two roundings of fixed-point weights show in noise of full contrast.
        away = np.abs(quick_uint8(np.asarray(image), 24).transpose(1, 2, 0).astype(int) - expected)
        assert away.max() <= 11
        assert away.mean() < 0.2
    assert np.array_equal(to_uint8(noise(24, 24), 24).transpose(1, 2, 0), np.asarray(noise(24, 24)))
    assert to_uint8(Image.new("L", (3, 3), 9), 4).tolist() == [[[9] * 4] * 4] * 3


def test_decode_uint8_decodes_the_whole_picture_unless_told() -> None:
    # Catches: a JPEG that its decoder scales where nobody asked for it.
    buffer = io.BytesIO()
    noise(800, 600).save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB").resize((48, 48), Image.Resampling.BICUBIC))
    assert np.array_equal(decode_uint8(data, 48).transpose(1, 2, 0), expected)
    with Image.open(io.BytesIO(data)) as image:
        image.draft(None, (96, 96))
        scaled = np.asarray(image.convert("RGB").resize((48, 48), Image.Resampling.BICUBIC))
    assert np.array_equal(decode_uint8(data, 48, draft=True).transpose(1, 2, 0), scaled)
    assert 0 < np.abs(scaled.astype(int) - expected).mean() < 3
    assert np.abs(training_uint8(data, 48).transpose(1, 2, 0).astype(int) - scaled).max() <= 2
    for decoded in (decode_uint8, training_uint8):
        with pytest.raises(BadImage):
            decoded(b"no picture", 48)


def test_normalise_known_answer() -> None:
    pixels = torch.tensor([0, 255, 128], dtype=torch.uint8)[:, None, None].expand(2, 3, 4, 4)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    before = pixels.clone()
    result = normalise(pixels, mean, std)
    assert torch.equal(pixels, before)
    assert (result.shape, result.dtype) == ((2, 3, 4, 4), torch.float32)
    for channel, value in enumerate((0.0, 1.0, 128 / 255)):
        expected = (value - MEAN[channel]) / STD[channel]
        assert result[0, channel, 0, 0].item() == pytest.approx(expected, abs=1e-5)
    assert normalise(pixels, mean.bfloat16(), std.bfloat16()).dtype == torch.bfloat16
    assert normalise(pixels[0], mean, std).shape == (3, 4, 4)


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize(
    "wrong", [{"scale": (0, 1)}, {"scale": (0.9, 0.5)}, {"ratio": (0, 1)}, {"flip": 1.1}]
)
def test_impossible_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Views(**wrong)


# ------------------------------------------------------------------ left and right


def test_swap_left_right() -> None:
    assert swap_left_right("a cup LEFT of the Right plate, leftmost, bright") == (
        "a cup RIGHT of the Left plate, rightmost, bright"
    )
    assert swap_left_right("rightwards, upright, left-hand, cleft") == "leftwards, upright, right-hand, cleft"
    assert mentions_sides("on the left.")
    assert not mentions_sides("a bright cleft, copyright")


@given(
    st.lists(
        st.sampled_from(["left", "Right", "a", "leftmost", "RIGHTWARD", "bright", ",", "left-hand"]),
        max_size=9,
    )
)
def test_swapping_twice_is_the_text_itself(words: list[str]) -> None:
    text = " ".join(words)
    assert swap_left_right(swap_left_right(text)) == text
    assert mentions_sides(text) == (swap_left_right(text) != text)


# ------------------------------------------------------------------ RandAugment


def test_operations_are_blips_ten() -> None:
    assert set(OPERATIONS) == {
        "Identity", "AutoContrast", "Brightness", "Sharpness", "Equalize",
        "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate",
    }  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_keeps_size_and_mode(name: str) -> None:
    image = noise()
    for level in (0, 5, 10):
        result = apply_operation(image, name, level, np.random.default_rng(0))
        assert (result.size, result.mode) == (image.size, "RGB")


def test_levels_are_blips() -> None:
    image = noise(41, 41)
    array = np.asarray(image)
    for name in ("Identity", "Brightness", "Sharpness"):
        assert np.array_equal(np.asarray(apply_operation(image, name, 5, np.random.default_rng(0))), array), (
            name
        )
    for seed in range(4):
        moved = np.asarray(apply_operation(image, "TranslateX", 5, np.random.default_rng(seed)))
        right, left = np.array_equal(moved[:, 5:], array[:, :-5]), np.array_equal(moved[:, :-5], array[:, 5:])
        assert right != left
        assert (moved[:, :5] if right else moved[:, -5:]).tolist() == [[[128] * 3] * 5] * 41
    turned = np.asarray(apply_operation(image, "Rotate", 5, np.random.default_rng(0)))
    either = [np.asarray(image.rotate(a, Image.Resampling.BILINEAR, fillcolor=(128,) * 3)) for a in (15, -15)]
    assert any(np.array_equal(turned, expected) for expected in either)
    brighter = np.asarray(
        apply_operation(Image.new("RGB", (2, 2), (50, 50, 50)), "Brightness", 10, np.random.default_rng())
    )
    assert brighter[0, 0, 0] == 95  # 1.8 + 0.1 = 1.9 times


def test_shear_moves_edges_by_its_level() -> None:
    image = Image.new("RGB", (101, 101), (0, 0, 0))
    image.paste((255, 255, 255), (50, 0, 51, 101))
    sheared = np.asarray(apply_operation(image, "ShearX", 5, np.random.default_rng(0)))[:, :, 0]
    shift = int(sheared[100].argmax()) - int(sheared[0].argmax())
    assert abs(shift) == pytest.approx(15, abs=1)


def test_rand_augment_is_seeded_and_applies_each_operation_half_the_time() -> None:
    image = noise()
    one, other = (np.asarray(rand_augment(image, np.random.default_rng(3))) for _ in range(2))
    assert np.array_equal(one, other)
    rng = np.random.default_rng(0)
    same = sum(
        np.array_equal(np.asarray(rand_augment(image, rng, n=1)), np.asarray(image)) for _ in range(400)
    )
    # Half are not applied; of the rest Identity, Brightness and Sharpness (3 of 10) do nothing at level 5.
    assert same / 400 == pytest.approx(0.5 + 0.5 * 0.3, abs=0.08)
    assert np.array_equal(np.asarray(rand_augment(image, rng, n=0)), np.asarray(image))
    assert rand_augment(image.convert("L"), rng).mode == "RGB"


# ------------------------------------------------------------------ both, as BLIP trains


def test_operations_are_drawn_with_replacement_and_alike_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of ten, each applied with chance 0.5 at level 5: drawn without replacement, no operation ever comes twice."""
    drawn: list[list[str]] = []

    def record(image: Image.Image, name: str, m: float, rng: np.random.Generator) -> Image.Image:
        assert m == 5
        drawn[-1].append(name)
        return image

    monkeypatch.setattr(transforms, "apply_operation", record)
    image, rng = noise(4, 4), np.random.default_rng(0)
    for _ in range(4000):
        drawn.append([])
        rand_augment(image, rng)
    counts = [sum(names.count(name) for names in drawn) for name in OPERATIONS]
    # 4,000 pictures x 2 draws x 0.5 / 10 operations.
    assert min(counts) > 340
    assert max(counts) < 460
    both = [names for names in drawn if len(names) == 2]
    assert len(both) / 4000 == pytest.approx(0.25, abs=0.03)
    assert sum(a == b for a, b in both) / len(both) == pytest.approx(0.1, abs=0.03)


def slopes(view: np.ndarray) -> tuple[float, float]:
    """How fast red grows to the right, and green downwards, per pixel."""
    return float(np.diff(view[0].mean(0)).mean()), float(np.diff(view[1].mean(1)).mean())


def test_crops_of_whole_pictures_keep_their_aspect() -> None:
    """A wide picture squashed to a square before it is cropped: people of a third of their width in every step."""
    rows, columns = np.mgrid[0:80, 0:240]
    picture = np.stack([columns, rows, rows * 0], axis=2).astype(np.uint8)
    views = Views((0.2, 0.3), (1, 1), seed=3)
    for row in range(5):
        right, down = slopes(views.view(picture, 32, 7, row, False))
        assert right == pytest.approx(down, rel=0.05)
    squashed = slopes(transforms.to_uint8(Image.fromarray(picture), 32))
    assert squashed[0] == pytest.approx(3 * squashed[1], rel=0.05)


def test_crops_are_what_rand_resized_crop_draws() -> None:
    rng = np.random.default_rng(0)
    views = Views((0.2, 1.0))
    boxes = [views.box(300, 200, rng) for _ in range(3000)]
    shares = np.array([width * height / 60_000 for *_, width, height in boxes])
    ratios = np.array([width / height for *_, width, height in boxes])
    assert all(0 <= x <= 300 - w and 0 <= y <= 200 - h and w > 0 and h > 0 for x, y, w, h in boxes)
    assert 0.19 < shares.min() < 0.22
    assert shares.max() > 0.85
    assert 0.73 < ratios.min() < ratios.max() < 1.36
    # A ribbon has no crop of these shapes that is large enough: the largest that there is, from its middle.
    assert Views((0.9, 1)).box(900, 90, rng) == (390, 0, 120, 90)


def test_a_crop_of_no_less_than_everything_is_none() -> None:
    """A picture of which `--crop-scale 1` hides the sides, since it is wider than crops may be."""
    rng = np.random.default_rng(0)
    assert Views((1, 1)).box(900, 90, rng) == (0, 0, 900, 90)
    assert Views((1, 1)).box(90, 160, rng) == (0, 0, 90, 160)


def test_views_depend_on_seed_step_and_place_and_leave_sides_alone() -> None:
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    picture.flags.writeable = False  # as Pillow gives pictures
    views = Views((0.3, 1.0), flip=0.5, seed=3)
    one = views.view(picture, 16, 4, 2, False)
    assert np.array_equal(one, views.view(picture, 16, 4, 2, False))
    others = [views.view(picture, 16, 4, 3, False), views.view(picture, 16, 5, 2, False)]
    others.append(dataclasses.replace(views, seed=4).view(picture, 16, 4, 2, False))
    others.append(dataclasses.replace(views, operations=20).view(picture, 16, 4, 2, False))
    assert not any(np.array_equal(one, other) for other in others)
    mirrored = [
        not np.array_equal(views.view(picture, 16, 0, place, False), views.view(picture, 16, 0, place, True))
        for place in range(200)
    ]
    assert 70 < sum(mirrored) < 130
