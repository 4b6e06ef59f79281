r"""A codebook of sixteen levels times the group's largest magnitude: NF4 and FP4 of bitsandbytes.

``bnb-nf4``, ``bnb-fp4`` (bitsandbytes 0.50, the PyTorch back end that its CPU build runs)
    Groups run over the flattened contiguous tensor, 64 weights by default; the last group may be short.
        absmax = max |x|          p = x * (1 / max(absmax, 1e-38))          value = level[bucket] * absmax
    A short last group divides, p = x / absmax, and its stored absmax is at least 1e-38. The bucket is decided
    by strict > on the fp32 midpoints between neighbouring levels: a tie takes the lower level. A group of
    zeros gets the code of level 0 (NF4: 7, FP4: 0). FP4 has two codes for zero: with t its threshold beside
    zero, 0 where -t < p <= 0 and 8 where 0 < p <= t.
    The CUDA build differs, and its bits are not reproduced: its reciprocal is approximate (<= 1 ulp,
    denormals flushed), a group of zeros gets NF4 code 0, its FP4 thresholds are decimal literals near the
    midpoints, and an FP4 tie takes the smaller magnitude.
    NaN takes the top level's code, as the library has it.
    https://arxiv.org/abs/2305.14314 (NF4); bitsandbytes/backends/default/ops.py.
"""

import functools
from dataclasses import dataclass

import torch

from .._triton import tl, triton
from .base import Format, look_up

_SMALLEST_ABSMAX = 1e-38  # bitsandbytes' guard against 1 / 0: an fp32 subnormal, so no kernel may flush those
# A kernel rounds a position times a scale, plus about 16, to one of 32 cells of one threshold at most. What it looks up
# by cell is one word each of a cache line, so that a warp's look-ups are one access. 1.5 * 2^23 leaves the cell in the
# low bits of the sum.
_KERNEL_CELLS = 32
_CELL_ORIGIN = 12582912.0 + _KERNEL_CELLS / 2
# Where in the table what stands: by cell the threshold and the rank below it, and of each of _BY_CELL what is below it
# and what is above it; by rank or code the rest.
_BY_CELL = ("levels", "codes")
_BY_RANK = ("levels", "inverse_widths", "levels_by_code")
_PLANES = {name: (2 + 2 * i) * _KERNEL_CELLS for i, name in enumerate(_BY_CELL)}
_COLUMNS = {name: (2 + 2 * len(_BY_CELL)) * _KERNEL_CELLS + 16 * i for i, name in enumerate(_BY_RANK)}
_LEVELS_BY_CELL = tl.constexpr(_PLANES["levels"])
_LEVELS, _INVERSE_WIDTHS, _LEVELS_BY_CODE = (tl.constexpr(_COLUMNS[name]) for name in _BY_RANK)
_CELLS = 1365  # found by trying odd numbers: FP4 has a threshold at 0, and none may lie near an edge


