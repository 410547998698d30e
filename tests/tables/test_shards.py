"""Catches what loses or mixes rows: a half shard that counts as done, a zombie that overwrites, a changed option that is
reused silently, rows that do not add up, a crash at any point of a commit that a rerun cannot finish."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.errors import UserError
from capfilt.tables import publish
from capfilt.tables.contracts import CAPTIONS, IMAGES, SIGNALS
from capfilt.tables.manifest import Counts, Plan, Successor, numbers_of, ranges_of
from capfilt.tables.sealed import fingerprint, seal, unseal
from capfilt.tables.shards import Part
from tests.refusals import failed, refused
from tests.sweeps.disk import durable_steps
from tests.worlds import image_rows


def rows(count, start=0):
    return CAPTIONS.table(
        [
            {"text_id": f"t{i}", "image_id": f"i{i}", "text": f"text {i}", "sample_index": 0, "captioner": "c",
             "decoding": "greedy", "logprob": -1.0}
            for i in range(start, start + count)
        ]
    )  # fmt: skip


@pytest.fixture
def part(tmp_path):
    return Part(tmp_path / "captions" / "c")


def begin(part, **identity):
    return part.begin(CAPTIONS, "test", identity or {"a": 1})


def test_a_committed_shard_reads_back_and_no_attempt_is_left(part):
    mark = begin(part)
    manifest = part.commit(3, rows(5), Counts(7, 5, {"why": 1}, {"truncated": 1}), mark, 0.5)
    assert part.shards() == [3]
    assert part.read(3).equals(rows(5))
    assert part.read(3, ["text"]).column_names == ["text"]
    assert manifest.rows == part.rows == 5
    assert part.counts() == Counts(7, 5, {"why": 1}, {"truncated": 1})
    assert part.check().problem(manifest, full=True) is None
    assert os.listdir(part.path) == ["00003.parquet"]
    assert sorted(os.listdir(part.record)) == ["00003.manifest.json", "00003.stats.json", "part.json"]


def test_rows_that_do_not_add_up_are_refused(part):
    mark = begin(part)
    with failed("7 in", "5 kept"):
        part.commit(0, rows(5), Counts(7, 5, {"why": 1}), mark, 0.1)
    assert part.shards() == []


@given(
    st.lists(
        st.tuples(st.dictionaries(st.sampled_from("abc"), st.integers(0, 9)), st.integers(0, 9)), max_size=5
    )
)
def test_counts_add_up_however_they_are_added(items):
    each = [Counts(kept + sum(dropped.values()), kept, dropped) for dropped, kept in items]
    total = sum(each, Counts(0, 0))
    total.check()
    assert total.rows_in == sum(counts.rows_in for counts in each)


def test_a_late_attempt_never_replaces_a_committed_shard(part):
    mark = begin(part)
    first = part.commit(0, rows(2), Counts(2, 2), mark, 0.1)
    before = (part.path / "00000.parquet").read_bytes()
    assert part.commit(0, rows(4), Counts(4, 4), mark, 0.1) == first
    assert (part.path / "00000.parquet").read_bytes() == before


def test_a_changed_identity_is_named_and_refused(part):
    begin(part, options={"seed": 0, "top_p": 0.9})
    with refused("options.top_p", 0.9, 0.8):
        begin(Part(part.path), options={"seed": 0, "top_p": 0.8})
    begin(Part(part.path), options={"top_p": 0.9, "seed": 0})  # key order is no change


def test_same_rows_give_the_same_bytes(tmp_path):
    files = []
    for name in ("a", "b"):
        part = Part(tmp_path / name)
        part.commit(0, rows(50), Counts(50, 50), begin(part), 0.1 if name == "a" else 7.0)
        files.append((part.path / "00000.parquet").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "grow"])
def test_a_file_that_does_not_agree_with_its_manifest_is_refused_by_name(part, damage):
    part.commit(0, rows(500), Counts(500, 500), begin(part), 0.1)
    path = part.path / "00000.parquet"
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(data[:-9] if damage == "truncate" else data + b"x")
    with refused("00000.parquet"):
        part.check()
    with refused("00000.parquet"):
        part.read(0)


def test_a_byte_flipped_far_from_the_footer_is_found_by_the_full_check(part):
    table = SIGNALS.table([{"image_id": os.urandom(64).hex()} for _ in range(5000)])
    mark = part.begin(SIGNALS, "test", {})
    manifest = part.commit(0, table, Counts(5000, 5000), mark, 0.1)
    path = part.path / "00000.parquet"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert part.problem(manifest) is None  # the cheap check looks at the size and the last 64 KiB
    assert "bytes" in part.problem(manifest, full=True)


def test_unreadable_descriptions_are_named(part):
    with refused(part.path, "no part"):
        part.read(0) if part.exists else part.info
    part.commit(0, rows(1), Counts(1, 1), begin(part), 0.1)
    (part.record / "00000.manifest.json").write_text("{")
    with refused("00000.manifest.json"):
        Part(part.path).check()
    (part.record / "part.json").write_text("[]")
    with refused("part.json"):
        _ = Part(part.path).info


def test_a_directory_of_other_things_is_not_made_a_part(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with refused(tmp_path, "empty"):
        begin(Part(tmp_path))
    assert os.listdir(tmp_path) == ["notes.txt"]


def die_before_the_manifest(part, count, mark):
    """Commit shard 0, killed between its file and its manifest."""

    class Killed(BaseException):
        pass

    def killed(attempt, path):
        if path.name.endswith(".manifest.json"):
            raise Killed
        return publish.link_new(attempt, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("capfilt.tables.shards.link_new", killed)
        with pytest.raises(Killed):
            part.commit(0, rows(count), Counts(count, count), mark, 0.1)
    assert part.shards() == []
    assert (part.path / "00000.parquet").is_file()


def test_a_crash_at_every_system_call_leaves_a_part_that_a_rerun_completes(tmp_path, monkeypatch):
    """The n-th call dies, for all n; afterwards every manifest agrees with its file and the rerun ends complete."""

    class Killed(BaseException):
        pass

    real = {name: getattr(os, name) for name in ("fsync", "link", "replace")}
    real_unlink = Path.unlink
    crash_points = 0
    for die_at in range(1, 100):
        part = Part(tmp_path / f"part{die_at}")
        calls = 0

        def dying(name, die_at=die_at):
            def call(*arguments, **named):
                nonlocal calls
                calls += 1
                if calls >= die_at:  # and everything after: a dead process cleans nothing up
                    raise Killed
                return real[name](*arguments, **named)

            return call

        def dying_unlink(self, missing_ok=False, die_at=die_at):
            if calls >= die_at:  # noqa: B023 - called within this turn of the loop
                raise Killed
            return real_unlink(self, missing_ok=missing_ok)

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(publish.os, name, dying(name))
            patch.setattr(Path, "unlink", dying_unlink)
            try:
                mark = begin(part)
                part.commit(0, rows(3), Counts(3, 3), mark, 0.1)
                part.commit(1, rows(4, 3), Counts(4, 4), mark, 0.1)
                finished = True
            except Killed:
                finished = False
        again = Part(part.path)
        if again.exists:
            again.check()
        mark = begin(again)
        for shard, table in ((0, rows(3)), (1, rows(4, 3))):
            if again.manifest(shard) is None:
                again.commit(shard, table, Counts(len(table), len(table)), mark, 0.1)
        assert again.check().shards() == [0, 1]
        assert again.read(0).equals(rows(3))
        assert again.read(1).equals(rows(4, 3))
        assert sorted(os.listdir(part.path)) == ["00000.parquet", "00001.parquet"]
        if finished:
            break
        crash_points += 1
    assert crash_points >= 10  # else the sweep swept nothing


def test_bytes_are_durable_before_their_name_and_names_before_what_vouches_for_them(part, monkeypatch):
    """A power cut after a commit left a manifest whose file was empty, or a file that nothing vouched for."""
    steps = durable_steps(monkeypatch, part.path.parents[1])
    mark = begin(part)
    record, shard = ".capfilt/captions/c", "captions/c/00000"
    assert steps == [f"sync {record}/.part.json attempt", f"name {record}/part.json", f"sync {record}"]
    steps.clear()
    part.commit(0, rows(3), Counts(3, 3), mark, 0.1)
    assert steps[:7] == [
        f"sync {record}/.00000.parquet attempt",
        f"sync {record}/.00000.manifest.json attempt",
        f"sync {record}",
        f"name {shard}.parquet",
        "sync captions/c",
        f"name {record}/00000.manifest.json",
        f"sync {record}",
    ]
    del steps[:]
    retried(part, mark, 1, 4)
    assert steps[:2] == [f"name {record}/00000.g0.parquet", f"sync {record}"]
    assert steps[2:9] == [
        f"sync {record}/.00000.g1.parquet attempt",
        f"sync {record}/.00000.g1.manifest.json attempt",
        f"sync {record}",
        f"name {record}/00000.g1.parquet",
        f"sync {record}",
        f"name {record}/00000.g1.manifest.json",
        f"sync {record}",
    ]
    assert steps[-3:] == [f"name {record}/.00000.parquet attempt", f"name {shard}.parquet", "sync captions/c"]


def test_an_orphan_of_another_identity_is_not_adopted(part):
    mark = begin(part)
    die_before_the_manifest(part, 2, mark)
    with failed("00000.parquet", "delete"):
        part.commit(0, rows(2), Counts(2, 2), fingerprint({"other": 1}), 0.1)
    adopted = part.commit(0, rows(9), Counts(9, 9), mark, 0.1)
    assert adopted.rows == 2
    assert adopted.counts == Counts(2, 2)
    assert not list(part.record.glob(".*.manifest.json.*"))


@pytest.mark.parametrize("place", [0, 4, 200, -300, -1])
def test_an_orphan_is_adopted_only_if_all_its_bytes_are_as_they_were_written(part, place):
    """A byte that changed while the file had no manifest was signed anew: nothing could ever find it after that."""
    mark = begin(part)
    die_before_the_manifest(part, 500, mark)
    path = part.path / "00000.parquet"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with failed("00000.parquet", "delete"):
        part.commit(0, rows(500), Counts(500, 500), mark, 0.1)
    path.unlink()
    assert part.commit(0, rows(500), Counts(500, 500), mark, 0.1).rows == 500


def test_kill_9_while_committing_and_rerun(tmp_path):
    """A real process, really killed, again and again, until a run gets through."""
    script = textwrap.dedent(
        """
        import sys
        from capfilt.tables.contracts import SIGNALS
        from capfilt.tables.manifest import Counts
        from capfilt.tables.shards import Part
        part = Part(sys.argv[1])
        mark = part.begin(SIGNALS, "test", {})
        print("begun", flush=True)
        for shard in range(40):
            if part.manifest(shard) is None:
                rows = [{"image_id": f"{shard}-{i}"} for i in range(2000)]
                part.commit(shard, SIGNALS.table(rows), Counts(2000, 2000), mark, 0.1)
        """
    )
    target = tmp_path / "part"
    killed = 0
    for attempt in range(12):
        process = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"begun\n"
        try:
            process.wait(timeout=0.02 + 0.07 * attempt if attempt < 11 else 60)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
        process.stdout.close()
        Part(target).check()
        if process.returncode == 0:
            break
    part = Part(target)
    assert killed
    assert part.shards() == list(range(40))
    seen = [value for table in part.tables() for value in table["image_id"].to_pylist()]
    assert len(seen) == len(set(seen)) == 80_000


def test_two_processes_racing_for_one_shard_leave_one_whole_shard(tmp_path):
    script = textwrap.dedent(
        """
        import sys, time
        from capfilt.tables.contracts import SIGNALS
        from capfilt.tables.manifest import Counts
        from capfilt.tables.shards import Part
        part = Part(sys.argv[1])
        mark = part.begin(SIGNALS, "test", {})
        table = SIGNALS.table([{"image_id": f"{sys.argv[2]}-{i}"} for i in range(500)])
        time.sleep(max(0.0, float(sys.argv[3]) - time.time()))
        for shard in range(20):
            part.commit(shard, table, Counts(500, 500), mark, 0.1)
        """
    )
    start = str(time.time() + 2.5)
    racers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "part"), name, start]) for name in "xy"
    ]
    assert [racer.wait(60) for racer in racers] == [0, 0]
    part = Part(tmp_path / "part").check()
    for shard in range(20):
        values = part.read(shard)["image_id"].to_pylist()
        assert len(values) == 500
        assert len({value[0] for value in values}) == 1


def test_a_full_disk_says_so_and_what_was_committed_stays_valid(part, monkeypatch):
    mark = begin(part)
    part.commit(0, rows(2), Counts(2, 2), mark, 0.1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full)
        with failed("space"):
            part.commit(1, rows(2), Counts(2, 2), mark, 0.1)
    assert part.check().shards() == [0]
    assert not [name for name in os.listdir(part.record) if name.endswith(".tmp")]
    part.commit(1, rows(2), Counts(2, 2), mark, 0.1)
    assert part.shards() == [0, 1]


def test_the_index_holds_every_manifest(part):
    mark = begin(part)
    for shard in range(3):
        part.commit(shard, rows(1, shard), Counts(1, 1), mark, 0.1)
    part.finish()
    index = json.loads((part.record / "index.json").read_bytes())
    assert [entry["shard"] for entry in index["manifests"]] == [0, 1, 2]
    assert part.index_problem() is None
    part.commit(3, rows(1, 3), Counts(1, 1), mark, 0.1)
    assert part.index_problem() is None
    assert "older" in part.unfinished()  # as a run leaves it that is killed before its end
    path = part.record / "index.json"
    whole = path.read_bytes()
    entries = unseal(whole)["manifests"]
    foreign = [{**entries[0], "fingerprint": "0" * 32}]
    for other in (foreign, [{**entries[0], "shard": 9}], [{}], 5, [5], None, {"a": 1}):
        path.write_bytes(seal({"manifests": other}))
        assert "index.json" in part.index_problem()
    path.write_bytes(seal({"other": []}))
    assert "index.json" in part.index_problem()
    for damaged in (whole.replace(b"[", b"[ ", 1), b"", whole[:-3]):
        path.write_bytes(damaged)
        assert "index.json" in part.index_problem()
    part.finish()
    assert (part.index_problem(), part.unfinished()) == (None, "")


def retried(part, mark, generation, count):
    """A further generation of shard 0 with `count` rows."""
    before = part.manifest(0)
    after = Successor(generation, before.sha256, {"timeout": float(generation)})
    return part.commit(0, rows(count), Counts(count, count), mark, 0.1, successor=after)


def test_other_readers_see_the_newest_generation_and_ours_never_a_file_that_changes(part):
    """`*.parquet` took both generations of a retried shard, or the older one."""
    mark = begin(part)
    part.commit(0, rows(3), Counts(3, 3), mark, 0.1)
    for generation in (1, 2):
        manifest = retried(part, mark, generation, 3 + generation)
        assert os.listdir(part.path) == ["00000.parquet"]
        assert pq.read_table(part.path).num_rows == part.read(0).num_rows == 3 + generation
        assert part.file(manifest) == part.record / f"00000.g{generation}.parquet"
    assert pq.read_metadata(part.record / "00000.g0.parquet").num_rows == 3
    for path in part.record.glob("*.parquet"):
        path.unlink()  # older generations may be deleted, and so may the newest's second name
    assert Part(part.path).check().read(0).num_rows == 5
    assert retried(Part(part.path), mark, 3, 9).rows == 9


def test_a_name_left_behind_by_a_killed_retry_follows_in_the_next_run(part, monkeypatch):
    mark = begin(part)
    part.commit(0, rows(3), Counts(3, 3), mark, 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(Part, "follow", lambda self, shard: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            retried(part, mark, 1, 4)
    assert part.behind(part.manifest(0))
    assert (part.read(0).num_rows, pq.read_table(part.path).num_rows) == (4, 3)
    part.finish()
    part.finish()
    assert not part.behind(part.manifest(0))
    assert pq.read_table(part.path).num_rows == 4
    assert not [name for name in os.listdir(part.record) if name.startswith(".")]


def test_a_copied_part_is_as_good_as_the_part(part, tmp_path):
    """A copy has two files where there were two names of one."""
    mark = begin(part)
    part.commit(0, rows(3), Counts(3, 3), mark, 0.1)
    retried(part, mark, 1, 4)
    shutil.copytree(tmp_path, tmp_path.parent / "copied")
    copied = Part(tmp_path.parent / "copied" / "captions" / "c")
    assert not copied.behind(copied.manifest(0))
    assert copied.check().read(0).num_rows == 4


@pytest.mark.parametrize(
    ("given", "record"),
    [
        ("ws/images/web", "ws/.capfilt/images/web"),
        ("ws/images/../images/web", "ws/.capfilt/images/web"),
        ("other/web", "other/.capfilt/web"),
        ("linked/images/web", "ws/.capfilt/images/web"),
        ("alias", "ws/.capfilt/images/web"),
    ],
)
def test_a_part_has_one_record_under_every_path_that_leads_to_it(tmp_path, given, record):
    (tmp_path / "ws" / "images" / "web").mkdir(parents=True)
    (tmp_path / "linked").symlink_to(tmp_path / "ws")
    (tmp_path / "alias").symlink_to(tmp_path / "ws" / "images" / "web")
    assert Part(tmp_path / given).record == tmp_path.resolve() / record


def test_a_part_whose_folder_was_removed_is_made_anew(part):
    """Its record alone would say that everything is done."""
    part.commit(0, rows(3), Counts(3, 3), begin(part), 0.1)
    shutil.rmtree(part.path)
    again = Part(part.path)
    assert not again.exists
    mark = begin(again, other=1)
    assert again.shards() == []
    assert again.commit(0, rows(1), Counts(1, 1), mark, 0.1).rows == 1


def test_of_two_runs_that_begin_a_part_together_one_identity_counts(part, monkeypatch):
    """A run that cleared away an older record took along the record that another run had published meanwhile."""
    inside = threading.Event()
    forget = Part._forget

    def slowly(self):
        inside.set()
        time.sleep(0.3)
        forget(self)

    monkeypatch.setattr(Part, "_forget", slowly)
    first = threading.Thread(target=lambda: begin(Part(part.path), a=1))
    first.start()
    inside.wait(10)
    with refused("identity"):
        begin(part, a=2)
    first.join()
    assert Part(part.path).info["identity"] == {"a": 1}


def test_a_part_called_like_a_table_forgets_no_other_record(tmp_path):
    """`--out ./images` has its record where the records of a workspace's images are."""
    other = Part(tmp_path / "images" / "web")
    other.commit(0, IMAGES.table(image_rows("web", 1)), Counts(1, 1), other.begin(IMAGES, "test", {}), 0.1)
    (tmp_path / "images").rename(tmp_path / "away")
    part = Part(tmp_path / "images")
    begin(part)
    part.withdraw()
    (tmp_path / "away").rename(tmp_path / "images")
    assert other.check().shards() == [0]


