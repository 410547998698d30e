"""Catches dropped pictures that stay where nobody asked, whose text is read, or whose neighbours are not the nearest."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from capfilt.data.neighbours import Neighbours
from capfilt.data.pair_shards import PairInput
from capfilt.data.pairs import Pairs
from capfilt.data.store import ArrayStore
from capfilt.data.tokenizer import Tokenizer
from capfilt.tables.ids import image_id, text_id
from capfilt.tables.workspace import Workspace
from tests.refusals import refused
from tests.worlds import image_rows, judged, write_images

WORDS = Tokenizer.train(["a red green blue white square number 0 1 2 3 4"], 300)
P = [0.95, 0.2, 0.1, 0.92, 0.3, 0.99, 0.4, 0.97, 0.7, 0.0, 0.98, 0.93]


def inputs(place, p=P):
    """12 web pictures of four colours in turn, kept where p is 0.5 or more, and 8 human ones with two texts each."""
    space = Workspace(place)
    web = write_images(space.part("images", "web"), [image_rows("web", 6), image_rows("web", 6, start=6)])
    human = write_images(space.part("images", "human"), [image_rows("human", 8, source="human", texts=2)])
    verdicts = judged(space, "web", "rule", p)
    return [PairInput(human), PairInput(web, verdicts)]


def rows_of(pairs, steps=9, batch=6, **more):
    return list(pairs.batches(WORDS, batch, steps=steps, **more))


def test_pictures_stay_whose_texts_are_all_below_the_threshold(tmp_path):
    given = inputs(tmp_path)
    plain, pairs = Pairs(given, size=16), Pairs(given, size=16, dropped=True)
    assert plain.texts_by_source() == {"human": 16, "web": 7}
    assert pairs.texts_by_source() == {"dropped": 5, "human": 16, "web": 7}
    assert pairs.drawn == 28
    names = [(name, text.key, text.text) for name, text in pairs.identities() if not text.kept]
    assert [name for name, _, _ in names] == [image_id("web", f"{n:05d}") for n in (1, 2, 4, 6, 9)]
    assert names[0][1] == text_id(names[0][0], "web", "a green square number 0", "", 0)
    assert all(text == "" for *_, text in names)
    # The counts of either stand, whichever was read last.
    assert len(Pairs(given, size=16)) == 23
    for batch in rows_of(pairs, seed=2):
        assert torch.equal(batch.weight == 0, batch.dropped)
        assert [not text for text in batch.texts] == batch.dropped.tolist()
        assert batch.mask.sum(dim=1)[batch.dropped].eq(2).all()
        assert batch.soft is None
        assert batch.pixels.shape == (6, 3, 16, 16)
    assert all(batch.dropped is None for batch in rows_of(plain))
    assert sum(batch.dropped.sum() for batch in rows_of(pairs, 14, 4)) == 10  # two epochs


def test_only_the_score_drops_a_picture_that_stays(tmp_path):
    space = Workspace(tmp_path)
    web = write_images(space.part("images", "web"), [image_rows("web", 4, texts=2)])
    # Of the first picture a text is kept, the second is below by both, the third fails a clause, the fourth has nothing.
    reasons = {0: "", 2: "", 3: "", 4: "require_false", 5: "require_false"}
    p = [0.2, 0.9, 0.3, 0.4, 0.3, 0.4, None, None]
    verdicts = judged(space, "web", "rule", p, reasons)
    pairs = Pairs([PairInput(web, verdicts)], size=16, dropped=True)
    assert pairs.texts_by_source() == {"dropped": 1, "web": 1}
    (left,) = [text for _, text in pairs.identities() if not text.kept]
    assert left.probability == pytest.approx(0.4), "the likeliest of its texts"


def flat(batches):
    names = ("ids", "example", "dropped", "weight", "soft", "near_ids", "near_mask", "features")
    found = []
    for batch in batches:
        for row in range(len(batch)):
            some = {name: getattr(batch, name) for name in names}
            found.append(
                {
                    # Widths are those of a rank's own longest.
                    name: each[row].tolist()
                    if each.dim() < 2
                    else [n for n in each[row].flatten().tolist() if n]
                    for name, each in some.items()
                    if each is not None
                }
            )
    return found


def colours(pixels):
    return pixels.float().mean(dim=(2, 3))[:, None] / 255


def soft(given):
    pairs = Pairs(given, size=16, dropped=True)
    pairs.with_features(colours)
    pairs.with_neighbours()
    return pairs


def test_neighbours_are_pictures_that_look_alike_and_come_after_the_first_steps(tmp_path):
    given = inputs(tmp_path)
    batches = rows_of(soft(given), 20, seed=4)
    assert [batch.soft is None for batch in batches] == [step < 6 for step in range(20)]
    # Pictures of a colour lie together: near are the 2 human ones of it, and the trusted ones.
    names, trusted = ("red", "green", "blue", "white"), Counter(n % 4 for n, p in enumerate(P) if p > 0.9)
    dropped = [n for n, p in enumerate(P) if p < 0.5]
    first = min(int(batch.example[batch.dropped].min()) for batch in batches if batch.dropped.any())
    order = {}
    for batch in batches[6:]:
        assert (batch.soft[~batch.dropped] == 0).all()
        for row in torch.nonzero(batch.dropped).flatten().tolist():
            both = zip(batch.near_ids[row], batch.near_mask[row], strict=True)
            near = [WORDS.decode(ids[mask].tolist()) for ids, mask in both]
            order.setdefault(int(batch.example[row]), []).append((near, float(batch.soft[row])))
    assert first >= 16
    for picture, (_, drawn) in zip(dropped, sorted(order.items()), strict=True):
        for near, weight in drawn:
            alike = 2 + trusted[picture % 4]
            assert sum(names[picture % 4] in text for text in near) == min(alike, 5), picture
            assert len(near) == 5
            assert weight == pytest.approx((1 - P[picture]) / 2)
    drawn = {tuple(near) for near, _ in order[min(order)]}
    assert len(drawn) > 1, "a text of each neighbour is drawn anew"


def test_resuming_ranks_and_a_second_reading_see_the_same_neighbours(tmp_path):
    given = inputs(tmp_path)
    whole = flat(rows_of(soft(given), 12, seed=1))
    assert flat(rows_of(soft(given), 12, seed=1, start_step=7)) == whole[42:]
    shares = [rows_of(soft(given), 12, seed=1, rank=rank, world=2) for rank in (0, 1)]
    both = [batch for pair in zip(*shares, strict=True) for batch in pair]
    assert flat(both) == whole
    assert flat(rows_of(soft(given), 12, seed=2)) != whole


def test_a_picture_is_not_its_own_neighbour_and_too_few_are_refused():
    angles = np.deg2rad([*range(0, 360, 45), 10])
    features = ArrayStore(9, (1, 2), np.float16)
    features.array[:] = np.stack([np.cos(angles), np.sin(angles)], axis=1)[:, None] + 3
    trusted = [(n, f"image {n}", 45 * n) for n in range(8)]
    assert Neighbours({8: "image 8"}, trusted, features).texts(8, [0]) == [0, 45, 315, 90, 270]
    assert Neighbours({8: "image 0"}, trusted, features).texts(8, [0]) == [45, 315, 90, 270, 135]
    with refused("--dropped soft", 5, 6):
        Neighbours({8: "image 8"}, trusted[:5], features)
