"""ViLT: one transformer for a text's tokens and a picture's patches, and its losses (arXiv 2102.03334, sec. 3).

Which picture a text belongs to, its hidden words, and which patches its words speak of.
Not here: which words are hidden (`common/masking.py`), how words find patches (`transport.py`), classes and retrieval
(`tasks.py`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.errors import UserError
from capfilt.models.common.config import Shape
from capfilt.models.common.layers import (
    PreNormBlock,
    blocks_of,
    exact,
    init_normal,
    init_std,
    init_truncated,
    run_layer,
)
from capfilt.models.common.masking import IGNORED, Masking
from capfilt.models.common.objectives import hard_negatives, matching_loss, of_tokens, token_loss
from capfilt.models.common.presets import TRUNK
from capfilt.models.common.pretrained import copy_vit
from capfilt.models.common.ranks import ALONE, Ranks
from capfilt.models.common.text import Embeddings, Predictions, TextConfig
from capfilt.models.common.trunk import Seeing, grid_of, resized
from capfilt.models.vilt.transport import cosine_cost, transport_distance

HEADS = ("both", "match", "words", "none")
"""Which heads a model has: of ITM ("match"), of masked words, both, or neither."""


EPS = 1e-12
"""Of every LayerNorm, as transformers has it. The released code has 1e-6 in the blocks, which changes no digit there."""


@dataclass(frozen=True)
class ViltVisionConfig:
    """How a picture becomes tokens; the defaults are ViLT-B/32's (sec. 4.2)."""

    image_size: int = 384  # of the square whose patches have positions of their own; others are interpolated
    patch_size: int = 32
    trunk: str = ""  # in place of linear patches: the map of a pretrained trunk, squares of image_size alone
    trunk_frozen: bool = True

    def __post_init__(self) -> None:
        grid_of(self)

    @property
    def grid(self) -> int:
        """Patches per side of that square."""
        return grid_of(self)


@dataclass(frozen=True)
class ViltTextConfig:
    """How a text becomes tokens; the defaults are ViLT-B/32's, with [DEC] and [ENC], which it never reads."""

    vocab_size: int = 30524
    max_positions: int = 40
    pad_id: int = 0


@dataclass(frozen=True)
class ViltConfig(Shape):
    """Everything that decides the shape of a Vilt; `to_dict`/`from_dict` go through JSON unchanged.

    The defaults are ViLT-B/32 (sec. 4.2; dropout and untied output words: released code).
    """

    vision: ViltVisionConfig = field(default_factory=ViltVisionConfig)
    text: ViltTextConfig = field(default_factory=ViltTextConfig)
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    dropout: float = 0.1
    max_text_tokens: int = 40  # released code
    max_words: int = 0  # ViLT, code: texts are cut by tokens alone
    has: str = "both"  # one of HEADS
    tied: bool = False  # whether masked words are named by the word embeddings themselves, as BERT does

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"width {self.width} is no multiple of heads {self.heads}")
        if self.has not in HEADS:
            raise UserError(f"has is {self.has!r}: use one of {', '.join(HEADS)}")


class ImageTokens(NamedTuple):
    """Pictures as tokens [B, 1 + N, D], positions added, the picture's own [CLS] first.

    `mask` bool [B, 1 + N] says which are of the picture; None: all.
    """

    tokens: Tensor
    mask: Tensor | None = None


class States(NamedTuple):
    """What the transformer makes of pairs: `text` [B, L, D] and `image` [B, 1 + N, D], after the final LayerNorm."""

    text: Tensor
    image: Tensor