def test_the_record_tells_which_shards_are_not_there(part):
    mark = part.begin(CAPTIONS, "test", {"a": 1}, plan=Plan([0, 1, 2, 7], 11))
    assert part.gap == "0 of 4 shards"
    part.commit(1, rows(3), Counts(3, 3), mark, 0.1)
    assert (part.gap, part.planned, part.planned_rows) == ("1 of 4 shards", [0, 1, 2, 7], 11)
    # The plan may grow with its input; it is no part of the identity.
    assert part.begin(CAPTIONS, "test", {"a": 1}, plan=Plan([1], 3, {"images/web": "1 of 2 shards"})) == mark
    assert Part(part.path).gap == "made from 1 of 2 shards of images/web"
    assert part.begin(CAPTIONS, "test", {"a": 1}, plan=Plan([1], 3)) == mark
    assert Part(part.path).gap == ""
    begin(part)  # a caller without a plan leaves it
    assert Part(part.path).planned_rows == 3


@given(st.sets(st.integers(0, 40)))
def test_planned_shards_survive_their_short_form(numbers):
    assert numbers_of(ranges_of(sorted(numbers))) == sorted(numbers)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v | {"rows": v["rows"] + 1},
        lambda v: v | {"contract_version": 9},
        lambda v: v | {"shard": "0"},
        lambda v: v | {"sha256": 5},
        lambda v: v | {"counts": v["counts"] | {"kept": -1}},
        lambda v: v | {"counts": v["counts"] | {"dropped": []}},
        lambda v: v | {"fingerprint": "0" * 32},
        lambda v: v | {"further": 1},
    ],
)  # fmt: skip
def test_a_manifest_that_was_rewritten_does_not_agree_with_its_file(part, change):
    """A manifest of other rows, counts, version or types passed, since only size and etag were compared."""
    part.commit(0, rows(3), Counts(3, 3), begin(part), 0.1)
    path = part.record / "00000.manifest.json"
    path.write_bytes(seal(change(unseal(path.read_bytes()))))
    with pytest.raises(UserError, match=r"00000\.(manifest\.json|parquet)"):
        Part(part.path).read(0)


