"""The comparison of two checkpoints: every weight that a 4-bit deployment quantizes, before and after.

Each is put into its bucket with its own side's scales, as two deployments would have them, and once on BEFORE's grid,
as the argument of the QUAIL paper (https://arxiv.org/abs/2601.15538) has it. What the deployment leaves in full
precision is measured apart, since an update that lives there survives as it is. No tensor goes missing in silence:
``not_compared`` names it and says why.

Three choices stand behind the figures:

*Which weights.* Those that transformers' bitsandbytes integration would quantize, found by asking it about the model
of the configuration, built without memory on the meta device: linear layers, and GPT-2's Conv1D transposed, without
the output head. Without a configuration, or for a tensor that the model does not know, the name decides, and the report
says so.

*In which dtype.* Weights are quantized as they are loaded, so both sides are cast to one dtype first: AFTER's if it is
of 16 bits, else BEFORE's, else bfloat16.

*Where BEFORE's weights lie.* If it was shipped in this very recipe and dequantized, every weight is at the level of its
bucket, and an update that stays inside the bucket changes nothing at all: half a step in a uniform recipe, less beside
the crowded levels of a codebook (FP4 has three within 0.011 absmax). If it was shipped in 16 bits, an update dw changes
a code with probability |dw| / s. The first is told by weights that are exactly what the recipe makes of them. Recipes
that do not reproduce their own grid (quail_kernels/formats/README.md has their shares) cannot tell themselves from
others: there, 32 neighbours holding no more than 16 values tell that BEFORE was shipped in 4 bits, and codes that
change less often than the flip law expects tell that rounding undoes the update.

Tensors are read in blocks of rows, each worker one tensor at a time, and all recipes see a block in one pass; a recipe
that looks at the whole tensor (``minmax-int4``, ``nvfp4``) has it read once more before. Memory is bounded by blocks
and workers, not by the model.
"""

import copy
import math
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from quail_kernels import get_format
from quail_kernels.formats import WEIGHT_DTYPES, Format, check_shape
from quail_kernels.update_comparison import Range, UpdateComparison, UpdateTally, join_ranges

from . import calibration as calibrating
from .adapters import ADAPTER, ADAPTER_CONFIG, open_adapter
from .checkpoints import INDEX, SINGLE, Checkpoint, Stored, Transposed, one_line, open_safetensors, some
from .figures import (
    IN_4_BITS,
    IN_16_BITS,
    ON_GRID,
    AuditReport,
    Change,
    FormatRow,
    NotCompared,
    Row,
    figures_of,
)
from .gguf_files import open_gguf
from .journal import Journal
from .roles import Roles

DEFAULT_FORMATS = ("bnb-nf4", "bnb-fp4", "ct-int4-sym", "minmax-int4")

_GRID_SHARE = 0.99
_WINDOW, _SAMPLED_WEIGHTS = 32, 1 << 16
_BLOCK_WEIGHTS = {"cpu": 1 << 18, "cuda": 1 << 24}
_MOST_WORKERS = 16
_LAYER = re.compile(r"(?P<layer>(.*?\.)?\d+)\.(?P<module>.+)")


