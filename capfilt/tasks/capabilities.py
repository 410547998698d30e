"""What a model must be able to do to be evaluated, and BLIP seen that way.

What lives here: the protocols the evaluations are written against, so that they know no model by name, and
the adapter that gives them a `Blip`. What does not: the evaluations, and batching of captions
(`capfilt.inference`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from capfilt.data.tokenizer import Tokenizer
    from capfilt.models.blip import Blip


@runtime_checkable
class EmbedsImagesAndTexts(Protocol):
    """A dual encoder: images and texts become unit vectors whose inner product says how well they fit."""

    def encode_images(self, batch: Tensor) -> Tensor:
        """Image tokens [B, N, D] of a batch as the model's loader yields it (pixels, or cached features)."""
        ...

    def embed_images(self, tokens: Tensor) -> Tensor:
        """Unit vectors [B, E] of image tokens [B, N, D]."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [T, E] of texts."""
        ...


@runtime_checkable
class MatchesPairs(Protocol):
    """A cross-encoder: an image and a text together become one number, higher where they fit."""

    def match(self, image_tokens: Tensor, image_index: Tensor, texts: Sequence[str]) -> Tensor:
        """Match logits float32 [P] of pairs: `texts[p]` with row `image_index[p]` of `image_tokens` [M, N, D].

        `image_index` is int64 [P] in ascending order, so that an image's texts lie side by side. The logit is
        the match class's own, without softmax.
        """
        ...


@runtime_checkable
class RetrievesAndMatches(EmbedsImagesAndTexts, MatchesPairs, Protocol):
    """Both: what re-ranking needs."""


class HasText(Protocol):
    """A caption: its `text` excludes the prompt; empty or None where the model wrote nothing."""

    @property
    def text(self) -> str | None: ...


@runtime_checkable
class GeneratesText(Protocol):
    """A captioner. `capfilt.Captioner` is one."""

    def caption(self, images: Any, *args: Any, **options: Any) -> Sequence[HasText]:
        """One caption per image of a batch, in order; `options` are those of `capfilt.Captioner.caption`.

        A batch is a list of pictures, or a tensor of them with the batch first. Asked for `method="nucleus"`,
        it is given `keys` as well: one name per image, from which alone the image's random stream follows.
        """
        ...


class BlipCapabilities:
    """A `Blip` and its tokenizer as a dual encoder and a cross-encoder.

    The model may be in the middle of training: every call switches to evaluation mode, without gradients, and
    back. Runs on the model's device, in bf16 autocast on a GPU and fp32 elsewhere; embeddings and logits are
    float32 always.
    """

    def __init__(
        self, model: Blip, tokenizer: Tokenizer, *, max_length: int | None = None, pair_batch: int = 256
    ) -> None:
        model.require("filter")
        self._model = model
        self._tokenizer = tokenizer
        self._max_length = max_length or model.config.max_text_tokens
        self._pair_batch = pair_batch

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self._model.parameters()).device

    def encode_images(self, batch: Tensor) -> Tensor:
        """Image tokens [B, N, Dv] of pixels uint8 [B, 3, S, S], normalised floats or trunk features."""
        with self._evaluating():
            return self._model.encode_image(batch.to(self.device, non_blocking=True))

    def embed_images(self, tokens: Tensor) -> Tensor:
        """Unit vectors float32 [B, E]."""
        with self._evaluating():
            return self._model.embed_image(tokens.to(self.device, non_blocking=True))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors float32 [T, E]."""
        with self._evaluating():
            return self._model.embed_text(*self._encode(texts))

    def match(self, image_tokens: Tensor, image_index: Tensor, texts: Sequence[str]) -> Tensor:
        """Match logits float32 [P]; see `MatchesPairs.match`. Each image's keys and values are computed once."""
        out = torch.empty(len(texts), dtype=torch.float32)
        images, counts = torch.unique_consecutive(image_index.cpu(), return_counts=True)
        start = 0
        with self._evaluating():
            for image, count in zip(images.tolist(), counts.tolist(), strict=True):
                tokens = image_tokens[image : image + 1].to(self.device, non_blocking=True)
                cross = self._model.prefill_cross(tokens)
                # Neighbours of like length: a batch is padded to its longest text.
                rows = sorted(range(start, start + count), key=lambda row: len(texts[row]))
                for first in range(0, count, self._pair_batch):
                    chosen = rows[first : first + self._pair_batch]
                    logits = self._model.match_logits(*self._encode([texts[row] for row in chosen]), cross)
                    out[chosen] = logits[:, 1].cpu()
                start += count
        return out

    def _encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = self._tokenizer.encode(texts, self._max_length)
        return ids.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = [module for module in self._model.modules() if module.training]
        self._model.eval()
        device = self.device.type
        try:
            with (
                torch.inference_mode(),
                torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"),
            ):
                yield
        finally:
            for module in training:
                module.training = True
