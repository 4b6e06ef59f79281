r"""The 4-bit recipes, frozen, each named after the library whose bits it reproduces.

A weight tensor is cut into groups of consecutive elements, each group is given parameters (a scale, or a step
and a minimum), and every weight is given one of sixteen buckets. With x a weight of group g, all in fp32
unless said:

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
    https://arxiv.org/abs/2305.14314 (NF4); bitsandbytes/backends/default/ops.py.

``ct-int4-sym`` (compressed-tensors 0.20, its PyTorch path)
    Groups run along the last dimension, 128 weights by default, and must divide it. The arithmetic is that of
    the model's dtype T, each result rounded to T:
        s = T(absmax / 7.5), or eps(T) where that is 0
        q = round(clamp(T(x / s), -8, 7))          value = T(q * s)
    with ties to even; the code is q + 8, as the library packs it. The library's Triton path for CUDA
    keeps x / s in fp32, so that bf16 and fp16 codes near a tie may differ there; its fake-quantized forward
    is as here on every device.
    compressed_tensors/quantization/lifecycle/forward_helpers.py; utils/helpers.py, calculate_qparams.

``minmax-int4`` (the uniform buckets that reviews quote from QUAIL, https://arxiv.org/abs/2601.15538)
        step = (max - min) / 16
        bucket = clamp(floor((x - min) / step), 0, 15)          value = min + (bucket + 1/2) * step
    One group for the whole tensor by default, which is what gives the quoted steps of 0.05 to 0.1; ``@128``
    and the like group along the last dimension. That the value is the centre of the bucket is our choice: the
    quoted analysis counts buckets only. A constant group has step 0, bucket 0 and its own value.

NaN and infinity are never hidden. A NaN makes its group's parameters NaN, so the whole group dequantizes to
NaN; an infinity makes them infinite, and its group dequantizes to NaN and infinity only. What code they get
is the library's for bitsandbytes (NaN: the top level), else that of q = 0 (``ct-int4-sym``) or of bucket 0
(``minmax-int4``).
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ._triton import tl, triton

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALLEST_ABSMAX = 1e-38  # bitsandbytes' guard against 1 / 0: an fp32 subnormal, so no kernel may flush those
_CHUNK = 1 << 20
_CELLS = 1365  # found by trying odd numbers: FP4 has a threshold at 0, and none may lie near an edge


@dataclass(frozen=True)
class Format:
    """What every recipe has; ``group_size`` None means one group for the whole tensor.

    A subclass is a rule for the arithmetic. Its methods are the PyTorch reference, with groups as rows: x is
    [groups, group_size] in the model's dtype, and ``short`` says that it is the one short group at the
    tensor's end.

    ``fit(x, short)``           the parameters, [groups], or [groups, 2] = (step, minimum) where ``affine``
    ``rank(x, params, short)``  the bucket's place on the number line, 0 to 15
    ``value(rank, params)``     what the bucket dequantizes to, before the cast to the model's dtype
    ``step(rank, params)``      the width of the bucket
    """

    name: str
    group_size: int | None
    legal_group_sizes: tuple[int, ...] | range
    groups_divide_last_dim: bool

    affine = False
    pad_code = 0
    codes = tuple(range(16))  # by rank: what is stored
    buckets = tuple(range(16))  # by rank: two ranks of one value are one bucket

    def __str__(self) -> str:
        return self.name if self.group_size is None else f"{self.name}@{self.group_size}"

    def params_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def groups(self, n: int) -> int:
        """How many groups n weights make."""
        return min(n, 1) if self.group_size is None else -(-n // self.group_size)

    def kernel_constants(self, dtype: torch.dtype) -> dict:
        """The rule's constants for the Triton helpers below; those that it has no use for are neutral."""
        return {"KIND": self.kind, "DIVISOR": 1.0, "ZERO_SCALE": 0.0, "THRESHOLDS": ()}


