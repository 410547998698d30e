"""Several signals as one score, by a logistic regression on pairs whose truth is known.

Not here: the signals, and the probability that a score becomes (`fit.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capfilt.calibration.fit import class_weights, sigmoid
from capfilt.errors import UserError

Floats = NDArray[np.float64]

INVERSE_PENALTY = 1.0
"""scikit-learn's C. On 160 calibration pictures 0.1 to 10 ranked alike."""


@dataclass(frozen=True)
class Fusion:
    """Signals to one score, the higher the likelier a match; call it on values [T, S] for float64 [T].

    Attributes:
        names: of the signals, in the order of the columns.
        centre, scale: mean and standard deviation of each in the fit.
        weights: of each, per standard deviation.
        intercept: of the log-odds where half of the pairs are true.
    """

    names: tuple[str, ...]
    centre: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    intercept: float

    def __call__(self, values: ArrayLike) -> Floats:
        z = (np.asarray(values, dtype=np.float64) - self.centre) / self.scale
        out: Floats = z @ np.asarray(self.weights) + self.intercept
        return out

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers; `from_dict` reads them back."""
        return {name: list(each) if isinstance(each, tuple) else each for name, each in asdict(self).items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Fusion:
        """Raises UserError where a field is missing or unknown."""
        try:
            fields: dict[str, Any] = {
                name: tuple(each) if isinstance(each, list) else each for name, each in plain.items()
            }
            return cls(**fields)
        except TypeError as error:
            raise UserError(
                f"calibration: the stored fusion cannot be read ({error}); calibrate again"
            ) from error


def fuse(names: Sequence[str], values: ArrayLike, labels: ArrayLike) -> Fusion:
    """The logistic regression of labels [T] on standardised values [T, S]; both classes weigh alike.

    The penalty is half of the squared weights, the intercept has none (scikit-learn's LogisticRegression with
    `class_weight="balanced"`). A signal without variance gets weight 0.
    """
    known, label = np.asarray(values, dtype=np.float64), np.asarray(labels, dtype=np.bool_)
    centre, scale = known.mean(axis=0), known.std(axis=0)
    usable = scale > 1e-9
    scale = np.where(usable, scale, 1.0)
    design = np.column_stack([np.where(usable, (known - centre) / scale, 0.0), np.ones(len(label))])
    penalty = np.append(np.full(known.shape[1], 1.0 / INVERSE_PENALTY), 0.0)
    beta = _newton(design, label, class_weights(label, 0.5), penalty)
    return Fusion(
        tuple(names),
        tuple(centre.tolist()),
        tuple(scale.tolist()),
        tuple(beta[:-1].tolist()),
        float(beta[-1]),
    )


def _newton(design: Floats, label: NDArray[np.bool_], weight: Floats, penalty: Floats) -> Floats:
    def loss(beta: Floats) -> float:
        eta = design @ beta
        return float((weight * (np.logaddexp(0.0, eta) - label * eta)).sum() + (penalty * beta**2).sum() / 2)

    beta = np.zeros(design.shape[1])
    current = loss(beta)
    for _ in range(100):
        p = sigmoid(design @ beta)
        gradient = design.T @ (weight * (p - label)) + penalty * beta
        curvature = design.T @ (design * (weight * p * (1 - p))[:, None]) + np.diag(penalty + 1e-12)
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        # As in `fit._fit_platt`: the loss is convex, so halving finds a descent where Newton overshoots.
        while (proposed := loss(beta - size * step)) > current and size > 1e-8:
            size /= 2
        beta = beta - size * step
        done = current - proposed <= 1e-12 * (abs(current) + 1.0)
        current = proposed
        if done:
            break
    return beta
