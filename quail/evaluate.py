"""What a model still says, as deployed: likelihood, greedy answers, general perplexity, and the benchmarks' protocols.

The figures are those of ``quail.metrics``; here the model is run for them. A protocol takes rows as its files have
them: dictionaries with ``question`` and ``answer`` and the like.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import QA_TEMPLATE, Example, encode
from .inference import (
    TokenScores,
    class_probabilities,
    decode,
    evaluating,
    greedy,
    greedy_ids,
    row_scores,
    token_scores,
)
from .metrics import memorization, muse, tofu
from .metrics.classification import Classification, classification
from .metrics.measurement import Measurement

TOFU_NEW_TOKENS = 200


@dataclass(frozen=True)
class Answer:
    """One example under one model. ``nll`` is nats per answer token, the end of sequence included."""

    prompt: str
    expected: str
    said: str
    nll: float
    rouge_l: float
    exact: bool


@dataclass(frozen=True)
class Scores:
    """Means over examples: NLL in nats per answer token, ROUGE-L recall and exact match in 0 to 1."""

    nll: float
    rouge_l: float
    exact: float
    answers: list[Answer] = field(repr=False)

    @classmethod
    def of(cls, answers: list[Answer]) -> "Scores":
        def mean(name: str) -> float:
            return statistics.fmean(getattr(answer, name) for answer in answers)

        return cls(mean("nll"), mean("rouge_l"), mean("exact"), answers)


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint at a precision. ``perplexity`` is None where no text was given."""

    model: str
    quantizer: str
    forget: Scores
    retain: Scores | None = None
    perplexity: float | None = None

    def to_dict(self) -> dict:
        return asdict(self)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Example],
    retain: Sequence[Example] = (),
    *,
    name: str = "",
    quantizer: str = "none",
    text: str | None = None,
    batch_size: int = 64,
    max_length: int = 512,
) -> Evaluation:
    """Scores a loaded model on a forget set and, where given, a retain set and a general text."""
    examples = [*forget, *retain]
    answers = score_answers(model, tokenizer, examples, batch_size=batch_size, max_length=max_length)
    return Evaluation(
        name,
        quantizer,
        Scores.of(answers[: len(forget)]),
        Scores.of(answers[len(forget) :]) if retain else None,
        perplexity(model, tokenizer, text) if text else None,
    )


def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    max_length: int = 512,
    scores: Sequence[TokenScores] | None = None,
) -> list[Answer]:
    """Each example's answer, by teacher forcing (NLL) and by greedy decoding (ROUGE-L recall, exact match).

    What is expected is the completion's tokens, decoded; of a text without a prompt, those after the first. Decoding
    is given as many tokens as the expected answer has, the end included. ROUGE-L is the rouge-score package's,
    stemmed, as TOFU has it. Exact: the same words, case and punctuation, white space at the ends apart. ``scores`` are
    the examples' ``token_scores``, where they have been made. Raises ValueError where there is no example.
    """
    if not examples:
        raise ValueError("examples: expected at least one; got none")
    rows = encode(examples, tokenizer, max_length)
    completions = [_completion(row) for row in rows]
    if scores is None:
        scores = row_scores(model, rows, tokenizer, batch_size)
    # As far as each token of the answer is the first choice after those before it, greedy decoding says just that.
    foreseen = [int(np.append(score.hits, False).argmin()) for score in scores]
    unforeseen = [i for i, completion in enumerate(completions) if foreseen[i] < len(completion)]
    room = [len(completions[i]) - foreseen[i] for i in unforeseen]
    prompts = [rows[i]["input_ids"][:-left] for i, left in zip(unforeseen, room, strict=True)]
    said_ids = list(completions)
    for i, ids in zip(unforeseen, greedy_ids(model, tokenizer, prompts, room, batch_size=batch_size), strict=True):
        said_ids[i] = [*completions[i][: foreseen[i]], *ids]
    expected, said = ([text.strip() for text in decode(tokenizer, ids)] for ids in (completions, said_ids))
    recall = memorization.rouge_l(expected, said, stem=True).recall.per_example.tolist()
    return [
        Answer(example.prompt, e, s, score.nll, r, e == s)
        for example, e, s, score, r in zip(examples, expected, said, scores, recall, strict=True)
    ]


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, window: int = 512) -> float:
    """exp of the mean NLL per token of ``text``, in windows of ``window`` tokens that do not overlap."""
    ids = tokenizer(text, return_tensors="pt").input_ids[0].to(model.device)
    total, count = 0.0, 0
    with evaluating(model):
        for piece in ids.split(window):
            if len(piece) > 1:
                logits = model(input_ids=piece[None]).logits[0, :-1]
                total += torch.nn.functional.cross_entropy(logits.float(), piece[1:], reduction="sum").item()
                count += len(piece) - 1
    if not count:
        raise ValueError(f"text: expected at least two tokens; got {len(ids)}")
    return float(torch.tensor(total / count).exp())


class Memorization(NamedTuple):
    """Exact memorization and extraction strength of the answers' tokens, the end of sequence left out."""

    exact: Measurement
    extraction: Measurement


