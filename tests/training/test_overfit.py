"""Catches what no unit test sees: parts that are each right and do not learn together. Encoded pictures and captions go
through corpus, tokenizer, batches, all three objectives and the loop; 64 pairs must then find each other.
"""

from __future__ import annotations

from functools import partial

import torch

from capfilt.data.tokenizer import Tokenizer
from capfilt.models import build, preset
from capfilt.models.blip.model import BlipPretraining, PretrainingConfig
from capfilt.training.loop import TrainConfig, train
from tests.training.grids import pairs, source

PAIRS = 64


def test_64_pairs_are_learned_by_heart(tmp_path):
    corpus = source(tmp_path / "grids", pairs(PAIRS), 48)
    assert len(corpus) == PAIRS
    tokenizer = Tokenizer.train(corpus.texts(), vocab_size=200)
    model = build(preset("blip", "tiny", tokenizer.vocab_size))
    steps = 50
    lm = []
    result = train(
        BlipPretraining(model, PretrainingConfig(momentum=None, queue_size=0)),
        partial(step_batches, corpus, tokenizer, steps),
        TrainConfig(steps=steps, learning_rate=1e-3, warmup_steps=5, log_every=10),
        on_step=lambda _, values: lm.append(values["lm"]),
        examples=PAIRS,
    )
    assert result.exposures.tolist() == [steps // 2] * PAIRS
    assert result.skipped_steps == 0
    assert lm[-1] < lm[0] - 1.0
    model.eval()
    (everything,) = corpus.batches(tokenizer, PAIRS, steps=1)
    with torch.inference_mode():
        images = model.embed_image(model.encode_image(everything.pixels))
        similarity = images @ model.embed_text(everything.ids, everything.mask).T
    own = torch.arange(PAIRS)
    assert (similarity.argmax(1) == own).float().mean() >= 0.95
    assert (similarity.argmax(0) == own).float().mean() >= 0.95


def step_batches(corpus, tokenizer, steps, start):
    return corpus.batches(tokenizer, 32, steps=steps, start_step=start)
