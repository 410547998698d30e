"""Sizes of towers that the presets of several families share.

Not here: the presets themselves (each family's `model.py`).
"""

from __future__ import annotations

from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig

# Sized for processor seconds, on pictures of a few plain objects: a convolutional stem sees shapes early, 36 tokens are
# enough to place them, and most of a step's time is the five text passes, so text layers are few and narrow. No dropout:
# it trains for minutes.
TINY_VISION = VisionConfig(48, 8, width=128, depth=2, heads=4, hidden=256, stem="conv")
TINY_TEXT = TextConfig(1000, 128, 3, 4, 256, max_positions=64, dropout=0.0, attention_dropout=0.0)

# For photographs on one ordinary GPU, or on processors with a frozen trunk in place of the vision tower's stem.
SMALL_VISION = VisionConfig(128, 16, width=256, depth=8, heads=4, hidden=1024, stem="conv")
SMALL_TEXT = TextConfig(4000, 256, 4, 4, 1024, max_positions=128, dropout=0.1, attention_dropout=0.1)

# Photographs on a laptop: a frozen ImageNet trunk whose feature maps can be cached, one block to look around, a small
# text side. 6 x 6 tokens at 192 px.
TRUNK = "efficientnet_lite0"
TRUNK_VISION = VisionConfig(192, 32, width=192, depth=1, heads=4, hidden=384, trunk=TRUNK, trunk_frozen=True)
TRUNK_TEXT = TextConfig(4000, 192, 3, 4, 384, max_positions=64, dropout=0.1, attention_dropout=0.0)
