"""What an audit finds, in plain numbers: reports compare with ==, and render themselves."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

from quail_kernels import get_format
from quail_kernels.update_comparison import UpdateComparison

SCHEMA = 2
ON_GRID = "this recipe"
IN_4_BITS = "4 bits"
IN_16_BITS = "16 bits"
_MEANING = {
    ON_GRID: "BEFORE was shipped in this recipe, where an update that stays in its bucket changes nothing.",
    IN_4_BITS: "BEFORE was shipped in 4 bits, in which recipe its weights do not tell; where fewer codes "
    "changed than the flip law expects, rounding undoes the update.",
    IN_16_BITS: "BEFORE was shipped in 16 bits, where an update dw changes a code with probability |dw|/s.",
}


@dataclass(frozen=True)
class Figures:
    """What one tensor, or several of them together, show in one recipe.

    With q the values that the two deployments have, each on its own scales, dq = q(AFTER) - q(BEFORE) is the update
    as delivered, and dw = AFTER - BEFORE the one that was trained, both in the dtype of the deployment.

    Attributes:
        weights, groups, zero_groups: how many were compared; a zero group is zero throughout on both sides.
        same_code, changed: weights in the same bucket and in another one, with each side's own scales.
        code_overlap, value_overlap: shares of weights with the same bucket, with the same dequantized value.
        code_overlap_before_grid, value_overlap_before_grid: the same with BEFORE's scales on both sides.
        changed_share: changed / weights.
        predicted_flip_share: mean of min(|dw| / s, 1), the changed share that the flip law expects.
        share_below_half_step: of weights with |dw| < s / 2 or dw = 0.
        mean_abs_change, max_abs_change: of |dw|.
        step_share_p50, step_share_p90, step_share_p99: quantiles of |dw| / s, interpolated in a histogram of half
            octaves; what is 2 or more is 2.
        delivered_share: <dw, dq> / |dw|^2, the part of the update that arrives along its own direction. 1: all of it,
            in the mean; 0: none.
        delivered_cosine: between dw and dq: how far what arrives stands out of the noise of rounding.
        delivered_norm: |dq| / |dw|.
        update_norm: |dw|.
        on_grid_share: of BEFORE's weights that are exactly what the recipe makes of them.

        The three of delivery are None where dw = 0 throughout, the cosine also where dq is.
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
    step_share_p50: float
    step_share_p90: float
    step_share_p99: float
    delivered_share: float | None
    delivered_cosine: float | None
    delivered_norm: float | None
    update_norm: float
    on_grid_share: float

    @property
    def lost(self) -> bool:
        """Whether there was an update and it left every weight in its bucket: if anything moves, it is scales."""
        return self.update_norm > 0 and self.changed == 0


@dataclass(frozen=True)
class Row:
    """Some of the compared weights in one recipe: a tensor, a layer, a type of module, or a cell of both.

    Attributes:
        name: of the tensor, the layer or the module type; of a cell none.
        layer: ``"model.layers.3"``; empty for what is in no layer or in several.
        module: ``"self_attn.q_proj"``, with ``*`` for the number of an expert; empty where there are several.
        format: the recipe as it was asked for.
        tensors: how many they are.
        figures: theirs.
    """

    name: str
    layer: str
    module: str
    format: str
    tensors: int
    figures: Figures


@dataclass(frozen=True)
class FormatRow:
    """All compared tensors in one recipe; ``figures`` and ``shipped_in`` are None where there are none.

    Attributes:
        shipped_in: how BEFORE came: in ``"this recipe"`` if at least 99 % of its weights lie on the grid of the
            recipe, in ``"4 bits"`` if they lie on some 4-bit grid, else in ``"16 bits"``.
        lost_tensors, lost_layers: those that have an update by which not one weight leaves its bucket.
    """

    format: str
    tensors: int
    shipped_in: str | None
    lost_tensors: int
    lost_layers: tuple[str, ...]
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
class OutputFigures:
    """What arrives of the update in the outputs of one linear layer, or of several together, on calibration text.

    With x the inputs of a layer, dW the update that was trained and D the delivered one (calibration.py has the
    formulas). Sums are over tokens, and over layers where they are several.

    Attributes:
        signal, noise: sums of ||dW x||^2 and ||(D - dW) x||^2.
        output_snr: signal / noise, between 1e-12 and 1e12; 1 where nothing arrives, None where dW x = 0 = D x.
        output_snr_db: the same in decibels, 10 log10.
        output_snr_median, output_snr_min: over the tensors.
        output_snr_flip_law: what the flip law expects of output_snr for weights that lie anywhere in their buckets.
        output_cosine: between D x and dW x; 0 where D x = 0, None where dW x = 0.
        output_share: <D x, dW x> / ||dW x||^2, the part of the update that arrives along its own direction; None
            where dW x = 0.
    """

    signal: float
    noise: float
    output_snr: float | None
    output_snr_db: float | None
    output_snr_median: float | None
    output_snr_min: float | None
    output_snr_flip_law: float | None
    output_cosine: float | None
    output_share: float | None


