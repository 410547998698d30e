"""Catches a typo in a recipe or in --set that is swallowed, and a recipe that runs other steps than it was asked to."""

from __future__ import annotations

import json
import threading

import pytest
import yaml

from capfilt import recipe as recipes
from capfilt.errors import UserError
from capfilt.execution.inline import InlineExecutor
from capfilt.resources import list_recipes
from capfilt.tables.workspace import Workspace
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
        ({}, [], r"needs --set part=VALUE: an images part"),
        ({}, ["part=web", "parts=x"], r"no such input; did you mean 'part'"),
        ({}, ["part=web", "captoin.seed=1"], r"no step 'captoin'; did you mean 'caption'"),
        ({}, ["part=web", "caption.sed=1"], r"no option 'sed'; did you mean 'seed'"),
        ({}, ["part=web", "caption.seed=many"], r"option seed: Input should be a valid integer.*got 'many'"),
        ({}, ["part=web", "seed"], r"write NAME=VALUE"),
        ({"version": 2}, [], r"version"),
        ({"stage": []}, [], r"stage: Extra inputs"),
        ({"stages": [{"stage": "captoin"}]}, [], r"no stage is called 'captoin'"),
        ({"stages": [{"stage": "caption", "option": {}}]}, [], r"stages\.0\.option"),
        ({"stages": [{"stage": "caption"}]}, [], r"option 'images' must be given"),
        ({"stages": [{"stage": "caption"}, {"stage": "caption"}]}, [], r"two steps are called 'caption'"),
        ({"stages": [{"stage": "caption", "options": {"images": "${nothing}"}}]}, [], r"\$\{nothing\}"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path, change, settings, message):
    path = write(tmp_path / "r.yaml", **change)
    with pytest.raises(UserError, match=message) as caught:
        resolved(path, *settings)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: [")
    with pytest.raises(UserError, match=r"r\.yaml: not readable as YAML"):
        recipes.load_recipe(str(path))


def test_only_and_from(tmp_path):
    steps = resolved(write(tmp_path / "r.yaml"), "part=web")
    assert [step.label for step, _ in recipes.chosen_steps(steps, start="score")] == ["score", "select"]
    assert [step.label for step, _ in recipes.chosen_steps(steps, only=["score"])] == ["score"]
    with pytest.raises(UserError, match="no step 'scor'"):
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
    with pytest.raises(UserError, match="nowhere"):
        list(recipes.run_recipe("r", steps, place, work, quiet=True))
    assert work.stopped


def test_one_process_runs_them_one_after_the_other(tmp_path):
    place, steps = two_captions(tmp_path)
    ended = [step.label for step, _ in recipes.run_recipe("r", steps, place, "inline", quiet=True)]
    assert ended == ["a", "b"]
