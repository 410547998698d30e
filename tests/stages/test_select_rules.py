"""Would catch: a synthetic text kept beside the web text that it stands in for, a worse text kept above a better one, a tie
that the number of workers decides, and captions that say nothing, or the same again, in a corpus.
"""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.execution.commit import process_and_commit
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_stage
from capfilt.stages.select import SelectOptions
from capfilt.stages.select.captions import bare, common_captions, degenerate, faults, named_words
from capfilt.stages.select.rules import RULES, decided
from capfilt.stages.select.stage import Select, WritePairs
from capfilt.tables.contracts import CAPTIONS, IMAGES, SCORES
from capfilt.tables.ids import text_id
from capfilt.tables.manifest import Counts
from capfilt.tables.texts import found_texts
from capfilt.tables.workspace import Workspace
from tests.refusals import names, refused
from tests.worlds import failed_row, image_rows, write_images

K = 3


def world(path, captions, score, web=None, lost=True):
    """Two shards of four pictures with a web text, `captions(n)` of the n-th and `score(source, n, place)` of each text."""
    place = Workspace(path / "ws")
    rows = image_rows("web", 8)
    for number, row in enumerate(rows):
        row["captions"] = [web(number)] if web else row["captions"]
    shards = [[*rows[:4], *([failed_row("web", "lost")] if lost else [])], rows[4:]]
    write_images(place.part("images", "web"), shards)
    written, scores = place.part("captions", "c"), place.part("scores", "filter")
    marks = written.begin(CAPTIONS, "test", {}), scores.begin(SCORES, "test", {})
    number = {row["image_id"]: n for n, row in enumerate(rows)}
    for shard, some in enumerate(shards):
        good = [row["image_id"] for row in some if row["image_id"] in number]
        made = [
            {
                "text_id": text_id(image, "synthetic", text, "c", k), "image_id": image, "text": text, "sample_index": k,
                "captioner": "c", "decoding": "nucleus",
            }
            for image in good
            for k, text in enumerate(captions(number[image]))
        ]  # fmt: skip
        written.commit(shard, CAPTIONS.table(made), Counts(len(good), len(good)), marks[0], 0.0)
        texts = found_texts(IMAGES.table(some)).to_pylist()
        every = [("web", t, 0) for t in texts if t["image_id"] in number]
        every += [("synthetic", t, t["sample_index"]) for t in made]
        judged = [
            {
                "text_id": t["text_id"], "image_id": t["image_id"], "itc_score": 0.1,
                "itm_score": score(source, number[t["image_id"]], k),
            }
            for source, t, k in every
        ]  # fmt: skip
        scores.commit(shard, SCORES.table(judged), Counts(len(judged), len(judged)), marks[1], 0.0)
    return place


def options_of(out="kept", **more):
    return SelectOptions("web", captions=("c",), out=out, **more)


def verdicts(place, **more):
    options = options_of(**more)
    summary = run_stage(Select(options, place), InlineExecutor(), quiet=True)
    rows = [row for table in place.part("verdicts", options.out).tables() for row in table.to_pylist()]
    dropped = Counter(row["reason"] for row in rows if not row["keep"])
    assert dropped == {**summary.counts.dropped, **summary.counts.failed}
    assert sum(row["keep"] for row in rows) == summary.counts.kept
    assert len(rows) == summary.counts.rows_in == summary.counts.kept + dropped.total()
    return rows, Select(options, place).remarks()


def texts(n):
    return [f"picture {n} as written {k}" for k in range(K)]


@pytest.fixture(scope="module")
def ties(tmp_path_factory):
    """Scores in tenths, so that many are equal."""

    def score(source, n, k):
        return round(float(np.random.default_rng([n, k, source == "web"]).random()), 1)

    return world(tmp_path_factory.mktemp("ties"), texts, score)


def by_picture(rows):
    found = {}
    for row in rows:
        found.setdefault(row["image_id"], []).append(row)
    return list(found.values())


def best_first(rows):
    return sorted(rows, key=lambda row: (-row["itm_score"], row["text_id"]))


@pytest.mark.parametrize("best", [1, 2])
@pytest.mark.parametrize("own", [0.0, 0.7])
def test_a_synthetic_text_stands_where_no_found_text_is_kept(ties, own, best):
    rows, _ = verdicts(
        ties, out=f"f{own}{best}", rule="fallback", best=best, threshold=0.5, synthetic_threshold=own
    )
    least, seen = own or 0.5, Counter()
    name = "synthetic_threshold" if own else "threshold"
    for texts in by_picture(rows):
        if "lost" in texts[0]["text"]:
            continue
        (web,) = (row for row in texts if row["source"] == "web")
        written = [row for row in texts if row["source"] == "synthetic"]
        assert web["keep"] == (web["itm_score"] >= 0.5)
        able = [row for row in best_first(written) if row["itm_score"] >= np.float32(least)]
        kept = [] if web["keep"] else able[:best]
        assert [row for row in best_first(written) if row["keep"]] == kept
        for row in written:
            wanted = (
                f"itm_score_below_{name}"
                if row not in able
                else "found_text_kept"
                if web["keep"]
                else "in_place_of_found"
                if row in kept
                else "better_text_kept"
            )
            assert row["reason"] == wanted
            seen[wanted] += 1
    assert {"found_text_kept", "in_place_of_found"} <= {*seen}


