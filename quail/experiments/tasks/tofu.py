"""TOFU: invented authors (Maini et al. 2024, https://arxiv.org/abs/2401.06121). One or ten of them are forgotten.

Everything is learned first: the forget split and, for the retain set, ``retain`` questions of the other authors.
"""

from dataclasses import dataclass

from .language import LanguageSettings, LanguageTask, read_qa

_RETAIN = "retain_perturbed.json"


@dataclass(frozen=True)
class Settings(LanguageSettings):
    """``split``: the share of the authors to forget, as TOFU names it."""

    split: str = "forget01"

    def __post_init__(self):
        super().__post_init__()
        if self.split not in ("forget01", "forget05", "forget10"):
            raise ValueError(f"split: expected forget01, forget05 or forget10; got {self.split!r}")


class Tofu(LanguageTask):
    name = "tofu"
    Settings = Settings

    def files(self) -> list[str]:
        return [f"{self.settings.split}_perturbed.json", _RETAIN]

    def sets(self):
        forget, retain = (read_qa(self.data / name) for name in self.files())
        return forget, retain
