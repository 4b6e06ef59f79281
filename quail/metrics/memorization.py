"""How much of a known answer a model still gives: word overlap of what it says, and tokens that it foresees."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from .measurement import Measurement, same_length


class RougeL(NamedTuple):
    """ROUGE-L, each 0 to 1: ``recall`` is the longest common subsequence over the words expected, ``f1`` its F1."""

    f1: Measurement
    recall: Measurement


def rouge_l(expected: Sequence[str], said: Sequence[str], *, stem: bool) -> RougeL:
    """ROUGE-L of each answer against what was expected, by the rouge-score package.

    Words are runs of a to z and 0 to 9 after lower-casing, whatever the language. MUSE does not stem
    (``stem=False``) and reports F1; TOFU does and reports recall. An answer without a word scores 0. Raises ValueError
    where the two differ in length or are empty.
    """
    same_length(expected=expected, said=said)
    scorer = RougeScorer(["rougeL"], use_stemmer=stem)
    scores = [scorer.score(e, s)["rougeL"] for e, s in zip(expected, said, strict=True)]
    return RougeL(Measurement.mean([s.fmeasure for s in scores]), Measurement.mean([s.recall for s in scores]))


def exact_match(expected: Sequence[str], said: Sequence[str]) -> Measurement:
    """1 where an answer is the same text, case and punctuation included, white space at the ends apart; else 0."""
    same_length(expected=expected, said=said)
    return Measurement.mean([float(e.strip() == s.strip()) for e, s in zip(expected, said, strict=True)])


def exact_memorization(hits: Sequence[Sequence[bool] | np.ndarray]) -> Measurement:
    """The share of an answer's tokens that are the model's first choice after the true tokens before them.

    ``hits`` has, for each example, one truth value for each token. As open-unlearning's ``exact_memorization``
    (https://arxiv.org/abs/2506.12618), which does not count the end of sequence: leave its token out to compare.
    0 to 1. Raises ValueError where an example has no token.
    """
    return Measurement.mean([row.mean() for row in _rows(hits)])


def extraction_strength(hits: Sequence[Sequence[bool] | np.ndarray]) -> Measurement:
    """1 - k / n, where k is the shortest prefix of an answer of n tokens after which the model foresees the rest.

    ``hits`` as for ``exact_memorization``. Carlini et al. 2021 (https://arxiv.org/abs/2012.07805) measure the length
    of the suffix that a prefix draws out; this form is open-unlearning's ``extraction_strength``. There k is at most
    n - 1, so an answer of which not even the last token is foreseen scores 1 / n, as one whose last token alone is:
    kept, so that figures compare. 0 (never reached) to 1. Raises ValueError where an example has no token.
    """
    strengths = []
    for row in _rows(hits):
        missed = np.flatnonzero(~row)
        prefix = missed[-1] + 1 if len(missed) else 0
        strengths.append(1 - min(prefix, len(row) - 1) / len(row))
    return Measurement.mean(strengths)


def _rows(hits) -> list[np.ndarray]:
    rows = [np.asarray(row, dtype=bool) for row in hits]
    for number, row in enumerate(rows, start=1):
        if row.ndim != 1 or not len(row):
            raise ValueError(f"hits, example {number}: expected a truth value for each token; got shape {row.shape}")
    return rows
