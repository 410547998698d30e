"""BLIP's text transformer (MED): one stack that reads text alone, reads it against an image, or writes it.

Post-norm BERT geometry without token types (BLIP, arXiv 2201.12086, sec. 3.1). Module names are BERT's, so that every
tensor has the name it has in the published checkpoints. Nothing here knows how image tokens were made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.errors import UserError
from capfilt.models.layers import (
    Pair,
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
    """Keys and values of the tokens decoded so far, in buffers of a fixed size: [layers] x [R, H, max_length, d]."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        self.keys = keys
        self.values = values
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> Pair:
        """Writes at the current end and returns all keys and values up to and including the new ones."""
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def reorder(self, rows: Tensor) -> None:
        """Row r becomes the old row rows[r] (int64 [R]): beam search's step."""
        for buffers in (self.keys, self.values):
            for buffer in buffers:
                used = buffer[:, :, : self.length]
                buffer[: len(rows), :, : self.length] = used.index_select(0, rows)


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


class CrossAttention(nn.Module):
    """What may stand as cross-attention in a layer: text states over keys and values made of image tokens."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_dropout = config.attention_dropout

    def keys_values(self, source: Tensor) -> Pair:
        """Returns keys and values of `source` [B, N, S], each [B, H, N, d]."""
        raise NotImplementedError

    def forward(self, x: Tensor, source: Pair, mask: Tensor | None) -> Tensor:
        """New states [R, L, D] of x [R, L, D]; `source` and `mask` as in `attend`."""
        raise NotImplementedError

    def attend(self, query: Tensor, source: Pair, mask: Tensor | None) -> Tensor:
        """The heads' outputs [R, L, D] of queries [R, L, D], before any dense layer.

        source: keys and values of R rows, or of R/K images whose K rows lie side by side. mask: bool, as in SDPA.
        """
        rows, length, width = query.shape
        keys, values = source
        if keys.shape[0] != rows:
            # Rows of one image attend to one copy of its keys: K rows of L tokens are K*L queries of that image.
            query = query.view(keys.shape[0], -1, width)
        dropout = self.attention_dropout if self.training else 0.0
        # Under autocast the cache may hold another dtype than the query; SDPA wants one.
        keys, values = keys.to(query.dtype), values.to(query.dtype)
        heads = F.scaled_dot_product_attention(
            split_heads(query, self.heads), keys, values, attn_mask=mask, dropout_p=dropout
        )
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

    def forward(self, x: Tensor, source: Pair, mask: Tensor | None) -> Tensor:
        """New states [R, L, D] of x [R, L, D]; `source` and `mask` as in `attend`."""
        out: Tensor = self.output(self.attend(self.self.query(x), source, mask), x)
        return out


class Intermediate(nn.Module):
    """The widening half of the feed-forward block, with an exact GELU."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """Self-attention, then (when there is an image) cross-attention, then feed-forward; each post-norm."""

    def __init__(
        self, config: TextConfig, crossattention: Callable[[], CrossAttention], shared: Layer | None
    ) -> None:
        super().__init__()
        self.attention = Attention(config, config.width)
        # BLIP, table 3: sharing all but self-attention is the best of four ways to share.
        self.crossattention: CrossAttention = shared.crossattention if shared else crossattention()
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

    crossattention: makes that of layer i, in place of `Attention`.
    """

    def __init__(
        self,
        config: TextConfig,
        image_width: int,
        shared: TextTransformer | None = None,
        crossattention: Callable[[int], CrossAttention] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # see `Blip.recompute_activations`
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
        """Keys and values of image tokens [B, N, Dv] for every layer: each a pair of [B, H, N, d]."""
        return [layer.crossattention.keys_values(image_tokens) for layer in self.layers]

    def new_cache(self, rows: int, max_length: int, like: Tensor) -> SelfCache:
        """An empty cache for `rows` texts of up to `max_length` tokens, on `like`'s device in its dtype."""
        shape = (rows, self.config.heads, max_length, self.config.width // self.config.heads)
        depth = self.config.depth
        return SelfCache(
            [like.new_zeros(shape) for _ in range(depth)], [like.new_zeros(shape) for _ in range(depth)]
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
        if (causal or cache is not None) and length > 1:
            square = torch.ones(length, start + length, dtype=torch.bool, device=ids.device).tril(start)
            attend = square if attend is None else attend & square
        image_attend = cross_mask[:, None, None, :] if cross_mask is not None else None
        x: Tensor = self.embeddings(ids, start)
        last = len(self.encoder.layer) - 1
        for index, layer in enumerate(self.encoder.layer):
            pair = cross[index] if cross is not None else None
            x = run_layer(
                layer,
                *(x, attend, pair, image_attend, cache, index, first and index == last),
                recompute=self.recompute and cache is None,
            )
        if cache is not None:
            cache.length += length
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
