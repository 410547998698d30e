"""Catches a run that repeats what is done, hides what it did not do, or leaves a part it cannot go on with."""

from __future__ import annotations

import pytest

from capfilt.errors import RunError, UserError
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import Summary, executor, outlook, run_stage
from capfilt.stages.base import Produced, ShardStage
from capfilt.tables.contracts import SIGNALS
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part
from tests.refusals import failed, refused


class Count(ShardStage):
    """Ten rows per shard; fails at the shard it is told to."""

    name = "count"
    version = 1
    contract = SIGNALS

    def __init__(self, output, shards=3, fail_at=None, option=1):
        self.output, self._shards, self.fail_at, self.option = output, shards, fail_at, option
        self.ready = 0

    def identity(self):
        return {"options": {"option": self.option}}

    def shards(self):
        return list(range(self._shards))

    def expected_rows(self, shard):
        return 10

    def setup(self):
        if self.option < 0:
            raise UserError("give an option of 0 or more")
        self.ready += 1

    def process(self, shard):
        assert self.ready == 1
        if shard == self.fail_at:
            raise RunError("the machine is on fire")
        return Produced(
            SIGNALS.table([{"image_id": f"{shard}-{n}"} for n in range(9)]), Counts(10, 9, {"why": 1})
        )


def test_what_was_refused_claims_no_name(tmp_path):
    part = Part(tmp_path / "part")
    with refused("0 or more"):
        run_stage(Count(part, option=-1), InlineExecutor(), quiet=True)
    assert not Part(tmp_path / "part").exists
    assert run_stage(Count(part, option=1), InlineExecutor(), quiet=True).done_now == 3
    # A part that stands stays, whatever a later call is refused for.
    with pytest.raises(UserError):
        run_stage(Count(part, option=-1, shards=4), InlineExecutor(), quiet=True)
    assert part.shards() == [0, 1, 2]


def test_a_failed_run_keeps_what_it_committed_and_a_rerun_does_the_rest(tmp_path):
    part = Part(tmp_path / "part")
    with failed("on fire"):
        run_stage(Count(part, fail_at=2), InlineExecutor(), quiet=True)
    assert part.shards() == [0, 1]
    assert outlook(Count(part)).startswith("to do: 1 of 3 shards, 10 rows")
    summary = run_stage(Count(part), InlineExecutor(), quiet=True)
    assert (summary.done_before, summary.done_now) == (2, 1)
    assert summary.counts == Counts(30, 27, {"why": 3})
    assert summary.rows_out == 27
    assert "30 in = 27 kept + 3 dropped (why 3) + 0 failed" in summary.line()
    assert outlook(Count(part)) == "done: 3 shards, 27 rows"


def test_another_identity_or_more_shards_than_the_input_has_are_refused(tmp_path):
    part = Part(tmp_path / "part")
    run_stage(Count(part), InlineExecutor(), quiet=True)
    with refused("option", 1, 2):
        run_stage(Count(part, option=2), InlineExecutor(), quiet=True)
    with refused("00002"):
        run_stage(Count(part, shards=2), InlineExecutor(), quiet=True)


def test_a_damaged_shard_stops_a_rerun_by_name(tmp_path):
    part = Part(tmp_path / "part")
    run_stage(Count(part), InlineExecutor(), quiet=True)
    (part.path / "00001.parquet").write_bytes(b"PAR1")
    with refused("00001.parquet"):
        run_stage(Count(part), InlineExecutor(), quiet=True)


def test_an_executor_that_does_not_exist_is_refused():
    with refused("--execution cloud"):
        executor("cloud")


def test_a_summary_of_work_done_before_says_so():
    assert "done before" in Summary("pretrain", "models/x", 0.0, done_before=1).line()
