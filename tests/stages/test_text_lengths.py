"""Catches a model that is evaluated on texts of another length than it was trained on: position embeddings that never had a
gradient, or words that training never cut.
"""

from __future__ import annotations

import dataclasses
import re
from importlib.util import find_spec

import pytest
import torch

from capfilt.data.tokenizer import Tokenizer
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_stage
from capfilt.inference.adapters import opened
from capfilt.models import build, checkpoint, preset
from capfilt.models.albef.model import without_end
from capfilt.stages import training
from capfilt.stages.task_options import FinetuneEntailmentOptions, FinetuneNlvrOptions, FinetuneVqaOptions
from capfilt.stages.task_training import FinetuneEntailment, FinetuneNlvr, FinetuneVqa
from capfilt.stages.train import FinetuneFilter, FinetuneTextAssignment, Pretrain, Retrain
from capfilt.stages.training_options import (
    FinetuneFilterOptions,
    FinetuneTextAssignmentOptions,
    PretrainOptions,
    Retrain_albef,
    Retrain_clip,
    Retrain_vilt,
)
from capfilt.tables.workspace import Workspace
from tests.refusals import refused
from tests.stages.test_task_training import ingest
from tests.worlds import image_rows, tiny_checkpoint, tiny_vilt, write_images

LONG = "a red green blue white square number 0 1 2 3 4 " * 8  # 96 words
COMMON = {"steps": 1, "batch_size": 4, "augment": False, "out": "made", "ranks": 1}
NEW = {"human": ("human",), "preset": "tiny", **COMMON}
TASK = {"images": ("human",), "drop_path": 0.0, **COMMON}
EITHER = ({"max_text_tokens": 33, "max_words": 28}, {"max_text_tokens": 21, "max_words": 28})
"""Words decide, tokens decide; neither number is a default of anything."""
STARTS = {"blip": tiny_checkpoint, "vilt": tiny_vilt}
CASES = {
    "pretrain": lambda **given: (Pretrain, PretrainOptions(**NEW, vocab_size=200, **given)),
    "clip": lambda **given: (Retrain, Retrain_clip(**NEW, vocab_size=540, **given)),
    "vilt": lambda **given: (Retrain, Retrain_vilt(**NEW, vocab_size=200, **given)),
    "albef": lambda **given: (Retrain, Retrain_albef(**NEW, vocab_size=200, **given)),
    "filter": lambda **given: (FinetuneFilter, FinetuneFilterOptions(human=("human",), **COMMON, **given)),
    "assignment": lambda **given: (
        FinetuneTextAssignment,
        FinetuneTextAssignmentOptions(init="pretrained", human=("human",), **COMMON, **given),
    ),
    "vqa": lambda **given: (FinetuneVqa, FinetuneVqaOptions(examples=("asked",), **TASK, **given)),
    "nlvr": lambda **given: (FinetuneNlvr, FinetuneNlvrOptions(examples=("pairs",), **TASK, **given)),
    "entailment": lambda **given: (
        FinetuneEntailment,
        FinetuneEntailmentOptions(examples=("hypotheses",), **TASK, **given),
    ),
}
CHOSEN = [
    *(("blip", name) for name in ("pretrain", "filter", "vqa", "nlvr", "entailment")),
    ("blip", "clip"),
    *(("vilt", name) for name in ("vilt", "filter", "nlvr", "entailment")),
    *(("albef", name) for name in ("albef", "filter", "vqa", "nlvr", "entailment", "assignment")),
]


def tiny_albef(directory, seed: int = 0) -> None:
    tokenizer = Tokenizer.train(["a red green blue white square number 0 1 2 3 4"] * 3, 200)
    config = preset("albef", "tiny", tokenizer.vocab_size)
    vision = dataclasses.replace(config.vision, width=32, depth=1, heads=2, hidden=64)
    text = dataclasses.replace(config.text, width=32, depth=2, heads=2, hidden=64)
    checkpoint.save(directory, build(dataclasses.replace(config, vision=vision, text=text), seed), tokenizer)


@pytest.fixture
def place(tmp_path):
    """Pictures with one long text, a question, a statement and a hypothesis as long."""
    place = Workspace(tmp_path / "ws")
    rows = [{**row, "captions": [LONG]} for row in image_rows("human", 8, source="human")]
    write_images(place.part("images", "human"), [rows])
    told = [{"image": f"{n:05d}", "split": "train", "identifier": f"train-{n}-0-0"} for n in range(8)]
    asked = [{**row, "question": LONG, "question_id": n, "answers": ["red"]} for n, row in enumerate(told)]
    ingest(place, "asked", asked, images="human")
    hypotheses = [{**row, "hypothesis": LONG, "label": "neutral"} for row in told]
    ingest(place, "hypotheses", hypotheses, images="human")
    pairs = [
        {"identifier": row["identifier"], "images": [row["image"], "00000"], "sentence": LONG, "label": True}
        for row in told[1:]
    ]
    ingest(place, "pairs", pairs, images="human")
    return place


