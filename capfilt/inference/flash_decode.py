"""Attention of a few queries to many keys, at the speed their keys and values come from memory: a Triton kernel.

A decode step has one query for each text of an image and its hundreds of image tokens as keys. Kernels made for long queries
spend such a step idle. Here a program reads a stretch of one head's keys and values once for all of its queries, and where
images and heads alone do not fill the GPU, stretches are shared out and put together afterwards (flash decoding, Dao et al.
2023, pytorch.org/blog/flash-decoding). What it computes is `F.scaled_dot_product_attention` without a mask, its plain twin;
which of the two runs is decode_attention.py's to say.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""Keys at a time."""

LEAST_ROWS = 16  # a tensor core's product has no fewer


@triton.jit
def _attend(
    query, keys, values, out, largest, total, count, stretch, scale,
    queries: tl.constexpr, padded: tl.constexpr, width: tl.constexpr, size: tl.constexpr, whole: tl.constexpr,
):  # fmt: skip
    """One head's queries over one stretch of its keys: the attended values, or with their largest score and their sum."""
    head, part = tl.program_id(0), tl.program_id(1)
    rows, columns = tl.arange(0, padded), tl.arange(0, width)
    own = head.to(tl.int64)
    few = rows[:, None] < queries
    q = tl.load(query + (own * queries + rows[:, None]) * width + columns[None, :], mask=few, other=0.0)
    best = tl.full([padded], float("-inf"), tl.float32)
    weight = tl.zeros([padded], tl.float32)
    made = tl.zeros([padded, width], tl.float32)
    first = part * stretch
    last = tl.minimum(first + stretch, count)
    for start in range(first, last, size):
        at = start + tl.arange(0, size)
        here = at < last
        place = (own * count + at[:, None]) * width + columns[None, :]
        k = tl.load(keys + place, mask=here[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(here[None, :], score, float("-inf"))
        new = tl.maximum(best, tl.max(score, 1))
        share = tl.exp(score - new[:, None])
        faded = tl.exp(best - new)
        v = tl.load(values + place, mask=here[:, None], other=0.0)
        made = made * faded[:, None] + tl.dot(share.to(v.dtype), v, input_precision="ieee")
        weight = weight * faded + tl.sum(share, 1)
        best = new
    if whole:
        made = made / weight[:, None]
    else:
        said = (own * tl.num_programs(1) + part) * queries + rows
        tl.store(largest + said, best, mask=rows < queries)
        tl.store(total + said, weight, mask=rows < queries)
    where = ((own * tl.num_programs(1) + part) * queries + rows[:, None]) * width + columns[None, :]
    tl.store(out + where, made.to(out.dtype.element_ty), mask=few)


@triton.jit
def _join(
    parts, largest, total, out, number,
    queries: tl.constexpr, width: tl.constexpr, slots: tl.constexpr,
):  # fmt: skip
    """One query's attended values from those of all stretches."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, columns = tl.arange(0, slots), tl.arange(0, width)
    said = (head * number + part) * queries + row
    there = part < number
    best = tl.load(largest + said, mask=there, other=float("-inf"))
    share = tl.exp(best - tl.max(best, 0))
    weight = tl.sum(share * tl.load(total + said, mask=there, other=0.0), 0)
    made = tl.load(parts + said[:, None] * width + columns[None, :], mask=there[:, None], other=0.0)
    found = tl.sum(made * share[:, None], 0) / weight
    tl.store(out + (head * queries + row) * width + columns, found.to(out.dtype.element_ty))


def stretches(heads: int, count: int, processors: int) -> int:
    """Into how many parts keys are divided: enough that every multiprocessor has two of them, where there are so many keys."""
    wanted = -(-2 * processors // heads)
    return max(1, min(wanted, count // BLOCK))


def flash_decode(query: Tensor, keys: Tensor, values: Tensor, parts: int) -> Tensor:
    """Attended values [B, H, Q, d] of query [B, H, Q, d] over keys and values [B, H, N, d], in the query's dtype.

    d is a power of two from 16 on. parts: how many stretches the keys are divided into, see `stretches`.
    """
    images, heads, queries, width = query.shape
    count = keys.shape[2]
    query, keys, values = query.contiguous(), keys.contiguous(), values.contiguous()
    stretch = -(-count // parts // BLOCK) * BLOCK if parts > 1 else count
    parts = -(-count // stretch)
    padded = max(LEAST_ROWS, triton.next_power_of_2(queries))
    whole = parts == 1
    out = torch.empty_like(query)
    shape = (images * heads, parts, queries)
    largest, total = (query.new_empty(shape if not whole else 0, dtype=torch.float32) for _ in range(2))
    made = out if whole else query.new_empty((*shape, width), dtype=torch.float32)
    _attend[(images * heads, parts)](
        query, keys, values, made, largest, total, count, stretch, width**-0.5,
        queries=queries, padded=padded, width=width, size=BLOCK, whole=whole,
    )  # fmt: skip
    if not whole:
        _join[(images * heads, queries)](
            made,
            largest,
            total,
            out,
            parts,
            queries=queries,
            width=width,
            slots=triton.next_power_of_2(parts),
        )
    return out
