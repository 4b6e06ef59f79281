"""Checkpoints on disk, read block of rows by block of rows: safetensors folders, whole or in shards.

Blocks are read into memory of their own, not through a memory map: what a map has touched counts as the process's
memory until the system takes it back, and a bound on that is what an audit promises. Nothing is unpickled, and no
code that comes with a checkpoint is run.
"""

import functools
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .roles import model_of_folder

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_QUANTIZED_NAMES = ("weight", "weight_packed", "qweight")


@dataclass(frozen=True)
class Stored(ABC):
    """One tensor of a checkpoint, as a matrix [product of the leading dimensions, last dimension].

    Attributes:
        name: as the model of the checkpoint spells it.
        shape: the tensor's own.
        dtype: in which ``read`` gives it; None where these are no floating point numbers.
        dtype_on_disk: in the words of the file's format.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    dtype_on_disk: str

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        columns = self.shape[-1] if self.shape else 1
        return (math.prod(self.shape[:-1]), columns)

    @abstractmethod
    def read(self, rows: slice, columns: slice = slice(None), pinned: bool = False) -> torch.Tensor:
        """[rows, columns] of the matrix, contiguous. ``pinned`` asks for page-locked memory."""


@dataclass(frozen=True)
class SafetensorsTensor(Stored):
    file: int
    path: str
    offset: int

    def read(self, rows: slice, columns: slice = slice(None), pinned: bool = False) -> torch.Tensor:
        height, width = self.matrix_shape
        top, bottom, _ = rows.indices(height)
        left, right, _ = columns.indices(width)
        block = torch.empty(bottom - top, right - left, dtype=self.dtype, pin_memory=pinned)
        view = memoryview(block.view(torch.uint8).numpy()).cast("B") if block.numel() else memoryview(b"")
        size = self.dtype.itemsize
        if right - left == width:
            self._fill(view, self.offset + top * width * size)
        else:
            span = (right - left) * size
            for i in range(bottom - top):
                self._fill(view[i * span : (i + 1) * span], self.offset + ((top + i) * width + left) * size)
        return block

    def _fill(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self.file, [view[done:]], offset + done)
            if not count:
                raise ValueError(f"{self.path}: expected {self.name} whole; got a file that became shorter")
            done += count


@dataclass(frozen=True)
class Transposed(Stored):
    """A matrix whose rows are another one's columns."""

    stored: Stored

    @classmethod
    def of(cls, stored: Stored) -> Stored:
        if isinstance(stored, Transposed):
            return stored.stored
        return cls(stored.name, stored.matrix_shape[::-1], stored.dtype, stored.dtype_on_disk, stored)

    def read(self, rows: slice, columns: slice = slice(None), pinned: bool = False) -> torch.Tensor:
        block = self.stored.read(columns, rows).t().contiguous()
        return block.pin_memory() if pinned else block


@dataclass
class Checkpoint:
    """One side of an audit: its tensors by name, and what is known of its model.

    Attributes:
        side: "BEFORE" or "AFTER", for messages.
        build: makes the model of its configuration on the meta device; it may fail in any way.
        tensors: by the names that transformers gives them, or by their own where it does not know the model.
        files: what was opened, for telling whether a checkpoint is still the same.
        set_aside: names of tensors that are there and cannot be read, each with the reason.
    """

    side: str
    build: Callable[[], torch.nn.Module] | None
    tensors: dict[str, Stored]
    files: tuple[Path, ...]
    set_aside: dict[str, str] = field(default_factory=dict)

    @functools.cached_property
    def model(self) -> torch.nn.Module | None:
        """Without memory; None where there is no configuration, or none that transformers can build a model from."""
        try:
            return self.build and self.build()
        except Exception:  # a configuration may ask for anything
            return None

    @property
    def fingerprint(self) -> list[tuple[str, int, int]]:
        """(name, bytes, time of the last change) of each file."""
        stats = [(path.name, path.stat()) for path in self.files]
        return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def open_safetensors(side: str, folder: Path, resources: ExitStack) -> Checkpoint:
    """The safetensors of a folder, headers read; ``resources`` closes them.

    Raises:
        ValueError: on files that are missing, damaged, outside of the folder, or quantized already.
    """
    shards = _shards(side, folder)
    tensors: dict[str, Stored] = {}
    for shard, promised in shards.items():
        found = _open(side, folder / shard, resources)
        if missing := promised - found.keys():
            raise ValueError(f"{side}: expected {some(missing)} in {shard}, as {INDEX} says; got a shard without")
        tensors |= found
    for stored in tensors.values():
        if stored.dtype is None and stored.name.endswith(_QUANTIZED_NAMES):
            got = f"{stored.name} as {stored.dtype_on_disk}"
            raise ValueError(f"{side}: expected weights in 16 or 32 bits; got a checkpoint quantized already, {got}")
    build = functools.partial(model_of_folder, folder) if (folder / "config.json").is_file() else None
    return Checkpoint(side, build, tensors, tuple(folder / shard for shard in shards))


def read_safetensors(side: str, path: Path, resources: ExitStack) -> dict[str, Stored]:
    """The tensors of one file."""
    return _open(side, path, resources)


def _shards(side: str, folder: Path) -> dict[str, set[str]]:
    """The files to open, each with the tensors that the index promises in it."""
    if (folder / SINGLE).is_file():
        return {SINGLE: set()}
    if not (folder / INDEX).is_file():
        files = [path.name for path in folder.iterdir()]
        weights = [name for name in files if name.endswith((".safetensors", ".gguf", ".bin", ".pt", ".pth"))]
        got = some(weights or files) if files else "an empty folder"
        raise ValueError(f"{side}: expected {SINGLE} or {INDEX} in {folder}; got {got}")
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        shards = {shard: set() for shard in weight_map.values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{side}: expected a weight_map in {INDEX}; got {one_line(error)}") from error
    for name, shard in weight_map.items():
        shards[shard].add(name)
    for shard in shards:
        # A path that leads elsewhere could make the audit read any file of the machine.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{side}: expected {INDEX} to name safetensors files beside it; got {shard!r}")
    return shards


def _open(side: str, path: Path, resources: ExitStack) -> dict[str, Stored]:
    try:
        # It checks the header, the offsets and the length of the file; what it does not tell are the offsets.
        with safe_open(path, framework="pt"):
            pass
        file = resources.enter_context(path.open("rb", buffering=0))
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{side}: expected a readable {path.name}; got {one_line(error)}") from error
    header.pop("__metadata__", None)
    return {
        name: SafetensorsTensor(
            name,
            tuple(entry["shape"]),
            _FLOATS.get(entry["dtype"]),
            entry["dtype"],
            file.fileno(),
            path.name,
            8 + length + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def some(names: Iterable[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first[:2]) + (", ..." if len(first) > 2 else "") or "none"


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