def audit(
    before: str | os.PathLike,
    after: str | os.PathLike,
    formats: Iterable[str] = DEFAULT_FORMATS,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    workers: int | None = None,
    calibration: str | os.PathLike | Sequence[str] | None = None,
    calibration_tokens: int = calibrating.DEFAULT_TOKENS,
    resume: str | os.PathLike | None = None,
    progress: bool = True,
) -> AuditReport:
    """Compares the 4-bit buckets of two checkpoints of one model.

    Args:
        before, after: folders with ``model.safetensors`` or shards and their index, laid out alike or not; GGUF files,
            or folders with one; names of models on the Hugging Face Hub. ``after`` may be the folder of a PEFT adapter
            (LoRA or DoRA) of ``before``: it is merged as it is read.
        formats: recipes of ``quail_kernels.FORMATS``: ``"bnb-nf4"`` or, with a group size, ``"bnb-nf4@128"``.
        dtype: the dtype in which the deployment loads the weights; None takes that of most of AFTER's weights
            if it is bfloat16 or float16, else BEFORE's if it is, else bfloat16.
        device: where weights are compared; None takes the first CUDA device, or the CPU where there is none.
        workers: how many tensors are compared at a time; None takes one a core, 16 at most.
        calibration: a text that AFTER, not quantized, reads, so that the report says what arrives of the update in
            the layers' outputs: a text file, a JSON set as ``quail.data.load_examples`` reads it, or a list of texts.
            It takes the memory of one model, and of the inputs of its layers: ``calibration_tokens`` of each, or as
            many as the layer is wide, if those are fewer.
        calibration_tokens: how many tokens are read at most, evenly spread over the text.
        resume: a file that keeps what is done: an audit of the same files with the same arguments goes on from it.
            It is removed at the end.
        progress: a bar on standard error, where that is a terminal.

    Raises:
        ValueError: in one line, on an unknown format, dtype or device, a checkpoint that cannot be read or is
            quantized already, a ``resume`` file of another audit, and where not a single weight can be compared.
    """
    formats = (formats,) if isinstance(formats, str) else tuple(dict.fromkeys(formats))
    if not formats:
        raise ValueError("formats: expected at least one; got none")
    for name in formats:
        get_format(name)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16, float16 or None; got {_short(dtype)}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected 1 or more; got {workers}")
    if calibration_tokens < 1:
        raise ValueError(f"calibration_tokens: expected 1 or more; got {calibration_tokens}")
    texts = None if calibration is None else calibrating.read_texts(calibration)
    device = _device(device)
    with ExitStack() as resources:
        old = _open("BEFORE", before, resources)
        new = _open("AFTER", after, resources, base=old)
        if not old.tensors.keys() & new.tensors.keys():
            expected, got = some(old.tensors), some(new.tensors)
            raise ValueError(f"AFTER: expected tensors named as in BEFORE ({expected}); got {got}")
        roles = Roles(new.model, old.model)
        pairs, not_compared = _match(old, new, roles)
        compared = [pair for pair in pairs if pair.kept_as is None]
        dtype = dtype or _deployment_dtype(compared)
        arguments = {"before": old.fingerprint, "after": new.fingerprint, "formats": formats, "dtype": _short(dtype)}
        sequences, inputs, not_measured = None, {}, ()
        if texts is not None and compared:
            model = calibrating.load_model(new, dtype, device)
            sequences = calibrating.encode_texts(*texts, (after, before), model, calibration_tokens)
            arguments["calibration"] = sequences.fingerprint
        journal = resources.enter_context(Journal(resume, arguments)) if resume is not None else None
        if sequences is not None:
            shapes = {pair.name: pair.before.matrix_shape for pair in compared}
            inputs, not_measured = calibrating.read_inputs(model, sequences, shapes, progress)
            del model
        tally = _Tally(formats, not_compared)
        weights = sum(pair.weights for pair in pairs)
        hidden = None if progress else True  # None: hidden where standard error is no terminal
        with tqdm(desc="audit", total=weights, unit=" weights", unit_scale=True, disable=hidden) as bar:
            run = _Run(formats, dtype, device, journal, bar.update, inputs)
            with closing(run.all_found(pairs, workers)) as all_found:
                for found in all_found:
                    tally.add(found)
    if not tally.tensors:
        reason = _main_reason(not_compared)
        raise ValueError(f"BEFORE and AFTER: expected at least one linear weight to compare; got none: {reason}")
    if journal is not None:
        journal.remove()
    return AuditReport(
        before=str(before),
        after=str(after),
        dtype=_short(dtype),
        stored_before=tuple(sorted({pair.before.dtype_on_disk for pair in compared})),
        stored_after=tuple(sorted({pair.after.dtype_on_disk for pair in compared})),
        selected_by=roles.source,
        formats={name: tally.total(name) for name in formats},
        layers=tally.rows(lambda layer, module: (layer, layer, "") if layer else None),
        modules=tally.rows(lambda layer, module: (module, "", module)),
        cells=tally.rows(lambda layer, module: (f"{layer}.{module}".strip("."), layer, module)),
        tensors=tuple(tally.tensors),
        not_compared=tuple(sorted(not_compared, key=lambda row: (row.name, row.format or ""))),
        calibration=calibrating.summary(sequences, formats, tally.measured, not_measured, _by_number)
        if sequences is not None
        else None,
    )


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        message = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that PyTorch has here; got {str(device)!r}: {message}") from None
    if device.type not in _BLOCK_WEIGHTS:
        raise ValueError(f"device: expected {' or '.join(_BLOCK_WEIGHTS)}; got {str(device)!r}")
    return device


