"""Families of another package for tests that learn from pictures alone, from texts alone, and from both and pairs in a step."""

from __future__ import annotations

from pathlib import Path

from capfilt import models
from tests.plugins.packages import install, use

RECORD = """
from dataclasses import dataclass
from capfilt.data.rows import IMAGE_ROWS, PAIR_ROWS, TEXT_ROWS
from capfilt.models.family import Family, Kind
from capfilt.options import Checked, option

@dataclass(frozen=True)
class Options(Checked):
    learning_rate: float = option(1e-2, "peak", above=0)

def family(name, rows, tokenizer):
    kind = Kind(name, "alone.model:" + name.title() + "Config", "alone.model:" + name.title(), name.title(), "is a test", rows,
                "as-found", tokenizer, parts={"all": ("body",)})
    return Family(name, "alone.of_" + name, (kind,), Options, ("tiny",), ("loss",))

SEES = family("sees", (IMAGE_ROWS,), "")
READS = family("reads", (TEXT_ROWS,), "wordpiece")
TRIO = family("trio", (PAIR_ROWS, IMAGE_ROWS, TEXT_ROWS), "wordpiece")
"""

CODE = """
from dataclasses import dataclass, field
import torch
from torch import nn
from capfilt.models.common.config import ModelConfig, Shape
from capfilt.models.common.presets import TINY_TEXT, TINY_VISION
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig


@dataclass(frozen=True)
class SeesConfig(Shape):
    vision: VisionConfig = field(default_factory=lambda: TINY_VISION)


@dataclass(frozen=True)
class ReadsConfig(Shape):
    text: TextConfig = field(default_factory=lambda: TINY_TEXT)
    max_text_tokens: int = 30
    max_words: int = 0


@dataclass(frozen=True)
class TrioConfig(ModelConfig):
    vision: VisionConfig = field(default_factory=lambda: TINY_VISION)
    text: TextConfig = field(default_factory=lambda: TINY_TEXT)
    max_text_tokens: int = 30
    max_words: int = 0


class Model(nn.Module):
    abilities = ()

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.body = nn.Linear(3, 3)
        if config.vocab_size:
            self.words = nn.Embedding(config.vocab_size, 3)

    def colour(self, batch):
        return self.body(batch.images.float().mean((2, 3)) / 255)

    def meaning(self, batch):
        return self.body((self.words(batch.ids) * batch.mask[..., None]).sum(1))


class Sees(Model):
    pass


class Reads(Model):
    pass


class Trio(Model):
    pass


class Training(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def blocks(self):
        return []

    def sees(self, batch):
        assert batch.ids.shape == (len(batch), 0) and set(batch.texts) == {""}
        return (self.model.colour(batch) - 1).square().mean()

    def reads(self, batch):
        assert batch.pixels is None and batch.features is None
        return (self.model.meaning(batch) - 1).square().mean()

    def losses(self, batch, alpha=0.0, hardness=1.0):
        name = type(self.model).__name__
        if name == "Sees":
            return {"loss": self.sees(batch)}
        if name == "Reads":
            return {"loss": self.reads(batch)}
        both = batch["pairs"]
        pair = (self.model.colour(both) - self.model.meaning(both)).square().mean()
        return {"loss": pair + 0.5 * self.sees(batch["images"]) + 0.25 * self.reads(batch["texts"]), "pair": pair}


def objective(model, tokenizer, options, ranks):
    return Training(model)
"""

PRESET = "from alone.model import {0}Config, objective\n\nPRESETS = {{'tiny': {0}Config()}}\n"


def use_families(site: Path, monkeypatch, record: str = RECORD) -> None:
    """Installs the families in `site` and puts them before the path, for this test alone."""
    (site / "alone").mkdir(parents=True)
    (site / "alone" / "__init__.py").write_text(record)
    (site / "alone" / "model.py").write_text(CODE)
    for name in ("sees", "reads", "trio"):
        (site / "alone" / f"of_{name}.py").write_text(PRESET.format(name.title()))
    entries = {name: f"alone:{name.upper()}" for name in ("sees", "reads", "trio")}
    install(site, "alone_meta", "", {"capfilt.models": entries})
    use(
        monkeypatch, site, "alone", "alone.model", *(f"alone.of_{name}" for name in ("sees", "reads", "trio"))
    )
    models._foreign.cache_clear()
