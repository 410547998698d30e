"""Image-text retrieval: R@1, R@5 and R@10 both ways, by a dual encoder and re-ranked by a cross-encoder.

What lives here: ranks and recalls from embeddings, from a score matrix and from re-ranked candidates;
`evaluate_retrieval` does it for a model. What does not: encoders (`capfilt.models`), intervals (`intervals`;
the per-query hits are here).

Protocol (BLIP, arXiv 2201.12086, sec. 5.1, and its released evaluation): an image query hits at K if any of
its texts is among the K best texts; a text query hits if its image is among the K best images; `r_mean` is
the mean of the six recalls. Re-ranking takes each query's `k` best by cosine and orders them by match logit +
cosine; the others are excluded.

Ties count against the model. A query's rank is one more than the number of wrong answers that score no worse
than its best right answer, so a model that gives everything one score has recall 0, not the luck of a sort.
Scores closer than the tie tolerance are tied: two equal texts differ in the last bits when a matrix product
meets them in different tiles, or a batch pads them differently. NaN is worse than any score for a right
answer, and no worse than any for a wrong one. Images without texts stay in the gallery and ask no query.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from capfilt.errors import RunError, UserError
from capfilt.inference.capabilities import EmbedsImagesAndTexts, MatchesPairs

DEPTHS = (1, 5, 10)
RERANK_K = 128  # BLIP's released Flickr30K configuration (k_test); its COCO configuration takes 256
COSINE_TIE = 1e-6  # a few float32 roundings of an inner product of unit vectors
FUSED_TIE = 1e-5  # the same for a float32 match logit, which passes a whole transformer
_BLOCK = 1 << 24  # scores held at once: 64 MB of float32

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RetrievalResult:
    """Ranks of every query, and what they come to.

    `metrics` is flat: `tr@1 tr@5 tr@10` (text retrieval: image queries), `ir@1 ir@5 ir@10` (image retrieval:
    text queries), `r_mean`, in percent. `image_ranks` int64 [N] and `text_ranks` int64 [T] are 1-based ranks
    of the best right answer; 0 marks an image without texts, which is no query. `image_of_text` int64 [T] is
    each text's image.
    """

    metrics: dict[str, float]
    image_ranks: Ints
    text_ranks: Ints
    image_of_text: Ints

    def hits(self, metric: str) -> NDArray[np.bool_]:
        """Whether each query hit, for `tr@K` or `ir@K` with any K: bool [queries]; 100 * its mean is the metric."""
        ranks, depth = self._ranks(metric)
        return ranks[ranks > 0] <= depth

    def groups(self, metric: str) -> Ints:
        """The image of each query, aligned with `hits`: the unit to resample in a bootstrap. int64 [queries]."""
        self._ranks(metric)
        if metric.startswith("tr@"):
            return np.flatnonzero(self.image_ranks).astype(np.int64)
        return self.image_of_text

    def _ranks(self, metric: str) -> tuple[Ints, int]:
        direction, _, depth = metric.partition("@")
        if direction not in {"tr", "ir"} or not depth.isdecimal():
            raise ValueError(f"no such recall: {metric!r}; they are named tr@K and ir@K")
        return (self.image_ranks if direction == "tr" else self.text_ranks), int(depth)


@dataclass(frozen=True)
class RetrievalEvaluation:
    """`itc`: by cosine alone. `itm`: re-ranked; None where no re-ranking was asked for or the model cannot."""

    itc: RetrievalResult
    itm: RetrievalResult | None


def match_ids(image_ids: Sequence[Hashable], text_image_ids: Sequence[Hashable]) -> Ints:
    """The position in `image_ids` of each text's image: int64 [T].

    An image may have any number of texts, none included. Raises UserError when an image is listed twice, a
    text's image is not listed, or there are no texts.
    """
    position = {image: index for index, image in enumerate(image_ids)}
    if len(position) != len(image_ids):
        raise UserError(f"retrieval: {len(image_ids) - len(position)} image ids are listed more than once")
    unknown = [image for image in text_image_ids if image not in position]
    if unknown:
        raise UserError(f"retrieval: {len(unknown)} texts are of images not in the set, first {unknown[0]!r}")
    if not text_image_ids:
        raise UserError("retrieval: there are no texts to retrieve; the split has no human captions")
    return np.array([position[image] for image in text_image_ids], dtype=np.int64)


def from_embeddings(
    images: ArrayLike, texts: ArrayLike, image_of_text: ArrayLike, *, tie: float = COSINE_TIE
) -> RetrievalResult:
    """Retrieval by inner product. images [N, E], texts [T, E], image_of_text int [T]; exact, in blocks of scores."""
    image_rows, text_rows, owner = _checked(images, texts, image_of_text)
    image_ids = np.arange(len(image_rows), dtype=np.int64)
    by_image = _Positives(image_ids, owner)
    by_text = _Positives(owner, image_ids)
    return _result(
        _ranks(_blocks(image_rows, text_rows), by_image, tie),
        _ranks(_blocks(text_rows, image_rows), by_text, tie),
        owner,
    )


def from_scores(scores: ArrayLike, image_of_text: ArrayLike, *, tie: float = 0.0) -> RetrievalResult:
    """Retrieval by a whole matrix of scores [N, T], for models that score all pairs; higher is better."""
    table = np.asarray(scores)
    owner = np.asarray(image_of_text, dtype=np.int64)
    if table.ndim != 2 or owner.shape != (table.shape[1],):
        raise ValueError(f"scores {table.shape} do not fit {owner.shape[0]} texts")
    image_ids = np.arange(len(table), dtype=np.int64)
    return _result(
        _ranks([(0, table)], _Positives(image_ids, owner), tie),
        _ranks([(0, table.T)], _Positives(owner, image_ids), tie),
        owner,
    )


@dataclass(frozen=True)
class Candidates:
    """Each query's best gallery items by cosine: `items` int64 [Q, k] in no order, `cosines` float32 [Q, k]."""

    items: Ints
    cosines: NDArray[np.float32]


