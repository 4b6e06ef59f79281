"""A classifier's answers: accuracy, macro-F1, AUC and likelihood, by scikit-learn's definitions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import f1_score

from .measurement import Measurement, placements


@dataclass(frozen=True, eq=False)
class Classification:
    """Figures of one set, ``examples`` of them.

    ``accuracy``: 1 where the likeliest class is the label. ``macro_f1``: the mean F1 over the classes that occur among
    labels or predictions, 0 to 1; it has no form per example, ``predicted`` [examples] is that. ``auc``: one class
    against the rest, the mean over the classes that occur; per example, the share of the examples of other classes
    to which the model gives less of this example's class, a tie counting one half; None where only one class occurs.
    ``nll``: nats, of the label.
    """

    accuracy: Measurement
    macro_f1: float
    auc: Measurement | None
    nll: Measurement
    predicted: np.ndarray


def classification(probabilities: np.ndarray, labels: Sequence[int] | np.ndarray) -> Classification:
    """From ``probabilities`` [examples, classes] and ``labels`` [examples], class indices.

    Of two classes with the same probability the first is predicted. Where a probability is NaN nothing is right, and
    AUC and NLL are NaN. Raises ValueError where the shapes do not fit, or a label is no class.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    y = np.asarray(labels)
    if p.ndim != 2 or y.shape != p.shape[:1] or not len(y):
        raise ValueError(
            f"labels: expected one for each row of probabilities [examples, classes]; got {y.shape}, {p.shape}"
        )
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(f"labels: expected integers in 0 to {p.shape[1] - 1}; got {labels!r:.80}")
    broken = np.isnan(p).any(axis=1)
    predicted = np.where(broken, -1, p.argmax(axis=1))
    with np.errstate(divide="ignore"):
        nll = -np.log(p[np.arange(len(y)), y])
    return Classification(
        Measurement.mean(predicted == y),
        float(f1_score(y, predicted, labels=np.union1d(y, predicted[~broken]), average="macro", zero_division=0)),
        _auc(p, y),
        Measurement.mean(nll),
        predicted,
    )


def _auc(p: np.ndarray, y: np.ndarray) -> Measurement | None:
    classes = np.unique(y)
    if len(classes) < 2:
        return None
    per_example = np.empty(len(y))
    for c in classes:
        per_example[y == c] = placements(p[y == c, c], p[y != c, c])
    return Measurement(float(np.mean([per_example[y == c].mean() for c in classes])), per_example)
