"""Will the update from BEFORE to AFTER survive 4 bits? Answered from two checkpoints alone: no GPU, no data.

Every weight that a 4-bit deployment quantizes is put into its bucket before and after, by ``bucket_compare``,
once with each tensor's own scales, as two deployments would have them, and once on BEFORE's grid, as the
argument of the QUAIL paper (https://arxiv.org/abs/2601.15538) has it. What the deployment leaves in full
precision is measured apart, since an update that lives there survives as it is. No tensor goes missing in
silence: ``not_compared`` names it and says why.

Three choices stand behind the figures:

*Which weights.* Those that transformers' bitsandbytes integration would quantize, found by asking it about
the model of config.json, built without memory on the meta device: linear layers, and GPT-2's Conv1D
transposed, without the output head. Without a config, or for a tensor that the model does not know, the name
decides, and the report says so.

*In which dtype.* Weights are quantized as they are loaded, so both sides are cast to one dtype first: AFTER's
if it is of 16 bits, else BEFORE's, else bfloat16.

*Where BEFORE's weights lie.* If it was shipped in this very recipe and dequantized, every weight is at the
level of its bucket, and an update that stays inside the bucket changes nothing at all: half a step in a
uniform recipe, less beside the crowded levels of a codebook (FP4 has three within 0.011 absmax). If it was
shipped in 16 bits, an update dw changes a code with probability |dw| / s. The first is told by weights that
are exactly what the recipe makes of them. Recipes that do not reproduce their own scale (``ct-int4-sym``,
``minmax-int4``) cannot tell themselves from others: there, 32 neighbours holding no more than 16 values tell
that BEFORE was shipped in 4 bits, and codes that change less often than the flip law expects tell that
rounding undoes the update.

Tensors are memory-mapped and read one pair at a time, from safetensors only: nothing is unpickled, and no
code that comes with a checkpoint is run.
"""

import json
import math
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from quail_kernels import BucketComparison, bucket_compare, get_format
from quail_kernels.formats import WEIGHT_DTYPES, check_shape

DEFAULT_FORMATS = ("bnb-nf4", "bnb-fp4", "ct-int4-sym", "minmax-int4")
ON_GRID = "this recipe"
IN_4_BITS = "4 bits"
IN_16_BITS = "16 bits"
_MEANING = {
    ON_GRID: "BEFORE was shipped in this recipe, where an update that stays in its bucket changes nothing.",
    IN_4_BITS: "BEFORE was shipped in 4 bits, in which recipe its weights do not tell; where fewer codes "
    "changed than the flip law expects, rounding undoes the update.",
    IN_16_BITS: "BEFORE was shipped in 16 bits, where an update dw changes a code with probability |dw|/s.",
}

_SCHEMA = 1
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_GRID_SHARE = 0.99
_WINDOW, _SAMPLED_WEIGHTS = 32, 1 << 16
_CHUNK = 1 << 22
_COLUMNS, _LISTED = 80, 8
_FULL_PRECISION_NAMES = re.compile(
    r"embed|embd|wte|wpe|lm_head|output_layer|norm|(^|\.)ln_|score|classifier|router|\.gate\.weight$", re.I
)


