"""MUSE-News' questions about the news (Shi et al. 2024, https://arxiv.org/abs/2407.06460): KnowMem on both sets.

A small model does not know the answers, so it learns both sets of questions first; MUSE's own target models know them
(``learn: null``). KnowMem asks each question after the benchmark's in-context examples.
"""

from dataclasses import dataclass

from torch import nn

from ...data import Example, load_examples
from ...evaluate import score_knowmem
from .base import Measured, evenly
from .language import LanguageSettings, LanguageTask, read_qa, read_rows


@dataclass(frozen=True)
class Settings(LanguageSettings):
    """``icl``: how many of the ten in-context examples KnowMem shows before a question.

    ``forget_texts`` and ``retain_texts``: files of the data folder to unlearn on instead of the questions, as MUSE has
    it (its articles, not part of the package); JSON with ``text``, or any layout of ``quail.data``."""

    icl: int = 10
    forget_texts: str | None = None
    retain_texts: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.icl <= 10:
            raise ValueError(f"icl: expected 0 to 10; got {self.icl}")


class MuseNewsKnowMem(LanguageTask):
    name = "muse-news-knowmem"
    Settings = Settings
    score_settings = LanguageTask.score_settings | {"icl"}

    def files(self) -> list[str]:
        own = ["forget_qa.json", "retain_qa.json", "forget_qa_icl.json", "retain_qa_icl.json"]
        return own + [name for name in (self.settings.forget_texts, self.settings.retain_texts) if name]

    def sets(self):
        return self._file("forget_qa"), self._file("retain_qa")

    def prepare(self, tokenizer) -> None:
        super().prepare(tokenizer)
        if self.settings.forget_texts:
            self.forget_rows = self._encoded(load_examples(self.data / self.settings.forget_texts))
        if self.settings.retain_texts:
            self.retain_rows = self._encoded(load_examples(self.data / self.settings.retain_texts))

    def calibration_texts(self, count: int) -> list[str]:
        if not self.settings.retain_texts:
            return super().calibration_texts(count)
        examples = load_examples(self.data / self.settings.retain_texts)
        return [example.prompt + example.completion for example in evenly(examples, count)]

    def measure(self, model: nn.Module) -> Measured:
        """``knowmem`` beside the figures of the questions alone, without examples before them."""
        measured = super().measure(model)
        for name, examples in (("forget", self.forget), ("retain", self.retain_scored)):
            rows = {e.prompt: row for e, row in zip(self._file(f"{name}_qa"), self._rows(f"{name}_qa"), strict=True)}
            shots = self._rows(f"{name}_qa_icl")[: self.settings.icl]
            asked = [rows[example.prompt] for example in examples]
            scores = score_knowmem(model, self.tokenizer, asked, shots, batch_size=self.settings.score_batch)
            measured.examples[name]["knowmem"] = scores.f1.per_example.tolist()
        return measured

    def _file(self, name: str) -> list[Example]:
        return read_qa(self.data / f"{name}.json")

    def _rows(self, name: str) -> list[dict]:
        return read_rows(self.data / f"{name}.json")