def nominate(
    queries: ArrayLike,
    gallery: ArrayLike,
    query_group: ArrayLike,
    gallery_group: ArrayLike,
    k: int = RERANK_K,
    *,
    tie: float = COSINE_TIE,
) -> Candidates:
    """The k best gallery items of each query by inner product; all of them where the gallery is no larger.

    Right answers (same group) that tie with wrong ones at the edge are left out, as ties count against the
    model.
    """
    query_rows, gallery_rows = _float32(queries), _float32(gallery)
    positives = _Positives(np.asarray(query_group, np.int64), np.asarray(gallery_group, np.int64))
    k = min(k, len(gallery_rows))
    items = np.empty((len(query_rows), k), dtype=np.int64)
    cosines = np.empty((len(query_rows), k), dtype=np.float32)
    for start, scores in _blocks(query_rows, gallery_rows):
        rows, columns, _ = positives.block(start, start + len(scores))
        # In place and put back, as a copy would double the memory. Numpy sorts NaN last, which is best here:
        # right for a wrong answer, and what a right one must not have.
        right = scores[rows, columns]
        scores[rows, columns] = np.where(np.isnan(right), -np.inf, right - np.float32(tie))
        best = np.argpartition(scores, len(gallery_rows) - k, axis=1)[:, len(gallery_rows) - k :]
        scores[rows, columns] = right
        stop = start + len(scores)
        items[start:stop] = best
        cosines[start:stop] = np.take_along_axis(scores, best, axis=1)
    return Candidates(items, cosines)


def rerank(
    candidates: Candidates,
    logits: ArrayLike,
    query_group: ArrayLike,
    gallery_group: ArrayLike,
    *,
    tie: float = FUSED_TIE,
) -> Ints:
    """Ranks int64 [Q] of each query's best right answer by match logit + cosine, 0 where it has none.

    `logits` [Q, k] belong to `candidates.items`. What was not nominated is excluded: a query none of whose
    right answers was nominated ranks after every wrong answer of the gallery.
    """
    query_groups, gallery_groups = np.asarray(query_group, np.int64), np.asarray(gallery_group, np.int64)
    fused = np.asarray(logits, dtype=np.float64) + candidates.cosines
    right = gallery_groups[candidates.items] == query_groups[:, None]
    best = np.where(right & ~np.isnan(fused), fused, -np.inf).max(axis=1, initial=-np.inf)
    worse = fused < (best - tie)[:, None]
    ranks = 1 + (~worse & ~right).sum(axis=1)
    answers = _Positives(query_groups, gallery_groups).counts
    ranks = np.where(np.isneginf(best), 1 + len(gallery_groups) - answers, ranks)
    return np.where(answers > 0, ranks, 0).astype(np.int64)


