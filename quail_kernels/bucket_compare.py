r"""How much of a weight change a 4-bit deployment sees: bucket overlap and what explains it, in one pass.

Both tensors are put into buckets and compared on the fly; nothing of their size is written. With b(w) the
bucket of a weight, q(w) what it dequantizes to in the tensor's dtype, dw = w_after - w_before in fp32 and s
the width of the bucket that w_before lies in:

    code_distance[k]        how many weights have |b(w_after) - b(w_before)| = k
    same_value              how many have q(w_after) = q(w_before)
    predicted_flip_share    mean of min(|dw| / s, 1): a weight that lies anywhere in its bucket with equal
                            chance leaves it with that probability, not "when |dw| > s / 2"
    share_below_half_step   how many have |dw| < s / 2 or dw = 0: the share for which the argument of the
                            QUAIL paper (https://arxiv.org/abs/2601.15538) expects no change at all

``scales="own"`` fits each tensor's own scales, as two deployments would; ``"before"`` puts both on the grid
of w_before, as the paper's argument has it. With re-fitted scales codes may overlap by 99.9 % while values
overlap by 16 %.

Buckets are numbered along the number line, so a distance counts buckets also where codes are not in order
(FP4, a negative scale in ``gguf-q4_0``), and the two codes that FP4 has for zero are one bucket: telling them
apart inflates the changed share by several percent. Two groups that are zero throughout are in the same
bucket, whatever code a back end gives them. In a codebook recipe s is the distance between the two thresholds
around the weight times the scale, where the outermost buckets end with what the recipe's positions can be
(-1 and 1 for bitsandbytes, 6 or 8 for E2M1); in a uniform recipe it is the scale or the step.
"""

import functools
from dataclasses import dataclass, fields
from typing import Literal

import torch

from . import cpu
from ._sharding import admit_dtensors
from ._triton import larger, largest, tl, triton
from .formats import Format, check_weight, get_format, group_chunks
from .formats.base import finite_inverse, flat_part, tensor_range
from .formats.tiles import (
    in_parts,
    launch_options,
    strided,
    tile_addresses,
    tile_bucket,
    tile_constants,
    tile_fit,
    tile_groups,
    tile_mask,
    tile_offsets,
    tile_position,
    tile_stretched,
    tile_unit,
    tile_value,
)

_TILE = 2048
BINS = 16
_PROGRAMS = 1024
_STEPS = 8
_COUNTS = ("same_value", "below_half_step", "on_grid", "zero_groups")  # then the bins of code_distance
_ROW_COUNTS = ("same_code", "same_value", "on_grid", "zero_groups", "below_half_step")
_ROW_SHARES = (
    *("code_overlap", "value_overlap", "on_grid_share", "share_below_half_step", "mean_abs_change"),
    *("max_abs_change", "predicted_flip_share"),
)


