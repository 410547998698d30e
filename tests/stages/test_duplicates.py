"""Would catch: a pair of near pictures that bands miss, a cluster that depends on the order of rows or shards, a failed
row in a cluster, a copy that `select` keeps.
"""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.catalog.query import query
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_stage
from capfilt.stages.duplicates import DuplicatesOptions
from capfilt.stages.duplicates.stage import Duplicates, cluster, near_pairs
from capfilt.stages.select import SelectOptions
from capfilt.stages.select.stage import Select
from capfilt.tables.contracts import SCORES
from capfilt.tables.ids import text_id
from capfilt.tables.manifest import Counts
from capfilt.tables.workspace import Workspace
from tests.refusals import refused
from tests.worlds import failed_row, image_rows, write_images

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()), ("status", pa.string()), ("sha256", pa.string()), ("phash", pa.string()),
        ("original_width", pa.int32()), ("original_height", pa.int32()),
    ]
)  # fmt: skip


def row(name, body=None, phash=None, side=10, status="success"):
    return dict(zip(SCHEMA.names, (name, status, body, phash, side, side), strict=True))


def clusters(rows, distance=4):
    return cluster(pa.Table.from_pylist(rows, SCHEMA), distance).to_pylist()


def test_exact_and_near_join_into_components():
    rows = [
        row("d", "x", "00000000000000ff"),
        row("b", "x", "00000000000000ff", side=20),
        row("c", "y", "000000000000000f"),  # 4 bits from the first two
        row("a", "z", "0000000000000000"),  # 4 bits from c, 8 from the first two: joined by c
        row("e", "w", "ffffffffffffffff"),
        row("f", None, None),
        row("g", "v", None, status="failed_to_resize"),
    ]
    found = {each["image_id"]: each for each in clusters(rows)}
    assert [found[name]["cluster"] for name in "abcdefg"] == ["a", "a", "a", "a", "e", None, None]
    assert [found[name]["cluster_size"] for name in "abcdefg"] == [4, 4, 4, 4, 1, None, None]
    assert [found[name]["exact_cluster"] for name in "abcdefg"] == ["a", "b", "c", "b", "e", None, None]
    assert [found[name]["exact_size"] for name in "abcde"] == [1, 2, 1, 2, 1]
    # The largest of each cluster is kept.
    assert [found[name]["first"] for name in "abcdefg"] == [False, True, False, False, True, None, None]
    assert [each["image_id"] for each in clusters(rows)] == [each["image_id"] for each in rows]
    assert clusters([]) == []


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
@pytest.mark.parametrize("sides", [(10, 10), (9, 10), (None, None)])
def test_of_pictures_alike_in_size_the_smallest_id_is_kept(sides, order):
    """A tie that goes to the last one: `select` keeps another copy than the one that its cluster is named by."""
    given = [
        row("c", "x", "00000000000000ff", sides[0]),
        row("b", "x", "00000000000000ff", sides[1]),
        row("d", "x", "00000000000000ff", sides[1]),
        row("e", "y", "00000000000000fe", sides[1]),
    ]
    found = clusters([given[each] for each in order])
    assert [each["image_id"] for each in found if each["first"]] == ["b"]
    assert {each["cluster"] for each in found} == {"b"}


HASHES = st.integers(0, 2**64 - 1)
# Few bits set, so that near ones are common.
NEAR = st.lists(st.integers(0, 63), max_size=4).map(lambda bits: sum(1 << bit for bit in set(bits)))


@settings(deadline=None, max_examples=60)
@given(st.lists(HASHES | NEAR, max_size=30, unique=True), st.integers(0, 10))
def test_every_near_pair_is_found_and_no_other(values, distance):
    found = {tuple(sorted(pair)) for pair in near_pairs(np.array(values, np.uint64), distance)}
    places = itertools.combinations(range(len(values)), 2)
    assert found == {(a, b) for a, b in places if (values[a] ^ values[b]).bit_count() <= distance}


def test_pairs_across_blocks_are_found(monkeypatch):
    monkeypatch.setattr("capfilt.stages.duplicates.stage._BLOCK", 3)
    values = np.arange(10, dtype=np.uint64)
    found = {tuple(sorted(pair)) for pair in near_pairs(values, 4)}
    assert found == set(itertools.combinations(range(10), 2))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.sampled_from("uvwxyz"), NEAR), min_size=1, max_size=15), st.randoms())
def test_clusters_do_not_depend_on_the_order(pictures, random):
    rows = [row(f"{n:02d}", body, f"{phash:016x}") for n, (body, phash) in enumerate(pictures)]
    shuffled = random.sample(rows, len(rows))
    by_name = {each["image_id"]: each for each in clusters(shuffled)}
    assert [by_name[each["image_id"]] for each in clusters(rows)] == clusters(rows)


