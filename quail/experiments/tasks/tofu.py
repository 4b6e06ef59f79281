"""TOFU: invented authors (Maini et al. 2024, https://arxiv.org/abs/2401.06121). One or ten of them are forgotten.

Everything is learned first: the forget split and, for the retain set, ``retain`` questions of the other authors. The
paraphrased and perturbed answers are not learned: they only serve the truth ratio. Model utility is TOFU's over three
sets, of which two, questions about real authors and about the world, are only asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from ...data import Example
from ...evaluate import score_tofu, token_scores
from ...metrics import tofu
from ...metrics.measurement import Measurement
from .base import Measured, evenly
from .language import LanguageSettings, LanguageTask, read_qa, read_rows

_RETAIN = "retain_perturbed.json"
_OPTIONS = {name: f"{name}_perturbed.json" for name in ("real_authors", "world_facts")}


@dataclass(frozen=True)
class Settings(LanguageSettings):
    """``split``: the share of the authors to forget, as TOFU names it. ``truth_ratio``: whether it is measured; it
    takes a pass over six or seven answers to each question. ``utility``: how many questions about real authors, and
    how many about the world, are asked for the model utility; 0 leaves it out."""

    split: str = "forget01"
    truth_ratio: bool = True
    utility: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.split not in ("forget01", "forget05", "forget10"):
            raise ValueError(f"split: expected forget01, forget05 or forget10; got {self.split!r}")
        if self.utility and (self.utility < 4 or not self.truth_ratio):
            got = f"{self.utility}" + ("" if self.truth_ratio else " and truth_ratio false")
            raise ValueError(f"utility: expected 0, or at least 4 with truth_ratio; got {got}")


class Tofu(LanguageTask):
    name = "tofu"
    Settings = Settings
    score_settings = LanguageTask.score_settings | {"truth_ratio", "utility"}
    score_files = frozenset(_OPTIONS.values())

    def files(self) -> list[str]:
        return self._learned() + (list(_OPTIONS.values()) if self.settings.utility else [])

    def _learned(self) -> list[str]:
        return [f"{self.settings.split}_perturbed.json", _RETAIN]

    def sets(self):
        for name in self._learned() if self.settings.truth_ratio else ():
            for number, row in enumerate(read_rows(self.data / name), start=1):
                if not row.get("paraphrased_answer") or not row.get("perturbed_answer"):
                    expected = "expected paraphrased_answer and perturbed_answer, or truth_ratio: false"
                    raise ValueError(f"{name}, example {number}: {expected}; got {', '.join(row)}")
        forget, retain = (read_qa(self.data / name) for name in self._learned())
        return forget, retain

    def measure(self, model: nn.Module) -> Measured:
        measured = super().measure(model)
        if self.settings.truth_ratio:
            asked = (self.forget, self.retain_scored)
            for name, file, examples in zip(("forget", "retain"), self._learned(), asked, strict=True):
                rows = read_rows(self.data / file)
                # Rows are found by their question, as the examples may be a part of the file.
                by_prompt = {e.prompt: row for e, row in zip(read_qa(self.data / file), rows, strict=True)}
                chosen = [by_prompt[example.prompt] for example in examples]
                measured.examples[name]["truth_ratio"] = self._ratios(model, examples, chosen)
        for name, file in _OPTIONS.items() if self.settings.utility else ():
            rows = evenly(read_rows(self.data / file), self.settings.utility)
            options = {"batch_size": self.settings.score_batch, "max_length": self.settings.max_length}
            scores = score_tofu(model, self.tokenizer, rows, "options", **options)
            measured.examples[name] = {
                "probability": scores.probability.per_example.tolist(),
                "rouge_l": scores.rouge.per_example.tolist(),
                "truth_ratio": scores.ratios.tolist(),
            }
        return measured

    def rows(self, measured: Measured) -> list[dict]:
        """With the model utility of each half, over its own part of the three sets."""
        rows = super().rows(measured)
        for row in rows if self.settings.utility else ():
            retain = row["examples"]["retain"]
            known = retain | {"probability": tofu.probability(retain["nll"]).per_example}
            sets = [_tofu_scores("retain", known)]
            sets += [_tofu_scores("options", row["examples"][name]) for name in _OPTIONS]
            row["metrics"]["model"]["utility"] = tofu.model_utility(*sets)
        return rows

    def summarize(self, name: str, examples: Mapping[str, list]) -> dict[str, float]:
        """``truth_ratio`` is R by example, and as a figure TOFU's: of min(R, 1 / R) or, retained, of max(0, 1 - R)."""
        plain = {figure: values for figure, values in examples.items() if figure != "truth_ratio"}
        figures = super().summarize(name, plain)
        if "truth_ratio" in examples:
            of_kind = tofu.forget_truth_ratio if name == "forget" else tofu.utility_truth_ratio
            figures["truth_ratio"] = of_kind(examples["truth_ratio"]).value
        return figures

    def _ratios(self, model: nn.Module, examples: list[Example], rows: list[dict]) -> list[float]:
        groups = [[row["paraphrased_answer"], *row["perturbed_answer"]] for row in rows]
        pairs = zip(examples, groups, strict=True)
        answers = [Example(example.prompt, " " + text.strip()) for example, group in pairs for text in group]
        options = {"batch_size": self.settings.score_batch, "max_length": self.settings.max_length}
        scores = iter(token_scores(model, self.tokenizer, answers, **options))
        nlls = [[next(scores).nll for _ in group] for group in groups]
        return tofu.truth_ratio([nll[0] for nll in nlls], [nll[1:] for nll in nlls]).tolist()


def _tofu_scores(kind: tofu.Kind, examples: Mapping[str, list]) -> tofu.TofuScores:
    ratios = np.asarray(examples["truth_ratio"], dtype=np.float64)
    means = (Measurement.mean(examples[name]) for name in ("probability", "rouge_l"))
    return tofu.TofuScores(kind, *means, tofu.utility_truth_ratio(ratios), ratios)