@dataclass(frozen=True)
class Figures:
    """What one tensor, or all of them together, show in one recipe.

    Attributes:
        weights, groups, zero_groups: how many were compared; a zero group is zero throughout on both sides.
        same_code, changed: weights in the same bucket and in another one, with each side's own scales.
        code_overlap, value_overlap: shares of weights with the same bucket, with the same dequantized value.
        code_overlap_before_grid, value_overlap_before_grid: the same with BEFORE's scales on both sides.
        changed_share: changed / weights.
        predicted_flip_share: mean of min(|dw| / s, 1), the changed share that the flip law expects.
        share_below_half_step: of weights with |dw| < s / 2 or dw = 0.
        mean_abs_change, max_abs_change: of |dw|, in the dtype of the deployment.
        on_grid_share: of BEFORE's weights that are exactly what the recipe makes of them.
    """

    weights: int
    groups: int
    zero_groups: int
    same_code: int
    changed: int
    code_overlap: float
    value_overlap: float
    code_overlap_before_grid: float
    value_overlap_before_grid: float
    changed_share: float
    predicted_flip_share: float
    share_below_half_step: float
    mean_abs_change: float
    max_abs_change: float
    on_grid_share: float

    @classmethod
    def of(cls, own: BucketComparison, before_grid: BucketComparison) -> "Figures":
        figures, fixed = own.to_dict(), before_grid.to_dict()
        weights, same_code = figures["total"], figures["same_code"]
        as_they_are = (
            *("groups", "zero_groups", "code_overlap", "value_overlap", "predicted_flip_share"),
            *("share_below_half_step", "mean_abs_change", "max_abs_change", "on_grid_share"),
        )
        return cls(
            weights=weights,
            same_code=same_code,
            changed=weights - same_code,
            changed_share=(weights - same_code) / weights,
            code_overlap_before_grid=fixed["code_overlap"],
            value_overlap_before_grid=fixed["value_overlap"],
            **{name: figures[name] for name in as_they_are},
        )


@dataclass(frozen=True)
class TensorRow:
    """One tensor in one recipe."""

    name: str
    format: str
    figures: Figures


@dataclass(frozen=True)
class FormatRow:
    """All compared tensors in one recipe; ``figures`` and ``shipped_in`` are None where there are none.

    ``shipped_in`` says how BEFORE came: in ``"this recipe"`` if at least 99 % of its weights lie on the grid
    of the recipe, in ``"4 bits"`` if they lie on some 4-bit grid, else in ``"16 bits"``.
    """

    format: str
    tensors: int
    shipped_in: str | None
    figures: Figures | None


@dataclass(frozen=True)
class Change:
    """How far a tensor moved that no recipe quantizes, in the dtype of the deployment."""

    changed: int
    mean_abs: float
    max_abs: float


@dataclass(frozen=True)
class NotCompared:
    """A tensor that was left out: of one recipe, or, with ``format`` None, of all of them.

    ``change`` is there for those that the deployment leaves in full precision.
    """

    name: str
    weights: int
    reason: str
    format: str | None = None
    change: Change | None = None


