"""Catches weights that no training honours, a text of weight 0 that is seen, and ones that move the order of others."""

from __future__ import annotations

from collections import Counter

import pytest

from capfilt.data.pair_shards import PairInput
from capfilt.data.pairs import Pairs
from capfilt.data.tokenizer import Tokenizer
from capfilt.tables.contracts import PAIRS
from capfilt.tables.manifest import Counts
from capfilt.tables.workspace import Workspace
from tests.refusals import refused
from tests.worlds import image_rows

WEIGHTS = [1.0, 0.5, 0.25, 0.0, 0.1, 1.0, 0.75, None]


def corpus(place, weights, name="kept", texts=1):
    """A pairs part of two row groups' worth of shards; the n-th picture's texts weigh `weights[n]`."""
    rows = []
    for row, weight in zip(image_rows("web", len(weights)), weights, strict=True):
        entry = {"source": "web", "itm_score": 0.9, "weight": weight}
        row["texts"] = [{"text": f"text {row['key']} {n}", **entry} for n in range(texts)]
        rows.append(
            {k: row[k] for k in ("image_id", "dataset", "key", "url", "image", "texts", "width", "height")}
        )
    part = Workspace(place).part("pairs", name)
    mark = part.begin(PAIRS, "test", {"weights": [str(w) for w in weights]})
    half = len(rows) // 2
    for shard, some in enumerate((rows[:half], rows[half:])):
        part.commit(shard, PAIRS.table(some), Counts(len(some), len(some), {}, {}), mark, 0.01)
    return [PairInput(part)]


WORDS = Tokenizer.train(["text 0 1 2 3 4 5 6 7"], 300)


def seen(pairs, steps, batch=4, **more):
    return [batch.example.tolist() for batch in pairs.batches(WORDS, batch, steps=steps, **more)]


def test_a_text_is_drawn_in_the_share_of_epochs_that_it_weighs(tmp_path):
    pairs = Pairs(corpus(tmp_path, WEIGHTS), size=16)
    shares = [1.0 if weight is None else weight for weight in WEIGHTS]
    assert pairs.drawn == pytest.approx(sum(shares))
    assert len(pairs) == len(WEIGHTS)
    epochs = 40
    steps = round(epochs * sum(shares) / 4)
    counts = Counter(number for batch in seen(pairs, steps, seed=3) for number in batch)
    for number, share in enumerate(shares):
        # Evenly spaced: never more than one draw off, and one for the epoch that is cut.
        assert abs(counts[number] - share * epochs) <= 2, number
    assert counts[3] == 0


def test_weights_of_one_move_nothing(tmp_path):
    plain = seen(Pairs(corpus(tmp_path, [1.0] * 8, "plain"), size=16), 9, seed=5)
    null = seen(Pairs(corpus(tmp_path, [None] * 8, "null"), size=16), 9, seed=5)
    ignored = seen(Pairs(corpus(tmp_path, WEIGHTS, "ignored"), size=16, weights="ignore"), 9, seed=5)
    assert plain == null == ignored


@pytest.mark.parametrize("mixing", [None, {"web": 1.0}])
def test_resuming_ranks_and_streams_see_the_same(tmp_path, mixing):
    inputs = corpus(tmp_path, WEIGHTS * 3, texts=2)
    whole = seen(Pairs(inputs, size=16), 20, seed=1, mixing=mixing)
    assert seen(Pairs(inputs, size=16, cache=0), 20, seed=1, mixing=mixing) == whole
    # A second time the counts come from the part's record.
    for start in (1, 7, 13):
        assert seen(Pairs(inputs, size=16), 20, seed=1, start_step=start, mixing=mixing) == whole[start:]
    shared = [seen(Pairs(inputs, size=16), 20, seed=1, rank=rank, world=2, mixing=mixing) for rank in (0, 1)]
    assert [one + other for one, other in zip(*shared, strict=True)] == whole


def test_weights_that_cannot_be_are_refused(tmp_path):
    with refused("weight 2", "image"):
        Pairs(corpus(tmp_path, [1.0, 2.0], "two"), size=16)
    with refused("weight nan"):
        Pairs(corpus(tmp_path, [1.0, float("nan")], "nan"), size=16)
    nothing = Pairs(corpus(tmp_path, [0.0, 0.0], "nothing"), size=16)
    with refused("--weights"):
        nothing.batches(WORDS, 2, steps=1)


def test_weights_that_enter_the_losses_come_with_the_batch_and_move_no_order(tmp_path):
    inputs = corpus(tmp_path, WEIGHTS, texts=2)
    pairs = Pairs(inputs, size=16, weights="loss")
    assert pairs.drawn == len(pairs) == 16
    assert seen(pairs, 9, seed=5) == seen(Pairs(inputs, size=16, weights="ignore"), 9, seed=5)
    weights = [1.0 if weight is None else weight for weight in WEIGHTS]
    for batch in pairs.batches(WORDS, 4, steps=9, seed=5):
        assert batch.weight.tolist() == pytest.approx([weights[each // 2] for each in batch.example.tolist()])
    for same, how in ((WEIGHTS, "draws"), (WEIGHTS, "ignore"), ([1.0] * 8, "loss")):
        others = Pairs(corpus(tmp_path / how, same), size=16, weights=how)
        # Without weights, losses are computed as ever, to the last bit.
        assert all(batch.weight is None for batch in others.batches(WORDS, 4, steps=2))
