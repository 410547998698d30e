"""How well a model tells which texts belong to an image: given pairs, people's ratings, and hard wrong texts.

What lives here: scores of pairs by every way a model has (`itm`: the probability of a match, `itc`: the cosine), and the
figures of three protocols. What does not: the statistics themselves (`filter_quality`).

A choice is right only where the right text scores above every wrong one: a tie counts against the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from capfilt.calibration.fit import THRESHOLD
from capfilt.calibration.ranking import roc_auc
from capfilt.errors import RunError
from capfilt.inference.capabilities import EmbedsImagesAndTexts, MatchesPairs
from capfilt.tasks.filter_quality import kendall_tau_c, spearman

Floats = NDArray[np.float64]
Scores = dict[str, Floats]


@dataclass(frozen=True)
class JudgingResult:
    """Figures by way of scoring.

    `metrics` is flat: percent, or points of 100. `columns` holds for each of them the units' columns, one array [Q] or
    several, and `statistics` what makes the figure of them (`outcome.STATISTICS`); `rows` is int64 [Q], the pair or example
    of each unit.
    """

    metrics: dict[str, float]
    statistics: dict[str, str]
    columns: dict[str, tuple[Floats, ...]]
    rows: dict[str, NDArray[np.int64]]


def score_pairs(
    model: EmbedsImagesAndTexts | MatchesPairs,
    image_batches: Iterable[Tensor],
    image_index: Sequence[int],
    texts: Sequence[str],
    *,
    text_batch: int = 256,
    progress: Callable[[str, int, int], object] | None = None,
) -> Scores:
    """Scores float64 [P] of pairs, `texts[p]` with image `image_index[p]` of all batches together, by every way there is.

    `itm` where the model matches pairs, in [0, 1]; `itc` where it embeds, a cosine. Batches are read once; an image is
    encoded once, equal texts are embedded once. Raises RunError when the batches hold too few images.
    """
    order = np.argsort(np.asarray(image_index, dtype=np.int64), kind="stable")
    images = np.asarray(image_index, dtype=np.int64)[order]
    ordered = [texts[row] for row in order]
    # In order of the images, and put back at the end.
    found: dict[str, list[NDArray[np.floating]]] = {}
    vectors, which = torch.zeros(0), torch.zeros(0)
    if isinstance(model, EmbedsImagesAndTexts):
        number = {text: place for place, text in enumerate(dict.fromkeys(ordered))}
        distinct, which = list(number), torch.tensor([number[text] for text in ordered], dtype=torch.int64)
        parts = [
            model.embed_texts(distinct[first : first + text_batch]).float().cpu()
            for first in range(0, len(distinct), text_batch)
        ]
        vectors = torch.cat(parts) if parts else vectors
    start = 0
    for batch in image_batches:
        tokens = model.encode_images(batch)
        first, last = np.searchsorted(images, [start, start + len(tokens)])
        index = torch.from_numpy(images[first:last] - start)
        if isinstance(model, EmbedsImagesAndTexts):
            mine = model.embed_images(tokens).float().cpu()
            cosines = (mine[index] * vectors[which[first:last]]).sum(dim=1)
            found.setdefault("itc", []).append(cosines.numpy())
        if isinstance(model, MatchesPairs):
            chance = model.match_probability(tokens, index, ordered[first:last])
            found.setdefault("itm", []).append(chance.float().cpu().numpy())
        start += len(tokens)
        if progress is not None:
            progress("pairs", int(last), len(order))
    if len(images) and images[-1] >= start:
        raise RunError(f"the batches hold {start} images, and a pair names image {images[-1]}")
    scores = {}
    for name in sorted(found, reverse=True):
        scores[name] = np.empty(len(order))
        scores[name][order] = np.concatenate(found[name])
        if not np.isfinite(scores[name]).all():
            lost = int((~np.isfinite(scores[name])).sum())
            raise RunError(f"{lost} of {len(order)} {name} scores are not finite; try --precision fp32")
    return scores


def judge_matches(
    scores: Scores,
    labels: ArrayLike,
    tuning: tuple[Scores, ArrayLike] | None = None,
    threshold: float = THRESHOLD,
) -> JudgingResult:
    """Whether pairs match: scores [P], labels bool [P].

    `match_auc_*` is the ROC-AUC; `match_accuracy_itm` the share judged right at `threshold`, which only a probability
    has; `match_tuned_*` that at the threshold which does best on `tuning`, scores and labels of other pairs.
    """
    label = np.asarray(labels).astype(bool)
    made = _Figures(np.arange(len(label)))
    for name, score in scores.items():
        made.add(f"match_auc_{name}", 100.0 * roc_auc(score, label), "roc_auc", score, label)
        if name == "itm":
            made.mean("match_accuracy_itm", (score >= threshold) == label)
        if tuning is not None:
            made.mean(f"match_tuned_{name}", (score >= best_threshold(tuning[0][name], tuning[1])) == label)
    return made.result()


def judge_ratings(scores: Scores, ratings: Sequence[Sequence[float]]) -> JudgingResult:
    """Agreement of scores [P] with people's ratings of the pairs, several per pair.

    `tau_c_*`: Kendall's tau-c with every rating as one point, so that a pair rated by three counts three times (Hodosh,
    Young and Hockenmaier, JAIR 2013; CLIPScore, arXiv 2104.08718, sec. 4.1, and its released code). `tau_c_mean_*` and
    `spearman_*`: with the mean of a pair's ratings.
    """
    pairs = np.repeat(np.arange(len(ratings)), [len(each) for each in ratings])
    single = np.array([rating for each in ratings for rating in each], dtype=np.float64)
    means = np.array([np.mean(each) for each in ratings], dtype=np.float64)
    whole = np.arange(len(ratings))
    made = _Figures(whole)
    for name, score in scores.items():
        made.add(
            f"tau_c_{name}", 100.0 * kendall_tau_c(single, score[pairs]), "tau_c", score[pairs], single, rows=pairs
        )  # fmt: skip
        made.add(f"tau_c_mean_{name}", 100.0 * kendall_tau_c(means, score), "tau_c", score, means)
        made.add(f"spearman_{name}", 100.0 * spearman(means, score), "spearman", score, means)
    return made.result()


def judge_choices(
    scores: Scores, wrong: Sequence[Sequence[int]], right: Sequence[int], categories: Sequence[str | None]
) -> JudgingResult:
    """The right text above every wrong one: examples [E] by the rows in scores of their right and wrong pairs.

    `choice_*` is the share of examples, `choice_*_CATEGORY` that of each kind, and `choice_macro_*` the mean of those
    (SugarCrepe, arXiv 2306.14610, sec. 4).
    """
    kinds = sorted({kind for kind in categories if kind is not None})
    of_kind = np.array([kinds.index(kind) if kind is not None else -1 for kind in categories])
    made = _Figures(np.arange(len(right)))
    for name, score in scores.items():
        hits = np.array(
            [all(score[own] > score[other] for other in others) for own, others in zip(right, wrong, strict=True)]
        )  # fmt: skip
        made.mean(f"choice_{name}", hits)
        if len(kinds) > 1:
            columns = [
                column.astype(np.float64)
                for place in range(len(kinds))
                for column in (hits & (of_kind == place), of_kind == place)
            ]
            shares = [100.0 * float(hits[of_kind == place].mean()) for place in range(len(kinds))]
            made.add(f"choice_macro_{name}", float(np.mean(shares)), "ratios", *columns)
            for place, kind in enumerate(kinds):
                rows = np.flatnonzero(of_kind == place)
                made.mean(f"choice_{name}_{kind}", hits[rows], rows=rows)
    return made.result()


def best_threshold(scores: ArrayLike, labels: ArrayLike) -> float:
    """The score from which on to say "match" for the most right answers on these pairs; the lowest such one."""
    score, label = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    values, place = np.unique(score, return_inverse=True)
    true = np.bincount(place, weights=label, minlength=len(values))
    false = np.bincount(place, weights=~label, minlength=len(values))
    # At value v: the true texts from v on, and the false ones below it, are right; at infinity every false one.
    right = np.append(np.cumsum(true[::-1])[::-1], 0.0) + np.concatenate([[0.0], np.cumsum(false)])
    best = int(np.argmax(right))
    return float(values[best]) if best < len(values) else float(np.inf)


class _Figures:
    """Figures as they are found, with their units; `whole` are the rows of those that are of all units."""

    def __init__(self, whole: NDArray[np.int64]) -> None:
        self._whole = whole
        self._found = JudgingResult({}, {}, {}, {})

    def add(
        self,
        name: str,
        value: float,
        statistic: str,
        *columns: ArrayLike,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self._found.metrics[name] = value
        self._found.statistics[name] = statistic
        self._found.columns[name] = tuple(np.asarray(column, dtype=np.float64) for column in columns)
        self._found.rows[name] = self._whole if rows is None else rows

    def mean(self, name: str, hits: ArrayLike, rows: NDArray[np.int64] | None = None) -> None:
        values = np.asarray(hits, dtype=np.float64)
        self.add(name, 100.0 * float(values.mean()), "mean", values, rows=rows)

    def result(self) -> JudgingResult:
        return self._found