@dataclass(frozen=True)
class Levels(Format):
    """Sixteen fp32 levels times a group's scale, and thresholds between them on a position's scale.

    A position is above a threshold by strict >. It lies within -``reach`` and ``reach``, where the outermost
    buckets end.
    """

    levels_by_code: tuple[float, ...]

    reach = 1.0

    @functools.cached_property
    def codes(self) -> tuple[int, ...]:
        # bitsandbytes puts code 8 above code 0 although both are zero: a stable sort does, too.
        return tuple(sorted(range(16), key=self.levels_by_code.__getitem__))

    @functools.cached_property
    def levels(self) -> tuple[float, ...]:
        return tuple(self.levels_by_code[code] for code in self.codes)

    @functools.cached_property
    def midpoints(self) -> tuple[float, ...]:
        levels = torch.tensor(self.levels, dtype=torch.float32, device="cpu")
        return tuple(((levels[:-1] + levels[1:]) / 2).tolist())

    @property
    def thresholds(self) -> tuple[float, ...]:
        return self.midpoints

    @functools.cached_property
    def cells(self) -> tuple[float, ...]:
        """-reach to reach in equal cells of one threshold at most: by cell its own, or infinity.

        The cell of a position is reckoned with rounding, and no threshold lies where that could matter.
        """
        at = [(threshold + self.reach) * (_CELLS / 2 / self.reach) for threshold in self.thresholds]
        inside = {int(place): threshold for place, threshold in zip(at, self.thresholds, strict=True)}
        if len(inside) < len(at) or any(abs(place - round(place)) < 0.01 for place in at):
            raise ValueError(f"{self.name}: expected thresholds apart from each other and from the edges of the cells")
        return tuple(inside.get(cell, float("inf")) for cell in range(_CELLS))

    @functools.cached_property
    def rank_by_place(self) -> tuple[int, ...]:
        """Of each half of a cell, the one below its threshold and the one above it."""
        has_one = [cell != float("inf") for cell in self.cells]
        below = [sum(has_one[:cell]) for cell in range(_CELLS)]
        return tuple(rank for cell in range(_CELLS) for rank in (below[cell], below[cell] + has_one[cell]))

    @functools.cached_property
    def level_by_place(self) -> tuple[float, ...]:
        return tuple(self.levels[rank] for rank in self.rank_by_place)

    @functools.cached_property
    def buckets(self) -> tuple[int, ...]:
        distinct = sorted(set(self.levels))
        return tuple(distinct.index(level) for level in self.levels)

    @functools.cached_property
    def two_zeros(self) -> bool:
        if self.buckets == tuple(range(16)):
            return False
        if self.buckets != tuple(rank - (rank >> 3) for rank in range(16)):
            raise ValueError(f"{self.name}: expected levels of which no two are the same, or those of rank 7 and 8")
        return True

    @functools.cached_property
    def widths(self) -> tuple[float, ...]:
        """By rank, the width of the bucket on a position's scale."""
        edges = (-self.reach, *self.midpoints, self.reach)
        spans = [[r for r in range(16) if self.buckets[r] == bucket] for bucket in self.buckets]
        return tuple(edges[span[-1] + 1] - edges[span[0]] for span in spans)

    @functools.cached_property
    def inverse_widths(self) -> tuple[float, ...]:
        return tuple(1 / width for width in self.widths)

    @functools.cached_property
    def pad_code(self) -> int:
        return self.codes[sum(threshold < 0 for threshold in self.thresholds)]

    def bucket(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        place = rank.to(torch.int8)
        return place.sub_(place >> 3) if self.two_zeros else place

    def place_of(self, position: torch.Tensor) -> torch.Tensor:
        """Which half of which cell a position lies in; ``position`` is used up."""
        position.nan_to_num_(self.reach)
        cell = (position + self.reach).mul_(_CELLS / 2 / self.reach).clamp_(0, _CELLS - 1).to(torch.int32)
        # By its sign bit, -1 where the threshold is below: a comparison and a cast take three times as long.
        above = look_up(self.table("cells", position.device), cell).sub_(position).view(torch.int32)
        return cell.mul_(2).sub_(above.bitwise_right_shift_(31))

    def rank_of(self, position: torch.Tensor) -> torch.Tensor:
        """What torch.bucketize gives, NaN in the top bucket included, at a third of its time; ``position`` is used
        up."""
        return look_up(self.table("rank_by_place", position.device, torch.int32), self.place_of(position))


@dataclass(frozen=True)
class Codebook(Levels):
    """Levels from -1 to 1 times the group's largest magnitude; ``kernel_scale`` times a position is a kernel's cell."""

    kernel_scale: float

    kind = "codebook"

    @functools.cached_property
    def _origins(self) -> tuple[float, float]:
        """What is added for positions up to 0 and above it: a threshold at 0 lies between cells."""
        return _CELL_ORIGIN - (0.0 in self.thresholds), _CELL_ORIGIN

    @functools.cached_property
    def _kernel_cells(self) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """By cell (its threshold or infinity, the rank below it)."""
        origins = [origin - _CELL_ORIGIN + _KERNEL_CELLS / 2 for origin in self._origins]
        places = [threshold * self.kernel_scale + origins[threshold > 0] for threshold in self.thresholds]
        own = {round(place): t for place, t in zip(places, self.thresholds, strict=True) if t != 0}
        at_edge = any(abs(place % 1 - 0.5) < 0.001 for place in places) or self.kernel_scale > _KERNEL_CELLS / 2 - 1
        if len(own) < sum(t != 0 for t in self.thresholds) or at_edge:
            raise ValueError(f"{self.name}: expected thresholds apart from each other and from the edges of the cells")
        below = [sum(round(place) < cell for place in places) for cell in range(_KERNEL_CELLS)]
        return tuple(own.get(cell, float("inf")) for cell in range(_KERNEL_CELLS)), tuple(below)

    def kernel_rule(self, dtype: torch.dtype) -> tuple[float, ...]:
        return (self.kernel_scale, *self._origins)

    def kernel_table(self, device: torch.device) -> torch.Tensor:
        return _kernel_table(self, device)

    def column(self, name: str) -> int | None:
        return None if getattr(self, name) == tuple(range(16)) else _PLANES[name]

    def fit(self, x: torch.Tensor, short: bool, of_tensor: torch.Tensor | None) -> torch.Tensor:
        absmax = x.float().abs().amax(dim=1)
        return absmax.clamp(min=_SMALLEST_ABSMAX) if short else absmax

    def _position(self, x: torch.Tensor, params: torch.Tensor, short: bool) -> torch.Tensor:
        absmax = params.clamp(min=_SMALLEST_ABSMAX)[:, None]
        return x.float() / absmax if short else x.float() * (1.0 / absmax)

    def rank(self, x: torch.Tensor, params: torch.Tensor, short: bool) -> torch.Tensor:
        return self.rank_of(self._position(x, params, short))

    def nearest(self, x: torch.Tensor, params: torch.Tensor, short: bool) -> torch.Tensor:
        place = self.place_of(self._position(x, params, short))
        return look_up(self.table("level_by_place", x.device), place).mul_(params[:, None])

    def value(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return look_up(self.table("levels", rank.device), rank).mul_(params[:, None])


@functools.cache
def _kernel_table(recipe: Codebook, device: torch.device) -> torch.Tensor:
    """int32 [240]; fp32 numbers by their bits. It is made once a device: copying it there waits for the device."""
    own, below = recipe._kernel_cells

    def words(numbers):
        dtype = torch.float32 if isinstance(numbers[0], float) else torch.int32
        return torch.tensor(numbers, dtype=dtype, device="cpu").view(torch.int32)

    # Above the last threshold no cell has one of its own.
    by_cell = [
        words([getattr(recipe, name)[min(rank + above, 15)] for rank in below]) for name in _BY_CELL for above in (0, 1)
    ]
    by_rank = [words(getattr(recipe, name)) for name in _BY_RANK]
    return torch.cat([words(own), words(below), *by_cell, *by_rank]).to(device)


_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_MAGNITUDES = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=torch.float32, device="cpu") / 12
_FP4 = (*_FP4_MAGNITUDES.tolist(), 0.0, *(-_FP4_MAGNITUDES[1:]).tolist())

RECIPES = (
    Codebook("bnb-nf4", 64, _SIZES, False, levels_by_code=_NF4, kernel_scale=14.375),
    Codebook("bnb-fp4", 64, _SIZES, False, levels_by_code=_FP4, kernel_scale=14.125),
)


@triton.jit
def codebook_fit(absmax, short, HAS_SHORT: tl.constexpr):
    if HAS_SHORT:
        # A number below fp32's normal range would make the comparison one of fp64.
        smallest = tl.full(absmax.shape, 1e-38, tl.float32)
        absmax = tl.where(short & (absmax < smallest), smallest, absmax)
    return absmax


@triton.jit
def codebook_unit(absmax):
    smallest = tl.full(absmax.shape, 1e-38, tl.float32)
    return tl.where(absmax < smallest, smallest, absmax)


@triton.jit
def codebook_inverse(absmax):
    return tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), codebook_unit(absmax))


