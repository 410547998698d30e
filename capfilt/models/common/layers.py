"""Building blocks that several models share: attention, feed-forward, drop-path, initialisation, fp32 islands.

No whole model lives here, and nothing that knows what an image or a caption is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from capfilt.models.common.relative import Grid, RelativePositions

Pair = tuple[Tensor, Tensor]


def full_precision(like: Tensor) -> AbstractContextManager[None]:
    """A context in which autocast is off on `like`'s device: for logits, similarities and losses."""
    return torch.autocast(device_type=like.device.type, enabled=False)


def exact(linear: nn.Linear, x: Tensor) -> Tensor:
    """`linear(x)` in fp32, free of autocast: for embeddings and logits that are compared."""
    with full_precision(x):
        return F.linear(x.float(), linear.weight.float(), linear.bias.float())


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, H*d] -> [B, H, L, d]."""
    batch, length, width = x.shape
    return x.view(batch, length, heads, width // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, L, d] -> [B, L, H*d]."""
    batch, heads, length, depth = x.shape
    return x.transpose(1, 2).reshape(batch, length, heads * depth)


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """As `F.scaled_dot_product_attention`, whose fused kernel takes over twice as long as plain products for the gradients of
    bf16 on a processor (benchmarks/attention.py); there it is not used.

    bias: added to the scaled logits, as in `biased`; a mask and `is_causal` may come with it, and with each other.
    """
    if bias is not None:
        attn_mask, is_causal = biased(bias, attn_mask, is_causal, query.dtype), False
    options: dict[str, Any] = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
    if query.dtype == torch.bfloat16 and query.device.type == "cpu" and torch.is_grad_enabled():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, keys, values, **options)
    return F.scaled_dot_product_attention(query, keys, values, **options)


def biased(bias: Tensor, mask: Tensor | None, causal: bool, dtype: torch.dtype) -> Tensor:
    """What SDPA adds to the logits of queries of this dtype: a bias [1 or B, H, Lq, Lk], -inf where attention is forbidden.

    mask: bool, broadcast to [B, H, Lq, Lk], true where attention is allowed. Forbidding by a large negative bias is safe in
    every dtype: the bias stays finite, so that a query all of whose keys have it attends to all of them alike.
    """
    limits = torch.finfo(dtype)
    bias = bias.float().clamp(limits.min, limits.max)
    if causal:
        before = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
        mask = before if mask is None else mask & before
    return (bias if mask is None else bias.masked_fill(~mask, -math.inf)).to(dtype)


def init_std(width: int) -> float:
    """The published 0.02 from width 768 up; wider below, by the square root, so that narrow layers pass on as much."""
    return 0.02 * max(1.0, math.sqrt(768 / width))


def init_truncated(module: nn.Module, std: float = 0.02) -> None:
    """ViT initialisation: truncated normal for linears, biases 0, LayerNorm 1 (DeiT, arXiv 2012.12877: std 0.02)."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.trunc_normal_(child.weight, std=std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def init_normal(module: nn.Module, std: float = 0.02) -> None:
    """BERT initialisation: normal for linears and embeddings, biases and padding row 0 (arXiv 1810.04805: 0.02)."""
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Embedding) and child.weight.is_meta:
            continue  # drawing nothing is the point there, and `normal_` on meta tensors imports for seconds
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=std)
            if child.padding_idx is not None:
                with torch.no_grad():
                    child.weight[child.padding_idx].zero_()


def blank_embedding(rows: int, width: int, padding_idx: int | None = None) -> nn.Embedding:
    """An embedding of zeros for `init_normal` to fill: nn.Embedding's own constructor would draw it once more."""
    return nn.Embedding(rows, width, padding_idx, _weight=torch.zeros(rows, width))


def recompute_activations(model: nn.Module, on: bool = True) -> None:
    """Whether training keeps the activations of every layer or, with `on`, computes them again in the backward pass.

    It changes no result, and so is no part of a config. A module that goes by it hands its `recompute` to `run_layer`.
    """
    for module in model.modules():
        if hasattr(module, "recompute"):
            module.recompute = on  # type: ignore[assignment]