@dataclass(frozen=True)
class Codebook(Format):
    """Sixteen levels times the group's largest magnitude; ``levels_by_code`` are fp32 numbers."""

    levels_by_code: tuple[float, ...]

    kind = "codebook"

    @functools.cached_property
    def codes(self) -> tuple[int, ...]:
        # bitsandbytes puts code 8 above code 0 although both are zero: a stable sort does, too.
        return tuple(sorted(range(16), key=self.levels_by_code.__getitem__))

    @functools.cached_property
    def levels(self) -> tuple[float, ...]:
        return tuple(self.levels_by_code[code] for code in self.codes)

    @functools.cached_property
    def thresholds(self) -> tuple[float, ...]:
        levels = torch.tensor(self.levels, dtype=torch.float32, device="cpu")
        return tuple(((levels[:-1] + levels[1:]) / 2).tolist())

    @functools.cached_property
    def cells(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """-1 to 1 in equal cells of one threshold at most: the thresholds below each, and its own or infinity.

        The cell of a position is reckoned with rounding, and no threshold lies where that could matter.
        """
        at = [(threshold + 1) * _CELLS / 2 for threshold in self.thresholds]
        inside = {int(place): threshold for place, threshold in zip(at, self.thresholds, strict=True)}
        if len(inside) < len(at) or any(abs(place - round(place)) < 0.01 for place in at):
            raise ValueError(f"{self.name}: expected thresholds apart from each other and from the edges of the cells")
        own = tuple(inside.get(cell, float("inf")) for cell in range(_CELLS))
        return tuple(sum(place < cell for place in at) for cell in range(_CELLS)), own

    @functools.cached_property
    def buckets(self) -> tuple[int, ...]:
        distinct = sorted(set(self.levels))
        return tuple(distinct.index(level) for level in self.levels)

    @functools.cached_property
    def widths(self) -> tuple[float, ...]:
        """By rank, the width of the bucket on the scale of absmax; the outermost buckets end at -1 and 1."""
        edges = (-1.0, *self.thresholds, 1.0)
        spans = [[r for r in range(16) if self.buckets[r] == bucket] for bucket in self.buckets]
        return tuple(edges[span[-1] + 1] - edges[span[0]] for span in spans)

    @functools.cached_property
    def pad_code(self) -> int:
        return self.codes[sum(threshold < 0 for threshold in self.thresholds)]

    def fit(self, x: torch.Tensor, short: bool) -> torch.Tensor:
        absmax = x.abs().amax(dim=1).float()
        return absmax.clamp(min=_SMALLEST_ABSMAX) if short else absmax

    def rank(self, x: torch.Tensor, params: torch.Tensor, short: bool) -> torch.Tensor:
        absmax = params.clamp(min=_SMALLEST_ABSMAX)[:, None]
        position = x.float() / absmax if short else x.float() * (1.0 / absmax)
        # What torch.bucketize gives, NaN in the top bucket included, at less than half its time.
        below, threshold = self.cells
        cell = position.nan_to_num(nan=1.0).add_(1).mul_(_CELLS / 2).clamp_(0, _CELLS - 1).to(torch.int32).flatten()
        above = position.flatten() > _table(threshold, x).index_select(0, cell)
        return torch.tensor(below, dtype=torch.int32, device=x.device).index_select(0, cell).add_(above).view(x.shape)

    def value(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return _table(self.levels, params)[rank] * params[:, None]

    def step(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return _table(self.widths, params)[rank] * params[:, None]

    def kernel_constants(self, dtype: torch.dtype) -> dict:
        return super().kernel_constants(dtype) | {"THRESHOLDS": self.thresholds}


@dataclass(frozen=True)
class Symmetric(Format):
    """q = round(x / s) in -8 .. 7 with s = absmax / ``divisor``, in the arithmetic of the model's dtype."""

    divisor: float

    kind = "symmetric"
    levels = tuple(float(q) for q in range(-8, 8))

    def params_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def fit(self, x: torch.Tensor, short: bool) -> torch.Tensor:
        # A divisor that is no tensor would make PyTorch multiply by its reciprocal on CUDA.
        scale = x.abs().amax(dim=1) / torch.full((), self.divisor, dtype=x.dtype, device=x.device)
        return scale.masked_fill(scale == 0, torch.finfo(x.dtype).eps)

    def rank(self, x: torch.Tensor, params: torch.Tensor, short: bool) -> torch.Tensor:
        q = (x / params[:, None]).clamp(-8, 7).round()
        return q.masked_fill(q.isnan(), 0).to(torch.int32) + 8

    def value(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return (rank - 8).to(params.dtype) * params[:, None]

    def step(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return params[:, None].float().expand(rank.shape)

    def kernel_constants(self, dtype: torch.dtype) -> dict:
        rule = {"DIVISOR": self.divisor, "ZERO_SCALE": torch.finfo(dtype).eps}
        return super().kernel_constants(dtype) | rule


@dataclass(frozen=True)
class MinMax(Format):
    """Sixteen buckets of one width from the group's minimum to its maximum, in fp32."""

    kind = "minmax"
    affine = True
    levels = tuple(bucket + 0.5 for bucket in range(16))

    def fit(self, x: torch.Tensor, short: bool) -> torch.Tensor:
        low, high = torch.aminmax(x, dim=1)
        low, high = low.float(), high.float()
        return torch.stack([(high - low) / 16, low], dim=1)

    def rank(self, x: torch.Tensor, params: torch.Tensor, short: bool) -> torch.Tensor:
        step, low = params[:, :1], params[:, 1:]
        bucket = ((x.float() - low) / step).floor().clamp(0, 15)
        return bucket.masked_fill(bucket.isnan(), 0).to(torch.int32)

    def value(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return params[:, 1:] + (rank.float() + 0.5) * params[:, :1]

    def step(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return params[:, :1].expand(rank.shape)


_BNB_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_ROW_SIZES = range(8, 4097, 8)

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_MAGNITUDES = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=torch.float32, device="cpu") / 12
_FP4 = (*_FP4_MAGNITUDES.tolist(), 0.0, *(-_FP4_MAGNITUDES[1:]).tolist())

FORMATS: dict[str, Format] = {
    recipe.name: recipe
    for recipe in (
        Codebook("bnb-nf4", 64, _BNB_SIZES, False, levels_by_code=_NF4),
        Codebook("bnb-fp4", 64, _BNB_SIZES, False, levels_by_code=_FP4),
        Symmetric("ct-int4-sym", 128, _ROW_SIZES, True, divisor=7.5),
        MinMax("minmax-int4", None, _ROW_SIZES, True),
    )
}


def get_format(format: str, group_size: int | None = None) -> Format:
    """The recipe of that name, with the group size that the name (``ct-int4-sym@64``) or the argument gives.

    Raises ValueError where the name is unknown, the size is not legal for it, or the two sizes differ.
    """
    name, at, size = format.partition("@")
    if name not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, optionally with @group_size; got {format!r}")
    recipe = FORMATS[name]
    if at:
        if not size.isdecimal():
            raise ValueError(f"format: expected a number after @, as in {name}@64; got {format!r}")
        if group_size not in (None, int(size)):
            raise ValueError(f"group_size: expected {size}, as format {format!r} says, or none; got {group_size}")
        group_size = int(size)
    if group_size is None:
        return recipe
    if group_size not in recipe.legal_group_sizes:
        raise ValueError(f"group_size: expected {_in_words(recipe.legal_group_sizes)} for {name}; got {group_size}")
    return replace(recipe, group_size=group_size)


def check_weight(name: str, w: torch.Tensor, recipe: Format) -> None:
    """Raises ValueError where ``w`` is no weight that ``recipe`` can take."""
    if w.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16; got {_short(w.dtype)}")
    check_shape(name, w.shape, recipe)


def check_shape(name: str, shape: torch.Size, recipe: Format) -> None:
    """Raises ValueError where the groups of ``recipe`` do not divide the last dimension and have to."""
    if recipe.groups_divide_last_dim and recipe.group_size is not None:
        if not shape or shape[-1] % recipe.group_size:
            expected = f"a last dimension that is a multiple of {recipe.group_size}, the group size of {recipe.name}"
            raise ValueError(f"{name}: expected {expected}; got shape {tuple(shape)}")


def group_chunks(flat: torch.Tensor, recipe: Format) -> Iterator[tuple[slice, slice, torch.Tensor, bool]]:
    """About a million weights at a time: (slice of weights, slice of groups, [groups, group_size] view,
    short).

    It bounds the temporaries of the references. The short last group comes alone; a whole-tensor group comes
    in pieces, each as one row.
    """
    n = flat.numel()
    size = recipe.group_size or _CHUNK
    full = n // size * size
    stride = max(_CHUNK // size, 1) * size
    for start in range(0, full, stride):
        span = slice(start, min(start + stride, full))
        groups = slice(0, 1) if recipe.group_size is None else slice(span.start // size, span.stop // size)
        yield span, groups, flat[span].view(-1, size), False
    if full < n:
        groups = slice(0, 1) if recipe.group_size is None else slice(full // size, full // size + 1)
        yield slice(full, n), groups, flat[full:].view(1, -1), True


def fit_tensor(flat: torch.Tensor, recipe: Format) -> torch.Tensor | None:
    """The parameters of a whole-tensor group, [1] or [1, 2]; None where groups are fitted one by one."""
    return recipe.fit(flat.view(1, -1), False) if recipe.group_size is None and flat.numel() else None


def _table(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)


def _in_words(sizes: tuple[int, ...] | range) -> str:
    if isinstance(sizes, range):
        return f"a multiple of {sizes.step} from {sizes[0]} to {sizes[-1]}"
    return f"one of {', '.join(map(str, sizes))}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The Triton side of the recipes: device functions over a tile [groups, group_size] of fp32 weights. A
# weight's ``position`` is the weight on its group's own scale: code, bucket, value and step are all read off
# it, and the compiler drops what a kernel does not store.


def tile_constants(recipe: Format, n: int, tile: int) -> dict:
    """How a kernel covers n weights: BLOCK_GROUPS groups of GROUP_SIZE weights, padded to BLOCK_SIZE, a
    program.

    ``tile`` is the number of weights that a program aims at. A whole-tensor group is walked in rows of
    ``tile``.
    """
    per_tensor = recipe.group_size is None
    size = tile if per_tensor else recipe.group_size
    padded = 1 << (size - 1).bit_length()
    return {
        "PER_TENSOR": per_tensor,
        "HAS_SHORT": n % size != 0,
        "GROUP_SIZE": size,
        "BLOCK_GROUPS": max(tile // padded, 1),
        "BLOCK_SIZE": padded,
    }


def launch_options(constants: dict, weights_per_thread: int = 16) -> dict:
    warps = constants["BLOCK_GROUPS"] * constants["BLOCK_SIZE"] // (32 * weights_per_thread)
    # A fused multiply-add rounds once where the recipes round twice, and moves weights across thresholds.
    return {"num_warps": min(max(warps, 4), 16), "enable_fp_fusion": False}


@triton.jit
def tile_offsets(n, GROUP_SIZE: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """(group numbers [BLOCK_GROUPS, 1], offsets of their weights and mask [BLOCK_GROUPS, BLOCK_SIZE])."""
    group = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)[:, None]
    column = tl.arange(0, BLOCK_SIZE)[None, :]
    offsets = group * GROUP_SIZE + column
    return group, offsets, (column < GROUP_SIZE) & (offsets < n)


@triton.jit
def abs_bits(x):
    """|x| as an integer of the same order, where NaN is above infinity: a maximum over it loses no NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def tile_fit(x, mask, short, dtype, KIND: tl.constexpr, DIVISOR: tl.constexpr, ZERO_SCALE: tl.constexpr):
    """(scale or step, minimum), each [groups, 1]; masked lanes of x hold 0."""
    top = tl.max(abs_bits(x), axis=1, keep_dims=True)
    absmax = top.to(tl.float32, bitcast=True)
    if KIND == "codebook":
        scale = tl.where(short & (absmax < 1e-38), 1e-38, absmax)
        low = tl.zeros_like(scale)
    elif KIND == "symmetric":
        scale = tl.div_rn(absmax, tl.full(absmax.shape, DIVISOR, tl.float32)).to(dtype).to(tl.float32)
        scale = tl.where(scale == 0, ZERO_SCALE, scale)
        low = tl.zeros_like(scale)
    else:
        low = tl.min(tl.where(mask, x, float("inf")), axis=1, keep_dims=True)
        high = tl.max(tl.where(mask, x, float("-inf")), axis=1, keep_dims=True)
        low = tl.where(absmax == absmax, low, absmax)
        scale = (high - low) * 0.0625
    return scale, low


@triton.jit
def tile_position(x, scale, low, short, dtype, KIND: tl.constexpr, HAS_SHORT: tl.constexpr):
    if KIND == "codebook":
        absmax = tl.where(scale < 1e-38, 1e-38, scale)
        pos = x * tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), absmax)
        if HAS_SHORT:
            pos = tl.where(short, tl.div_rn(x, tl.broadcast_to(absmax, x.shape)), pos)
    elif KIND == "symmetric":
        pos = tl.div_rn(x, tl.broadcast_to(scale, x.shape)).to(dtype).to(tl.float32)
    else:
        pos = tl.div_rn(x - low, tl.broadcast_to(scale, x.shape))
    return pos


@triton.jit
def _look_up(pos, THRESHOLDS: tl.constexpr, TABLE: tl.constexpr, dtype: tl.constexpr):
    """TABLE by the number of thresholds below pos; NaN is above all, as torch.bucketize has it."""
    entry = tl.full(pos.shape, TABLE[0], dtype)
    for i in tl.static_range(len(THRESHOLDS)):
        entry = tl.where(pos <= THRESHOLDS[i], entry, tl.full(pos.shape, TABLE[i + 1], dtype))
    return entry


@triton.jit
def _uniform_rank(pos, KIND: tl.constexpr):
    """The bucket of a uniform recipe as fp32, 0 to 15."""
    if KIND == "symmetric":
        q = tl.minimum(tl.maximum(tl.where(pos == pos, pos, 0.0), -8.0), 7.0)
        # Adding 1.5 * 2^23 leaves no bits below 1, rounded half to even; Triton has no portable rint.
        rank = (q + 12582912.0) - 12582912.0 + 8.0
    else:
        rank = tl.minimum(tl.maximum(tl.floor(tl.where(pos == pos, pos, 0.0)), 0.0), 15.0)
    return rank


@triton.jit
def tile_entry(pos, KIND: tl.constexpr, THRESHOLDS: tl.constexpr, TABLE: tl.constexpr):
    """The int32 that TABLE gives by rank; in a uniform recipe that is the rank itself."""
    if KIND == "codebook":
        number = _look_up(pos, THRESHOLDS, TABLE, tl.int32)
    else:
        number = _uniform_rank(pos, KIND).to(tl.int32)
    return number


@triton.jit
def tile_value(pos, scale, low, KIND: tl.constexpr, THRESHOLDS: tl.constexpr, LEVELS: tl.constexpr):
    """What the weight dequantizes to, in fp32 and not yet rounded to the model's dtype."""
    if KIND == "codebook":
        level = _look_up(pos, THRESHOLDS, LEVELS, tl.float32)
    elif KIND == "symmetric":
        level = _uniform_rank(pos, KIND) - 8.0
    else:
        level = _uniform_rank(pos, KIND) + 0.5
    return low + level * scale if KIND == "minmax" else level * scale


@triton.jit
def tile_step(pos, scale, KIND: tl.constexpr, THRESHOLDS: tl.constexpr, WIDTHS: tl.constexpr):
    """The width of the bucket that the weight lies in."""
    if KIND == "codebook":
        width = _look_up(pos, THRESHOLDS, WIDTHS, tl.float32) * scale
    else:
        width = tl.broadcast_to(scale, pos.shape)
    return width
