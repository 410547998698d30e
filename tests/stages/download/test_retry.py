"""Would catch: a retry that asks for what succeeded, that writes over the old generation, that mixes rows of other
options, or that leaves a half one behind; a reader that sees the old generation, or both.
"""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace

import pyarrow.dataset as ds
import pytest

from capfilt.catalog.query import query
from capfilt.doctor import workspace as doctor
from capfilt.execution.commit import process_and_commit
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_stage, todo
from capfilt.stages.download import DownloadOptions
from capfilt.stages.download.retry import Retry
from capfilt.tables.publish import link_new
from capfilt.tables.workspace import Workspace
from tests.refusals import refused
from tests.stages.download.web import BODIES, Handler, make, needs_img2dataset, run

pytestmark = needs_img2dataset


@pytest.fixture
def failed(tmp_path, server):
    """A part of two shards: the first has a row that fails once and one that is gone, the second is whole."""
    server.once.clear()
    urls = [server.url(path) for path in ("good", "flaky/r", "404", "good", "wide", "good")]
    stage = make(tmp_path, urls, server, number_sample_per_shard=3, image_size=100)
    run(stage)
    server.log.clear()
    return stage


def retry(stage, **options):
    given = DownloadOptions(retry="failed", allow_host=stage.options.allow_host, **options)
    return Retry(given, Workspace(stage.output.path.parents[1]))


class Here(InlineExecutor):
    """Leaves the child process to the next test: its imports take seconds."""

    def shards(self, stage, mark, todo):
        for shard in todo:
            yield process_and_commit(stage, mark, shard)


def go(stage):
    return run_stage(stage, Here(), quiet=True)


def test_only_failed_rows_are_asked_for_and_the_old_generation_stays(failed, server):
    before = {path.name: path.read_bytes() for path in failed.output.path.glob("0*.parquet")}
    old = failed.output.read(0).to_pylist()
    summary = go(retry(failed))
    assert Counter(server.log) == {"/flaky/r": 1, "/404": 1}
    assert summary.counts.failed == {"not_found": 1}
    assert (summary.done_before, summary.done_now) == (1, 1)
    kept = {0: failed.output.record / "00000.g0.parquet", 1: failed.output.path / "00001.parquet"}
    assert {f"{shard:05d}.parquet": path.read_bytes() for shard, path in kept.items()} == before

    new = failed.output.read(0).to_pylist()
    assert new[0] == old[0]
    assert new[2] == old[2]
    assert [row["failure"] for row in new] == [None, None, "not_found"]
    assert new[1]["image"]["bytes"]
    assert (new[1]["key"], new[1]["captions"]) == (old[1]["key"], old[1]["captions"])
    manifest = failed.output.manifest(0)
    assert manifest.generation == 1
    assert failed.output.manifest(1).generation == 0

    # Every reader sees each row once, of the newest generation: ours, and those that take every file of the folder.
    place = Workspace(failed.output.path.parents[1])
    assert query(place, "SELECT count(*) n, count(failure) f FROM images").to_pylist() == [{"n": 6, "f": 1}]
    found = ds.dataset(failed.output.path, format="parquet").to_table(["failure"])["failure"]
    assert (len(found), len(found) - found.null_count) == (6, 1)
    assert all(good for good, _ in doctor(str(place.path), full=True))

    # Nothing changed the second time, so nothing is written.
    files = sorted(path.name for path in failed.output.record.iterdir())
    go(retry(failed))
    assert sorted(path.name for path in failed.output.record.iterdir()) == files
    # The download itself is done, whatever its generations.
    assert todo(failed, failed.begin()) == ([], [0, 1])


def test_failures_narrow_a_retry(failed, server):
    go(retry(failed, failure=("http_error",)))
    assert server.log == ["/flaky/r"]
    assert go(retry(failed, failure=("timeout",))).done_now == 0
    with refused("--failure gone"):
        retry(failed, failure=("gone",))


def test_a_retry_makes_rows_as_the_part_was_made(failed, server):
    go(retry(failed, timeout=7.0))
    row = failed.output.read(0).to_pylist()[1]
    assert row["failure"] is None
    assert failed.output.manifest(0).changed == {"timeout": 7.0}
    with refused("--image-size 100"):
        retry(failed, image_size=64)
    other = make(
        failed.output.path.parents[2], ["http://a.invalid/"], name="other", number_sample_per_shard=3
    )
    with refused(other.options.url_list, "another list"):
        retry(failed, url_list=str(other.options.url_list))
    assert retry(failed, url_list=failed.options.url_list).expected_rows(0) == 1
    with refused("images/nowhere"):
        Retry(DownloadOptions(retry="failed", dataset="nowhere"), Workspace(failed.output.path.parents[1]))


def test_a_killed_retry_leaves_the_old_generation_and_is_adopted(failed, server, monkeypatch):
    """Between the file and its manifest: the next attempt finds a whole file that nothing vouches for."""
    stage = retry(failed)

    def dies_at_the_manifest(attempt, path):
        if path.name.endswith(".manifest.json"):
            raise KeyboardInterrupt
        return link_new(attempt, path)

    monkeypatch.setattr("capfilt.tables.shards.link_new", dies_at_the_manifest)
    with pytest.raises(KeyboardInterrupt):
        go(stage)
    monkeypatch.undo()
    assert (failed.output.record / "00000.g1.parquet").is_file()
    assert failed.output.manifest(0).generation == 0
    assert failed.output.read(0)["failure"].to_pylist() == [None, "http_error", "not_found"]
    go(retry(failed))
    assert failed.output.manifest(0).generation == 1
    assert failed.output.read(0)["failure"].to_pylist() == [None, None, "not_found"]


