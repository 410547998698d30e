"""Would catch: a task that reads another's examples or another split, a figure without its interval, protocol or baseline, a
model asked for what it cannot do ending in a traceback, and a result of other prompts or examples passed off as done."""

from __future__ import annotations

import json

import pytest
import torch

from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_stage
from capfilt.inference.adapters import opened
from capfilt.models import checkpoint
from capfilt.models.blip.tasks import nlvr_from_blip, vqa_from_blip
from capfilt.stages.evaluate import EvaluateOptions
from capfilt.stages.evaluate.stage import Evaluate, _Result
from capfilt.tables.contracts import EXAMPLES
from capfilt.tables.manifest import Counts
from capfilt.tasks.comparison import read_result
from capfilt.tasks.outcome import Outcome, units
from capfilt.tasks.registry import TASKS
from tests.refusals import failed, refused
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


def test_own_captions_are_no_part_of_ratings(made):
    """Would catch: captions that evaluate does not ask the images part for, and so cannot leave out."""
    rows = [row for table in made.part("examples", "all").tables() for row in table.to_pylist()]
    rows = [row for row in rows if row["task"] == "rating" and row["split"] == "test"]
    images = [row for table in made.part("images", "human").tables() for row in table.to_pylist()]
    (own,) = (row["captions"][0] for row in images if [row["image_id"]] == rows[0]["image_ids"])
    rows[0]["text"] = own.upper()
    rows[1]["category"] = "own_caption"
    part = made.part("examples", "rated")
    part.commit(
        0, EXAMPLES.table(rows), Counts(len(rows), len(rows)), part.begin(EXAMPLES, "examples", {}), 0.0
    )
    stage = evaluate(made, model="both", examples=("rated",), tasks=("rating",), out="rated")
    run(stage)
    told = json.loads(stage.output.read_bytes())["tasks"]["rating"]
    assert told["counts"]["examples"] == len(rows) - 2
    assert told["left_out"] == {"own_caption": 2}
    assert stage.identity()["protocols"] == {"rating": 2}
    other = evaluate(made, model="both", examples=("all",), tasks=("match",), out="other")
    assert "protocols" not in other.identity()


def test_few_shots_learn_from_the_training_split_alone(made):
    with refused("--tasks few-shot", "--split", "train"):
        run(evaluate(made, model="both", examples=("all",), tasks=("few-shot",), split="train", out="f"))
    with refused("few-shot", "red"):
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
        ("captioner", "retrieval", "BLIP) generates captioning, few-shot"),
        ("filter", "captioning", "generates"),
        ("vqa", "captioning", "BLIP questions) embeds answers"),
        ("nlvr", "zero-shot", "BLIP statements) embeds classifies"),
    ],
)
def test_a_model_is_told_what_it_can_do(made, kind, task, line):
    if not made.model(kind).exists():
        model, tokenizer, _ = checkpoint.load(made.model("both"))
        change = {"vqa": vqa_from_blip, "nlvr": nlvr_from_blip}.get(kind, lambda model: model.halved(kind))
        checkpoint.save(made.model(kind), change(model), tokenizer)
    with refused(f"--tasks {task}", line):
        run(evaluate(made, model=kind, examples=("all",), tasks=(task,), out=f"{kind}-{task}"))


def test_half_a_model_does_its_half(made):
    model, tokenizer, _ = checkpoint.load(made.model("both"))
    checkpoint.save(made.model("writes"), model.halved("captioner"), tokenizer)
    stage = evaluate(made, model="writes", examples=("all",), tasks=("captioning", "few-shot"), out="half")
    run(stage)
    assert {"cider", "probe@1"} <= set(json.loads(stage.output.read_bytes())["metrics"])


