"""Catches: a training that reads all texts before its first step, counts that outlive the rows they were taken of, a text
that is left out and counted nowhere, and a part that may only be read and is therefore refused.
"""

from __future__ import annotations

from collections import Counter

import pytest

from capfilt.data import pair_shards as module
from capfilt.data.pair_shards import PairInput, PairShards
from capfilt.data.pairs import Pairs
from capfilt.tables.contracts import IMAGES, PAIRS, VERDICTS
from capfilt.tables.ids import image_id, text_id
from capfilt.tables.manifest import Counts, Successor
from capfilt.tables.shards import Part
from tests.refusals import refused
from tests.worlds import failed_row, image_rows, jpeg, write_images


def written(part: Part, contract, *shards: list[dict]) -> Part:
    mark = part.begin(contract, "test", {})
    for number, rows in enumerate(shards):
        part.commit(number, contract.table(rows), Counts(len(rows), len(rows)), mark, 0.1)
    return part


def verdict(image: str, text: str, keep: bool = True, source: str = "web") -> dict:
    number = text_id(image, source, text, "", 0)
    return {"text_id": number, "image_id": image, "source": source, "text": text, "keep": keep, "reason": "a"}


@pytest.fixture
def three(tmp_path) -> list[PairInput]:
    """Found texts, selected pairs, images joined with verdicts."""
    rows = [*image_rows("web", 150, texts=2), failed_row("web", "lost")]
    images = write_images(Part(tmp_path / "images"), [rows, image_rows("web", 3, start=200)])
    entry = {"source": "synthetic", "itm_score": None, "weight": None}
    kept = [
        {"image_id": "i0", "image": {"bytes": jpeg("red")}, "split": "train", "texts": [
            {"text": "kept", **entry, "weight": 1.0}, {"text": "made", **entry}, {"text": "", **entry}, None,
        ]},
        {"image_id": "i1", "image": {"bytes": jpeg("red")}, "split": "test", "texts": []},
    ]  # fmt: skip
    pairs = written(Part(tmp_path / "pairs"), PAIRS, kept)
    some = [image_id("web", f"{number:05d}") for number in (0, 1)]
    judged = [
        verdict(some[0], "kept"), verdict(some[0], "dropped", keep=False), verdict(some[1], "x", source="synthetic"),
        verdict("nowhere", "no such image"), verdict(some[0], "by a person", source="human"),
    ]  # fmt: skip
    verdicts = written(Part(tmp_path / "verdicts"), VERDICTS, judged, [])
    return [PairInput(images), PairInput(pairs), PairInput(images, verdicts)]


def test_every_kind_of_input_gives_its_texts_and_counts_the_others(three):
    images, pairs, joined = (Pairs([each], size=16) for each in three)
    assert (len(images), images.pictures) == (303, 153)
    assert (images.skipped, images.deselected) == ({"not_found": 1}, {})
    assert list(pairs.texts()) == ["kept", "made"]
    assert (pairs.skipped, pairs.deselected) == ({"empty_text": 2}, {"split": 1})
    assert [(text.text, text.source) for _, text in joined.identities()] == [
        ("kept", "web"), ("by a person", "human"), ("x", "synthetic"),
    ]  # fmt: skip
    assert joined.skipped == {"no_image": 1, "not_found": 1}
    assert joined.deselected == {"verdict": 1, "no_text": 151}
    every = Pairs(three, size=16)
    assert len(every) == 308
    assert every.texts_by_source() == {"human": 1, "synthetic": 3, "web": 304}
    assert every.skipped == {"not_found": 2, "empty_text": 2, "no_image": 1}


def looked_at(monkeypatch) -> Counter:
    """How often row groups are read for their texts alone."""
    found: Counter = Counter()
    original = PairShards.entries

    def entries(self, where, pictures, *rest):
        found["texts" if not pictures else "pictures"] += 1
        return original(self, where, pictures, *rest)

    monkeypatch.setattr(PairShards, "entries", entries)
    return found


def test_texts_are_counted_once_and_remembered(three, monkeypatch):
    found = looked_at(monkeypatch)
    first = Pairs(three, size=16)
    # Two row groups and one; one; the joined images once more.
    assert found["texts"] == 3 + 1 + 3
    for _ in range(2):
        found.clear()
        again = Pairs([PairInput(Part(each.part.path), each.verdicts) for each in three], size=16)
        assert found["texts"] == 0
        assert found["pictures"] <= 3  # one that decodes, of each input
        assert (len(again), again.pictures, again.skipped, again.deselected) == (
            len(first), first.pictures, first.skipped, first.deselected,
        )  # fmt: skip
    assert all(part.index_problem() is None for part in (three[0].part, three[1].part))


@pytest.mark.parametrize("change", ["generation", "verdicts", "rule", "bytes", "gone", "made up"])
def test_counts_are_taken_again_where_they_are_not_of_these_rows(three, monkeypatch, change):
    """Batches by the numbers of a shard that was retried, a rule that was changed, or a file that somebody edited."""
    images, _, joined = three
    Pairs([images, joined], size=16)
    path = images.part.record / "00000.pairs.json"
    if change == "generation":
        manifest = images.part.manifest(0)
        rows = [*image_rows("web", 150, texts=2), *image_rows("web", 1, start=170, texts=2)]
        images.part.commit(
            0, IMAGES.table(rows), Counts(151, 151), manifest.fingerprint, 0.1,
            successor=Successor(1, manifest.sha256),
        )  # fmt: skip
    elif change == "verdicts":
        rows = [verdict(image_id("web", "00000"), "one alone")]
        other = written(Part(joined.part.path.parent / "others"), VERDICTS, rows)
        (other.record / "00000.pairs.json").write_bytes(
            (joined.verdicts.record / "00000.pairs.json").read_bytes()
        )
        joined = PairInput(joined.part, other)
    elif change == "rule":
        monkeypatch.setattr(module, "RULE", module.RULE + 1)
    elif change == "gone":
        path.unlink()
    elif change == "made up":
        path.write_text('{"mark": 1}')
    else:
        path.write_bytes(path.read_bytes().replace(b'"web": 200', b'"web": 201'))
    found = looked_at(monkeypatch)
    source = Pairs([images, joined], size=16)
    assert found["texts"] > 0
    wanted = 305 if change == "generation" else 303
    assert len(source) == wanted + (1 if change == "verdicts" else 3)
    assert len(list(source.texts())) == len(source)


def test_a_part_that_may_only_be_read_is_counted_every_time(three, monkeypatch):
    def refuse(path, data):
        raise module.RunError(f"{path}: cannot be written")

    monkeypatch.setattr(module, "replace", refuse)
    assert len(Pairs(three, size=16)) == len(Pairs(three, size=16)) == 308
    assert not list(three[0].part.record.glob("*.pairs.json"))


def test_an_input_without_a_pair_is_refused_with_the_reasons(tmp_path):
    part = write_images(Part(tmp_path / "p"), [[failed_row("web", "lost")]])
    for _ in range(2):  # by counts that were taken, and by remembered ones
        with refused(tmp_path / "p", "training pair", "not_found 1"):
            Pairs([PairInput(part)], size=16)
    rows = image_rows("web", 2)
    for row in rows:
        row["image"] = {"bytes": b"broken", "path": None}
    part = write_images(Part(tmp_path / "q"), [rows])
    with refused(tmp_path / "q", "training pair", "no_picture 2"):
        Pairs([PairInput(part)], size=16)
