"""Catches a typo in a recipe or in --set that is swallowed, and a recipe that runs other steps than it was asked to."""

from __future__ import annotations

import dataclasses
import importlib
import json
import threading

import pytest
import yaml

from capfilt import recipe as recipes
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import Summary
from capfilt.resources import list_recipes
from capfilt.stages.registry import stage_command
from capfilt.tables.workspace import Workspace
from tests import limits
from tests.refusals import names, refused
from tests.worlds import image_rows, tiny_checkpoint, write_images


def write(path, **changes):
    content = {
        "version": 1,
        "inputs": {"part": {"help": "an images part"}, "tokens": {"help": "how long", "default": 5}},
        "stages": [
            {
                "stage": "caption",
                "options": {"images": "${part}", "max_new_tokens": "${tokens}", "prompt": ""},
            },
            {"stage": "score", "options": {"images": "${part}", "captions": "captioner"}},
            {
                "stage": "select",
                "options": {"images": "${part}", "captions": ["captioner"], "threshold": 0.0},
            },
        ],
        **changes,
    }
    path.write_text(yaml.safe_dump(content))
    return str(path)


def resolved(path, *settings):
    return recipes.resolve(recipes.load_recipe(path)[1], settings)


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_that_comes_along_resolves(name):
    _, content = recipes.load_recipe(name)
    given = [f"{key}=x" for key, item in content.inputs.items() if item.default is None]
    steps = recipes.resolve(content, given)
    assert len(steps) == len(content.stages)
    assert content.description
    shown = yaml.safe_load(recipes.show(content, given))
    assert [step["stage"] for step in shown["stages"]] == [step.stage for step, _ in steps]


def test_what_is_shown_needs_no_inputs_and_names_those_that_are_open(tmp_path):
    path = write(tmp_path / "r.yaml")
    _, content = recipes.load_recipe(path)
    shown = yaml.safe_load(recipes.show(content, ["caption.seed=3"]))["stages"]
    assert [step["options"]["images"] for step in shown] == ["${part}"] * 3
    assert (shown[0]["options"]["seed"], shown[0]["options"]["top_p"]) == (3, 0.9)
    given = yaml.safe_load(recipes.show(content, ["part=web"]))["stages"]
    assert {step["options"]["images"] for step in given} == {"web"}


def test_what_is_shown_is_a_recipe(tmp_path):
    """Catches a resolved recipe that cannot be run: it used inputs that it did not declare."""
    path = write(tmp_path / "r.yaml")
    for given, later in ((["caption.seed=3"], ["part=web"]), (["caption.seed=3", "part=web"], [])):
        shown = tmp_path / "shown.yaml"
        shown.write_text(recipes.show(recipes.load_recipe(path)[1], given))
        assert resolved(str(shown), *later) != resolved(path, "part=web")  # the labels are written out
        assert [options for _, options in resolved(str(shown), *later)] == [
            options for _, options in resolved(path, "part=web", "caption.seed=3")
        ]


