"""Retrieval at the size of the COCO test split: 5,000 images x 25,000 texts, by cosine and re-ranked.

256-d random unit vectors with planted matches are ranked by `capfilt.tasks.retrieval` and, in the same process, by a
plain implementation that holds the whole score matrix and sorts every row and column of it; both must find the same
recalls. Re-ranking takes 128 candidates per query and made-up match logits; the plain one holds the whole fused matrix.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from _form import Record, in_pairs, main, peak_memory

from capfilt.tasks.retrieval import DEPTHS, RERANK_K, from_embeddings, nominate, rerank

TEXTS_PER_IMAGE, WIDTH = 5, 256
AGREEMENT = 0.2  # cosine of a text with its image; the best of 25,000 strangers reaches about 0.25


def planted(
    rng: np.random.Generator, owner: np.ndarray, width: int, agreement: float
) -> tuple[np.ndarray, np.ndarray]:
    """Unit image vectors, and unit text vectors with an expected cosine of `agreement` with their image's."""
    images = rng.standard_normal((owner.max() + 1, width), dtype=np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    noise = rng.standard_normal((len(owner), width), dtype=np.float32) / np.sqrt(width)
    texts = agreement * images[owner] + np.sqrt(1 - agreement**2) * noise
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    return images, texts


def plain_ranks(scores: np.ndarray, answers: list[np.ndarray]) -> np.ndarray:
    """Rank of each row's best answer, from 1, by sorting every row of a whole matrix."""
    ranks = np.empty(len(scores), dtype=np.int64)
    for query, row in enumerate(scores):
        order = np.argsort(-row)
        ranks[query] = 1 + min(np.flatnonzero(order == answer)[0] for answer in answers[query])
    return ranks


def plain(scores: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """Recalls from the whole score matrix."""
    texts_of = [np.flatnonzero(owner == image) for image in range(len(scores))]
    return recalls(plain_ranks(scores, texts_of), plain_ranks(scores.T, list(owner[:, None])))


def plain_fused(scores: np.ndarray, logits: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """Recalls re-ranked with whole matrices: candidates get logit + cosine, everything else -100."""
    texts_of = [np.flatnonzero(owner == image) for image in range(len(scores))]
    ranks = []
    for table, extra, answers in ((scores, logits, texts_of), (scores.T, logits.T, list(owner[:, None]))):
        fused = np.full(table.shape, -100.0, dtype=np.float32)
        best = np.argpartition(-table, RERANK_K - 1, axis=1)[:, :RERANK_K]
        chosen = np.take_along_axis(table, best, axis=1) + np.take_along_axis(extra, best, axis=1)
        np.put_along_axis(fused, best, chosen, axis=1)
        ranks.append(plain_ranks(fused, answers))
    return recalls(*ranks)


def recalls(image_ranks: np.ndarray, text_ranks: np.ndarray) -> dict[str, float]:
    """`tr@K` and `ir@K` in percent from ranks that start at 1."""
    found = {f"tr@{depth}": 100 * float((image_ranks <= depth).mean()) for depth in DEPTHS}
    return found | {f"ir@{depth}": 100 * float((text_ranks <= depth).mean()) for depth in DEPTHS}


def difference(one: dict[str, float], other: dict[str, float]) -> float:
    """The largest difference of a recall, in points."""
    return max(abs(one[name] - other[name]) for name in other)


def measure(args: argparse.Namespace, record: Record) -> None:
    count = 1000 if args.quick else 5000
    rng = np.random.default_rng(args.seed)
    owner = np.repeat(np.arange(count), TEXTS_PER_IMAGE)
    rng.shuffle(owner)
    images, texts = planted(rng, owner, WIDTH, AGREEMENT)
    record.figure("images", count)
    record.figure("texts", len(owner))

    # Memory first, before the plain one's matrix has been in this process.
    start = time.perf_counter()
    with peak_memory() as peak:
        ours = from_embeddings(images, texts, owner)
    seconds = time.perf_counter() - start
    for name, value in ours.metrics.items():
        record.figure(name, value)

    ids = np.arange(count)
    left, right = planted(rng, owner, 32, 0.8)
    start = time.perf_counter()
    with peak_memory() as rerank_peak:
        to_texts = nominate(images, texts, ids, owner, RERANK_K)
        to_images = nominate(texts, images, owner, ids, RERANK_K)
        image_logits = 10 * np.einsum("ne,nke->nk", left, right[to_texts.items])
        text_logits = 10 * np.einsum("ne,nke->nk", right, left[to_images.items])
        ranks = rerank(to_texts, image_logits, ids, owner), rerank(to_images, text_logits, owner, ids)
    rerank_seconds = time.perf_counter() - start
    reranked = recalls(*ranks)
    record.figure("reranked_tr@1", reranked["tr@1"])
    record.figure("reranked_ir@1", reranked["ir@1"])

    same = np.broadcast_to(images[:1], images.shape)
    collapsed = from_embeddings(same, np.broadcast_to(images[:1], texts.shape), owner)

    theirs: dict[str, float] = {}
    pairs = in_pairs(
        lambda: from_embeddings(images, texts, owner),
        lambda: theirs.update(plain(images @ texts.T, owner)),
        1 if args.quick else 3,
    )
    record.figure("plain_seconds", float(np.median(pairs.second)))
    record.target("recall_difference_points", difference(ours.metrics, theirs), "<=", 0.02)
    fused = plain_fused(images @ texts.T, 10 * left @ right.T, owner)
    record.target("reranked_difference_points", difference(reranked, fused), "<=", 0.02)
    record.target("collapsed_model_r_mean", collapsed.metrics["r_mean"], "==", 0)
    if args.quick:
        record.figure("seconds", seconds)
        record.figure("times_faster_than_plain", pairs.ratio)
        record.figure("peak_gib", peak.gib)
        return
    record.target("seconds", seconds, "<", 60)
    record.target("times_faster_than_plain", pairs.ratio, ">=", 2)
    record.target("peak_gib", peak.gib, "<", 4)
    record.target("rerank_seconds", rerank_seconds, "<", 60)
    record.target("rerank_peak_gib", rerank_peak.gib, "<", 4)


if __name__ == "__main__":
    main(__doc__, measure)
