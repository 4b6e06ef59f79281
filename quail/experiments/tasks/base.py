"""What every task has: its sets in two halves, and what is measured on them.

Each set is divided by the parity of an example's place: even ones are the *validation* half, on which training stops
and methods are chosen, odd ones the *report* half. Unlearning trains on both halves of the forget set.
"""

import os
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import AutoTokenizer

from ..cells import digest_of, digest_of_file

HALVES = ("validation", "report")
_OF_A_MODEL = (".safetensors", ".bin", ".gguf", ".json", ".txt", ".model")


@dataclass(frozen=True)
class Measured:
    """One model's figures.

    ``examples``: for each set and figure a number an example, in the set's order. ``model``: figures of the model as
    a whole. ``texts``: what it said, for each set a text an example; empty where a model says nothing.
    """

    examples: dict[str, dict[str, list]]
    model: dict[str, float]
    texts: dict[str, list[str]]


class Task(ABC):
    """One task on one folder of data. ``Settings`` is the dataclass of what a recipe's ``settings`` may hold.

    ``prepare`` is called with the tokenizer before anything else than ``digests`` and ``load_base``.
    """

    name: ClassVar[str]
    Settings: ClassVar[type]
    stop_metrics: ClassVar[tuple[str, ...]]
    needs_data: ClassVar[bool] = True
    auto: ClassVar[type]
    forget_losses: ClassVar[tuple[str, ...]] = ("ga", "npo", "simnpo", "rmu")
    # What neither learning nor unlearning reads: settings, and data files.
    score_settings: ClassVar[frozenset[str]] = frozenset()
    score_files: ClassVar[frozenset[str]] = frozenset()
    # Raised by hand when a change to the task's figures is to be made in scores that are there, too.
    score_version: ClassVar[int] = 1
    # Whether its cells hold what models said, which is the data's text. Those of others can be committed beside
    # RESULTS.json, which then leaves to them what is by example and by layer.
    cells_quote: ClassVar[bool] = True

    def __init__(self, settings, data: Path | None, model: str | None):
        self.settings, self.data, self.model = settings, data, model

    @abstractmethod
    def files(self) -> list[str]:
        """The names of the data files that are read, inside the folder of the data."""

    @abstractmethod
    def model_folder(self) -> str:
        """The folder, or hub name, that the base model is loaded from. Raises ValueError where there is none."""

    @abstractmethod
    def load_base(self, seed: int) -> tuple[nn.Module, object]:
        """The base model in fp32 and its tokenizer; ``seed`` makes what the base model lacks (a head)."""

    def load(self, checkpoint: str | os.PathLike) -> tuple[nn.Module, object]:
        """A checkpoint of the run in fp32, and its tokenizer."""
        model = self.auto.from_pretrained(checkpoint, dtype=torch.float32)
        return model, self.load_tokenizer(checkpoint)

    def load_tokenizer(self, checkpoint: str | os.PathLike):
        return AutoTokenizer.from_pretrained(checkpoint)

    @abstractmethod
    def prepare(self, tokenizer) -> None:
        """Reads the data and sets ``learn_rows``, ``forget_rows`` and ``retain_rows``: what batches are made of."""

    @abstractmethod
    def validate(self, model: nn.Module) -> dict[str, float]:
        """The ``stop_metrics`` on the validation half of the forget set, of a model in training."""

    @abstractmethod
    def measure(self, model: nn.Module) -> Measured:
        """Everything that is reported of a deployed model, on both halves of every set."""

    def trained(self, model: nn.Module) -> None:
        """Freezes what is not to be trained; by default everything is."""
        model.requires_grad_(True)

    def refusals(self, config) -> list[dict]:
        """Rows that answer the forget set's prompts with refusals, for the losses ``idk`` and ``dpo``.

        Raises ValueError where the task has no prompts to refuse, as by default.
        """
        expected = f"expected one of {', '.join(self.forget_losses)} for {self.name}"
        raise ValueError(f"forget_loss: {expected}; got {config.forget_loss!r}")

    def calibration_texts(self, count: int) -> list[str]:
        """At most ``count`` texts for quantizers that calibrate, like those that are kept and none that is reported.

        None is of the forget set or of the report half. Raises ValueError where the task has no texts for that, as by
        default.
        """
        raise ValueError(f"calibration: expected a task of language models; got {self.name}")

    def summarize(self, name: str, examples: Mapping[str, list]) -> dict[str, float]:
        """Figures of one half of the set ``name`` from those of its examples; by default their means."""
        return {figure: statistics.fmean(values) for figure, values in examples.items()}

    def digests(self) -> dict[str, str]:
        """A digest of each data file that is read, and of the base model. Raises ValueError where one is missing."""
        digests = {}
        for name in self.files():
            path = self.data / name
            if not path.is_file():
                raise ValueError(f"data: expected the file {name} in {self.data}; got none")
            digests[name] = digest_of_file(path)
        return digests | {"model": _digest_of_model(self.model_folder())}

    def rows(self, measured: Measured) -> list[dict]:
        """One row for each half: ``half``, ``metrics`` and ``examples``, by set."""
        rows = []
        for number, half in enumerate(HALVES):
            examples = {
                name: {figure: values[number::2] for figure, values in figures.items()}
                for name, figures in measured.examples.items()
            }
            metrics = {name: self.summarize(name, figures) for name, figures in examples.items()}
            if measured.model:
                metrics["model"] = dict(measured.model)
            rows.append({"half": half, "metrics": metrics, "examples": examples})
        return rows


def evenly(items: list, count: int) -> list:
    """``count`` items at even distances, or all of them where there are no more."""
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


def _digest_of_model(folder: str) -> str:
    """Of every file of a folder that can matter to the model; a hub name stands for itself."""
    if not os.path.isdir(folder):
        return folder
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in _OF_A_MODEL)
    return digest_of({path.name: digest_of_file(path) for path in files})