def evaluate_retrieval(
    model: EmbedsImagesAndTexts,
    image_batches: Iterable[Tensor],
    image_ids: Sequence[Hashable],
    texts: Sequence[str],
    text_image_ids: Sequence[Hashable],
    *,
    rerank_k: int = RERANK_K,
    text_batch: int = 256,
    token_memory: int = 2 << 30,
    progress: Callable[[str, int, int], object] | None = None,
) -> RetrievalEvaluation:
    """Retrieval on a set of images and their texts, by cosine and, where the model matches pairs, re-ranked.

    image_batches: tensors as the model's `encode_images` takes them, together in the order of `image_ids`;
    read once, and once more for re-ranking where the image tokens of all do not fit into `token_memory`
    bytes, so it must be possible to iterate over it twice (a list, a DataLoader; not a generator). `texts[j]`
    belongs to the image `text_image_ids[j]`. rerank_k: candidates per query; 0 for no re-ranking. progress:
    called with (what, done, of).

    Raises UserError for ids that do not fit together, RunError when the batches hold another number of
    images.
    """
    owner = match_ids(image_ids, text_image_ids)
    if len(texts) != len(owner):
        raise ValueError(f"{len(texts)} texts but {len(owner)} image ids for them")
    matcher = model if rerank_k > 0 and isinstance(model, MatchesPairs) else None
    if matcher is not None and iter(image_batches) is image_batches:
        raise ValueError(
            "image_batches can be read only once; re-ranking may need it twice: pass a list or a loader"
        )
    report = progress or (lambda what, done, of: None)
    store = _TokenStore(model, image_batches, len(image_ids), token_memory if matcher is not None else 0)
    embedded = []
    for start, tokens in store.first_pass():
        embedded.append(model.embed_images(tokens).float().cpu())
        report("images", start + len(tokens), len(image_ids))
    images = torch.cat(embedded).numpy()
    # Equal texts are read once: cheaper, and in bf16 the only way to make them tie.
    number = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    distinct, which = list(number), np.array([number[text] for text in texts], dtype=np.int64)
    rows = []
    for start in range(0, len(distinct), text_batch):
        rows.append(model.embed_texts(distinct[start : start + text_batch]).float().cpu())
        report("texts", min(start + text_batch, len(distinct)), len(distinct))
    text_rows = torch.cat(rows).numpy()[which]
    itc = from_embeddings(images, text_rows, owner)
    if matcher is None:
        return RetrievalEvaluation(itc, None)

    every_image = np.arange(len(images), dtype=np.int64)
    to_texts = nominate(images, text_rows, every_image, owner, rerank_k)
    to_images = nominate(text_rows, images, owner, every_image, rerank_k)
    # A pair nominated from both sides is matched once. Codes sort by image, so each image's tokens are needed
    # once.
    forth = every_image[:, None] * len(distinct) + which[to_texts.items]
    back = to_images.items * len(distinct) + which[:, None]
    codes = np.unique(np.concatenate([forth.ravel(), back.ravel()]))
    logits = np.empty(len(codes), dtype=np.float32)
    for start, tokens in store.second_pass():
        first, last = np.searchsorted(codes, [start * len(distinct), (start + len(tokens)) * len(distinct)])
        image, text = np.divmod(codes[first:last], len(distinct))
        if last > first:
            scores = matcher.match(tokens, torch.from_numpy(image - start), [distinct[j] for j in text])
            logits[first:last] = scores.float().cpu().numpy()
        report("pairs", int(last), len(codes))
    itm = _result(
        rerank(to_texts, logits[np.searchsorted(codes, forth)], every_image, owner),
        rerank(to_images, logits[np.searchsorted(codes, back)], owner, every_image),
        owner,
    )
    return RetrievalEvaluation(itc, itm)


class _Positives:
    """The right answers of every query, ready to be looked up block by block."""

    def __init__(self, query_group: Ints, gallery_group: Ints) -> None:
        self._order = np.argsort(gallery_group, kind="stable")
        in_order = gallery_group[self._order]
        self._first = np.searchsorted(in_order, query_group, side="left")
        self.counts: Ints = np.searchsorted(in_order, query_group, side="right") - self._first

    def block(self, start: int, stop: int) -> tuple[Ints, Ints, Ints]:
        """Of queries start..stop: rows (from 0) and gallery columns of the right pairs, and each row's first pair."""
        counts = self.counts[start:stop]
        offsets = np.cumsum(counts) - counts
        rows = np.repeat(np.arange(stop - start), counts)
        within = np.arange(len(rows)) - offsets[rows]
        return rows, self._order[self._first[start:stop][rows] + within], offsets


