"""ALBEF: images and texts are aligned before they are fused, and its losses (arXiv 2107.07651, sec. 3).

A vision tower, and a BERT cut in two: its first half reads a text alone, its second half, with cross-attention, reads on
while it looks at the image. ITC, ITM and MLM, the first and the last taught by momentum towers too.
Not here: contrast and matching, which BLIP has too (`common/momentum.py`), which tokens are hidden (`common/masking.py`), the
models of the tasks (`tasks.py`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.data.tokenizer import ADDED
from capfilt.errors import UserError
from capfilt.models.common.config import ModelConfig
from capfilt.models.common.layers import Pair, exact, init_normal, init_std, init_truncated, project
from capfilt.models.common.masking import IGNORED, Masking
from capfilt.models.common.momentum import Alignment, AlignmentConfig, Embeds, told
from capfilt.models.common.objectives import distilled_losses
from capfilt.models.common.presets import (
    SMALL_TEXT,
    SMALL_VISION,
    TINY_TEXT,
    TINY_VISION,
    TRUNK_TEXT,
    TRUNK_VISION,
)
from capfilt.models.common.pretrained import load_bert, load_vit
from capfilt.models.common.ranks import ALONE, Ranks, Rows
from capfilt.models.common.text import Attention, Predictions, TextConfig, TextTransformer
from capfilt.models.common.vision import Towered, VisionConfig, VisionTower


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

    def for_vocabulary(self, size: int) -> AlbefConfig:
        return super().for_vocabulary(size - len(ADDED))


class Albef(Towered):
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

    abilities = ("features", "embed", "match")

    @staticmethod
    def taken(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Texts as this model reads them, of what the tokenizer gives."""
        return without_end(ids, mask)

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


@dataclass(frozen=True)
class AlbefObjective(AlignmentConfig):
    """Which losses, and their constants; retrieval is finetuned with ("itc", "itm")."""

    known: ClassVar[tuple[str, ...]] = ("itc", "itm", "mlm")

    objectives: tuple[str, ...] = ("itc", "itm", "mlm")
    queue_size: int = 65536
    """ALBEF, arXiv 2107.07651, sec. 4."""
    negative_floor: float = 0.0
    """ALBEF, released code: none."""


