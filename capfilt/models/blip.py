"""BLIP: a vision tower and a text transformer that embeds, matches and writes (MED; arXiv 2201.12086, sec. 3.1).

What is trained against what lives in objectives.py; sampling and batching live in capfilt.inference. The captioner is
`visual_encoder` + `text_decoder`; the filter is `visual_encoder` + `text_encoder` + `vision_proj`, `text_proj`,
`itm_head`. Encoder and decoder share every module but self-attention (table 3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.errors import UserError
from capfilt.models.config import Shape
from capfilt.models.layers import Pair, exact, init_truncated
from capfilt.models.text import SelfCache, TextConfig, TextDecoder, TextTransformer
from capfilt.models.vision import VisionConfig, VisionTower

CAPTIONER_PARTS = ("visual_encoder", "text_decoder")
FILTER_PARTS = ("visual_encoder", "text_encoder", "vision_proj", "text_proj", "itm_head")
HALVES = ("both", "captioner", "filter")


@dataclass(frozen=True)
class ModelConfig(Shape):
    """What the configurations of models with a vision and a text side share."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)


@dataclass(frozen=True)
class BlipConfig(ModelConfig):
    """Everything that decides the shape of a Blip; `to_dict`/`from_dict` go through JSON unchanged."""

    embed_dim: int = 256  # BLIP, sec. 3.2, code: width of the ITC space
    max_text_tokens: int = 35  # BLIP, code: longest text in retrieval, so of the filter
    prompt: str = "a picture of "  # BLIP, sec. 4.1, code: prompt of the captioner
    half: str = (
        "both"  # "captioner" or "filter": a checkpoint that was published with the modules of one only
    )
    max_words: int = 30  # BLIP, code: of captions

    def __post_init__(self) -> None:
        if self.half not in HALVES:
            raise UserError(f"half is {self.half!r}: use one of {', '.join(HALVES)}")