def test_inputs_and_settings_reach_the_options_with_their_types(tmp_path):
    path = write(tmp_path / "r.yaml")
    steps = resolved(path, "part=web", "caption.top-p=0.5", "select.sources=[web]", "score.captions=[a, b]")
    options = {step.label: options for step, options in steps}
    assert options["caption"].max_new_tokens == 5
    assert options["caption"].top_p == 0.5
    assert options["score"].captions == ("a", "b")
    assert options["select"].sources == ("web",)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, [], "--set part=VALUE"),
        ({}, ["part=web", "parts=x"], "parts 'part'"),
        ({}, ["part=web", "captoin.seed=1"], "step captoin caption"),
        ({}, ["part=web", "caption.sed=1"], "option sed seed"),
        ({}, ["part=web", "caption.seed=many"], "option seed many"),
        ({}, ["part=web", "seed"], "NAME=VALUE"),
        ({"version": 2}, [], "version"),
        ({"stage": []}, [], "stage"),
        ({"stages": [{"stage": "captoin"}]}, [], "stage captoin"),
        ({"stages": [{"stage": "caption", "option": {}}]}, [], "stages.0.option"),
        ({"stages": [{"stage": "caption"}]}, [], "option images"),
        ({"stages": [{"stage": "caption"}, {"stage": "caption"}]}, [], "two steps caption"),
        ({"stages": [{"stage": "caption", "options": {"images": "${nothing}"}}]}, [], "${nothing}"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path, change, settings, message):
    path = write(tmp_path / "r.yaml", **change)
    with refused(message):
        resolved(path, *settings)


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: [")
    with refused("r.yaml YAML"):
        recipes.load_recipe(str(path))


def test_only_and_from(tmp_path):
    steps = resolved(write(tmp_path / "r.yaml"), "part=web")
    assert [step.label for step, _ in recipes.chosen_steps(steps, start="score")] == ["score", "select"]
    assert [step.label for step, _ in recipes.chosen_steps(steps, only=["score"])] == ["score"]
    with refused("step", "scor"):
        recipes.chosen_steps(steps, start="scor")


def test_a_run_skips_what_is_done_and_a_dry_run_writes_nothing(tmp_path):
    place = Workspace(tmp_path / "ws")
    write_images(place.part("images", "web"), [image_rows("web", 4), image_rows("web", 3, start=10)])
    tiny_checkpoint(place.model("captioner"), seed=1)
    tiny_checkpoint(place.model("filter"), seed=2)
    steps = resolved(write(tmp_path / "r.yaml"), "part=web")
    before = sorted(place.path.rglob("*"))
    lines = list(recipes.dry_run(steps, place))
    assert sorted(place.path.rglob("*")) == before
    assert "to do: 2 of 2 shards, 7 rows" in lines[0]
    assert "waits for an earlier step" in lines[1]

    done = [summary for _, summary in recipes.run_recipe("r", steps, place, "inline", quiet=True)]
    assert [summary.stage for summary in done] == ["caption", "score", "select", "select-pairs"]
    record = json.loads((place.path / "runs" / "recipes" / "r.json").read_bytes())
    assert record["caption"]["rows_in"] == record["caption"]["kept"] == 7
    assert record["select"]["rows_in"] == 14
    assert all("done" in line for line in recipes.dry_run(steps, place))
    again = [summary for _, summary in recipes.run_recipe("r", steps, place, "inline", quiet=True)]
    assert [summary.done_now for summary in again] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [("select.keep_fraction=3", "--keep-fraction 3"), ("score.precision=fp12", "fp12")],
)
def test_a_wrong_value_of_a_later_step_is_found_before_anything_is_done(tmp_path, setting, message):
    """Catches `waits for an earlier step (--keep-fraction 3.0: ...)`, and a run that finds it out hours later."""
    place = Workspace(tmp_path / "ws")
    write_images(place.part("images", "web"), [image_rows("web", 4)])
    tiny_checkpoint(place.model("captioner"), seed=1)
    tiny_checkpoint(place.model("filter"), seed=2)
    path = write(tmp_path / "r.yaml")
    with refused(message):
        list(recipes.dry_run(resolved(path, "part=web", setting), place))
    with refused(message):
        next(iter(recipes.run_recipe("r", resolved(path, "part=web", setting), place, "inline", quiet=True)))
    assert not place.part("captions", "captioner").exists


@pytest.mark.parametrize("option", ["batch_size=0", "preset=huge", "precision=fp12", "schedule=none"])
def test_a_training_tells_of_its_options_before_it_misses_its_inputs(tmp_path, option):
    """Catches a wrong option of a training step that a dry run hides behind a part that is still to be made."""
    stages = [
        {"stage": "subset", "options": {"images": "web", "dataset": "human"}},
        {"stage": "pretrain", "options": {"human": ["human"], "steps": 5}},
    ]
    place = Workspace(tmp_path / "ws")
    write_images(place.part("images", "web"), [image_rows("web", 4)])
    path = write(tmp_path / "r.yaml", stages=stages, inputs={})
    assert "waits for an earlier step" in list(recipes.dry_run(resolved(path), place))[1]
    with refused(option.split("=")[1]):
        list(recipes.dry_run(resolved(path, f"pretrain.{option}"), place))


