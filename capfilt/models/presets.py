"""Model sizes by name. What a checkpoint holds is its own config's; presets only start new models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from capfilt.data.tokenizer import ADDED
from capfilt.errors import UserError
from capfilt.models.albef import AlbefConfig
from capfilt.models.blip import BlipConfig
from capfilt.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from capfilt.models.text import TextConfig
from capfilt.models.vilt import ViltConfig, ViltTextConfig, ViltVisionConfig
from capfilt.models.vision import VisionConfig

C = TypeVar("C", AlbefConfig, ClipConfig, ViltConfig)
# BLIP, arXiv 2201.12086, sec. 4.1: ViT-B/16 and ViT-L/16 with bert-base; drop-path as in the published code.
BASE = BlipConfig()
LARGE = BlipConfig(vision=VisionConfig(width=1024, depth=24, heads=16, hidden=4096, drop_path=0.1))
# Sized for processor seconds, on pictures of a few plain objects: a convolutional stem sees shapes early, 36 tokens are
# enough to place them, and most of a step's time is the five text passes, so text layers are few and narrow. No dropout:
# it trains for minutes.
TINY = BlipConfig(
    vision=VisionConfig(48, 8, width=128, depth=2, heads=4, hidden=256, stem="conv"),
    text=TextConfig(1000, 128, 3, 4, 256, max_positions=64, dropout=0.0, attention_dropout=0.0),
    embed_dim=128,
)
# For photographs on one ordinary GPU, or on processors with a frozen trunk in place of the vision tower's stem.
SMALL = BlipConfig(
    vision=VisionConfig(128, 16, width=256, depth=8, heads=4, hidden=1024, stem="conv"),
    text=TextConfig(4000, 256, 4, 4, 1024, max_positions=128, dropout=0.1, attention_dropout=0.1),
)
# Photographs on a laptop: a frozen ImageNet trunk whose feature maps can be cached, one block to look around, a small
# text side. 6 x 6 tokens at 192 px.
TRUNK = BlipConfig(
    vision=VisionConfig(
        192, 32, width=192, depth=1, heads=4, hidden=384, trunk="efficientnet_lite0", trunk_frozen=True
    ),
    text=TextConfig(4000, 192, 3, 4, 384, max_positions=64, dropout=0.1, attention_dropout=0.0),
)
# CLIP, arXiv 2103.00020, table 19 and 20: ViT-B/32 and ViT-L/14. The two others have the original's ResNet, which sees shapes
# early, where BLIP's have a convolutional stem; RN is at a quarter of RN50's width. TRUNK is BLIP's of the name.
CLIP: dict[str, ClipConfig] = {
    "tiny": ClipConfig(
        ClipVisionConfig(64, width=24, heads=6, stages="1-1-1-1"),
        ClipTextConfig(1000, 64, 128, 3, 4, 256),
        embed_dim=128,
    ),
    "trunk": ClipConfig(
        ClipVisionConfig(192, 32, width=192, depth=1, heads=4, hidden=384, trunk=TRUNK.vision.trunk),
        ClipTextConfig(4000, 64, 192, 3, 4, 384),
        embed_dim=256,
    ),
    "small": ClipConfig(
        ClipVisionConfig(128, width=32, heads=16, stages="2-2-2-2"),
        ClipTextConfig(4000, 77, 256, 4, 4, 1024),
        embed_dim=256,
    ),
    "base": ClipConfig(),
    "large": ClipConfig(
        ClipVisionConfig(224, 14, 1024, 24, 16, 4096),
        ClipTextConfig(49408, 77, 768, 12, 12, 3072),
        embed_dim=768,
    ),
}
# ViLT, arXiv 2102.03334, sec. 4.2: ViLT-B/32. Its definition leaves no stem to see shapes early with: tiny and small have
# patches of a few pixels, trunk the map of BLIP's trunk in their place. All three name hidden words by the words' own
# embeddings, which halves what they must learn of them; tiny and trunk, which train for minutes, have no dropout.
VILT: dict[str, ViltConfig] = {
    "tiny": ViltConfig(
        ViltVisionConfig(48, 8),
        ViltTextConfig(1000),
        width=128,
        depth=3,
        heads=4,
        hidden=256,
        dropout=0.0,
        tied=True,
    ),
    "trunk": ViltConfig(
        ViltVisionConfig(192, 32, trunk=TRUNK.vision.trunk),
        ViltTextConfig(4000),
        width=192,
        depth=4,
        heads=4,
        hidden=384,
        dropout=0.0,
        tied=True,
    ),
    "small": ViltConfig(
        ViltVisionConfig(128, 16), ViltTextConfig(4000), width=256, depth=8, heads=4, hidden=1024, tied=True
    ),
    "base": ViltConfig(),
}
# ALBEF, arXiv 2107.07651, sec. 4: ViT-B/16 at 256 px and bert-base. The others are BLIP's of the name; tiny and trunk have a
# layer more, so that each half of the text side has two.
ALBEF: dict[str, AlbefConfig] = {
    "tiny": AlbefConfig(TINY.vision, dataclasses.replace(TINY.text, depth=4), embed_dim=128),
    "small": AlbefConfig(SMALL.vision, SMALL.text),
    "trunk": AlbefConfig(TRUNK.vision, dataclasses.replace(TRUNK.text, depth=4), embed_dim=128),
    "base": AlbefConfig(),
}
PRESETS: dict[str, BlipConfig] = {"tiny": TINY, "small": SMALL, "trunk": TRUNK, "base": BASE, "large": LARGE}


def preset(name: str, vocab_size: int) -> BlipConfig:
    """The named preset for a vocabulary of `vocab_size` (the two extra ids included); UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"model preset {name!r} is unknown: use one of {', '.join(PRESETS)}")
    config = PRESETS[name]
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=vocab_size))


def albef_preset(name: str, vocab_size: int) -> AlbefConfig:
    """The named preset of an ALBEF for a tokenizer of `vocab_size`; UserError for an unknown name."""
    return _sized(ALBEF, "albef", name, vocab_size - len(ADDED))


def clip_preset(name: str, vocab_size: int) -> ClipConfig:
    """The named preset of a CLIP for a vocabulary of `vocab_size`; UserError for an unknown name."""
    return _sized(CLIP, "clip", name, vocab_size)


def vilt_preset(name: str, vocab_size: int) -> ViltConfig:
    """The named preset of a ViLT for a vocabulary of `vocab_size`; UserError for an unknown name."""
    return _sized(VILT, "vilt", name, vocab_size)


def _sized(presets: Mapping[str, C], kind: str, name: str, vocab_size: int) -> C:
    if name not in presets:
        raise UserError(f"model preset {name!r} of {kind} is unknown: use one of {', '.join(presets)}")
    config = presets[name]
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=vocab_size))