class Blip(nn.Module):
    """See the module's docstring. Images are pixels uint8 [B, 3, S, S], normalised floats, or trunk features.

    Texts are `ids` int64 [B, L] = [CLS] ... [SEP] and padding, `mask` bool [B, L], as the tokenizer gives them:
    position 0 is overwritten here where a mode wants [ENC] or [DEC].
    """

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = VisionTower(config.vision)
        shared: TextTransformer | None = None
        if config.half != "captioner":
            self.text_encoder = shared = TextTransformer(config.text, config.vision.width)
        if config.half != "filter":
            self.text_decoder = TextDecoder(config.text, config.vision.width, shared)
        if config.half == "captioner":
            return
        self.vision_proj = nn.Linear(config.vision.width, config.embed_dim)
        self.text_proj = nn.Linear(config.text.width, config.embed_dim)
        self.itm_head = nn.Linear(config.text.width, 2)
        for head in (self.vision_proj, self.text_proj, self.itm_head):
            init_truncated(head)
        # BLIP, sec. 3.2, code: learned, starts at 0.07; the objective clamps it to [0.001, 0.5] in place.
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def require(self, half: str) -> None:
        """UserError where this model lacks the modules of `half` ("captioner" or "filter")."""
        if self.config.half not in ("both", half):
            lacking = CAPTIONER_PARTS if half == "captioner" else FILTER_PARTS
            raise UserError(
                f"this model is a {self.config.half} and no {half}: it has no {', '.join(lacking[1:])}"
            )

    # Images and texts by themselves.

    def encode_image(self, images: Tensor) -> Tensor:
        """Image tokens [B, N, Dv] after the final LayerNorm, [CLS] first."""
        out: Tensor = self.visual_encoder(images)
        return out

    def embed_image(self, image_tokens: Tensor) -> Tensor:
        """fp32 unit vectors [B, E] from the [CLS] of image tokens [B, N, Dv]."""
        return project(self.vision_proj, image_tokens)

    def encode_text(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """States [B, L, D] of texts read without an image; [CLS] stays at position 0."""
        out: Tensor = self.text_encoder(ids, mask)
        return out

    def embed_text(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """fp32 unit vectors [B, E] of texts."""
        return project(self.text_proj, self.text_encoder(ids, mask, first=True))

    # Texts against images.

    def match_logits(
        self,
        ids: Tensor,
        mask: Tensor | None,
        image_tokens: Tensor | Sequence[Pair],
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """fp32 logits [B, 2], index 1 = match, of texts i with images i.

        image_tokens: [B, N, Dv], or their `prefill_cross`. image_mask: bool [B, N], false tokens are not attended to.
        """
        cross = self.prefill_cross(image_tokens) if isinstance(image_tokens, Tensor) else image_tokens
        states = self.text_encoder(
            self._start(ids, self.config.text.enc_id), mask, cross, image_mask, first=True
        )
        return exact(self.itm_head, states[:, 0])

    def lm_logits(
        self,
        ids: Tensor,
        mask: Tensor | None,
        image_tokens: Tensor | Sequence[Pair],
        where: Tensor | None = None,
    ) -> Tensor:
        """fp32 logits [B, L, V]; position t predicts token t + 1 from the image and tokens 0..t.

        where: bool [B, L] asks for these positions only, [T, V]: most of a small model's time goes into this projection.
        """
        cross = self.prefill_cross(image_tokens) if isinstance(image_tokens, Tensor) else image_tokens
        states = self.text_decoder.bert(self._start(ids, self.config.text.dec_id), mask, cross, causal=True)
        return self.text_decoder.logits(states if where is None else states[where])

    # Writing, token by token.

    def prefill_cross(self, image_tokens: Tensor) -> list[Pair]:
        """Cross-attention keys and values of image tokens [B, N, Dv] for all layers, computed once per image."""
        stack = self.text_decoder.bert if self.config.half == "captioner" else self.text_encoder
        return stack.cross_keys_values(image_tokens)

    def new_cache(self, ways: int, max_length: int, cross: Sequence[Pair]) -> SelfCache:
        """A static self-attention cache for `ways` texts per image in `cross`.

        max_length: tokens of a text at most, [DEC] and prompt included.
        """
        if max_length > self.config.text.max_positions:
            raise UserError(
                f"{max_length} tokens (prompt included) are more than this model's {self.config.text.max_positions}"
                " positions: lower max_new_tokens"
            )
        like = cross[0][0]
        return self.text_decoder.bert.new_cache(len(like), ways, max_length, like)

    def decode(self, ids: Tensor, cache: SelfCache, cross: Sequence[Pair]) -> Tensor:
        """fp32 logits [R, V] of the token after `ids` int64 [R, T], which continue what the cache holds.

        The first call takes a prompt, one row per image, whose position 0 becomes [DEC]. Later ones take the next token
        of each of an image's K texts, side by side: rows i*K .. i*K+K-1 belong to image i. Updates the cache.
        """
        if cache.length == 0:
            ids = self._start(ids, self.config.text.dec_id)
        states = self.text_decoder.bert(ids, cross=cross, cache=cache)
        return self.text_decoder.logits(states[:, -1])

    # Changing an existing model.

    def recompute_activations(self, on: bool = True) -> None:
        """Whether training keeps every layer's activations or, with `on`, computes them again in the backward pass.

        Every block of the vision tower and every layer of the three text passes; the released code does it for the last
        few vision blocks. Not part of the config, since it changes no result.
        """
        self.visual_encoder.recompute = on
        if self.config.half != "captioner":
            self.text_encoder.recompute = on
        if self.config.half != "filter":
            self.text_decoder.bert.recompute = on

    def resize_image(self, image_size: int) -> None:
        """Takes images of another size from now on: the position embedding is resized, everything else stays."""
        self.config = dataclasses.replace(self.config, vision=self.visual_encoder.resize(image_size))

    @staticmethod
    def _start(ids: Tensor, token: int) -> Tensor:
        ids = ids.clone()
        ids[:, 0] = token
        return ids


def project(head: nn.Linear, states: Tensor) -> Tensor:
    """fp32 unit vectors [B, E]: the head on position 0 of states [B, L, D], L2-normalised; free of autocast."""
    return F.normalize(exact(head, states[:, 0]), dim=-1)


def build(config: BlipConfig, seed: int = 0) -> Blip:
    """A freshly initialised Blip: the same config and seed give the same weights, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Blip(config)


def parameters_of(model: Blip, parts: Sequence[str] | None = None) -> int:
    """How many parameters the named parts hold together, shared ones counted once; all of them by default."""
    modules = [getattr(model, part) for part in parts] if parts is not None else [model]
    unique = {id(each): each.numel() for module in modules for each in module.parameters()}
    return sum(unique.values())
