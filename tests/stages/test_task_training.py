"""Catches: a finetuning that trains on validation examples, forgets what a part's answers weigh, starts from scratch where it
was told to start from a checkpoint, cannot be continued, or gives several processes another run than one.
"""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch

from capfilt.data.task_corpus import task_batches
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_stage
from capfilt.models import checkpoint
from capfilt.models.blip.tasks import BlipNlvr, BlipVqa
from capfilt.models.vilt.tasks import ViltClassifier
from capfilt.stages.examples import ExamplesOptions
from capfilt.stages.examples.stage import Examples
from capfilt.stages.task_options import FinetuneNlvrOptions, FinetuneVqaOptions
from capfilt.stages.task_training import FinetuneNlvr, FinetuneVqa
from capfilt.tables.ids import file_sha256
from capfilt.tables.workspace import Workspace
from tests.refusals import refused
from tests.worlds import COLOURS, image_rows, tiny_checkpoint, tiny_vilt, write_images

NAMES = list(COLOURS)
FAST = {"steps": 2, "batch_size": 4, "images": ("pictures",), "save_every": 1, "drop_path": 0.0, "ranks": 1}


def colour(number: int) -> str:
    return NAMES[number % len(NAMES)]


def ingest(place, name: str, records: list[dict], images: str = "pictures") -> None:
    path = place.path / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    options = ExamplesOptions(source_path=str(path), dataset=name, images=(images,))
    run_stage(Examples(options, place), InlineExecutor(), quiet=True)


@pytest.fixture
def place(tmp_path):
    """24 pictures of four colours, questions about them in two parts, statements about pairs, an untrained BLIP."""
    place = Workspace(tmp_path / "ws")
    write_images(place.part("images", "pictures"), [image_rows("pictures", 24)])
    asked = {"question": "a square number", "split": "train"}
    ingest(place, "asked", [
        {**asked, "question_id": n, "image": f"{n:05d}", "answers": [colour(n)], "split": "val" if n >= 16 else "train"}
        for n in range(24)
    ])  # fmt: skip
    ingest(
        place,
        "more",
        [{**asked, "question_id": n, "image": f"{n:05d}", "answers": ["red", "blue"]} for n in range(4)],
    )
    ingest(place, "pairs", [
        {
            "identifier": f"train-{n}-0-0", "sentence": f"the left square {colour(n)}", "label": bool(n % 2),
            "images": [f"{n:05d}", f"{n + 1:05d}"], "split": "val" if n >= 16 else "train",
        }
        for n in range(23)
    ])  # fmt: skip
    tiny_checkpoint(place.model("pretrained"), seed=3)
    return place


def finetune(place, kind, **options):
    stage, made = (FinetuneVqa, FinetuneVqaOptions) if kind == "vqa" else (FinetuneNlvr, FinetuneNlvrOptions)
    parts = ("asked",) if kind == "vqa" else ("pairs",)
    return run_stage(
        stage(made(**{**FAST, "examples": parts, **options}), place), InlineExecutor(), quiet=True
    )


def test_a_vilt_learns_statements_about_pairs_and_goes_on_from_its_own(place):
    tiny_vilt(place.model("start"))
    still = {"steps": 1, "learning_rate": 1e-12, "min_lr": 0.0}
    figures = finetune(place, "nlvr", init="start", **still).figures
    assert (figures["examples"], figures["val_examples"]) == (16, 7)
    first, made = (checkpoint.open_any(place.model(name))[0].model for name in ("start", "nlvr"))
    assert isinstance(made, ViltClassifier)
    assert (made.pictures, made.labels) == (2, ("false", "true"))
    types = first.state_dict()["modality"]
    torch.testing.assert_close(made.modality.detach(), types[[0, 1, 1]], atol=1e-6, rtol=0)
    finetune(place, "nlvr", init="nlvr", out="again", **still)
    again = checkpoint.open_any(place.model("again"))[0].model.state_dict()
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("kind", "model"), [("vqa", BlipVqa), ("nlvr", BlipNlvr)])
def test_training_examples_are_seen_and_validation_examples_judged(place, kind, model):
    figures = finetune(place, kind).figures
    assert figures["steps"] == 2
    assert figures["examples"] == 16
    assert figures["val_examples"] == (8 if kind == "vqa" else 7)
    assert 0 <= figures["val_accuracy"] <= 1
    assert figures["val_loss"] > 0
    directory = place.model(kind)
    seen = pq.read_table(directory / "exposures.parquet").to_pylist()
    assert sum(row["exposures"] for row in seen) == 8
    assert len(seen) == len({row["example_id"] for row in seen}) == 16
    contents, meta = checkpoint.open_any(directory)
    assert type(contents.model) is model
    assert meta["extra"]["figures"]["left_out"] == {"split": 8 if kind == "vqa" else 7}
    assert meta["extra"]["stage"] == f"finetune-{kind}"
    assert not list(directory.glob("state*"))
    assert finetune(place, kind).done_before == 1
    # What the last log line says is what the summary shows.
    assert (
        json.loads((directory / "log.jsonl").read_text().splitlines()[-1])["accuracy"] == figures["accuracy"]
    )


def test_validation_by_hand(place):
    found = finetune(place, "nlvr", validate=5).figures
    stage = FinetuneNlvr(FinetuneNlvrOptions(**{**FAST, "examples": ("pairs",)}), place)
    contents, _ = checkpoint.open_any(place.model("nlvr"))
    corpus = stage.source._corpus(48, ("val",), 5)
    assert found["val_examples"] == len(corpus) == 5
    (batch,) = task_batches(corpus, contents.tokenizer, 5, epochs=1, max_text_tokens=30)
    with torch.no_grad():
        likely = contents.model.judge(batch.ids, batch.mask, batch.pixels).softmax(1)[:, 1]
    right = ((likely > 0.5).long() == batch.label).float()
    loss = -torch.where(batch.label == 1, likely, 1 - likely).log().mean()
    assert found["val_accuracy"] == pytest.approx(float(right.mean()), abs=1e-6)
    assert found["val_loss"] == pytest.approx(float(loss), rel=1e-4)