def score_memorization(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    max_length: int = 512,
    scores: Sequence[TokenScores] | None = None,
) -> Memorization:
    """By one pass of teacher forcing, or from ``scores``, the examples' ``token_scores``, where they have been made.

    ``metrics.memorization`` says what the two are.
    """
    if scores is None:
        scores = token_scores(model, tokenizer, examples, batch_size=batch_size, max_length=max_length)
    hits = [score.without_end().hits for score in scores]
    return Memorization(memorization.exact_memorization(hits), memorization.extraction_strength(hits))


def score_knowmem(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping],
    shots: Sequence[Mapping] = (),
    *,
    batch_size: int = 64,
) -> memorization.RougeL:
    """MUSE's KnowMem: ``question`` and ``answer`` rows after the in-context ``shots`` of the ``*_icl.json`` file."""
    solved = [(shot["question"], shot["answer"]) for shot in shots]
    prompts = [muse.knowmem_prompt(row["question"], solved) for row in rows]
    room = muse.KNOWMEM_NEW_TOKENS
    said = greedy(model, tokenizer, prompts, max_new_tokens=room, batch_size=batch_size, clean_up=True)
    return muse.knowmem([row["answer"] for row in rows], said)


def score_verbmem(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping],
    *,
    max_new_tokens: int = muse.VERBMEM_NEW_TOKENS,
    batch_size: int = 64,
) -> memorization.RougeL:
    """MUSE's VerbMem: ``prompt`` and ``gt`` rows, the text that follows cut to ``max_new_tokens`` tokens."""
    prompts = [row["prompt"] for row in rows]
    said = greedy(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, clean_up=True)
    expected = [tokenizer(row["gt"]).input_ids[:max_new_tokens] for row in rows]
    return muse.verbmem(decode(tokenizer, expected, clean_up=True), said)


def score_privleak(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[str],
    holdout: Sequence[str],
    retrained: float | PreTrainedModel,
    *,
    share: float = muse.MIN_K_SHARE,
    batch_size: int = 64,
    max_length: int = 2048,
) -> muse.PrivLeak:
    """MUSE's PrivLeak of texts to be forgotten against texts never seen.

    ``retrained`` is a model trained without the forget set, or its ``metrics.muse.membership_auc`` on these texts.
    MUSE does not cut texts; here they end after ``max_length`` tokens, the tokenizer's start token among them.
    """

    def min_k(of: PreTrainedModel, texts: Sequence[str]):
        examples = [Example("", text) for text in texts]
        scores = token_scores(of, tokenizer, examples, batch_size=batch_size, max_length=max_length)
        return muse.min_k([score.without_end().log_probs for score in scores], share)

    if not isinstance(retrained, float | int):
        retrained = muse.membership_auc(min_k(retrained, forget), min_k(retrained, holdout)).value
    return muse.privleak(min_k(model, forget), min_k(model, holdout), retrained)


def score_tofu(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping],
    kind: tofu.Kind,
    *,
    template: str = QA_TEMPLATE,
    max_new_tokens: int = TOFU_NEW_TOKENS,
    batch_size: int = 64,
    max_length: int = 512,
) -> tofu.TofuScores:
    """TOFU's figures of one of its ``*_perturbed`` sets: rows of ``question``, ``answer``, ``perturbed_answer``.

    ``kind`` is ``forget``, ``retain``, or ``options`` (real authors, world facts); the first two also have
    ``paraphrased_answer``. ``template`` makes the prompt, as in ``data.load_examples``. TOFU decodes up to 200 tokens
    in all, the prompt's among them; open-unlearning 200 new ones, as here.
    """
    prompts = [template.replace("{question}", row["question"]) for row in rows]
    # Of options the answer itself is the correct one.
    correct = [[] if kind == "options" else [row["paraphrased_answer"]] for row in rows]
    groups = [[row["answer"], *also, *row["perturbed_answer"]] for row, also in zip(rows, correct, strict=True)]
    examples = [
        Example(prompt, " " + answer.strip()) for prompt, group in zip(prompts, groups, strict=True) for answer in group
    ]
    scores = iter(token_scores(model, tokenizer, examples, batch_size=batch_size, max_length=max_length))
    nlls = [[next(scores).nll for _ in group] for group in groups]
    said = greedy(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return tofu.tofu_scores(
        kind,
        nll=[nll[0] for nll in nlls],
        correct_nll=[nll[len(also)] for nll, also in zip(nlls, correct, strict=True)],
        perturbed_nll=[nll[1 + len(also) :] for nll, also in zip(nlls, correct, strict=True)],
        rouge=memorization.rouge_l([row["answer"] for row in rows], said, stem=True).recall,
    )


def score_classifier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    batch_size: int = 64,
    max_length: int = 512,
) -> Classification:
    """A sequence classifier on labelled texts; ``labels`` are class indices."""
    return classification(
        class_probabilities(model, tokenizer, texts, batch_size=batch_size, max_length=max_length), labels
    )


def _completion(row: dict) -> list[int]:
    """The tokens that are to be said; a text without a prompt keeps its first token as one."""
    return [token for token, label in zip(row["input_ids"][1:], row["labels"][1:], strict=True) if label >= 0]
