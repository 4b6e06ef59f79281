"""Cells: the pieces of a run, each known by a SHA-256 of everything that decides its result.

A cell's inputs are JSON values: the part of the recipe that it follows, the digests of the files that it reads, the
key of the cell that it starts from, and the version of its stage's code. Its key is the digest of their canonical
form. Where the file of that key is there, the work has been done; nothing else is looked at. So a changed learning
rate makes new cells from there on, and a new quantizer adds scores to the checkpoints that are there.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

# Raised by hand when a change to a stage's code can change its results: older cells are then no longer found.
STAGE_VERSIONS = {"learn": 1, "start": 1, "unlearn": 1, "audit": 1, "score": 1}
WITH_CHECKPOINT = ("learn", "start", "unlearn")
_KEY_DIGITS = 24
_RUN_FILES = {"run.json", "RESULTS.json", "cells", "failed", "checkpoints", "scratch", "lock", ".gitignore"}


@dataclass(frozen=True)
class Cell:
    """One piece of work. ``where`` are its coordinates in a run (seed, regime, method, quantizer), for people."""

    stage: str
    inputs: dict
    where: dict
    parent: "Cell | None" = None
    payload: object = field(default=None, compare=False, repr=False)

    @cached_property
    def key(self) -> str:
        parent = self.parent.key if self.parent else None
        whole = {"stage": self.stage, "version": STAGE_VERSIONS[self.stage], "parent": parent, "inputs": self.inputs}
        return digest_of(whole)

    @property
    def label(self) -> str:
        parts = [self.where.get(name) for name in ("regime", "method", "quantizer")]
        return " ".join([self.stage, f"seed {self.where['seed']}", *(part for part in parts if part)])

    def __hash__(self):
        return hash(self.key)


def digest_of(value) -> str:
    """The first digits of the SHA-256 of a JSON value in canonical form: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]


def digest_of_file(path: str | os.PathLike) -> str:
    """The same digits of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()[:_KEY_DIGITS]


class Store:
    """A run's folder. Every file in it is there whole or not at all.

    Raises ValueError where the folder is no run's and holds something.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        if self.root.exists() and not (self.root / "run.json").is_file():
            found = {path.name for path in self.root.iterdir()} if self.root.is_dir() else {"a file"}
            strange = sorted(name for name in found - _RUN_FILES if not name.endswith(".partial"))
            if strange:
                got = f"{self.root}, which holds {strange[0]}"
                raise ValueError(f"out: expected a new folder or one of an earlier run; got {got}")
        self._lock = None

    def open(self, *, public_cells: bool = False) -> "Store":
        """Makes the folder, and keeps any other process from working on it until this one ends or ``close``.

        A new folder's ``.gitignore`` leaves the cells out unless ``public_cells``. The lock is the kernel's: a killed
        process leaves none. Raises ValueError where another process holds it.
        """
        for folder in ("cells", "checkpoints"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        self._lock = open(self.root / "lock", "a+", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self._lock.close()
            self._lock = None
            raise ValueError(
                f"out: expected a run that no other process works on; got {self.root}, held by {holder}"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()}\n")
        self._lock.flush()
        # What a killed process was in the middle of.
        for partial in (*self.root.glob("*.partial"), *self.root.glob("*/*.partial"), self.root / "scratch"):
            shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)
        if not (self.root / ".gitignore").exists():
            cells = "!cells/\n!cells/*.json\n" if public_cells else ""
            self.write_text(".gitignore", f"*\n!RESULTS.json\n!run.json\n{cells}")
        return self

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def read(self, cell: Cell) -> dict | None:
        """What the cell gave, or None where it has not been run. A file that is no JSON counts as none."""
        return _read_json(self._file(cell))

    def write(self, cell: Cell, outputs: dict, seconds: float, made_by: dict) -> None:
        """Records what the cell gave; an earlier failure of it is forgotten."""
        record = _described(cell) | {"outputs": outputs, "seconds": round(seconds, 2), "made_by": made_by}
        self.write_text(f"cells/{cell.stage}-{cell.key}.json", dumps(record))
        self._file(cell, "failed").unlink(missing_ok=True)

    def failure(self, cell: Cell) -> str | None:
        """Why the cell failed when it was last tried, in a line; None where it did not."""
        return (_read_json(self._file(cell, "failed")) or {}).get("reason")

    def write_failure(self, cell: Cell, reason: str, seconds: float, made_by: dict) -> None:
        """Records a failure beside the cells: the cell counts as not run, and is tried again by the next run."""
        (self.root / "failed").mkdir(exist_ok=True)
        record = _described(cell) | {"reason": reason, "seconds": round(seconds, 2), "made_by": made_by}
        self.write_text(f"failed/{cell.stage}-{cell.key}.json", dumps(record))

    def checkpoint(self, cell: Cell) -> Path:
        return self.root / "checkpoints" / cell.key

    def drop_checkpoint(self, cell: Cell) -> None:
        """Removes it: a process that is killed on the way leaves nothing that looks like a checkpoint."""
        path = self.checkpoint(cell)
        if path.is_dir():
            leaving = path.with_name(f"{path.name}.partial")
            shutil.rmtree(leaving, ignore_errors=True)
            path.rename(leaving)
            shutil.rmtree(leaving, ignore_errors=True)

    def seconds(self, stage: str) -> list[float]:
        """How long each finished cell of a stage took."""
        times = []
        for path in (self.root / "cells").glob(f"{stage}-*.json"):
            try:
                times.append(float(json.loads(path.read_text(encoding="utf-8"))["seconds"]))
            except (json.JSONDecodeError, KeyError):
                continue
        return times

    def write_text(self, name: str, text: str) -> None:
        path = self.root / name
        partial = path.with_name(f"{path.name}.partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def _file(self, cell: Cell, folder: str = "cells") -> Path:
        return self.root / folder / f"{cell.stage}-{cell.key}.json"


def _described(cell: Cell) -> dict:
    return {
        "stage": cell.stage,
        "key": cell.key,
        "where": cell.where,
        "parent": cell.parent.key if cell.parent else None,
        "inputs": cell.inputs,
    }


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def rounded(value, digits: int = 5):
    """A JSON value with its floats to ``digits`` significant digits, and null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def dumps(value, **options) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, **options)
