"""Would catch: a run of which nothing came through that ends as if all were well; one that is called failed for a few rows."""

from __future__ import annotations

import pytest

from capfilt.cli import main
from capfilt.execution.run import HINTS, JUDGED, fault
from capfilt.tables.contracts import FAILURES
from capfilt.tables.manifest import Counts


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ([Counts(40, 0, {}, {"dns": 40})], "40 of 40 failed: dns; is this machine offline?"),
        ([Counts(JUDGED, 0, {}, {"timeout": JUDGED})], "20 of 20 failed: timeout; is the network slow?"),
        ([Counts(9000, 0, {}, {"too_small": 9000, "dns": 0})], "9,000 of 9,000 failed: too_small"),
        # This run's rows all failed; those of an earlier one did not.
        ([Counts(30, 0, {}, {"dns": 30}), Counts(60, 30, {}, {"dns": 30})], "30 of 30 failed: dns"),
        # Nothing was to do: the part as it stands.
        ([Counts(0, 0), Counts(60, 0, {}, {"file_missing": 60})], "60 of 60 failed: file_missing"),
        ([Counts(JUDGED - 1, 0, {}, {"dns": JUDGED - 1})], ""),
        ([Counts(40, 1, {}, {"dns": 39})], ""),
        ([Counts(40, 0, {}, {"dns": 39, "timeout": 1})], ""),
        ([Counts(40, 0, {"split": 1}, {"dns": 39})], ""),
        ([Counts(40, 0, {"split": 40})], ""),
        ([Counts(0, 0)], ""),
    ],
)
def test_one_reason_for_every_row_is_a_fault_of_the_run(counts, line):
    assert fault(*counts).startswith(line)
    assert bool(fault(*counts)) == bool(line)


def test_hints_are_of_failures_that_exist():
    assert set(HINTS) <= set(FAILURES)


@pytest.mark.parametrize(("broken", "code"), [(20, 1), (19, 0)])
def test_a_command_of_which_nothing_came_through_ends_with_1(tmp_path, capsys, broken, code):
    """The account is printed all the same, what was committed stands, and the same command says the same again."""
    for number in range(broken):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(b"no picture")
        (tmp_path / "pictures" / f"{number}.txt").write_text("a caption")
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            main(["ingest", str(tmp_path / "pictures"), "--dataset", "d", "-w", str(tmp_path / "ws"),
                  "--execution", "inline", "-q"])  # fmt: skip
        out, err = capsys.readouterr()
        assert stopped.value.code == code
        assert f"{broken} failed (not_an_image {broken})" in out
        assert err == ("capfilt: ingest: 20 of 20 failed: not_an_image\n" if code else "")
