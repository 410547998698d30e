"""Would catch: a task that a model could do and is refused, or the other way round; a refusal that does not say what the
model can do; a task that the help, the documentation or a capability's name does not know; and a metric of two tasks."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from capfilt.inference.capabilities import CAPABILITIES, capabilities
from capfilt.tables.contracts import TASKS as EXAMPLE_TASKS
from capfilt.tasks.registry import CAPTIONS, TASKS, Task, check, chosen, matrix
from tests.refusals import refused

ROOT = Path(__file__).parents[2]


def markdown(rows):
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def test_the_documentation_has_the_matrix():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    shown = text.partition("<!-- matrix -->\n")[2].partition("\n<!-- end of matrix -->")[0]
    assert shown == markdown(matrix())
    for task in TASKS:
        assert f"* **{task.name}**" in text, task.name


def test_every_task_is_whole():
    assert len({task.name for task in TASKS}) == len(TASKS)
    for task in TASKS:
        assert callable(task.function())
        assert {name for group in task.needs for name in group} <= set(CAPABILITIES)
        assert task.reads in (CAPTIONS, *EXAMPLE_TASKS)
        module, _, _ = task.run.partition(":")
        assert importlib.util.find_spec(module)


class Embeds:
    def encode_images(self, batch): ...
    def embed_images(self, tokens): ...
    def embed_texts(self, texts): ...


class Matches:
    def encode_images(self, batch): ...
    def match(self, image_tokens, image_index, texts): ...
    def match_probability(self, image_tokens, image_index, texts): ...


class Encodes:
    def image_features(self, batch): ...


class Classifies:
    labels, pictures = ("no", "yes"), 2

    def classify(self, images, texts): ...


@pytest.mark.parametrize(
    ("model", "can", "tasks"),
    [
        (Embeds, ["embeds images and texts"], {"retrieval", "zero-shot", "match", "rating", "choice"}),
        (Matches, ["matches pairs"], {"retrieval", "match", "rating", "choice"}),
        (Encodes, ["embeds images"], {"few-shot"}),
        (
            type("Clip", (Embeds, Encodes), {}),
            ["embeds images and texts", "embeds images"],
            {"retrieval", "zero-shot", "few-shot", "match", "rating", "choice"},
        ),
        (Classifies, ["classifies pairs"], set()),
        (object, [], set()),
    ],
)
def test_a_model_gets_every_task_it_can_do(model, can, tasks):
    assert list(capabilities(model())) == can
    core = {"retrieval", "captioning", "zero-shot", "few-shot", "match", "rating", "choice"}
    assert {task.name for task in TASKS if task.possible(can)} & core == tasks


def test_a_refusal_is_one_line_that_says_what_can_be_done():
    check(chosen(["retrieval"]), ["matches pairs"], "models/x (ViLT)")
    with refused("--tasks captioning", "models/x (ViLT)", "matches embeds", "retrieval, few-shot"):
        check(chosen(["retrieval", "captioning"]), ["matches pairs", "embeds images"], "models/x (ViLT)")
    with refused("--tasks few-shot", "models/x (V)", "nothing"):
        check(chosen(["few-shot"]), [], "models/x (V)")


def test_repeated_names():
    assert [task.name for task in chosen(["few-shot", "retrieval", "few-shot"])] == ["few-shot", "retrieval"]


def test_one_of_several_and_all_of_several():
    both = Task("x", "", CAPTIONS, (("a", "b"), ("c",)), (), "m:f")
    assert both.possible(["b", "c"])
    assert not both.possible(["a", "b"])
    assert both.wants() == "'a' or 'b' and 'c'"
