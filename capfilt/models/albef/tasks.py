"""ALBEF finetuned: answers to questions, classes of a text with one picture, statements about two pictures.

Each starts from a pretrained Albef's towers (arXiv 2107.07651, sec. 5, fig. 3). Texts and answers come as the tokenizer gives
them; the [SEP] at a text's end is not read here, that of an answer is written. Text assignment comes before statements: which
of two pictures a text belongs to, or neither. Not here: what tasks are trained against (`common/task_objectives.py`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.errors import UserError
from capfilt.models.albef.model import Albef, alone, bert, halves, tokens_known, without_end
from capfilt.models.common.answering import Answering, VqaConfig, new_reading
from capfilt.models.common.classifier import Classifier, ClassifierConfig, head_logits, is_head
from capfilt.models.common.layers import Pair, blocks_of, full_precision, project, seeded
from capfilt.models.common.objectives import distilled_losses, similarities
from capfilt.models.common.text import Attention, TextConfig, TextDecoder, TextTransformer
from capfilt.models.common.vision import VisionConfig, VisionTower
from capfilt.models.common.weights import start_from
from capfilt.tables.contracts import LABELS


@dataclass(frozen=True)
class AlbefVqaConfig(VqaConfig):
    """Everything that decides the shape of an AlbefVqa; `to_dict`/`from_dict` go through JSON unchanged."""

    vision: VisionConfig = field(default_factory=lambda: VisionConfig(image_size=384))
    text: TextConfig = field(default_factory=bert)
    max_text_tokens: int = 26  # ALBEF, code: longest question, 25, and the [SEP] that is not read
    max_words: int = 30  # ALBEF, code

    @property
    def vocab_size(self) -> int:
        return tokens_known(self.text)


class AlbefVqa(Answering):
    """All layers of the text side read the question, the second half with the image; a decoder as deep as that half reads
    their states in every layer.
    """

    def __init__(self, config: AlbefVqaConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = VisionTower(config.vision)
        self.text_encoder = halves(config.text, config.vision.width)
        self.text_decoder = TextDecoder(second_half(config.text), config.text.width)

    def asked(self, ids: Tensor) -> Tensor:
        return without_end(ids, None)[0]

    def heard(self, mask: Tensor) -> Tensor:
        return mask[:, 1:]

    def begun(self, ids: Tensor) -> Tensor:
        return ids


@dataclass(frozen=True)
class AlbefClassifierConfig(ClassifierConfig):
    """Everything that decides the shape of an AlbefClassifier; `to_dict`/`from_dict` go through JSON unchanged."""

    vision: VisionConfig = field(default_factory=lambda: VisionConfig(image_size=384))
    text: TextConfig = field(default_factory=bert)
    max_words: int = 30  # ALBEF, code

    @property
    def vocab_size(self) -> int:
        return tokens_known(self.text)


class AlbefClassifier(Classifier):
    """A head on the state of [CLS] after all layers: linear, ReLU, linear for entailment (ALBEF, code); ViLT's for VQA.

    Where its classes have no text, one linear layer on the vision tower's [CLS], as a BlipClassifier's.
    """

    def reader(self) -> TextTransformer:
        return halves(self.config.text, self.config.vision.width)

    def prefill_cross(self, image_tokens: Tensor) -> list[Pair]:
        """Keys and values, for the layers that look, of the tokens [B * pictures, N, Dv] of B texts' pictures: all first
        ones before all second ones.
        """
        assert self.text_encoder is not None
        return self.text_encoder.cross_keys_values(image_tokens)

    def seen_logits(self, ids: Tensor, mask: Tensor | None, cross: Sequence[Pair]) -> Tensor:
        """fp32 logits [B, C] of texts ids int64 [B, L], mask bool [B, L], seen with pictures' `prefill_cross`."""
        assert self.text_encoder is not None
        states = self.text_encoder(*without_end(ids, mask), cross, first=True)
        return head_logits(self.cls_head, states[:, 0])

    def read_logits(self, ids: Tensor, mask: Tensor | None, image_tokens: Tensor) -> Tensor:
        return self.seen_logits(ids, mask, self.prefill_cross(image_tokens))

    def resize_image(self, image_size: int) -> None:
        """As `Albef.resize_image`: text assignment is learned at one size, statements at another."""
        self.config = dataclasses.replace(self.config, vision=self.visual_encoder.resize(image_size))


