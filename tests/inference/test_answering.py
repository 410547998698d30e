"""Catches: a short list that drops the best answer, likelihoods of padding, one question answered with another's words."""

from __future__ import annotations

import pytest
import torch

from capfilt.inference.answering import rank_answers
from capfilt.models import build
from capfilt.models.common.answering import VqaConfig
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig
from tests.models.interop.reference import loud

IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0], [2, 5, 6, 3, 0]])
ANSWERS = torch.tensor(
    [[2, 7, 3, 0], [2, 8, 9, 3], [2, 10, 3, 0], [2, 12, 13, 3], [2, 14, 3, 0], [2, 15, 6, 3]]
)


def made(seed):
    vision = VisionConfig(16, 8, 16, 1, 2, 32)
    return loud(build(VqaConfig(vision, TextConfig(30, 16, 2, 2, 40, max_positions=12))), seed)


@torch.no_grad()
def likelihood(model, row, images, answer):
    """Of one question alone, without padding anywhere, token by token."""
    ids = IDS[row : row + 1, : int((IDS[row] != 0).sum())]
    cross = model.prefill_cross(model.encode_question(ids, None, model.encode_image(images[row : row + 1])))
    tokens = answer[answer != 0]
    logits = model.answer_logits(tokens[None], None, cross, None)[0].log_softmax(1)
    return [float(logits[place, token]) for place, token in enumerate(tokens[1:].tolist())]


def test_the_best_of_all_and_of_the_nominated():
    chosen = {}
    for seed in range(6):
        model = made(seed)
        images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        scores = [[likelihood(model, row, images, answer) for answer in ANSWERS] for row in range(3)]
        for k in (1, 3, 6, 128):
            best, found = rank_answers(model, IDS, IDS != 0, images, ANSWERS, ANSWERS != 0, k)
            for row, own in enumerate(scores):
                nominated = sorted(range(len(ANSWERS)), key=lambda n: -own[n][0])[:k]
                expected = max(nominated, key=lambda n: sum(own[n]))
                assert int(best[row]) == expected, (seed, k, row)
                assert float(found[row]) == pytest.approx(sum(own[expected]), abs=1e-4)
                chosen[seed, row, k] = expected
    assert len(set(chosen.values())) > 2, "nothing is tested where one answer always wins"
    assert any(chosen[seed, row, 1] != chosen[seed, row, 6] for seed, row, _ in chosen), (
        "nor where k never matters"
    )