class ViltBody(nn.Module):
    """Embeddings, transformer and pooler: what every ViLT has, whatever its head.

    Texts are `ids` int64 [B, L] = [CLS] ... [SEP] and padding, `mask` bool [B, L] False on padding (None: there is none).
    `pictures` is how many a text may be seen with, one at a time: each has a modality type of its own.
    """

    def __init__(self, config: ViltConfig, pictures: int = 1) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # see `layers.recompute_activations`
        self.visual_encoder = Patches(config)
        self.text_embeddings = Embeddings(text_config(config))
        # Row 0 is the text's, row 1 + p is picture p's.
        self.modality = nn.Parameter(torch.empty(1 + pictures, config.width))
        self.blocks = nn.ModuleList(
            PreNormBlock(config.width, config.heads, config.hidden, eps=EPS, dropout=config.dropout)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.pooler = nn.Linear(config.width, config.width)
        std = init_std(config.width)
        init_normal(self.text_embeddings, std)
        init_truncated(self.blocks, std)
        init_truncated(self.pooler, std)
        nn.init.normal_(self.modality, std=std)

    def encode_image(self, images: Tensor, mask: Tensor | None = None, limit: int = 0) -> ImageTokens:
        """As `Patches.forward`."""
        found: ImageTokens = self.visual_encoder(images, mask, limit)
        return found

    def fuse(
        self, ids: Tensor, mask: Tensor | None, image: ImageTokens, picture: int = 0, first: bool = False
    ) -> States:
        """Every text i read together with image i, as its picture number `picture`.

        first: only the text's [CLS] is wanted, which `pool` reads: `text` [B, 1, D], and no `image`. The last block makes
        nothing else then.
        """
        text = self.text_embeddings(ids, 0) + self.modality[0]
        x = torch.cat([text, (image.tokens + self.modality[1 + picture]).to(text.dtype)], dim=1)
        seen = None
        if mask is not None or image.mask is not None:
            sides = (
                torch.ones(each.shape[:2], dtype=torch.bool, device=x.device) if known is None else known
                for each, known in ((text, mask), (image.tokens, image.mask))
            )
            seen = torch.cat(list(sides), dim=1)[:, None, None, :]
        last = len(self.blocks) - 1
        for place, block in enumerate(self.blocks):
            x = run_layer(block, x, seen, first and place == last, recompute=self.recompute)
        x = self.norm(x)
        length = 1 if first else ids.shape[1]
        return States(x[:, :length], x[:, length:])

    def pool(self, states: States) -> Tensor:
        """[B, D], in (-1, 1): what the heads of whole pairs read, from the text's [CLS]."""
        return torch.tanh(self.pooler(states.text[:, 0]))

    def resize_image(self, image_size: int) -> None:
        """Takes squares of another size from now on: positions are interpolated once and for all, all else stays."""
        vision = resized(self.config.vision, image_size)
        own = self.visual_encoder
        own.pos_embed = nn.Parameter(own.positions(vision.grid, vision.grid).detach())
        self.config = dataclasses.replace(self.config, vision=vision)


class Vilt(ViltBody):
    """A ViLT as it is pretrained: it says whether a text belongs to a picture, and which words are hidden."""

    def __init__(self, config: ViltConfig) -> None:
        super().__init__(config)
        std = init_std(config.width)
        if config.has in ("both", "match"):
            self.itm_head = nn.Linear(config.width, 2)
            init_truncated(self.itm_head, std)
        if config.has in ("both", "words"):
            self.mlm_head = Predictions(text_config(config))
            init_normal(self.mlm_head, std)
            if not config.tied:
                self.mlm_words = nn.Parameter(torch.empty(config.vocab_size, config.width))
                nn.init.normal_(self.mlm_words, std=std)

    def require(self, head: str) -> None:
        """UserError where this model lacks a head, "match" or "words"."""
        if self.config.has not in ("both", head):
            raise UserError(
                f"this ViLT has no head {'of matches' if head == 'match' else 'of masked words'}: "
                "pretrain it, or take a checkpoint that has one"
            )

    @property
    def abilities(self) -> tuple[str, ...]:
        """See `capfilt.models.family.ABILITIES`."""
        return ("match",) if self.config.has in ("both", "match") else ()

    def match_pairs(self, tokens: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        """fp32 logits [B, 2], index 1 = match, of texts i with the patches [B, 1 + N, D] of pictures i."""
        return self.match_logits(self.fuse(ids, mask, ImageTokens(tokens), first=True))

    def match_logits(self, states: States) -> Tensor:
        """fp32 logits [B, 2] of pairs, index 1 = match."""
        return exact(self.itm_head, self.pool(states))

    def word_logits(self, states: Tensor) -> Tensor:
        """fp32 logits [..., V] of what was hidden at text states [..., D]."""
        words = self.text_embeddings.word_embeddings.weight if self.config.tied else self.mlm_words
        out: Tensor = self.mlm_head(states, words)
        return out


class Patches(Seeing):
    """Pictures of any size to `ImageTokens`: a linear map of every patch, and its place in the picture. With a trunk, of
    every cell of its map, which is what Pixel-BERT's one transformer reads (arXiv 2004.00849, sec. 3.2).
    """

    def __init__(self, config: ViltConfig) -> None:
        super().__init__()
        patch, width = config.vision.patch_size, config.width
        self.see_through(config.vision, width, (0.5,) * 3, (0.5,) * 3)  # released code
        if not config.vision.trunk:
            self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.vision.grid**2, width))
        self.dropout = nn.Dropout(config.dropout)
        nn.init.trunc_normal_(self.cls_token, std=init_std(width))
        nn.init.trunc_normal_(self.pos_embed, std=init_std(width))

    def forward(self, images: Tensor, mask: Tensor | None = None, limit: int = 0) -> ImageTokens:
        """images: pixels uint8 [B, 3, H, W], or normalised floats; H and W are multiples of the patch size. With a trunk
        squares of its size, or its features [B, G*G, C] (floating), and no mask.

        mask: bool, of pixels [B, H, W] or of patches [B, H/p, W/p]; True on a picture, which lies at the top left, False
        on what pads it. The released code takes zeros in a normalised picture for padding, mid-grey ones too.
        limit: so many patches of a picture at most, drawn uniformly from torch's global CPU generator; 0 for all of them
        (sec. 4.2: 200 in pretraining, which leaves out few and saves memory).
        """
        patches = self.patches(images, masked=mask is not None)
        rows, columns = patches.shape[2:]
        if mask is None:
            places, valid = self.positions(rows, columns), None
        else:
            # A patch counts as its first pixel does: pictures are padded by whole patches.
            step = mask.shape[1] // rows
            valid = mask[:, ::step, ::step].bool()
            places = self.positions(rows, columns, valid[:, :, 0].sum(dim=1), valid[:, 0].sum(dim=1))
            valid = valid.flatten(1)
        tokens = patches.flatten(2).transpose(1, 2) + places[:, 1:].to(patches.dtype)
        if 0 < limit < rows * columns:
            drawn = torch.rand(tokens.shape[:2]).to(tokens.device)
            if valid is not None:
                drawn = drawn.masked_fill(~valid, -1.0)
            kept = drawn.topk(limit, dim=1).indices.sort(dim=1).values
            tokens = tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
            valid = valid.gather(1, kept) if valid is not None else None
        first = (self.cls_token + places[:, :1]).to(tokens.dtype).expand(len(tokens), -1, -1)
        if valid is not None:
            valid = F.pad(valid, (1, 0), value=True)
        return ImageTokens(self.dropout(torch.cat([first, tokens], dim=1)), valid)

    def patches(self, images: Tensor, masked: bool = False) -> Tensor:
        """[B, D, rows, columns] of `images` as `forward` takes them; UserError where they are of no size it can read."""
        if self.trunk is not None:
            size = self.trunk.image_size
            if masked:
                raise UserError(f"a ViLT with a trunk reads whole squares of {size} pixels: give no mask")
            if images.dim() == 4 and images.shape[2:] != (size, size):
                raise UserError(
                    f"a ViLT with a trunk reads whole squares of {size} pixels, not {list(images.shape[2:])}"
                )
            tokens = self.trunk_tokens(images)
            rows, cells, width = tokens.shape
            return tokens.transpose(1, 2).reshape(rows, width, math.isqrt(cells), -1)
        patch = self.patch_embed.stride[0]
        if images.shape[2] % patch or images.shape[3] % patch:
            raise UserError(
                f"pictures of {list(images.shape[2:])} pixels are no multiples of patches of {patch}"
            )
        found: Tensor = self.patch_embed(self.normalise(images))
        return found

    def positions(
        self, rows: int, columns: int, heights: Tensor | None = None, widths: Tensor | None = None
    ) -> Tensor:
        """Position embeddings [B or 1, 1 + rows * columns, D] of pictures `heights` x `widths` (int64 [B]) patches large.

        The square's own are interpolated to each picture's size, bilinearly and corner to corner (released code); without
        sizes, to rows x columns. Beyond a picture's edge they mean nothing.
        """
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if heights is None and (rows, columns) == (side, side):
            return self.pos_embed
        first, square = self.pos_embed[:, :1], self.pos_embed[0, 1:].view(side, side, -1)
        down = _between(rows, side, heights, square)
        across = _between(columns, side, widths, square)
        # One side after the other: two small matrix products per picture.
        found = torch.einsum("brs,stc->brtc", down, square)
        found = torch.einsum("bkt,brtc->brkc", across, found).flatten(1, 2)
        return torch.cat([first.expand(len(found), -1, -1), found], dim=1)