class Threads(InlineExecutor):
    """Runs steps together, and lets none go on before all have begun."""

    def __init__(self):
        self.stopped = False

    def share(self, ways):
        self.meeting = threading.Barrier(ways, timeout=60)
        return self

    def stop(self):
        self.stopped = True
        self.meeting.abort()

    def shards(self, stage, mark, todo):
        self.meeting.wait()
        return super().shards(stage, mark, todo)


def two_captions(tmp_path, second="captioner"):
    place = Workspace(tmp_path / "ws")
    write_images(place.part("images", "web"), [image_rows("web", 3)])
    tiny_checkpoint(place.model("captioner"), seed=1)
    same = {"images": "web", "prompt": "", "max_new_tokens": 3}
    stages = [
        {"stage": "caption", "name": "a", "together": "captions", "options": {**same, "out": "a"}},
        {"stage": "caption", "name": "b", "together": "captions", "options": {**same, "out": "b", "captioner": second}},
    ]  # fmt: skip
    return place, resolved(write(tmp_path / "r.yaml", stages=stages, inputs={}))


def test_steps_that_belong_together_run_at_the_same_time(tmp_path):
    place, steps = two_captions(tmp_path)
    ended = [step.label for step, _ in recipes.run_recipe("r", steps, place, Threads(), quiet=True)]
    assert sorted(ended) == ["a", "b"]
    assert [place.part("captions", name).rows for name in "ab"] == [3, 3]
    record = json.loads((place.path / "runs" / "recipes" / "r.json").read_bytes())
    assert record.keys() == {"a", "b"}


def test_where_one_of_them_fails_the_others_are_told_to_stop(tmp_path):
    place, steps = two_captions(tmp_path, second="nowhere")
    work = Threads()
    with refused("nowhere"):
        list(recipes.run_recipe("r", steps, place, work, quiet=True))
    assert work.stopped


def test_one_process_runs_them_one_after_the_other(tmp_path):
    place, steps = two_captions(tmp_path)
    ended = [step.label for step, _ in recipes.run_recipe("r", steps, place, "inline", quiet=True)]
    assert ended == ["a", "b"]


PRETRAINING = {
    "schedule": "epoch-decay", "decay_rate": 0.85, "min_lr": 1e-6, "warmup_steps": 3000, "weight_decay": 0.05,
    "decay": "all", "clip_norm": 0.0, "epochs": 20.0, "image_size": 224, "crop_scale": 0.2, "flip": True,
    "randaugment": 2, "randaugment_level": 5.0, "queue_size": 57600, "momentum": 0.995, "alpha": 0.4,
    "alpha_ramp_epochs": 2.0, "max_text_tokens": 30, "label_smoothing": 0.1, "multi_positive": False,
}  # fmt: skip
FINETUNING = {
    "schedule": "epoch-cosine", "min_lr": 0.0, "weight_decay": 0.05, "decay": "all", "clip_norm": 0.0,
    "image_size": 384, "batch_size": 256, "crop_scale": 0.5, "flip": True, "randaugment": 2,
}  # fmt: skip
BASE = {
    "preset": "base",
    "learning_rate": 3e-4,
    "batch_size": 2880,
    "momentum_batch_size": 2880,
    "micro_batch": 90,
}
LARGE = {
    "preset": "large",
    "learning_rate": 2e-4,
    "batch_size": 2400,
    "momentum_batch_size": 2400,
    "micro_batch": 75,
}
CAPTIONER = {**FINETUNING, "epochs": 5.0, "max_text_tokens": 40, "prompt": "a picture of "}
FILTER = {
    **FINETUNING,
    "epochs": 6.0,
    "max_text_tokens": 35,
    "alpha_ramp_epochs": 1.0,
    "multi_positive": True,
}
VQA = {
    **FINETUNING, "image_size": 480, "learning_rate": 2e-5, "epochs": 10.0, "max_text_tokens": 35, "max_words": 50,
    "drop_path": 0.1, "label_smoothing": 0.1, "splits": ("train", "val"), "answer_weight": ("vg=0.2",),
}  # fmt: skip
NLVR2 = {
    **FINETUNING, "learning_rate": 3e-5, "epochs": 15.0, "max_words": 40, "drop_path": 0.1, "swap": 0.5,
    "splits": ("train",),
}  # fmt: skip
VQA_CLOSED = {
    "closed": True, "min_answers": 9, "epochs": 10.0, "batch_size": 256, "splits": ("train", "val"), "image_size": 480,
    "max_text_tokens": 40, "warmup_steps": 2500,
}  # fmt: skip
SNLI_VE = {
    **FINETUNING, "learning_rate": 2e-5, "min_lr": 1e-6, "epochs": 5.0, "weight_decay": 0.02, "decay": "matrices",
    "max_words": 30, "randaugment_level": 7.0, "splits": ("train",),
}  # fmt: skip

