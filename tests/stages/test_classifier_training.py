"""Catches: a closed list made of validation answers, a classifier that forgets its classes or starts from nothing, targets
of another question, a model that cannot be evaluated on what it was finetuned for, or is on what it was not.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from capfilt.data.task_corpus import task_batches
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_command, run_stage
from capfilt.models import checkpoint
from capfilt.models.blip.tasks import BlipClassifier
from capfilt.models.common.ranks import ALONE
from capfilt.models.vilt.tasks import ViltClassifier
from capfilt.stages.evaluate import EvaluateOptions
from capfilt.stages.evaluate.stage import Evaluate
from capfilt.stages.registry import stage_command
from capfilt.stages.task_training import FinetuneClosedVqa, FinetuneVqa
from capfilt.tables.workspace import Workspace
from tests.refusals import refused
from tests.stages.test_task_training import FAST, colour, ingest
from tests.worlds import image_rows, tiny_checkpoint, tiny_vilt, write_images

LABELS = ("contradiction", "neutral", "entailment")


@pytest.fixture
def place(tmp_path):
    """24 pictures of four colours, questions, hypotheses and statements about them, an untrained BLIP."""
    place = Workspace(tmp_path / "ws")
    write_images(place.part("images", "pictures"), [image_rows("pictures", 24)])
    about = [
        {"identifier": f"{n}-0", "image": f"{n:05d}", "split": "val" if n >= 16 else "train"}
        for n in range(24)
    ]
    ingest(place, "asked", [
        {**row, "question": "a square number", "answers": [colour(n)] * 6 + ["the square"] * 4 if n < 23 else ["odd"]}
        for n, row in enumerate(about)
    ])  # fmt: skip
    ingest(
        place,
        "hypotheses",
        [
            {**row, "hypothesis": f"a {colour(n)} square", "label": LABELS[n % 3]}
            for n, row in enumerate(about)
        ],
    )
    ingest(
        place,
        "statements",
        [{**row, "sentence": f"a {colour(n)} square", "label": bool(n % 2)} for n, row in enumerate(about)],
    )
    ingest(place, "coloured", [{**row, "label": colour(n)} for n, row in enumerate(about)])
    tiny_checkpoint(place.model("pretrained"), seed=3)
    return place


KINDS = {
    "finetune-vqa": ("asked", {"closed": True, "min_answers": 4}, "vqa"),
    "finetune-entailment": ("hypotheses", {}, "entailment"),
    "finetune-nlvr": ("statements", {"single": True}, "nlvr"),
    "finetune-classification": ("coloured", {}, "classification"),
}


def finetune(place, name, **options):
    part, own, _ = KINDS[name]
    command = stage_command(name)
    made = command.options(**{**FAST, "examples": (part,), "out": "made", **own, **options})
    (path,) = command.classes(made)
    assert path.startswith("capfilt.stages.task_training:")
    return run_stage(command.build(path, made, place), InlineExecutor(), quiet=True)


def evaluate(place, task, part, **options):
    made = EvaluateOptions(
        **{"model": "made", "images": "pictures", "examples": (part,), "tasks": (task,), "split": "val",
           "resamples": 20, "out": f"{task}-result", **options}
    )  # fmt: skip
    run_stage(Evaluate(made, place), InlineExecutor(), quiet=True)
    return json.loads((place.path / "runs" / f"{made.out}.json").read_text())


@pytest.mark.parametrize(("start", "kind"), [("pretrained", BlipClassifier), ("vilt", ViltClassifier)])
@pytest.mark.parametrize("name", KINDS)
def test_it_is_trained_judged_and_evaluated(place, name, start, kind):
    part, _, task = KINDS[name]
    tiny_vilt(place.model("vilt"), seed=3)
    figures = finetune(place, name, init=start).figures
    assert (figures["steps"], figures["examples"], figures["val_examples"]) == (2, 16, 8)
    contents, meta = checkpoint.open_any(place.model("made"))
    assert type(contents.model) is kind
    assert contents.model.config.task == task
    assert meta["extra"]["stage"] == name
    assert finetune(place, name, init=start).done_before == 1
    result = evaluate(place, task, part)
    metric = {"vqa": "vqa_closed_exact", "classification": "classification_top1"}.get(
        task, f"{task}_accuracy"
    )
    assert 0 <= result["metrics"][metric] <= 100
    assert result["tasks"][task]["counts"]["examples"] == 8
    if task != "vqa":
        # The stage's own look at val and the evaluation must agree: same pictures, same texts, same classes.
        assert result["metrics"][metric] == pytest.approx(100 * figures["val_accuracy"], abs=1e-3)


def test_the_closed_list_is_that_of_training_and_val_is_judged_whole(place):
    finetune(place, "finetune-vqa")
    model = checkpoint.open_any(place.model("made"))[0].model
    assert sorted(model.config.classes) == sorted({colour(n) for n in range(4)})  # "odd" is val's alone
    options = stage_command("finetune-vqa").options(**FAST, examples=("asked",), closed=True, min_answers=4)
    stage = FinetuneClosedVqa(options, place)
    whole = stage.source._corpus(48, ("val",), model=model)
    assert len(whole) == 8
    assert [len(each) for each in whole.targets].count(0) == 1
    corpus = stage.source._corpus(48, ("train",))
    assert len(corpus) == 16
    tokenizer = checkpoint.open_any(place.model("pretrained"))[0].tokenizer
    (batch,) = task_batches(corpus, tokenizer, 16, epochs=1, max_text_tokens=30)
    for row, example in enumerate(batch.example.tolist()):
        number = int(corpus.image_ids.index(corpus.image_ids[int(batch.image_index[row])]))
        wanted = torch.zeros(4)
        wanted[corpus.classes.index(corpus.answers[example][0][0])] = 1.0  # six of ten
        assert torch.equal(batch.targets[row], wanted), number
    with refused("--min-answers"):
        finetune(place, "finetune-vqa", min_answers=9, out="none")
    with refused("--answer-weight", "--closed"):
        finetune(place, "finetune-vqa", answer_weight=("asked=0.5",), out="none")
    with refused("--softmax", "--closed"):
        FinetuneVqa(dataclasses.replace(options, closed=False, softmax=True), place)
    assert stage.module(model, tokenizer, ALONE).softmax is False
    competing = FinetuneClosedVqa(dataclasses.replace(options, softmax=True), place)
    assert competing.module(model, tokenizer, ALONE).softmax is True


@pytest.mark.parametrize("start", ["pretrained", "vilt"])
def test_it_goes_on_from_its_own_and_takes_a_new_head_for_other_classes(place, start):
    still = {"steps": 1, "learning_rate": 1e-12, "min_lr": 0.0, "validate": 0}
    tiny_vilt(place.model("vilt"), seed=3)
    finetune(place, "finetune-entailment", out="a", init=start, **still)
    finetune(place, "finetune-entailment", out="b", init="a", seed=5, **still)
    finetune(place, "finetune-nlvr", out="c", init="a", **still)
    a, b, c = (checkpoint.open_any(place.model(out))[0].model.state_dict() for out in "abc")
    assert all(torch.allclose(b[name], a[name], atol=1e-6) for name in a)
    assert [name for name in c if name.startswith("cls_head.")] == [
        name for name in a if name.startswith("cls_head.")
    ]
    assert c[max(name for name in c if name.startswith("cls_head."))].shape[0] == 2
    inner = [name for name in a if not name.startswith("cls_head.")]
    assert all(torch.allclose(c[name], a[name], atol=1e-6) for name in inner)
    command = stage_command("finetune-vqa")
    made = command.options(**FAST, examples=("asked",), init="a", out="d")
    with refused("BLIP for questions", "ALBEF for questions"):
        command.build(command.classes(made)[0], made, place)


def test_classes_are_learned_and_those_of_training_are_all_it_has(place):
    figures = finetune(
        place, "finetune-classification", steps=40, batch_size=16, learning_rate=3e-3, drop_path=0.0
    ).figures
    assert figures["val_accuracy"] == 1.0
    model = checkpoint.open_any(place.model("made"))[0].model
    assert model.labels == tuple(sorted({colour(n) for n in range(24)}))
    assert model.text_encoder is None
    result = evaluate(place, "classification", "coloured")
    assert result["metrics"] == {"classification_top1": 100.0}
    ingest(place, "odd", [{"identifier": "0-9", "image": "00000", "split": "val", "label": "taupe"},
                          {"identifier": "1-9", "image": "00001", "split": "val", "label": colour(1)}])  # fmt: skip
    assert evaluate(place, "classification", "odd", out="odd")["metrics"]["classification_top1"] == 50.0
    ingest(place, "other", [{"identifier": "0-9", "image": "00000", "split": "val", "label": "taupe"}])
    with refused("--tasks classification", "classes"):
        evaluate(place, "classification", "other", out="other")
    with refused("classifier", "text"):
        finetune(place, "finetune-entailment", init="made", out="next")


def test_what_it_was_not_finetuned_for_is_one_line(place):
    finetune(place, "finetune-entailment")
    with refused("--tasks nlvr", "3 classes"):
        evaluate(place, "nlvr", "statements")
    with refused("--tasks vqa", "answers"):
        evaluate(place, "vqa", "asked")


def test_open_answers_are_written_and_ranked_from_the_checkpoints_own_list(place):
    command = stage_command("finetune-vqa")
    made = command.options(**FAST, examples=("asked",), min_answers=4, out="open")
    list(run_command(command, made, place, "inline", quiet=True))
    listed = place.model("open") / "answers.json"
    assert sorted(json.loads(listed.read_text())) == sorted({colour(n) for n in range(4)})
    result = evaluate(place, "vqa", "asked", model="open", answer_list=str(listed), num_beams=2)
    assert set(result["metrics"]) == {"vqa_written_exact", "vqa_ranked_exact"}
    told = result["tasks"]["vqa"]["details"]["answers"]["vqa_ranked_exact"]
    assert set(told.values()) <= {colour(n) for n in range(4)}
    listed.write_text('["red", "odd"]')
    with refused("result", "--out"):
        evaluate(place, "vqa", "asked", model="open", answer_list=str(listed), num_beams=2)