def _between(count: int, side: int, lengths: Tensor | None, like: Tensor) -> Tensor:
    """Weights [B or 1, count, side] that interpolate a row of `side` values at `lengths` points from its first to its last.

    Without lengths at `count` points. Rows of what lies beyond a length are arbitrary.
    """
    points = torch.arange(count, device=like.device, dtype=like.dtype)
    ends = like.new_tensor([count]) if lengths is None else lengths.to(like.dtype)
    at = points * ((side - 1) / (ends[:, None] - 1).clamp(min=1))
    return (1 - (at[:, :, None] - torch.arange(side, device=like.device)).abs()).clamp(min=0)


def text_config(config: ViltConfig) -> TextConfig:
    """What BERT's embeddings and its head of masked words go by."""
    return TextConfig(
        config.text.vocab_size,
        config.width,
        config.depth,
        config.heads,
        config.hidden,
        config.text.max_positions,
        config.dropout,
        pad_id=config.text.pad_id,
    )


@dataclass(frozen=True)
class MatchingConfig:
    """What decides the losses.

    Attributes:
        alignment: weight of word-patch alignment beside matching and masked words, which have 1 (released code: 0.1); with 0
            it is not computed.
        max_patches: so many of a picture's patches are seen in a training pass, drawn anew for each (sec. 4.2: 200, of
            pictures of up to 240); 0 for all. A square of 384 px has 144, so there the default leaves none out.
    """

    alignment: float = 0.1
    max_patches: int = 200

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alignment) and self.alignment >= 0):
            raise UserError(f"alignment is {self.alignment}: give a weight of 0 or more")
        if self.max_patches < 0:
            raise UserError(f"max_patches is {self.max_patches}: give 0 (all) or more")


