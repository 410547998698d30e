"""Two families of another package for tests: one that sees pictures alone, and one with texts that may start from it."""

from __future__ import annotations

from pathlib import Path

from capfilt import models
from tests.plugins.packages import install, use

RECORD = """
from dataclasses import dataclass
from capfilt.data.rows import PAIR_ROWS
from capfilt.models.family import RETRIEVAL, Family, Kind
from capfilt.options import Checked, option

@dataclass(frozen=True)
class Options(Checked):
    learning_rate: float = option(1e-2, "peak", above=0)

@dataclass(frozen=True)
class ReadingOptions(Options):
    pass

PICTO = Family(
    "picto", "picto.model",
    (Kind("picto", "picto.model:PictoConfig", "picto.model:Picto", "Picto", "sees pictures", (PAIR_ROWS,), "as-found", "",
          parts={"vision": ("visual_encoder",), "head": ("head",)}),),
    Options, ("tiny",), ("loss",),
)
READER = Family(
    "reader", "picto.reading",
    (Kind("reader-base", "picto.model:ReaderConfig", "picto.model:Reader", "Reader", "embeds texts", (PAIR_ROWS,), "as-found",
          learns={RETRIEVAL: "picto.model:objective"},
          parts={"vision": ("visual_encoder",), "words": ("words",)}),),
    ReadingOptions, ("reading",), ("loss",), starts={"picto": "picto.model:begun", "blip": "picto.model:begun"},
)
"""

CODE = """
import dataclasses
from dataclasses import dataclass, field
import torch
from torch import nn
from capfilt.models import build
from capfilt.models.common.config import ModelConfig, Shape
from capfilt.models.common.presets import TINY_TEXT, TINY_VISION
from capfilt.models.common.vision import VisionConfig, VisionTower


@dataclass(frozen=True)
class PictoConfig(Shape):
    vision: VisionConfig = field(default_factory=lambda: TINY_VISION)
    colours: int = 3


class Picto(nn.Module):
    abilities = ("features",)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual_encoder = VisionTower(config.vision)
        self.head = nn.Linear(config.vision.width, config.colours)

    def encode_image(self, images):
        return self.visual_encoder(images)

    def guess(self, batch):
        return self.head(self.encode_image(batch.images)[:, 0])


@dataclass(frozen=True)
class ReaderConfig(ModelConfig):
    vision: VisionConfig = field(default_factory=lambda: TINY_VISION)
    max_text_tokens: int = 30
    max_words: int = 0


class Reader(Picto):
    def __init__(self, config):
        nn.Module.__init__(self)
        self.config = config
        self.visual_encoder = VisionTower(config.vision)
        self.words = nn.Embedding(config.vocab_size, 3)
        self.head = nn.Linear(config.vision.width, 3)

    def guess(self, batch):
        return super().guess(batch) + self.words(batch.ids).mean(1)


class Training(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def blocks(self):
        return list(self.model.visual_encoder.blocks)

    def losses(self, batch, alpha=0.0, hardness=1.0):
        # The mean colour of each picture.
        aim = batch.images.float().mean((2, 3)) / 255
        return {"loss": nn.functional.mse_loss(self.model.guess(batch).float(), aim)}


PRESETS = {"tiny": PictoConfig(TINY_VISION)}


def objective(model, tokenizer, options, ranks):
    return Training(model)


def begun(theirs, options, tokenizer):
    config = ReaderConfig(theirs.config.vision, TINY_TEXT).for_vocabulary(tokenizer.vocab_size)
    config = config.sized(theirs.config.image_size, 0, tokenizer.pad_id)
    model = build(config, options.seed)
    model.visual_encoder.load_state_dict(theirs.visual_encoder.state_dict())
    return model
"""

READING = """
from picto.model import TINY_TEXT, TINY_VISION, ReaderConfig, objective

PRESETS = {"reading": ReaderConfig(TINY_VISION, TINY_TEXT)}
"""


def use_families(site: Path, monkeypatch, record: str = RECORD, code: str = CODE) -> None:
    """Installs the families in `site` and puts them before the path, for this test alone."""
    (site / "picto").mkdir(parents=True)
    (site / "picto" / "__init__.py").write_text(record)
    (site / "picto" / "model.py").write_text(code)
    (site / "picto" / "reading.py").write_text(READING)
    entries = {"picto": "picto:PICTO", "reader": "picto:READER"}
    install(site, "picto_meta", "", {"capfilt.models": entries})
    use(monkeypatch, site, "picto", "picto.model", "picto.reading")
    models._foreign.cache_clear()