CLIP_B_32 = {
    "preset": "base", "batch_size": 32768, "epochs": 32.0, "contrast": "softmax", "learning_rate": 5e-4,
    "min_lr": 0.0, "warmup_steps": 2000, "schedule": "cosine", "weight_decay": 0.2, "decay": "matrices", "beta2": 0.98,
    "max_text_tokens": 77, "clip_norm": 0.0, "randaugment": 0, "flip": False,
}  # fmt: skip
ALBEF = {
    "schedule": "cosine", "min_lr": 1e-5, "warmup_steps": 2000, "weight_decay": 0.02, "decay": "matrices",
    "clip_norm": 0.0, "epochs": 30.0, "image_size": 256, "crop_scale": 0.2, "flip": True, "randaugment": 2,
    "randaugment_level": 7.0, "queue_size": 65536, "momentum": 0.995, "momentum_batch_size": 512, "alpha": 0.4,
    "alpha_ramp_epochs": 1.0, "max_text_tokens": 26, "multi_positive": False, "global_negatives": False,
    "learning_rate": 1e-4, "batch_size": 512, "micro_batch": 64,
}  # fmt: skip
ALBEF_FINETUNED = {
    "schedule": "epoch-cosine", "min_lr": 1e-6, "weight_decay": 0.02, "decay": "matrices", "clip_norm": 0.0,
    "image_size": 384, "crop_scale": 0.5, "flip": True, "randaugment": 2, "randaugment_level": 7.0, "momentum": 0.995,
    "alpha": 0.4,
}  # fmt: skip
ALBEF_ASSIGNED = {
    "schedule": "epoch-cosine", "min_lr": 1e-5, "weight_decay": 0.02, "decay": "matrices", "image_size": 256,
    "batch_size": 512, "micro_batch": 64, "stream": True, "epochs": 1.0, "learning_rate": 2e-5, "crop_scale": 0.2,
}  # fmt: skip
ALBEF_TASK = {**ALBEF_FINETUNED, "learning_rate": 2e-5, "drop_path": 0.0, "max_words": 30}
VILT = {
    "learning_rate": 1e-4, "min_lr": 0.0, "schedule": "linear", "weight_decay": 0.01, "decay": "matrices", "beta2": 0.98,
    "clip_norm": 0.0, "image_size": 384,
}  # fmt: skip
VILT_4M = {
    **VILT, "batch_size": 4096, "micro_batch": 64, "steps": 200000, "warmup_steps": 20000,
    "max_text_tokens": 40, "mask_share": 0.15, "alignment": 0.1, "max_patches": 200, "augment": False,
}  # fmt: skip
VILT_FINETUNING = {
    **VILT,
    "epochs": 10.0,
    "randaugment": 2,
    "randaugment_level": 9.0,
    "crop_scale": 1.0,
    "flip": False,
}
VILT_VQA = {
    **VILT_FINETUNING, "batch_size": 256, "head_rate": 10.0, "closed": True, "min_answers": 9, "splits": ("train", "val"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "label", "published"),
    [
        ("albef-4m", "retrain-albef", {**ALBEF, "web": ("cc3m", "sbu")}),
        ("albef-14m", "retrain-albef", {**ALBEF, "web": ("cc3m", "sbu", "cc12m")}),
        (
            "albef-finetune-retrieval",
            "finetune-filter",
            {
                **ALBEF_FINETUNED,
                "learning_rate": 1e-5,
                "batch_size": 256,
                "micro_batch": 32,
                "epochs": 5.0,
                "alpha_ramp_epochs": 1.0,
            },
        ),
        ("albef-finetune-retrieval", "evaluate", {"rerank": 256, "split": "test"}),
        (
            "albef-finetune-vqa",
            "finetune-vqa",
            {
                **ALBEF_TASK,
                "epochs": 8.0,
                "answer_weight": ("vg=0.5",),
                "label_smoothing": 0.0,
                "max_text_tokens": 26,
            },
        ),
        (
            "albef-finetune-snli-ve",
            "finetune-entailment",
            {**ALBEF_TASK, "epochs": 5.0, "alpha_ramp_epochs": 0.0},
        ),
        ("albef-finetune-nlvr2", "finetune-text-assignment", ALBEF_ASSIGNED),
        (
            "albef-finetune-nlvr2",
            "finetune-nlvr",
            {**ALBEF_TASK, "epochs": 10.0, "batch_size": 128, "swap": 0.0, "init": "albef-text-assignment"},
        ),
        ("blip-base-14m", "pretrain", {**PRETRAINING, **BASE}),
        ("blip-base-14m", "retrain-blip", {**PRETRAINING, **BASE}),
        ("blip-base-129m", "pretrain", {**PRETRAINING, **BASE}),
        ("blip-large-129m", "retrain-blip", {**PRETRAINING, **LARGE}),
        ("blip-base-14m", "finetune-captioner", {**CAPTIONER, "learning_rate": 1e-5}),
        ("blip-large-129m", "finetune-captioner", {**CAPTIONER, "learning_rate": 2e-6}),
        ("blip-base-14m", "finetune-filter", {**FILTER, "learning_rate": 1e-5, "micro_batch": 0}),
        ("blip-large-129m", "finetune-filter", {**FILTER, "learning_rate": 5e-6, "micro_batch": 0}),
        (
            "blip-finetune-caption",
            "finetune-captioner",
            {**CAPTIONER, "micro_batch": 32, "learning_rate": 1e-5},
        ),
        ("blip-finetune-retrieval", "finetune-filter", {**FILTER, "learning_rate": 1e-5}),
        ("blip-finetune-retrieval", "evaluate", {"rerank": 256, "split": "test"}),
        ("blip-finetune-caption", "evaluate", {"num_beams": 3, "max_new_tokens": 16, "method": "beam"}),
        ("blip-finetune-vqa", "finetune-vqa", VQA),
        ("blip-finetune-nlvr2", "finetune-nlvr", NLVR2),
        ("blip-finetune-vqa-closed", "finetune-vqa", VQA_CLOSED),
        ("blip-finetune-snli-ve", "finetune-entailment", SNLI_VE),
        ("clip-b-32", "retrain-clip", CLIP_B_32),
        ("vilt-4m", "retrain-vilt", VILT_4M),
        ("vilt-finetune-vqa", "finetune-vqa", VILT_VQA),
        (
            "vilt-finetune-retrieval",
            "finetune-filter",
            {**VILT_FINETUNING, "batch_size": 256, "max_text_tokens": 40},
        ),
        (
            "vilt-finetune-nlvr2",
            "finetune-nlvr",
            {**VILT_FINETUNING, "batch_size": 128, "head_rate": 1.0, "swap": 0.0},
        ),
        ("blip-base-14m", "select-cc12m", {"threshold": 0.5, "by": "itm_score"}),
        ("blip-base-14m", "caption-cc12m", {"method": "nucleus", "top_p": 0.9, "samples": 1}),
    ],
)
def test_the_published_recipes_have_the_published_numbers(name, label, published):
    """A default that changed under a recipe which relied on it, or a merge key that took another's number along."""
    _, content = recipes.load_recipe(name)
    given = [f"{key}=x" for key, item in content.inputs.items() if item.default is None]
    options = vars({step.label: options for step, options in recipes.resolve(content, given)}[label])
    assert {key: options[key] for key in published} == published


