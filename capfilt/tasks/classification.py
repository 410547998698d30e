"""Classes of images: by their names alone, or from a few examples each, on a model whose weights stay as they are.

What lives here: zero-shot classification with prompt templates, and on frozen features a linear probe and the nearest
class mean. What does not: encoders, and where the images come from.

Sources: CLIP, arXiv 2103.00020, sec. 3.1.4 (a class is the mean of its prompts' unit embeddings, made a unit vector
again) and sec. 3.2 and app. A.3 (logistic regression by L-BFGS on features before the projection, its penalty chosen on a
validation set); the validation examples of a few-shot run are min(k, 4) per class (CoOp, arXiv 2109.01134, sec. 4.1).

Ties count against the model, as in `retrieval`: a class is right at K only where fewer than K others score no worse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from capfilt.errors import UserError
from capfilt.inference.capabilities import EmbedsImagesAndTexts
from capfilt.tasks.registry import Unsuited
from capfilt.tasks.retrieval import COSINE_TIE

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SINGLE = ("a photo of a {}.",)
TEMPLATES = {
    "single": SINGLE,
    # CLIP, released notebooks, data/prompts.md, CIFAR-10.
    "cifar": tuple(
        f"a {kind}photo of {article} {{}}."
        for article in ("a", "the")
        for kind in ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
    )
    + tuple(f"a photo of {article} {size} {{}}." for article in ("a", "the") for size in ("small", "big")),
    # CLIP, released notebooks: the seven of 80 that were chosen for ImageNet.
    "imagenet": (
        "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
        "a {} in a video game.", "art of the {}.", "a photo of the small {}.",
    ),
}  # fmt: skip
"""Prompt templates by name; `{}` is the class."""

SHOTS = (1, 2, 4, 8, 16)
SEEDS = 3
PENALTIES = tuple(10.0**power for power in range(-4, 2))
"""Inverse strengths of the probe's penalty that are tried, as scikit-learn's C, on features of variance 1: from next to no
influence of single features to a fit that few examples cannot bear; weaker ones cost the most time and change nothing."""


@dataclass(frozen=True)
class ClassificationResult:
    """Accuracies in percent, and what they are means of.

    `metrics` is flat. `hits` has float64 [N] per metric, one value per image in [0, 1]: whether it was right, or in how
    large a share of the seeds. `spread` is the standard deviation over seeds in points, where there are several;
    `penalties` the C chosen for each (shots, seed); `left_out` says which numbers of shots the data could not give.
    """

    metrics: dict[str, float]
    hits: dict[str, Floats]
    spread: dict[str, float]
    penalties: dict[str, list[float]]
    left_out: dict[str, str]


def class_vectors(model: EmbedsImagesAndTexts, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """A unit vector per class, float32 [C, E]: the mean of the unit embeddings of its prompts, made unit length."""
    rows = [
        model.embed_texts([template.format(name) for template in templates]).float().cpu() for name in names
    ]
    return F.normalize(torch.stack([F.normalize(each, dim=1).mean(dim=0) for each in rows]), dim=1)


def spoken(label: str) -> str:
    """A class's name as a prompt says it: underscores and runs of white space are one space."""
    return " ".join(label.replace("_", " ").split())


def zero_shot(
    model: EmbedsImagesAndTexts,
    images: Tensor,
    labels: Sequence[str],
    templates: Sequence[str],
) -> ClassificationResult:
    """Classes by cosine with unit image embeddings float32 [N, E]; the classes are those that `labels` [N] hold.

    `zero_shot_top1` and `zero_shot_top5` (where there are more than five classes) use all templates together,
    `zero_shot_single_top1` "a photo of a {}." alone. Raises UserError for fewer than two classes, or a template without
    `{}`.
    """
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise UserError(
            f"template {wrong[0] if wrong else ''!r}: write {{}} once, where the class's name goes"
        )
    names, truth = _numbered(labels)
    hits: dict[str, Floats] = {}
    for prefix, chosen in (("zero_shot", tuple(templates)), ("zero_shot_single", SINGLE)):
        vectors = class_vectors(model, [spoken(name) for name in names], chosen)
        scores = (images.float().cpu() @ vectors.T).numpy().astype(np.float64)
        ranks = _ranks(scores, truth, COSINE_TIE)
        for depth in (1, 5):
            if depth == 1 or (len(names) > depth and prefix == "zero_shot"):
                hits[f"{prefix}_top{depth}"] = (ranks <= depth).astype(np.float64)
    return _result(hits)