@pytest.fixture
def place(tmp_path):
    """Two shards; the second has the first's first picture again."""
    place = Workspace(tmp_path / "ws")
    first = [*image_rows("web", 3), failed_row("web", "lost")]
    copy = image_rows("web", 1, start=20)[0]
    for name in ("sha256", "phash", "original_width", "original_height"):
        copy[name] = first[0].get(name)
    rows = [first, [copy, *image_rows("web", 2, start=30)]]
    for number, each in enumerate(itertools.chain(*rows)):
        if each["status"] == "success":
            same = 0 if each["image_id"] == copy["image_id"] else number
            each |= {"sha256": f"{same:064x}", "phash": f"{(same * 0x9E3779B97F4A7C15) % 2**64:016x}"}
            each |= {"original_width": 10, "original_height": 10}
    write_images(place.part("images", "web"), rows)
    return place


def go(stage):
    with InlineExecutor() as work:
        return run_stage(stage, work, quiet=True)


def test_the_stage_marks_copies_over_all_shards_and_select_drops_them(place):
    summary = go(Duplicates(DuplicatesOptions("web"), place))
    assert (summary.counts.rows_in, summary.counts.kept, summary.counts.dropped) == (7, 6, {"no_image": 1})
    found = query(
        place, "SELECT cluster, count(*) n FROM signals WHERE cluster_size > 1 GROUP BY 1"
    ).to_pylist()
    ids = [place.part("images", "web").read(shard)["image_id"].to_pylist() for shard in (0, 1)]
    assert found == [{"cluster": min(ids[0][0], ids[1][0]), "n": 2}]
    assert go(Duplicates(DuplicatesOptions("web"), place)).done_now == 0

    images, scores = place.part("images", "web"), place.part("scores", "filter")
    mark = scores.begin(SCORES, "made", {})
    for shard in images.shards():
        rows = [
            {"text_id": text_id(each["image_id"], each["source"], text, "", n), "image_id": each["image_id"],
             "itm_score": 0.9}
            for each in images.read(shard).to_pylist() for n, text in enumerate(each["captions"])
        ]  # fmt: skip
        scores.commit(shard, SCORES.table(rows), Counts(len(rows), len(rows)), f"{mark}{shard}", 1.0)
    plain = go(Select(SelectOptions("web"), place)).counts
    assert plain.dropped == {"no_image": 1}
    unique = SelectOptions("web", signals=("duplicates",), require="duplicates.first", out="unique")
    counts = go(Select(unique, place)).counts
    copy = max(ids[0][0], ids[1][0])
    texts = query(place, f"SELECT count(*) n FROM texts WHERE image_id = '{copy}'").to_pylist()[0]["n"]
    assert counts.dropped["require_false"] == texts > 0
    assert counts.kept == plain.kept - texts


def test_a_wrong_distance_is_named(place):
    with refused("--distance 11"):
        Duplicates(DuplicatesOptions("web", distance=11), place)


@pytest.mark.parametrize(
    "wrong", ["", "xyz", "0" * 15, "0" * 17, "-000000000000001", " 00000000000000f", "g" * 16]
)
def test_a_malformed_hash_is_a_fault_of_its_row(tmp_path, wrong):
    """Would catch: a traceback of int() or of an overflow for a hash that another tool wrote, or its row lost silently."""
    place = Workspace(tmp_path)
    rows = [{**row, "phash": "00000000000000ff", "sha256": None} for row in image_rows("web", 3)]
    rows[1]["phash"] = wrong
    rows[2] |= {"phash": "000000000000000f"}
    rows.append(failed_row("web", "lost", phash=wrong))
    write_images(place.part("images", "web"), [rows])
    summary = run_stage(Duplicates(DuplicatesOptions(images="web"), place), InlineExecutor(), quiet=True)
    assert (summary.counts.kept, summary.counts.dropped, summary.counts.failed) == (
        2,
        {"no_image": 1},
        {"decode_error": 1},
    )
    found = place.part("signals", "duplicates").read(0).to_pylist()
    assert [each["first"] is not None for each in found] == [True, False, True, False]
    assert "1 perceptual hashes are not 16 hexadecimal digits" in "\n".join(summary.lines())


def test_the_end_says_how_many_were_found(tmp_path):
    """Would catch: a stage that finds copies and tells nobody how many, so that nobody uses them."""
    place = Workspace(tmp_path)
    rows = [
        {**row, "phash": None, "sha256": body}
        for row, body in zip(image_rows("web", 6), "aaabbc", strict=True)
    ]
    write_images(place.part("images", "web"), [rows[:4], [*rows[4:], failed_row("web", "lost")]])
    stage = Duplicates(DuplicatesOptions(images="web", out="d"), place)
    for _ in range(2):
        said = run_stage(stage, InlineExecutor(), quiet=True).lines()
        assert (
            "  6 pictures: 2 clusters with 3 copies; capfilt select --signals d --require first keeps one picture of each"
            in said
        )
