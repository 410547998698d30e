"""Models seen as what they can do: one adapter per class of model, and `opened`, which finds it for a checkpoint.

What lives here: the way from a model and its tokenizer to the protocols of `capabilities`. A model that has the protocols'
methods by itself needs no adapter. What does not: the evaluations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.data.answers import closed_up
from capfilt.data.tokenizer import Tokenizer
from capfilt.errors import RunError
from capfilt.inference.answering import rank_answers
from capfilt.inference.captioner import Caption, Captioner
from capfilt.inference.decoding import TRANSFORMERS, Limits, beam_search
from capfilt.models import build, kind_of
from capfilt.models.albef.model import Albef, without_end
from capfilt.models.albef.tasks import AlbefClassifier, AlbefNlvr, AlbefVqa
from capfilt.models.blip.model import Blip
from capfilt.models.blip.tasks import BlipClassifier, BlipNlvr, BlipVqa
from capfilt.models.clip.model import Clip
from capfilt.models.common.config import Shape
from capfilt.models.common.precision import auto_precision
from capfilt.models.interop.contents import Contents
from capfilt.models.vilt.model import ImageTokens, Vilt
from capfilt.models.vilt.tasks import ViltClassifier
from capfilt.tasks.capabilities import capabilities


@dataclass(frozen=True)
class Opened:
    """A checkpoint ready to be evaluated.

    Attributes:
        what: what it is, in words, for messages.
        image_size: the side of the pictures it takes, in pixels.
        model: the object with the protocols' methods.
    """

    what: str
    image_size: int
    model: Any

    @property
    def can(self) -> tuple[str, ...]:
        """The names of its capabilities."""
        return capabilities(self.model)


def opened(contents: Contents, device: str | torch.device = "cpu", precision: str = "auto") -> Opened:
    """The model of a checkpoint on `device`, in evaluation mode, as what it can do; precision: auto, fp32 or bf16."""
    model = contents.model.to(device).eval()
    adapt = ADAPTERS.get(type(model))
    return Opened(
        kind_of(model).who,
        model.config.image_size,
        adapt(model, contents.tokenizer, precision=precision) if adapt else model,
    )


def capable(config: Shape) -> tuple[str, ...]:
    """The names of the capabilities of a model with this config; no weights are read. UserError where it has none."""
    with torch.device("meta"):
        model = build(config)
    return opened(Contents(model, None), "meta").can


class _OnDevice:
    """A module and its tokenizer, called in evaluation mode, whatever mode it is in; texts are as long as in training.

    Every call switches to evaluation mode, without gradients, and back, so that a model may be evaluated in
    mid-training. Runs on the model's device in the given precision: auto (bf16 on a GPU that has it, else fp32), fp32 or bf16
    (autocast); answers are float32.
    """

    def __init__(self, model: Any, tokenizer: Any, *, precision: str = "auto") -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._precision = precision

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        found: torch.device = next(self._model.parameters()).device
        return found

    def _sent(self, batch: Tensor) -> Tensor:
        return batch.to(self.device, non_blocking=True)

    def _encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        ids, mask = self._tokenizer.encode(texts, **self._model.config.reading)
        return self._sent(ids), self._sent(mask)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        precision = auto_precision(self.device) if self._precision == "auto" else self._precision
        training = [module for module in self._model.modules() if module.training]
        self._model.eval()
        try:
            with (
                torch.inference_mode(),
                torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"),
            ):
                yield
        finally:
            for module in training:
                module.training = True


class _SeesImages(_OnDevice):
    """One whose model has a vision tower."""

    def image_features(self, batch: Tensor) -> Tensor:
        """Features float32 [B, Dv]: the [CLS] token after the vision tower's last LayerNorm, before any projection."""
        with self._evaluating():
            out: Tensor = self._model.encode_image(self._sent(batch))[:, 0].float()
            return out