@pytest.mark.parametrize("longest", EITHER, ids=("words", "tokens"))
@pytest.mark.parametrize(("start", "name"), CHOSEN)
def test_texts_are_evaluated_as_long_as_they_were_trained_on(place, monkeypatch, start, name, longest):
    {**STARTS, "albef": tiny_albef}[start](place.model("pretrained"), seed=3)
    seen = []
    kept = training.train

    def watched(module, *args, **options):
        losses = module.losses

        def noted(batch, *rest):
            seen.append(batch)
            return losses(batch, *rest)

        module.losses = noted
        return kept(module, *args, **options)

    monkeypatch.setattr(training, "train", watched)
    stage, options = CASES[name](**longest)
    run_stage(stage(options, place), InlineExecutor(), quiet=True)
    contents, _ = checkpoint.open_any(place.model("made"))
    model = opened(contents).model
    ids, mask = seen[-1].ids, seen[-1].mask
    assert ids.shape[1] == min(longest["max_text_tokens"], longest["max_words"] + 2)
    if hasattr(model._model, "taken"):
        ids, mask = without_end(ids, mask)
    found = model._encode(seen[-1].texts)
    assert torch.equal(found[0], ids)
    assert torch.equal(found[1], mask)


HOW = [
    ("blip", "pretrain", "blip"), ("blip", "filter", "blip"), ("blip", "vqa", "blip-questions"), ("blip", "entailment", "blip"),
    ("blip", "clip", "clip" if find_spec("ftfy") else "clip-unrepaired"),
    ("blip", "albef", "albef"), ("blip", "vilt", "as-found"),
    ("albef", "filter", "blip"), ("albef", "vqa", "blip-questions"), ("vilt", "filter", "blip"),
]  # fmt: skip


@pytest.mark.parametrize(("start", "name", "expected"), HOW)
def test_a_new_model_cleans_texts_as_its_family_and_a_finetuned_one_as_what_it_started_from(
    place, start, name, expected
):
    """Catches an ALBEF or a ViLT retrained on texts by BLIP's rule, questions that are cleaned as captions are, and a
    checkpoint by an older rule whose texts are cleaned by another when it is finetuned. The ALBEF and the ViLT that are
    started from here remember BLIP's rule.
    """
    {**STARTS, "albef": tiny_albef}[start](place.model("pretrained"), seed=3)
    stage, options = CASES[name]()
    run_stage(stage(options, place), InlineExecutor(), quiet=True)
    made = checkpoint.open_any(place.model("made"))[0]
    assert made.tokenizer.cleaning == expected
    if name in ("vqa", "albef"):
        (ids,) = made.tokenizer.encode_ragged(["is it 0:1 red?"])
        read = "is it 01 red" + ("?" if name == "vqa" else "")
        assert ids == made.tokenizer.cleaned_as("as-found").encode_ragged([read])[0]


def test_a_clip_reads_all_words_and_others_thirty(place):
    long = {"max_text_tokens": 64}
    for stage, options in (CASES["clip"](**long), CASES["pretrain"](**long)):
        made = dataclasses.replace(options, out=stage.__name__)
        run_stage(stage(made, place), InlineExecutor(), quiet=True)
    clip, blip = (checkpoint.open_any(place.model(name))[0] for name in ("Retrain", "Pretrain"))
    assert opened(clip).model._encode([LONG])[0].shape[1] == 64
    assert opened(blip).model._encode([LONG])[0].shape[1] == 32


def test_a_checkpoint_of_before_opens_with_the_published_lengths(tmp_path):
    tiny_vilt(tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    text = re.sub(r',\s*"sealed": "\w+"', "", path.read_text())
    for line in ('    "max_text_tokens": 40,\n', '    "max_words": 0,\n'):
        assert line in text
        text = text.replace(line, "")
    path.write_text(text)
    assert checkpoint.open_any(tmp_path / "old")[0].model.config.reading == {
        "max_length": 40,
        "max_words": 30,
    }


def test_fewer_words_than_none_are_refused(place):
    with refused("--max-words -1"):
        CASES["pretrain"](max_words=-1)
