"""A model run over texts: what it makes of known tokens, what it says, and which class it sees.

All are deterministic: no dropout, no sampling, no penalty that a checkpoint's own generation settings ask for, and
answers that do not depend on which examples share a batch, rounding apart (in bf16 that can change a token).
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import IGNORE_INDEX, Example, collate, encode
from .losses import answer_logits, token_log_probs
from .machine import linear_in_fp32

# Logits of this many tokens are held at once; at a vocabulary of 128,000 that is 2 GB in fp32.
_TOKENS_AT_ONCE = 4096
_PROMPT_TOKENS_AT_ONCE = 16384


@dataclass(frozen=True, eq=False)
class TokenScores:
    """One example's answer tokens, each after the true tokens before it.

    ``log_probs`` [tokens], float64, nats; ``hits`` [tokens], whether each is the model's first choice; ``ended``,
    whether the last of them is the end of sequence that ``data.encode`` adds: all but where an answer was cut.
    """

    log_probs: np.ndarray
    hits: np.ndarray
    ended: bool

    @property
    def nll(self) -> float:
        """Nats per token, the end of sequence included."""
        return float(-self.log_probs.mean())

    def without_end(self) -> "TokenScores":
        """The tokens of the text alone."""
        return TokenScores(self.log_probs[:-1], self.hits[:-1], False) if self.ended else self


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and as fast as this processor can."""
    training = model.training
    model.eval()
    try:
        with linear_in_fp32(model.device):
            yield
    finally:
        model.train(training)


@torch.no_grad()
def token_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    max_length: int = 512,
) -> list[TokenScores]:
    """Each example's completion by teacher forcing; of an example without a prompt, all tokens but the first.

    Raises ValueError where there is no example, or no room for a completion in ``max_length`` tokens.
    """
    if not examples:
        raise ValueError("examples: expected at least one; got none")
    return row_scores(model, encode(examples, tokenizer, max_length), tokenizer, batch_size)


@torch.no_grad()
def row_scores(
    model: PreTrainedModel, rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
) -> list[TokenScores]:
    """``token_scores`` of rows from ``data.encode``."""
    scores: list = [None] * len(rows)
    with evaluating(model):
        for indices in _batches([len(r["labels"]) for r in rows], batch_size, _TOKENS_AT_ONCE, "Likelihood"):
            batch = collate([rows[i] for i in indices], tokenizer.pad_token_id)
            batch = {key: v.to(model.device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
            logits, labels = answer_logits(model, batch)
            log_probs, hits = token_log_probs(logits, labels).cpu(), (logits.argmax(-1) == labels).cpu()
            for i, row_log_probs, row_hits, kept in zip(
                indices, log_probs, hits, (labels != IGNORE_INDEX).cpu(), strict=True
            ):
                ended = rows[i]["input_ids"][-1] == tokenizer.eos_token_id
                scores[i] = TokenScores(row_log_probs[kept].double().numpy(), row_hits[kept].numpy(), ended)
    return scores


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    clean_up: bool = False,
) -> list[str]:
    """What the model says after each prompt, up to its end of sequence or ``max_new_tokens``.

    ``clean_up`` takes out the spaces that a word tokenizer leaves before punctuation. Raises ValueError where a
    prompt has no token.
    """
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    said = greedy_ids(model, tokenizer, ids, [max_new_tokens] * len(ids), batch_size=batch_size)
    return decode(tokenizer, said, clean_up=clean_up)


@torch.no_grad()
def greedy_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    room: Sequence[int],
    *,
    batch_size: int = 64,
) -> list[list[int]]:
    """``greedy`` on token ids: at most ``room[i]`` new ones after ``prompts[i]``, special tokens among them."""
    for number, prompt in enumerate(prompts, start=1):
        if not len(prompt):
            raise ValueError(f"prompt {number}: expected at least one token; got none")
    said: list = [None] * len(prompts)
    with evaluating(model):
        for indices in _batches(list(map(len, prompts)), batch_size, _PROMPT_TOKENS_AT_ONCE, "Answers"):
            rows, longest = [list(prompts[i]) for i in indices], max(len(prompts[i]) for i in indices)
            pads = [longest - len(row) for row in rows]
            out = model.generate(
                input_ids=_on(model, [[tokenizer.pad_token_id] * n + row for n, row in zip(pads, rows, strict=True)]),
                attention_mask=_on(model, [[0] * n + [1] * len(row) for n, row in zip(pads, rows, strict=True)]),
                max_new_tokens=max(room[i] for i in indices),
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            for i, row in zip(indices, out[:, longest:].tolist(), strict=True):
                said[i] = row[: room[i]]
    return said


@torch.no_grad()
def class_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int = 512,
) -> np.ndarray:
    """A sequence classifier's probabilities, [texts, classes], float64. Longer texts lose their end.

    Raises ValueError where there is no text.
    """
    if not len(texts):
        raise ValueError("texts: expected at least one; got none")
    ids = [tokenizer(text, truncation=True, max_length=max_length).input_ids for text in texts]
    rows: list = [None] * len(ids)
    with evaluating(model):
        for indices in _batches(list(map(len, ids)), batch_size, None, "Classes"):
            batch = tokenizer.pad({"input_ids": [ids[i] for i in indices]}, return_tensors="pt").to(model.device)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for i, row in zip(indices, logits.double().softmax(-1).cpu().numpy(), strict=True):
                rows[i] = row
    return np.stack(rows)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], *, clean_up: bool = False) -> list[str]:
    """Texts of token ids, special tokens left out."""
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [tokenizer.clean_up_tokenization(text) for text in texts] if clean_up else texts


def _batches(lengths: Sequence[int], batch_size: int, tokens: int | None, title: str) -> Iterator[list[int]]:
    """Indices, shortest first, at most ``batch_size`` and, padded, ``tokens`` at once (one longer than that alone)."""
    order, start = sorted(range(len(lengths)), key=lambda i: lengths[i]), 0
    with tqdm(total=len(order), desc=title, leave=False, disable=None) as bar:
        while start < len(order):
            end = start + 1
            while end < min(start + batch_size, len(order)):
                if tokens is not None and lengths[order[end]] * (end + 1 - start) > tokens:
                    break
                end += 1
            yield order[start:end]
            bar.update(end - start)
            start = end


def _on(model: PreTrainedModel, values: Sequence) -> torch.Tensor:
    return torch.tensor(values, device=model.device)