class BlipCapabilities(_SeesImages):
    """A `Blip` with its filter's half as a dual encoder, a cross-encoder and an image encoder; see `_OnDevice`."""

    def __init__(
        self, model: Blip | Albef, tokenizer: Tokenizer, *, pair_batch: int = 256, precision: str = "auto"
    ) -> None:
        if isinstance(model, Blip):
            model.require("filter")
        super().__init__(model, tokenizer, precision=precision)
        self._pair_batch = pair_batch

    def encode_images(self, batch: Tensor) -> Tensor:
        """Image tokens [B, N, Dv] of pixels uint8 [B, 3, S, S], normalised floats or trunk features."""
        with self._evaluating():
            out: Tensor = self._model.encode_image(self._sent(batch))
            return out

    def embed_images(self, tokens: Tensor) -> Tensor:
        """Unit vectors float32 [B, E]."""
        with self._evaluating():
            out: Tensor = self._model.embed_image(self._sent(tokens))
            return out

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors float32 [T, E]."""
        with self._evaluating():
            out: Tensor = self._model.embed_text(*self._encode(texts))
            return out

    def match(self, image_tokens: Tensor, image_index: Tensor, texts: Sequence[str]) -> Tensor:
        """Match logits float32 [P]; see `MatchesPairs.match`. Each image's keys and values are computed once."""
        return self._matched(image_tokens, image_index, texts, lambda logits: logits[:, 1])

    def match_probability(self, image_tokens: Tensor, image_index: Tensor, texts: Sequence[str]) -> Tensor:
        """`itm_score` float32 [P]: softmax of the two logits at "match"."""
        return self._matched(image_tokens, image_index, texts, lambda logits: logits.softmax(dim=1)[:, 1])

    def _matched(
        self,
        image_tokens: Tensor,
        image_index: Tensor,
        texts: Sequence[str],
        read: Callable[[Tensor], Tensor],
    ) -> Tensor:
        out = torch.empty(len(texts), dtype=torch.float32)
        images, counts = torch.unique_consecutive(image_index.cpu(), return_counts=True)
        start = 0
        with self._evaluating():
            for image, count in zip(images.tolist(), counts.tolist(), strict=True):
                cross = self._model.prefill_cross(self._sent(image_tokens[image : image + 1]))
                # Neighbours of like length: a batch is padded to its longest text.
                rows = sorted(range(start, start + count), key=lambda row: len(texts[row]))
                for first in range(0, count, self._pair_batch):
                    chosen = rows[first : first + self._pair_batch]
                    logits = self._model.match_logits(*self._encode([texts[row] for row in chosen]), cross)
                    out[chosen] = read(logits).cpu()
                start += count
        return out


class AlbefCapabilities(BlipCapabilities):
    """An `Albef` as the same: it reads texts without their end."""

    def _encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        return without_end(*super()._encode(texts))


class BlipCaptioning(_SeesImages):
    """A `Blip` with its captioner's half as a writer of captions and an image encoder."""

    @cached_property
    def _captioner(self) -> Captioner:
        return Captioner(self._model, self._tokenizer, self._precision)

    def caption(self, images: Any, *args: Any, **options: Any) -> Sequence[Caption]:
        """As `Captioner.caption`."""
        return self._captioner.caption(images, *args, **options)


class WholeBlip(BlipCapabilities, BlipCaptioning):
    """A `Blip` with both halves: everything that either can do."""


class Answering(_SeesImages):
    """A model that answers in words, as what answers questions."""

    def answer(
        self,
        images: Tensor,
        questions: Sequence[str],
        *,
        num_beams: int = 3,
        max_new_tokens: int = 10,
        beam_rule: str = TRANSFORMERS,
    ) -> list[str]:
        """Answers by beam search (BLIP, released code: 3 beams, at most 10 tokens), their signs closed up."""
        tokenizer: Tokenizer = self._tokenizer
        limits = Limits(tokenizer.sep_id, tokenizer.pad_id, max_new_tokens, 1, 1.0)
        start = torch.tensor([tokenizer.cls_id], device=self.device)
        with self._evaluating():
            ids, mask = self._encode(questions)
            model = self._model
            states = model.encode_question(ids, mask, model.encode_image(self._sent(images)))
            cross = model.prefill_cross(states)
            found = beam_search(model.writer(mask), cross, start, len(ids), limits, num_beams, rule=beam_rule)
        return [closed_up(answer) for answer in tokenizer.decode_batch(found.tokens.cpu())]

    def rank_answers(
        self, images: Tensor, questions: Sequence[str], answers: Sequence[str], *, k: int = 128
    ) -> Tensor:
        """As `inference.answering.rank_answers`, of answers as they are spelled."""
        longest = self._model.config.text.max_positions
        rows = self._tokenizer.encode_ragged(answers, longest, raw=True)
        answer_ids, answer_mask = self._tokenizer.pad(rows)
        with self._evaluating():
            ids, mask = self._encode(questions)
            best, _ = rank_answers(
                self._model, ids, mask, self._sent(images), self._sent(answer_ids), self._sent(answer_mask), k
            )
        return best.cpu()


