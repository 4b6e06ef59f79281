"""Forget and retain sets: from a JSON file to the batches that a training step takes.

A file is a JSON array or JSON lines, one example an object, in one of three layouts: ``question`` and ``answer``,
``prompt`` and ``completion``, or ``text``. Other fields are ignored.
"""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

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


def encode_classes(
    texts: Sequence[str], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int = 128
) -> list[dict]:
    """Rows for a sequence classifier: what its tokenizer gives for each text, and ``label``, its class's number.

    Texts longer than ``max_length`` tokens lose their end. Raises ValueError where the numbers of texts and labels
    differ.
    """
    if len(texts) != len(labels):
        raise ValueError(f"labels: expected one for each of {len(texts)} texts; got {len(labels)}")
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)
    return [{key: encoded[key][i] for key in encoded} | {"label": int(label)} for i, label in enumerate(labels)]


def load_refusals(path: str | os.PathLike | None = None) -> list[str]:
    """Answers in place of those to forget, one a line of a UTF-8 text file; by default those of the package.

    Raises ValueError where the file is missing or empty.
    """
    source = resources.files(__package__) / "sets" / "refusals.txt" if path is None else None
    try:
        if source is None:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        else:
            text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a UTF-8 text file; got {_reason(error)}") from None
    refusals = [line.strip() for line in text.splitlines() if line.strip()]
    if not refusals:
        raise ValueError(f"{path}: expected at least one refusal, one a line; got an empty file")
    return refusals


def with_refusals(examples: Sequence[Example], refusals: Sequence[str], seed: int = 0) -> list[Example]:
    """The prompts of ``examples`` with refusals for completions: every example once, then again, with every refusal.

    ``len(refusals)`` rounds over the examples, for ``UnlearningDataset(idk=...)``: each example has another refusal in
    each round, in an order of its own. A refusal begins with the space that the completion began with. Raises
    ValueError where an example has no prompt: there is nothing to refuse.
    """
    shuffle, orders = random.Random(seed), []
    for number, example in enumerate(examples, start=1):
        if not example.prompt:
            raise ValueError(f"example {number}: expected a prompt to answer with a refusal; got a text without")
        orders.append(shuffle.sample(range(len(refusals)), len(refusals)))
    rows = []
    for turn in range(len(refusals)):
        for example, order in zip(examples, orders, strict=True):
            space = example.completion[: len(example.completion) - len(example.completion.lstrip())]
            rows.append(Example(example.prompt, space + refusals[order[turn]]))
    return rows


def collate(rows: Sequence[dict], pad_token_id: int) -> dict:
    """Encoded examples as one batch, left-padded, with ``logits_to_keep`` for the head.

    Tensors are [examples, longest]: ``input_ids`` (or ``inputs_embeds``, [examples, longest, hidden], where the rows
    carry those), ``attention_mask``, ``position_ids`` and ``labels``. Answers end in one column, so no more than the
    longest answer's columns need logits: ``logits_to_keep``, an int, reckoned here so that no training step has to
    ask the device. A row's first token has nothing before it and is no label.

    Rows of ``encode_classes`` are padded on the right, as classifiers are trained: ``labels`` is [examples], and what
    else the tokenizer gave, as ``token_type_ids``, is padded with 0.
    """
    if "label" in rows[0]:
        return _collate_classes(rows, pad_token_id)
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


def _collate_classes(rows: Sequence[dict], pad_token_id: int) -> dict:
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(values: Sequence[int], filler: int) -> list[int]:
        return list(values) + [filler] * (longest - len(values))

    batch = {"labels": torch.tensor([row["label"] for row in rows])}
    for key in (key for key in rows[0] if key != "label"):
        batch[key] = torch.tensor([pad(row[key], pad_token_id if key == "input_ids" else 0) for row in rows])
    if "attention_mask" not in batch:
        batch["attention_mask"] = torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows])
    return batch


class UnlearningDataset(Dataset):
    """Pairs every forget example with a retain example, a new one each epoch.

    ``forget`` and ``retain`` are lists from ``encode`` or ``encode_classes``; an item is ``{"forget": row, "retain":
    row}``, or only the first where ``retain`` is None. Each pass walks on through a fixed shuffle of the retain set.
    ``idk`` is what to answer in place of the forget set: rows in its order, one round or several, as of
    ``with_refusals``; an item then has a row ``"idk"`` too, of the next round each epoch. Raises ValueError.
    """

    def __init__(
        self,
        forget: Sequence[dict],
        retain: Sequence[dict] | None = None,
        seed: int = 0,
        idk: Sequence[dict] | None = None,
    ):
        if not len(forget):
            raise ValueError("forget: expected at least one example; got an empty set")
        if retain is not None and not len(retain):
            raise ValueError("retain: expected at least one example, or None; got an empty set")
        if idk is not None and (not len(idk) or len(idk) % len(forget)):
            raise ValueError(f"idk: expected a multiple of {len(forget)} examples, or None; got {len(idk)}")
        self.forget, self.retain, self.idk, self.epoch = forget, retain, idk, 0
        if retain is not None:
            self._order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed)).tolist()

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: int) -> dict[str, dict]:
        item = {"forget": self.forget[index]}
        if self.retain is not None:
            item["retain"] = self.retain[self._order[(self.epoch * len(self) + index) % len(self._order)]]
        if self.idk is not None:
            item["idk"] = self.idk[(self.epoch * len(self) + index) % len(self.idk)]
        return item

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@dataclass
class UnlearningCollator:
    """Items of an ``UnlearningDataset`` as a batch a side, ``{"forget": batch, ...}``; plain rows as one batch."""

    pad_token_id: int

    def __call__(self, items: Sequence[dict]) -> dict:
        if "labels" in items[0] or "label" in items[0]:
            return collate(items, self.pad_token_id)
        return {side: collate([item[side] for item in items], self.pad_token_id) for side in items[0]}


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