@contextmanager
def steady(module: nn.Module) -> Iterator[None]:
    """Within it, the module draws nothing (dropout, drop-path); afterwards it and its parts are in the mode they were in."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode


def run_layer(layer: nn.Module, *inputs: Any, recompute: bool = False) -> Tensor:
    """`layer(*inputs)`; with `recompute` its activations are not kept but computed again for the backward pass.

    Activation checkpointing (arXiv 1604.06174): memory for one layer instead of all, for about a third more work. Random
    draws (dropout, drop-path) are repeated, and running statistics move once, so losses, gradients and what is kept are the
    same. Without gradients it changes nothing.
    """
    out: Tensor
    if recompute and torch.is_grad_enabled():
        # Imported here: torch's own function brings its compiler along, which no other run should pay for.
        from torch.utils.checkpoint import checkpoint

        out = checkpoint(
            layer, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), statistics_kept(layer))
        )
    else:
        out = layer(*inputs)
    return out


def running(module: nn.Module) -> dict[str, Tensor]:
    """The running means and variances that the module's training moves, by name, shared memory: those of batch
    normalisations that are in training mode.
    """
    return {
        f"{name}.{leaf}".removeprefix("."): getattr(each, leaf)
        for name, each in module.named_modules()
        if isinstance(each, _BatchNorm) and each.training and each.running_mean is not None
        for leaf in ("running_mean", "running_var")
    }


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Inside, batch normalisations move copies of their running statistics, and so leave their own alone."""
    # Not by `track_running_stats`: a recomputed pass must save as many tensors as the first did.
    own = [(each, each._buffers) for each in module.modules() if isinstance(each, _BatchNorm)]
    for each, buffers in own:
        each._buffers = {name: None if old is None else old.clone() for name, old in buffers.items()}
    try:
        yield
    finally:
        for each, buffers in own:
            each._buffers = buffers


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): training drops a sample's whole residual branch with probability p."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        keep = 1.0 - self.probability
        mask = torch.empty((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(
            keep
        )
        return x * mask / keep


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the approximation of GELU that OpenAI's CLIP was trained with (its released code)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class Mlp(nn.Module):
    """Two linears around an activation, by default an exact GELU, and dropout after it."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu", dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.dropout(self.activation(self.fc1(x))))
        return out


class FusedAttention(RelativePositions):
    """Self-attention with one qkv projection (with bias), scale d^-1/2, no dropout; `causal`: to what is before, and itself.

    grid: of the patches after [CLS], for a table of its own with biases by relative position; None: no table.
    """

    def __init__(self, width: int, heads: int, causal: bool = False, grid: Grid | None = None) -> None:
        super().__init__()
        self.tabulate(grid, heads)
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, first: bool = False, bias: Tensor | None = None
    ) -> Tensor:
        """New tokens [B, L, D] of x [B, L, D]; mask: bool [B, 1, 1, L], which are attended to (None: all).

        A causal attention takes a mask only together with a bias. first: only position 0 is wanted, [B, 1, D]. bias: added to
        the logits, [1 or B, H, L, L].
        """
        own = self.relative_bias()
        if own is not None:
            bias = own if bias is None else bias + own
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, keys, values = qkv.unbind()  # by index each would have a gradient of the size of all three
        if first:
            query = query[:, :, :1]
            bias = bias[:, :, :1] if bias is not None else None
        seen = attention(query, keys, values, attn_mask=mask, is_causal=self.causal, bias=bias)
        out: Tensor = self.proj(merge_heads(seen))
        return out


class PreNormBlock(nn.Module):
    """A transformer block: x + attention(LN(x)), then x + MLP(LN(x)); eps 1e-6 is ViT's (BLIP, arXiv 2201.12086, code).

    dropout: on what both branches add, and inside the MLP. layer_scale: LayerScale (arXiv 2103.17239), a factor per channel of
    either branch, `gamma_1` and `gamma_2`, that starts at this value; 0: none. grid: as of `FusedAttention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        drop_path: float = 0.0,
        *,
        eps: float = 1e-6,
        activation: str = "gelu",
        causal: bool = False,
        dropout: float = 0.0,
        layer_scale: float = 0.0,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = FusedAttention(width, heads, causal, grid)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden, activation, dropout)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None
        self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None

    def forward(
        self, x: Tensor, mask: Tensor | None = None, first: bool = False, bias: Tensor | None = None
    ) -> Tensor:
        """New tokens [B, L, D] of x [B, L, D], or the first of them, [B, 1, D]; arguments as in `FusedAttention.forward`."""
        seen = self.attn(self.norm1(x), mask, first, bias)
        x = (x[:, :1] if first else x) + self._branch(seen, self.gamma_1)
        return x + self._branch(self.mlp(self.norm2(x)), self.gamma_2)

    def _branch(self, x: Tensor, gamma: Tensor | None) -> Tensor:
        x = self.dropout(x)
        out: Tensor = self.drop_path(x if gamma is None else gamma * x)
        return out


class QueryPooling(nn.Module):
    """Learned queries that attend to tokens of any width: CoCa's attentional pooler, as open_clip has it.

    LayerNorm on queries and tokens, one attention with biases, no residual and no MLP (CoCa, arXiv 2205.01917, sec. 3.2).
    """

    def __init__(self, width: int, source_width: int, queries: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, width))
        self.attn = nn.MultiheadAttention(
            width, heads, kdim=source_width, vdim=source_width, batch_first=True
        )
        self.ln_q = nn.LayerNorm(width)
        self.ln_k = nn.LayerNorm(source_width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, queries, width] of tokens [B, N, source_width]."""
        tokens = self.ln_k(tokens)
        query = self.ln_q(self.query).expand(len(tokens), -1, -1)
        out: Tensor = self.attn(query, tokens, tokens, need_weights=False)[0]
        return out


def project(head: nn.Linear, states: Tensor) -> Tensor:
    """fp32 unit vectors [B, E]: the head on position 0 of states [B, L, D], L2-normalised; free of autocast."""
    return F.normalize(exact(head, states[:, 0]), dim=-1)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """A vision tower's blocks, or those of a transformer for everything: what is run as a whole, once per pass, and so can
    have its weights gathered just then.
    """
    where: Any = model if hasattr(model, "blocks") else model.visual_encoder
    return list(where.blocks)


M = TypeVar("M", bound=nn.Module)


def seeded(model: Callable[[Any], M], config: Any, seed: int = 0) -> M:
    """A freshly initialised model: the same config and seed give the same weights, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(config)