@dataclass(frozen=True)
class OutputRow:
    """``OutputFigures`` of a tensor, a layer, a type of module, or a cell of both; fields as those of ``Row``."""

    name: str
    layer: str
    module: str
    format: str
    tensors: int
    figures: OutputFigures


@dataclass(frozen=True)
class NotMeasured:
    """A weight that was compared, and that calibration text told nothing of."""

    name: str
    reason: str


@dataclass(frozen=True)
class Calibration:
    """What AFTER, not quantized, showed of the update while it read a text.

    Attributes:
        source: the text's file, or ``"texts"``.
        sequences, tokens: what was read of it.
        formats: of all measured tensors, by recipe; None where there are none.
        layers, modules, cells, tensors: as of ``AuditReport``.
        not_measured: the compared weights that were not, each with the reason.
    """

    source: str
    sequences: int
    tokens: int
    formats: dict[str, OutputFigures | None]
    layers: tuple[OutputRow, ...]
    modules: tuple[OutputRow, ...]
    cells: tuple[OutputRow, ...]
    tensors: tuple[OutputRow, ...]
    not_measured: tuple[NotMeasured, ...]


@dataclass(frozen=True)
class AuditReport:
    """What ``audit`` found. README.md beside this file has the schema of its JSON.

    Attributes:
        before, after: the checkpoints, as they were named.
        dtype: the dtype in which weights were compared.
        stored_before, stored_after: how the compared weights are stored, as ``"BF16"`` or ``"Q4_0"``.
        selected_by: what decided which weights are quantized.
        formats: the totals by recipe, in the order asked for.
        layers, modules, cells: a row a recipe and layer, module type, and layer and module type.
        tensors: a row a tensor and recipe.
        not_compared: what was left out, and why.
        calibration: what arrives in the layers' outputs; None without a text.
    """

    before: str
    after: str
    dtype: str
    stored_before: tuple[str, ...]
    stored_after: tuple[str, ...]
    selected_by: str
    formats: dict[str, FormatRow]
    layers: tuple[Row, ...]
    modules: tuple[Row, ...]
    cells: tuple[Row, ...]
    tensors: tuple[Row, ...]
    not_compared: tuple[NotCompared, ...]
    calibration: Calibration | None = None

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
            if all(_holds(self.dtype, stored) for stored in (*self.stored_before, *self.stored_after)):
                return equal
            return f"{equal} Any update was lost in the cast to {self.dtype}, before rounding to 4 bits."
        findings = []
        for shipped_in, meaning in _MEANING.items():
            if regime := [row for row in rows if row.shipped_in == shipped_in]:
                changed = _extent_in_percent([row.figures.changed_share for row in regime])
                expected = _extent_in_percent([row.figures.predicted_flip_share for row in regime])
                recipes = ", ".join(str(get_format(row.format)) for row in regime)
                findings.append(f"{recipes}: {meaning} Codes changed: {changed}; by the flip law: {expected}.")
                findings += _delivery(regime)
        limit = "Codes alone do not tell whether behaviour survives: evaluate AFTER in 4 bits"
        if survivors:
            limit += f"; {survivors} changed tensors stay in full precision and survive as they are"
        return " ".join([*findings, f"{limit}."])

    def to_dict(self) -> dict:
        """Everything as JSON types, under a versioned ``schema``; ``calibration`` only where there was one."""
        everything = {"schema": SCHEMA, "verdict": self.verdict, **asdict(self)}
        if self.calibration is None:
            del everything["calibration"]
        return everything

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_markdown(self) -> str:
        """The verdict, the totals and what was left out, in 80 columns; for tensors see ``to_dict``."""
        from .markdown import markdown

        return markdown(self)

    def to_html(self) -> str:
        """A page that needs nothing beside it: the same, with a heat map of layers and modules by recipe."""
        from .page import page

        return page(self)

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def _holds(dtype: str, stored: str) -> bool:
    """Whether a dtype has every number that is stored so; what GGUF quantizes is dequantized to float32."""
    if dtype == "float32":
        return stored != "F64"
    return {"bfloat16": "BF16", "float16": "F16"}[dtype] == stored


