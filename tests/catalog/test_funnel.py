"""Would catch: a funnel that loses rows, double counts shards, or dies of a crash between manifest and stats."""

from __future__ import annotations

from pathlib import Path

from capfilt.catalog.funnel import accounts, funnel_table, parts_table
from capfilt.tables.contracts import SCORES
from capfilt.tables.manifest import Counts
from capfilt.tables.workspace import Workspace
from tests.refusals import refused


def score(workspace: Workspace, name: str, counts: list[Counts]) -> None:
    part = workspace.part("scores", name)
    mark = part.begin(SCORES, "score", {"version": 1, "options": {"batch_size": 4}})
    for shard, count in enumerate(counts):
        rows = [{"text_id": f"{shard} {n}", "image_id": "i"} for n in range(count.kept)]
        part.commit(shard, SCORES.table(rows), count, mark, 1.25)


def test_rows_of_each_part_add_up_to_what_its_stage_was_given(workspace: Workspace) -> None:
    found = accounts(workspace)
    rows = funnel_table(found).to_pylist()
    for ordinal, account in enumerate(found):
        own = [row for row in rows if row["ordinal"] == ordinal]
        assert sum(row["rows"] for row in own) == account.counts.rows_in == account.part.counts().rows_in
        assert {(row["table_name"], row["part"], row["stage"]) for row in own} == {
            (account.table, account.part.name, account.stage)
        }
    # As it was planted: keys 5, 13, 21, ... failed, every other one as timeout.
    download = [(row["outcome"], row["reason"], row["rows"]) for row in rows if row["stage"] == "download"]
    assert download == [("kept", None, 70), ("failed", "not_found", 5), ("failed", "timeout", 5)]


def test_shards_are_added_and_reasons_ordered(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    score(
        workspace,
        "f",
        [Counts(5, 2, {"b": 1}, {"not_finite": 2}), Counts(6, 2, {"a": 1, "b": 2}, {"empty_text": 1})],
    )
    (account,) = accounts(workspace)
    assert list(account.outcomes()) == [
        ("kept", None, 4), ("dropped", "b", 3), ("dropped", "a", 1),
        ("failed", "not_finite", 2), ("failed", "empty_text", 1),
    ]  # fmt: skip
    assert (account.rows_out, account.seconds, account.size) == (
        4,
        2.5,
        sum(m.size for m in account.manifests),
    )
    (row,) = parts_table([account]).to_pylist()
    assert (row["rows_in"], row["rows_out"], row["shards"], row["stage"]) == (11, 4, 2, "score")
    assert '"batch_size": 4' in row["identity"]


def test_missing_and_broken_stats_are_only_missing_seconds(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    score(workspace, "f", [Counts(1, 1)] * 3)
    directory = tmp_path / ".capfilt" / "scores" / "f"
    (directory / "00000.stats.json").unlink()
    (directory / "00001.stats.json").write_text('{"seconds": ')
    (account,) = accounts(workspace)
    assert (account.counts.rows_in, account.seconds) == (3, 1.25)
    (directory / "00002.stats.json").unlink()
    assert accounts(workspace)[0].finished is None


def test_parts_come_in_the_order_of_the_pipeline(workspace: Workspace) -> None:
    names = [(account.table, account.part.name) for account in accounts(workspace)]
    assert names == [
        ("images", "web"), ("captions", "captioner"), ("scores", "filter"), ("verdicts", "best"),
        ("verdicts", "capfilt"), ("pairs", "best"), ("pairs", "capfilt"),
    ]  # fmt: skip


def test_a_shard_that_disagrees_is_named(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    score(workspace, "f", [Counts(1, 1)] * 2)
    (tmp_path / "scores" / "f" / "00001.parquet").unlink()
    with refused("00001.parquet", "gone"):
        accounts(workspace)


def test_no_parts_give_empty_tables_of_the_right_columns(workspace: Workspace) -> None:
    found = accounts(workspace)
    for table in (funnel_table, parts_table):
        assert table([]).num_rows == 0
        assert table([]).schema == table(found).schema
        assert not {"null"} & {str(field.type) for field in table([]).schema}
