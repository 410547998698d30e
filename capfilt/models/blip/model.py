"""BLIP: a vision tower and a text transformer that embeds, matches and writes, and its losses (arXiv 2201.12086, sec. 3).

The captioner is `visual_encoder` + `text_decoder`; the filter is `visual_encoder` + `text_encoder` + `vision_proj`,
`text_proj`, `itm_head`. Encoder and decoder share every module but self-attention (table 3). Momentum distillation is ALBEF's
(arXiv 2107.07651, sec. 3.2-3.3).
Not here: contrast and matching, which ALBEF has too (`common/momentum.py`), heads for tasks (`tasks.py`), sampling and
batching (`capfilt.inference`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.errors import UserError
from capfilt.models.common.config import ModelConfig
from capfilt.models.common.layers import Pair, exact, init_truncated, project
from capfilt.models.common.layouts.contents import assemble, blank
from capfilt.models.common.momentum import Alignment, AlignmentConfig, Embeds, length_chunks, told
from capfilt.models.common.objectives import OBJECTIVES, language_labels, language_loss, of_tokens, token_loss
from capfilt.models.common.presets import (
    SMALL_TEXT,
    SMALL_VISION,
    TINY_TEXT,
    TINY_VISION,
    TRUNK_VISION,
)
from capfilt.models.common.pretrained import load_bert, load_vit
from capfilt.models.common.ranks import ALONE, Ranks
from capfilt.models.common.sentence import SentenceEncoder, recipe_of, start_layers
from capfilt.models.common.text import SelfCache, TextConfig, TextDecoder, TextTransformer
from capfilt.models.common.vision import Towered, VisionConfig, VisionTower

CAPTIONER_PARTS = ("visual_encoder", "text_decoder")


FILTER_PARTS = ("visual_encoder", "text_encoder", "vision_proj", "text_proj", "itm_head")


HALVES = ("both", "captioner", "filter")


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
    # A frozen sentence encoder: ITC's vector of a text is a projection of its, and the text side starts from its first layers.
    sentence: str = ""

    def __post_init__(self) -> None:
        if self.half not in HALVES:
            raise UserError(f"half is {self.half!r}: use one of {', '.join(HALVES)}")
        if self.sentence:
            theirs, mine = recipe_of(self.sentence, "sentence").text, self.text
            same = all(
                getattr(mine, name) == getattr(theirs, name)
                for name in ("width", "heads", "hidden", "max_positions")
            )
            if not same or mine.depth > theirs.depth:
                raise UserError(
                    f"sentence {self.sentence!r}: text has another width, heads, hidden or max_positions, or more layers"
                )

    def to_dict(self) -> dict[str, Any]:
        """As `Shape.to_dict`, without a `sentence` that is none: configs are read by what knows no such field."""
        found = super().to_dict()
        if not self.sentence:
            del found["sentence"]
        return found


class Blip(Towered):
    """See the module's docstring. Images are pixels uint8 [B, 3, S, S], normalised floats, or trunk features.

    Texts are `ids` int64 [B, L] = [CLS] ... [SEP] and padding, `mask` bool [B, L], as the tokenizer gives them:
    position 0 is overwritten here where a mode wants [ENC] or [DEC].
    """

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = VisionTower(config.vision)
        shared: TextTransformer | None = None
        self.sentence: SentenceEncoder | None = None
        if config.half != "captioner":
            self.text_encoder = shared = TextTransformer(config.text, config.vision.width)
        if config.half != "filter":
            self.text_decoder = TextDecoder(config.text, config.vision.width, shared)
        if config.sentence:
            start_layers(config.sentence, config, self.text_stacks)
        if config.half == "captioner":
            return
        if config.sentence:
            recipe = recipe_of(config.sentence)
            self.sentence = SentenceEncoder(recipe.text, recipe.pooling, config.sentence)
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

    @property
    def text_stacks(self) -> list[TextTransformer]:
        """The text transformers that it has: the encoder, the decoder's."""
        read = [] if self.config.half == "captioner" else [self.text_encoder]
        return read if self.config.half == "filter" else [*read, self.text_decoder.bert]

    # Images and texts by themselves.

    @property
    def abilities(self) -> tuple[str, ...]:
        """See `capfilt.models.family.ABILITIES`."""
        judges = ("embed", "match") if self.config.half != "captioner" else ()
        writes = ("write",) if self.config.half != "filter" else ()
        return ("features", *judges, *writes)

    def embed_image(self, image_tokens: Tensor) -> Tensor:
        """fp32 unit vectors [B, E] from the [CLS] of image tokens [B, N, Dv]."""
        return project(self.vision_proj, image_tokens)

    def encode_text(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """States [B, L, D] of texts read without an image; [CLS] stays at position 0."""
        out: Tensor = self.text_encoder(ids, mask)
        return out

    def embed_text(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """fp32 unit vectors [B, E] of texts."""
        if self.sentence is None:
            return project(self.text_proj, self.text_encoder(ids, mask, first=True))
        return project(self.text_proj, self.sentence_states(ids, mask))

    def sentence_states(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The sentence encoder's vectors of texts, float16 [B, 1, D]; only with one."""
        assert self.sentence is not None
        out: Tensor = self.sentence(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask)
        return out[:, None]

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
            starting(ids, self.config.text.enc_id), mask, cross, image_mask, first=True
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
        states = self.text_decoder.bert(starting(ids, self.config.text.dec_id), mask, cross, causal=True)
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
            ids = starting(ids, self.config.text.dec_id)
        states = self.text_decoder.bert(ids, cross=cross, cache=cache)
        return self.text_decoder.logits(states[:, -1])

    # Changing an existing model.

    def resize_image(self, image_size: int) -> None:
        """Takes images of another size from now on: the position embedding is resized, everything else stays."""
        self.config = dataclasses.replace(self.config, vision=self.visual_encoder.resize(image_size))

    def halved(self, half: str) -> Blip:
        """The captioner or the filter inside a model of both, its tensors the same objects; UserError where it has none."""
        self.require(half)
        if self.config.half == half:
            return self
        made, own = blank(Blip, dataclasses.replace(self.config, half=half)), self.state_dict()
        return assemble(Path(half), made, {name: own[name] for name in made.state_dict()})


def starting(ids: Tensor, token: int) -> Tensor:
    """A copy of texts int64 [B, L] with this token at position 0."""
    ids = ids.clone()
    ids[:, 0] = token
    return ids


@dataclass(frozen=True)
class PretrainingConfig(AlignmentConfig):
    """Which losses, and their constants. The paper's and its released code's values, cited beside each.

    Pretraining is ("itc", "itm", "lm"), a captioner is finetuned with ("lm",) and a prompt, a filter with
    ("itc", "itm").
    """

    known: ClassVar[tuple[str, ...]] = OBJECTIVES

    objectives: tuple[str, ...] = OBJECTIVES
    label_smoothing: float = 0.1
    """Of the language model's targets (BLIP, sec. 3.2)."""
    prompt_length: int = 0
    """Ids at the start of each text, start slot included, that the language model is given and does not learn."""
    lm_synthetic: bool = True
    """Whether the language model learns the texts that a captioner wrote, as the paper's does."""


class MomentumTowers(nn.Module):
    """Copies of what makes ITC embeddings, moved by `follow` and by nothing else: no gradients, no optimiser.

    They stay in training mode with the module they belong to, dropout included, as in the released code.
    """

    def __init__(self, model: Blip) -> None:
        super().__init__()
        self.visual_encoder = copy.deepcopy(model.visual_encoder)
        # A sentence encoder never moves: its vectors are the model's.
        self.text_encoder = copy.deepcopy(model.text_encoder) if model.sentence is None else None
        for layer in self.text_encoder.layers if self.text_encoder is not None else ():
            # Texts alone are read here, so the copy would carry a cross-attention per layer that nothing runs.
            layer.crossattention = None
        self.vision_proj = copy.deepcopy(model.vision_proj)
        self.text_proj = copy.deepcopy(model.text_proj)
        self.requires_grad_(False)

    def embed_image(self, images: Tensor) -> Tensor:
        return project(self.vision_proj, self.visual_encoder(images))

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        assert self.text_encoder is not None
        return project(self.text_proj, self.text_encoder(ids, mask, first=True))


class BlipPretraining(Alignment):
    """A Blip with what its training needs and its use does not.

    `losses(batch, alpha)` is one step's forward pass: the image is encoded once and its cross-attention keys and values
    are computed once for ITM's three rows and LM's one, ITM's 3B rows are one text pass. On a CPU the rows of the
    encoder's passes go through in groups of similar length.
    """

    config: PretrainingConfig

    def __init__(self, model: Blip, config: PretrainingConfig | None = None, ranks: Ranks = ALONE) -> None:
        config = config or PretrainingConfig()
        for objective in config.objectives:
            model.require("captioner" if objective == "lm" else "filter")
        super().__init__(model, config, ranks, lambda: MomentumTowers(model))

    def losses(self, batch: Batch, alpha: float = 0.0, hardness: float = 1.0) -> dict[str, Tensor]:
        """fp32 scalars: "loss" (weighted sum, with gradient), "itc", "itm", "lm" as configured, and without gradient
        "temperature", "image_cosine" and "text_cosine" (`mean_cosine` of the batch), "itm_accuracy",
        "itm_balanced_accuracy" where they apply.

        `alpha` is the weight of the momentum's soft targets (see `alpha_ramp`). `hardness` scales the similarities that
        ITM's negatives are drawn by: 1 is the published draw, 0 a uniform one. In training mode the call also fills the
        queue; draws come from torch's global generators. Without ITC, ITM's hard negatives come from similarities
        computed without gradient.

        Each micro-batch of a step is contrasted with itself and the queue, which holds the step's earlier ones by then;
        ITM's negatives are its own. That is what each of the released code's processes sees too: it gathers features
        for its queue and not for its logits.

        With other ranks, means are over everyone's rows (see `Rows`) and `global_negatives` says whom a row is
        contrasted with; the figures without gradient are of this rank's rows.
        """
        objectives, model, towers = self.config.objectives, self.model, self.momentum
        rows = self.ranks.rows(*batch.ids.shape)
        images = self._images(batch)
        tokens = model.encode_image(images)
        cross = model.prefill_cross(tokens) if {"itm", "lm"} & set(objectives) else []

        def embeds() -> Embeds:
            states = self._sentences(batch.ids, batch.mask)
            live = model.embed_image(tokens), _embed_text(model, batch.ids, batch.mask, states)
            if towers is None:
                return live, None
            with torch.no_grad():
                return live, (towers.embed_image(images), _embed_text(towers, batch.ids, batch.mask, states))

        found, figures = self._aligned(
            *(batch, rows, tokens, cross, alpha, hardness),
            embeds=embeds,
            texts=lambda near: near.gather_texts(batch.ids, batch.mask),
            logits=model.match_logits,
            embed_text=lambda ids, mask: _embed_text(towers or model, ids, mask, self._sentences(ids, mask)),
        )
        if "lm" in objectives:
            found["lm"] = self._write(batch, cross)
        return {"loss": self._weighed(found), **found, **figures}

    def _sentences(self, ids: Tensor, mask: Tensor) -> Tensor | None:
        return None if self.model.sentence is None else self.model.sentence_states(ids, mask)

    def _write(self, batch: Batch, cross: Sequence[Pair]) -> Tensor:
        # No padding mask: pads come last, so no token before them sees one through the causal mask.
        config, learned = self.config, batch.mask
        if not config.lm_synthetic and batch.synthetic is not None:
            learned = learned & ~batch.synthetic[:, None]
        if batch.ids.device.type != "cpu":
            logits = self.model.lm_logits(batch.ids, None, cross)
            return language_loss(
                *(logits, batch.ids, learned, config.prompt_length, config.label_smoothing),
                *(self.ranks, batch.weight),
            )
        # Pads are skipped where looking at them costs nothing: see `length_chunks`.
        labels = F.pad(language_labels(batch.ids, learned, config.prompt_length), (0, 1), value=-100)
        groups = length_chunks(batch.mask)
        said, predicted = [], []
        for some, length in groups:
            near = (
                cross
                if len(groups) == 1
                else [(k.index_select(0, some), v.index_select(0, some)) for k, v in cross]
            )
            wanted = labels[some, :length]
            predicted.append(self.model.lm_logits(batch.ids[some, :length], None, near, wanted != -100))
            said.append(wanted[wanted != -100])
        order = torch.cat([some for some, _ in groups])
        weight = None if batch.weight is None else of_tokens(batch.weight[order], labels[order] != -100)
        return token_loss(torch.cat(predicted), torch.cat(said), config.label_smoothing, self.ranks, weight)


def _embed_text(towers: Blip | MomentumTowers, ids: Tensor, mask: Tensor, states: Tensor | None) -> Tensor:
    """states: of a sentence encoder, which both have in common."""
    if states is not None:
        return project(towers.text_proj, states)
    groups = length_chunks(mask)
    embedded = [towers.embed_text(ids[some, :length], mask[some, :length]) for some, length in groups]
    return torch.cat(embedded)[torch.cat([some for some, _ in groups]).argsort()]


def objective(model: Blip, tokenizer: Any, options: Any, ranks: Ranks) -> BlipPretraining:
    """ITC, ITM and LM (BLIP, sec. 3.2)."""
    config = PretrainingConfig(
        label_smoothing=options.label_smoothing, lm_synthetic=options.lm_synthetic, **told(options)
    )
    return BlipPretraining(model, config, ranks)


def captioning(model: Blip, tokenizer: Any, options: Any, ranks: Ranks) -> BlipPretraining:
    """LM alone, after a prompt that is not learned (BLIP, sec. 3.3 and code)."""
    config = PretrainingConfig(
        objectives=("lm",),
        queue_size=0,
        momentum=None,
        label_smoothing=options.label_smoothing,
        prompt_length=tokenizer.prompt_length(options.prompt),
    )
    return BlipPretraining(model, config, ranks)


def retrieval(model: Blip, tokenizer: Any, options: Any, ranks: Ranks) -> BlipPretraining:
    """ITC and ITM; negatives are drawn by the similarities of the model itself, without a floor (BLIP, code)."""
    config = PretrainingConfig(
        objectives=("itc", "itm"), own_negatives=True, negative_floor=0.0, **told(options)
    )
    return BlipPretraining(model, config, ranks)


def configured(config: BlipConfig, options: Any) -> BlipConfig:
    """A model that is pretrained learns no prompt; the stem that was asked for."""
    vision = dataclasses.replace(config.vision, stem=options.stem or config.vision.stem)
    return dataclasses.replace(config, vision=vision, prompt="")


def start_vision(model: Blip, directory: str | Path) -> None:
    """Starts the vision tower from a transformers ViT or DeiT, as published."""
    load_vit(model.visual_encoder, directory)


def start_text(model: Blip, directory: str | Path) -> None:
    """Starts the text side from a transformers BERT."""
    load_bert(directory, model.config, model.text_stacks)


def vocabulary(config: BlipConfig, options: Any) -> str:
    """The file of the sentence encoder's vocabulary; "" without one."""
    return recipe_of(config.sentence).vocabulary() if config.sentence else ""


# BLIP, arXiv 2201.12086, sec. 4.1: ViT-B/16 and ViT-L/16 with bert-base; drop-path as in the published code.
BASE = BlipConfig()
LARGE = BlipConfig(vision=VisionConfig(width=1024, depth=24, heads=16, hidden=4096, drop_path=0.1))
PRESETS: dict[str, BlipConfig] = {
    "tiny": BlipConfig(TINY_VISION, TINY_TEXT, embed_dim=128),
    "small": BlipConfig(SMALL_VISION, SMALL_TEXT),
    # What is pretrained is taken, of pictures and of words.
    "trunk": BlipConfig(
        TRUNK_VISION, TextConfig(30524, 384, 3, 12, 1536, attention_dropout=0.0), sentence="minilm"
    ),
    "base": BASE,
    "large": LARGE,
}
