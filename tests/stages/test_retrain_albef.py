"""Catches an ALBEF that is retrained on other pairs than a BLIP, is no checkpoint that can be opened, continued, finetuned and
evaluated, or whose options are not heard."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch

from capfilt.data.rows import EXAMPLE_ROWS, PAIR_ROWS
from capfilt.data.tokenizer import Tokenizer
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_command, run_stage
from capfilt.models import FAMILIES, build, checkpoint, kinds, preset
from capfilt.models.albef.model import Albef
from capfilt.models.albef.tasks import AlbefClassifier, AlbefNlvr, AlbefVqa, vqa_from_albef
from capfilt.stages.caption import CaptionOptions
from capfilt.stages.caption.stage import CaptionStage
from capfilt.stages.evaluate import EvaluateOptions
from capfilt.stages.evaluate.stage import Evaluate
from capfilt.stages.registry import stage_command
from capfilt.stages.train import FinetuneCaptioner, FinetuneFilter, Retrain
from capfilt.stages.training_options import FinetuneCaptionerOptions, FinetuneFilterOptions, Retrain_albef
from tests.refusals import refused
from tests.stages.test_classifier_training import LABELS
from tests.stages.test_task_training import FAST as TASK
from tests.stages.test_task_training import colour, ingest
from tests.worlds import image_rows, write_images

FAST = Retrain_albef(human=("human",), web=("web",), steps=4, batch_size=4, preset="tiny", vocab_size=200, augment=False,
    queue_size=16, save_every=1, out="albef",
)  # fmt: skip


@pytest.fixture
def place(workspace):
    rows = [
        *image_rows("human", 6, source="human", texts=2, split="train"),
        *image_rows("human", 4, source="human", start=10, texts=3, split="test"),
    ]
    write_images(workspace.part("images", "human"), [rows])
    return workspace


@pytest.fixture
def pretrained(place):
    """An untrained ALBEF, smaller than any preset."""
    tokenizer = Tokenizer.train(["a red green blue white square number 0 1 2 3 4 the left"] * 3, 200)
    config = preset("albef", "tiny", tokenizer.vocab_size)
    vision = dataclasses.replace(config.vision, width=32, depth=1, heads=2, hidden=64)
    text = dataclasses.replace(config.text, width=32, depth=2, heads=2, hidden=64)
    model = build(dataclasses.replace(config, vision=vision, text=text, embed_dim=16), seed=3)
    checkpoint.save(place.model("pretrained"), model, tokenizer)
    return place


def run(stage):
    return run_stage(stage, InlineExecutor(), quiet=True)


def test_an_albef_is_retrained_and_evaluated_like_a_blip(place):
    (summary,) = run_command(stage_command("retrain-albef"), FAST, place, "inline", quiet=True)
    assert summary.figures["steps"] == 4
    directory = place.model("albef")
    seen = pq.read_table(directory / "exposures.parquet").to_pylist()
    assert sum(row["exposures"] for row in seen) == 16
    assert {row["source"] for row in seen} == {"human", "web"}
    line = json.loads((directory / "log.jsonl").read_text().splitlines()[-1])
    assert {"loss", "itc", "itm", "mlm", "mlm_accuracy", "temperature", "queue_cosine"} <= set(line)
    contents, meta = checkpoint.open_any(directory)
    assert meta["model_type"] == "albef"
    assert isinstance(contents.model, Albef)
    assert contents.tokenizer.vocab_size == contents.model.config.vocab_size
    choice = {"model": "albef", "images": "human", "out": "albef"}
    run(Evaluate(EvaluateOptions(tasks=("retrieval",), rerank=4, **choice), place))
    result = json.loads((place.path / "runs" / "albef.json").read_bytes())
    assert {"tr@1", "itc_tr@1"} <= set(result["metrics"])
    assert "re-ranked by ITM" in result["tasks"]["retrieval"]["protocol"]
    with refused("--tasks captioning", "model"):
        run(Evaluate(EvaluateOptions(tasks=("captioning",), **{**choice, "out": "c"}), place))
    with refused("albef", "embeds"):
        run(CaptionStage(CaptionOptions(images="web", captioner="albef"), place))


def test_it_goes_on_from_a_checkpoint_of_its_class(pretrained):
    further = dataclasses.replace(FAST, init="pretrained", steps=1, learning_rate=1e-9, out="further")
    run(Retrain(further, pretrained))
    old, new = (
        checkpoint.open_any(pretrained.model(name))[0].model.state_dict()
        for name in ("pretrained", "further")
    )
    for name, tensor in old.items():
        torch.testing.assert_close(new[name], tensor, atol=1e-6, rtol=1e-5)
    with refused("captioner", "BLIP", "ALBEF"):
        run(Retrain(dataclasses.replace(FAST, init="captioner", out="x"), pretrained))


def test_retrieval_is_finetuned_from_it_and_captions_are_not(pretrained):
    options = {"init": "pretrained", "human": ("human",), "steps": 2, "batch_size": 4, "augment": False}
    filtering = FinetuneFilterOptions(**options, queue_size=8, out="retrieval")
    figures = run(FinetuneFilter(filtering, pretrained)).figures
    assert {"itc", "itm"} <= set(figures)
    made = checkpoint.open_any(pretrained.model("retrieval"))[0].model
    start = checkpoint.open_any(pretrained.model("pretrained"))[0].model
    assert isinstance(made, Albef)
    assert not torch.equal(made.itm_head.weight, start.itm_head.weight)
    assert torch.equal(made.mlm_head.bias, start.mlm_head.bias)
    with refused("ALBEF", "BLIP"):
        run(FinetuneCaptioner(FinetuneCaptionerOptions(**options, out="x"), pretrained))


def test_a_model_of_other_rows_is_refused_before_any_is_read(pretrained, tmp_path):
    """A classifier that is handed captioned pictures, and an error of shapes or of missing methods an hour later."""
    tokenizer = checkpoint.open_any(pretrained.model("pretrained"))[0].tokenizer
    start = checkpoint.open_any(pretrained.model("pretrained"))[0].model
    answers = vqa_from_albef(start)
    checkpoint.save(pretrained.model("answers"), answers, tokenizer)
    with refused("answers", "finetune-filter", "pairs"):
        FinetuneFilter(FinetuneFilterOptions(init="answers", human=("human",), out="x"), pretrained)
    with refused("answers", "retrain", "pairs"):
        Retrain(dataclasses.replace(FAST, init="answers", out="x"), pretrained)


def test_what_retrain_offers_are_the_models_that_learn_from_pairs():
    assert all(family.kinds[0].rows == (PAIR_ROWS,) for family in FAMILIES)
    assert {kind.rows for kind in kinds() if kind.forms} == {(EXAMPLE_ROWS,)}
    assert all(kind.forms for kind in kinds() if kind.rows == (EXAMPLE_ROWS,))


def finetune(place, words, **options):
    command = stage_command(words)
    made = command.options(**{**TASK, "out": "made", **options})
    (path,) = command.classes(made)
    figures = run(command.build(path, made, place)).figures
    return figures, checkpoint.open_any(place.model("made"))[0].model


@pytest.fixture
def examples(pretrained):
    """Questions, hypotheses and statements about 16 pictures of four colours."""
    write_images(pretrained.part("images", "pictures"), [image_rows("pictures", 16)])
    rows = [
        {"identifier": f"{n}-0", "image": f"{n:05d}", "split": "val" if n >= 12 else "train"}
        for n in range(16)
    ]
    ingest(
        pretrained,
        "asked",
        [{**r, "question": "a square", "answers": [colour(n)]} for n, r in enumerate(rows)],
    )
    ingest(
        pretrained,
        "hypotheses",
        [{**r, "hypothesis": f"a {colour(n)} square", "label": LABELS[n % 3]} for n, r in enumerate(rows)],
    )
    ingest(pretrained, "pairs", [
        {"identifier": f"train-{n}-0-0", "sentence": f"the left {colour(n)}", "label": bool(n % 2),
         "images": [f"{n:05d}", f"{n + 1:05d}"], "split": "val" if n >= 12 else "train"}
        for n in range(15)
    ])  # fmt: skip
    return pretrained


@pytest.mark.parametrize(
    ("words", "part", "task", "model"),
    [
        ("finetune-vqa", "asked", "vqa", AlbefVqa),
        ("finetune-entailment", "hypotheses", "entailment", AlbefClassifier),
        ("finetune-nlvr", "pairs", "nlvr", AlbefNlvr),
    ],
)
def test_it_is_finetuned_for_tasks_with_a_teacher_and_evaluated(examples, words, part, task, model):
    figures, made = finetune(examples, words, examples=(part,), momentum=0.995, alpha_ramp_epochs=0.0)
    assert type(made) is model
    assert figures["steps"] == 2
    assert 0 <= figures["val_accuracy"] <= 1
    options = {"model": "made", "images": "pictures", "examples": (part,), "tasks": (task,), "split": "val"}
    run(Evaluate(EvaluateOptions(**options, resamples=20, out="result"), examples))
    assert any(
        name.startswith(task)
        for name in json.loads((examples.path / "runs" / "result.json").read_bytes())["metrics"]
    )


def test_a_teacher_changes_what_is_learned(examples):
    losses = []
    for momentum in (0.0, 0.5):
        figures, _ = finetune(
            examples, "finetune-entailment", examples=("hypotheses",), momentum=momentum, alpha=0.9,
            alpha_ramp_epochs=0.0, augment=False, validate=0,
        )  # fmt: skip
        losses.append(figures["loss"])
        shutil.rmtree(examples.model("made"))
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    with refused("--momentum", "--closed"):
        finetune(examples, "finetune-vqa", examples=("asked",), closed=True, momentum=0.5)
    with refused("--momentum 1"):
        finetune(examples, "finetune-entailment", examples=("hypotheses",), momentum=1.0)


@pytest.mark.parametrize("stream", [True, False])
def test_text_assignment_comes_before_statements(examples, stream):
    command = stage_command("finetune-text-assignment")
    options = command.options(
        init="pretrained",
        human=("human",),
        web=("web",),
        steps=2,
        batch_size=6,
        augment=stream,
        stream=stream,
        out=f"assigned-{stream}",
    )
    figures = run(command.build(command.classes(options)[0], options, examples)).figures
    assert {"loss", "accuracy"} <= set(figures)
    assigned = checkpoint.open_any(examples.model(options.out))[0].model
    assert isinstance(assigned, AlbefNlvr)
    assert assigned.labels == ("first", "second", "neither")
    # Published at 256 and 384 pixels.
    options_of_nlvr = {"init": options.out, "steps": 1, "learning_rate": 1e-12, "image_size": 64}
    _, made = finetune(examples, "finetune-nlvr", examples=("pairs",), **options_of_nlvr)
    assert made.labels == ("false", "true")
    assert made.config.image_size == 64
    for name, each in assigned.state_dict().items():
        if not name.startswith(("cls_head.", "visual_encoder.pos_embed")):
            torch.testing.assert_close(made.state_dict()[name], each, atol=1e-6, rtol=1e-5, msg=name)
    wrong = dataclasses.replace(options, init="captioner", out="x")
    with refused("captioner", "BLIP", "ALBEF"):
        run(command.build(command.classes(wrong)[0], wrong, examples))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "huge"}, "--preset huge"),
        ({"text_init": "nowhere"}, "--text-init nowhere"),
        ({"batch_size": 1}, "--batch-size 1"),
    ],
)
def test_wrong_options_are_named(place, changes, message):
    with refused(message):
        Retrain(dataclasses.replace(FAST, **changes), place)