@dataclass(frozen=True)
class BucketComparison:
    """What ``bucket_compare`` counted: tensors on the device of the weights, int64 counts and fp64 sums.

    Nothing synchronises but ``to_dict()``, once. ``a + b`` is the comparison of both pairs of weights
    together; fields of single groups are joined end to end.

    Attributes:
        total: the number of weights compared.
        groups: the number of groups they make.
        code_distance: [16], how many weights moved by how many buckets.
        same_value: how many dequantize to the same value in the tensor's dtype.
        on_grid: how many weights of w_before are exactly what they dequantize to. Near ``total`` it tells a
            model that was shipped in this recipe; only recipes that reproduce their own grid can tell. How far
            each does is measured in formats/README.md.
        zero_groups: how many groups are zero throughout in both tensors. Their weights count in everything
            else.
        below_half_step: how many weights have |dw| < s / 2 or dw = 0.
        sum_abs_change, max_abs_change: of |dw|.
        sum_flip_law: of min(|dw| / s, 1).
        group_same_code, group_total: [groups], with ``per_group=True``, else None.
    """

    total: int
    groups: int
    code_distance: torch.Tensor
    same_value: torch.Tensor
    on_grid: torch.Tensor
    zero_groups: torch.Tensor
    below_half_step: torch.Tensor
    sum_abs_change: torch.Tensor
    max_abs_change: torch.Tensor
    sum_flip_law: torch.Tensor
    group_same_code: torch.Tensor | None = None
    group_total: torch.Tensor | None = None

    @property
    def same_code(self) -> torch.Tensor:
        """How many weights are in the same bucket."""
        return self.code_distance[0]

    @property
    def code_overlap(self) -> torch.Tensor:
        return self._share(self.same_code)

    @property
    def value_overlap(self) -> torch.Tensor:
        return self._share(self.same_value)

    @property
    def on_grid_share(self) -> torch.Tensor:
        return self._share(self.on_grid)

    @property
    def share_below_half_step(self) -> torch.Tensor:
        return self._share(self.below_half_step)

    @property
    def mean_abs_change(self) -> torch.Tensor:
        return self._share(self.sum_abs_change)

    @property
    def predicted_flip_share(self) -> torch.Tensor:
        return self._share(self.sum_flip_law)

    def _share(self, part: torch.Tensor) -> torch.Tensor:
        return part.double() / self.total

    def __add__(self, other: "BucketComparison") -> "BucketComparison":
        if not isinstance(other, BucketComparison):
            return NotImplemented
        if (self.group_same_code is None) != (other.group_same_code is None):
            raise ValueError("adding comparisons: expected both with per_group or both without; got one of each")
        merged = {}
        for name in (field.name for field in fields(self)):
            a, b = getattr(self, name), getattr(other, name)
            if isinstance(a, torch.Tensor):
                b = b.to(a.device)
            if name == "max_abs_change":
                merged[name] = torch.maximum(a, b)
            elif name.startswith("group_"):
                merged[name] = None if a is None else torch.cat([a, b])
            else:
                merged[name] = a + b
        return BucketComparison(**merged)

    def to_dict(self) -> dict[str, int | float | list[int]]:
        """Every count and share as Python numbers, single groups left out: one synchronisation."""
        return self.row(self.numbers().tolist())

    def numbers(self) -> torch.Tensor:
        """What ``to_dict`` fetches, in fp64: counts below 2^53 are exact in it, so that one copy brings all."""
        numbers = [getattr(self, name).double() for name in _ROW_COUNTS + _ROW_SHARES]
        return torch.cat([torch.stack(numbers), self.code_distance.double()])

    def row(self, numbers: list[float]) -> dict[str, int | float | list[int]]:
        """What ``to_dict`` gives, from what ``numbers`` has become on the host."""
        row: dict[str, int | float | list[int]] = {"total": self.total, "groups": self.groups}
        shares_from = len(_ROW_COUNTS)
        row |= {name: int(number) for name, number in zip(_ROW_COUNTS, numbers, strict=False)}
        row |= dict(zip(_ROW_SHARES, numbers[shares_from:], strict=False))
        row["code_distance"] = [int(number) for number in numbers[shares_from + len(_ROW_SHARES) :]]
        return row


