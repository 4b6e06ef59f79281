"""The form that every metric has: a figure, and one value for each example."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Measurement:
    """``value`` and ``per_example`` [examples], float64; the mean of the latter unless the metric says otherwise.

    Two models measured on the same examples are compared example by example (``intervals``). A model that gives NaN
    has NaN here: it is not hidden, and ``intervals.recovery`` says that nothing can be estimated.
    """

    value: float
    per_example: np.ndarray

    @classmethod
    def mean(cls, per_example: Sequence[float] | np.ndarray) -> "Measurement":
        """The mean of ``per_example`` [examples]. Raises ValueError where there is none, or the shape is another."""
        values = vector("per_example", per_example)
        return cls(float(values.mean()), values)

    def to_dict(self) -> dict:
        """Plain JSON: ``{"value", "per_example"}``, with null for what is not finite."""
        plain = [float(v) if np.isfinite(v) else None for v in (self.value, *self.per_example)]
        return {"value": plain[0], "per_example": plain[1:]}


def vector(name: str, values) -> np.ndarray:
    """``values`` as a float64 vector. Raises ValueError where it is empty or no vector."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name}: expected one number for each example, and at least one; got {values!r:.80}")
    return array


def same_length(**sequences) -> int:
    """The length that all have. Raises ValueError, with every name and length, where they differ or are 0."""
    lengths = {name: len(sequence) for name, sequence in sequences.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        got = ", ".join(f"{name} of {length}" for name, length in lengths.items())
        raise ValueError(f"{next(iter(lengths))}: expected as many of each, and at least one; got {got}")
    return next(iter(lengths.values()))


def placements(scores, others) -> np.ndarray:
    """For each of ``scores`` the share of ``others`` below it, a tie counting one half; the mean is an AUC.

    Both are vectors; the result is [scores], float64 in 0 to 1. NaN has no place among numbers: any makes all NaN.
    """
    scores, others = vector("scores", scores), np.sort(vector("others", others))
    if np.isnan(scores).any() or np.isnan(others).any():
        return np.full(len(scores), np.nan)
    below, not_above = np.searchsorted(others, scores, "left"), np.searchsorted(others, scores, "right")
    return (below + not_above) / (2 * len(others))
