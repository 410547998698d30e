"""Catches a half-written input that passes for the whole: with one of two shards of pictures, caption, score and select
ended well, and `doctor --verify` said ok."""

from __future__ import annotations

import pytest

from capfilt import recipe
from capfilt.catalog.query import query
from capfilt.catalog.report import write_report
from capfilt.doctor import workspace as doctor
from capfilt.errors import MissingInput
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_command
from capfilt.stages.caption import CaptionOptions
from capfilt.stages.duplicates import DuplicatesOptions
from capfilt.stages.evaluate import EvaluateOptions
from capfilt.stages.examples import ExamplesOptions
from capfilt.stages.registry import stage_command
from capfilt.stages.score import ScoreOptions
from capfilt.stages.select import SelectOptions
from capfilt.stages.subset import SubsetOptions
from capfilt.stages.training_options import PretrainOptions
from capfilt.tables.contracts import IMAGES
from capfilt.tables.manifest import Counts, Plan
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace
from tests.refusals import refused
from tests.worlds import image_rows, tiny_checkpoint

ROWS = [image_rows("web", 4, split="train"), image_rows("web", 3, start=10, split="train")]


def put(part: Part, shards) -> None:
    """Shards of an images part whose plan has both."""
    mark = part.begin(IMAGES, "test", {}, plan=Plan([0, 1], 7))
    for shard in shards:
        part.commit(shard, IMAGES.table(ROWS[shard]), Counts(len(ROWS[shard]), len(ROWS[shard])), mark, 0.1)


@pytest.fixture
def half(tmp_path):
    place = Workspace(tmp_path / "ws")
    put(place.part("images", "web"), [0])
    tiny_checkpoint(place.model("captioner"), seed=1)
    tiny_checkpoint(place.model("filter"), seed=2)
    return place


READERS = {
    "caption": CaptionOptions(images="web", prompt="", max_new_tokens=6),
    "score": ScoreOptions(filter="filter", images="web"),
    "select": SelectOptions(images="web", threshold=0.0),
    "subset": SubsetOptions("web", dataset="some"),
    "duplicates": DuplicatesOptions("web"),
    "pretrain": PretrainOptions(human=("web",), preset="tiny", steps=1),
    "evaluate": EvaluateOptions(model="filter", images="web", split="train", tasks=("retrieval",)),
}


def run(place, name):
    return list(run_command(stage_command(name), READERS[name], place, InlineExecutor(), quiet=True))


@pytest.mark.parametrize("name", READERS)
def test_every_stage_refuses_an_incomplete_part_by_name(half, name):
    if name == "select":
        run(Workspace(half.path, allow_incomplete=True), "score")
    before = sorted(half.path.rglob("*"))
    with refused("images/web", "1 of 2", "--allow-incomplete", error=MissingInput):
        run(half, name)
    assert sorted(half.path.rglob("*")) == before


def test_the_mark_travels_and_goes_when_the_input_is_whole(half):
    allowed = Workspace(half.path, allow_incomplete=True)
    for name in ("caption", "score", "select", "evaluate"):
        run(allowed, name)
    for table, name in (
        ("captions", "captioner"),
        ("scores", "filter"),
        ("verdicts", "capfilt"),
        ("pairs", "capfilt"),
    ):
        assert half.part(table, name).gap == "1 of 2 shards"
    with refused("pairs/capfilt", "1 of 2", error=MissingInput):
        half.input("pairs", "capfilt")
    result = next((half.path / "runs").glob("*.json")).read_text()
    assert '"incomplete_inputs"' in result
    assert "1 of 2 shards" in result

    put(half.part("images", "web"), [1])
    for name in ("caption", "score", "select"):
        for summary in run(half, name):
            assert (summary.done_before, summary.done_now) == (1, 1)
    assert half.input("pairs", "capfilt").gap == ""


def test_a_part_with_shards_of_its_own_tells_what_it_was_made_from(half):
    """Examples are cut otherwise than pictures: all of their shards are there."""
    source = half.path / "q.json"
    source.write_text('{"questions": [{"question_id": 1, "image_id": 0, "question": "what is it"}]}')
    options = ExamplesOptions(source_path=str(source), dataset="q", images=("web",))
    allowed = Workspace(half.path, allow_incomplete=True)
    list(run_command(stage_command("examples"), options, allowed, InlineExecutor(), quiet=True))
    gap = f"made from 1 of 2 shards of {half.part('images', 'web').path}"
    assert half.part("examples", "q").gap == gap
    with refused("examples/q", "1 of 2", error=MissingInput):
        half.input("examples", "q")


def test_query_report_funnel_and_doctor_say_how_much_there_is(half):
    with pytest.warns(RuntimeWarning, match="images/web: 1 of 2"):
        rows = query(half, "SELECT outcome, reason, rows FROM funnel").to_pylist()
    assert rows == [
        {"outcome": "kept", "reason": None, "rows": 4},
        {"outcome": "missing", "reason": "1 of 2 shards", "rows": 3},
    ]
    with pytest.warns(RuntimeWarning):
        (row,) = query(half, "SELECT shards, planned_shards FROM parts").to_pylist()
    assert row == {"shards": 1, "planned_shards": 2}
    with pytest.warns(RuntimeWarning):
        write_report(half, half.path / "report.html")
    assert "1 of 2 shards" in (half.path / "report.html").read_text()
    (good, line), *_ = doctor(str(half.path), full=True)
    assert not good
    assert line.endswith("images/web: 1 of 2 shards hashed")


def test_a_funnel_knows_only_rows_of_the_kind_that_its_stage_counts(half):
    """`select` counts texts, and a plan in images made -6 rows missing of them."""
    allowed = Workspace(half.path, allow_incomplete=True)
    put(half.part("images", "web"), [1])
    for name in ("score", "select"):
        run(allowed, name)
    part = half.part("verdicts", "capfilt")
    (part.path / "00001.parquet").unlink()
    (part.record / "00001.manifest.json").unlink()
    with pytest.warns(RuntimeWarning):
        rows = query(half, "SELECT part, rows FROM funnel WHERE outcome = 'missing'").to_pylist()
    assert rows == [{"part": "capfilt", "rows": None}]


def test_a_dry_run_waits_for_a_part_that_is_being_made(half):
    """A step that reads what an earlier step has half written waits for it."""
    text = "version: 1\nstages:\n- {stage: score, options: {images: web, filter: filter}}\n"
    text += "- {stage: select, options: {images: web, threshold: 0.5}}\n"
    path = half.path / "r.yaml"
    path.write_text(text)
    put(half.part("images", "web"), [1])
    run(half, "score")
    part = half.part("scores", "filter")
    (part.path / "00001.parquet").unlink()
    (part.record / "00001.manifest.json").unlink()
    _, content = recipe.load_recipe(str(path))
    lines = list(recipe.dry_run(recipe.resolve(content, []), half))
    assert "to do: 1 of 2 shards" in lines[0]
    assert "waits for an earlier step" in lines[1]
