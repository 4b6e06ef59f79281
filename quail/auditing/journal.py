"""What is done of an audit, in a file: one line of JSON a tensor, after a line that says which audit it is."""

import json
import os
import threading
from dataclasses import fields, is_dataclass
from pathlib import Path

import torch

from quail_kernels import BucketComparison
from quail_kernels.update_comparison import UpdateComparison


class Journal:
    """Lines are appended whole; one that an interruption cut short is dropped, and its tensor compared again.

    Raises:
        ValueError: where the file is of another audit, or of none, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike, arguments: dict):
        self._path = Path(path)
        self._lock = threading.Lock()
        self._done: dict[str, dict] = {}
        first = {"audit": json.loads(json.dumps(arguments))}
        try:
            written = self._path.read_bytes() if self._path.exists() else b""
            lines, _, _ = written.rpartition(b"\n")
            if lines:
                head, *done = map(json.loads, lines.splitlines())
                if head != first:
                    raise ValueError(
                        f"resume: expected the file of an audit with these checkpoints and arguments; got {path}"
                    )
                self._done = {entry["name"]: entry for entry in done}
            elif written:
                raise ValueError(f"resume: expected a file that an audit has written; got {path}")
            self._file = self._path.open("r+b" if lines else "wb")
            if lines:
                self._file.truncate(len(lines) + 1)
                self._file.seek(0, os.SEEK_END)
            else:
                self._write(first)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise ValueError(f"resume: expected a file that an audit can go on with; got {path}: {reason}") from None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def find(self, name: str):
        """What was found of a tensor, or None."""
        from .audit import Found
        from .calibration import OutputSums
        from .figures import Change

        entry = self._done.get(name)
        if entry is None:
            return None
        return Found(
            name=entry["name"],
            weights=entry["weights"],
            comparisons={format: _update_comparison(numbers) for format, numbers in entry["comparisons"].items()},
            left_out={format: reason for format, reason in entry["left_out"]},
            change=Change(**entry["change"]) if entry["change"] else None,
            windows=entry["windows"],
            windows_of_few_values=entry["windows_of_few_values"],
            outputs={format: OutputSums(**sums) for format, sums in entry["outputs"].items()},
        )

    def add(self, found) -> None:
        entry = {
            "name": found.name,
            "weights": found.weights,
            "comparisons": {format: _numbers(comparison) for format, comparison in found.comparisons.items()},
            "left_out": list(found.left_out.items()),
            "change": vars(found.change) if found.change else None,
            "windows": found.windows,
            "windows_of_few_values": found.windows_of_few_values,
            "outputs": {format: vars(sums) for format, sums in found.outputs.items()},
        }
        with self._lock:
            self._write(entry)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _write(self, entry: dict) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()


def _numbers(comparison) -> dict:
    """A dataclass of tensors as JSON types; floats come back as they were."""
    numbers = {}
    for entry in fields(comparison):
        value = getattr(comparison, entry.name)
        if is_dataclass(value):
            value = _numbers(value)
        elif isinstance(value, torch.Tensor):
            value = {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
        numbers[entry.name] = value
    return numbers


def _update_comparison(numbers: dict) -> UpdateComparison:
    parts = {name: BucketComparison(**_tensors(numbers[name])) for name in ("own", "before_grid")}
    return UpdateComparison(**(_tensors(numbers) | parts))


def _tensors(numbers: dict) -> dict:
    made = {}
    for name, value in numbers.items():
        if isinstance(value, dict) and value.keys() == {"dtype", "values"}:
            value = torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]))
        made[name] = value
    return made