class ViltTraining(nn.Module):
    """A Vilt and its losses."""

    def __init__(
        self, model: Vilt, masking: Masking, config: MatchingConfig | None = None, ranks: Ranks = ALONE
    ) -> None:
        super().__init__()
        model.require("match")
        model.require("words")
        self.model = model
        self.masking = masking
        self.config = config or MatchingConfig()
        self.ranks = ranks

    def blocks(self) -> list[nn.Module]:
        """What is run as a whole, once per pass, and so can have its weights gathered just then."""
        return blocks_of(self.model)

    def losses(self, batch: Batch, alpha: float = 0.0, hardness: float = 1.0) -> dict[str, Tensor]:
        """fp32 scalars: "loss" with gradient (matching + masked words + `alignment` times alignment), and without one
        "itm", "mlm", "wpa", "itm_accuracy", "itm_balanced_accuracy", and "mlm_accuracy" (of the hidden words).

        Half of the texts are seen with another picture, drawn uniformly from this rank's batch; one that is the same, or has
        the same text, is never drawn, and a text without any other leaves the loss. Draws come from torch's global CPU
        generator. With other ranks, means are over everyone's rows (see `Rows`).
        """
        model, limit = self.model, self.config.max_patches if self.training else 0
        images = model.visual_encoder.seen_once(batch.images)
        picture, label, keep = mismatched(batch.image_index, batch.text_index)
        image = model.encode_image(images[picture], limit=limit)
        states = model.fuse(batch.ids, batch.mask, image)
        matching = matching_loss(model.match_logits(states), label, keep, self.ranks, batch.weight)
        found = {"itm": matching.loss}
        if self.config.alignment:
            counted = keep if batch.weight is None else keep * batch.weight
            found["wpa"] = alignment_loss(states, batch.mask, image, label, counted, self.ranks)
        ids, said = self.masking(batch.ids, batch.mask)
        hidden = said != IGNORED
        seen = model.fuse(ids, batch.mask, model.encode_image(images, limit=limit)).text
        logits = model.word_logits(seen[hidden])
        found["mlm"] = token_loss(logits, said[hidden], 0.0, self.ranks, of_tokens(batch.weight, hidden))
        loss = found["itm"] + found["mlm"] + self.config.alignment * found.get("wpa", 0.0)
        named = (logits.detach().argmax(dim=1) == said[hidden]).float().sum() / hidden.sum().clamp(min=1)
        return {
            "loss": loss,
            **{name: each.detach() for name, each in found.items()},
            "itm_accuracy": matching.accuracy,
            "itm_balanced_accuracy": matching.balanced_accuracy,
            "mlm_accuracy": named,
        }


