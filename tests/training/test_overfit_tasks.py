"""Catches what no unit test of the tasks sees: an answer or a label that is not its pictures' own by the time it reaches
the loss. 64 examples with nothing in common must be learned by heart through tables, loader, objective and loop.
"""

from __future__ import annotations

import dataclasses
import io
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from capfilt.data.task_corpus import from_examples, task_batches
from capfilt.data.tokenizer import Tokenizer
from capfilt.inference.answering import rank_answers
from capfilt.models import build, preset
from capfilt.models.blip.tasks import nlvr_from_blip, vqa_from_blip
from capfilt.models.common.task_objectives import ClassifierTraining, VqaTraining
from capfilt.tables.contracts import EXAMPLES, IMAGES
from capfilt.training.loop import TrainConfig, train

EXAMPLES_MADE = 64
ANSWERS = ("amber", "brook", "cedar", "delta")
TEXTS = ("what is it", "which one is there", "it is on the left", "they are alike")


def pictures() -> list:
    rng, rows = np.random.default_rng(0), []
    for number in range(EXAMPLES_MADE):
        grid = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        encoded = io.BytesIO()
        grid.resize((48, 48), Image.Resampling.NEAREST).save(encoded, "PNG")
        rows.append({
            "image_id": f"i{number}", "dataset": "grids", "key": str(number), "source": "human", "captions": [],
            "status": "success", "image": {"bytes": encoded.getvalue(), "path": None},
        })  # fmt: skip
    return [IMAGES.table(rows)]


def examples(task: str):
    """Each picture's own answer, drawn; or labels that only the order of two pictures tells."""
    rng, rows = np.random.default_rng(1), []
    for number in range(EXAMPLES_MADE):
        row = {"dataset": "grids", "task": task, "split": "train", "answers": [], "text": TEXTS[number % 2]}
        if task == "vqa":
            row |= {
                "image_ids": [f"i{number}"],
                "answers": [{"answer": str(rng.choice(ANSWERS)), "count": 1}],
            }
        else:
            pair = [number // 2 * 2, number // 2 * 2 + 1]
            order = pair if number % 2 else pair[::-1]
            row |= {
                "image_ids": [f"i{n}" for n in order],
                "label": ("false", "true")[number % 2],
                "text": TEXTS[3],
            }
        rows.append({**row, "example_id": f"e{number}", "key": str(number)})
    return EXAMPLES.table(rows)


def blip(tokenizer, seed=0):
    config = preset("blip", "tiny", tokenizer.vocab_size)
    return build(dataclasses.replace(config, text=dataclasses.replace(config.text, depth=2)), seed)


@pytest.mark.parametrize(("task", "steps"), [("vqa", 160), ("nlvr", 120)])
def test_64_examples_are_learned_by_heart(task, steps):
    corpus = from_examples([(examples(task), 1.0)], pictures(), task, size=48)
    assert len(corpus) == EXAMPLES_MADE
    tokenizer = Tokenizer.train([*TEXTS, *ANSWERS] * 3, vocab_size=200)
    make = vqa_from_blip if task == "vqa" else nlvr_from_blip
    model = make(blip(tokenizer), drop_path=0.0)
    module = VqaTraining(model) if task == "vqa" else ClassifierTraining(model)
    options = {"batch_size": 16, "steps": steps, "max_text_tokens": 12}
    result = train(
        module,
        lambda start: task_batches(corpus, tokenizer, start_step=start, **options),
        TrainConfig(steps=steps, learning_rate=1e-3, warmup_steps=5, log_every=10),
        examples=EXAMPLES_MADE,
    )
    assert result.exposures.tolist() == [steps // 4] * EXAMPLES_MADE
    assert result.skipped_steps == 0
    (whole,) = task_batches(corpus, tokenizer, EXAMPLES_MADE, steps=1, max_text_tokens=12)
    module.eval()
    with torch.no_grad():
        assert float(module.losses(whole)["accuracy"]) >= 0.95
        if task == "nlvr":
            likely = model.judge(whole.ids, whole.mask, whole.pixels).argmax(dim=1) == 1
            assert (likely == whole.label.bool()).float().mean() >= 0.95
            turned = model.judge(whole.ids, whole.mask, whole.pixels.flip(1)).argmax(dim=1) == 1
            assert (turned == whole.label.bool()).float().mean() <= 0.05, (
                "the order of the pictures is all there is"
            )
        else:
            ids, mask = tokenizer.encode(ANSWERS)
            best, _ = rank_answers(model, whole.ids, whole.mask, whole.pixels, ids, mask)
            given = [corpus.answers[row][0][0] for row in whole.example.tolist()]
            right = [ANSWERS[place] == answer for place, answer in zip(best.tolist(), given, strict=True)]
            assert np.mean(right) >= 0.95


@pytest.mark.parametrize("task", ["vqa", "nlvr"])
def test_a_resumed_run_is_the_run(tmp_path, task):
    corpus = from_examples([(examples(task), 1.0)], pictures(), task, size=48)
    tokenizer = Tokenizer.train([*TEXTS, *ANSWERS] * 3, vocab_size=200)
    make = vqa_from_blip if task == "vqa" else nlvr_from_blip
    objective = VqaTraining if task == "vqa" else ClassifierTraining
    feed = partial(from_step, corpus, tokenizer)
    weights = []
    for stops in (False, True):
        module = objective(make(blip(tokenizer)))
        state = tmp_path / f"{stops}.safetensors"
        config = TrainConfig(steps=6, warmup_steps=2, save_every=3)
        if stops:
            with pytest.raises(InterruptedError):
                train(module, feed, config, on_step=stop_after_4, state_path=state)
            module = objective(make(blip(tokenizer, seed=9)))
        train(module, feed, config, state_path=state)
        weights.append(module.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def from_step(corpus, tokenizer, start):
    return task_batches(corpus, tokenizer, 8, steps=6, start_step=start, max_text_tokens=12, swap=0.5)


def stop_after_4(step, _):
    if step == 4:
        raise InterruptedError