def _open(side: str, source: str | os.PathLike, resources: ExitStack, base: Checkpoint | None = None) -> Checkpoint:
    """Whatever ``source`` is; an adapter only on top of a ``base``."""
    path = Path(source)
    if path.is_file() and path.suffix == ".gguf":
        return open_gguf(side, path, resources)
    folder = _folder(side, path, str(source))
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return open_safetensors(side, folder, resources)
    if (folder / ADAPTER_CONFIG).is_file():
        if base is None:
            raise ValueError(f"{side}: expected a whole model; got an adapter, {folder}")
        return open_adapter(side, folder, base, resources)
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"{side}: expected one GGUF file, by its name; got {some(file.name for file in files)}")
    return open_gguf(side, files[0], resources) if files else open_safetensors(side, folder, resources)


def _folder(side: str, path: Path, name: str) -> Path:
    if path.is_dir():
        return path
    expected = "a folder with safetensors, a GGUF file, or a model on the Hugging Face Hub that is cached or reached"
    if path.exists():
        raise ValueError(f"{side}: expected {expected}; got the file {path}")
    from huggingface_hub import snapshot_download

    files = ["model*.safetensors", INDEX, "config.json", ADAPTER, ADAPTER_CONFIG]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the errors of whichever HTTP library the hub client uses have no common base
        raise ValueError(f"{side}: expected {expected}; got {name!r} ({type(error).__name__})") from error


@dataclass(frozen=True)
class _Pair:
    name: str
    before: Stored
    after: Stored
    kept_as: str | None

    @property
    def weights(self) -> int:
        return self.after.weights


def _match(old: Checkpoint, new: Checkpoint, roles: Roles) -> tuple[list[_Pair], list[NotCompared]]:
    pairs, not_compared = [], []
    tied = {}
    if old.tensors.keys() != new.tensors.keys():
        # A weight that is another one by another name is not stored.
        tied = {side.side: getattr(side.model, "all_tied_weights_keys", {}) for side in (old, new)}

    def find(side: Checkpoint, name: str) -> Stored | None:
        return side.tensors.get(name) or side.tensors.get(tied.get(side.side, {}).get(name, ""))

    for name in sorted(old.tensors.keys() | new.tensors.keys() | old.set_aside.keys() | new.set_aside.keys()):
        before, after = find(old, name), find(new, name)
        if set_aside := [f"{side.set_aside[name]} in {side.side}" for side in (old, new) if name in side.set_aside]:
            reason = set_aside[0]
        elif before is None or after is None:
            reason = "only in AFTER" if before is None else "only in BEFORE"
        elif before.dtype is None or after.dtype is None:
            reason = f"no floating point: {before.dtype_on_disk} in BEFORE, {after.dtype_on_disk} in AFTER"
        elif before.shape != after.shape:
            reason = f"shape {list(before.shape)} in BEFORE, {list(after.shape)} in AFTER"
        elif not after.weights:
            reason = "empty"
        else:
            role = roles.of(name, after.shape)
            if role.transposed:
                before, after = Transposed.of(before), Transposed.of(after)
            pairs.append(_Pair(name, before, after, role.kept_as))
            continue
        not_compared.append(NotCompared(name, getattr(after or before, "weights", 0), reason))
    return pairs, not_compared


