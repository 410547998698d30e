"""Catches: rows of two versions of a stage's code in one part, or a checkpoint of older code that counts as this code's."""

from __future__ import annotations

import pytest

from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import outlook, run_stage
from capfilt.stages.base import ModelStage
from capfilt.stages.duplicates import DuplicatesOptions
from capfilt.stages.duplicates.stage import Duplicates
from capfilt.tables.workspace import Workspace
from tests.refusals import refused
from tests.worlds import image_rows, write_images


@pytest.fixture
def place(tmp_path):
    workspace = Workspace(tmp_path / "place")
    write_images(workspace.part("images", "web"), [image_rows("web", 2)])
    return workspace


class Raised(Duplicates):
    version = Duplicates.version + 1


def test_a_part_of_older_code_is_not_continued_by_newer(place):
    """Without the version in its identity, half of a part is of the code before a fix, and nothing says so."""
    with InlineExecutor() as work:
        run_stage(Duplicates(DuplicatesOptions("web"), place), work, quiet=True)
        assert run_stage(Duplicates(DuplicatesOptions("web"), place), work, quiet=True).done_now == 0
        for act in (outlook, lambda stage: run_stage(stage, work, quiet=True), Raised.begin):
            with refused("version"):
                act(Raised(DuplicatesOptions("web"), place))


class Trained(ModelStage):
    name, version = "made", 1

    def identity(self):
        return {"options": {}}

    outlook = done = run = None


class Newer(Trained):
    version = 2


def test_a_checkpoint_of_older_code_has_another_fingerprint():
    assert Trained().fingerprint() == Trained().fingerprint() != Newer().fingerprint()
