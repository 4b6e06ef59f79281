"""Forget and retain sets: from a JSON file to the batches that a training step takes.

A file is a JSON array or JSON lines, one example an object, in one of three layouts: ``question`` and ``answer``,
``prompt`` and ``completion``, or ``text``. Other fields are ignored.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

QA_TEMPLATE = "Question: {question}\nAnswer:"
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Example:
    """``completion`` is what is learned, forgotten or measured; ``prompt`` only leads to it and may be empty."""

    prompt: str
    completion: str


def load_examples(path: str | os.PathLike, template: str = QA_TEMPLATE) -> list[Example]:
    """The examples of a JSON or JSON-lines file.

    ``template`` makes the prompt of a question/answer row and holds ``{question}``; the other layouts are taken as
    they are. Raises ValueError where the file is missing, empty or malformed, naming the row.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a UTF-8 JSON file; got {_reason(error)}") from None
    rows = _parse_rows(path, text)
    if not rows:
        raise ValueError(f"{path}: expected at least one example; got an empty set")
    if "{question}" not in template:
        raise ValueError(f"template: expected a text that holds {{question}}; got {template!r}")
    return [_example(path, number, row, template) for number, row in enumerate(rows, start=1)]


def _parse_rows(path, text: str) -> list:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError:
        rows = []
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    expected = "expected a JSON array or one JSON object a line"
                    raise ValueError(f"{path}, line {number}: {expected}; got {error}") from None
    return rows if isinstance(rows, list) else [rows]


def _example(path, number: int, row, template: str) -> Example:
    fields = row if isinstance(row, dict) else {}
    for prompt, completion in (("question", "answer"), ("prompt", "completion"), (None, "text")):
        if completion in fields and (prompt is None or prompt in fields):
            values = [fields[key] for key in (prompt, completion) if key]
            if not all(isinstance(value, str) for value in values) or not fields[completion].strip():
                expected = f"expected text in {' and '.join(filter(None, (prompt, completion)))}"
                raise ValueError(f"{path}, example {number}: {expected}; got {values!r:.200}")
            if prompt == "question":
                return Example(template.replace("{question}", fields["question"]), " " + fields["answer"].strip())
            return Example(fields[prompt] if prompt else "", fields[completion])
    got = ", ".join(fields) if fields else type(row).__name__
    expected = "expected question and answer, prompt and completion, or text"
    raise ValueError(f"{path}, example {number}: {expected}; got {got}")


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int = 512
) -> list[dict[str, list[int]]]:
    """Token ids and labels of each example, ``{"input_ids", "labels"}``, labels -100 over the prompt.

    The completion ends with the end-of-sequence token. Sequences longer than ``max_length`` lose their end.
    Raises ValueError where that would leave nothing of a completion.
    """
    rows = []
    for number, example in enumerate(examples, start=1):
        prompt = tokenizer(example.prompt).input_ids if example.prompt else []
        # A tokenizer's own start token, if it has one, belongs to whichever of the two comes first.
        completion = tokenizer(example.completion, add_special_tokens=not prompt).input_ids
        ids = (prompt + completion + [tokenizer.eos_token_id])[:max_length]
        labels = ([IGNORE_INDEX] * len(prompt) + ids[len(prompt) :])[:max_length]
        if all(label == IGNORE_INDEX for label in labels[1:]):
            got = f"a prompt of {len(prompt)} tokens"
            raise ValueError(f"example {number}: expected room for a completion in {max_length} tokens; got {got}")
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def collate(rows: Sequence[dict], pad_token_id: int) -> dict:
    """Encoded examples as one left-padded batch, with ``logits_to_keep`` for the head.

    Tensors are [examples, longest]: ``input_ids`` (or ``inputs_embeds``, [examples, longest, hidden], where the rows
    carry those), ``attention_mask``, ``position_ids`` and ``labels``. Answers end in one column, so no more than the
    longest answer's columns need logits: ``logits_to_keep``, an int, reckoned here so that no training step has to
    ask the device. A row's first token has nothing before it and is no label.
    """
    lengths = [len(row["labels"]) for row in rows]
    longest = max(lengths)

    def pad(values: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[filler] * (longest - len(v)) + list(v) for v in values])

    labels = [[IGNORE_INDEX, *row["labels"][1:]] for row in rows]
    answers = [sum(label != IGNORE_INDEX for label in row) for row in labels]
    batch = {
        "attention_mask": pad([[1] * n for n in lengths], 0),
        "position_ids": pad([range(n) for n in lengths], 0),
        "labels": pad(labels, IGNORE_INDEX),
        "logits_to_keep": max(answers) + 1,
    }
    if "inputs_embeds" in rows[0]:
        batch["inputs_embeds"] = torch.stack(
            [F.pad(row["inputs_embeds"], (0, 0, longest - n, 0)) for row, n in zip(rows, lengths, strict=True)]
        )
    else:
        batch["input_ids"] = pad([row["input_ids"] for row in rows], pad_token_id)
    return batch


class UnlearningDataset(Dataset):
    """Pairs every forget example with a retain example, a new one each epoch.

    ``forget`` and ``retain`` are lists from ``encode``; an item is ``{"forget": row, "retain": row}``, or only the
    first where ``retain`` is None. Each pass walks on through a fixed shuffle of the retain set.
    """

    def __init__(self, forget: Sequence[dict], retain: Sequence[dict] | None = None, seed: int = 0):
        if not len(forget):
            raise ValueError("forget: expected at least one example; got an empty set")
        if retain is not None and not len(retain):
            raise ValueError("retain: expected at least one example, or None; got an empty set")
        self.forget, self.retain, self.epoch = forget, retain, 0
        if retain is not None:
            self._order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed)).tolist()

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: int) -> dict[str, dict]:
        item = {"forget": self.forget[index]}
        if self.retain is not None:
            item["retain"] = self.retain[self._order[(self.epoch * len(self) + index) % len(self._order)]]
        return item

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@dataclass
class UnlearningCollator:
    """Items of an ``UnlearningDataset`` as ``{"forget": batch, "retain": batch}``; plain rows as one batch."""

    pad_token_id: int

    def __call__(self, items: Sequence[dict]) -> dict:
        if "labels" in items[0]:
            return collate(items, self.pad_token_id)
        return {side: collate([item[side] for item in items], self.pad_token_id) for side in items[0]}


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