PUBLISHED = [name for name in list_recipes() if name.startswith(("blip-", "clip-", "vilt-", "albef-"))]


@pytest.mark.parametrize(
    ("name", "gpus"),
    [
        *((name, 8) for name in PUBLISHED),
        *(
            (name, 32)
            for name in ("blip-base-14m", "blip-base-129m", "blip-large-129m", "clip-b-32", "vilt-4m")
        ),
    ],
)
def test_published_recipes_keep_every_gpu_busy(name, gpus):
    """A week on 8 GPUs, or 32, most of which are idle, since parts of the batch are too few for all of them."""
    _, content = recipes.load_recipe(name)
    given = [f"{key}=x" for key, item in content.inputs.items() if item.default is None]
    for step, options in recipes.resolve(content, given):
        if hasattr(options, "micro_batch"):
            module, _, kind = stage_command(step.stage).classes(options)[0].partition(":")
            stage = object.__new__(
                getattr(importlib.import_module(module), kind)
            )  # without the parts that it reads
            stage.options = options
            assert stage.ranks(gpus) == gpus, step.label


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_part_a_published_recipe_reads_is_made_by_it_or_named_in_it(name):
    """A step that scores a captions part which no step writes, found out after a week of pretraining."""
    _, content = recipes.load_recipe(name)
    given = [f"{key}=x" for key, item in content.inputs.items() if item.default is None]
    made = {"captions": set(), "scores": set(), "pairs": set(), "model": {"retrained", "albef-14m"}}
    writes = {"caption": "captions", "score": "scores", "select": "pairs"}
    for step, options in recipes.resolve(content, given):
        for field in dataclasses.fields(options):
            kind, value = field.metadata["kind"], getattr(options, field.name)
            if kind in made and value:
                names = {value} if isinstance(value, str) else set(value)
                assert names <= made[kind], (step.label, field.name)
        made[writes.get(step.stage, "model")].add(options.out)


