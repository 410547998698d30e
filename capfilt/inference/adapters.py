"""Models seen as what they can do: `adapted` gives a model the methods of the protocols that its `abilities` name.

One adapter per ability, none per model: a family's model says what it can do, and has the methods of `family.ABILITIES`.
Not here: the protocols (`capabilities.py`), the evaluations (`capfilt.tasks`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from capfilt.data.answers import closed_up
from capfilt.data.tokenizer import Tokenizer
from capfilt.errors import RunError
from capfilt.inference.answering import rank_answers
from capfilt.inference.capabilities import capabilities
from capfilt.inference.captioner import Caption, Captioner
from capfilt.inference.decoding import TRANSFORMERS, Limits, beam_search
from capfilt.models import build, kind_of
from capfilt.models.common.config import Shape
from capfilt.models.common.layouts.contents import Contents
from capfilt.models.common.precision import auto_precision
from capfilt.models.family import check_abilities


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
    seen = adapted(model, contents.tokenizer, precision=precision)
    return Opened(kind_of(model).who, model.config.image_size, seen)


def adapted(model: Any, tokenizer: Any, *, precision: str = "auto", pair_batch: int = 256) -> Any:
    """The model with the methods of the protocols that its abilities name; see `OnDevice`.

    pair_batch: texts matched at a time. UserError for an unknown ability, or one whose methods the model lacks.
    """
    check_abilities(model, model.abilities)
    return _class(tuple(model.abilities))(model, tokenizer, precision=precision, pair_batch=pair_batch)


@lru_cache(maxsize=32)
def _class(abilities: tuple[str, ...]) -> type[OnDevice]:
    return type("Adapted", (*(ADAPTERS[each] for each in abilities), OnDevice), {})


def capable(config: Shape) -> tuple[str, ...]:
    """The names of the capabilities of a model with this config; no weights are read. UserError where it has none."""
    with torch.device("meta"):
        model = build(config)
    return opened(Contents(model, None), "meta").can


class OnDevice:
    """A module and its tokenizer, called in evaluation mode, whatever mode it is in; texts are as long as in training.

    Every call switches to evaluation mode, without gradients, and back, so that a model may be evaluated in
    mid-training. Runs on the model's device in the given precision: auto (bf16 on a GPU that has it, else fp32), fp32 or bf16
    (autocast); answers are float32.
    """

    def __init__(self, model: Any, tokenizer: Any, *, precision: str = "auto", pair_batch: int = 256) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._precision = precision
        self._pair_batch = pair_batch

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        found: torch.device = next(self._model.parameters()).device
        return found

    def _sent(self, batch: Tensor) -> Tensor:
        return batch.to(self.device, non_blocking=True)

    def _encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        ids, mask = self._tokenizer.encode(texts, **self._model.config.reading)
        taken = getattr(self._model, "taken", None)
        ids, mask = taken(ids, mask) if taken else (ids, mask)
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


class Features(OnDevice):
    """A model with an image encoder."""

    def image_features(self, batch: Tensor) -> Tensor:
        """Features float32 [B, D]: the first token of the encoded image, or the one vector that a model makes of it."""
        with self._evaluating():
            out: Tensor = self._model.encode_image(self._sent(batch)).float()
        return out if out.dim() == 2 else out[:, 0]


class Sees(OnDevice):
    """A model that reads texts with pictures that were encoded once."""

    def encode_images(self, batch: Tensor) -> Tensor:
        """Image tokens [B, N, D] of pixels uint8 [B, 3, S, S], normalised floats or trunk features; N is 1 for one vector."""
        with self._evaluating():
            found = self._model.encode_image(self._sent(batch))
        # A model for pictures of any size gives their places too, which squares do not need.
        out: Tensor = found if isinstance(found, Tensor) else found.tokens
        return out[:, None] if out.dim() == 2 else out


class Embeds(Sees):
    """A dual encoder."""

    def embed_images(self, tokens: Tensor) -> Tensor:
        """Unit vectors float32 [B, E]."""
        tokens = self._sent(tokens)
        with self._evaluating():
            out: Tensor = self._model.embed_image(tokens[:, 0] if tokens.shape[1] == 1 else tokens)
        return out

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors float32 [T, E]."""
        with self._evaluating():
            out: Tensor = self._model.embed_text(*self._encode(texts))
        return out

    def like_images(self, tokens: Tensor) -> Tensor:
        """Unit vectors float32 [B, D] by which pictures are like pictures: `embed_images`, or a pretrained encoder's own."""
        if not hasattr(self._model, "like_image"):
            return self.embed_images(tokens)
        with self._evaluating():
            out: Tensor = self._model.like_image(self._sent(tokens))
        return out

    def like_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors float32 [T, D] by which texts are like texts: `embed_texts`, or a pretrained encoder's own."""
        if not hasattr(self._model, "like_text"):
            return self.embed_texts(texts)
        with self._evaluating():
            out: Tensor = self._model.like_text(*self._encode(texts))
        return out


Read = Callable[[Tensor], Tensor]
"""What is read of a pair's two logits [P, 2]: [P]."""


class Matches(Sees):
    """A cross-encoder. Where texts attend to keys and values of an image, those are computed once per image."""

    def match(self, image_tokens: Tensor, image_index: Tensor, texts: Sequence[str]) -> Tensor:
        """Match logits float32 [P]; see `MatchesPairs.match`."""
        return self._matched(image_tokens, image_index, texts, lambda logits: logits[:, 1])

    def match_probability(self, image_tokens: Tensor, image_index: Tensor, texts: Sequence[str]) -> Tensor:
        """`itm_score` float32 [P]: softmax of the two logits at "match"."""
        return self._matched(image_tokens, image_index, texts, lambda logits: logits.softmax(dim=1)[:, 1])

    def _matched(self, image_tokens: Tensor, image_index: Tensor, texts: Sequence[str], read: Read) -> Tensor:
        way = self._by_pair if hasattr(self._model, "match_pairs") else self._by_image
        return way(image_tokens, image_index, texts, read)

    def _by_image(
        self, image_tokens: Tensor, image_index: Tensor, texts: Sequence[str], read: Read
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

    def _by_pair(self, image_tokens: Tensor, image_index: Tensor, texts: Sequence[str], read: Read) -> Tensor:
        number = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        out = torch.empty(len(texts), dtype=torch.float32)
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
                seen = tokens[image_index.to(self.device)[rows]]
                logits = self._model.match_pairs(seen, ids[chosen, :longest], mask[chosen, :longest])
                out[rows.cpu()] = read(logits).cpu()
        return out


class Writes(OnDevice):
    """A writer of captions."""

    @cached_property
    def _captioner(self) -> Captioner:
        return Captioner(self._model, self._tokenizer, self._precision)

    def caption(self, images: Any, *args: Any, **options: Any) -> Sequence[Caption]:
        """As `Captioner.caption`."""
        return self._captioner.caption(images, *args, **options)


class Answers(OnDevice):
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


class Judges(OnDevice):
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


ADAPTERS: dict[str, type[OnDevice]] = {
    "features": Features,
    "embed": Embeds,
    "match": Matches,
    "write": Writes,
    "answer": Answers,
    "judge": Judges,
}
"""By ability, the methods that an evaluation uses."""
