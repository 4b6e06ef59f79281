r"""What a 4-bit deployment makes of a weight update, in one pass over both tensors: for audits.

It counts what ``bucket_compare`` counts, on each tensor's own scales and on the grid of the weights before, and what
of the update is delivered. With q(w) what a weight dequantizes to on its own scales, rounded to the model's dtype,

    dw = w_after - w_before          dq = q(w_after) - q(w_before)

    delivered_cosine = sum(dw dq) / sqrt(sum dw^2 sum dq^2)      how much of what arrives is the update
    delivered_norm   = sqrt(sum dq^2 / sum dw^2)                 how large what arrives is
    delivered_share  = sum(dw dq) / sum dw^2                     how much of the update is in what arrives

An update that is delivered whole has 1, 1, 1; in one that is delivered by a few weights that jump a whole step,
share stays near 1 while the cosine falls. The pass also counts how large |dw| is against the width s of the bucket
that w_before lies in, by powers of two.

It is written for CPU cores, and several threads may call it at once: blocks that are large enough go through the loops
of loops.py, others through operations on as many weights as a core's cache holds. On another device it runs as well,
waiting for that device with each chunk.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from . import cpu
from .bucket_compare import BINS, BucketComparison, Change, count_distances, place_and_value
from .formats import Format, check_weight, chunk_size, get_format, group_rows, group_spans, tensor_range

Range = tuple[torch.Tensor, torch.Tensor]
_LONGEST_PERIOD = 1 << 20

# |dw| / s: 0, below 2^-16, two bins an octave, 2 and more.
_LOWEST, _HIGHEST = -16, 1
STEP_EDGES = (
    *(2.0**k * m for k in range(_LOWEST, _HIGHEST) for m in (1, 1.5)),
    2.0**_HIGHEST,
)
# fp32 keeps 2^k as (k + 127) << 23: without 22 bits, what is left counts half octaves.
_FIRST_BIN, _LAST_BIN = 2 * (127 + _LOWEST) - 1, 2 * (127 + _HIGHEST)
_COUNTS = ("on_grid", "zero_groups", "below_half_step", "unchanged")
_SUMS = ("sum_square_change", "sum_square_delivered", "sum_change_delivered")


@dataclass(frozen=True)
class UpdateComparison:
    """What ``compare_update`` found: tensors on the device of the weights. ``a + b`` is the comparison of both updates
    together.

    Attributes:
        own: as of ``bucket_compare(scales="own")``.
        before_grid: as of ``bucket_compare(scales="before")``.
        sum_square_change, sum_square_delivered, sum_change_delivered: fp64, of dw^2, dq^2 and dw dq. Where the loops
            did not do the work they are summed in fp32 within a chunk, and so some 1e-7 of their size off, and changes
            below 1e-19 do not count.
        step_histogram: int64 [37], how many weights have |dw| / s = 0 (dw = 0, whatever s is), below
            ``STEP_EDGES[0]``, from each edge to the next, and from the last on; there a NaN counts, too.
    """

    own: BucketComparison
    before_grid: BucketComparison
    sum_square_change: torch.Tensor
    sum_square_delivered: torch.Tensor
    sum_change_delivered: torch.Tensor
    step_histogram: torch.Tensor

    @property
    def delivered_cosine(self) -> torch.Tensor:
        """0 where nothing is delivered of a change; NaN where there is no change to deliver."""
        lengths = self.sum_square_change.sqrt() * self.sum_square_delivered.sqrt()
        nothing = (self.sum_square_delivered == 0) & (self.sum_square_change > 0)
        return (self.sum_change_delivered / lengths).masked_fill(nothing, 0)

    @property
    def delivered_norm(self) -> torch.Tensor:
        """NaN where there is no change; infinite where a scale moved and no weight did."""
        return (self.sum_square_delivered / self.sum_square_change).sqrt()

    @property
    def delivered_share(self) -> torch.Tensor:
        """NaN where there is no change."""
        return self.sum_change_delivered / self.sum_square_change

    def __add__(self, other: "UpdateComparison") -> "UpdateComparison":
        if not isinstance(other, UpdateComparison):
            return NotImplemented
        device = self.step_histogram.device
        added = {name: getattr(self, name) + getattr(other, name).to(device) for name in (*_SUMS, "step_histogram")}
        return UpdateComparison(self.own + other.own, self.before_grid + other.before_grid, **added)

    def step_quantiles(self, shares: Sequence[float]) -> list[float]:
        """The |dw| / s that this share of the weights does not exceed, NaN of no weights; one synchronisation.

        It is read off the histogram: within its bin, a third of it or half, it is interpolated evenly. From 2 on
        it is 2.
        """
        counts = self.step_histogram.tolist()
        edges = (0.0, 0.0, *STEP_EDGES, STEP_EDGES[-1])
        return [_quantile(counts, edges, share) for share in shares]

    def to_dict(self) -> dict:
        """Every count, sum and share as Python numbers, with one synchronisation: ``own`` and ``before_grid`` as
        ``BucketComparison.to_dict()`` gives them."""
        names = ("delivered_cosine", "delivered_norm", "delivered_share", *_SUMS)
        parts = (
            self.own.numbers(),
            self.before_grid.numbers(),
            torch.stack([getattr(self, name) for name in names]),
            self.step_histogram.double(),
        )
        own, before_grid, numbers, histogram = (
            part.tolist() for part in torch.cat(parts).cpu().split([len(part) for part in parts])
        )
        row = {"own": self.own.row(own), "before_grid": self.before_grid.row(before_grid)}
        row |= dict(zip(names, numbers, strict=True))
        return row | {"step_histogram": [int(count) for count in histogram]}


def _quantile(counts: list[int], edges: tuple[float, ...], share: float) -> float:
    """edges[i] to edges[i + 1] is the bin of counts[i]."""
    rank = share * sum(counts)
    below = 0
    for i, count in enumerate(counts):
        if count and below + count >= rank:
            return edges[i] + (edges[i + 1] - edges[i]) * (rank - below) / count
        below += count
    return math.nan


class _RecipeTally:
    """What one recipe's comparisons of chunks add up to, as Python numbers.

    Small tensors that outlive a chunk would each break a hole in the memory that the next one's large tensors take.
    """

    def __init__(self, recipe: Format, before: Range | None, after: Range | None):
        self.recipe, self._ranges = recipe, (before, after)
        of = [recipe.fit_range(*ends) if ends and recipe.looks_at_tensor else None for ends in self._ranges]
        self._of_before, self._of_after = of
        self._totals = dict.fromkeys((*_COUNTS, "sum_abs_change", "sum_flip_law", *_SUMS), 0)
        self._max_change = 0.0
        self._same_grid, self._own_grid = ({"same_value": 0, "code_distance": [0] * BINS} for _ in range(2))
        self._sizes = torch.zeros(_LAST_BIN - _FIRST_BIN + 1, dtype=torch.int64)

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self._totals["sum_square_change"])

    def add(self, x: torch.Tensor, y: torch.Tensor, short: bool, change: Change) -> None:
        """One chunk, its groups as rows."""
        recipe, dtype, totals = self.recipe, x.dtype, self._totals
        params, own_params = recipe.params(x, short, self._of_before), recipe.params(y, short, self._of_after)
        x, y = change.before.view(x.shape), change.after.view(x.shape)
        rank = recipe.rank(x, params, short)
        self._add_steps(change, rank, params)
        bucket, value = place_and_value(recipe, rank, params, dtype)
        del rank
        y_bucket, y_value = place_and_value(recipe, recipe.rank(y, own_params, short), own_params, dtype)
        is_equal = torch.empty_like(value)

        def count(grid: dict) -> None:
            grid["same_value"] += int(torch.eq(y_value, value, out=is_equal).sum())
            count_distances(grid["code_distance"], bucket, y_bucket)

        count(self._own_grid)
        delivered = y_value - value
        # torch.sum adds in pairs; torch.dot, one after the other, would be off by a hundred times as much.
        totals["sum_change_delivered"] += (change.signed * delivered).sum().item()
        totals["sum_square_delivered"] += delivered.square_().sum().item()
        del delivered
        # Small updates leave most groups their grid, above all in bf16: then the two comparisons are one.
        differs = (params != own_params).view(len(params), -1).any(dim=1)
        rows = differs.nonzero().view(-1)
        if 2 * len(rows) > len(x):
            y_bucket, y_value = place_and_value(recipe, recipe.rank(y, params, short), params, dtype)
        elif len(rows):
            params = params[rows]
            part = place_and_value(recipe, recipe.rank(y[rows], params, short), params, dtype)
            for whole, of_rows in zip((y_bucket, y_value), part, strict=True):
                whole.view(x.shape)[rows] = of_rows.view(len(rows), -1)
        count(self._same_grid)
        totals["on_grid"] += int(torch.eq(value, change.before, out=is_equal).sum())
        totals["zero_groups"] += int(change.is_zero_group(x.shape[1]).sum())
        totals["unchanged"] += int(change.n_unchanged)
        totals["sum_abs_change"] += change.sum_size.item()
        totals["sum_square_change"] += change.sum_square.item()
        self._see_change(change.max_size.item())

    def add_by_loops(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        """A whole block, flat, where ``cpu`` has loops for it; whether it has."""
        loops = cpu.loops_for(self.recipe, x)
        if loops is None:
            return False
        numbers = cpu.recipe_of(self.recipe, x.dtype)

        def work(span: slice):
            found = cpu.nothing_found(sizes=len(self._sizes), first_size=_FIRST_BIN)
            loops.compare(cpu.bits_of(x[span]), cpu.bits_of(y[span]), numbers, True, True, found)
            return found

        for found in cpu.in_threads(work, cpu.spans_of(len(x), self.recipe.group_size)):
            self._add_found(found)
        return True

    def _add_found(self, found) -> None:
        totals = self._totals
        for name, count in zip(_COUNTS, found.counts.tolist(), strict=True):
            totals[name] += count
        for name, total in zip(("sum_abs_change", "sum_flip_law", *_SUMS), found.sums.tolist(), strict=True):
            totals[name] += total
        for i, grid in enumerate((self._own_grid, self._same_grid)):
            grid["same_value"] += int(found.same_value[i])
            grid["code_distance"] = list(map(int.__add__, grid["code_distance"], found.distances[i].tolist()))
        self._sizes += torch.from_numpy(found.sizes)
        self._see_change(float(found.largest.view(np.float32)[0]))

    def _see_change(self, largest: float) -> None:
        if math.isnan(largest) or largest > self._max_change:
            self._max_change = largest

    def _add_steps(self, change: Change, rank: torch.Tensor, params: torch.Tensor) -> None:
        in_steps, below_half = change.in_steps(self.recipe, rank, params)
        self._totals["below_half_step"] += int(below_half)
        half_octaves = (in_steps.view(torch.int32) >> 22).clamp_(_FIRST_BIN, _LAST_BIN).sub_(_FIRST_BIN)
        self._sizes += torch.bincount(half_octaves.to(torch.uint8), minlength=len(self._sizes)).cpu()
        self._totals["sum_flip_law"] += in_steps.clamp_(max=1).sum(dtype=torch.float64).item()

    def result(self, n: int, groups: int, device: torch.device) -> UpdateComparison:
        totals = self._totals
        if self.recipe.group_size is None:
            totals["zero_groups"] = int(groups and all(end == 0 for ends in self._ranges for end in ends))

        def exact(number: int | list[int]) -> torch.Tensor:
            return torch.tensor(number, dtype=torch.int64, device=device)

        def fp64(number: float) -> torch.Tensor:
            return torch.tensor(number, dtype=torch.float64, device=device)

        common = {
            "total": n,
            "groups": groups,
            **{name: exact(totals[name]) for name in ("on_grid", "zero_groups", "below_half_step")},
            **{name: fp64(totals[name]) for name in ("sum_abs_change", "sum_flip_law")},
            "max_abs_change": fp64(self._max_change),
        }
        unchanged = totals["unchanged"]
        return UpdateComparison(
            *(
                BucketComparison(**{name: exact(found) for name, found in grid.items()}, **common)
                for grid in (self._own_grid, self._same_grid)
            ),
            **{name: fp64(totals[name]) for name in _SUMS},
            # What did not change is in the first bin of its own, and was counted in the lowest, too.
            step_histogram=exact([unchanged, int(self._sizes[0]) - unchanged, *self._sizes[1:].tolist()]),
        )


def join_ranges(a: Range, b: Range) -> Range:
    """(smallest, largest) weight of two blocks together, NaN where one has one."""
    return torch.minimum(a[0], b[0]), torch.maximum(a[1], b[1])


class UpdateTally:
    """``compare_updates`` of tensors that are read block by block; what it keeps between blocks is Python numbers.

    Args:
        formats, range_before, range_after: as of ``compare_updates``. Without ranges a recipe that looks at the tensor
            takes the first block for it.
    """

    def __init__(self, formats: Sequence[str], range_before: Range | None = None, range_after: Range | None = None):
        self._recipes = {format: get_format(format) for format in formats}
        if (range_before is None) != (range_after is None):
            raise ValueError("range_before, range_after: expected both or none; got one")
        self._ranges = (range_before, range_after)
        self._tallies: dict[str, _RecipeTally] = {}
        self._weights, self._groups = 0, dict.fromkeys(self._recipes, 0)
        self._device = torch.device("cpu")
        sizes = [recipe.group_size for recipe in self._recipes.values() if recipe.group_size] or [1]
        # Where the groups of all recipes start together.
        self._period, self._common = math.lcm(*sizes), math.gcd(*sizes)

    @property
    def is_finite(self) -> bool:
        """Whether no weight was NaN or infinite so far, and no square of a change."""
        return all(tally.is_finite for tally in self._tallies.values())

    def add(self, before: torch.Tensor, after: torch.Tensor, starts: bool = True) -> None:
        """Compares one more block, as ``compare_update`` takes it."""
        for recipe in self._recipes.values():
            check_weight("before", before, recipe)
        for name in ("shape", "dtype", "device"):
            expected, got = getattr(before, name), getattr(after, name)
            if expected != got:
                raise ValueError(f"after: expected the {name} of before, {expected}; got {got}")
        for name, w in (("before", before), ("after", after)):
            if not w.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous block; got strides {w.stride()} of {tuple(w.shape)}")
        n = before.numel()
        if not self._tallies:
            looks = n and any(recipe.looks_at_tensor for recipe in self._recipes.values())
            if self._ranges[0] is None and looks:
                self._ranges = tensor_range(before), tensor_range(after)
            self._tallies = {name: _RecipeTally(recipe, *self._ranges) for name, recipe in self._recipes.items()}
        self._weights, self._device = self._weights + n, before.device
        for name, recipe in self._recipes.items():
            # A group that is the whole tensor is counted with the block that starts it.
            self._groups[name] += recipe.groups(n) if recipe.group_size is not None or starts else 0
        x, y = before.detach().view(-1), after.detach().view(-1)
        self._add_chunks(x, y, [tally for tally in self._tallies.values() if not tally.add_by_loops(x, y)])

    def _add_chunks(self, x: torch.Tensor, y: torch.Tensor, tallies: list[_RecipeTally]) -> None:
        if not tallies:
            return
        n = len(x)
        period = self._period if self._period <= _LONGEST_PERIOD else n + 1
        main = n // period * period
        stride = chunk_size(period)
        for start in range(0, main, stride):
            chunk = slice(start, min(start + stride, main))
            change = Change(x[chunk], y[chunk], self._common)
            for tally in tallies:
                tally.add(*(group_rows(w[chunk], tally.recipe, False) for w in (x, y)), False, change)
        for tally in tallies:
            for span, _, short in group_spans(n - main, tally.recipe):
                rows = [group_rows(w[main:][span], tally.recipe, short) for w in (x, y)]
                tally.add(*rows, short, Change(*rows, rows[0].shape[1]))

    def results(self) -> dict[str, UpdateComparison]:
        """By name, of the blocks so far; nothing of no block."""
        return {
            name: tally.result(self._weights, self._groups[name], self._device) for name, tally in self._tallies.items()
        }


def compare_updates(
    before: torch.Tensor,
    after: torch.Tensor,
    formats: Sequence[str],
    *,
    range_before: Range | None = None,
    range_after: Range | None = None,
    starts: bool = True,
) -> dict[str, UpdateComparison]:
    """``compare_update`` for several formats, by name, which share what does not depend on the format."""
    tally = UpdateTally(formats, range_before, range_after)
    tally.add(before, after, starts)
    return tally.results()


def compare_update(
    before: torch.Tensor,
    after: torch.Tensor,
    format: str,
    *,
    range_before: Range | None = None,
    range_after: Range | None = None,
    starts: bool = True,
) -> UpdateComparison:
    """Compares a tensor, or one block of it, before and after an update.

    Args:
        before, after: float32, bfloat16 or float16, contiguous, of one shape, dtype and device: that of the
            deployment, as for ``bucket_compare``. A block starts with a group, and ends with one or with its
            tensor. The results of blocks are added.
        format: a recipe of ``FORMATS``, as ``"bnb-nf4"`` or, with its group size, ``"ct-int4-sym@64"``.
        range_before, range_after: the smallest and largest weight of the whole tensors, which a recipe that looks at
            the tensor needs (``Format.looks_at_tensor``: ``minmax-int4`` and ``nvfp4``): what ``torch.aminmax``
            gives for each block, put together by ``join_ranges``. None takes the block for the tensor.
        starts: whether the block is the tensor's first. A group that is the whole tensor is counted with that one.

    Returns:
        An UpdateComparison. Counts are those of ``bucket_compare``, bit for bit; sums are in fp64, and of blocks
        may differ in the last bits from those of the tensor. NaN and infinity count as there, and make the sums
        of the delivered update NaN or infinite.

    Raises:
        ValueError: on an unknown format, a group size that does not divide the last dimension where it has to,
            another dtype, blocks that do not match or are not contiguous, or one range without the other.
    """
    ranges = {"range_before": range_before, "range_after": range_after}
    return compare_updates(before, after, [format], **ranges, starts=starts)[format]