class AlbefPretraining(Alignment):
    """An Albef with what its training needs and its use does not.

    `losses(batch, alpha)` is one step's forward pass: an image is encoded once, and once its cross-attention keys and
    values are made for ITM's three rows and MLM's one; a text's own layers run once for ITC and ITM, whose 3B rows go
    through the fusing layers alone.
    """

    config: AlbefObjective

    def __init__(
        self,
        model: Albef,
        masking: Masking | None = None,
        config: AlbefObjective | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        config = config or AlbefObjective()
        if masking is None and "mlm" in config.objectives:
            raise UserError("masked language modelling needs to know its vocabulary: give a Masking")
        if "mlm" in config.objectives:
            model.require_words()
        super().__init__(model, config, ranks, lambda: self._towers(model, config))
        self.masking = masking

    @staticmethod
    def _towers(model: Albef, config: AlbefObjective) -> Albef:
        """A copy that follows the model and is moved by nothing else; without what nothing runs in it.

        It stays in training mode with the module it belongs to, dropout included, as in the released code.
        """
        towers = copy.deepcopy(model)
        del towers.itm_head, towers.temperature
        if "mlm" not in config.objectives:
            if model.config.words:
                del towers.mlm_head
            for layer in towers.text_encoder.layers:
                layer.crossattention = None
        return towers.requires_grad_(False)

    def losses(self, batch: Batch, alpha: float = 0.0, hardness: float = 1.0) -> dict[str, Tensor]:
        """fp32 scalars: "loss" (weighted sum, with gradient), "itc", "itm", "mlm" as configured, and without gradient what
        `BlipPretraining.losses` gives, and "mlm_accuracy": the share of hidden tokens whose likeliest name is the right one.

        `alpha` is the weight of the momentum towers' word, in ITC's targets and in MLM's (see `alpha_ramp`); the rest is as
        there.
        """
        objectives, model, towers = self.config.objectives, self.model, self.momentum
        ids, mask = without_end(batch.ids, batch.mask)
        assert mask is not None
        rows = self.ranks.rows(*ids.shape)
        images = self._images(batch)
        tokens = model.encode_image(images)
        cross = model.prefill_cross(tokens) if {"itm", "mlm"} & set(objectives) else []
        tokens_m = None
        if towers is not None:
            with torch.no_grad():
                tokens_m = towers.encode_image(images)
        states = model.encode_text(ids, mask) if {"itc", "itm"} & set(objectives) else None

        def embeds() -> Embeds:
            live = model.embed_image(tokens), model.embed_states(states)
            if towers is None:
                return live, None
            with torch.no_grad():
                return live, (towers.embed_image(tokens_m), towers.embed_text(ids, mask))

        def texts(near: Rows) -> tuple[Tensor, Tensor]:
            assert states is not None
            if near.ranks.world == 1:
                return states, mask
            _, masks = near.gather_texts(ids, mask)
            return near.gather(F.pad(states, (0, 0, 0, near.length - states.shape[1]))), masks

        found, figures = self._aligned(
            *(batch, rows, tokens, cross, alpha, hardness),
            embeds=embeds,
            texts=texts,
            logits=model.match_states,
        )
        if "mlm" in objectives:
            found["mlm"], figures["mlm_accuracy"] = self._name(ids, mask, cross, tokens_m, alpha)
        return {"loss": self._weighed(found), **found, **figures}

    def _name(
        self, ids: Tensor, mask: Tensor, cross: Sequence[Pair], tokens_m: Tensor | None, alpha: float
    ) -> tuple[Tensor, Tensor]:
        """MLM: the loss of naming hidden tokens, and the share that is named right."""
        assert self.masking is not None
        ids, labels = self.masking(ids, mask)
        hidden = labels != IGNORED
        logits = self.model.mlm_logits(ids, mask, cross, hidden)
        teacher = None
        if self.momentum is not None and alpha > 0.0:
            with torch.no_grad():
                teacher = self.momentum.mlm_logits(ids, mask, self.momentum.prefill_cross(tokens_m), hidden)
        labels = labels[hidden]
        count = self.ranks.mean(hidden.sum()).clamp(min=1.0 / self.ranks.world)
        with torch.no_grad():
            right = (logits.argmax(dim=1) == labels).float().sum() / max(1, len(labels))
        return distilled_losses(logits, labels, teacher, alpha).sum() / count, right


def objective(model: Albef, tokenizer: Any, options: Any, ranks: Ranks) -> AlbefPretraining:
    """ITC, ITM and MLM with momentum distillation (ALBEF, sec. 3)."""
    masking = Masking.of(tokenizer, options.mask_share)
    return AlbefPretraining(model, masking, AlbefObjective(**told(options)), ranks)


def retrieval(model: Albef, tokenizer: Any, options: Any, ranks: Ranks) -> AlbefPretraining:
    """ITC and ITM (ALBEF, sec. 5)."""
    config = AlbefObjective(objectives=("itc", "itm"), **told(options))
    return AlbefPretraining(model, config=config, ranks=ranks)


def configured(config: AlbefConfig, options: Any) -> AlbefConfig:
    """The stem that was asked for."""
    vision = dataclasses.replace(config.vision, stem=options.stem or config.vision.stem)
    return dataclasses.replace(config, vision=vision)


def start_vision(model: Albef, directory: str | Path) -> None:
    """Starts the vision tower from a transformers ViT or DeiT, as published."""
    load_vit(model.visual_encoder, directory)


def start_text(model: Albef, directory: str | Path) -> None:
    """Starts the text side from a transformers BERT, its language head too where there is one."""
    head = model.mlm_head if model.config.words else None
    load_bert(directory, model.config, [model.text_encoder], head, types=True)


# ALBEF, arXiv 2107.07651, sec. 4: ViT-B/16 at 256 px and bert-base. The others are BLIP's of the name; tiny and trunk have a
# layer more, so that each half of the text side has two.
PRESETS: dict[str, AlbefConfig] = {
    "tiny": AlbefConfig(TINY_VISION, dataclasses.replace(TINY_TEXT, depth=4), embed_dim=128),
    "small": AlbefConfig(SMALL_VISION, SMALL_TEXT),
    "trunk": AlbefConfig(TRUNK_VISION, dataclasses.replace(TRUNK_TEXT, depth=4), embed_dim=128),
    "base": AlbefConfig(),
}