@dataclass(frozen=True)
class AlbefNlvrConfig(AlbefClassifierConfig):
    """Everything that decides the shape of an AlbefNlvr; `text.depth` is that of the ALBEF it comes from.

    `classes` are those of text assignment until it has been finetuned for statements.
    """

    max_text_tokens: int = 128
    task: str = "nlvr"
    classes: tuple[str, ...] = LABELS["nlvr"]


class AlbefNlvr(AlbefClassifier):
    """Every layer that fuses comes twice, one after the other: the first looks at the first picture, the second at the second.

    The two share the keys' and values' projections (ALBEF, sec. 5 and fig. 3b).
    """

    pictures = 2

    def reader(self) -> TextTransformer:
        text, width = self.config.text, self.config.vision.width
        before = alone(text)
        doubled = dataclasses.replace(text, depth=text.depth + second_half(text).depth)
        reader = TextTransformer(
            doubled,
            width,
            crossattention=lambda index: Attention(text, width) if index >= before else None,
        )
        for one, two in zip(reader.layers[before::2], reader.layers[before + 1 :: 2], strict=True):
            first, second = one.crossattention, two.crossattention
            assert isinstance(first, Attention)
            assert isinstance(second, Attention)
            second.self.key, second.self.value = first.self.key, first.self.value
        return reader

    def prefill_cross(self, image_tokens: Tensor) -> list[Pair]:
        assert self.text_encoder is not None
        found: list[Pair] = []
        for layer in self.text_encoder.layers[alone(self.config.text) :: 2]:
            assert layer.crossattention is not None
            keys, values = layer.crossattention.keys_values(image_tokens)
            found += zip(keys.chunk(2), values.chunk(2), strict=True)
        return found


def second_half(text: TextConfig) -> TextConfig:
    """The layers that fuse, as a stack of their own."""
    return dataclasses.replace(text, depth=text.depth - alone(text))


def vqa_from_albef(model: Albef, seed: int = 0, drop_path: float = 0.0) -> AlbefVqa:
    """An AlbefVqa that starts from a pretrained ALBEF, its decoder from the layers that fuse, the embeddings and the
    language head (ALBEF, sec. 5 and code).

    Where the vision tower's width is not the text's, the decoder's cross-attention keys and values are new. drop_path:
    ALBEF, code: none.
    """
    model.require_words()
    vision = dataclasses.replace(model.config.vision, drop_path=drop_path)
    config = AlbefVqaConfig(vision, model.config.text)
    made = seeded(AlbefVqa, config, seed)

    new = new_reading(config)

    def source(name: str) -> str:
        if name.startswith("text_decoder.cls.predictions."):
            return name.replace("text_decoder.cls.predictions.", "mlm_head.")
        name = name.replace("text_decoder.bert.encoder.layer.", "text_encoder.encoder.layer.+")
        name = re.sub(r"\+(\d+)", lambda found: str(int(found[1]) + alone(config.text)), name)
        return name.replace("text_decoder.bert.", "text_encoder.")

    found = model.state_dict()
    start_from(made, {name: found[source(name)] for name in made.state_dict() if not new(name)}, new)
    return made


def classifier_from_albef(
    model: Albef | AlbefClassifier,
    task: str,
    classes: Sequence[str],
    seed: int = 0,
    drop_path: float = 0.0,
) -> AlbefClassifier:
    """An AlbefClassifier that starts from a pretrained ALBEF, or from a classifier of other classes; its head is new.

    drop_path: ALBEF, code: none.
    """
    if getattr(model, "text_encoder", None) is None and task != "classification":
        raise UserError("a classifier of pictures alone reads no text: start from a pretrained model")
    vision = dataclasses.replace(model.config.vision, drop_path=drop_path)
    config = AlbefClassifierConfig(vision, model.config.text, task=task, classes=tuple(classes))
    made = seeded(AlbefClassifier, config, seed)
    found = model.state_dict()
    start_from(made, {name: found[name] for name in made.state_dict() if not is_head(name)}, is_head)
    return made


