"""Catches: captions that change with the batch they are in, a prompt that leaks into the text, pictures, bytes and
paths that are read differently, and wrong options or unreadable images that end in a traceback."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

import capfilt
from capfilt.inference.captioner import Caption, Captioner
from capfilt.models import checkpoint
from tests.refusals import refused


@pytest.fixture(scope="module")
def captioner(pair):
    return Captioner(*pair)


def pictures(count=7):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]


def as_bytes(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_sampled_captions_do_not_depend_on_the_batch(captioner, images):
    keys = [f"key{i}" for i in range(7)]
    together = captioner.caption(images, keys=keys, samples=2, seed=5)
    assert len(together) == 14
    for size in (1, 3):
        assert same(captioner.caption(images, keys=keys, samples=2, seed=5, batch_size=size), together)
    order = [4, 0, 6]
    some = captioner.caption(images[order], keys=[keys[i] for i in order], samples=2, seed=5)
    assert same(some, [together[2 * i + k] for i in order for k in range(2)])
    more = captioner.caption(images, keys=keys, samples=3, seed=5)
    assert same([more[3 * i + k] for i in range(7) for k in range(2)], together)
    assert not same(captioner.caption(images, keys=keys, samples=2, seed=6), together)


def same(one: list[Caption], other: list[Caption]) -> bool:
    assert len(one) == len(other)
    return all(
        a.text == b.text and a.logprob == pytest.approx(b.logprob, abs=1e-3)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("method", ["nucleus", "greedy", "beam"])
def test_text_has_no_prompt_and_no_special_tokens(captioner, images, method):
    for prompt in ("a picture of ", "", None):
        for caption in captioner.caption(images, method=method, prompt=prompt, max_new_tokens=5):
            assert "[" not in caption.text
            assert not caption.text.startswith("a picture of")
            assert caption.text == caption.text.strip()
            assert caption.logprob < 0


def test_every_way_to_give_a_picture_gives_the_same_caption(captioner, tmp_path):
    given = pictures(3)
    expected = captioner.caption(given, samples=2)
    data = [as_bytes(each) for each in given]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, each in zip(paths, data, strict=True):
        path.write_bytes(each)
    array = np.stack([np.asarray(each).transpose(2, 0, 1) for each in given])
    for form in (data, paths, [str(path) for path in paths], array, torch.from_numpy(array)):
        assert captioner.caption(form, samples=2) == expected
    assert captioner.caption([]) == []


def test_a_picture_is_upright_and_on_white(captioner):
    turned = pictures(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    opened = Image.open(io.BytesIO(buffer.getvalue()))
    expected = captioner.caption([turned.transpose(Image.Transpose.ROTATE_270)])
    assert captioner.caption([opened]) == captioner.caption([buffer.getvalue()]) == expected
    clear = Image.new("RGBA", (16, 16), (10, 20, 30, 0))
    assert captioner.caption([clear]) == captioner.caption([Image.new("RGB", (16, 16), "white")])


def test_an_unreadable_picture_is_named_by_its_index(captioner, tmp_path):
    good = pictures(1)[0]
    for bad in (b"<html>", b"", as_bytes(good)[:60], tmp_path / "absent.png", 7):
        with refused("image 1"):
            captioner.caption([good, bad])
    with refused("uint8", "[B, 3, 16, 16]"):
        captioner.caption(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    "option",
    [
        {"method": "best"}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": 0.0}, {"top_k": -1}, {"samples": 0},
        {"num_beams": 0}, {"max_new_tokens": 0}, {"min_new_tokens": 30}, {"batch_size": -1}, {"repetition_penalty": 0},
        {"samples": 2, "method": "greedy"}, {"samples": 4, "method": "beam"}, {"keys": ["a"]}, {"max_new_tokens": 99},
        *({name: value} for name in ("temperature", "top_p", "repetition_penalty", "length_penalty")
          for value in (float("nan"), float("inf"), float("-inf"))),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_option_is_named(captioner, images, option):
    with refused(next(iter(option))):
        captioner.caption(images, **option)


def test_loaded_from_disk_it_writes_the_same(pair, captioner, images, tmp_path):
    checkpoint.save(tmp_path / "c", *pair)
    loaded = capfilt.Captioner.load(tmp_path / "c")
    assert isinstance(loaded, Captioner)
    assert loaded.caption(images) == captioner.caption(images)
    with refused(tmp_path / "absent"):
        capfilt.Captioner.load(tmp_path / "absent")
    with refused("precision fp8"):
        capfilt.Captioner.load(tmp_path / "c", precision="fp8")


def test_half_precision_still_answers_in_full(pair, images):
    low = Captioner(*pair, precision="bf16").caption(images, method="greedy", max_new_tokens=3)
    full = Captioner(*pair).caption(images, method="greedy", max_new_tokens=3)
    agree = [a for a, b in zip(low, full, strict=True) if a.text == b.text]
    assert len(agree) >= 5
    assert all(isinstance(each.logprob, float) for each in low)
