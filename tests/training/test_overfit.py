"""Catches what no unit test sees: parts that are each right and do not learn together. Encoded pictures and captions go
through corpus, tokenizer, batches, all three objectives and the loop; 64 pairs must then find each other.
"""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from capfilt.data.corpus import batches, from_images
from capfilt.data.tokenizer import Tokenizer
from capfilt.models.blip import build
from capfilt.models.objectives import BlipPretraining, PretrainingConfig
from capfilt.models.presets import preset
from capfilt.tables.contracts import IMAGES
from capfilt.training.loop import TrainConfig, train

PAIRS = 64
WORDS = (
    "amber",
    "brook",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heath",
    "inlet",
    "jetty",
    "kelp",
    "ledge",
)


def pairs() -> pa.Table:
    """Grids of 4 by 4 random colours, each named by four random words."""
    rng, rows = np.random.default_rng(0), []
    for number in range(PAIRS):
        grid = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        encoded = io.BytesIO()
        grid.resize((48, 48), Image.Resampling.NEAREST).save(encoded, "PNG")
        rows.append(
            {
                "image_id": f"{number:032x}",
                "dataset": "grids",
                "key": str(number),
                "source": "human",
                "captions": [" ".join(rng.choice(WORDS, 4))],
                "split": "train",
                "status": "success",
                "image": {"bytes": encoded.getvalue(), "path": None},
            }
        )
    return pa.Table.from_pylist(rows, schema=IMAGES.schema)


def test_64_pairs_are_learned_by_heart():
    corpus = from_images([pairs()], size=48)
    assert len(corpus) == PAIRS
    tokenizer = Tokenizer.train(corpus.texts, vocab_size=200)
    model = build(preset("tiny", tokenizer.vocab_size))
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
    (everything,) = batches(corpus, tokenizer, PAIRS, steps=1)
    with torch.inference_mode():
        images = model.embed_image(model.encode_image(everything.pixels))
        similarity = images @ model.embed_text(everything.ids, everything.mask).T
    own = torch.arange(PAIRS)
    assert (similarity.argmax(1) == own).float().mean() >= 0.95
    assert (similarity.argmax(0) == own).float().mean() >= 0.95


def step_batches(corpus, tokenizer, steps, start):
    return batches(corpus, tokenizer, 32, steps=steps, start_step=start)
