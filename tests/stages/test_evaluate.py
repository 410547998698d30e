"""Would catch: a task that reads another's examples or another split, a figure without its interval, protocol or baseline, a
model asked for what it cannot do ending in a traceback, and a result of other prompts or examples passed off as done."""

from __future__ import annotations

import json

import pytest
import torch

from capfilt.errors import RunError, UserError
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_stage
from capfilt.models import checkpoint
from capfilt.models.interop.contents import halved
from capfilt.models.nlvr import nlvr_from_blip
from capfilt.models.vqa import vqa_from_blip
from capfilt.stages.evaluate import Evaluate, _Result
from capfilt.stages.options import EvaluateOptions
from capfilt.tables.contracts import EXAMPLES
from capfilt.tables.manifest import Counts
from capfilt.tasks.adapters import opened
from capfilt.tasks.comparison import read_result
from capfilt.tasks.outcome import Outcome, units
from capfilt.tasks.registry import TASKS
from tests.worlds import image_rows, write_images


def run(stage):
    return run_stage(stage, InlineExecutor(), quiet=True)


def example(task, number, image, split, **changes):
    row = {
        "example_id": f"{task}{number}{split}", "dataset": "d", "key": str(number), "task": task, "image_ids": [image],
        "text": None, "answers": [], "label": None, "split": split,
    }  # fmt: skip
    return {**row, **changes}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A workspace with a tiny model, pictures of four colours, and examples of every task."""
    from capfilt.tables.workspace import Workspace
    from tests.worlds import tiny_checkpoint

    place = Workspace(tmp_path_factory.mktemp("evaluate"))
    rows = [
        *image_rows("human", 24, source="human", split="train"),
        *image_rows("human", 8, source="human", start=24, texts=2, split="test"),
        *image_rows("human", 4, source="human", start=40, split="val"),
    ]
    write_images(place.part("images", "human"), [rows])
    tiny_checkpoint(place.model("both"))
    examples = []
    for number, row in enumerate(rows):
        image, split, colour = row["image_id"], row["split"], row["captions"][0].split()[1]
        examples.append(example("classification", number, image, split, label=colour))
        label = ("match", "no-match")[number % 2]
        examples.append(example("match", number, image, split, text=f"a {colour} square", label=label))
        if split == "test":
            given = [{"answer": str(1 + number % 4), "count": 2}, {"answer": "3", "count": 1}]
            examples.append(example("rating", number, image, split, text=f"a {colour} thing", answers=given))
            wrong = {"wrong_texts": ["a black circle"], "category": ("add", "swap")[number % 2]}
            examples.append(example("choice", number, image, split, text=f"a {colour} square", **wrong))
    part = place.part("examples", "all")
    mark = part.begin(EXAMPLES, "examples", {})
    part.commit(0, EXAMPLES.table(examples), Counts(len(examples), len(examples)), mark, 0.0)
    return place


FAST = {
    "images": "human",
    "method": "greedy",
    "max_new_tokens": 3,
    "rerank": 3,
    "shots": "1,2",
    "draws": 2,
    "resamples": 50,
}
EVERY = ("retrieval", "captioning", "zero-shot", "few-shot", "match", "rating", "choice")


def evaluate(place, **options):
    return Evaluate(EvaluateOptions(**{**FAST, **options}), place)


def test_a_blip_does_every_task_at_once(made):
    stage = evaluate(made, model="both", examples=("all",), tasks=EVERY, out="every", templates="single")
    summary = run(stage)
    result = json.loads(stage.output.read_bytes())
    assert list(result["tasks"]) == list(EVERY)
    assert result["checkpoint"] == checkpoint.fingerprint(made.model("both"))
    listed = [metric for task in result["tasks"].values() for metric in task["metrics"]]
    assert sorted(listed) == sorted(result["metrics"])
    for name in (
        "tr@1",
        "r_mean",
        "itc_ir@5",
        "cider",
        "bleu@4",
        "zero_shot_top1",
        "probe@2",
        "class_mean@1",
    ):
        low, high = result["intervals"][name]["low"], result["intervals"][name]["high"]
        assert low <= result["metrics"][name] <= high, name
        assert result["intervals"][name]["resamples"] == 50
    for name in (
        "match_auc_itm",
        "match_tuned_itc",
        "tau_c_itm",
        "spearman_itc",
        "choice_itm",
        "choice_itc_swap",
    ):
        assert name in result["intervals"], name
        assert name in result["baselines"], name
    assert result["baselines"]["zero_shot_top1"] == 25.0
    assert result["tasks"]["few-shot"]["counts"] == {
        "images": 8, "examples": 8, "classes": 4, "to learn from": 24
    }  # fmt: skip
    assert result["tasks"]["rating"]["counts"] == {"images": 8, "examples": 8}
    assert result["tasks"]["match"]["left_out"]["task"] > 0
    assert "on 4 other pairs" in result["tasks"]["match"]["protocol"]
    assert (result["images"], result["texts"], len(result["captions"])) == (8, 16, 8)
    assert summary.figures["zero_shot_top1"] == result["metrics"]["zero_shot_top1"]
    read = read_result(stage.output)
    for name in result["units"]:
        assert read.units(name).value() == pytest.approx(result["metrics"][name], abs=1e-3), name
    assert run(stage).done_before == 1


def test_few_shots_learn_from_the_training_split_alone(made):
    with pytest.raises(UserError, match="learns from split 'train', so name another --split"):
        run(evaluate(made, model="both", examples=("all",), tasks=("few-shot",), split="train", out="f"))
    with pytest.raises(UserError, match="no examples to learn 'red' from"):
        run(_without_red(made))


def _without_red(made):
    """The same examples with one class gone from the split that is learned from."""
    rows = [row for table in made.part("examples", "all").tables() for row in table.to_pylist()]
    rows = [row for row in rows if not (row["split"] == "train" and row["label"] == "red")]
    part = made.part("examples", "redless")
    if not part.exists:
        mark = part.begin(EXAMPLES, "examples", {})
        part.commit(0, EXAMPLES.table(rows), Counts(len(rows), len(rows)), mark, 0.0)
    return evaluate(made, model="both", examples=("redless",), tasks=("few-shot",), out="g")


@pytest.mark.parametrize(
    ("kind", "task", "line"),
    [
        (
            "captioner",
            "retrieval",
            "BLIP) embeds images and generates text, which is enough for captioning, few-shot",
        ),
        ("filter", "captioning", "needs a model that generates text"),
        ("vqa", "captioning", "BLIP for questions) embeds images and answers questions"),
        ("nlvr", "zero-shot", "BLIP for statements) embeds images and classifies pairs"),
    ],
)
def test_a_model_is_told_what_it_can_do(made, kind, task, line):
    if not made.model(kind).exists():
        model, tokenizer, _ = checkpoint.load(made.model("both"))
        change = {"vqa": vqa_from_blip, "nlvr": nlvr_from_blip}.get(kind, lambda model: halved(model, kind))
        checkpoint.save(made.model(kind), change(model), tokenizer)
    with pytest.raises(UserError) as caught:
        run(evaluate(made, model=kind, examples=("all",), tasks=(task,), out=f"{kind}-{task}"))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_model_does_its_half(made):
    model, tokenizer, _ = checkpoint.load(made.model("both"))
    checkpoint.save(made.model("writes"), halved(model, "captioner"), tokenizer)
    stage = evaluate(made, model="writes", examples=("all",), tasks=("captioning", "few-shot"), out="half")
    run(stage)
    assert {"cider", "probe@1"} <= set(json.loads(stage.output.read_bytes())["metrics"])


def test_what_a_limit_and_faults_leave_out_is_told(made):
    rows = image_rows("lossy", 6, source="human", start=60, texts=2, split="test")
    rows[5] = {**rows[5], "image": {"bytes": b"broken", "path": None}}
    write_images(made.part("images", "lossy"), [rows])
    options = {"images": "lossy", "model": "both", "tasks": ("retrieval",)}
    for limit, lost in ((0, {}), (2, {"limit": 6})):
        stage = evaluate(made, **options, out=f"lossy{limit}", limit=limit)
        run(stage)
        said = json.loads(stage.output.read_bytes())["tasks"]["retrieval"]
        assert said["left_out"] == {"not_an_image": 1, **lost}
        assert said["protocol"].endswith("; limit = 2") == bool(limit)
    stage = evaluate(made, model="both", examples=("all",), tasks=("choice",), out="limited", limit=3)
    run(stage)
    said = json.loads(stage.output.read_bytes())["tasks"]["choice"]
    assert said["left_out"]["limit"] == 5
    assert said["protocol"].endswith("; limit = 3")


def test_what_has_no_value_is_left_out_with_a_reason(made):
    rows = [row for table in made.part("examples", "all").tables() for row in table.to_pylist()]
    rows = [row for row in rows if row["task"] != "match" or row["label"] == "match" or row["split"] == "val"]
    part = made.part("examples", "matches")
    mark = part.begin(EXAMPLES, "examples", {})
    part.commit(0, EXAMPLES.table(rows), Counts(len(rows), len(rows)), mark, 0.0)
    stage = evaluate(made, model="both", examples=("matches",), tasks=("match",), out="one-sided")
    run(stage)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    result = json.loads(stage.output.read_bytes(), parse_constant=refuse)
    assert set(result["metrics"]) == {"match_accuracy_itm", "match_tuned_itm", "match_tuned_itc"}
    assert set(result["metrics"]) == set(result["units"]) == set(result["tasks"]["match"]["metrics"])
    skipped = result["tasks"]["match"]["details"]["skipped"]
    assert set(skipped) == {"match_auc_itm", "match_auc_itc"}
    assert "all of one class" in skipped["match_auc_itm"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_figure_that_is_no_number_is_in_no_result(value):
    """Catches NaN and Infinity in a result file, which JSON has not and readers trip over."""
    units_ = units("mean", [1.0, 0.0], ["a", "b"])
    outcome = Outcome(
        "p", {"a": value, "b": 50.0}, {"a": units_, "b": units_}, {"images": 2}, {"a": 1.0, "b": value}
    )
    result = _Result(EvaluateOptions(images="x", resamples=10))
    result.add(TASKS[0], outcome, {})
    content = json.loads(json.dumps(result.content(), allow_nan=False))
    assert content["metrics"] == {"b": 50.0}
    assert content["baselines"] == {}
    assert "a" in content["tasks"][TASKS[0].name]["details"]["skipped"]


def test_classes_are_not_told_apart_by_logits_that_are_no_numbers(made):
    """Catches the largest of NaN, which is the first class."""
    contents, _ = checkpoint.open_any(made.model("both"))
    contents.model = nlvr_from_blip(contents.model, seed=0, drop_path=0.0)
    with torch.no_grad():
        contents.model.cls_head[0].weight.fill_(float("nan"))
    model = opened(contents).model
    with pytest.raises(RunError, match="not finite"):
        model.classify(torch.zeros(1, model.pictures, 3, 48, 48, dtype=torch.uint8), ["a"])


def test_other_prompts_and_other_examples_are_other_results(made, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {}.\n")
    options = {"model": "both", "examples": ("all",), "tasks": ("zero-shot",), "templates": str(prompts)}
    first = evaluate(made, **options).fingerprint()
    assert evaluate(made, **options).fingerprint() == first
    prompts.write_text("the {}.\n")
    assert evaluate(made, **options).fingerprint() != first
    assert evaluate(made, **{**options, "examples": ("all", "all")}).fingerprint() != first
    assert evaluate(made, **options, markdown="x.md").fingerprint() == evaluate(made, **options).fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("vision",)}, "--tasks 'vision': choose among retrieval"),
        ({"tasks": ()}, "choose among"),
        ({"tasks": ("few-shot",)}, r"--tasks few-shot: name examples to evaluate on \(--examples\)"),
        ({"split": "dev"}, "--split 'dev': choose train, val, test"),
        ({"batch_size": 0}, "--batch-size 0: give 1 or more"),
        ({"precision": "fp8"}, "--precision 'fp8': choose auto, fp32 or bf16"),
        ({"examples": ("human",), "tasks": ("match",)}, "no such part"),
        ({"tasks": ("zero-shot",), "examples": ("all",), "templates": "none.txt"}, "is none of single, cifar, imagenet"),
        ({"tasks": ("few-shot",), "examples": ("all",), "shots": "1,x"}, "--shots '1,x': write numbers"),
        ({"caption_scorer": "me", "tasks": ("captioning",)}, "--caption-scorer 'me': choose capfilt, pycocoevalcap"),
        ({"tasks": ("rating",), "examples": ("all",), "split": "val"}, "no examples of the task rating in split 'val'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(made, options, message):
    with pytest.raises(UserError, match=message):
        run(evaluate(made, **{"model": "both", "out": "never", **options}))