def _ranks(blocks: Iterable[tuple[int, Floats]], positives: _Positives, tie: float) -> Ints:
    found = []
    for start, scores in blocks:
        rows, columns, offsets = positives.block(start, start + len(scores))
        counts = positives.counts[start : start + len(scores)]
        right = scores[rows, columns]
        best = np.full(len(scores), np.nan, dtype=scores.dtype)
        if len(right):
            # fmax passes over NaN, so one broken text does not sink its image.
            best[counts > 0] = np.fmax.reduceat(right, offsets[counts > 0])
        limit = best - np.asarray(tie, dtype=scores.dtype)
        # A comparison with NaN is false, so NaN on either side counts as "no worse".
        no_worse = scores.shape[1] - np.count_nonzero(scores < limit[:, None], axis=1)
        own = np.bincount(rows[~(right < limit[rows])], minlength=len(scores))
        found.append(np.where(counts > 0, 1 + no_worse - own, 0))
    return np.concatenate(found).astype(np.int64)


def _blocks(
    queries: NDArray[np.float32], gallery: NDArray[np.float32]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    step = max(1, _BLOCK // max(1, len(gallery)))
    for start in range(0, len(queries), step):
        yield start, queries[start : start + step] @ gallery.T


def _result(image_ranks: Ints, text_ranks: Ints, owner: Ints) -> RetrievalResult:
    metrics = {}
    for name, ranks in (("tr", image_ranks), ("ir", text_ranks)):
        asked = ranks[ranks > 0]
        for depth in DEPTHS:
            metrics[f"{name}@{depth}"] = 100.0 * float((asked <= depth).mean())
    metrics["r_mean"] = sum(metrics.values()) / len(metrics)
    return RetrievalResult(metrics, image_ranks, text_ranks, owner)


def _float32(rows: ArrayLike) -> NDArray[np.float32]:
    # numpy, not torch: a training script may have lowered torch's matmul precision for the whole process.
    if isinstance(rows, Tensor):
        rows = rows.detach().float().cpu().numpy()
    return np.ascontiguousarray(rows, dtype=np.float32)


def _checked(
    images: ArrayLike, texts: ArrayLike, image_of_text: ArrayLike
) -> tuple[NDArray[np.float32], NDArray[np.float32], Ints]:
    image_rows, text_rows = _float32(images), _float32(texts)
    owner = np.asarray(image_of_text, dtype=np.int64)
    if image_rows.ndim != 2 or text_rows.ndim != 2 or image_rows.shape[1] != text_rows.shape[1]:
        raise ValueError(f"embeddings {image_rows.shape} and {text_rows.shape} do not fit together")
    if owner.shape != (len(text_rows),) or not len(owner):
        raise ValueError(f"{owner.shape} image indices for {len(text_rows)} texts")
    if owner.min() < 0 or owner.max() >= len(image_rows):
        raise ValueError(
            f"image indices reach from {owner.min()} to {owner.max()}, images are 0..{len(image_rows) - 1}"
        )
    return image_rows, text_rows, owner


class _TokenStore:
    """Image tokens of all batches: kept while they fit, encoded again where they do not."""

    def __init__(
        self, model: EmbedsImagesAndTexts, batches: Iterable[Tensor], expected: int, memory: int
    ) -> None:
        self._model = model
        self._batches = batches
        self._expected = expected
        self._room = memory
        self._kept: list[Tensor | None] = []
        self._sizes: list[int] = []

    def first_pass(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (first image, tokens [B, N, D]) of every batch, keeping what fits."""
        start = 0
        for batch in self._batches:
            tokens = self._model.encode_images(batch)
            size = tokens.numel() * tokens.element_size()
            keep = size <= self._room
            self._room -= size if keep else 0
            self._kept.append(tokens if keep else None)
            self._sizes.append(len(tokens))
            yield start, tokens
            start += len(tokens)
        if start != self._expected:
            raise RunError(
                f"retrieval: the batches hold {start} images, {self._expected} image ids were given"
            )

    def second_pass(self) -> Iterator[tuple[int, Tensor]]:
        """The same again, in the same order, without reading the batches when every token was kept."""
        again = iter(self._batches) if any(tokens is None for tokens in self._kept) else None
        start = 0
        for tokens, size in zip(self._kept, self._sizes, strict=True):
            batch = next(again) if again is not None else None
            if tokens is None:
                assert batch is not None
                tokens = self._model.encode_images(batch)
            yield start, tokens
            start += size
