"""Model sizes by name. What a checkpoint holds is its own config's; presets only start new models."""

from __future__ import annotations

import dataclasses

from capfilt.errors import UserError
from capfilt.models.blip import BlipConfig
from capfilt.models.text import TextConfig
from capfilt.models.vision import VisionConfig

# BLIP, arXiv 2201.12086, sec. 4.1: ViT-B/16 and ViT-L/16 with bert-base; drop-path as in the published code.
BASE = BlipConfig()
LARGE = BlipConfig(vision=VisionConfig(width=1024, depth=24, heads=16, hidden=4096, drop_path=0.1))
TINY = BlipConfig(
    vision=VisionConfig(48, 8, width=128, depth=2, heads=4, hidden=256, stem="conv"),
    text=TextConfig(1000, 128, 3, 4, 256, max_positions=64, dropout=0.0, attention_dropout=0.0),
    embed_dim=128,
)
SMALL = BlipConfig(
    vision=VisionConfig(128, 16, width=256, depth=8, heads=4, hidden=1024, stem="conv"),
    text=TextConfig(4000, 256, 4, 4, 1024, max_positions=128, dropout=0.1, attention_dropout=0.1),
)
PRESETS: dict[str, BlipConfig] = {"tiny": TINY, "small": SMALL, "base": BASE, "large": LARGE}


def preset(name: str, vocab_size: int) -> BlipConfig:
    """The named preset for a vocabulary of `vocab_size` (the two extra ids included); UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"model preset {name!r} is unknown: use one of {', '.join(PRESETS)}")
    config = PRESETS[name]
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=vocab_size))
