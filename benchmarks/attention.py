"""Attention in bf16 on a processor: its gradients by plain products, as capfilt's models compute them there, against torch's
fused kernel; and a training step of a small ViLT in bf16 against fp32.

In pairs, one thread. Processors that multiply bf16 by themselves (AVX512-BF16, AMX) gain; others lose by bf16 altogether, which
is why `--precision auto` means fp32 on all of them. Outputs of both attentions are compared with those of fp32.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from _form import Record, in_pairs, main
from torch import Tensor

from capfilt.data.tokenizer import ADDED
from capfilt.models import build, preset
from capfilt.models.common.layers import attention

VOCABULARY = 4000 + len(ADDED)


def measure(args: argparse.Namespace, record: Record) -> None:
    """Median ratios, and how far bf16 is from fp32."""
    torch.set_num_threads(1)
    rows, words = 64, 18
    generator = torch.Generator().manual_seed(args.seed)
    model = build(preset("vilt", "trunk", VOCABULARY), args.seed).train()
    config = model.config
    length = config.vision.grid**2 + 1 + words
    shape = (3, rows, config.heads, length, config.width // config.heads)
    sides = torch.randn(shape, generator=generator)
    mask = torch.ones(rows, 1, 1, length, dtype=torch.bool)
    mask[..., -4:] = False

    def plain() -> Tensor:
        query, keys, values = sides.bfloat16().requires_grad_().unbind()
        out = attention(query, keys, values, attn_mask=mask)
        out.sum().backward()  # type: ignore[no-untyped-call]
        return out.detach()

    def fused() -> Tensor:
        query, keys, values = sides.bfloat16().requires_grad_().unbind()
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        out.sum().backward()  # type: ignore[no-untyped-call]
        return out.detach()

    exact = attention(*sides, attn_mask=mask)
    ids = torch.randint(5, VOCABULARY - 2, (rows, words), generator=generator)
    features = torch.randn(rows, config.vision.grid**2, 1280, generator=generator).half()

    def step(half: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            states = model.fuse(ids, None, model.encode_image(features))
            loss = model.match_logits(states).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]

    count = 3 if args.quick else 15
    record.figure("plain_difference", float((plain().float() - exact).abs().max()))
    record.figure("fused_difference", float((fused().float() - exact).abs().max()))
    record.target("attention_times_fused", in_pairs(plain, fused, count).ratio, ">=", 1.0)
    record.figure("step_times_fp32", in_pairs(lambda: step(True), lambda: step(False), count).ratio)


if __name__ == "__main__":
    main(__doc__, measure)
