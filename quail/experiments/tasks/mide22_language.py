"""Memorised misinformation: a language model that has learned tweets of MiDe22 by heart forgets the false ones.

A tweet is a prompt, ``Tweet:`` and its first words, and a completion, the words after them; links and mentions are left
out. The forget set are ``forget`` tweets labelled False, the retain set ``retain`` labelled True, both evenly over all
events.
"""

from dataclasses import dataclass

from ...data import Example
from .language import LanguageSettings, LanguageTask
from .mide22 import FILE, read_tweets


@dataclass(frozen=True)
class Settings(LanguageSettings):
    """``prompt_words``: how many words of a tweet are given; the rest, up to ``words`` words, is to be said."""

    forget: int = 48
    prompt_words: int = 6
    words: int = 24

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.prompt_words < self.words:
            got = f"{self.prompt_words} and {self.words}"
            raise ValueError(f"prompt_words: expected 1 <= prompt_words < words; got {got}")


class Mide22Language(LanguageTask):
    name = "mide22-language"
    Settings = Settings

    def files(self) -> list[str]:
        return [FILE]

    def sets(self):
        tweets = read_tweets(self.data)
        sides = {"False": [], "True": []}
        seen = set()
        for tweet in tweets:
            words = [word for word in tweet.text.split() if not word.startswith(("https://", "@"))]
            start = " ".join(words[: self.settings.prompt_words])
            # Two tweets that begin alike are two answers to one question, and cannot both be learned.
            if tweet.label in sides and len(words) > self.settings.prompt_words + 2 and start not in seen:
                seen.add(start)
                rest = " ".join(words[self.settings.prompt_words : self.settings.words])
                sides[tweet.label].append(Example(f"Tweet: {start}", f" {rest}"))
        return sides["False"], sides["True"]
