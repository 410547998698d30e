"""Catches a table of names that says less than it seems to: a tensor without a row, one that is dropped or written though its
row says otherwise, two layouts that take the same file, and a shape that ends in a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from capfilt.models import build, layouts
from capfilt.models.albef.layouts import ORIGINAL as ALBEF
from capfilt.models.albef.model import AlbefConfig
from capfilt.models.blip.layouts import ORIGINAL as BLIP
from capfilt.models.blip.model import BlipConfig
from capfilt.models.clip.layouts import OPENAI, TRANSFORMERS
from capfilt.models.common.layouts.names import BARE, COPIED, TYPED, give, longer, take, under
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig
from capfilt.models.vilt.layouts import TRANSFORMERS as VILT
from tests.models.interop.clips import VIT
from tests.models.test_vilt import CONFIG
from tests.refusals import refused

HERE = Path("weights")
ROWS = (
    ("head.bias", "out.{bias,old_bias?}", COPIED),
    ("token", "token", BARE),
    ("places", "{places,types+,position_ids+}", TYPED),
    ("words", "words", longer(2, -1.0)),
    *under("blocks", "layers", {"qkv": "{q,k,v}_proj"}),
    ("**", "module.**"),
)
OURS = {
    "head.bias": torch.arange(3.0),
    "token": torch.ones(1, 1, 4),
    "places": torch.arange(8.0).view(2, 4),
    "words": torch.tensor([[1.0], [2.0], [-1.0], [-1.0]]),
    "blocks.0.qkv.weight": torch.arange(12.0).view(6, 2),
    "blocks.1.qkv.bias": torch.arange(6.0),
    "rest.0.deep.weight": torch.ones(2),
}


def test_a_table_is_read_as_it_was_written():
    given = give(ROWS, OURS)
    assert given.keys() == {
        "out.bias", "token", "places", "types", "position_ids", "words", "module.rest.0.deep.weight",
        *(f"layers.0.{each}_proj.weight" for each in "qkv"), *(f"layers.1.{each}_proj.bias" for each in "qkv"),
    }  # fmt: skip
    assert (given["token"].shape, given["words"].tolist()) == ((4,), [[1.0], [2.0]])
    assert given["position_ids"].tolist() == [[0, 1]]
    assert torch.equal(given["layers.0.k_proj.weight"], OURS["blocks.0.qkv.weight"][2:4])
    given |= {
        "out.old_bias": given["out.bias"].clone(),
        "types": torch.full((2, 4), 0.5),
        "image_queue": torch.ones(1),
    }
    found, leftovers = take(HERE, "Toy", ROWS, OURS, {name: each.half() for name, each in given.items()})
    assert leftovers.keys() == {"image_queue"}
    for name, expected in OURS.items():
        assert torch.equal(found[name], expected + 0.5 * (name == "places")), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out.old_bias": torch.zeros(3)}, "out.old_bias out.bias Toy"),
        ({"position_ids": torch.tensor([[1, 0]])}, "position_ids"),
        ({"words": None, "places": None}, "missing places words"),
        ({"layers.0.q_proj.weight": None}, "missing layers.0.q_proj.weight"),
        ({"layers.2.q_proj.weight": torch.ones(1)}, "Toy layers.2.q_proj.weight"),
        # Of shapes that do not fit, torch's own errors ended capfilt.
        ({"layers.0.q_proj.weight": torch.ones(2, 3)}, "shapes layers.0.q_proj.weight [2, 3]"),
        ({"token": torch.ones(5)}, "shapes token [5]"),
        ({"types": torch.ones(2, 3)}, "shapes types [2, 3]"),
        ({"types": torch.ones(0)}, "shapes types [0]"),
        ({"layers.1.v_proj.bias": torch.tensor(1.0)}, "shapes layers.1.v_proj.bias []"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_table_is_named(changes, message):
    given = {**give(ROWS, OURS), **changes}
    with refused(message):
        take(HERE, "Toy", ROWS, OURS, {name: each for name, each in given.items() if each is not None})


def test_no_file_is_of_two_layouts():
    """A file of one family that another family's reader took, and refused by its own names."""
    vision, text = VisionConfig(16, 8, 16, 1, 2, 16), TextConfig(28, 16, 2, 2, 16, max_positions=8)
    for layout, config in (
        (BLIP, BlipConfig(vision, text)),
        (ALBEF, AlbefConfig(vision, text)),
        (ALBEF, AlbefConfig(vision, text, words=False)),
        (OPENAI, VIT),
    ):
        names = layout.given(config, build(config).state_dict())
        holding = [each for each in layouts.foreign() if each.holds and each.holds(names)]
        assert holding == [layout]


def test_a_tensor_of_a_model_without_a_row_is_no_tensor_that_is_left_out():
    """A layer that was added to a model, and left out of what is written."""
    for layout, config in ((OPENAI, VIT), (TRANSFORMERS, VIT), (VILT, CONFIG)):
        own = build(config).state_dict()
        assert len(layout.given(config, own)) >= len(own)
        with refused("added.weight", error=KeyError):
            give(layout.names(config), {**own, "added.weight": torch.ones(1)})
