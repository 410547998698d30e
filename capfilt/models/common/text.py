"""BLIP's text transformer (MED): one stack that reads text alone, reads it against an image, or writes it.

Post-norm BERT geometry without token types (BLIP, arXiv 2201.12086, sec. 3.1). Module names are BERT's, so that every
tensor has the name it has in the published checkpoints. Nothing here knows how image tokens were made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.errors import UserError
from capfilt.models.common.layers import (
    Pair,
    attention,
    biased,
    blank_embedding,
    full_precision,
    init_normal,
    init_std,
    merge_heads,
    run_layer,
    split_heads,
)


@dataclass(frozen=True)
class TextConfig:
    """Geometry of the text transformer; the defaults are bert-base-uncased plus [DEC] and [ENC] (BLIP, sec. 3.1)."""

    vocab_size: int = 30524  # 30522 word pieces, then [DEC], then [ENC]
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    max_positions: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.1
    pad_id: int = 0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"text.width {self.width} is no multiple of text.heads {self.heads}")

    @property
    def dec_id(self) -> int:
        return self.vocab_size - 2

    @property
    def enc_id(self) -> int:
        return self.vocab_size - 1


class SelfCache:
    """Keys and values of the tokens decoded so far, in buffers of a fixed size: [layers] x [B, H, slots, d].

    A prompt is kept once per image, however many texts go on from it; after it, every step takes one slot for each of the
    image's `ways` texts. Which slots are a text's own past is a mask, so beams change places and no key or value moves.

    Attributes:
        length: tokens of each text so far.
        kept: int64, which of the images it was made for are still here; None for all.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], ways: int = 1) -> None:
        self.keys = keys
        self.values = values
        self.ways = ways
        self.length = 0
        self.kept: Tensor | None = None
        self._used = self._prompt = 0
        self._seen: Tensor | None = None  # bool [B, ways, slots], from the first step on; not for one way

    @property
    def place(self) -> tuple[int, int]:
        """(tokens of the prompt, tokens of each text so far): what decides the slots that the next step reads and writes."""
        return self._prompt, self.length

    def restart(self) -> None:
        """Empty again, the buffers where they are."""
        self.length = self._used = self._prompt = 0

    def begin(self, rows: int, length: int) -> Tensor | None:
        """The mask that the next `length` tokens of `rows` texts attend with, as SDPA takes it; None: all are seen.

        rows: B for a prompt (or where there is one way), B * ways for one further token of every text.
        """
        images, end = self.keys[0].shape[0], self._used + self._slots(rows, length)
        device = self.keys[0].device
        if rows == images:
            if length == 1:
                return None
            return torch.ones(length, end, dtype=torch.bool, device=device).tril(self._used)
        if self._seen is None:
            slots = self.keys[0].shape[2]
            self._seen = torch.zeros(images, self.ways, slots, dtype=torch.bool, device=device)
        if self._used == self._prompt:
            self._seen[:, :, : self._used] = True
        self._seen[:, :, self._used : end] = torch.eye(self.ways, dtype=torch.bool, device=device)
        return self._seen[:, None, :, :end]

    def append(self, layer: int, key: Tensor, value: Tensor) -> Pair:
        """Writes [R, H, L, d] at the current end and returns all keys and values up to and including the new ones."""
        keys, values = self.keys[layer], self.values[layer]
        if key.shape[0] != keys.shape[0]:
            key, value = self._beside(key), self._beside(value)
        end = self._used + key.shape[2]
        keys[:, :, self._used : end] = key
        values[:, :, self._used : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, rows: int, length: int) -> None:
        """After all layers have appended `length` tokens of `rows` texts."""
        if self.length == 0:
            self._prompt = length
        self._used += self._slots(rows, length)
        self.length += length

    def rewind(self, place: tuple[int, int]) -> None:
        """Back to a `place` where it was, after the prompt; whose past is whose stays as it is."""
        self._prompt, self.length = place
        self._used = self._prompt + (self.length - self._prompt) * self.ways

    def reorder(self, ways: Tensor) -> None:
        """Text w of image i goes on from what was text ways[i, w] (int64 [b, ways], of the first b images): beam search's step.

        In place: a recorded step reads this very mask.
        """
        if self._seen is not None and self._used > self._prompt:
            seen = self._seen[: len(ways)]
            seen.copy_(seen.gather(1, ways[:, :, None].expand(-1, -1, seen.shape[2])))

    def keep(self, images: Tensor) -> None:
        """Forgets all images but these (int64 [b]): rows of what has ended cost as much as others."""
        self.keys = [each[images] for each in self.keys]
        self.values = [each[images] for each in self.values]
        self._seen = self._seen[images] if self._seen is not None else None
        self.kept = images if self.kept is None else self.kept[images]

    def _slots(self, rows: int, length: int) -> int:
        return length if rows == self.keys[0].shape[0] else self.ways

    def _beside(self, x: Tensor) -> Tensor:
        """[B * ways, H, 1, d] -> [B, H, ways, d]."""
        rows, heads, _, depth = x.shape
        return x.reshape(rows // self.ways, self.ways, heads, depth).transpose(1, 2)


class Projections(nn.Module):
    """The query, key and value projections; keys and values may come from a source of another width."""

    def __init__(self, width: int, source_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)


class ResidualNorm(nn.Module):
    """dense -> dropout -> LayerNorm(x + residual), eps 1e-12: BERT's post-norm block end."""

    def __init__(self, source_width: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(source_width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + residual)
        return out


class CrossAttention(nn.Module, ABC):
    """What may stand as cross-attention in a layer: text states over keys and values made of image tokens."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_dropout = config.attention_dropout
        self.product: Callable[..., Tensor] = attention  # or one with its parameters

    @abstractmethod
    def keys_values(self, source: Tensor) -> Pair:
        """Returns keys and values of `source` [B, N, S], each [B, H, N, d]."""

    @abstractmethod
    def forward(self, x: Tensor, source: Pair, mask: Tensor | None) -> Tensor:
        """New states [R, L, D] of x [R, L, D]; `source` and `mask` as in `attend`."""

    def attend(self, query: Tensor, source: Pair, mask: Tensor | None, bias: Tensor | None = None) -> Tensor:
        """The heads' outputs [R, L, D] of queries [R, L, D], before any dense layer.

        source: keys and values of R rows, or of R/K images whose K rows lie side by side. mask: bool, as in SDPA. bias: added
        to the logits, as in `biased`; of R/K images, for the K*L queries of each.
        """
        rows, length, width = query.shape
        keys, values = source
        if keys.shape[0] != rows:
            # Rows of one image attend to one copy of its keys: K rows of L tokens are K*L queries of that image.
            query = query.view(keys.shape[0], -1, width)
        dropout = self.attention_dropout if self.training else 0.0
        # Under autocast the cache may hold another dtype than the query; SDPA wants one.
        keys, values = keys.to(query.dtype), values.to(query.dtype)
        if bias is not None:
            mask = biased(bias, mask, False, query.dtype)
        heads = self.product(split_heads(query, self.heads), keys, values, attn_mask=mask, dropout_p=dropout)
        return merge_heads(heads).view(rows, length, width)


class Attention(CrossAttention):
    """Attention of text states over themselves or over image tokens, with its output dense and LayerNorm."""

    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__(config)
        self.self = Projections(config.width, source_width)
        self.output = ResidualNorm(config.width, config.width, config.dropout)

    def keys_values(self, source: Tensor) -> Pair:
        """Returns keys and values of `source` [B, N, S], each [B, H, N, d]."""
        return split_heads(self.self.key(source), self.heads), split_heads(
            self.self.value(source), self.heads
        )

    def forward(self, x: Tensor, source: Pair, mask: Tensor | None, bias: Tensor | None = None) -> Tensor:
        """New states [R, L, D] of x [R, L, D]; `source`, `mask` and `bias` as in `attend`."""
        out: Tensor = self.output(self.attend(self.self.query(x), source, mask, bias), x)
        return out


class Intermediate(nn.Module):
    """The widening half of the feed-forward block, with an exact GELU."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """Self-attention, then (when there is an image, and the layer looks at it) cross-attention, then feed-forward; each
    post-norm.
    """

    def __init__(
        self, config: TextConfig, crossattention: Callable[[], CrossAttention | None], shared: Layer | None
    ) -> None:
        super().__init__()
        self.attention = Attention(config, config.width)
        # BLIP, table 3: sharing all but self-attention is the best of four ways to share.
        self.crossattention: CrossAttention | None = shared.crossattention if shared else crossattention()
        self.intermediate: Intermediate = shared.intermediate if shared else Intermediate(config)
        self.output: ResidualNorm = (
            shared.output if shared else ResidualNorm(config.hidden, config.width, config.dropout)
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        cross: Pair | None,
        cross_mask: Tensor | None,
        cache: SelfCache | None,
        index: int,
        first: bool,
    ) -> Tensor:
        source = self.attention.keys_values(x)
        if cache is not None:
            source = cache.append(index, *source)
        if first:
            x = x[:, :1]
        x = self.attention(x, source, mask)
        if cross is not None:
            assert self.crossattention is not None
            x = self.crossattention(x, cross, cross_mask)
        out: Tensor = self.output(self.intermediate(x), x)
        return out


class Embeddings(nn.Module):
    """Word plus learned position embeddings, LayerNorm, dropout."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = blank_embedding(config.vocab_size, config.width, config.pad_id)
        self.position_embeddings = blank_embedding(config.max_positions, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, start: int) -> Tensor:
        positions = self.position_embeddings.weight[start : start + ids.shape[1]]
        out: Tensor = self.dropout(self.LayerNorm(self.word_embeddings(ids) + positions))
        return out


class Stack(nn.Module):
    """The layers under BERT's name for them."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)


class TextTransformer(nn.Module):
    """Embeddings and layers. Built with `shared`, it owns its self-attention only and uses the other's rest.

    crossattention: makes that of layer i, in place of `Attention`; None for a layer that reads text alone.
    """

    def __init__(
        self,
        config: TextConfig,
        image_width: int,
        shared: TextTransformer | None = None,
        crossattention: Callable[[int], CrossAttention | None] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # see `layers.recompute_activations`
        self.embeddings: Embeddings = shared.embeddings if shared else Embeddings(config)
        cross = crossattention or (lambda index: Attention(config, image_width))
        layers = [
            Layer(config, partial(cross, index), shared.layers[index] if shared else None)
            for index in range(config.depth)
        ]
        self.encoder = Stack(layers)
        for layer in layers:
            init_normal(layer.attention if shared else layer, init_std(config.width))
        if not shared:
            init_normal(self.embeddings, init_std(config.width))

    @property
    def layers(self) -> list[Layer]:
        return [layer for layer in self.encoder.layer if isinstance(layer, Layer)]

    def cross_keys_values(self, image_tokens: Tensor) -> list[Pair]:
        """Keys and values of image tokens [B, N, Dv] for every layer that looks at them: each a pair of [B, H, N, d]."""
        looking = (layer.crossattention for layer in self.layers)
        return [each.keys_values(image_tokens) for each in looking if each is not None]

    def new_cache(self, images: int, ways: int, max_length: int, like: Tensor) -> SelfCache:
        """An empty cache for `ways` texts of up to `max_length` tokens per image, on `like`'s device in its dtype."""
        shape = (images, self.config.heads, ways * max_length, self.config.width // self.config.heads)
        depth = self.config.depth
        return SelfCache(
            [like.new_zeros(shape) for _ in range(depth)], [like.new_zeros(shape) for _ in range(depth)], ways
        )

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        cross: Sequence[Pair] | None = None,
        cross_mask: Tensor | None = None,
        causal: bool = False,
        cache: SelfCache | None = None,
        first: bool = False,
    ) -> Tensor:
        """Hidden states [R, L, D] of ids int64 [R, L].

        mask: bool [R, L], true where there is a token (None: everywhere). cross: `cross_keys_values`, None to read text
        alone. cross_mask: bool [R, N] over image tokens. causal: each token sees itself and what is before it. cache:
        continue after the cached tokens (implies causal, takes no mask). first: only position 0 is wanted, [R, 1, D]: the
        last layer then asks for nothing else, which spares embedding and matching most of that layer.
        """
        length = ids.shape[1]
        start = cache.length if cache is not None else 0
        attend = mask[:, None, None, :] if mask is not None else None
        if cache is not None:
            attend = cache.begin(*ids.shape)
        elif causal and length > 1:
            square = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
            attend = square if attend is None else attend & square
        x: Tensor = self.embeddings(ids, start)
        x = self._run(self.layers, x, attend, cross, cross_mask, cache, first)
        if cache is not None:
            cache.advance(*ids.shape)
        return x

    def through(
        self,
        states: Tensor,
        mask: Tensor | None,
        layers: slice,
        cross: Sequence[Pair] | None = None,
        first: bool = False,
    ) -> Tensor:
        """Hidden states after these layers, of what the one before them (or `embeddings`) gave, [R, L, D].

        cross: `cross_keys_values` of the layers that look at an image, all of which must be among these; the rest as in
        `forward`.
        """
        attend = mask[:, None, None, :] if mask is not None else None
        return self._run(self.layers[layers], states, attend, cross, None, None, first)

    def _run(
        self,
        layers: Sequence[Layer],
        x: Tensor,
        attend: Tensor | None,
        cross: Sequence[Pair] | None,
        cross_mask: Tensor | None,
        cache: SelfCache | None,
        first: bool,
    ) -> Tensor:
        image_attend = cross_mask[:, None, None, :] if cross_mask is not None else None
        pairs = iter(cross) if cross is not None else None
        for index, layer in enumerate(layers):
            pair = next(pairs) if pairs is not None and layer.crossattention is not None else None
            x = run_layer(
                layer,
                *(x, attend, pair, image_attend, cache, index, first and index == len(layers) - 1),
                recompute=self.recompute and cache is None,
            )
        return x


class Transform(nn.Module):
    """dense -> GELU -> LayerNorm, before the vocabulary projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(F.gelu(self.dense(x)))
        return out


class Predictions(nn.Module):
    """The language-model head: transform, projection tied to the word embeddings, a bias of its own."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.transform = Transform(config.width)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """fp32 logits [..., V] of states [..., D] under word embeddings [V, D]."""
        with full_precision(x):
            return F.linear(self.transform(x.to(words.dtype)).float(), words.float(), self.bias.float())


class Head(nn.Module):
    """The head under BERT's name for it."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.predictions = Predictions(config)


class TextDecoder(nn.Module):
    """A text transformer used causally, and the language-model head."""

    def __init__(self, config: TextConfig, image_width: int, shared: TextTransformer | None = None) -> None:
        super().__init__()
        self.bert = TextTransformer(config, image_width, shared)
        self.cls = Head(config)
        init_normal(self.cls, init_std(config.width))

    def logits(self, states: Tensor) -> Tensor:
        """fp32 logits [..., V] of hidden states [..., D]."""
        out: Tensor = self.cls.predictions(states, self.bert.embeddings.word_embeddings.weight)
        return out
