"""Catches: a nucleus one token too long or short, draws that do not follow it, draws that depend on the batch, and a
repetition penalty that rewards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from capfilt.inference import sampling
from capfilt.inference.sampling import draw, penalise_repetition, uniforms


def nucleus(logits: np.ndarray, top_p: float, top_k: int = 0, temperature: float = 1.0) -> np.ndarray:
    """The exact distribution by the definition, one token at a time."""
    p = np.exp(logits / temperature - (logits / temperature).max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if top_k:
        order = order[:top_k]
    p[np.setdiff1d(np.arange(len(p)), order)] = 0
    p /= p.sum()
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += p[token]
        if mass >= top_p:
            break
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize(
    ("top_p", "top_k", "temperature"),
    [(0.9, 0, 1.0), (0.5, 0, 1.0), (1.0, 0, 0.7), (0.9, 5, 1.3), (0.05, 0, 1.0)],
)
def test_draws_follow_the_exact_nucleus(top_p, top_k, temperature):
    logits = np.random.default_rng(1).normal(size=40) * 2
    expected = nucleus(logits, top_p, top_k, temperature)
    u = uniforms(0, [str(i) for i in range(200)], 1, 100).reshape(-1)
    rows = torch.tensor(logits, dtype=torch.float32).expand(len(u), -1)
    counts = np.bincount(draw(rows, u, top_p, top_k, temperature).numpy(), minlength=40)
    assert counts[expected == 0].sum() == 0
    likely = expected > 0
    if likely.sum() > 1:
        assert stats.chisquare(counts[likely], expected[likely] * len(u)).pvalue > 1e-3
    else:
        assert counts[likely] == len(u)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), top_p=st.floats(0.05, 1.0))
def test_long_and_short_nuclei_side_by_side_are_drawn_as_alone(seed, top_p):
    """The sorted shortlist must not change what a full sort would draw."""
    rng = np.random.default_rng(seed)
    vocabulary = sampling.SHORTLISTS[-1] + 300
    scale = np.array([[0.01], [3.0], [8.0]])  # nearly flat rows need the full sort, peaked ones do not
    logits = torch.tensor(rng.normal(size=(3, vocabulary)) * scale, dtype=torch.float32)
    u = torch.tensor(rng.random(3))
    tokens = draw(logits, u, top_p, 0, 1.0)
    for row in range(3):
        assert draw(logits[row : row + 1], u[row : row + 1], top_p, 0, 1.0)[0] == tokens[row]
        full = torch.softmax(logits[row], -1).double().sort(descending=True, stable=True)
        cumulative = full.values.cumsum(0)
        size = int(((cumulative - full.values) < top_p).sum())
        mass = cumulative[size - 1]
        at = min(int((cumulative <= u[row] * mass).sum()), size - 1)
        # Equal probabilities have no order.
        assert torch.softmax(logits[row], -1).double()[tokens[row]] == full.values[at]


@pytest.mark.parametrize("further", [0, 100, 600])
@pytest.mark.parametrize("top_k", [0, 8])
@pytest.mark.parametrize(
    ("top_p", "size"),
    [(0.125, 1), (0.1250001, 2), (0.25, 2), (0.5, 4), (0.75, 6), (0.7500001, 7), (0.875, 7), (1.0, 8)],
)
def test_a_nucleus_that_has_its_mass_exactly_takes_no_further_token(top_p, size, top_k, further):
    """Eight tokens of an eighth each, in sums without rounding: the smallest set with mass >= top_p, and not > top_p."""
    logits = torch.cat([torch.zeros(1, 8), torch.full((1, further), float("-inf"))], dim=1)
    u = torch.arange(64, dtype=torch.float64) / 64
    drawn = draw(logits.expand(64, -1), u, top_p, top_k, 1.0)
    assert (drawn < 8).all()
    # A number at the border of two tokens belongs to the second, so that each has its share.
    shares = (torch.arange(64) * size // 64).bincount().sort().values
    assert drawn.unique(return_counts=True)[1].sort().values.tolist() == shares.tolist()


def test_extreme_uniforms_stay_inside():
    logits = torch.tensor([[0.0, 1.0, float("-inf"), -3.0]])
    for u in (0.0, np.nextafter(1.0, 0)):
        assert draw(logits, torch.tensor([u]), 1.0, 0, 1.0)[0] in (0, 1, 3)


def test_a_rows_numbers_are_its_own():
    whole = uniforms(7, ["a", "b", "c"], 2, 6)
    assert torch.equal(uniforms(7, ["c"], 1, 3)[0], whole[4, :3])
    assert torch.equal(uniforms(7, ["b"], 2, 6), whole[2:4])
    assert not torch.equal(uniforms(8, ["b"], 2, 6), whole[2:4])
    assert len(whole.unique()) == whole.numel()
    assert ((whole >= 0) & (whole < 1)).all()
    # Written down: a seed means the same captions in the next release.
    assert uniforms(0, ["0"], 1, 2)[0].tolist() == pytest.approx(FIRST_NUMBERS)
    assert uniforms(0, ["\ud800"], 1, 1).shape == (1, 1)  # file names on disk may hold such halves


FIRST_NUMBERS = [0.28180800848779297, 0.2768522237607052]


def test_penalty_lowers_what_was_said():
    scores = torch.tensor([[2.0, -2.0, 1.0]])
    out = penalise_repetition(scores, torch.tensor([[0, 1, 1]]), 2.0)
    assert out.tolist() == [[1.0, -4.0, 1.0]]
    assert scores.tolist() == [[2.0, -2.0, 1.0]]
