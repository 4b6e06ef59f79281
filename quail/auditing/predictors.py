"""What could foretell how much forgotten knowledge 4 bits bring back, from an audit, and how well it did.

``predictors`` has the candidates for one checkpoint in one recipe, and ``rank_correlation`` holds them against the
recovery that was measured.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from .figures import AuditReport


def predictors(report: AuditReport, format: str) -> dict[str, float]:
    """The candidates by name, each turned so that more of it predicts more recovery.

    Args:
        report: the audit of the original model against the unlearned one.
        format: one of its recipes, as it was asked for.

    Returns:
        Of the weights:

        - ``code_overlap``, ``value_overlap``: shares of weights with the same bucket, with the same deployed value;
        - ``flip_law``: minus the share of codes that the update should change, mean min(|dw| / s, 1);
        - ``flip_law_deficit``: 1 - changed share / that share: 0 where as many codes changed as the flip law
          expects, 1 where none did. No more than 0 where no code should change;
        - ``delivered_cosine``, ``delivered_share``: minus those figures, a cosine with nothing delivered being 0.

        With a calibration also of the outputs, pooled over layers: ``output_snr``, ``output_snr_median`` (of the
        tensors) and ``output_snr_flip_law``: minus their decibels; ``output_cosine``, ``output_share``: minus those;
        ``output_snr_delivered``: minus the decibels of cosine^2 / (1 - cosine^2), the signal to noise of D x with only
        what arrives along dW x as signal. It tells an update that is not delivered, -120 dB, from one that
        arrives inside noise as large as itself, where ``output_snr`` has 0 dB for both.

    Raises:
        ValueError: on a recipe that the report does not have, or has no figures of, and where no weight changed.
    """
    row = report.formats.get(format)
    if row is None or row.figures is None:
        with_figures = [name for name, row in report.formats.items() if row.figures is not None]
        raise ValueError(f"format: expected one with figures, {', '.join(with_figures)}; got {format!r}")
    figures = row.figures
    if figures.delivered_share is None:
        raise ValueError("report: expected an update of quantized weights; got one that changes none")
    expected = figures.predicted_flip_share
    found = {
        "code_overlap": figures.code_overlap,
        "value_overlap": figures.value_overlap,
        "flip_law": -expected,
        "flip_law_deficit": 1 - figures.changed_share / expected if expected else 0.0,
        "delivered_cosine": -(figures.delivered_cosine or 0.0),
        "delivered_share": -figures.delivered_share,
    }
    outputs = report.calibration and report.calibration.formats.get(format)
    if outputs and outputs.output_share is not None:
        cosine = outputs.output_cosine
        square = max(cosine, 0.0) ** 2
        found |= {
            name: -10 * float(np.log10(value))
            for name, value in (
                ("output_snr", outputs.output_snr),
                ("output_snr_median", outputs.output_snr_median),
                ("output_snr_flip_law", outputs.output_snr_flip_law),
                ("output_snr_delivered", np.clip(square / max(1 - square, 1e-12), 1e-12, 1e12)),
            )
        }
        found |= {"output_cosine": -cosine, "output_share": -outputs.output_share}
    return found


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation with an interval.

    Attributes:
        rho: between -1 and 1; NaN where either side is constant.
        low, high: the percentile bootstrap's interval; NaN where no resample has a correlation.
        level: of the interval.
        cells, clusters: how many were compared, and how many were drawn from.
    """

    rho: float
    low: float
    high: float
    level: float
    cells: int
    clusters: int


def rank_correlation(
    predicted: Sequence[float],
    recovery: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> RankCorrelation:
    """Spearman's rank correlation of a predictor's values with the recovery that was measured, ties at mean ranks.

    Args:
        predicted, recovery: a number a cell, finite, three or more.
        clusters: by cell what it belongs to, as the checkpoint that several recipes were made of: cells of one
            cluster are drawn together, since they are not independent. None: each cell is its own.
        level: of the interval, between 0 and 1.
        resamples: of the bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: the
            percentile interval). Those in which a side is constant have no correlation and are left out.
        seed: of the resamples.

    Raises:
        ValueError: on sides of unlike length, fewer than three cells, numbers that are not finite, and a level or a
            number of resamples out of range.
    """
    x, y = (np.asarray(side, dtype=np.float64) for side in (predicted, recovery))
    if x.ndim != 1 or x.shape != y.shape or len(x) < 3:
        got = f"shapes {x.shape} and {y.shape}"
        raise ValueError(f"predicted, recovery: expected as many of either, three or more; got {got}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("predicted, recovery: expected finite numbers; got NaN or infinity")
    if not 0 < level < 1:
        raise ValueError(f"level: expected between 0 and 1; got {level}")
    if resamples < 1:
        raise ValueError(f"resamples: expected 1 or more; got {resamples}")
    labels = list(range(len(x))) if clusters is None else list(clusters)
    if len(labels) != len(x):
        raise ValueError(f"clusters: expected one a cell, {len(x)}; got {len(labels)}")
    numbers: dict[Hashable, int] = {}
    cluster = [numbers.setdefault(label, len(numbers)) for label in labels]
    n = len(numbers)
    times = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=resamples)[:, cluster]
    drawn = _spearman_of_resamples(x, y, times)
    drawn = drawn[np.isfinite(drawn)]
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (np.nan, np.nan)
    rho = float(spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else float("nan")
    return RankCorrelation(rho, float(low), float(high), level, len(x), n)


def _spearman_of_resamples(x: np.ndarray, y: np.ndarray, times: np.ndarray) -> np.ndarray:
    """By resample, in which cell i is there ``times[resample, i]`` times; NaN where a side is constant."""
    total = times.sum(axis=1, keepdims=True)
    centred = []
    for side in (x, y):
        below, equal = side[None, :] < side[:, None], side[None, :] == side[:, None]
        # The mean rank of a value's copies, and of what is equal to it.
        ranks = times @ below.T.astype(float) + (times @ equal.T.astype(float) + 1) / 2
        centred.append(ranks - (times * ranks).sum(axis=1, keepdims=True) / total)
    a, b = centred
    products = [(times * one * other).sum(axis=1) for one, other in ((a, b), (a, a), (b, b))]
    squares = products[1] * products[2]
    # Ranks are halves of integers: what does not vary is 0 but for the rounding of its mean.
    varies = squares > 1e-9
    return np.where(varies, products[0] / np.sqrt(np.where(varies, squares, 1)), np.nan)