def by_logits(logits: Tensor, names: Sequence[str], labels: Sequence[str]) -> ClassificationResult:
    """`classification_top1` and `classification_top5` (where there are more than five classes) of logits float32 [N, C].

    `names` [C] are the classes of the logits, `labels` [N] the right ones; one that no logit stands for is never right.
    """
    place = {name: index for index, name in enumerate(names)}
    scores = logits.float().cpu().numpy().astype(np.float64)
    truth = np.array([place.get(label, -1) for label in labels])
    ranks = np.where(truth < 0, len(names) + 1, _ranks(scores, truth))
    depths = [depth for depth in (1, 5) if depth == 1 or len(names) > depth]
    return _result({f"classification_top{depth}": (ranks <= depth).astype(np.float64) for depth in depths})


def few_shot(
    features: Tensor,
    labels: Sequence[str],
    support: Tensor,
    support_labels: Sequence[str],
    *,
    shots: Sequence[int] = SHOTS,
    seeds: int = SEEDS,
    seed: int = 0,
    progress: Callable[[str, int, int], object] | None = None,
) -> ClassificationResult:
    """Classes of frozen features float32 [N, D] after `k` examples per class of `support` [M, D], for k of `shots`.

    `probe@k` is a multinomial logistic regression, its penalty chosen on min(k, 4) further examples per class of the
    support, never on `labels`; `class_mean@k` the nearest mean of unit features, by cosine. Both are means over `seeds`
    draws; the k examples of a draw are among its 2k. Numbers of shots for which a class has too few examples are left out.

    Raises UserError where the support lacks a class, or there are fewer than two.
    """
    names, truth = _numbered(labels)
    lacking = sorted(set(names) - set(support_labels))
    if lacking:
        raise Unsuited(
            f"few-shot: no examples to learn {lacking[0]!r} from; the split to learn from lacks it"
        )
    number = {name: place for place, name in enumerate(names)}
    pools = [
        np.array([row for row, label in enumerate(support_labels) if label == name], dtype=np.int64)
        for name in names
    ]
    features, support = features.double().cpu(), support.double().cpu()
    of_support = torch.tensor([number.get(label, -1) for label in support_labels])
    hits: dict[str, list[Floats]] = {}
    penalties: dict[str, list[float]] = {}
    left_out: dict[str, str] = {}
    least = min(range(len(names)), key=lambda place: len(pools[place]))
    fitting = [k for k in shots if k + min(k, 4) <= len(pools[least])]
    for k in shots:
        if k not in fitting:
            left_out[f"{k} shots"] = f"{names[least]!r} has {len(pools[least])} examples to learn from"
    for draw in range(seeds):
        rng = np.random.default_rng([seed, draw])
        orders = [rng.permutation(pool) for pool in pools]
        for k in fitting:
            chosen = torch.from_numpy(np.concatenate([order[:k] for order in orders]))
            held = torch.from_numpy(np.concatenate([order[-min(k, 4) :] for order in orders]))
            scaled = _Scaling(support[chosen])
            fit = _best_probe(
                scaled(support[chosen]),
                of_support[chosen],
                scaled(support[held]),
                of_support[held],
                len(names),
            )
            penalties.setdefault(f"probe@{k}", []).append(fit.penalty)
            ranks = _ranks(fit(scaled(features)).numpy(), truth)
            hits.setdefault(f"probe@{k}", []).append((ranks == 1).astype(np.float64))
            means = _class_means(support[chosen], of_support[chosen], len(names))
            ranks = _ranks((F.normalize(features, dim=1) @ means.T).numpy(), truth)
            hits.setdefault(f"class_mean@{k}", []).append((ranks == 1).astype(np.float64))
            if progress is not None:
                progress("probes", draw * len(fitting) + fitting.index(k) + 1, seeds * len(fitting))
    ordered = sorted(hits, key=lambda name: (name.partition("@")[0] != "probe", int(name.partition("@")[2])))
    found = _result({name: np.mean(hits[name], axis=0) for name in ordered})
    spread = {
        name: 100.0 * float(np.std([each.mean() for each in hits[name]], ddof=1))
        for name in ordered
        if seeds > 1
    }
    return ClassificationResult(found.metrics, found.hits, spread, penalties, left_out)