@pytest.mark.parametrize("name", ["../x", "_x", "a\x1bb", "x" * 201])
def test_a_step_whose_output_has_no_name_ends_a_recipe_before_its_first(tmp_path, name):
    """Would catch: hours of work before the last step finds that its output cannot be called so."""
    place = Workspace(tmp_path / "ws")
    write_images(place.part("images", "web"), [image_rows("web", 4)])
    stages = [
        {"stage": "duplicates", "options": {"images": "web"}},
        {"stage": "subset", "options": {"images": "not-yet", "dataset": name}},
    ]
    steps = resolved(write(tmp_path / "r.yaml", stages=stages))
    for run in (recipes.run_recipe("r", steps, place, InlineExecutor()), recipes.dry_run(steps, place)):
        with refused("no name"):
            list(run)
    assert place.parts("signals") == []


@pytest.mark.parametrize("value", ["a\0b", ["web", "a\0"]])
def test_an_option_with_a_nul_is_refused(tmp_path, value):
    """Would catch: `ValueError: embedded null byte` from the middle of a run."""
    path = write(
        tmp_path / "r.yaml", stages=[{"stage": "score", "options": {"images": "w", "captions": value}}]
    )
    with refused("captions NUL"):
        resolved(path)


def bombs():
    """name -> the text of a recipe that is small, and would keep a parser busy or fill the memory."""
    step = "version: 1\nstages:\n- stage: caption\n  options:\n    images: web\n"
    layers = [f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)]
    merged = [
        f"- stage: caption\n  name: s{n}\n  options: &o{n} {{<<: [{','.join([f'*o{n - 1}'] * 9)}]}}\n"
        for n in range(1, 9)
    ]
    return {
        "aliases": f"version: 1\nstages: []\na: &a [x, x, x]\n{''.join(layers)}",
        "merges": f"version: 1\nstages:\n- stage: caption\n  options: &o0 {{images: x}}\n{''.join(merged)}",
        "itself": "version: 1\nstages: &a\n- *a\n",
        "nested list": "[" * 20_000,
        "nested map": step + "    prompt: " + "{a: " * 10_000,
        "large": "a: b\n" * 100_000,
        "digits": step + f"    seed: {'9' * 50_000}\n",
        "hexadecimal": step + f"    seed: 0x{'f' * 50_000}\n",
        "sexagesimal": step + f"    seed: 1{':1' * 40_000}\n",
        "float": step + f"    top_p: 0.{'9' * 50_000}\n",
        "version": f"version: {'9' * 5_000}\nstages: []\n",
        "65 bits": step + f"    seed: {2**65}\n",
        "no date": step + "    prompt: 2001-99-99\n",
        "NUL": step + '    prompt: "a\\0b"\n',
        "inputs": "version: 1\ninputs:\n  a: {help: x, default: " + "y" * 40_000 + "}\n"
        + "stages:\n- stage: caption\n  options: {images: '" + "${a}" * 10_000 + "'}\n",
        "utf-16": step.encode("utf-16"),
        "utf-32": step.encode("utf-32"),
        "latin-1": (step + "    prompt: caf\u00e9\n").encode("latin-1"),
        "control": step + "    prompt: \x01\n",
    }  # fmt: skip