@pytest.mark.parametrize("best", [1, 2, 9])
def test_the_best_of_found_and_synthetic_texts_are_kept(ties, best):
    rows, _ = verdicts(ties, out=f"best{best}", rule="best", best=best, threshold=0.2)
    for texts in by_picture(rows):
        able = [row for row in texts if (row["itm_score"] or 0) >= np.float32(0.2)]
        assert {row["text_id"] for row in texts if row["keep"]} == {
            row["text_id"] for row in best_first(able)[:best]
        }
        assert all(row["reason"] == ("among_best" if row["keep"] else "better_text_kept") for row in able)
    run_stage(
        WritePairs(options_of(f"best{best}", rule="best", best=best, threshold=0.2), ties), InlineExecutor(), quiet=True
    )  # fmt: skip
    pairs = [row for table in ties.part("pairs", f"best{best}").tables() for row in table.to_pylist()]
    assert sum(len(row["texts"]) for row in pairs) == sum(row["keep"] for row in rows)
    assert max(len(row["texts"]) for row in pairs) == min(best, K + 1)


def test_a_share_is_of_found_texts_where_synthetic_ones_are_their_fallback(ties):
    """Nguyen's top 30% are of the raw texts; the synthetic ones pass the threshold that gives."""
    rows, _ = verdicts(ties, out="share", rule="fallback", keep_fraction=0.25)
    found = [row for row in rows if row["source"] == "web" and row["itm_score"] is not None]
    cut = sorted((row["itm_score"] for row in found), reverse=True)[1]
    assert {row["text_id"] for row in found if row["keep"]} == {
        row["text_id"] for row in found if row["itm_score"] >= cut
    }
    kept = [row for row in rows if row["keep"] and row["source"] == "synthetic"]
    assert kept
    assert min(row["itm_score"] for row in kept) >= cut


def test_rules_do_not_depend_on_who_makes_a_shard(ties):
    more = {"rule": "best", "best": 2, "keep_fraction": 0.5, "caption_share": 0.5}
    whole, _ = verdicts(ties, out="whole", **more)
    stage = Select(options_of("parts", **more), ties)
    mark = stage.begin()
    for shard in reversed(stage.shards()):
        process_and_commit(pickle.loads(pickle.dumps(stage)), mark, shard)
    parts = [row for table in ties.part("verdicts", "parts").tables() for row in table.to_pylist()]
    assert parts == whole


@given(st.data(), st.sampled_from(RULES[1:]), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_the_order_of_texts_decides_nothing(data, rule, best):
    count = data.draw(st.integers(1, 12))

    def some(values):
        return data.draw(st.lists(values, min_size=count, max_size=count))

    images = some(st.sampled_from("ab"))
    ids = [f"{n:02d}" for n in range(count)]
    synthetic, able = (np.array(some(st.booleans())) for _ in range(2))
    scores = np.array(some(st.sampled_from([0.1, 0.2, 0.3])))
    order = data.draw(st.permutations(range(count)))
    plain = decided(rule, best, images, ids, synthetic, scores, able)
    moved = decided(
        rule, best, [images[n] for n in order], [ids[n] for n in order], synthetic[order], scores[order], able[order]
    )  # fmt: skip
    assert [plain[n] for n in order] == moved


# -- captions that say nothing, or nothing new --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("", True), ("  . ", True), (None, True), ("dog dog", True), ("a dog dog dog dog", True), ("a man a man a man a", True),
        ("the cat. The cat! THE CAT", True), ("on on on on the grass", True), ("ha-ha ha-ha", True),
        ("a dog", False), ("dog", False), ("a very very big dog", False), ("a man and a man", False), ("青い四角", False),
        ("a red car and a red car parked", False), ("two dogs and two cats and two birds", False),
    ],
)  # fmt: skip
def test_a_caption_that_says_one_thing_over_and_over_is_degenerate(text, bad):
    assert degenerate(bare(text)) is bad


def test_a_hostile_caption_takes_no_time():
    """Would catch: a search whose time grows with the square of a text of a megabyte."""
    assert not degenerate(bare(" ".join(str(n) for n in range(200_000))))


CAPTIONED = {
    0: ["a dog", "A dog!", "a cat"],
    1: ["red red red", "a cup", "a plate"],
    2: ["A  Green square, number 0.", "a picture of", "a plate 2"],
    **{n: ["a picture of", f"thing {n}", "one"] for n in range(3, 8)},
}


def faulty(path):
    return world(
        path, CAPTIONED.__getitem__, lambda source, n, k: 0.9 - k / 10, lambda n: "a green square number 0"
    )


