"""Catches a CLIP that open_clip computes otherwise: from what we write it, or from what it saves.

Runs where open_clip is; `just test-open-clip` puts it into a directory of its own and runs this.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.machinery
import sys
import types

import pytest
import torch

from capfilt.data.bpe import BpeTokenizer
from capfilt.models import checkpoint
from capfilt.models.clip.model import ClipTextConfig, ClipVisionConfig
from capfilt.models.export import export
from tests.models.interop.clips import RESNET, VIT, sharpened, texts


@pytest.fixture
def open_clip(monkeypatch):
    """The package; torchvision, of which the models need nothing, is made up where it cannot be imported."""
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed: run `just test-open-clip`")
    try:
        import torchvision  # noqa: F401
    except Exception:  # noqa: BLE001  # beside a torch it was not built for it raises what it likes
        for name in ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc"):
            module = Stub(f"torchvision{name}")
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, module.__name__, module)
            parent, _, leaf = module.__name__.rpartition(".")
            if parent:
                setattr(sys.modules[parent], leaf, module)
    yield importlib.import_module("open_clip")
    # What was imported beside a made-up torchvision must not outlive it.
    for name in [name for name in sys.modules if name.partition(".")[0] in ("open_clip", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)


class Anything(type):
    """A class that has whatever attribute is asked for."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Stub(types.ModuleType):
    """Has any class that is asked for."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


WIDE = dataclasses.replace(
    VIT,
    vision=ClipVisionConfig(32, 8, 160, 2, 2, 394),
    text=ClipTextConfig(99, 16, 96, 2, 4, 200),
    activation="gelu",
)
"""Heads of 80 and of 24 channels, feed-forwards that are no whole multiple: as in open_clip's largest models."""


@pytest.mark.parametrize(
    "config",
    [VIT, RESNET, WIDE, dataclasses.replace(VIT, logit_bias=True)],
    ids=["vit", "resnet", "wide", "bias"],
)
def test_open_clip_and_we_give_the_same_vectors(tmp_path, open_clip, config):
    tokenizer = BpeTokenizer.train(["a photo of a dog", "a dog on a beach"] * 3, 530)
    text = dataclasses.replace(config.text, vocab_size=tokenizer.vocab_size)
    mine = sharpened(dataclasses.replace(config, text=text))
    checkpoint.save(tmp_path / "ours", mine, tokenizer)
    export(tmp_path / "ours", "openai", tmp_path / "theirs")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'theirs'}").eval()
    pixels = torch.randn(3, 3, config.image_size, config.image_size)
    ids = torch.nn.functional.pad(texts(mine.config), (0, config.text.context - 10))
    with torch.no_grad():
        close(mine.embed_image(pixels), theirs.encode_image(pixels, normalize=True))
        close(mine.embed_text(ids), theirs.encode_text(ids, normalize=True))
        close(mine.logit_scale, theirs.logit_scale)
    # And back, as its training saves it.
    torch.save(
        {"epoch": 1, "name": "run", "state_dict": theirs.state_dict()}, tmp_path / "theirs" / "epoch_1.pt"
    )
    back = checkpoint.open_any(tmp_path / "theirs" / "epoch_1.pt")[0].model
    assert back.config == mine.config
    for name, tensor in mine.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
