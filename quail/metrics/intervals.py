"""Bootstrap intervals over examples and seeds, and the share of forgetting that quantization undid.

Values are [seeds, examples]: one metric of the same examples under models trained with several seeds. Both are drawn
again, with replacement: seeds, and examples once for all seeds and all models, since an example that is hard is hard
under every one of them (a crossed design; Owen 2007, The pigeonhole bootstrap, https://arxiv.org/abs/0712.1111).
Ends are percentiles. README.md has how often such intervals hold the truth: with few seeds that differ much, too
seldom; with one seed they say nothing about others.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# In the metric's units. Where less was forgotten, the quotient is huge or reverses what it says.
SMALLEST_FORGOTTEN = 0.01

_RESAMPLES_AT_ONCE = 500


@dataclass(frozen=True)
class Interval:
    """A mean, ``value``, and the ends of its interval, in the metric's units."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Recovery:
    """How much of what was forgotten came back; 1 is all (100 %).

    ``value``, ``low`` and ``high`` are None where ``reason`` says why there is no estimate. ``came_back`` (quantized
    unlearned - unlearned) and ``forgotten`` (quantized original - unlearned) are the two differences in the metric's
    own units, always there unless a value is not finite. ``unbounded`` is the share of resamples in which nothing was
    forgotten, so that the quotient has no meaning.
    """

    value: float | None
    low: float | None
    high: float | None
    reason: str | None
    came_back: Interval | None
    forgotten: Interval | None
    unbounded: float
    seeds: int
    examples: int
    resamples: int
    confidence: float


def mean_interval(values, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of ``values`` [seeds, examples] or [examples], and its interval; of a - b, a paired difference.

    The same input and ``seed`` give the same ends. Values that are not finite make all three NaN. Raises ValueError
    where there are fewer than two examples, or on an impossible ``confidence`` or ``resamples``.
    """
    values = _values("values", values)
    _check(confidence, resamples)
    if not np.isfinite(values).all():
        return Interval(math.nan, math.nan, math.nan)
    (means,) = _resampled([values], resamples, seed)
    return _interval(values, means, confidence)


def recovery(
    quantized_unlearned,
    unlearned,
    quantized_original,
    *,
    higher_is_remembered: bool = True,
    smallest: float = SMALLEST_FORGOTTEN,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Recovery:
    """(mean of quantized unlearned - mean of unlearned) / (mean of quantized original - mean of unlearned).

    Each is [seeds, examples] or [examples], values of one metric on the forget set, the same seeds and examples in
    the same places: a resample takes the same of all three. Below 0 quantization forgot more; above 1 the quantized
    unlearned model knows more than the quantized original.

    There is no estimate, and ``reason`` says so, where a value is not finite; where less than ``smallest`` (in the
    metric's units) was forgotten, or the quantized original remembers *less* than the unlearned model
    (``higher_is_remembered``: false for NLL), since a small or wrong-way denominator makes the quotient huge or
    reverses what it says; and where the interval would have no end: resamples in which nothing was forgotten count as
    beyond both ends, and where they are more than an end leaves outside it, that end does not exist. That is when
    the denominator does not differ from 0 at this confidence, which is also when Fieller's interval is unbounded.
    Raises ValueError as ``mean_interval``, and where shapes differ.
    """
    arms = {
        "quantized_unlearned": _values("quantized_unlearned", quantized_unlearned),
        "unlearned": _values("unlearned", unlearned),
        "quantized_original": _values("quantized_original", quantized_original),
    }
    _check(confidence, resamples)
    shapes = [array.shape for array in arms.values()]
    if len(set(shapes)) != 1:
        raise ValueError(f"{', '.join(arms)}: expected one shape [seeds, examples]; got {shapes}")
    if not smallest > 0:
        raise ValueError(f"smallest: expected a number above 0; got {smallest}")
    (seeds, examples), sign = shapes[0], 1 if higher_is_remembered else -1

    def result(value=None, low=None, high=None, reason=None, came_back=None, forgotten=None, unbounded=0.0):
        sizes = (seeds, examples, resamples, confidence)
        return Recovery(value, low, high, reason, came_back, forgotten, unbounded, *sizes)

    for name, array in arms.items():
        if not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            return result(reason=f"{name}: {count} of {array.size} values are not finite")
    back, gone = arms["quantized_unlearned"] - arms["unlearned"], arms["quantized_original"] - arms["unlearned"]
    backs, gones = _resampled([back, gone], resamples, seed)
    lost = gones * sign <= 0
    shared = {
        "came_back": _interval(back, backs, confidence),
        "forgotten": _interval(gone, gones, confidence),
        "unbounded": float(lost.mean()),
    }
    if gone.mean() * sign < smallest:
        means = f"quantized original {arms['quantized_original'].mean():.4g}, unlearned {arms['unlearned'].mean():.4g}"
        return result(reason=f"less than {smallest:g} was forgotten: {means}", **shared)
    ratios = np.divide(backs, gones, out=np.zeros_like(backs), where=~lost)
    tail = (1 - confidence) / 2
    low = float(np.quantile(np.where(lost, -np.inf, ratios), tail, method="lower"))
    high = float(np.quantile(np.where(lost, np.inf, ratios), 1 - tail, method="higher"))
    if not (math.isfinite(low) and math.isfinite(high)):
        share = f"nothing was forgotten in {lost.mean():.1%} of the resamples"
        return result(reason=f"the interval has no end: {share}", **shared)
    return result(float(back.mean() / gone.mean()), low, high, None, **shared)


def _values(name: str, values) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or not len(array) or array.shape[1] < 2:
        raise ValueError(f"{name}: expected [seeds, examples], at least two examples; got {np.shape(array)}")
    return array


def _check(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number in 0 to 1; got {confidence}")
    if resamples < 100:
        raise ValueError(f"resamples: expected 100 or more; got {resamples}")


def _resampled(arms: list[np.ndarray], resamples: int, seed: int) -> np.ndarray:
    """The mean of each arm [seeds, examples] in every resample, [arms, resamples]; the same draws for all arms."""
    seeds, examples = arms[0].shape
    means = []
    for by_seed, by_example in _draws(seeds, examples, resamples, np.random.default_rng(seed)):
        means.append([np.einsum("re,re->r", by_seed @ arm, by_example) / (seeds * examples) for arm in arms])
    return np.concatenate(means, axis=1)


def _draws(seeds: int, examples: int, resamples: int, rng: np.random.Generator) -> Iterator[tuple]:
    """How often each seed [resamples, seeds] and each example [resamples, examples] is drawn, some at a time."""
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        count = min(_RESAMPLES_AT_ONCE, resamples - start)
        yield tuple(rng.multinomial(n, np.full(n, 1 / n), count).astype(np.float64) for n in (seeds, examples))


def _interval(values: np.ndarray, means: np.ndarray, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))
