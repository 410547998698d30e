"""Would catch: five captions per image taken for granted, ties won by the luck of a sort, a right answer outside the
top k counted as found, ITM probability in place of the logit, tokens of one image matched with another's texts, and a
result that depends on block sizes, on the order of images, or on what fitted into memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.tasks import retrieval
from capfilt.tasks.retrieval import (
    Candidates,
    evaluate_retrieval,
    from_embeddings,
    from_scores,
    match_ids,
    nominate,
    rerank,
)
from tests.refusals import failed, refused


def brute_ranks(scores, owner):
    """(image ranks, text ranks), pair by pair, ties and NaN against the model."""
    images, texts = scores.shape

    def rank(row, right):
        best = max((row[j] for j in right if not math.isnan(row[j])), default=math.nan)
        return 1 + sum(not (row[j] < best) for j in range(len(row)) if j not in right)

    image_ranks = []
    for i in range(images):
        right = [j for j in range(texts) if owner[j] == i]
        image_ranks.append(rank(list(scores[i]), right) if right else 0)
    return image_ranks, [rank(list(scores[:, j]), [owner[j]]) for j in range(texts)]


@st.composite
def score_sets(draw):
    images = draw(st.integers(1, 7))
    owner = draw(st.lists(st.integers(0, images - 1), min_size=1, max_size=20))
    value = st.one_of(st.integers(-2, 2).map(float), st.just(math.nan))
    cells = draw(st.lists(value, min_size=images * len(owner), max_size=images * len(owner)))
    return np.array(cells).reshape(images, len(owner)), np.array(owner)


@given(score_sets())
@settings(max_examples=100, deadline=None)
def test_ranks_are_those_counted_pair_by_pair(case):
    scores, owner = case
    result = from_scores(scores, owner)
    image_ranks, text_ranks = brute_ranks(scores, owner.tolist())
    assert result.image_ranks.tolist() == image_ranks
    assert result.text_ranks.tolist() == text_ranks
    asked = [r for r in image_ranks if r]
    assert result.metrics["tr@5"] == pytest.approx(100 * np.mean([r <= 5 for r in asked]))
    assert result.metrics["ir@1"] == pytest.approx(100 * np.mean([r <= 1 for r in text_ranks]))
    six = [v for k, v in result.metrics.items() if k != "r_mean"]
    assert len(six) == 6
    assert result.metrics["r_mean"] == pytest.approx(np.mean(six))


def test_by_hand():
    # Image 0 has texts 0 and 1, image 1 has text 2, image 2 has none.
    scores = np.array([[0.9, 0.1, 0.5], [0.8, 0.7, 0.6], [0.2, 0.3, 0.7]])
    result = from_scores(scores, [0, 0, 1])
    assert result.image_ranks.tolist() == [1, 3, 0]  # image 0's text 0 is best; image 1's text 2 is third
    assert result.text_ranks.tolist() == [1, 3, 2]
    assert result.metrics["tr@1"] == 50.0  # of two queries: image 2 asks none
    assert result.metrics["ir@1"] == pytest.approx(100 / 3)
    assert result.hits("tr@1").tolist() == [True, False]
    assert result.groups("tr@1").tolist() == [0, 1]
    assert result.hits("ir@2").tolist() == [True, False, True]
    assert result.groups("ir@2").tolist() == [0, 0, 1]


def test_a_model_that_gives_everything_one_score_finds_nothing():
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(100), 5)
    same = np.tile(rng.standard_normal(64) / 8, (100, 1))
    result = from_embeddings(same, np.repeat(same, 5, axis=0), owner)
    assert set(result.metrics.values()) == {0.0}
    assert (result.image_ranks == 1 + 495).all()
    assert (result.text_ranks == 100).all()


def test_equal_texts_of_two_images_tie_whatever_tile_they_fall_into():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((257, 255))
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    # Every image has the same two texts: its own picture and its neighbour's. Each scores as the neighbour's copy does.
    texts = np.concatenate([images, np.roll(images, -1, axis=0)])
    owner = np.tile(np.arange(257), 2)
    result = from_embeddings(images, texts, owner)
    assert (result.image_ranks == 2).all()


def test_embeddings_in_blocks_equal_the_whole_matrix(monkeypatch):
    rng = np.random.default_rng(3)
    owner = rng.integers(0, 40, 130)
    images, texts = rng.standard_normal((40, 16)), rng.standard_normal((130, 16))
    whole = from_scores(images.astype(np.float32) @ texts.astype(np.float32).T, owner)
    monkeypatch.setattr(retrieval, "_BLOCK", 300)
    blocks = from_embeddings(images, torch.from_numpy(texts), owner, tie=0.0)
    assert (blocks.image_ranks == whole.image_ranks).all()
    assert (blocks.text_ranks == whole.text_ranks).all()
    assert blocks.metrics == whole.metrics


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_the_order_of_images_and_texts_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    images, count = int(rng.integers(1, 20)), int(rng.integers(1, 60))
    owner = rng.integers(0, images, count)
    # Small integers: many ties, and exact in any order of summation.
    a, b = rng.integers(-2, 3, (images, 4)), rng.integers(-2, 3, (count, 4))
    first, second = rng.permutation(images), rng.permutation(count)
    moved = np.argsort(first)[owner][second]
    one, two = from_embeddings(a, b, owner), from_embeddings(a[first], b[second], moved)
    assert one.metrics == two.metrics
    assert (one.image_ranks[first] == two.image_ranks).all()
    assert (one.text_ranks[second] == two.text_ranks).all()


@given(score_sets(), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_reranking_equals_a_full_matrix_with_the_others_excluded(case, k, seed):
    _, owner = case
    rng = np.random.default_rng(seed)
    images, texts = int(owner.max()) + 1, len(owner)
    a = rng.integers(-1, 2, (images, 3)).astype(np.float32)
    b = rng.integers(-1, 2, (texts, 3)).astype(np.float32)
    cosine = a @ b.T
    logit = rng.integers(-2, 3, cosine.shape).astype(float)
    logit[rng.random(cosine.shape) < 0.05] = math.nan
    ids = np.arange(images)
    found = nominate(a, b, ids, owner, k)
    full = np.full(cosine.shape, -np.inf)
    for i in range(images):
        # Best first; among equals the wrong ones, as ties count against the model.
        order = sorted(range(texts), key=lambda j: (-cosine[i, j], owner[j] == i))[:k]
        assert sorted(cosine[i, order]) == sorted(found.cosines[i])
        right = {j for j in order if owner[j] == i}
        assert len(right) == sum(owner[j] == i for j in found.items[i])
        full[i, found.items[i]] = (logit + cosine)[i, found.items[i]]
    ranks = rerank(found, np.take_along_axis(logit, found.items, axis=1), ids, owner)
    for i in range(images):
        right = [j for j in range(texts) if owner[j] == i]
        usable = [full[i, j] for j in right if full[i, j] > -np.inf]
        if not right:
            expected = 0
        elif usable:
            expected = 1 + sum(not full[i, j] < max(usable) for j in found.items[i] if owner[j] != i)
        else:
            expected = 1 + texts - len(right)
        assert ranks[i] == expected


def test_a_right_answer_that_was_not_nominated_is_not_found():
    images, texts = np.eye(3), np.array([[0.1, 1, 0], [1, 0, 0], [0, 0, 1.0]])
    found = nominate(images, texts, np.arange(3), np.arange(3), 1)
    assert found.items[:, 0].tolist() == [1, 0, 2]
    # However sure the matcher is of what it was given.
    assert rerank(found, np.full((3, 1), 50.0), np.arange(3), np.arange(3)).tolist() == [3, 3, 1]


def test_nan_is_no_way_into_the_candidates_for_a_right_answer():
    texts = np.array([[math.nan, 0], [0.5, 0], [0.4, 0]])
    found = nominate(np.array([[1.0, 0]]), texts, [0], [0, 1, 1], 2)
    assert sorted(found.items[0].tolist()) == [1, 2]
    found = nominate(np.array([[1.0, 0]]), texts, [0], [1, 0, 1], 1)
    assert found.items.tolist() == [[0]]


def test_fused_scores_within_rounding_are_tied():
    found = Candidates(np.array([[0, 1]]), np.array([[0.5, 0.5]], dtype=np.float32))
    assert rerank(found, [[3.000001, 3.0]], [0], [0, 1]).tolist() == [2]
    assert rerank(found, [[3.001, 3.0]], [0], [0, 1]).tolist() == [1]


def test_ids_may_be_anything_and_are_checked():
    assert match_ids(["b", "a"], ["a", "b", "a"]).tolist() == [1, 0, 1]
    with refused("image ids", "once"):
        match_ids(["a", "a"], ["a"])
    with refused("c"):
        match_ids(["a", "b"], ["a", "c"])
    with refused("retrieval", "texts"):
        match_ids(["a"], [])


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="fit together"):
        from_embeddings(np.zeros((2, 3)), np.zeros((2, 4)), [0, 1])
    with pytest.raises(ValueError, match="image indices"):
        from_embeddings(np.zeros((2, 3)), np.zeros((2, 3)), [0])
    with pytest.raises(ValueError, match="reach"):
        from_embeddings(np.zeros((2, 3)), np.zeros((2, 3)), [0, 2])
    with pytest.raises(ValueError, match="do not fit"):
        from_scores(np.zeros((2, 3)), [0, 1])
    with pytest.raises(ValueError, match="mrr"):
        from_scores(np.eye(2), [0, 1]).hits("mrr")


class Words:
    """A model one can compute by hand: an image is a number, its tokens repeat it; a text names a number.

    Embeddings see the number modulo 10 only; the matcher sees all of it.
    """

    def __init__(self):
        self.encoded = 0
        self.matched = []

    def encode_images(self, batch):
        self.encoded += len(batch)
        return batch[:, None, None].float().expand(-1, 3, 2)

    def embed_images(self, tokens):
        return torch.nn.functional.one_hot(tokens[:, 0, 0].long() % 10, 10).float()

    def embed_texts(self, texts):
        return torch.nn.functional.one_hot(torch.tensor([int(t) % 10 for t in texts]), 10).float()

    def match(self, tokens, index, texts):
        assert (torch.diff(index) >= 0).all()
        numbers = tokens[index, 0, 0]
        self.matched += list(zip(numbers.long().tolist(), map(int, texts), strict=True))
        return -(numbers - torch.tensor([float(t) for t in texts])).abs()

    def match_probability(self, tokens, index, texts):
        raise AssertionError("re-ranking adds logits")


def numbers(count=30, seed=0):
    """Images 0..count-1 in some order, with 0 to 3 texts each, as batches of 7."""
    rng = np.random.default_rng(seed)
    values = rng.permutation(count)
    batches = list(torch.from_numpy(values).split(7))
    owners = np.repeat(values, rng.integers(0, 4, count))
    rng.shuffle(owners)
    return batches, [f"id{v}" for v in values], [str(v) for v in owners], [f"id{v}" for v in owners]


@pytest.mark.parametrize("memory", [0, 200, 2**30])
def test_reranking_finds_what_embeddings_confuse_within_any_memory(memory):
    batches, ids, texts, owners = numbers()
    model = Words()
    found = evaluate_retrieval(
        model, batches, ids, texts, owners, rerank_k=12, text_batch=4, token_memory=memory
    )
    assert (
        found.itc.metrics["ir@1"] == 0.0
    )  # three images share each last digit, and ties count against the model
    assert found.itc.metrics["ir@5"] == 100.0
    assert found.itm.metrics == {**dict.fromkeys(found.itm.metrics, 100.0)}
    encodes = {0: 60, 200: 60 - 7, 2**30: 30}
    assert model.encoded == encodes[memory]


def test_pairs_nominated_from_both_sides_and_equal_texts_are_matched_once():
    batches, ids, texts, owners = numbers()
    assert len(set(texts)) < len(texts)
    model = Words()
    evaluate_retrieval(model, batches, ids, texts, owners, rerank_k=3)
    assert len(model.matched) == len(set(model.matched))
    assert len(model.matched) <= 3 * (len(ids) + len(texts))


def test_equal_texts_of_two_images_tie_even_where_batches_are_noisy():
    class Noisy(Words):
        # As bf16 does: a text's last bits depend on the batch it is in.
        def embed_texts(self, texts):
            return super().embed_texts(texts) + torch.rand(1) * 1e-3

        def match(self, tokens, index, texts):
            return super().match(tokens, index, texts) + 1e-3 * torch.rand(len(texts))

    batches, ids = [torch.tensor([3, 8])], [3, 8]
    found = evaluate_retrieval(Noisy(), batches, ids, ["3", "8", "3"], [3, 8, 8], text_batch=1)
    assert found.itc.image_ranks.tolist() == [2, 1]
    assert found.itm.image_ranks.tolist() == [2, 1]


def test_k_and_what_the_model_can_do_decide_whether_it_is_reranked():
    batches, ids, texts, owners = numbers()

    class Dual:
        encode_images = staticmethod(Words().encode_images)
        embed_images = staticmethod(Words().embed_images)
        embed_texts = staticmethod(Words().embed_texts)

    assert evaluate_retrieval(Dual(), batches, ids, texts, owners).itm is None
    assert evaluate_retrieval(Words(), iter(batches), ids, texts, owners, rerank_k=0).itm is None
    # All candidates: the matcher decides everything.
    every = evaluate_retrieval(Words(), batches, ids, texts, owners, rerank_k=10**6)
    assert every.itm.metrics["r_mean"] == 100.0


def test_progress_counts_up_to_the_whole():
    batches, ids, texts, owners = numbers()
    seen = []
    evaluate_retrieval(Words(), batches, ids, texts, owners, progress=lambda *args: seen.append(args))
    for what in ("images", "texts", "pairs"):
        steps = [(done, of) for name, done, of in seen if name == what]
        assert steps[-1][0] == steps[-1][1]
        assert steps == sorted(steps)


def test_what_does_not_fit_together_is_refused():
    batches, ids, texts, owners = numbers()
    with failed("30 images, 31"):
        evaluate_retrieval(Words(), batches, [*ids, "more"], texts, owners)
    with pytest.raises(ValueError, match="only once"):
        evaluate_retrieval(Words(), iter(batches), ids, texts, owners)
    with pytest.raises(ValueError, match="image ids for them"):
        evaluate_retrieval(Words(), batches, ids, texts[:-1], owners)