def test_of_two_retries_at_once_one_counts(failed, server):
    mark = failed.begin()
    one, other = retry(failed), retry(failed)
    made = [stage.process(0) for stage in (one, other)]
    for stage, produced in zip((one, other), made, strict=True):
        fingerprint = stage.shard_fingerprint(mark, 0)
        stage.output.commit(
            0, produced.table, produced.counts, fingerprint, 1.0, successor=produced.successor
        )
    manifests = sorted(path.name for path in failed.output.record.glob("*.manifest.json"))
    assert manifests == ["00000.g1.manifest.json", "00000.manifest.json", "00001.manifest.json"]


def test_what_was_made_from_the_old_generation_does_not_pass_for_made_from_the_new(failed):
    from capfilt.stages.duplicates import DuplicatesOptions
    from capfilt.stages.duplicates.stage import Duplicates

    place = Workspace(failed.output.path.parents[1])
    go(Duplicates(DuplicatesOptions("web"), place))
    go(retry(failed))
    with refused("identity"):
        go(Duplicates(DuplicatesOptions("web"), place))


def test_a_first_generation_is_described_as_before_there_were_others(failed):
    manifest = failed.output.manifest(0)
    assert (manifest.generation, manifest.previous, manifest.changed) == (0, "", {})


def test_a_retry_needs_the_hashes_it_has_to_compare(tmp_path, server):
    (tmp_path / "urls.csv").write_text(f"url,sha256\n{server.url('flaky/h')},{'0' * 64}\n")
    options = DownloadOptions(
        url_list=str(tmp_path / "urls.csv"), caption_col="", verify_hash="sha256",
        allow_host=(f"127.0.0.1:{server.port}",),
    )  # fmt: skip
    from capfilt.stages.download.stage import Download

    place = Workspace(tmp_path / "ws")
    assert [row["failure"] for row in run(Download(options, place))] == ["http_error"]
    with refused("--retry", "--verify-hash"):
        Retry(DownloadOptions(retry="failed"), place)
    go(Retry(replace(options, retry="failed"), place))
    assert place.part("images", "web").read(0)["failure"].to_pylist() == ["hash_mismatch"]


def test_what_is_given_wins_over_what_the_part_was_made_with_also_at_its_default(tmp_path, server):
    """Would catch: a retry that takes `--timeout 10` for nothing given, because 10 is the default."""
    made = make(tmp_path, [server.url("404")], server, timeout=1.0, retries=2, host_rate=5.0, image_size=100)
    run(made)
    place = Workspace(tmp_path / "ws")
    plain = Retry(DownloadOptions(retry="failed"), place)
    assert (plain.options.timeout, plain.options.retries, plain.options.host_rate) == (1.0, 2, 5.0)
    assert plain.changed == {}
    options = DownloadOptions(
        retry="failed", timeout=10.0, retries=0, host_rate=0.0, allow_host=(), total_timeout=2.0
    )
    given = Retry(options, place)
    assert (given.options.timeout, given.options.retries, given.options.host_rate) == (10.0, 0, 0.0)
    assert given.changed == {"timeout": 10.0, "retries": 0, "host_rate": 0.0, "allow_host": []}
    assert pickle.loads(pickle.dumps(given)).options.timeout == 10.0
    with refused("--image-size 100"):
        Retry(DownloadOptions(retry="failed", image_size=256), place)


def test_the_command_line_and_recipes_tell_what_was_given(tmp_path, monkeypatch):
    """Would catch: a command that passes every option on, so that nobody knows which ones were typed."""
    from capfilt import cli
    from capfilt.recipe import load_recipe, resolve

    seen = []
    monkeypatch.setattr(
        cli, "run_stages", lambda command, options, workspace, **_: seen.append((options, workspace))
    )
    words = [
        "download",
        "--retry",
        "failed",
        "--timeout",
        "10",
        "--no-robots",
        "--allow-host",
        "",
        "-w",
        "ws",
    ]
    assert cli._run(words) == 0
    assert cli._run(["download", "u.csv", "--image_size", "256"]) == 0
    assert [options.given for options, _ in seen] == [
        {"retry", "timeout", "robots", "allow_host"},
        {"url_list", "image_size"},
    ]
    assert (seen[0][0].allow_host, seen[0][1], seen[1][0].retry) == (("",), "ws", "")
    path = tmp_path / "again.yaml"
    path.write_text("version: 1\nstages:\n- {stage: download, options: {retry: failed, timeout: 10}}\n")
    [(_, options)] = resolve(load_recipe(str(path))[1], ["download.retries=0"])
    assert (options.given, options.timeout) == ({"retry", "timeout", "retries"}, 10.0)


@pytest.mark.parametrize("fault", ["503", "silent", "404"])
def test_a_retry_that_gets_no_body_keeps_what_is_known_of_the_one_that_came(
    tmp_path, server, monkeypatch, fault
):
    """Would catch: `too_small` with its size and hash replaced by a server's bad day."""
    monkeypatch.setitem(BODIES, "shrunk", BODIES["tiny"])
    urls = [server.url("shrunk"), server.url("flaky/k"), server.url("503")]
    server.once.clear()
    stage = make(tmp_path, urls, server, min_image_size=10)
    before = run(stage)
    assert [row["failure"] for row in before] == ["too_small", "http_error", "http_error"]
    monkeypatch.delitem(BODIES, "shrunk")
    monkeypatch.setattr(Handler, "alias", {"shrunk": fault})
    go(retry(stage))
    after = stage.output.read(0).to_pylist()
    assert after[0] == before[0]
    assert [row["failure"] for row in after] == ["too_small", None, "http_error"]
    # A body of another kind is news.
    monkeypatch.setattr(Handler, "alias", {"shrunk": "html"})
    go(retry(stage))
    assert stage.output.read(0)["failure"].to_pylist() == ["not_an_image", None, "http_error"]
