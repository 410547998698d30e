"""Catches a rank that takes another's rows for its own. What several processes exchange is tested where they train together
(`test_contrast.py`, `test_matching.py`, `tests/training/test_distributed.py`)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.models.common.ranks import ALONE, Ranks, Rows


@settings(max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_every_row_is_exactly_one_ranks(counts):
    whole = torch.arange(sum(counts))
    each = [Rows(tuple(counts), 7, Ranks(rank, len(counts))) for rank in range(len(counts))]
    assert {rows.total for rows in each} == {sum(counts)}
    assert torch.equal(torch.cat([rows.mine(whole) for rows in each]), whole)
    assert [rows.offset for rows in each] == [sum(counts[:rank]) for rank in range(len(counts))]


def test_alone_everything_is_the_identity_and_keeps_its_gradient():
    rows = ALONE.rows(4, 7)
    assert (rows.counts, rows.total, rows.offset, rows.length) == ((4,), 4, 0, 7)
    mine = torch.randn(4, 3, requires_grad=True)
    assert rows.gather(mine) is mine
    assert torch.equal(rows.mine(mine), mine)
    ids, mask = torch.ones(4, 7, dtype=torch.int64), torch.ones(4, 7, dtype=torch.bool)
    assert rows.gather_texts(ids, mask) == (ids, mask)
    index = torch.tensor([3, 0, 3])
    fetched = rows.fetch(mine, index)
    assert torch.equal(fetched, mine[index])
    fetched.sum().backward()
    assert mine.grad.sum(dim=1).tolist() == [3.0, 0.0, 0.0, 6.0]


@pytest.mark.parametrize(
    "value", [torch.tensor(3), torch.tensor(2.5, requires_grad=True), torch.tensor([True, False])]
)
def test_a_mean_alone_is_the_value_in_full_precision_without_gradient(value):
    mean = ALONE.mean(value)
    assert mean.dtype == torch.float32
    assert not mean.requires_grad
    assert torch.equal(mean, value.detach().float())
    assert torch.equal(ALONE.first(value), value)
    assert torch.equal(ALONE.stack(value), value[None])