def test_a_record_whose_options_were_rewritten_is_refused(part):
    begin(part, options={"seed": 0})
    path = part.record / "part.json"
    path.write_bytes(seal(unseal(path.read_bytes()) | {"identity": {"options": {"seed": 1}}}))
    with refused("part.json", "fingerprint"):
        _ = Part(part.path).info


def test_a_record_of_another_part_is_refused(part, tmp_path):
    """Whole files of capfilt's in each other's places have sound seals: rows passed for those of other options."""
    other = Part(tmp_path / "captions" / "other")
    for each, seed in ((part, 0), (other, 1)):
        each.commit(0, rows(3), Counts(3, 3), begin(each, seed=seed), 0.1)
        each.settle("precision", ("fp32", "bf16")[seed])
        each.finish()
    for name, read in (
        ("part.json", lambda: Part(part.path).read(0)),
        ("00000.manifest.json", lambda: Part(part.path).read(0)),
        ("precision.json", lambda: Part(part.path).settle("precision", "fp32")),
    ):
        whole = (part.record / name).read_bytes()
        (part.record / name).write_bytes((other.record / name).read_bytes())
        with pytest.raises(UserError, match=r"00000\.parquet|precision\.json"):
            read()
        (part.record / name).write_bytes(whole)
        read()
    (part.record / "index.json").write_bytes((other.record / "index.json").read_bytes())
    assert "does not agree" in part.index_problem()
    # Parts from before manifests and precisions named their part.
    values = unseal((part.record / "00000.manifest.json").read_bytes())
    del values["part"]
    (part.record / "00000.manifest.json").write_bytes(seal(values))
    (part.record / "precision.json").write_bytes(seal({"precision": "fp32"}))
    assert Part(part.path).read(0).num_rows == 3
    assert Part(part.path).settle("precision", "bf16") == "fp32"


