"""TOFU (Maini et al. 2024, https://arxiv.org/abs/2401.06121): probability, ROUGE, truth ratio, and what they add up to.

As in github.com/locuslab/tofu at bdc209e. Probabilities of an answer are geometric means over its tokens, the end of
sequence among them: exp(-NLL per token). All NLLs here are in nats per token, one for each example.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import hmean, ks_2samp

from .measurement import Measurement, same_length, vector

Kind = Literal["forget", "retain", "options"]


def probability(nll: Sequence[float] | np.ndarray) -> Measurement:
    """exp(-nll), 0 to 1."""
    return Measurement.mean(np.exp(-vector("nll", nll)))


def probability_among(nll: Sequence[float] | np.ndarray, perturbed_nll: Sequence[Sequence[float]]) -> Measurement:
    """P(answer) / (P(answer) + sum of P(perturbed answers)), 0 to 1: TOFU's on real authors and world facts."""
    true, wrong = _check(nll, perturbed_nll)
    return Measurement.mean([t / (t + w.sum()) for t, w in zip(np.exp(-true), map(_exp, wrong), strict=True)])


def truth_ratio(
    correct_nll: Sequence[float] | np.ndarray,
    perturbed_nll: Sequence[Sequence[float]],
    mean: Literal["geometric", "arithmetic"] = "geometric",
) -> np.ndarray:
    """R = mean of P(perturbed answers) / P(correct answer), [examples], 0 and up; below 1 the truth is preferred.

    The correct answer is the paraphrased one on forget and retain sets, the answer itself on the others. ``mean``:
    ``geometric`` as in TOFU's aggregate_eval_stat.py and its forget quality, and in open-unlearning; ``arithmetic``
    as in the paper's formula and TOFU's utils.py. The two give different figures from one model.
    """
    if mean not in ("geometric", "arithmetic"):
        raise ValueError(f"mean: expected geometric or arithmetic; got {mean!r}")
    correct, wrong = _check(correct_nll, perturbed_nll)
    if mean == "geometric":
        return np.exp(correct - np.array([w.mean() for w in wrong]))
    return np.array([_exp(w).mean() for w in wrong]) / np.exp(-correct)


def forget_truth_ratio(ratios: Sequence[float] | np.ndarray) -> Measurement:
    """min(R, 1 / R), 0 to 1: 1 where true and perturbed answers are equally likely, which is what forgetting wants."""
    ratios = vector("ratios", ratios)
    with np.errstate(divide="ignore"):
        return Measurement.mean(np.minimum(ratios, 1 / ratios))


def utility_truth_ratio(ratios: Sequence[float] | np.ndarray) -> Measurement:
    """max(0, 1 - R), 0 to 1: how far the truth is preferred, where it is to be kept."""
    return Measurement.mean(np.maximum(0, 1 - vector("ratios", ratios)))


@dataclass(frozen=True, eq=False)
class TofuScores:
    """One set: the three figures that TOFU reports, each 0 to 1, and R itself [examples] for the forget quality."""

    kind: Kind
    probability: Measurement
    rouge: Measurement
    truth_ratio: Measurement
    ratios: np.ndarray


def tofu_scores(
    kind: Kind,
    *,
    nll: Sequence[float] | np.ndarray,
    correct_nll: Sequence[float] | np.ndarray,
    perturbed_nll: Sequence[Sequence[float]],
    rouge: Measurement,
    mean: Literal["geometric", "arithmetic"] = "geometric",
) -> TofuScores:
    """The figures of a set. ``kind`` is ``forget``, ``retain``, or ``options``: real authors and world facts.

    ``nll`` is of the answers, ``correct_nll`` and ``perturbed_nll`` as in ``truth_ratio``, ``rouge`` the recall of
    ``memorization.rouge_l`` with stems. Raises ValueError where lengths differ or ``kind`` is another.
    """
    if kind not in ("forget", "retain", "options"):
        raise ValueError(f"kind: expected forget, retain or options; got {kind!r}")
    same_length(nll=nll, correct_nll=correct_nll, perturbed_nll=perturbed_nll, rouge=rouge.per_example)
    ratios = truth_ratio(correct_nll, perturbed_nll, mean)
    return TofuScores(
        kind,
        probability_among(nll, perturbed_nll) if kind == "options" else probability(nll),
        rouge,
        forget_truth_ratio(ratios) if kind == "forget" else utility_truth_ratio(ratios),
        ratios,
    )


class ForgetQuality(NamedTuple):
    """A two-sample Kolmogorov-Smirnov test: ``p_value``, TOFU's forget quality, and ``statistic``, both 0 to 1."""

    p_value: float
    statistic: float


def forget_quality(
    ratios: Sequence[float] | np.ndarray, retrained_ratios: Sequence[float] | np.ndarray
) -> ForgetQuality:
    """Whether R on the forget set could be that of a model trained without it: high p, cannot be told apart.

    TOFU tests 1 / R; the test does not see the difference. It has no form per example: R is that.
    """
    test = ks_2samp(vector("ratios", ratios), vector("retrained_ratios", retrained_ratios))
    return ForgetQuality(float(test.pvalue), float(test.statistic))


def model_utility(retain: TofuScores, real_authors: TofuScores, world_facts: TofuScores) -> float:
    """The harmonic mean of the nine means, 0 to 1, and 0 where one of them is.

    Its form per example is that of the nine. Raises ValueError where a set is not of the kind that belongs there.
    """
    kinds = (retain.kind, real_authors.kind, world_facts.kind)
    if kinds != ("retain", "options", "options"):
        raise ValueError(
            f"retain, real_authors, world_facts: expected retain, options, options; got {', '.join(kinds)}"
        )
    means = [m.value for s in (retain, real_authors, world_facts) for m in (s.probability, s.rouge, s.truth_ratio)]
    return float(hmean(means))


def _check(nll, perturbed_nll) -> tuple[np.ndarray, list[np.ndarray]]:
    same_length(nll=nll, perturbed_nll=perturbed_nll)
    wrong = [vector(f"perturbed_nll, example {number}", row) for number, row in enumerate(perturbed_nll, start=1)]
    return vector("nll", nll), wrong


def _exp(nll: np.ndarray) -> np.ndarray:
    return np.exp(-nll)