def test_a_recipe_that_explodes_is_refused_in_one_line(tmp_path):
    """Catches aliases of aliases, nesting, numbers of many digits and other encodings: minutes, gigabytes or a traceback."""
    paths = {name: tmp_path / f"{name.replace(' ', '-')}.yaml" for name in bombs()}
    for name, text in bombs().items():
        paths[name].write_bytes(text if isinstance(text, bytes) else text.encode())
    code = "from capfilt import recipe\ndef read(path): recipe.show(recipe.load_recipe(path)[1], [])"
    told = dict(zip(paths, limits.refused(code, [*map(str, paths.values())]), strict=True))
    for name in ("aliases", "merges"):
        assert names(told[name], "aliases 10,000")
    for name in ("utf-16", "utf-32", "latin-1"):
        assert names(told[name], "UTF-8")
    assert all(
        ".yaml" in words or "step 'caption'" in words or "inputs" in words for words in told.values()
    ), told


@pytest.mark.parametrize("value", ["[", "9" * 5000, "2001-99-99", "[" * 5000, "&a [*a]", "*a"])
def test_a_setting_is_read_as_warily_as_a_recipe(tmp_path, value):
    with refused():
        resolved(write(tmp_path / "r.yaml"), f"part={value}")


def test_a_date_among_the_options_is_no_traceback(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "version: 1\ninputs: {a: {help: x}}\nstages:\n- {stage: caption, options: {images: 2001-01-01}}\n"
    )
    with refused("option images"):
        recipes.resolve(recipes.load_recipe(str(path))[1], [])


@pytest.mark.parametrize(
    "value", ["!!timestamp 99-99", "!!timestamp x", "!!float a", "!!binary ü", "!!int x"]
)
def test_a_value_that_is_not_of_its_tag_is_refused_in_one_line(tmp_path, value):
    """PyYAML's own error of a date that is none ended capfilt with a traceback."""
    path = tmp_path / "r.yaml"
    path.write_text(f"version: {value}\nstages: []\n")
    with refused("r.yaml"):
        recipes.load_recipe(str(path))


@pytest.mark.parametrize(
    ("command", "stage", "title"),
    [(f"retrain-{family}", "retrain", "mine") for family in ("albef", "blip", "clip", "vilt")]
    + [("score", "score", "mine"), ("select", "select", "mine"), ("select", "select-pairs", "mine-pairs")],
)
def test_an_account_is_filed_under_the_label_of_its_step(command, stage, title):
    """Would catch: the account of `retrain-blip` filed as "mineretrain", for its stage is called retrain."""
    assert recipes.title(recipes.Step(stage=command, name="mine"), Summary(stage, "out", 0.0)) == title