class Classifying(_OnDevice):
    """A model that judges texts with pictures, as a classifier of them."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The model's."""
        found: tuple[str, ...] = self._model.labels
        return found

    @property
    def pictures(self) -> int:
        """The model's."""
        count: int = self._model.pictures
        return count

    def classify(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Logits float32 [B, C] of texts about pixels uint8 [B, pictures, 3, S, S]."""
        with self._evaluating():
            ids, mask = self._encode(texts)
            out: Tensor = self._model.judge(ids, mask, self._sent(images)).float()
        # The largest of what are no numbers would be an answer.
        if not bool(torch.isfinite(out).all()):
            raise RunError(
                f"the logits of the {type(self._model).__name__} are not finite; try --precision fp32"
            )
        return out


class TowerClassifying(_SeesImages, Classifying):
    """The same, of a model with a vision tower."""


def _blip(model: Blip, tokenizer: Tokenizer, *, precision: str = "auto") -> _OnDevice:
    if model.config.half == "captioner":
        return BlipCaptioning(model, tokenizer, precision=precision)
    seen = WholeBlip if model.config.half == "both" else BlipCapabilities
    return seen(model, tokenizer, precision=precision)


class ClipCapabilities(_OnDevice):
    """A `Clip` as a dual encoder and an image encoder; see `_OnDevice`."""

    def encode_images(self, batch: Tensor) -> Tensor:
        """Features [B, 1, E] of pixels uint8 [B, 3, S, S]: a CLIP's image is one vector."""
        with self._evaluating():
            out: Tensor = self._model.encode_image(self._sent(batch))[:, None]
            return out

    def embed_images(self, tokens: Tensor) -> Tensor:
        """Unit vectors float32 [B, E]."""
        return F.normalize(tokens[:, 0].float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors float32 [T, E]."""
        with self._evaluating():
            out: Tensor = self._model.embed_text(self._encode(texts)[0])
            return out

    def image_features(self, batch: Tensor) -> Tensor:
        """Features float32 [B, E], as CLIP's own linear probe takes them: projected, not normalised (its README)."""
        with self._evaluating():
            out: Tensor = self._model.encode_image(self._sent(batch)).float()
            return out


class ViltCapabilities(_OnDevice):
    """A `Vilt` as a cross-encoder: every pair is a pass of its own; see `_OnDevice`."""

    def __init__(
        self, model: Vilt, tokenizer: Tokenizer, *, pair_batch: int = 256, precision: str = "auto"
    ) -> None:
        model.require("match")
        super().__init__(model, tokenizer, precision=precision)
        self._pair_batch = pair_batch

    def encode_images(self, batch: Tensor) -> Tensor:
        """Patches as tokens [B, 1 + N, D] of pixels uint8 [B, 3, S, S]: all that can be done without a text."""
        with self._evaluating():
            out: Tensor = self._model.encode_image(self._sent(batch)).tokens
            return out

    def match(self, image_tokens: Tensor, image_index: Tensor, texts: Sequence[str]) -> Tensor:
        """Match logits float32 [P]; see `MatchesPairs.match`."""
        return self._matched(image_tokens, image_index, texts)[:, 1]

    def match_probability(self, image_tokens: Tensor, image_index: Tensor, texts: Sequence[str]) -> Tensor:
        """Softmax float32 [P] of the two logits at "match"."""
        return self._matched(image_tokens, image_index, texts).softmax(dim=1)[:, 1]

    def _matched(self, image_tokens: Tensor, image_index: Tensor, texts: Sequence[str]) -> Tensor:
        number = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        out = torch.empty(len(texts), 2, dtype=torch.float32)
        with self._evaluating():
            ids, mask = self._encode(list(number))
            tokens = self._sent(image_tokens)
            which = torch.tensor([number[text] for text in texts], device=self.device)
            assert mask is not None
            lengths = mask.sum(dim=1)
            # Neighbours of like length: a batch is padded to its longest text.
            for rows in torch.split(lengths[which].argsort(), self._pair_batch):
                chosen = which[rows]
                longest = int(lengths[chosen].max())
                images = ImageTokens(tokens[image_index.to(self.device)[rows]])
                states = self._model.fuse(ids[chosen, :longest], mask[chosen, :longest], images, first=True)
                out[rows.cpu()] = self._model.match_logits(states).cpu()
        return out


ADAPTERS: dict[type[nn.Module], Callable[..., object]] = {
    Blip: _blip,
    BlipVqa: Answering,
    BlipNlvr: TowerClassifying,
    BlipClassifier: TowerClassifying,
    Clip: ClipCapabilities,
    Vilt: ViltCapabilities,
    ViltClassifier: Classifying,
    Albef: AlbefCapabilities,
    AlbefVqa: Answering,
    AlbefNlvr: TowerClassifying,
    AlbefClassifier: TowerClassifying,
}
"""What a class of model is evaluated through."""
