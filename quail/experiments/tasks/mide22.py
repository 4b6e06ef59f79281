"""Reading MiDe22's English tweets, as their authors published them."""

import csv
from dataclasses import dataclass
from pathlib import Path

FILE = "mide22_en_misinfo_tweets.tsv"
LABELS = ("True", "False", "Other")


@dataclass(frozen=True)
class Tweet:
    event: str
    label: str
    text: str


def read_tweets(folder: Path) -> list[Tweet]:
    """All tweets, in the file's order. Raises ValueError where a column is missing."""
    with open(folder / FILE, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        missing = {"event_id", "label", "text"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{FILE}: expected columns event_id, label and text; got none of {', '.join(missing)}")
        return [Tweet(row["event_id"], row["label"], row["text"]) for row in reader]
