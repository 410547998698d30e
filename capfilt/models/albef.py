"""ALBEF: images and texts are aligned before they are fused (arXiv 2107.07651, sec. 3.1).

A vision tower, and a BERT cut in two: its first half reads a text alone, its second half, with cross-attention, reads on
while it looks at the image. What is trained against what lives in albef_pretraining.py; the models of the tasks are
albef_tasks.py's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from capfilt.data.tokenizer import ADDED
from capfilt.errors import UserError
from capfilt.models.blip import ModelConfig, project
from capfilt.models.layers import Pair, exact, init_normal, init_std, init_truncated
from capfilt.models.text import Attention, Predictions, TextConfig, TextTransformer
from capfilt.models.vision import VisionConfig, VisionTower


def bert() -> TextConfig:
    """bert-base-uncased (ALBEF, sec. 3.1)."""
    return TextConfig(vocab_size=30522)


def tokens_known(text: TextConfig) -> int:
    """How many tokens the tokenizer of such a model has: its last two, [DEC] and [ENC], are BLIP's, and no ALBEF has an
    embedding of them.
    """
    return text.vocab_size + len(ADDED)


@dataclass(frozen=True)
class AlbefConfig(ModelConfig):
    """Everything that decides the shape of an Albef; `to_dict`/`from_dict` go through JSON unchanged."""

    vision: VisionConfig = field(default_factory=lambda: VisionConfig(image_size=256))
    text: TextConfig = field(default_factory=bert)
    embed_dim: int = 256  # ALBEF, sec. 3.2, code: width of the ITC space
    max_text_tokens: int = 31  # ALBEF, code: longest text in retrieval, 30, and the [SEP] that is not read
    max_words: int = 30  # ALBEF, code: of captions
    words: bool = True  # whether there is a head that names hidden words: published finetuned for retrieval, there is none

    @property
    def vocab_size(self) -> int:
        return tokens_known(self.text)


class Albef(nn.Module):
    """See the module's docstring. Images are pixels uint8 [B, 3, S, S], normalised floats, or trunk features.

    Texts are `ids` int64 [B, L] = [CLS], words and padding, `mask` bool [B, L]: `without_end` of what the tokenizer gives.
    """

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = VisionTower(config.vision)
        self.text_encoder = halves(config.text, config.vision.width)
        if config.words:
            self.mlm_head = Predictions(config.text)
            init_normal(self.mlm_head, init_std(config.text.width))
        self.vision_proj = nn.Linear(config.vision.width, config.embed_dim)
        self.text_proj = nn.Linear(config.text.width, config.embed_dim)
        self.itm_head = nn.Linear(config.text.width, 2)
        for head in (self.vision_proj, self.text_proj, self.itm_head):
            init_truncated(head)
        # ALBEF, sec. 3.2, code: learned, starts at 0.07; the objective clamps it to [0.001, 0.5] in place.
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def require_words(self) -> None:
        """UserError where this model has no head that names hidden words."""
        if not self.config.words:
            raise UserError(
                "this ALBEF has no head of hidden words, as one that was published finetuned for retrieval: take a "
                "pretrained one"
            )

    # Images and texts by themselves.

    def encode_image(self, images: Tensor) -> Tensor:
        """Image tokens [B, N, Dv] after the final LayerNorm, [CLS] first."""
        out: Tensor = self.visual_encoder(images)
        return out

    def embed_image(self, image_tokens: Tensor) -> Tensor:
        """fp32 unit vectors [B, E] from the [CLS] of image tokens [B, N, Dv]."""
        return project(self.vision_proj, image_tokens)

    def encode_text(self, ids: Tensor, mask: Tensor | None = None, first: bool = False) -> Tensor:
        """States [B, L, D] of texts after the layers that read text alone; `first`: only that of [CLS], [B, 1, D]."""
        embedded = self.text_encoder.embeddings(ids, 0)
        return self.text_encoder.through(embedded, mask, slice(alone(self.config.text)), first=first)

    def embed_text(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """fp32 unit vectors [B, E] of texts."""
        return self.embed_states(self.encode_text(ids, mask, first=True))

    def embed_states(self, states: Tensor) -> Tensor:
        """fp32 unit vectors [B, E] of texts from their states [B, L, D]."""
        return project(self.text_proj, states)

    # Texts against images.

    def prefill_cross(self, image_tokens: Tensor) -> list[Pair]:
        """Cross-attention keys and values of image tokens [B, N, Dv] for the layers that fuse, once per image."""
        return self.text_encoder.cross_keys_values(image_tokens)

    def fuse(self, states: Tensor, mask: Tensor | None, cross: Sequence[Pair], first: bool = False) -> Tensor:
        """States [B, L, D] after the layers that fuse, of `encode_text`'s and images' `prefill_cross`."""
        return self.text_encoder.through(
            states, mask, slice(alone(self.config.text), None), cross, first=first
        )

    def match_logits(self, ids: Tensor, mask: Tensor | None, image_tokens: Tensor | Sequence[Pair]) -> Tensor:
        """fp32 logits [B, 2], index 1 = match, of texts i with images i; image_tokens: [B, N, Dv] or `prefill_cross`."""
        cross = self.prefill_cross(image_tokens) if isinstance(image_tokens, Tensor) else image_tokens
        return self.match_states(self.encode_text(ids, mask), mask, cross)

    def match_states(self, states: Tensor, mask: Tensor | None, cross: Sequence[Pair]) -> Tensor:
        """`match_logits` of texts whose states [B, L, D] are there already."""
        return exact(self.itm_head, self.fuse(states, mask, cross, first=True)[:, 0])

    def mlm_logits(
        self, ids: Tensor, mask: Tensor | None, cross: Sequence[Pair], where: Tensor | None = None
    ) -> Tensor:
        """fp32 logits [B, L, V] of what stands at each position of texts seen with their images.

        where: bool [B, L] asks for these positions only, [T, V].
        """
        states = self.fuse(self.encode_text(ids, mask), mask, cross)
        words = self.text_encoder.embeddings.word_embeddings.weight
        out: Tensor = self.mlm_head(states if where is None else states[where], words)
        return out

    # Changing an existing model.

    def recompute_activations(self, on: bool = True) -> None:
        """As `Blip.recompute_activations`."""
        self.visual_encoder.recompute = self.text_encoder.recompute = on

    def resize_image(self, image_size: int) -> None:
        """Takes images of another size from now on: the position embedding is resized, everything else stays."""
        self.config = dataclasses.replace(self.config, vision=self.visual_encoder.resize(image_size))


def without_end(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Texts int64 [B, L], bool [B, L] without the [SEP] that is each one's last token, [B, L - 1] both.

    ALBEF, released code: its tokenizer ends no text.
    """
    return ids[:, :-1], mask[:, 1:] if mask is not None else None


def alone(text: TextConfig) -> int:
    """How many layers read text alone: the first half (ALBEF, sec. 3.1: 6 of 12)."""
    return text.depth // 2


def halves(text: TextConfig, image_width: int) -> TextTransformer:
    """A text transformer whose second half looks at an image."""
    return TextTransformer(
        text,
        image_width,
        crossattention=lambda index: Attention(text, image_width) if index >= alone(text) else None,
    )


def build_albef(config: AlbefConfig, seed: int = 0) -> Albef:
    """A freshly initialised Albef: the same config and seed give the same weights, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Albef(config)