def nlvr_from_albef(
    model: Albef | AlbefNlvr,
    seed: int = 0,
    drop_path: float = 0.0,
    classes: Sequence[str] = LABELS["nlvr"],
) -> AlbefNlvr:
    """An AlbefNlvr that starts from a pretrained ALBEF, whose every layer that fuses it takes twice, or from one that has
    learned text assignment; its head is new. drop_path: ALBEF, code: none.
    """
    vision = dataclasses.replace(model.config.vision, drop_path=drop_path)
    config = AlbefNlvrConfig(vision, model.config.text, classes=tuple(classes))
    before = alone(config.text)
    made = seeded(AlbefNlvr, config, seed)

    def source(name: str) -> str:
        if isinstance(model, AlbefNlvr):
            return name
        return re.sub(
            r"(?<=encoder\.layer\.)\d+",
            lambda found: str(min(int(found[0]), before + (int(found[0]) - before) // 2)),
            name,
        )

    found = model.state_dict()
    start_from(made, {name: found[source(name)] for name in made.state_dict() if not is_head(name)}, is_head)
    return made


ASSIGNED = ("first", "second", "neither")


TEMPERATURE = 0.07
"""Of the similarities that wrong pictures are drawn by (released code)."""


class TextAssignment(nn.Module):
    """An AlbefNlvr that tells ASSIGNED apart, and its loss; each with a third of the texts.

    projection: the pretrained ALBEF's of images; stays as it is.
    """

    def __init__(self, model: AlbefNlvr, projection: nn.Linear) -> None:
        super().__init__()
        if model.labels != ASSIGNED:
            raise UserError(
                f"text assignment has the classes {', '.join(ASSIGNED)}, not {', '.join(model.labels)}"
            )
        self.model = model
        self.projection = copy.deepcopy(projection).requires_grad_(False)

    def blocks(self) -> list[nn.Module]:
        """What is run as a whole, once per pass, and so can have its weights gathered just then."""
        return blocks_of(self.model)

    def losses(self, batch: Batch, alpha: float = 0.0, hardness: float = 1.0) -> dict[str, Tensor]:
        """fp32 scalars: "loss" with gradient, the mean cross-entropy of the batch's texts that have two other pictures to be
        told from, and without one "accuracy" over these. Draws come from torch's global CPU generator.
        """
        if batch.pixels is None:
            raise UserError("text assignment learns from pictures, not from cached features")
        tokens = self.model.encode_image(batch.pixels)
        with torch.no_grad():
            embeds = project(self.projection, tokens)
            scores = similarities(embeds, embeds, TEMPERATURE)
        wrong, found = two_others(scores, batch.image_index, batch.text_index)
        own = torch.arange(len(tokens), device=tokens.device)
        label = torch.randint(3, (len(tokens),)).to(tokens.device)
        first = torch.where(label == 0, own, wrong[:, 0])
        second = torch.where(label == 0, wrong[:, 0], torch.where(label == 1, own, wrong[:, 1]))
        cross = self.model.prefill_cross(tokens[torch.cat([first, second])])
        logits = self.model.seen_logits(batch.ids, batch.mask, cross)
        with full_precision(logits):
            count = found.sum().clamp(min=1)
            loss = (distilled_losses(logits, label) * found).sum() / count
            accuracy = ((logits.detach().argmax(dim=1) == label) & found).sum() / count
        return {"loss": loss, "accuracy": accuracy}


def two_others(scores: Tensor, image_index: Tensor, text_index: Tensor) -> tuple[Tensor, Tensor]:
    """(int64 [B, 2], two different rows for each, drawn without replacement by softmax(scores); bool [B], whether there are
    two). Rows of the same image, or with the identical text, are never drawn.

    scores: fp32 [B, B], images with images.
    """
    allowed = (image_index[:, None] != image_index) & (text_index[:, None] != text_index)
    # The largest of log-weights with Gumbel noise are such a draw (arXiv 1903.06059).
    noise = -torch.log(-torch.log(torch.rand(scores.shape).clamp(1e-20, 1.0 - 1e-7))).to(scores.device)
    keys = (scores + noise).masked_fill(~allowed, -math.inf)
    found = allowed.sum(dim=1) >= 2
    if len(scores) < 2:
        return torch.zeros(len(scores), 2, dtype=torch.int64, device=scores.device), found
    return keys.topk(2, dim=1).indices, found
