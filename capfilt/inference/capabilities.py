"""What a model can do, as protocols: the evaluations are written against these and know no model by name.

What lives here: the protocols with their shapes, and which of them an object has. What does not: the models seen that way
(`adapters`), and which task needs which capability (`registry`).

A model takes pictures as the loader yields them: pixels uint8 [B, 3, S, S] at its own image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


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
class EmbedsImages(Protocol):
    """An image encoder whose features a probe can be trained on."""

    def image_features(self, batch: Tensor) -> Tensor:
        """Features float32 [B, D] of pixels uint8 [B, 3, S, S]: before any projection, of any length."""
        ...


@runtime_checkable
class MatchesPairs(Protocol):
    """A cross-encoder: an image and a text together become one number, higher where they fit."""

    def encode_images(self, batch: Tensor) -> Tensor:
        """As `EmbedsImagesAndTexts.encode_images`."""
        ...

    def match(self, image_tokens: Tensor, image_index: Tensor, texts: Sequence[str]) -> Tensor:
        """Match logits float32 [P] of pairs: `texts[p]` with row `image_index[p]` of `image_tokens` [M, N, D].

        `image_index` is int64 [P] in ascending order, so that an image's texts lie side by side. The logit is
        the match class's own, without softmax: what re-ranking adds to a cosine.
        """
        ...

    def match_probability(self, image_tokens: Tensor, image_index: Tensor, texts: Sequence[str]) -> Tensor:
        """Probabilities float32 [P] in [0, 1] that the pairs match; arguments as of `match`."""
        ...


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


@runtime_checkable
class AnswersQuestions(Protocol):
    """A model that answers questions about a picture in words of its own, or with the best of a list."""

    def answer(
        self,
        images: Tensor,
        questions: Sequence[str],
        *,
        num_beams: int = 3,
        max_new_tokens: int = 10,
        beam_rule: str = "transformers",
    ) -> list[str]:
        """The answer written to `questions[b]` about pixels uint8 [B, 3, S, S], one per row; "" where nothing was."""
        ...

    def rank_answers(
        self, images: Tensor, questions: Sequence[str], answers: Sequence[str], *, k: int = 128
    ) -> Tensor:
        """Which of `answers` is the likeliest, int64 [B], of questions about pixels uint8 [B, 3, S, S].

        k: so many answers are compared whole, those whose first token is likeliest.
        """
        ...


@runtime_checkable
class ClassifiesPairs(Protocol):
    """A classifier of a text seen together with one or two pictures, over classes that have names."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes' names, in the order of the logits."""
        ...

    @property
    def pictures(self) -> int:
        """How many pictures a text is seen with."""
        ...

    def classify(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Logits float32 [B, C] of texts with pixels uint8 [B, pictures, 3, S, S], in the order the text means them."""
        ...


CAPABILITIES: dict[str, type] = {
    "embeds images and texts": EmbedsImagesAndTexts,
    "embeds images": EmbedsImages,
    "matches pairs": MatchesPairs,
    "generates text": GeneratesText,
    "answers questions": AnswersQuestions,
    "classifies pairs": ClassifiesPairs,
}
"""The capabilities by the names people read, those of `registry.Task`."""


def capabilities(model: object) -> tuple[str, ...]:
    """The names of what `model` can do, in the order of `CAPABILITIES`."""
    return tuple(name for name, protocol in CAPABILITIES.items() if isinstance(model, protocol))