def _deployment_dtype(pairs: list[_Pair]) -> torch.dtype:
    for side in ("after", "before"):
        stored = Counter()
        for pair in pairs:
            stored[getattr(pair, side).dtype] += pair.weights
        if stored and (most := stored.most_common(1)[0][0]).itemsize == 2:
            return most
    return torch.bfloat16


@dataclass
class Found:
    """What one pair of tensors shows.

    Attributes:
        name, weights: of the tensor.
        comparisons: by recipe, on the device.
        left_out: by recipe why it was not compared; under None, of all recipes.
        change: of a tensor that the deployment leaves in full precision.
        windows, windows_of_few_values: neighbours of BEFORE in a sample, and those that hold no more than 16 values.
        outputs: by recipe what arrives in the layer's output, where there is a calibration.
    """

    name: str
    weights: int
    comparisons: dict[str, UpdateComparison]
    left_out: dict[str | None, str]
    change: Change | None = None
    windows: int = 0
    windows_of_few_values: int = 0
    outputs: dict[str, calibrating.OutputSums] = field(default_factory=dict)


class _Stopped(Exception):
    """Another worker failed, or the audit was interrupted."""


class _Broken(Exception):
    """Weights that no comparison is made of, with the reason."""


class _Run:
    """Compares pairs, several at a time."""

    def __init__(
        self,
        formats: tuple[str, ...],
        dtype: torch.dtype,
        device: torch.device,
        journal: Journal | None,
        advance: Callable[[int], object],
        inputs: dict[str, calibrating.Inputs],
    ):
        self._recipes: dict[str, Format] = {name: get_format(name) for name in formats}
        self._dtype = dtype
        self._device = device
        self._journal = journal
        self._advance = advance
        self._inputs = inputs
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def all_found(self, pairs: list[_Pair], workers: int | None) -> Iterator[Found]:
        """What each pair shows, in their order."""
        workers = workers or min(os.cpu_count() or 1, _MOST_WORKERS)
        waiting: deque[Future[Found]] = deque()
        todo = iter(pairs)
        # Blocks are too small to be shared by threads of PyTorch: each worker has one to itself.
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                while True:
                    # As many ahead as keep every worker busy: what is found waits for its turn.
                    while len(waiting) < 2 * workers and (pair := next(todo, None)) is not None:
                        waiting.append(pool.submit(self._found, pair))
                    if not waiting:
                        return
                    yield waiting.popleft().result()
            finally:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _found(self, pair: _Pair) -> Found:
        found = self._journal.find(pair.name) if self._journal else None
        if found is not None:
            self._tell(pair.weights)
            return found
        try:
            found = self._compare(pair) if pair.kept_as is None else self._keep(pair)
        except OSError as error:
            raise ValueError(f"{pair.name}: expected weights that can be read; got {one_line(error)}") from error
        if self._journal:
            self._journal.add(found)
        return found

    def _compare(self, pair: _Pair) -> Found:
        found = Found(pair.name, pair.weights, {}, {})
        recipes = {}
        for name, recipe in self._recipes.items():
            try:
                check_shape(pair.name, pair.before.shape, recipe)
                recipes[name] = recipe
            except ValueError:
                found.left_out[name] = f"group {recipe.group_size} does not divide {pair.before.shape[-1]}"
        if not recipes:
            self._tell(pair.weights)
            return found
        try:
            ranges = self._ranges(pair) if any(recipe.looks_at_tensor for recipe in recipes.values()) else {}
            tally = UpdateTally(list(recipes), **ranges)
            for starts, x, y in self._blocks(pair, recipes):
                if starts:
                    found.windows, found.windows_of_few_values = _windows(x)
                tally.add(x, y, starts)
                if not tally.is_finite:
                    self._refuse_broken(x, y)
                if inputs := self._inputs.get(pair.name):
                    for name, sums in calibrating.output_sums(inputs, x, y, recipes, ranges).items():
                        found.outputs[name] = found.outputs.get(name, calibrating.OutputSums()) + sums
                self._tell(x.numel())
            found.comparisons = tally.results()
        except _Broken as broken:
            return Found(pair.name, pair.weights, {}, {None: str(broken)})
        return found

    def _keep(self, pair: _Pair) -> Found:
        changed, total, largest = 0, 0.0, 0.0
        for _, x, y in self._blocks(pair, {}):
            distance = (y.float() - x.float()).abs_()
            changed += int(distance.count_nonzero())
            total += float(distance.sum(dtype=torch.float64))
            largest = max(largest, float(distance.max()))
            self._tell(x.numel())
        reason = f"left in full precision by the deployment ({pair.kept_as})"
        if not math.isfinite(total):
            return Found(pair.name, pair.weights, {}, {None: f"{reason}; NaN or infinity in it"})
        return Found(pair.name, pair.weights, {}, {None: reason}, Change(changed, total / pair.weights, largest))

    def _ranges(self, pair: _Pair) -> dict[str, Range]:
        """The smallest and the largest weight of BEFORE and AFTER, as ``UpdateTally`` wants them."""
        ranges = {}
        for _, x, y in self._blocks(pair, self._recipes):
            for name, w in (("range_before", x), ("range_after", y)):
                here = tuple(torch.aminmax(w))
                ranges[name] = join_ranges(ranges[name], here) if name in ranges else here
        ends = [torch.stack(ends) for ends in ranges.values()]
        if not all(pair_of_ends.isfinite().all() for pair_of_ends in ends):
            self._refuse_broken(*ends)
        return ranges

    def _blocks(self, pair: _Pair, recipes: dict[str, Format]) -> Iterator[tuple[bool, torch.Tensor, torch.Tensor]]:
        """(the first?, BEFORE, AFTER) by blocks of rows, flat: in the deployment dtype, whole groups but at the end."""
        height, width = pair.before.matrix_shape
        sizes = [recipe.group_size for recipe in recipes.values() if recipe.group_size is not None]
        unit = math.lcm(*sizes) // math.gcd(math.lcm(*sizes), width) if sizes else 1
        rows = max(_BLOCK_WEIGHTS[self._device.type] // max(width, 1) // unit, 1) * unit
        for top in range(0, height, rows):
            if self._stopped.is_set():
                raise _Stopped
            block = slice(top, min(top + rows, height))
            yield top == 0, self._load(pair.before, block), self._load(pair.after, block)

    def _load(self, stored: Stored, rows: slice) -> torch.Tensor:
        on_device = self._device.type != "cpu"
        # Page-locked memory comes from PyTorch's cache, which does not hand it out again before the copy is done.
        block = stored.read(rows, pinned=on_device)
        return block.to(self._device, non_blocking=on_device).to(self._dtype).view(-1)

    def _refuse_broken(self, x: torch.Tensor, y: torch.Tensor) -> None:
        broken = [side for side, w in (("BEFORE", x), ("AFTER", y)) if not w.isfinite().all()]
        if broken:
            raise _Broken(f"NaN or infinity in {' and '.join(broken)} as {_short(self._dtype)}")

    def _tell(self, weights: int) -> None:
        with self._lock:
            self._advance(weights)


def _windows(w: torch.Tensor) -> tuple[int, int]:
    """Windows of neighbours, and those of at most 16 values, in a sample: a grid is everywhere."""
    sample = w[: min(w.numel() // _WINDOW * _WINDOW, _SAMPLED_WEIGHTS)].view(-1, _WINDOW)
    # Pruned weights make windows of few values, too, without lying on a grid.
    sample = sample[(sample != 0).sum(dim=1) >= _WINDOW * 3 // 4].sort(dim=1).values
    return len(sample), int(((sample.diff(dim=1) != 0).sum(dim=1) < 16).sum())


class _Tally:
    """Adds up what the pairs show."""

    def __init__(self, formats: tuple[str, ...], not_compared: list[NotCompared]):
        self.formats = formats
        self.not_compared = not_compared
        self.tensors: list[Row] = []
        self.measured: list[calibrating.Measured] = []
        self._cells: dict[tuple[str, str, str], tuple[int, UpdateComparison]] = {}
        self._windows, self._windows_of_few_values = 0, 0

    def add(self, found: Found) -> None:
        for format, reason in found.left_out.items():
            change = found.change if format is None else None
            self.not_compared.append(NotCompared(found.name, found.weights, reason, format, change))
        layer, module = place(found.name)
        for format, comparison in found.comparisons.items():
            self.tensors.append(Row(found.name, layer, module, format, 1, figures_of(comparison)))
            cell = (format, layer, module)
            tensors, so_far = self._cells.get(cell, (0, None))
            # Not the comparison itself: small tensors of a worker would keep its arena from giving memory back.
            sum_of_cell = copy.deepcopy(comparison) if so_far is None else so_far + comparison
            self._cells[cell] = (tensors + 1, sum_of_cell)
        for format, sums in found.outputs.items():
            self.measured.append(calibrating.Measured(found.name, layer, module, format, sums))
        self._windows += found.windows
        self._windows_of_few_values += found.windows_of_few_values

    def rows(self, group: Callable[[str, str], tuple[str, str, str] | None]) -> tuple[Row, ...]:
        """The cells put together by what ``group`` makes of (layer, module): (name, layer, module), or None."""
        sums: dict[tuple[str, tuple[str, str, str]], tuple[int, UpdateComparison]] = {}
        for (format, *of_cell), (tensors, comparison) in self._cells.items():
            named = group(*of_cell)
            if named is None:
                continue
            before, so_far = sums.get((format, named), (0, None))
            sums[format, named] = (before + tensors, comparison if so_far is None else so_far + comparison)
        order = {format: i for i, format in enumerate(self.formats)}
        rows = [
            Row(*named, format, tensors, figures_of(comparison))
            for (format, named), (tensors, comparison) in sums.items()
        ]
        return tuple(sorted(rows, key=lambda row: (order[row.format], _by_number(row.name))))

    def total(self, format: str) -> FormatRow:
        rows = [row for row in self.tensors if row.format == format]
        if not rows:
            return FormatRow(format, 0, None, 0, (), None)
        comparisons = [comparison for (of_cell, *_), (_, comparison) in self._cells.items() if of_cell == format]
        figures = figures_of(sum(comparisons[1:], start=comparisons[0]))
        if figures.on_grid_share >= _GRID_SHARE:
            shipped_in = ON_GRID
        elif self._windows and self._windows_of_few_values >= _GRID_SHARE * self._windows:
            shipped_in = IN_4_BITS
        else:
            shipped_in = IN_16_BITS
        layers = self.rows(lambda layer, module: (layer, layer, "") if layer else None)
        lost_layers = tuple(row.name for row in layers if row.format == format and row.figures.lost)
        return FormatRow(format, len(rows), shipped_in, sum(row.figures.lost for row in rows), lost_layers, figures)


def place(name: str) -> tuple[str, str]:
    """(layer, module) of a weight: ("model.layers.3", "self_attn.q_proj"), the layer empty where there is none.

    Numbers inside a module, as of experts, become ``*``.
    """
    name = name.removesuffix(".weight")
    match = _LAYER.fullmatch(name)
    if not match:
        return "", name
    return match["layer"], re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", match["module"])


def _by_number(name: str) -> list:
    """Layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _main_reason(not_compared: list[NotCompared]) -> str:
    reasons = Counter(row.reason for row in not_compared if row.change is None)
    if not reasons:
        return "every tensor is left in full precision by the deployment"
    reason, count = reasons.most_common(1)[0]
    return f"{reason} ({count} of {sum(reasons.values())} left out)"


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
