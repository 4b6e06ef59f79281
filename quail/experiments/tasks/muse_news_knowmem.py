"""MUSE-News' questions about the news (Shi et al. 2024, https://arxiv.org/abs/2407.06460): KnowMem on both sets.

A small model does not know the answers, so it learns both sets of questions first; MUSE's own target models know them
(``learn: null``). Each question is asked after the benchmark's in-context examples where ``icl`` is set.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ...data import Example, load_examples
from .language import LanguageSettings, LanguageTask, read_qa


@dataclass(frozen=True)
class Settings(LanguageSettings):
    """``icl``: how many of the ten in-context examples stand before a question that is scored.

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
        return read_qa(self.data / "forget_qa.json"), read_qa(self.data / "retain_qa.json")

    def prepare(self, tokenizer) -> None:
        super().prepare(tokenizer)
        if self.settings.forget_texts:
            self.forget_rows = self._encoded(load_examples(self.data / self.settings.forget_texts))
        if self.settings.retain_texts:
            self.retain_rows = self._encoded(load_examples(self.data / self.settings.retain_texts))

    def _asked(self, model, examples: Sequence[Example]):
        if not self.settings.icl:
            return super()._asked(model, examples)
        side = "forget" if examples is self.forget else "retain"
        shown = read_qa(self.data / f"{side}_qa_icl.json")[: self.settings.icl]
        prefix = "".join(f"{example.prompt}{example.completion}\n\n" for example in shown)
        return super()._asked(model, [Example(prefix + e.prompt, e.completion) for e in examples])