def _delivery(rows: list[FormatRow]) -> list[str]:
    rows = [row for row in rows if row.figures.delivered_share is not None]
    if not rows:
        return []
    shares = _extent_in_percent([row.figures.delivered_share for row in rows])
    sentence = f"Of the update {shares} arrives along its own direction"
    if all(row.figures.delivered_norm for row in rows):
        norms = _extent([row.figures.delivered_norm for row in rows])
        cosines = _extent([row.figures.delivered_cosine for row in rows])
        sentence += f", in a change of the deployed weights {norms} times as large (cosine {cosines})"
    sentences = [f"{sentence}."]
    for row in rows:
        if row.lost_layers:
            count = len(row.lost_layers)
            layers = f"{row.lost_layers[0]}" if count == 1 else f"{count} layers, {row.lost_layers[0]} the first,"
            sentences.append(f"{row.format}: {layers} lost the update altogether.")
    return sentences


def figures_of(comparison: UpdateComparison) -> Figures:
    numbers = comparison.to_dict()
    own, fixed = numbers["own"], numbers["before_grid"]
    weights, same_code = own["total"], own["same_code"]
    as_they_are = (
        *("groups", "zero_groups", "code_overlap", "value_overlap", "predicted_flip_share"),
        *("share_below_half_step", "mean_abs_change", "max_abs_change", "on_grid_share"),
    )
    p50, p90, p99 = comparison.step_quantiles((0.5, 0.9, 0.99))
    moved, arrived = numbers["sum_square_change"] > 0, numbers["sum_square_delivered"] > 0
    return Figures(
        weights=weights,
        same_code=same_code,
        changed=weights - same_code,
        changed_share=(weights - same_code) / weights,
        code_overlap_before_grid=fixed["code_overlap"],
        value_overlap_before_grid=fixed["value_overlap"],
        step_share_p50=p50,
        step_share_p90=p90,
        step_share_p99=p99,
        delivered_share=numbers["delivered_share"] if moved else None,
        delivered_cosine=numbers["delivered_cosine"] if moved and arrived else None,
        delivered_norm=numbers["delivered_norm"] if moved else None,
        update_norm=math.sqrt(numbers["sum_square_change"]),
        **{name: own[name] for name in as_they_are},
    )


def figure_names() -> tuple[str, ...]:
    return tuple(entry.name for entry in fields(Figures))


def output_figure_names() -> tuple[str, ...]:
    return tuple(entry.name for entry in fields(OutputFigures) if entry.name.startswith("output"))


def percent(share: float) -> str:
    """A share in percent, in 7 characters; 0 and 100 are said of none and all only."""
    number = 100 * share
    if 99.9 <= number < 100:
        return ">99.9"
    return f"{number:.0e}" if 0 < abs(number) < 1e-3 else f"{number:.3g}"


def cosine(figures: Figures) -> str:
    """``delivered_cosine`` in two digits; where there was an update and none of it arrives, that."""
    if figures.delivered_share is None:
        return "-"
    return "lost" if figures.delivered_cosine is None else f"{figures.delivered_cosine:.2g}"


def count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _extent_in_percent(shares: list[float]) -> str:
    return f"{_extent(shares, percent)} %"


def _extent(numbers: list[float], text: Callable[[float], str] = "{:.2g}".format) -> str:
    low, high = text(min(numbers)), text(max(numbers))
    return low if low == high else f"{low} to {high}"