@triton.jit
def codebook_position(x, absmax, short, HAS_SHORT: tl.constexpr, OWN: tl.constexpr):
    """From -1 to 1, but for a last bit; NaN is at 1."""
    pos = x * codebook_inverse(absmax)
    if HAS_SHORT:
        pos = tl.where(short, tl.div_rn(x, tl.broadcast_to(codebook_unit(absmax), x.shape)), pos)
    pos = tl.minimum(pos, 1.0)
    return pos if OWN else tl.maximum(pos, -1.0)


@triton.jit
def entry_at(table_ptr, index):
    """In one dimension, as the weights were loaded: then the compiler keeps one layout for both."""
    flat = index.reshape(index.shape[0] * index.shape[1] * index.shape[2])
    return tl.load(table_ptr + flat).reshape(index.shape)


@triton.jit
def _cell(pos, RULE: tl.constexpr):
    SCALE: tl.constexpr = RULE[0]
    BELOW: tl.constexpr = RULE[1]
    ABOVE: tl.constexpr = RULE[2]
    origin = tl.full(pos.shape, BELOW, tl.float32)
    if BELOW != ABOVE:
        origin = tl.where(pos > 0, ABOVE, origin)
    # No threshold is so near the edge of a cell that the rounding of a product would matter.
    place = tl.fma(pos, tl.full(pos.shape, SCALE, tl.float32), origin)
    return place.to(tl.int32, bitcast=True) & 31