@dataclass(frozen=True)
class Probe:
    """A multinomial logistic regression: weights float64 [C, D], bias float64 [C]; called on features for logits."""

    weights: Tensor
    bias: Tensor
    penalty: float

    def __call__(self, features: Tensor) -> Tensor:
        """Logits float64 [N, C] of features [N, D]."""
        return features.double() @ self.weights.T + self.bias


def logistic_regression(
    features: Tensor, labels: Tensor, classes: int, penalty: float, start: Probe | None = None
) -> Probe:
    """The least of penalty * (sum of cross-entropies) + |weights|^2 / 2, the bias free: scikit-learn's problem.

    features [N, D], labels int64 [N] in 0..classes-1. By L-BFGS in double precision, to a gradient of 1e-7 per example.
    `start` gives where to begin, which changes no answer.
    """
    x, weights = features.double(), torch.zeros(classes, features.shape[1], dtype=torch.float64)
    bias = torch.zeros(classes, dtype=torch.float64)
    if start is not None:
        weights, bias = start.weights.clone(), start.bias.clone()
    weights.requires_grad_(True)
    bias.requires_grad_(True)
    # A mean, so that one tolerance fits every penalty and number of examples.
    scale = 1.0 / (penalty * len(x))
    solver = torch.optim.LBFGS(
        [weights, bias], max_iter=1000, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )  # fmt: skip

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weights.T + bias, labels, reduction="sum")
        total = scale * (penalty * loss + weights.square().sum() / 2)
        total.backward()  # type: ignore[no-untyped-call]
        return total

    solver.step(closure)  # type: ignore[no-untyped-call]
    return Probe(weights.detach(), bias.detach(), penalty)


def _best_probe(x: Tensor, y: Tensor, held: Tensor, held_y: Tensor, classes: int) -> Probe:
    """The probe whose penalty does best on held-out examples: by hits, then by likelihood."""
    best: tuple[tuple[int, float], Probe] | None = None
    probe: Probe | None = None
    for penalty in PENALTIES:
        probe = logistic_regression(x, y, classes, penalty, probe)
        logits = probe(held)
        merit = (
            int((logits.argmax(dim=1) == held_y).sum()),
            -float(F.cross_entropy(logits, held_y)),
        )
        if best is None or merit > best[0]:
            best = (merit, probe)
    assert best is not None
    return best[1]


class _Scaling:
    """Features less the shots' mean, over their root mean square: a penalty then means the same for every model."""

    def __init__(self, shots: Tensor) -> None:
        self.mean = shots.mean(dim=0)
        self.scale = float((shots - self.mean).square().mean().sqrt()) or 1.0

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale


def _class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Unit vectors [C, D]: the mean of each class's unit features."""
    unit = F.normalize(features, dim=1)
    return F.normalize(torch.stack([unit[labels == place].mean(dim=0) for place in range(classes)]), dim=1)


def _numbered(labels: Sequence[str]) -> tuple[list[str], Ints]:
    names = sorted(set(labels))
    if len(names) < 2:
        raise Unsuited(
            f"classification: the examples are of {len(names)} class; two or more can be told apart"
        )
    number = {name: place for place, name in enumerate(names)}
    return names, np.array([number[label] for label in labels], dtype=np.int64)


def _ranks(scores: Floats, truth: Ints, tie: float = 0.0) -> Ints:
    """The place, from 1, of class `truth` [N] among scores [N, C]: behind every other that scores no worse, less `tie`."""
    right = scores[np.arange(len(truth)), truth]
    found: Ints = (~(scores < (right - tie)[:, None])).sum(axis=1)
    return found


def _result(hits: dict[str, Floats]) -> ClassificationResult:
    return ClassificationResult(
        {name: 100.0 * float(each.mean()) for name, each in hits.items()}, hits, {}, {}, {}
    )
