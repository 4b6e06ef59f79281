"""MUSE (Shi et al. 2024, https://arxiv.org/abs/2407.06460): VerbMem, KnowMem and PrivLeak.

As in github.com/swj0419/muse_bench at fcd6651, with what is particular to it: greedy answers; ROUGE-L without a
stemmer; the F1 is what is reported, not the recall. All figures are fractions here; MUSE prints 100 times as much.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .measurement import Measurement, placements, vector
from .memorization import RougeL, rouge_l

KNOWMEM_NEW_TOKENS = 32
VERBMEM_NEW_TOKENS = 128
MIN_K_SHARE = 0.4
KNOWMEM_STOPS = ("\n\n", "\nQuestion", "Question:")
# AUC of MUSE's own retrained Llama-2-7B, Min-40%, forget against holdout: its constants.py. No other model's.
LLAMA2_7B_RETRAINED_AUC = {"news": 0.4772, "books": 0.5393}


def knowmem_prompt(question: str, shots: Sequence[tuple[str, str]] = ()) -> str:
    """A question after the in-context ``shots`` (question, answer), those of MUSE's ``*_icl.json``.

    It ends with a space after ``Answer:``, as in MUSE.
    """
    solved = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in shots)
    return f"{solved}Question: {question}\nAnswer: "


def cut_answer(said: str) -> str:
    """An answer up to the first of ``KNOWMEM_STOPS``.

    A single new line does not end it, and an answer that begins with an empty line is empty, as in MUSE.
    """
    for stop in KNOWMEM_STOPS:
        said = said.split(stop)[0]
    return said


def knowmem(expected: Sequence[str], said: Sequence[str]) -> RougeL:
    """ROUGE-L of answers to questions, cut by ``cut_answer``; MUSE's KnowMem is the mean of ``f1``, 0 to 1.

    ``said`` is what follows ``knowmem_prompt``, at most ``KNOWMEM_NEW_TOKENS`` tokens.
    """
    return rouge_l(expected, [cut_answer(text) for text in said], stem=False)


def verbmem(expected: Sequence[str], said: Sequence[str]) -> RougeL:
    """ROUGE-L of continuations of a text; MUSE's VerbMem is the mean of ``f1``, 0 to 1.

    ``said`` has at most ``VERBMEM_NEW_TOKENS`` tokens, and ``expected`` is to be cut to as many. MUSE counts a
    tokenizer's start token among those of ``expected``, so that a Llama's is one word piece shorter.
    """
    return rouge_l(expected, said, stem=False)


def min_k(log_probs: Sequence[Sequence[float] | np.ndarray], share: float = MIN_K_SHARE) -> np.ndarray:
    """Min-k%: minus the mean of the lowest ``share`` of each text's token log-probabilities, [texts], in nats.

    ``log_probs`` has, for each text, a value for every token but the first. Low means that the text is familiar. Shi
    et al. 2024, https://arxiv.org/abs/2310.16789. Of n tokens int(n * share) count, and at least one: MUSE has NaN
    where that is 0, open-unlearning one token. Raises ValueError where a text has no value or ``share`` is not in
    0 to 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number in 0 to 1; got {share}")
    scores = []
    for number, row in enumerate(log_probs, start=1):
        lowest = np.sort(vector(f"log_probs, text {number}", row))
        scores.append(-lowest[: max(1, int(len(lowest) * share))].mean())
    return vector("log_probs", scores)


def membership_auc(forget: Sequence[float] | np.ndarray, holdout: Sequence[float] | np.ndarray) -> Measurement:
    """How often a text held out is more familiar than one to be forgotten: 0 where all of the latter are known.

    Both are scores of ``min_k``. This is MUSE's ``forget_holdout`` AUC, one minus the AUC of the usual membership
    attack. Per text of ``forget``: the share of ``holdout`` with a lower score, a tie counting one half.
    """
    return Measurement.mean(placements(forget, holdout))


class PrivLeak(NamedTuple):
    """``privleak`` (AUC - AUC_retrained) / AUC_retrained, and the ``auc`` that it is of."""

    privleak: Measurement
    auc: Measurement


def privleak(
    forget: Sequence[float] | np.ndarray, holdout: Sequence[float] | np.ndarray, retrained_auc: float
) -> PrivLeak:
    """PrivLeak, signed as in MUSE: near 0 is good, -1 is not unlearned at all, above 0 is unlearned too much.

    ``forget`` and ``holdout`` are scores of ``min_k``; ``retrained_auc`` is ``membership_auc`` of a model that was
    trained without the forget set, by the same scores on the same texts. Raises ValueError where that is not in 0 to
    1, or 0. MUSE's own eval.py divides by a constant of its retrained Llama-2-7B.
    """
    if not 0 < retrained_auc <= 1:
        raise ValueError(f"retrained_auc: expected a number above 0 and up to 1; got {retrained_auc}")
    auc = membership_auc(forget, holdout)
    return PrivLeak(Measurement.mean((auc.per_example - retrained_auc) / retrained_auc), auc)