@triton.jit
def codebook_rank(pos, table_ptr, RULE: tl.constexpr):
    """The number of thresholds below pos; NaN was above all, as torch.bucketize has it.

    What NF4 cost in other forms, in instructions a weight for sm_90 with Triton 3.7 (in brackets those on the pipe for
    compares, selects and integers, which is half as wide), all else being as it was then:

                                             fake_quant bf16      fp32           bucket_compare bf16
        chain of 15 compares and selects     41.6 (35.7)          44.8 (37.9)    295.9 (246.6)
        tree of 4 compares, 26 selects       40.4 (32.6)          37.8 (29.1)    293.9 (237.0), half the warps
        sum of 15 differences, as integers   59.6 (33.8)          62.9 (35.6)    427.4 (295.9)
        15 compares, tl.gather of 16         69.2 (50.5)          72.4 (52.1)    284.0 (201.2)
        32 cells, tl.gather                  34.3 (23.1)          37.2 (24.9)    247.6 (166.9), three quarters of them
        32 cells, loads from a table         26.4 (14.3)          29.7 (16.6)    160.9 (97.8)

    The last is what stands here. sm_80 and sm_100 were within 3 of these in fake_quant, but for the tree in bf16 (34.8,
    37.2). An H100 has time for 35 (17.7) in bf16 and 71 (35) in fp32. Since then fake_quant has come to 21.6 in bf16,
    to 20.6 with one multiply-add for the cell, and to 16.5 with the level looked up by cell, too (``codebook_entry``).
    """
    cell = _cell(pos, RULE)
    own = entry_at(table_ptr, cell).to(tl.float32, bitcast=True)
    return entry_at(table_ptr + 32, cell) + tl.where(pos <= own, 0, 1)


@triton.jit
def codebook_entry(pos, table_ptr, RULE: tl.constexpr, PLANES: tl.constexpr):
    """The int32 of a column that stands in the table by cell, without the detour over the rank."""
    cell = _cell(pos, RULE)
    own = entry_at(table_ptr, cell).to(tl.float32, bitcast=True)
    return tl.where(pos <= own, entry_at(table_ptr + PLANES, cell), entry_at(table_ptr + PLANES + 32, cell))


@triton.jit
def codebook_level(pos, table_ptr, RULE: tl.constexpr, BY_RANK: tl.constexpr):
    """BY_RANK: the rank is there for other reasons."""
    if BY_RANK:
        bits = entry_at(table_ptr + _LEVELS, codebook_rank(pos, table_ptr, RULE))
    else:
        bits = codebook_entry(pos, table_ptr, RULE, _LEVELS_BY_CELL)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def codebook_bucket(rank, TWO_ZEROS: tl.constexpr):
    return rank - (rank >> 3) if TWO_ZEROS else rank


@triton.jit
def codebook_inverse_width(rank, table_ptr):
    return entry_at(table_ptr + _INVERSE_WIDTHS, rank).to(tl.float32, bitcast=True)


@triton.jit
def codebook_level_of_code(code, table_ptr):
    return entry_at(table_ptr + _LEVELS_BY_CODE, code).to(tl.float32, bitcast=True)