@dataclass(frozen=True)
class AuditReport:
    """What ``audit`` found, in plain numbers: reports compare with ==, and render themselves in a notebook.

    Attributes:
        before, after: the checkpoints, as they were named.
        dtype: the dtype in which weights were compared.
        stored_before, stored_after: the dtypes on disk of the compared weights.
        selected_by: what decided which weights are quantized.
        formats: the totals by recipe, in the order asked for.
        tensors: a row a tensor and recipe.
        not_compared: what was left out, and why.
    """

    before: str
    after: str
    dtype: str
    stored_before: tuple[str, ...]
    stored_after: tuple[str, ...]
    selected_by: str
    formats: dict[str, FormatRow]
    tensors: tuple[TensorRow, ...]
    not_compared: tuple[NotCompared, ...]

    @property
    def unquantized(self) -> tuple[NotCompared, ...]:
        """The tensors that the deployment leaves in full precision, with their change."""
        return tuple(row for row in self.not_compared if row.change is not None)

    @property
    def verdict(self) -> str:
        """What the figures can tell about rounding, and what they cannot."""
        rows = [row for row in self.formats.values() if row.figures is not None]
        survivors = sum(row.change.changed > 0 for row in self.unquantized)
        if not survivors and all(row.figures.max_abs_change == 0 for row in rows):
            equal = "BEFORE and AFTER are equal wherever they could be compared."
            if {*self.stored_before, *self.stored_after} == {self.dtype}:
                return equal
            return f"{equal} Any update was lost in the cast to {self.dtype}, before rounding to 4 bits."
        findings = []
        for shipped_in, meaning in _MEANING.items():
            if regime := [row for row in rows if row.shipped_in == shipped_in]:
                changed = _range([row.figures.changed_share for row in regime])
                expected = _range([row.figures.predicted_flip_share for row in regime])
                recipes = ", ".join(str(get_format(row.format)) for row in regime)
                findings.append(f"{recipes}: {meaning} Codes changed: {changed}; by the flip law: {expected}.")
        limit = "Codes alone do not tell whether behaviour survives: evaluate AFTER in 4 bits"
        if survivors:
            limit += f"; {survivors} changed tensors stay in full precision and survive as they are"
        return " ".join([*findings, f"{limit}."])

    def to_dict(self) -> dict:
        """Everything as JSON types, under a versioned ``schema``."""
        return {"schema": _SCHEMA, "verdict": self.verdict, **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_markdown(self) -> str:
        """The verdict, the totals and what was left out, in 80 columns; for tensors see ``to_dict``."""
        return "\n".join(_markdown(self)) + "\n"

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def audit(
    before: str | os.PathLike,
    after: str | os.PathLike,
    formats: Iterable[str] = DEFAULT_FORMATS,
    *,
    dtype: torch.dtype | str | None = None,
    progress: bool = True,
) -> AuditReport:
    """Compares the 4-bit buckets of two checkpoints of one model.

    Args:
        before, after: folders with ``model.safetensors`` or shards and their index, laid out alike or not; or
            names of models on the Hugging Face Hub.
        formats: recipes of ``quail_kernels.FORMATS``: ``"bnb-nf4"`` or, with a group size, ``"bnb-nf4@128"``.
        dtype: the dtype in which the deployment loads the weights; None takes that of most of AFTER's weights
            if it is bfloat16 or float16, else BEFORE's if it is, else bfloat16.
        progress: a bar on standard error, where that is a terminal.

    Raises:
        ValueError: in one line, on an unknown format or dtype, a checkpoint that cannot be read or is
            quantized already, and where not a single weight can be compared.
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
    old, new = _Checkpoint("BEFORE", before), _Checkpoint("AFTER", after)
    if not old.tensors.keys() & new.tensors.keys():
        expected, got = _some(old.tensors), _some(new.tensors)
        raise ValueError(f"AFTER: expected tensors named as in BEFORE ({expected}); got {got}")
    roles = _Roles(new.folder, old.folder)
    pairs, not_compared = _match(old, new, roles)
    compared = [pair for pair in pairs if pair.kept_as is None]
    dtype = dtype or _deployment_dtype(compared)

    tally = _Tally(formats, not_compared)
    weights = sum(pair.weights for pair in pairs)
    hidden = None if progress else True  # None: hidden where standard error is no terminal
    with tqdm(desc="audit", total=weights, unit=" weights", unit_scale=True, disable=hidden) as bar:
        for pair in pairs:
            if pair.kept_as is None:
                tally.compare(pair, dtype)
            else:
                tally.keep(pair, dtype)
            bar.update(pair.weights)
    if not tally.rows:
        reason = _main_reason(not_compared)
        raise ValueError(f"BEFORE and AFTER: expected at least one linear weight to compare; got none: {reason}")
    return AuditReport(
        before=str(before),
        after=str(after),
        dtype=_short(dtype),
        stored_before=tuple(sorted({_short(pair.before.dtype) for pair in compared})),
        stored_after=tuple(sorted({_short(pair.after.dtype) for pair in compared})),
        selected_by=roles.source,
        formats={name: tally.total(name) for name in formats},
        tensors=tuple(tally.rows),
        not_compared=tuple(sorted(not_compared, key=lambda row: (row.name, row.format or ""))),
    )


@dataclass(frozen=True)
class _Stored:
    """A tensor on disk; ``dtype`` is None where it is not one of floating point weights."""

    file: safe_open
    name: str
    dtype_on_disk: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype | None:
        return _FLOATS.get(self.dtype_on_disk)

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    def read(self) -> torch.Tensor:
        return self.file.get_tensor(self.name)

    def row_blocks(self) -> Iterator[torch.Tensor]:
        """The tensor in pieces of about four million weights, since embeddings are the largest of a model."""
        if not self.shape:
            yield self.read()
            return
        rows = self.file.get_slice(self.name)
        stride = max(_CHUNK // max(math.prod(self.shape[1:]), 1), 1)
        for start in range(0, self.shape[0], stride):
            yield rows[start : start + stride]


class _Checkpoint:
    """The safetensors of one side, headers read and data memory-mapped."""

    def __init__(self, side: str, source: str | os.PathLike):
        self.side = side
        self.folder = _folder(side, source)
        self.tensors: dict[str, _Stored] = {}
        for shard, promised in self._shards().items():
            found = self._open(shard)
            if missing := promised - found.keys():
                raise ValueError(f"{side}: expected {_some(missing)} in {shard}, as {_INDEX} says; got a shard without")
            self.tensors |= found
        for stored in self.tensors.values():
            if stored.dtype is None and stored.name.endswith(("weight", "weight_packed")):
                got = f"{stored.name} as {stored.dtype_on_disk}"
                raise ValueError(
                    f"{side}: expected weights in 16 or 32 bits; got a checkpoint quantized already, {got}"
                )

    def _shards(self) -> dict[str, set[str]]:
        """The files to open, each with the tensors that the index promises in it."""
        if (self.folder / _SINGLE).is_file():
            return {_SINGLE: set()}
        if not (self.folder / _INDEX).is_file():
            files = [path.name for path in self.folder.iterdir()]
            weights = [name for name in files if name.endswith((".safetensors", ".gguf", ".bin", ".pt", ".pth"))]
            got = _some(weights or files) if files else "an empty folder"
            raise ValueError(f"{self.side}: expected {_SINGLE} or {_INDEX} in {self.folder}; got {got}")
        try:
            weight_map = json.loads((self.folder / _INDEX).read_text())["weight_map"]
            shards = {shard: set() for shard in weight_map.values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.side}: expected a weight_map in {_INDEX}; got {_one_line(error)}") from error
        for name, shard in weight_map.items():
            shards[shard].add(name)
        for shard in shards:
            # A path that leads elsewhere could make the audit read any file of the machine.
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ValueError(f"{self.side}: expected {_INDEX} to name safetensors files beside it; got {shard!r}")
        return shards

    def _open(self, shard: str) -> dict[str, _Stored]:
        try:
            file = safe_open(self.folder / shard, framework="pt")
            slices = {name: file.get_slice(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.side}: expected a readable {shard}; got {_one_line(error)}") from error
        return {name: _Stored(file, name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def _folder(side: str, source: str | os.PathLike) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    expected = "a folder with safetensors, or a model on the Hugging Face Hub that is cached or can be reached"
    if folder.exists():
        raise ValueError(f"{side}: expected {expected}; got the file {folder}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=["model*.safetensors", _INDEX, "config.json"]))
    except Exception as error:  # the errors of whichever HTTP library the hub client uses have no common base
        raise ValueError(f"{side}: expected {expected}; got {str(source)!r} ({type(error).__name__})") from error


@dataclass(frozen=True)
class _Role:
    """``kept_as`` says what a tensor is that stays in full precision; None: it is quantized."""

    kept_as: str | None
    transposed: bool = False


class _Roles:
    """What a deployment through transformers and bitsandbytes does with each tensor."""

    def __init__(self, *folders: Path):
        self._known: dict[str, _Role] = {}
        self._prefix = ""
        self._model = None
        self._by_name = 0
        for folder in folders:
            if not (folder / "config.json").is_file():
                continue
            try:
                self._known, self._prefix, self._model = _ask_transformers(folder)
                break
            except Exception:  # a config may ask for anything: what cannot be built is judged by its names
                continue

    @property
    def source(self) -> str:
        if self._model is None:
            return "names, for want of a config.json that transformers can build a model from"
        names = f", and names for {self._by_name} tensors that it does not have" if self._by_name else ""
        return f"transformers' {self._model}{names}"

    def of(self, name: str, shape: tuple[int, ...]) -> _Role:
        # A bare backbone is stored without the prefix that it has inside a model with a head.
        for spelled in (name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")):
            if spelled in self._known:
                return self._known[spelled]
        self._by_name += 1
        if len(shape) != 2 or not name.endswith(".weight"):
            return _Role("no matrix of a linear layer")
        kept = _FULL_PRECISION_NAMES.search(name)
        return _Role(f"its name says {kept[0].strip('.')}" if kept else None)


def _ask_transformers(folder: Path) -> tuple[dict[str, _Role], str, str]:
    """Of the model of config.json, without its memory: (roles of parameters, backbone's prefix, class)."""
    import transformers
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    architecture = getattr(transformers, config.architectures[0])
    if not issubclass(architecture, transformers.PreTrainedModel):
        raise ValueError(f"architectures: expected a model of transformers; got {architecture.__name__}")
    with torch.device("meta"):
        model = architecture(config)
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    head = model.get_output_embeddings()
    roles = {}
    for module_name, module in model.named_modules():
        linear = type(module) is torch.nn.Linear or isinstance(module, Conv1D)
        quantized = linear and should_convert_module(module_name, skipped)
        for name, _ in module.named_parameters(recurse=False):
            if quantized and name == "weight":
                role = _Role(None, transposed=isinstance(module, Conv1D))
            elif name == "bias":
                role = _Role("bias")
            elif module is head:
                role = _Role("output head")
            elif isinstance(module, torch.nn.Embedding):
                role = _Role("embedding")
            elif "norm" in type(module).__name__.lower():
                role = _Role("norm")
            else:
                role = _Role("linear layer that transformers skips" if linear else "no linear layer")
            roles[f"{module_name}.{name}".removeprefix(".")] = role
    return roles, model.base_model_prefix, type(model).__name__


@dataclass(frozen=True)
class _Pair:
    name: str
    before: _Stored
    after: _Stored
    kept_as: str | None
    transposed: bool

    @property
    def weights(self) -> int:
        return self.after.weights


def _match(old: _Checkpoint, new: _Checkpoint, roles: _Roles) -> tuple[list[_Pair], list[NotCompared]]:
    pairs, not_compared = [], []
    for name in sorted(old.tensors.keys() | new.tensors.keys()):
        before, after = old.tensors.get(name), new.tensors.get(name)
        if before is None or after is None:
            reason = "only in AFTER" if before is None else "only in BEFORE"
        elif before.dtype is None or after.dtype is None:
            reason = f"no floating point: {before.dtype_on_disk} in BEFORE, {after.dtype_on_disk} in AFTER"
        elif before.shape != after.shape:
            reason = f"shape {list(before.shape)} in BEFORE, {list(after.shape)} in AFTER"
        elif not after.weights:
            reason = "empty"
        else:
            role = roles.of(name, after.shape)
            pairs.append(_Pair(name, before, after, role.kept_as, role.transposed))
            continue
        not_compared.append(NotCompared(name, (after or before).weights, reason))
    return pairs, not_compared


def _deployment_dtype(pairs: list[_Pair]) -> torch.dtype:
    for side in ("after", "before"):
        stored = Counter()
        for pair in pairs:
            stored[getattr(pair, side).dtype] += pair.weights
        if stored and (most := stored.most_common(1)[0][0]).itemsize == 2:
            return most
    return torch.bfloat16


class _Tally:
    """Adds up what the pairs show, one at a time."""

    def __init__(self, formats: tuple[str, ...], not_compared: list[NotCompared]):
        self.formats = formats
        self.not_compared = not_compared
        self.rows: list[TensorRow] = []
        self._sums: dict[str, tuple[BucketComparison, BucketComparison]] = {}
        self._windows, self._windows_of_few_values = 0, 0

    def compare(self, pair: _Pair, dtype: torch.dtype) -> None:
        w_before, w_after = pair.before.read().to(dtype), pair.after.read().to(dtype)
        broken = [side for side, w in (("BEFORE", w_before), ("AFTER", w_after)) if not w.isfinite().all()]
        if broken:
            self._leave_out(pair, f"NaN or infinity in {' and '.join(broken)} as {_short(dtype)}")
            return
        if pair.transposed:
            w_before, w_after = w_before.t().contiguous(), w_after.t().contiguous()
        self._look_for_a_grid(w_before)
        for name in self.formats:
            recipe = get_format(name)
            try:
                check_shape(pair.name, w_before.shape, recipe)
            except ValueError:
                self._leave_out(pair, f"group {recipe.group_size} does not divide {w_before.shape[-1]}", format=name)
                continue
            own = bucket_compare(w_before, w_after, name)
            before_grid = bucket_compare(w_before, w_after, name, scales="before")
            self.rows.append(TensorRow(pair.name, name, Figures.of(own, before_grid)))
            if name in self._sums:
                own, before_grid = self._sums[name][0] + own, self._sums[name][1] + before_grid
            self._sums[name] = own, before_grid

    def keep(self, pair: _Pair, dtype: torch.dtype) -> None:
        changed, total, largest = 0, 0.0, 0.0
        for before, after in zip(pair.before.row_blocks(), pair.after.row_blocks(), strict=True):
            distance = (after.to(dtype).float() - before.to(dtype).float()).abs()
            changed += int((distance != 0).sum())
            total += float(distance.sum(dtype=torch.float64))
            largest = max(largest, float(distance.max()))
        reason = f"left in full precision by the deployment ({pair.kept_as})"
        if math.isfinite(total):
            self._leave_out(pair, reason, change=Change(changed, total / pair.weights, largest))
        else:
            self._leave_out(pair, f"{reason}; NaN or infinity in it")

    def total(self, format: str) -> FormatRow:
        if format not in self._sums:
            return FormatRow(format, 0, None, None)
        figures = Figures.of(*self._sums[format])
        if figures.on_grid_share >= _GRID_SHARE:
            shipped_in = ON_GRID
        elif self._windows and self._windows_of_few_values >= _GRID_SHARE * self._windows:
            shipped_in = IN_4_BITS
        else:
            shipped_in = IN_16_BITS
        return FormatRow(format, sum(row.format == format for row in self.rows), shipped_in, figures)

    def _leave_out(self, pair: _Pair, reason: str, **more) -> None:
        self.not_compared.append(NotCompared(pair.name, pair.weights, reason, **more))

    def _look_for_a_grid(self, w: torch.Tensor) -> None:
        """Counts windows of neighbours and those of at most 16 values, in a sample: a grid is everywhere."""
        sample = w.reshape(-1)[: min(w.numel() // _WINDOW * _WINDOW, _SAMPLED_WEIGHTS)].view(-1, _WINDOW)
        # Pruned weights make windows of few values, too, without lying on a grid.
        sample = sample[(sample != 0).sum(dim=1) >= _WINDOW * 3 // 4].sort(dim=1).values
        self._windows += len(sample)
        self._windows_of_few_values += int(((sample.diff(dim=1) != 0).sum(dim=1) < 16).sum())


def _main_reason(not_compared: list[NotCompared]) -> str:
    reasons = Counter(row.reason for row in not_compared if row.change is None)
    if not reasons:
        return "every tensor is left in full precision by the deployment"
    reason, count = reasons.most_common(1)[0]
    return f"{reason} ({count} of {sum(reasons.values())} left out)"


def _markdown(report: AuditReport) -> Iterator[str]:
    yield "# Audit in 4 bits"
    yield ""
    stored = {*report.stored_before, *report.stored_after}
    cast = "" if stored == {report.dtype} else f", cast first from {' and '.join(sorted(stored - {report.dtype}))}"
    yield f"- BEFORE: `{report.before}`"
    yield f"- AFTER: `{report.after}`"
    yield from _wrap(f"- compared in {report.dtype}{cast}, as a deployment loads them", indent="  ")
    yield from _wrap(f"- linear weights chosen by {report.selected_by}", indent="  ")
    yield ""
    yield from _wrap(report.verdict)
    yield ""
    yield "Changed by the update, in % of the weights compared:"
    yield ""
    rows = [(str(get_format(row.format)), row.figures, row.shipped_in) for row in report.formats.values()]
    yield from _table(
        ("recipe", "weights", "codes", "flip law", "values", "codes B", "values B"),
        [
            (
                recipe,
                _count(figures.weights),
                _percent(figures.changed_share),
                _percent(figures.predicted_flip_share),
                _percent(1 - figures.value_overlap),
                _percent(1 - figures.code_overlap_before_grid),
                _percent(1 - figures.value_overlap_before_grid),
            )
            if figures
            else (recipe, "0")
            for recipe, figures, _ in rows
        ],
    )
    yield ""
    yield from _wrap(
        "codes: in another bucket, with each side's own scales; flip law: what mean min(dw/s, 1) expects "
        "of it; values: another dequantized value; B: on BEFORE's grid."
    )
    yield ""
    yield "The update dw against the step s:"
    yield ""
    yield from _table(
        ("recipe", "< s/2 %", "mean dw", "max dw", "zeros", "on grid", "BEFORE"),
        [
            (
                recipe,
                _percent(figures.share_below_half_step),
                f"{figures.mean_abs_change:.2g}",
                f"{figures.max_abs_change:.2g}",
                _count(figures.zero_groups),
                _percent(figures.on_grid_share),
                shipped_in.removeprefix("this "),
            )
            if figures
            else (recipe, "")
            for recipe, figures, shipped_in in rows
        ],
    )
    yield ""
    yield from _wrap(
        "zeros: groups that are zero throughout; on grid: BEFORE's weights that are exactly what the recipe "
        "makes of them, in %; BEFORE: how it was shipped, as its weights show."
    )
    changed = sorted((row for row in report.unquantized if row.change.changed), key=lambda row: -row.change.mean_abs)
    yield ""
    yield f"Left in full precision: {len(report.unquantized)} tensors, {len(changed)} of them changed."
    if changed:
        yield ""
        yield from _table(
            ("tensor", "weights", "mean dw", "max dw"),
            [
                (
                    _elide(row.name),
                    _count(row.weights),
                    f"{row.change.mean_abs:.2g}",
                    f"{row.change.max_abs:.2g}",
                )
                for row in changed[:_LISTED]
            ],
        )
        if len(changed) > _LISTED:
            yield ""
            yield f"and {len(changed) - _LISTED} more that changed less."
    yield ""
    yield "Not compared:"
    yield ""
    groups = Counter((row.format, row.reason) for row in report.not_compared)
    first = {(row.format, row.reason): row.name for row in reversed(report.not_compared)}
    for (format, reason), count in groups.most_common():
        what = f"{count} tensors, as {first[format, reason]}" if count > 1 else first[format, reason]
        yield from _wrap(f"- {f'{format}: ' if format else ''}{reason}: {what}", indent="  ")
    if not groups:
        yield "- nothing was left out"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    rows = [header, *(row + ("",) * (len(header) - len(row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])} |" for row in rows]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    yield from (lines[0], f"|{rule}|", *lines[1:])


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _percent(share: float) -> str:
    """A share in percent, in 7 characters; 0 and 100 are said of none and all only."""
    percent = 100 * share
    if 99.9 <= percent < 100:
        return ">99.9"
    return f"{percent:.0e}" if 0 < percent < 1e-3 else f"{percent:.3g}"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _range(shares: list[float]) -> str:
    low, high = _percent(min(shares)), _percent(max(shares))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _elide(name: str, width: int = 44) -> str:
    return name if len(name) <= width else f"{name[: width // 2 - 2]}...{name[-(width // 2 - 1) :]}"


def _some(names: Iterable[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first[:2]) + (", ..." if len(first) > 2 else "") or "none"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
