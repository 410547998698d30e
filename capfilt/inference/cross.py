"""The keys and values that all layers' cross-attention reads of an image, by one matrix product, laid out for reading.

Training and plain calls have them from each layer by itself (`Blip.prefill_cross`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from capfilt.models.blip.model import Blip
from capfilt.models.common.layers import Pair
from capfilt.models.common.text import Attention


class CrossProjections(nn.Module):
    """A copy of the projections of `model`, side by side; `convert` puts them into another precision."""

    def __init__(self, model: Blip, convert: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        stack = model.text_decoder.bert if model.config.half == "captioner" else model.text_encoder
        self.heads = model.config.text.heads
        found = [layer.crossattention for layer in stack.layers]
        linears = [
            each
            for cross in found
            if isinstance(cross, Attention)
            for each in (cross.self.key, cross.self.value)
        ]
        first = linears[0]
        joined = nn.Linear(first.in_features, sum(each.out_features for each in linears), device="meta")
        joined.weight = nn.Parameter(
            torch.cat([each.weight.detach() for each in linears]), requires_grad=False
        )
        joined.bias = nn.Parameter(torch.cat([each.bias.detach() for each in linears]), requires_grad=False)
        self.depth = len(found)
        self.joined = convert(joined)

    def forward(self, image_tokens: Tensor, room: Callable[[Tensor], Tensor] | None = None) -> list[Pair]:
        """Keys and values of image tokens [B, N, Dv] for every layer: each a pair of [B, H, N, d].

        room: gives memory [2 * layers, B, H, N, d] for what it is shown; None for new memory.
        """
        made = self.joined(image_tokens).unflatten(-1, (2 * self.depth, self.heads, -1))
        # Every step reads all of them: a head's rows next to each other are read faster than they come out, by more than
        # moving them once takes (1.4 times for `base` on a processor).
        made = made.permute(2, 0, 3, 1, 4)
        made = made.contiguous() if room is None else room(made).copy_(made)
        return [(made[2 * layer], made[2 * layer + 1]) for layer in range(self.depth)]
