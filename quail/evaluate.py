"""What a deployed checkpoint still says: likelihood, greedy answers and general perplexity."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from rouge_score.rouge_scorer import RougeScorer
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import IGNORE_INDEX, Example, collate, encode
from .losses import answer_logits, answer_tokens, token_log_probs


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


@torch.no_grad()
def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    max_length: int = 512,
) -> list[Answer]:
    """Each example's answer, by teacher forcing (NLL) and by greedy decoding (ROUGE-L recall, exact match).

    What is expected is the completion's tokens, decoded; of a text without a prompt, those after the first. Decoding
    is given as many tokens as the longest expected answer of its batch has, the end included. ROUGE-L is the
    rouge-score package's, stemmed, as TOFU has it (https://arxiv.org/abs/2401.06121). Exact: the same words, case and
    punctuation, white space at the ends apart. In bf16 an answer can change with the batch that it is in, as sums do.
    Raises ValueError where there is no example.
    """
    if not examples:
        raise ValueError("examples: expected at least one; got none")
    rows = encode(examples, tokenizer, max_length)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    answers: list[Answer | None] = [None] * len(rows)
    for start in tqdm(range(0, len(order), batch_size), desc="Answers", unit="batch", leave=False, disable=None):
        indices = order[start : start + batch_size]
        nlls, foreseen = _teacher_forced(model, [rows[i] for i in indices], tokenizer.pad_token_id)
        # Where every token of the answer is the first choice after those before it, greedy decoding says just that.
        open_ones = [i for i, known in zip(indices, foreseen, strict=True) if not known]
        said = dict(zip(open_ones, _greedy(model, tokenizer, [rows[i] for i in open_ones]), strict=True))
        for i, nll in zip(indices, nlls, strict=True):
            expected = _decode(tokenizer, [_completion(rows[i])])[0]
            text = said.get(i, expected)
            recall = rouge.score(expected, text)["rougeL"].recall
            answers[i] = Answer(examples[i].prompt, expected, text, nll, recall, text == expected)
    return answers


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, window: int = 512) -> float:
    """exp of the mean NLL per token of ``text``, in windows of ``window`` tokens that do not overlap."""
    ids = tokenizer(text, return_tensors="pt").input_ids[0].to(model.device)
    total, count = 0.0, 0
    for piece in ids.split(window):
        if len(piece) > 1:
            logits = model(input_ids=piece[None]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits.float(), piece[1:], reduction="sum").item()
            count += len(piece) - 1
    if not count:
        raise ValueError(f"text: expected at least two tokens; got {len(ids)}")
    return float(torch.tensor(total / count).exp())


def _teacher_forced(model: PreTrainedModel, rows: Sequence[dict], pad_token_id: int) -> tuple[list[float], list[bool]]:
    """Each row's NLL per answer token, and whether every one of these tokens is the model's first choice."""
    batch = {key: _to(value, model.device) for key, value in collate(rows, pad_token_id).items()}
    logits, labels = answer_logits(model, batch)
    counts = torch.stack([answer_tokens(row) for row in labels])
    first_choice = ((logits.argmax(-1) == labels) | (labels == IGNORE_INDEX)).all(-1)
    return (-token_log_probs(logits, labels).sum(-1) / counts).tolist(), first_choice.tolist()


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict]) -> list[str]:
    if not rows:
        return []
    completions = [_completion(row) for row in rows]
    prompts = [row["input_ids"][: len(row["input_ids"]) - len(c)] for row, c in zip(rows, completions, strict=True)]
    longest, pad = max(map(len, prompts)), tokenizer.pad_token_id
    out = model.generate(
        input_ids=torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device),
        max_new_tokens=max(map(len, completions)),
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _decode(tokenizer, out[:, longest:])


def _completion(row: dict) -> list[int]:
    """The tokens that are to be said; a text without a prompt keeps its first token as one."""
    return [token for token, label in zip(row["input_ids"][1:], row["labels"][1:], strict=True) if label >= 0]


def _decode(tokenizer: PreTrainedTokenizerBase, ids) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _to(value, device: torch.device):
    return value.to(device) if isinstance(value, torch.Tensor) else value