@pytest.mark.parametrize("columns", [None, ["text"]])
def test_no_changed_byte_of_a_shard_reaches_a_reader(part, columns):
    """One in three of the flips passed a read: neither the pages nor the whole file were compared."""
    part.commit(0, rows(40), Counts(40, 40), begin(part), 0.1)
    path = part.path / "00000.parquet"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        with refused("00000.parquet"):
            Part(part.path).read(0, columns)


def test_text_read_beside_pictures_is_read_under_checksums(tmp_path):
    """Of a shard with pictures, readers of its texts alone do not hash all bytes; a changed page is found all the same."""
    part = Part(tmp_path / "images" / "web")
    table = IMAGES.table(image_rows("web", 150))
    part.commit(0, table, Counts(150, 150), part.begin(IMAGES, "test", {}), 0.1)
    path = part.path / "00000.parquet"
    whole = path.read_bytes()
    for group in range(2):
        chunk = pq.read_metadata(path).row_group(group).column(table.schema.get_field_index("image_id"))
        place = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 20
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with refused("00000.parquet", "CRC"):
            list(Part(part.path).batches(0, ["image_id"]))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"sealed": 1}', b"[" * 100_000])
def test_other_bytes_are_no_sealed_file(data):
    with pytest.raises(ValueError, match="bytes have changed"):
        unseal(data)


@given(
    st.dictionaries(
        st.text(max_size=4).filter(lambda key: key != "sealed"), st.integers() | st.text(max_size=4)
    )
)
def test_every_changed_byte_of_a_sealed_file_is_found(values):
    data = seal(values)
    assert unseal(data) == values
    for place in range(len(data)):
        for bit in (1, 32, 128):
            with pytest.raises(ValueError, match="bytes have changed"):
                unseal(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda children: (
        st.dictionaries(st.text(max_size=3), children, max_size=3) | st.lists(children, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=50)
@given(
    st.dictionaries(st.text(max_size=3), json_values, max_size=3),
    st.dictionaries(st.text(max_size=3), json_values, max_size=3),
)
def test_fingerprints_differ_exactly_when_values_do(left, right):
    same = json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)
    assert (fingerprint(left) == fingerprint(right)) == same
