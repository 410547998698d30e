"""Catches a checkpoint's config that comes back as another model's, or builds one that takes hours before it is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field

import pytest

from capfilt.errors import UserError
from capfilt.models.common.config import ModelConfig, Shape
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig
from tests.golden.families import CLASSES, MODELS


def config_of(name):
    return MODELS[name]().config


@pytest.mark.parametrize("name", CLASSES)
def test_a_config_comes_back_from_json_as_it_was(name):
    config = config_of(name)
    values = json.loads(json.dumps(config.to_dict()))
    assert type(config).from_dict(values) == config
    # A checkpoint of before a field existed: the field has its default, the rest what it says.
    sides = values.get("towers", values)
    for side in ("vision", "text"):
        del sides[side][next(iter(sides[side]))]
    assert dataclasses.asdict(type(config).from_dict(values))["max_text_tokens"] == config.max_text_tokens


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unheard": 1}, "unheard"),
        ({"vision": {"unheard": 1}}, "vision.unheard"),
        ({"text": {"vocab_size": "9"}}, "text.vocab_size"),
        ({"text": {"vocab_size": True}}, "text.vocab_size"),
        ({"text": {"vocab_size": 2.0}}, "text.vocab_size"),
        ({"text": {"max_positions": 0}}, "text.max_positions"),
        ({"text": {"max_positions": -1}}, "text.max_positions"),
        ({"text": {"max_positions": 2**70}}, "64 bits"),
        ({"vision": {"image_size": 2**30}}, "vision.image_size"),
        ({"max_text_tokens": None}, "max_text_tokens"),
        ({"vision": [1, 2]}, "vision"),
        ({"text": None}, "text"),
    ],
)
@pytest.mark.parametrize("name", ["blip", "clip", "vilt", "albef"])
def test_a_field_that_does_not_fit_is_refused_by_its_name_in_one_line(name, change, said):
    config = config_of(name)
    values = config.to_dict()
    for key, value in change.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError) as caught:
        type(config).from_dict(values)
    assert "\n" not in str(caught.value)
    assert said in str(caught.value) or "unknown fields" in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.1", None])
@pytest.mark.parametrize("name", ["blip", "albef"])
def test_a_share_is_a_number(name, value):
    values = config_of(name).to_dict()
    values["text"]["dropout"] = value
    with pytest.raises(UserError, match=r"text\.dropout"):
        type(config_of(name)).from_dict(values)


def test_a_model_of_a_million_layers_is_refused_before_it_is_built():
    for name, where in (("blip", "text"), ("clip", "vision"), ("albef", "text")):
        values = config_of(name).to_dict()
        values[where]["depth"] = 10**6
        with pytest.raises(UserError, match=f"{where}.depth"):
            type(config_of(name)).from_dict(values)


@pytest.mark.parametrize("classes", [[], ["yes"], ["yes", "yes"], "yes", ["yes", 1], None])
@pytest.mark.parametrize("name", ["blip_classifier", "vilt_classifier", "albef_classifier"])
def test_a_classifier_has_two_classes_or_more_each_once(name, classes):
    values = config_of(name).to_dict()
    with pytest.raises(UserError):
        type(config_of(name)).from_dict({**values, "classes": classes})
    assert type(config_of(name)).from_dict({**values, "classes": ["yes", "no"]}).classes == ("yes", "no")


def test_texts_are_read_no_longer_than_the_model_has_positions():
    config = config_of("blip")
    assert config.reading == {"max_length": 12, "max_words": 30}
    assert dataclasses.replace(config, max_text_tokens=5, max_words=0).reading == {
        "max_length": 5,
        "max_words": None,
    }


@dataclass(frozen=True)
class Seeing(Shape):
    vision: VisionConfig = field(default_factory=VisionConfig)


@dataclass(frozen=True)
class Reading(Shape):
    text: TextConfig = field(default_factory=TextConfig)
    max_text_tokens: int = 9
    max_words: int = 0


@dataclass(frozen=True)
class Neither(Shape):
    width: int = 3


@pytest.mark.parametrize(
    ("config", "sides", "image_size", "vocab_size", "reading"),
    [
        (Seeing(), ("vision",), 224, 0, {}),
        (Reading(), ("text",), 0, 30524, {"max_length": 9, "max_words": None}),
        (Neither(), (), 0, 0, {}),
        (ModelConfig, ("vision", "text"), None, None, None),
    ],
)
def test_a_config_may_lack_a_side(config, sides, image_size, vocab_size, reading):
    """Catches a config of pictures or texts alone that fails where a size, a vocabulary or a length is asked for."""
    assert config.sides() == sides
    if isinstance(config, type):
        return
    assert (config.image_size, config.vocab_size, config.reading) == (image_size, vocab_size, reading)
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    changed = config.for_vocabulary(50).sized(64, 8, 3).read_as(7, 2)
    assert changed.sides() == sides
    assert changed.vocab_size == (50 if "text" in sides else 0)
    assert changed.image_size == (64 if "vision" in sides else 0)
    if "text" in sides:
        assert changed.reading == {"max_length": 7, "max_words": 2}
        assert changed.text.pad_id == 3
    if "vision" in sides:
        assert changed.vision.patch_size == 8
    absent = next(side for side in ("text", "vision") if side not in sides)
    with pytest.raises(UserError, match=absent):
        type(config).from_dict({absent: {}})