def test_nothing_that_is_trained_on_is_judged(place):
    assert not any(name.startswith("val") for name in finetune(place, "vqa", splits=("train", "val")).figures)
    assert not any(name.startswith("val") for name in finetune(place, "vqa", out="b", validate=0).figures)


def test_a_parts_answers_weigh_what_they_are_told_to(place):
    losses = {}
    for weight in ((), ("more=0.5",), ("more=0.25",)):
        options = {
            "augment": False,
            "steps": 1,
            "validate": 0,
            "out": f"w{len(losses)}",
            "label_smoothing": 0.0,
        }
        losses[weight] = finetune(place, "vqa", examples=("more",), answer_weight=weight, **options).figures[
            "loss"
        ]
    whole, half, quarter = losses.values()
    assert half == pytest.approx(whole / 2, rel=0.1)
    assert quarter == pytest.approx(half / 2, rel=1e-5)
    for wrong in ("more", "other=1", "more=0", "more=x"):
        with refused("--answer-weight"):
            finetune(place, "vqa", examples=("more",), answer_weight=(wrong,))


@pytest.mark.parametrize("kind", ["vqa", "nlvr"])
def test_it_starts_from_its_checkpoint_and_goes_on_from_its_own(place, kind):
    tiny_checkpoint(place.model("other"), seed=4)
    still = {"steps": 1, "learning_rate": 1e-12, "min_lr": 0.0, "validate": 0}
    finetune(place, kind, out="a", **still)
    finetune(place, kind, out="b", init="other", **still)
    finetune(place, kind, out="c", init="a", **still)
    name = "text_encoder.encoder.layer.0.attention.self.query.weight"
    weights = {
        out: checkpoint.open_any(place.model(out))[0].model.state_dict()
        for out in ("pretrained", "other", "a", "b", "c")
    }
    for out, start in (("a", "pretrained"), ("b", "other")):
        assert torch.allclose(weights[out][name], weights[start][name], atol=1e-6)
    assert not torch.allclose(weights["a"][name], weights["b"][name], atol=1e-3)
    assert all(torch.allclose(weights["c"][key], weights["a"][key], atol=1e-6) for key in weights["a"])
    other = "nlvr" if kind == "vqa" else "vqa"
    with refused("--init a", "BLIP"):
        finetune(place, other, out="d", init="a")
    with refused("--image-size 32"):
        finetune(place, kind, out="d", init="a", image_size=32)


@pytest.mark.parametrize(
    ("kind", "how"), [("vqa", {"randaugment": 2}), ("nlvr", {}), ("nlvr", {"randaugment": 2})]
)
def test_an_interrupted_run_ends_as_the_whole_one(place, kind, how, monkeypatch):
    finetune(place, kind, out="whole", steps=4, **how)
    stage, made = (FinetuneVqa, FinetuneVqaOptions) if kind == "vqa" else (FinetuneNlvr, FinetuneNlvrOptions)
    parts = ("asked",) if kind == "vqa" else ("pairs",)
    options = made(**{**FAST, "examples": parts, "out": "cut", "steps": 4, **how})

    def stop(step, *_):
        if step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        stage(options, place).run(stop)
    assert (place.model("cut") / "state.safetensors").exists()
    finetune(place, kind, out="cut", steps=4, **how)
    digests = {file_sha256(place.model(out) / "model.safetensors") for out in ("whole", "cut")}
    assert len(digests) == 1


# Each starts two processes, which takes most of a minute on a busy machine: one of each kind is enough every time.
@pytest.mark.parametrize(
    ("kind", "shard"),
    [
        ("vqa", False),
        ("nlvr", True),
        pytest.param("vqa", True, marks=pytest.mark.slow),
        pytest.param("nlvr", False, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_take_the_steps_of_one(place, kind, shard):
    how = {"augment": False, "steps": 3, "accumulate": 2, "save_every": 0, "precision": "fp32"}
    weights, lines = [], []
    for out, ranks in (("one", {}), ("two", {"ranks": 2, "shard": shard})):
        assert finetune(place, kind, out=out, **how, **ranks).figures["examples"] == 16
        directory = place.model(out)
        weights.append(checkpoint.open_any(directory)[0].model.state_dict())
        lines.append(json.loads((directory / "log.jsonl").read_text().splitlines()[-1]))
    for name in ("loss", "accuracy"):
        assert lines[1][name] == pytest.approx(lines[0][name], rel=2e-5)
    for name, tensor in weights[0].items():
        if not name.endswith(("qkv.bias", "key.bias")):  # whose gradients are rounding
            assert torch.allclose(weights[1][name], tensor, atol=2e-4), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": ()}, "examples"),
        ({"images": ()}, "images"),
        ({"swap": 2.0}, "--swap"),
        ({"splits": ("dev",)}, "--splits dev"),
        ({"drop_path": 1.0}, "--drop-path"),
        ({"examples": ("asked",)}, "examples nlvr"),
        ({"examples": ("pairs", "asked")}, "examples/asked nlvr"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"accumulate": 8}, "--accumulate 8"),
    ],
)
def test_wrong_options_are_named(place, options, message):
    with refused(message):
        finetune(place, "nlvr", **options)