class Change:
    """A change of weights in fp32, flat: what all comparisons of it share, whatever the recipe.

    On the CPU a comparison into bool and a masked fill take five to ten times as long as arithmetic on fp32. So
    truth is 1.0 or 0.0 here, and what is unchanged is masked by its bits.
    """

    def __init__(self, before: torch.Tensor, after: torch.Tensor, group_size: int):
        self.before, self.after = before.float().view(-1), after.float().view(-1)
        self.signed = self.after - self.before
        self.size = self.signed.abs()
        self.max_size = self.size.amax()
        self.n_unchanged = torch.eq(self.size, 0, out=torch.empty_like(self.size)).sum()
        self.sum_size = self.size.sum(dtype=torch.float64)
        # All bits but the sign, which NaN may have, and none where nothing changed.
        self._mask = self.size.view(torch.int32).clamp(max=1).mul_(0x7FFFFFFF)
        bits = torch.int32 if before.dtype == torch.float32 else torch.int16
        either = before.view(bits) | after.view(bits)
        self._group_size = group_size
        self._largest = either.bitwise_and_(torch.iinfo(bits).max).view(-1, group_size).amax(dim=1)

    @functools.cached_property
    def sum_square(self) -> torch.Tensor:
        return self.signed.square().sum()

    def in_steps(self, recipe: Format, rank: torch.Tensor, params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(|dw| in steps, and 0 where dw = 0, whatever the step, flat; how many are below half a step, or 0)."""
        unit = recipe.unit(params)[:, None]
        size = recipe.stretched(self.size.view(rank.shape), rank)
        # Above 0, so that no change is below it.
        half = (unit * 0.5).nan_to_num_(0, torch.inf).clamp_(min=2.0**-149)
        is_below = torch.lt(size, half, out=torch.empty_like(size))
        ratio = torch.mul(size, finite_inverse(unit), out=torch.empty_like(size)).view(-1)
        ratio.view(torch.int32).bitwise_and_(self._mask)
        return ratio, is_below.sum().long()

    def is_zero_group(self, group_size: int) -> torch.Tensor:
        """By group of that many weights, whether all are zero in both tensors."""
        largest = self._largest
        if group_size != self._group_size:
            largest = largest.view(-1, group_size // self._group_size).amax(dim=1)
        return largest == 0


def place_and_value(
    recipe: Format, rank: torch.Tensor, params: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(places of the buckets on the number line in int8, what they dequantize to in ``dtype``, as fp32), flat."""
    value = recipe.value(rank, params).to(dtype).float()
    return recipe.bucket(rank, params).view(-1), value.view(-1)


def count_distances(counts: list[int], bucket: torch.Tensor, other: torch.Tensor) -> None:
    """Adds to counts[k] how many weights are k buckets apart, 15 and more as 15; the places of buckets are int8."""
    distance = (other - bucket).abs_()
    if distance.amax() <= 1:
        # So it is with most updates, where bincount is slow: it waits for the last count of the same number.
        moved = int(distance.sum(dtype=torch.float32))
        counts[0] += len(distance) - moved
        counts[1] += moved
        return
    found = torch.bincount(distance.clamp_(max=BINS - 1).view(torch.uint8), minlength=BINS).tolist()
    counts[:] = map(int.__add__, counts, found)


def _bucket_compare_torch(
    before: torch.Tensor, after: torch.Tensor, recipe: Format, shared_scales: bool, per_group: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    device = before.device
    counts = torch.zeros(len(_COUNTS) + BINS, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    top = torch.zeros((), dtype=torch.int32, device=device)
    group_same = torch.zeros(recipe.groups(before.numel()) if per_group else 0, dtype=torch.int64, device=device)
    of_before = recipe.fit_tensor(before)
    of_after = of_before if shared_scales else recipe.fit_tensor(after)
    chunks, code_distance = 0, [0] * BINS
    for (_, groups, x, short), (_, _, y, _) in zip(
        group_chunks(before, recipe), group_chunks(after, recipe), strict=True
    ):
        params = recipe.params(x, short, of_before)
        y_params = params if shared_scales else recipe.params(y, short, of_after)
        change = Change(x, y, x.shape[1])
        rank = recipe.rank(x, params, short)
        in_steps, below_half = change.in_steps(recipe, rank, params)
        bucket, value = place_and_value(recipe, rank, params, x.dtype)
        y_bucket, y_value = place_and_value(recipe, recipe.rank(y, y_params, short), y_params, x.dtype)
        # A chunk's counts are below 2^24, and so exact in fp32.
        counts[0] += y_value.eq_(value).sum().long()
        counts[1] += below_half
        counts[2] += value.eq_(change.before).sum().long()
        counts[3] += change.is_zero_group(x.shape[1]).sum()
        count_distances(code_distance, bucket, y_bucket)
        sums[0] += change.sum_size
        sums[1] += in_steps.clamp_(max=1).sum(dtype=torch.float64)
        top = torch.maximum(top, change.max_size.view(torch.int32))
        chunks += 1
        if per_group:
            group_same[groups] += (y_bucket == bucket).view(x.shape).sum(dim=1)
    if recipe.group_size is None and chunks:
        counts[3] = (counts[3] == chunks).long()
    counts[len(_COUNTS) :] = torch.tensor(code_distance)
    return counts, sums, top, group_same


def _bucket_compare_cpu(
    before: torch.Tensor, after: torch.Tensor, recipe: Format, shared_scales: bool, per_group: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    loops = cpu.loops_for(recipe, before)
    if loops is None:
        return _bucket_compare_torch(before, after, recipe, shared_scales, per_group)
    grid = int(shared_scales)

    def work(span: slice) -> loops.Found:
        found = cpu.nothing_found(groups=recipe.groups(span.stop - span.start) if per_group else 0)
        x, y = (cpu.bits_of(flat_part(w, span)) for w in (before, after))
        loops.compare(x, y, cpu.recipe_of(recipe, before.dtype), not shared_scales, shared_scales, found)
        return found

    found = cpu.in_threads(work, cpu.spans_of(before.numel(), recipe.group_size))
    on_grid, zero_groups, below_half_step, _ = sum(part.counts for part in found).tolist()
    same_value = sum(int(part.same_value[grid]) for part in found)
    counts = [same_value, below_half_step, on_grid, zero_groups, *sum(part.distances[grid] for part in found).tolist()]
    sums = torch.tensor([sum(float(part.sums[i]) for part in found) for i in range(2)], dtype=torch.float64)
    top = torch.tensor(max(int(part.largest[0]) for part in found), dtype=torch.int32)
    return torch.tensor(counts), sums, top, torch.cat([torch.from_numpy(part.group_same) for part in found])


@triton.jit
def _by_thread(x, CHUNK: tl.constexpr):
    """The sums of what a thread holds."""
    chunks = tl.sum(x, axis=0).reshape(x.shape[1] * x.shape[2] // CHUNK, CHUNK)
    return tl.sum(chunks, axis=1)


@triton.jit
def _bucket_compare_fwd_kernel(
    counts_ptr,
    sums_ptr,
    row_same_ptr,
    before_ptr,
    before_stride_0,
    before_stride_1,
    before_stride_2,
    before_size_1,
    before_size_2,
    after_ptr,
    after_stride_0,
    after_stride_1,
    after_stride_2,
    after_size_1,
    after_size_2,
    of_before_ptr,
    of_after_ptr,
    table_ptr,
    n,
    n_steps,
    KIND: tl.constexpr,
    RULE: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    LEVELS: tl.constexpr,
    TWO_ZEROS: tl.constexpr,
    INVERSE_WIDTHS: tl.constexpr,
    SHARED_SCALES: tl.constexpr,
    PER_GROUP: tl.constexpr,
    NEEDS_TENSOR: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    HAS_SHORT: tl.constexpr,
    FULL: tl.constexpr,
    IN_ROWS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Reads both weights once, 4 bytes a pair in bf16 and fp16, 8 in fp32, and writes 92 bytes a program of
    ``n_steps`` tiles of two thousand pairs or more, and 4 a group with PER_GROUP.

    On sm_90 with Triton 3.7 a pair takes about 54 instructions (bucket_compare ct-int4-sym bf16 own), about 64
    instructions (bucket_compare bnb-nf4 bf16 own), and in fp32 about 53 instructions (bucket_compare ct-int4-sym fp32
    own). An H100 has time for 35 in 4 bytes and 71 in 8. So in fp32 memory bounds it by the instructions issued, in
    every recipe, though compares and integers, at half the rate, would take up to a fifth longer; in 16 bits
    arithmetic.
    There it can hardly be otherwise, with arithmetic in fp32: a pair is rounded twice, and what ``fake_quant`` takes
    for that, about 16 a weight for both, makes 32 before anything is compared or counted. Of the 54, by opcode and
    roughly: loads and casts 2, the fit with its reductions and divisions 9, positions 8, rounding and clamping 6,
    values 5, the three flags 7, counting distances 8, the change and its sums 6, a program's end 2. Twice the weights
    a thread would share the fit among more of them (51), at 225 registers, and spill some of NF4's.
    """
    dtype: tl.constexpr = before_ptr.dtype.element_ty
    # Reductions are what this kernel would wait for. Counts are summed over eight neighbours, which a thread holds,
    # and then over tiles, in fields just wide enough: of four bits for the distances, then of eight. Only what is left
    # after the last tile goes across threads, four fields to a sum.
    PART: tl.constexpr = BLOCK_SIZE // BLOCK_PARTS
    CHUNK: tl.constexpr = min(16 // (dtype.primitive_bitwidth // 8), PART)
    CHUNKS: tl.constexpr = BLOCK_GROUPS * PART // CHUNK
    flags = tl.zeros([CHUNKS], tl.int32)
    even_distances = tl.zeros([CHUNKS], tl.int64)
    odd_distances = tl.zeros([CHUNKS], tl.int64)
    sum_change = tl.zeros([CHUNKS], tl.float32)
    sum_flip = tl.zeros([CHUNKS], tl.float32)
    top = tl.zeros([CHUNKS], tl.float32)
    zero_groups = tl.zeros([1, BLOCK_GROUPS, 1], tl.int32)
    smallest = tl.full([1, 1, 1], 1, tl.int32).to(tl.float32, bitcast=True)
    groups_in_tile = tl.arange(0, BLOCK_GROUPS)[None, :, None]
    of_before = tl.load(of_before_ptr) if NEEDS_TENSOR or PER_TENSOR else 0.0
    of_after = tl.load(of_after_ptr) if NEEDS_TENSOR or PER_TENSOR else 0.0
    for step_of_program in range(n_steps):
        tile = tl.program_id(0).to(tl.int64) * n_steps + step_of_program
        lane_group, offsets, lane_mask = tile_offsets(tile, n, FULL, GROUP_SIZE, BLOCK_GROUPS, BLOCK_SIZE, BLOCK_PARTS)
        group, mask = tile_groups(tile, BLOCK_GROUPS), tile_mask(lane_mask, FULL, BLOCK_GROUPS, BLOCK_PARTS)
        short = (group + 1) * GROUP_SIZE > n
        if FULL:
            is_group = tl.full(groups_in_tile.shape, 1, tl.int1)
        else:
            is_group = group * GROUP_SIZE < n
        addresses = tile_addresses(
            lane_group,
            offsets,
            before_stride_0,
            before_stride_1,
            before_stride_2,
            before_size_1,
            before_size_2,
            IN_ROWS,
            GROUP_SIZE,
            BLOCK_GROUPS,
            BLOCK_PARTS,
        )
        x = tl.load(before_ptr + addresses, mask=lane_mask, other=0.0)
        x = in_parts(x, BLOCK_GROUPS, BLOCK_PARTS).to(tl.float32)
        addresses = tile_addresses(
            lane_group,
            offsets,
            after_stride_0,
            after_stride_1,
            after_stride_2,
            after_size_1,
            after_size_2,
            IN_ROWS,
            GROUP_SIZE,
            BLOCK_GROUPS,
            BLOCK_PARTS,
        )
        y = tl.load(after_ptr + addresses, mask=lane_mask, other=0.0)
        y = in_parts(y, BLOCK_GROUPS, BLOCK_PARTS).to(tl.float32)
        if PER_TENSOR:
            scale, aux, y_scale, y_aux = of_before, tl.load(of_before_ptr + 1), of_after, tl.load(of_after_ptr + 1)
        else:
            scale, aux, is_zero = tile_fit(x, mask, short, of_before, dtype, KIND, RULE, HAS_SHORT)
            if SHARED_SCALES:
                y_scale, y_aux, y_is_zero = scale, aux, largest(tl.abs(y)) == 0
            else:
                y_scale, y_aux, y_is_zero = tile_fit(y, mask, short, of_after, dtype, KIND, RULE, HAS_SHORT)
            zero_groups += tl.where(is_zero & y_is_zero & is_group, 1, 0)
        pos = tile_position(x, scale, aux, short, dtype, KIND, RULE, HAS_SHORT, True)
        y_pos = tile_position(y, y_scale, y_aux, short, dtype, KIND, RULE, HAS_SHORT, not SHARED_SCALES)

        bucket = tile_bucket(pos, scale, aux, table_ptr, KIND, RULE, THRESHOLDS, TWO_ZEROS)
        y_bucket = tile_bucket(y_pos, y_scale, y_aux, table_ptr, KIND, RULE, THRESHOLDS, TWO_ZEROS)
        distance = tl.abs(y_bucket - bucket)
        if KIND == "q4_0":  # a scale of the other sign numbers them from the other end
            distance = tl.minimum(distance, 15)
        value = tile_value(pos, scale, aux, table_ptr, KIND, RULE, THRESHOLDS, LEVELS, True)
        value = value.to(dtype).to(tl.float32)
        y_value = tile_value(y_pos, y_scale, y_aux, table_ptr, KIND, RULE, THRESHOLDS, LEVELS, True)
        y_value = y_value.to(dtype).to(tl.float32)
        change = tl.abs(y - x)
        unit, inverse, most = tile_unit(scale, aux, dtype, KIND, RULE)
        stretched = tile_stretched(change, pos, table_ptr, KIND, RULE, THRESHOLDS, INVERSE_WIDTHS)
        # Above 0, so that no change is below it.
        is_below = stretched < tl.where(unit * 0.5 > 0, unit * 0.5, smallest)

        here = tl.where(value == y_value, 1, 0) + tl.where(is_below, 1 << 8, 0) + tl.where(value == x, 1 << 16, 0)
        flags += _by_thread(tl.where(mask, here, 0), CHUNK)
        here = tl.where(mask, tl.full(mask.shape, 1, tl.int64) << (4 * distance).to(tl.int64), 0)
        here = tl.sum(here.reshape(BLOCK_PARTS, CHUNKS, CHUNK), axis=2)
        even_distances += tl.sum(here & 0x0F0F0F0F0F0F0F0F, axis=0)
        odd_distances += tl.sum((here >> 4) & 0x0F0F0F0F0F0F0F0F, axis=0)
        # Masked lanes hold two zeros, and no change.
        sum_change += _by_thread(change, CHUNK)
        # At most one step each; what turns them into steps is the same for all that a thread holds of a group.
        flips = _by_thread(tl.minimum(stretched, most, propagate_nan=tl.PropagateNan.ALL), CHUNK)
        inverse = tl.broadcast_to(inverse, (1, BLOCK_GROUPS, CHUNKS // BLOCK_GROUPS))
        sum_flip += flips * inverse.reshape(CHUNKS)
        top = larger(top, tl.reduce(tl.reduce(change, 0, larger).reshape(CHUNKS, CHUNK), 1, larger))
        if PER_GROUP:
            same = tl.sum((mask & (distance == 0)).to(tl.int32), axis=0, keep_dims=True)
            same = tl.sum(same, axis=2, keep_dims=True)
            tl.store(row_same_ptr + tile * BLOCK_GROUPS + groups_in_tile, same, mask=is_group)

    counts_ptr += tl.program_id(0).to(tl.int64) * 20
    low = (flags & 0xFF) | ((flags & 0xFF00) << 8)
    packed = tl.sum(low.to(tl.int64) | ((flags >> 16).to(tl.int64) << 32), axis=0)
    for i in tl.static_range(3):
        tl.store(counts_ptr + i, ((packed >> (16 * i)) & 0xFFFF).to(tl.int32))
    tl.store(counts_ptr + 3, tl.sum(tl.sum(tl.sum(zero_groups, axis=2), axis=1), axis=0))
    for part in tl.static_range(4):
        distances = odd_distances if part % 2 else even_distances
        packed = tl.sum((distances >> (4 * (part - part % 2))) & 0x00FF00FF00FF00FF, axis=0)
        for i in tl.static_range(4):
            tl.store(counts_ptr + 4 + part + 4 * i, ((packed >> (16 * i)) & 0xFFFF).to(tl.int32))
    sums_ptr += tl.program_id(0).to(tl.int64) * 3
    tl.store(sums_ptr, tl.sum(sum_change, axis=0))
    tl.store(sums_ptr + 1, tl.sum(sum_flip, axis=0))
    tl.store(sums_ptr + 2, tl.abs(tl.reduce(top, 0, larger)))


def _bucket_compare_triton(
    before: torch.Tensor,
    after: torch.Tensor,
    recipe: Format,
    shared_scales: bool,
    per_group: bool,
    tile: int = _TILE,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    n, device = before.numel(), before.device
    if not n:
        return _bucket_compare_torch(before, after, recipe, shared_scales, per_group)
    before, layout = strided(before)
    after, after_layout = strided(after)
    bytes_each = before.element_size()
    constants = recipe.kernel_constants(before.dtype) | tile_constants(
        recipe, n, tile, layout, after_layout, parts=bytes_each, chunk=16 // bytes_each
    )
    rows = -(-n // constants["GROUP_SIZE"])
    tiles = -(-rows // constants["BLOCK_GROUPS"])
    # Enough programs for every multiprocessor to hold several; beyond that, tiles share the reductions of one.
    in_a_tile = constants["BLOCK_GROUPS"] * constants["BLOCK_SIZE"]
    steps = min(max(tiles // _PROGRAMS, 1), _STEPS, 65535 // in_a_tile)
    if constants["FULL"]:
        # Nothing masks what would lie beyond the last tile.
        steps = next(divisor for divisor in range(steps, 0, -1) if tiles % divisor == 0)
    programs = -(-tiles // steps)
    counts = torch.empty(programs, len(_COUNTS) + BINS, dtype=torch.int32, device=device)
    sums = torch.empty(programs, 3, dtype=torch.float32, device=device)
    row_same = torch.empty(rows if per_group else 0, dtype=torch.int32, device=device)
    if recipe.group_size is None:
        ends = torch.stack(tensor_range(before))[None]
        of_before = recipe.fit(ends, False, None)
    else:
        of_before = recipe.fit_tensor(before)
    # Two weights, two grids and five counters are alive at once: some would spill where ptxas guesses.
    resident_warps = 12 if per_group or constants["THRESHOLDS"] is None else None
    if constants["BLOCK_GROUPS"] == 1 or not constants["FULL"]:
        resident_warps = 8
    with torch.cuda.device_of(before):
        _bucket_compare_fwd_kernel[(programs,)](
            counts,
            sums,
            row_same,
            before,
            *layout,
            after,
            *after_layout,
            of_before,
            of_before if shared_scales else recipe.fit_tensor(after),
            recipe.kernel_table(device),
            n,
            steps,
            LEVELS=recipe.levels,
            TWO_ZEROS=recipe.two_zeros,
            INVERSE_WIDTHS=recipe.inverse_widths,
            SHARED_SCALES=shared_scales,
            PER_GROUP=per_group,
            **constants,
            **launch_options(constants, 16, resident_warps),
        )
    counts = counts.sum(dim=0, dtype=torch.int64)
    group_same = row_same.long()
    top = sums[:, 2].view(torch.int32).amax()
    if recipe.group_size is None:
        # The rows of a whole-tensor group are pieces of it.
        counts[3] = ((ends == 0).all() & (top == 0)).long()
        group_same = group_same.sum(dim=0, keepdim=True) if per_group else group_same
    return counts, sums[:, :2].sum(dim=0, dtype=torch.float64), top, group_same


# Among a DTensor's arguments only those from the first integer on tell one sharding from another: the format
# comes after the group size.
@torch.library.custom_op("quail::bucket_compare", mutates_args=(), device_types="cpu")
def _bucket_compare_op(
    before: torch.Tensor,
    after: torch.Tensor,
    group_size: int | None,
    format: str,
    shared_scales: bool,
    per_group: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _bucket_compare_cpu(before, after, get_format(format, group_size), shared_scales, per_group)


@_bucket_compare_op.register_kernel("cuda")
def _(before, after, group_size, format, *args):
    return _bucket_compare_triton(before, after, get_format(format, group_size), *args)


@_bucket_compare_op.register_fake
def _(before, after, group_size, format, shared_scales, per_group):
    groups = get_format(format, group_size).groups(before.numel()) if per_group else 0
    counts = before.new_empty(len(_COUNTS) + BINS, dtype=torch.int64)
    return (
        counts,
        before.new_empty(2, dtype=torch.float64),
        before.new_empty((), dtype=torch.int32),
        before.new_empty(groups, dtype=torch.int64),
    )


def bucket_compare(
    w_before: torch.Tensor,
    w_after: torch.Tensor,
    format: str,
    group_size: int | None = None,
    scales: Literal["own", "before"] = "own",
    per_group: bool = False,
) -> BucketComparison:
    """Compares the buckets of a weight before and after a change, without a synchronisation.

    Two runs on one device give the same bits: counts are integers, and sums are taken in a fixed order.

    Args:
        w_before, w_after: float32, bfloat16 or float16, of one shape, dtype and device. Cast to the dtype of
            the deployment first: fp32 master weights are not what it sees. Strides may differ, and are read in
            place up to three dimensions that do not merge.
        format: a recipe of ``FORMATS``, as ``"bnb-nf4"`` or, with its group size, ``"ct-int4-sym@64"``.
        group_size: the group size, unless ``format`` says it; None takes the recipe's default.
        scales: ``"own"`` fits each tensor's scales, ``"before"`` uses those of w_before for both.
        per_group: also count the weights in the same bucket for each group.

    Returns:
        A BucketComparison. A weight that is NaN or infinite makes the sum and the maximum of |dw| NaN or infinite,
        NaN where both tensors have an infinity there. It counts in the bucket that its recipe gives to it; the
        value of its group is then NaN or infinite on its own scales, and NaN equals no value. Under
        ``scales="before"`` a NaN of w_after alone has the value of its bucket.
        Of DTensors it holds plain tensors, the same on every rank: what the ranks counted of their shards is
        added up at once. Where groups straddle shards, or the recipe looks at the whole tensor, the weights are
        gathered first.

    Raises:
        ValueError: on an unknown format or option, a group size that is not legal for it or does not divide
            the last dimension where it has to, another dtype, or tensors that do not match.
    """
    recipe = get_format(format, group_size)
    check_weight("w_before", w_before, recipe)
    for name in ("shape", "dtype", "device"):
        expected, got = getattr(w_before, name), getattr(w_after, name)
        if expected != got:
            raise ValueError(f"w_after: expected the {name} of w_before, {expected}; got {got}")
    if scales not in ("own", "before"):
        raise ValueError(f"scales: expected 'own' or 'before'; got {scales!r}")
    has_dtensors = admit_dtensors(w_before, w_after)
    parts = _bucket_compare_op(w_before.detach(), w_after.detach(), group_size, format, scales == "before", per_group)
    counts, sums, top, group_same = (part.full_tensor() for part in parts) if has_dtensors else parts
    n, groups = w_before.numel(), recipe.groups(w_before.numel())
    group_total = None
    if per_group:
        group_total = torch.full((groups,), recipe.group_size or n, dtype=torch.int64, device=w_before.device)
        if groups and recipe.group_size is not None:
            group_total[-1] = n - (groups - 1) * recipe.group_size
    same_value, below_half_step, on_grid, zero_groups = counts[: len(_COUNTS)].unbind()
    return BucketComparison(
        total=n,
        groups=groups,
        code_distance=counts[len(_COUNTS) :],
        same_value=same_value,
        on_grid=on_grid,
        zero_groups=zero_groups,
        below_half_step=below_half_step,
        sum_abs_change=sums[0],
        max_abs_change=top.view(torch.float32).double(),
        sum_flip_law=sums[1],
        group_same_code=group_same if per_group else None,
        group_total=group_total,
    )