def test_what_a_limit_and_faults_leave_out_is_told(made):
    rows = image_rows("lossy", 6, source="human", start=60, texts=2, split="test")
    rows[5] = {**rows[5], "image": {"bytes": b"broken", "path": None}}
    write_images(made.part("images", "lossy"), [rows])
    options = {"images": "lossy", "model": "both", "tasks": ("retrieval",)}
    for limit, lost in ((0, {}), (2, {"limit": 3})):
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
    with failed("finite"):
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
        ({"tasks": ("vision",)}, "--tasks vision"),
        ({"tasks": ("few-shot",)}, "--tasks few-shot --examples"),
        ({"split": "dev"}, "--split dev"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"precision": "fp8"}, "--precision fp8"),
        ({"examples": ("human",), "tasks": ("match",)}, "examples/human"),
        ({"tasks": ("zero-shot",), "examples": ("all",), "templates": "none.txt"}, "--templates none.txt"),
        ({"tasks": ("few-shot",), "examples": ("all",), "shots": "1,x"}, "--shots 1,x"),
        ({"caption_scorer": "me", "tasks": ("captioning",)}, "--caption-scorer me"),
        ({"tasks": ("rating",), "examples": ("all",), "split": "val"}, "--tasks rating val"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(made, options, message):
    with refused(message):
        run(evaluate(made, **{"model": "both", "out": "never", **options}))


def of_kind(place, name):
    """The directory of a tiny model of a kind, and the tasks it can do with pictures, captions and examples of `made`."""
    from capfilt.data.bpe import BpeTokenizer
    from capfilt.models import build, preset
    from tests.worlds import tiny_vilt

    path = place.model(name)
    if path.exists():
        return name
    _, tokenizer, _ = checkpoint.load(place.model("both"))
    if name == "vilt":
        tiny_vilt(path)
    elif name == "albef":
        checkpoint.save(path, build(preset("albef", "tiny", tokenizer.vocab_size), seed=0), tokenizer)
    elif name == "clip":
        bpe = BpeTokenizer.train(["a red square"] * 3, 600)
        checkpoint.save(path, build(preset("clip", "tiny", bpe.vocab_size), seed=0), bpe)
    elif name in ("captioner", "filter"):
        model, _, _ = checkpoint.load(place.model("both"))
        checkpoint.save(path, model.halved(name), tokenizer)
    return name


@pytest.mark.parametrize(
    ("kind", "examples", "done", "left_out"),
    [
        ("clip", (), ["retrieval"], {"captioning": "needs a model that generates text; CLIP embeds"}),
        ("vilt", (), ["retrieval"], {"captioning": "ViLT matches pairs"}),
        ("albef", (), ["retrieval"], {"zero-shot": r"name examples to evaluate on (--examples)"}),
        ("captioner", (), ["captioning"], {"retrieval": "BLIP embeds images and generates text"}),
        ("filter", (), ["retrieval"], {"captioning": "generates text", "rating": "--examples"}),
        ("both", (), ["retrieval", "captioning"], {"vqa": "needs a model that answers questions"}),
        ("clip", ("all",), ["retrieval", "zero-shot", "few-shot", "match", "rating", "choice"], {}),
        ("both", ("redless",), [*EVERY[:3], *EVERY[4:]], {"few-shot": "no examples to learn 'red' from"}),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_without_tasks_all_that_is_possible_is_done_and_the_rest_is_said(
    made, kind, examples, done, left_out
):
    """Would catch: a default that only a whole BLIP can do, which failed for a CLIP, a ViLT, an ALBEF and half a BLIP;
    a task that is left out without a word."""
    if examples == ("redless",):
        _without_red(made)
    stage = evaluate(
        made,
        model=of_kind(made, kind),
        examples=examples,
        out=f"default-{kind}-{'-'.join(examples)}",
        limit=8,
    )
    for summary in (run(stage), run(stage)):
        result = json.loads(stage.output.read_bytes())
        assert list(result["tasks"]) == done
        assert {*done} | {*result["unsuited"]} == {task.name for task in TASKS}
        said = "\n".join(summary.lines())
        for task, why in left_out.items():
            assert why in result["unsuited"][task]
            assert why in next(line for line in said.split("\n") if "left out" in line and task in line)
    assert summary.done_before == 1


def test_without_tasks_the_result_is_that_of_the_tasks_named(made):
    """Would catch: a default of which results that stand are no longer results."""
    named = evaluate(made, model="both", tasks=("retrieval", "captioning"), out="n")
    assert evaluate(made, model="both", out="n").fingerprint() == named.fingerprint()


def test_images_without_texts_leave_nothing_to_do(made):
    silent = [{**row, "captions": []} for row in image_rows("silent", 3, split="val")]
    write_images(made.part("images", "silent"), [silent])
    with refused("images/silent", "retrieval, captioning", "split val"):
        evaluate(made, model="both", images="silent", split="val", out="never")


@pytest.mark.parametrize("tasks", [("retrieval",), ("captioning",), ("choice",), ("zero-shot",)])
def test_a_limit_reads_the_shards_it_needs(made, monkeypatch, tasks):
    """Would catch: a look at eight images for which every picture of the part is read and decoded."""
    from capfilt.tables.shards import Part

    rows = image_rows("shards", 12, source="human", start=80, split="test")
    part = made.part("images", "shards")
    if not part.exists:
        write_images(part, [rows[:4], rows[4:8], rows[8:]])
        examples = made.part("examples", "shards")
        mark = examples.begin(EXAMPLES, "examples", {})
        found = []
        for n, row in enumerate(rows[:3]):
            wrong = {"text": "a square", "wrong_texts": ["a dot"], "category": "x"}
            found.append(example("choice", n, row["image_id"], "test", **wrong))
            found.append(example("classification", n, row["image_id"], "test", label=f"c{n % 2}"))
        examples.commit(0, EXAMPLES.table(found), Counts(len(found), len(found)), mark, 0.0)
    opened_, whole = [], Part._opened

    def noting(self, shard, columns):
        if self.name == "shards" and columns and "image" in columns:
            opened_.append(shard)
        return whole(self, shard, columns)

    monkeypatch.setattr(Part, "_opened", noting)
    stage = evaluate(
        made, images="shards", model="both", examples=("shards",), tasks=tasks, out=f"few-{tasks[0]}", limit=3
    )
    run(stage)
    assert opened_ == [0]
    if tasks[0] in ("retrieval", "captioning"):
        assert json.loads(stage.output.read_bytes())["tasks"][tasks[0]]["left_out"] == {"limit": 9}
