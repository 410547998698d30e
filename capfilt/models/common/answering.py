"""Models that answer questions in words: a question is read with its image, a decoder writes from its states.

Not here: a family's own encoder and decoder (its `tasks.py`), the search for the best answer (`capfilt.inference.decoding`).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from capfilt.errors import UserError
from capfilt.models.common.config import ModelConfig
from capfilt.models.common.layers import Pair
from capfilt.models.common.objectives import distilled_losses, language_labels
from capfilt.models.common.text import SelfCache, TextDecoder, TextTransformer
from capfilt.models.common.vision import Towered, VisionConfig


@dataclass(frozen=True)
class VqaConfig(ModelConfig):
    """Everything that decides the shape of a BlipVqa; `to_dict`/`from_dict` go through JSON unchanged."""

    vision: VisionConfig = field(default_factory=lambda: VisionConfig(image_size=480, drop_path=0.1))
    max_text_tokens: int = 35  # BLIP, code: longest question
    max_words: int = 50  # BLIP, code


class Answering(Towered, ABC):
    """What the models that answer in words share: a question is read with its image, a decoder writes from its states.

    Questions and answers are ids int64 [B, L] = [CLS] ... [SEP] and padding, and a mask bool [B, L], as the tokenizer gives
    them. Images are pixels uint8 [B, 3, S, S], normalised floats, or trunk features.
    """

    abilities = ("features", "answer")
    config: VqaConfig
    text_encoder: TextTransformer
    text_decoder: TextDecoder

    @abstractmethod
    def asked(self, ids: Tensor) -> Tensor:
        """Questions as the encoder takes them."""

    def heard(self, mask: Tensor) -> Tensor:
        """The mask of questions as the encoder, and the decoder for its states, takes it."""
        return mask

    @abstractmethod
    def begun(self, ids: Tensor) -> Tensor:
        """The beginnings of answers as the decoder takes them."""

    def encode_question(self, ids: Tensor, mask: Tensor | None, image_tokens: Tensor) -> Tensor:
        """States [B, L, D] of questions, seen with image tokens [B, N, Dv]."""
        cross = self.text_encoder.cross_keys_values(image_tokens)
        heard = self.heard(mask) if mask is not None else None
        out: Tensor = self.text_encoder(self.asked(ids), heard, cross)
        return out

    def answer_logits(
        self, ids: Tensor, mask: Tensor | None, cross: Sequence[Pair], question_mask: Tensor | None
    ) -> Tensor:
        """fp32 logits [R, A, V]; position t predicts token t + 1 of the answers ids int64 [R, A].

        cross: `prefill_cross` of the questions. question_mask: bool [R, L] where the questions hold tokens; padding
        that is not masked changes the answer.
        """
        heard = self.heard(question_mask) if question_mask is not None else None
        states = self.text_decoder.bert(self.begun(ids), mask, cross, heard, causal=True)
        return self.text_decoder.logits(states)

    def prefill_cross(self, question: Tensor) -> list[Pair]:
        """The decoder's cross-attention keys and values of question states [B, L, D], for all layers."""
        return self.text_decoder.bert.cross_keys_values(question)

    def writer(self, question_mask: Tensor | None = None) -> AnswerWriter:
        """The decoder as the decoding loops want it, for questions with this mask (bool [B, L])."""
        return AnswerWriter(self, question_mask)


class AnswerWriter:
    """Writes answers token by token to questions whose padding it knows."""

    def __init__(self, model: Answering, question_mask: Tensor | None) -> None:
        self.model = model
        self.question_mask = model.heard(question_mask) if question_mask is not None else None

    def new_cache(self, ways: int, max_length: int, cross: Sequence[Pair]) -> SelfCache:
        """A static self-attention cache for `ways` answers per question, of at most `max_length` tokens, [DEC] included."""
        if max_length > self.model.config.text.max_positions:
            raise UserError(
                f"{max_length} tokens are more than this model's {self.model.config.text.max_positions} positions:"
                " lower max_new_tokens"
            )
        like = cross[0][0]
        return self.model.text_decoder.bert.new_cache(len(like), ways, max_length, like)

    def decode(self, ids: Tensor, cache: SelfCache, cross: Sequence[Pair]) -> Tensor:
        """fp32 logits [R, V] of the token after `ids` int64 [R, T], as `Blip.decode`."""
        if cache.length == 0:
            ids = self.model.begun(ids)
        mask = self.question_mask
        if mask is not None and cache.kept is not None:
            mask = mask[cache.kept]
        states = self.model.text_decoder.bert(ids, cross=cross, cross_mask=mask, cache=cache)
        return self.model.text_decoder.logits(states[:, -1])


def new_reading(config: VqaConfig) -> Callable[[str], bool]:
    """Whether a tensor of an answering model is new where it is made of a pretrained one: the decoder's keys and values, which
    read the question's states and no image tokens any more, where the two have other widths.
    """
    wider = config.vision.width != config.text.width
    return lambda name: wider and bool(_DECODER_READS.match(name))


_DECODER_READS = re.compile(r"text_decoder\..*crossattention\.self\.(key|value)\.")


def answer_loss(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor,
    weights: Tensor,
    questions: int,
    label_smoothing: float = 0.1,
    teacher: Tensor | None = None,
    alpha: float = 0.0,
) -> Tensor:
    """fp32 scalar: sum over answers of weight * summed `distilled_losses` of the answer's tokens, over the questions.

    logits and teacher [R, A, V], ids int64 [R, A], mask bool [R, A], weights [R]: the answer's share of its question's
    annotators (BLIP, released code; ALBEF, arXiv 2107.07651, sec. 5). label_smoothing 0.1: BLIP, sec. 3.2; ALBEF has none.
    """
    labels = language_labels(ids, mask)
    said = teacher[:, :-1].flatten(0, 1) if teacher is not None else None
    flat = logits[:, :-1].flatten(0, 1)
    per_token = distilled_losses(flat, labels.flatten(), said, alpha, label_smoothing).view_as(labels)
    return (weights.float() * per_token.sum(dim=1)).sum() / questions