def mismatched(image_index: Tensor, text_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(picture int64 [B] that text i is seen with, label int64 [B] with 1 = its own, keep bool [B]).

    Half of the texts (the larger half of an odd number), drawn anew, get a picture that is not theirs; where there is none,
    keep is False.
    """
    rows, device = len(image_index), image_index.device
    other, found = hard_negatives(torch.zeros(rows, rows, device=device), image_index, text_index)
    own = (torch.randperm(rows) < rows // 2).to(device)
    return torch.where(own, torch.arange(rows, device=device), other), own.long(), own | found


def alignment_loss(
    states: States, mask: Tensor, image: ImageTokens, label: Tensor, keep: Tensor, ranks: Ranks = ALONE
) -> Tensor:
    """Word-patch alignment: fp32 scalar, the transport distances of matching pairs minus those of others, over their count.

    Between the states of a text's tokens without [CLS] and [SEP], and of a picture's patches without its [CLS], by cosine.
    mask: bool [B, L] of the texts. label: int64 [B], as of `matching_loss`; keep: bool [B], or weights fp32 [B].
    """
    words = mask.bool().clone()
    words[:, 0] = False
    words.scatter_(1, mask.sum(dim=1, keepdim=True) - 1, False)
    patches = states.image[:, 1:]
    there = torch.ones(patches.shape[:2], dtype=torch.bool, device=mask.device)
    if image.mask is not None:
        there = image.mask[:, 1:]
    distance = transport_distance(cosine_cost(states.text, patches), words, there)
    sign = torch.where(label == 1, 1.0, -1.0) * keep
    return (distance * sign).sum() / ranks.share(keep.sum())


def objective(model: Vilt, tokenizer: Any, options: Any, ranks: Ranks) -> ViltTraining:
    """Matching, whole masked words, word-patch alignment (ViLT, sec. 3.2)."""
    masking = Masking.of(tokenizer, options.mask_share, whole_words=True)
    return ViltTraining(model, masking, MatchingConfig(options.alignment, options.max_patches), ranks)


def start_vision(model: Vilt, directory: str | Path) -> None:
    """Copies the same into a ViLT's patches, transformer and last LayerNorm, as it is published to start (sec. 4.2)."""
    own, vision = model.visual_encoder, model.config.vision
    if vision.trunk:
        raise UserError(f"{directory}: a ViT starts only a ViLT with patches, and no trunk")
    parameters = {"cls_token": own.cls_token, "pos_embed": own.pos_embed}
    for prefix, module in (
        ("patch_embed.proj.", own.patch_embed),
        ("blocks.", model.blocks),
        ("norm.", model.norm),
    ):
        parameters |= {prefix + name: parameter for name, parameter in module.named_parameters()}
    copy_vit(Path(directory), parameters, model.config, vision.patch_size)


# ViLT, arXiv 2102.03334, sec. 4.2: ViLT-B/32. Its definition leaves no stem to see shapes early with: tiny and small have
# patches of a few pixels, trunk the map of BLIP's trunk in their place. All three name hidden words by the words' own
# embeddings, which halves what they must learn of them; tiny and trunk, which train for minutes, have no dropout.
PRESETS: dict[str, ViltConfig] = {
    "tiny": ViltConfig(
        ViltVisionConfig(48, 8),
        ViltTextConfig(1000),
        width=128,
        depth=3,
        heads=4,
        hidden=256,
        dropout=0.0,
        tied=True,
    ),
    "trunk": ViltConfig(
        ViltVisionConfig(192, 32, trunk=TRUNK),
        ViltTextConfig(4000),
        width=192,
        depth=4,
        heads=4,
        hidden=384,
        dropout=0.0,
        tied=True,
    ),
    "small": ViltConfig(
        ViltVisionConfig(128, 16), ViltTextConfig(4000), width=256, depth=8, heads=4, hidden=1024, tied=True
    ),
    "base": ViltConfig(),
}
