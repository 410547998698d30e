"""Catches: one pass that writes other rows than two, leaves out web texts, encodes twice, loses what a kill left behind, or
scores by a vision tower that is not the filter's."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest

from capfilt.errors import RunError, UserError
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_command, run_stage
from capfilt.models import checkpoint
from capfilt.models.blip.model import Blip
from capfilt.stages.caption import CaptionOptions
from capfilt.stages.caption.and_score import CaptionAndScore
from capfilt.stages.caption.stage import CaptionStage
from capfilt.stages.registry import stage_command
from capfilt.stages.score import ScoreOptions
from capfilt.stages.score.stage import ScoreStage
from tests.refusals import failed, refused
from tests.worlds import tiny_checkpoint

OPTIONS = CaptionOptions(
    images="web", filter="shared", prompt="", max_new_tokens=6, min_new_tokens=2, samples=2
)


@pytest.fixture
def workspace(workspace):
    """A filter with the captioner's vision tower and another text side."""
    captioner, tokenizer, _ = checkpoint.load(workspace.model("captioner"))
    tiny_checkpoint(workspace.model("other"), seed=9)
    model, _, _ = checkpoint.load(workspace.model("other"))
    model.visual_encoder.load_state_dict(captioner.visual_encoder.state_dict())
    checkpoint.save(workspace.model("shared"), model, tokenizer)
    return workspace


def run(stage):
    return run_stage(stage, InlineExecutor(), quiet=True)


def rows_of(part):
    return [row for table in part.tables() for row in table.to_pylist()]


def apart(workspace):
    """The two stages one after the other, into parts of their own."""
    run(CaptionStage(dataclasses.replace(OPTIONS, filter=""), workspace))
    run(ScoreStage(ScoreOptions(filter="shared", images="web", captions=("captioner",)), workspace))
    captions, scores = workspace.part("captions", "captioner"), workspace.part("scores", "shared")
    found = rows_of(captions), rows_of(scores), captions.info, scores.info
    for part in (captions, scores):
        part.path.rename(part.path.with_name(f"{part.name}-apart"))
    return found


def test_one_pass_writes_what_two_write(workspace, monkeypatch):
    captions, scores, captions_info, scores_info = apart(workspace)
    seen = Counter()
    encode = Blip.encode_image

    def counted(self, images):
        seen["images"] += len(images)
        return encode(self, images)

    monkeypatch.setattr(Blip, "encode_image", counted)
    command = stage_command("caption")
    (summary,) = run_command(command, OPTIONS, workspace, "inline", quiet=True)
    assert seen["images"] == 10, "12 rows, of which one never came and one is broken"
    assert rows_of(workspace.part("captions", "captioner")) == captions
    made = rows_of(workspace.part("scores", "shared"))
    for row, expected in zip(made, scores, strict=True):
        for name in ("itm_score", "itc_score"):
            assert row.pop(name) == pytest.approx(expected.pop(name), abs=1e-6)
        assert row == expected
    assert workspace.part("captions", "captioner").info == captions_info
    assert workspace.part("scores", "shared").info == scores_info
    assert len(summary.table) == 1
    assert "12 images in = 10 kept + 1 dropped + 1 failed; 22 captions" in summary.table[0]
    for table, name in (("captions", "captioner"), ("scores", "shared")):
        index = json.loads((workspace.part(table, name).record / "index.json").read_text())
        assert [each["batch_size"] for each in index["manifests"]] == [64, 64], (
            "its own choice, so it is told"
        )


def test_either_goes_on_with_what_the_other_began(workspace, monkeypatch):
    commit = type(workspace.part("scores", "shared")).commit

    def killed(self, *args, **options):
        if self.path.parent.name == "scores":
            raise RunError("killed")
        return commit(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(workspace.part("scores", "shared")), "commit", killed)
        with failed("killed"):
            run(CaptionAndScore(OPTIONS, workspace))
    assert workspace.part("captions", "captioner").shards() == [0]
    assert workspace.part("scores", "shared").shards() == []
    summary = run(CaptionAndScore(OPTIONS, workspace))
    assert summary.done_now == 2
    assert (
        workspace.part("captions", "captioner").shards()
        == workspace.part("scores", "shared").shards()
        == [0, 1]
    )
    again = run(CaptionAndScore(OPTIONS, workspace))
    assert (again.done_before, again.done_now) == (2, 0)
    after = run(CaptionStage(dataclasses.replace(OPTIONS, filter=""), workspace))
    assert after.done_before == 2
    after = run(ScoreStage(ScoreOptions(filter="shared", images="web", captions=("captioner",)), workspace))
    assert after.done_before == 2


def test_two_towers_and_plug_ins_are_refused(workspace):
    with pytest.raises(UserError, match="freeze vision"):
        run(CaptionAndScore(dataclasses.replace(OPTIONS, filter="filter"), workspace))
    assert not workspace.part("captions", "captioner").exists
    with refused("clip:there", "plug-in"):
        CaptionAndScore(dataclasses.replace(OPTIONS, filter="clip:there"), workspace)