def test_degenerate_repeated_and_common_captions_are_dropped_by_name(tmp_path):
    place = faulty(tmp_path)
    rows, _ = verdicts(place, out="distinct", distinct=True, caption_share=0.6, threshold=0.0)
    numbers = {row["image_id"]: n for n, row in enumerate(image_rows("web", 8))}
    reasons = {
        (numbers[row["image_id"]], row["text"]): row["reason"]
        for row in rows
        if row["source"] == "synthetic" and not row["keep"]
    }
    assert reasons == {
        (0, "A dog!"): "repeated",  # it scores less than the other
        (1, "red red red"): "degenerate",
        (2, "A  Green square, number 0."): "repeated",
        **{(n, "a picture of"): "common" for n in range(2, 8)},
        **{(n, "one"): "common" for n in range(3, 8)},
    }
    plain, _ = verdicts(place, out="plain", threshold=0.0)
    assert all(row["keep"] for row in plain if row["source"] == "synthetic")
    # A bound is never by the way: the rules look for repeated texts, and not for common ones.
    ruled, _ = verdicts(place, out="ruled", threshold=0.0, rule="best", best=9)
    assert {row["text"] for row in ruled if row["reason"] in ("degenerate", "repeated")} == {
        text for (_, text), why in reasons.items() if why != "common"
    }
    assert not any(row["reason"] == "common" for row in ruled)


def test_a_share_of_kept_texts_is_not_of_captions_that_are_dropped_anyway(tmp_path):
    place = faulty(tmp_path)
    rows, _ = verdicts(place, out="half", distinct=True, caption_share=0.6, keep_fraction=0.5)
    left = [row for row in rows if row["reason"].startswith("itm_score")]
    cut = sorted((row["itm_score"] for row in left), reverse=True)[round(len(left) / 2) - 1]
    assert {row["text_id"] for row in rows if row["keep"]} == {
        row["text_id"] for row in left if row["itm_score"] >= cut
    }


def test_of_equal_captions_the_first_in_order_stays():
    found = faults([2, 0, 1], ["i", "i", "j"], ["a b", "a b", "a b"], [("j", "a b")], frozenset())
    assert found == {2: "repeated", 1: "repeated"}
    assert faults([1, 0], ["i", "i"], ["a b", "a b"], [], frozenset()) == {0: "repeated"}


def test_a_common_caption_is_counted_once_per_picture_over_all_shards():
    shards = [[("a", "x"), ("a", "x"), ("b", "y")], [("c", "x"), ("d", "z")]]
    assert common_captions(shards, 0.4) == {"x"}
    assert common_captions(shards, 0.5) == frozenset()
    assert common_captions([[("a", "x")]], 0.1) == frozenset()


def test_named_words_are_capitals_inside_and_numbers():
    assert named_words("The Eiffel Tower in 1999, Paris") == {"eiffel", "tower", "1999", "paris"}
    assert named_words("3 dogs. IKEA's shelf") == {"3", "ikea's"}
    assert named_words("A dog") == set()


def test_the_named_words_that_synthetic_texts_keep_are_told(tmp_path):
    place = world(
        tmp_path,
        lambda n: ["a tower in paris", "a thing 7"] if n else ["nothing kept", "at all"],
        lambda source, n, k: 0.1 if source == "web" or not n else 0.9 - k / 10,
        lambda n: "The Tower of Paris 1999",
    )
    _, remarks = verdicts(place, out="named", rule="fallback")
    assert any(names(line, "14", "21") for line in remarks), (
        remarks
    )  # seven pictures, two words of three each


def test_a_synthetic_text_without_a_score_is_dropped_by_name_and_told(tmp_path):
    place = world(tmp_path, texts, lambda source, n, k: 0.1 if source == "web" else None if n < 6 else 0.8)
    rows, remarks = verdicts(place, out="unscored", rule="fallback")
    assert sum(row["keep"] for row in rows) == 2
    assert sum(row["reason"] == "no_score" for row in rows if row["source"] == "synthetic") == 6 * K
    assert any(names(line, "warning", 6 * K, "itm_score", "no_score") for line in remarks), remarks


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"best": 2}, ("--best", 2, "--rule", "each")),
        ({"rule": "worst"}, ("--rule", "worst")),
        ({"rule": "best", "best": 0}, ("--best", 0)),
        ({"synthetic_threshold": 1.5}, ("--synthetic-threshold", 1.5, "itm_score")),
        ({"caption_share": 2.0}, ("--caption-share", 2)),
    ],
)
def test_rules_that_cannot_be_are_refused(ties, options, words):
    with refused(*words):
        Select(options_of("refused", **options), ties)


def test_a_part_of_another_rule_is_never_mixed_in(ties):
    def mark(more):
        stage = Select(options_of("marks", **more), ties)
        return stage.output.identity_fingerprint(stage.contract, stage.name, stage.full_identity())

    marks = {
        mark(more)
        for more in ({}, {"rule": "best"}, {"rule": "best", "best": 2}, {"rule": "fallback"}, {"distinct": True},
                     {"caption_share": 0.4}, {"synthetic_threshold": 0.7})
    }  # fmt: skip
    assert len(marks) == 7
