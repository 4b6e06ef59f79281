"""The Triton side of the recipes: device functions over a tile [parts, groups, part_size] of fp32 weights.

A group lies in parts of the tile, so that a thread, which holds neighbours in chunks of 128 bits, has all of its chunks
from one group and reckons with the parameters of one: parts are what is left in its registers.

A weight's ``position`` is what code, bucket, value and step are all read off, and the compiler drops what a kernel
does not store: in a codebook the weight on its group's own scale, of E2M1 its level, in a uniform recipe the level
above the zero point, a whole number plus 1.5 * 2^23 (``shifted``). A group's parameters are two numbers, ``scale`` and
``aux`` (the minimum, the zero point, or 0 where the rule has only a scale). Each function sends a tile to the
rule of its KIND, which stands beside the reference of that rule.

THRESHOLDS are what a position is looked up among; there are none, (), where buckets are uniform, and None
stands for a position that is an E2M1 number already.
"""

import math

import torch

from .._triton import largest, shifted, tl, triton, unshifted
from .base import Format
from .codebook import (
    codebook_bucket,
    codebook_entry,
    codebook_fit,
    codebook_inverse,
    codebook_inverse_width,
    codebook_level,
    codebook_level_of_code,
    codebook_position,
    codebook_rank,
    codebook_unit,
)
from .gguf import gguf_position, q4_0_fit, q4_1_fit, through_fp16
from .integer import (
    is_far,
    minmax_fit,
    minmax_position,
    near_reciprocal,
    symmetric_fit,
    symmetric_position,
    zero_point_fit,
    zero_point_position,
    zero_point_value,
)
from .microscaling import (
    e2m1_code,
    e2m1_inverse_width,
    e2m1_level,
    e2m1_place,
    mx_fit,
    mx_inverse,
    mx_position,
    mx_unit,
    nvfp4_fit,
    nvfp4_inverse,
    nvfp4_position,
)

_CONTIGUOUS = (None, None, None, None, None)


def strided(w: torch.Tensor) -> tuple[torch.Tensor, tuple[int | None, ...]]:
    """w, and (stride_0, stride_1, stride_2, size_1, size_2): its elements in flattened order as those of three
    dimensions at most, which ``tile_addresses`` is given. A leading dimension that there is not is None; all are
    None where w is contiguous.

    Weights of more than three dimensions that do not merge are copied: no slice, transpose or split of a matrix
    is among them, and no convolution in channels_last.
    """
    if w.is_contiguous():
        return w, _CONTIGUOUS
    sizes, strides = [], []
    for size, stride in zip(w.shape, w.stride(), strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 3:
        return w.contiguous(), _CONTIGUOUS
    absent = [None] * (3 - len(sizes))
    return w, (*absent, *strides, *[None, None, *sizes[1:]][-2:])


def tile_constants(
    recipe: Format, n: int, tile: int, *layouts: tuple[int | None, ...], parts: int = 1, chunk: int = 8
) -> dict:
    """How a kernel covers n weights: BLOCK_GROUPS groups of GROUP_SIZE weights, padded to BLOCK_SIZE, a
    program, each in BLOCK_PARTS: at most ``parts``, of ``chunk`` weights or more.

    ``tile`` is the number of weights that a program aims at. A whole-tensor group is walked in rows of
    ``tile``, or of what divides both that and the innermost dimension of the ``layouts`` that ``strided`` gave.
    """
    per_tensor = recipe.group_size is None
    innermost = math.gcd(*(layout[-1] or 0 for layout in layouts))
    size = math.gcd(tile, innermost) if per_tensor else recipe.group_size
    if per_tensor and size < 64:
        size = tile
    padded = 1 << (size - 1).bit_length()
    block_groups = max(tile // padded, 1)
    # All chunks of a thread are in one group anyway where a program has only one; its registers are then short.
    parts = min(parts, max(padded // chunk, 1)) if block_groups > 1 or per_tensor else 1
    return {
        "PER_TENSOR": per_tensor,
        "HAS_SHORT": n % size != 0,
        "FULL": padded == size and n % (size * block_groups) == 0,
        "IN_ROWS": innermost % size == 0,
        "GROUP_SIZE": size,
        "BLOCK_GROUPS": block_groups,
        "BLOCK_SIZE": padded,
        "BLOCK_PARTS": parts,
    }


def launch_options(constants: dict, weights_per_thread: int = 16, resident_warps: int | None = None) -> dict:
    """``resident_warps`` lets a thread have as many registers as leave room for so many warps. Without it ptxas makes a
    guess at the best number of warps, for which it may spill a register; AMD's compiler has no such option."""
    warps = constants["BLOCK_GROUPS"] * constants["BLOCK_SIZE"] // (32 * weights_per_thread)
    # A fused multiply-add rounds once where the recipes round twice, and moves weights across thresholds.
    options = {"num_warps": min(max(warps, 4), 16), "enable_fp_fusion": False}
    if resident_warps is not None and torch.version.hip is None:
        options["maxnreg"] = 65536 // (32 * max(options["num_warps"], resident_warps)) // 8 * 8
    return options


@triton.jit
def tile_groups(tile, BLOCK_GROUPS: tl.constexpr):
    """Group numbers [1, BLOCK_GROUPS, 1], int64."""
    return tile * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)[None, :, None]


@triton.jit
def tile_offsets(
    tile,
    n,
    FULL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """(group numbers, offsets of their weights, mask), one for each weight of the tile; int64. The first parts of all
    groups come first, then the second. ``in_parts`` makes the tile of what is loaded.

    Weights are loaded in one dimension, and so are tables (``entry_at``): a compiler picks the layout of a load by how
    it orders the dimensions, and Triton 3.6 orders those of a table's entries the other way round than those of weights
    and takes every one of them through shared memory.

    FULL: every tile is full of weights, and the compiler drops the mask.
    """
    PART: tl.constexpr = BLOCK_SIZE // BLOCK_PARTS
    lanes = tl.arange(0, BLOCK_GROUPS * BLOCK_SIZE)
    row = lanes // PART
    group = tile * BLOCK_GROUPS + row % BLOCK_GROUPS
    column = row // BLOCK_GROUPS * PART + lanes % PART
    offsets = group * GROUP_SIZE + column
    if FULL:
        mask = tl.full(offsets.shape, 1, tl.int1)
    else:
        mask = (column < GROUP_SIZE) & (offsets < n)
    return group, offsets, mask


@triton.jit
def in_parts(x, BLOCK_GROUPS: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    return x.reshape(BLOCK_PARTS, BLOCK_GROUPS, x.shape[0] // BLOCK_GROUPS // BLOCK_PARTS)


@triton.jit
def tile_mask(mask, FULL: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """The mask of ``tile_offsets`` in the shape of the tile."""
    if FULL:
        mask = tl.full((BLOCK_PARTS, BLOCK_GROUPS, mask.shape[0] // BLOCK_GROUPS // BLOCK_PARTS), 1, tl.int1)
    else:
        mask = in_parts(mask, BLOCK_GROUPS, BLOCK_PARTS)
    return mask


@triton.jit
def tile_addresses(
    group,
    offsets,
    stride_0,
    stride_1,
    stride_2,
    size_1,
    size_2,
    IN_ROWS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Where the elements ``offsets`` of the flattened tensor lie, from what ``strided`` gave; int64.

    IN_ROWS: no group leaves its row of ``size_2``. Then one division a group does, and the compiler sees that
    its weights are neighbours.
    """
    if stride_2 is None:
        addresses = offsets
    elif size_2 is None:
        addresses = offsets * stride_2
    else:
        if IN_ROWS:
            groups_in_row = size_2 // GROUP_SIZE
            row = group // groups_in_row
            column = group % groups_in_row * GROUP_SIZE
            PART: tl.constexpr = offsets.shape[0] // BLOCK_GROUPS // BLOCK_PARTS
            lanes = tl.arange(0, offsets.shape[0])
            column += lanes // (BLOCK_GROUPS * PART) * PART + lanes % PART
        else:
            row = offsets // size_2
            column = offsets % size_2
        if size_1 is None:
            row_start = row * stride_1
        else:
            row_start = row // size_1 * stride_0 + row % size_1 * stride_1
        addresses = row_start + column * stride_2
    return addresses


@triton.jit
def tile_fit(x, mask, short, of_tensor, dtype, KIND: tl.constexpr, RULE: tl.constexpr, HAS_SHORT: tl.constexpr):
    """(scale, aux, whether all weights are zero), each [1, groups, 1]; masked lanes of x hold 0."""
    if KIND == "zero_point" or KIND == "zero_point_fp16":
        scale, aux, is_zero = zero_point_fit(x, mask, dtype, RULE)
    elif KIND == "q4_1":
        scale, aux, is_zero = q4_1_fit(x, mask)
    elif KIND == "minmax":
        scale, aux, is_zero = minmax_fit(x, mask)
    else:
        absmax = largest(tl.abs(x))
        aux = tl.zeros_like(absmax)
        is_zero = absmax == 0
        if KIND == "codebook":
            scale = codebook_fit(absmax, short, HAS_SHORT)
        elif KIND == "symmetric":
            scale = symmetric_fit(absmax, dtype, RULE)
        elif KIND == "q4_0":
            scale = q4_0_fit(x, absmax)
        elif KIND == "mx_floor" or KIND == "mx_rceil" or KIND == "mx_gguf":
            scale = mx_fit(absmax, KIND)
        else:
            tl.static_assert(KIND == "nvfp4")
            scale, aux = nvfp4_fit(absmax, of_tensor)
    return scale, aux, is_zero


@triton.jit
def tile_position(
    x, scale, aux, short, dtype, KIND: tl.constexpr, RULE: tl.constexpr, HAS_SHORT: tl.constexpr, OWN: tl.constexpr
):
    """OWN: x is among the weights that the parameters were fitted to."""
    if KIND == "codebook":
        pos = codebook_position(x, scale, short, HAS_SHORT, OWN)
    elif KIND == "symmetric":
        pos = symmetric_position(x, scale, dtype, RULE, OWN)
    elif KIND == "zero_point" or KIND == "zero_point_fp16":
        pos = zero_point_position(x, scale, aux, dtype, RULE, OWN)
    elif KIND == "q4_0":
        pos = gguf_position(x, scale, 8.0, OWN)
    elif KIND == "q4_1":
        pos = gguf_position(x - aux, scale, 0.0, OWN)
    elif KIND == "mx_floor" or KIND == "mx_rceil" or KIND == "mx_gguf":
        pos = mx_position(x, scale, KIND, OWN)
    elif KIND == "nvfp4":
        pos = nvfp4_position(x, scale, aux, OWN)
    else:
        tl.static_assert(KIND == "minmax")
        pos = minmax_position(x, scale, aux, dtype, OWN)
    return pos


@triton.jit
def _uniform_rank(pos, aux, KIND: tl.constexpr, LEVELS: tl.constexpr):
    """The bucket of a uniform recipe, int32, 0 to 15; converting a number would take four times as long."""
    if KIND == "zero_point" or KIND == "zero_point_fp16":
        pos = pos + (aux - LEVELS[0])
    elif KIND == "symmetric" or KIND == "q4_0":
        pos = pos - LEVELS[0]
    return pos.to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def tile_entry(
    pos,
    aux,
    table_ptr,
    KIND: tl.constexpr,
    RULE: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    LEVELS: tl.constexpr,
    COLUMN: tl.constexpr,
):
    """The int32 that stands in that column by rank, where it is None the rank itself; in E2M1 the code."""
    if THRESHOLDS is None:
        number = e2m1_code(pos)
    elif len(THRESHOLDS):
        if COLUMN is None:
            number = codebook_rank(pos, table_ptr, RULE)
        else:
            number = codebook_entry(pos, table_ptr, RULE, COLUMN)
    else:
        number = _uniform_rank(pos, aux, KIND, LEVELS)
    return number


@triton.jit
def tile_bucket(
    pos,
    scale,
    aux,
    table_ptr,
    KIND: tl.constexpr,
    RULE: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    TWO_ZEROS: tl.constexpr,
):
    """The bucket's place on the number line, but for a number that all buckets have in common."""
    if THRESHOLDS is None:
        bucket = e2m1_place(pos)
    elif len(THRESHOLDS):
        bucket = codebook_bucket(codebook_rank(pos, table_ptr, RULE), TWO_ZEROS)
    else:
        bucket = pos.to(tl.int32, bitcast=True)
        if KIND == "q4_0":
            bucket = tl.where(scale < 0, 0x4B400000 - bucket, bucket - 0x4B400000)
        elif KIND == "zero_point" or KIND == "zero_point_fp16":
            bucket += shifted(aux).to(tl.int32, bitcast=True)
    return bucket


@triton.jit
def tile_level(code, table_ptr, KIND: tl.constexpr, LEVELS: tl.constexpr):
    """The level that an int32 code stands for, in fp32."""
    if KIND == "mx_floor" or KIND == "mx_rceil" or KIND == "mx_gguf" or KIND == "nvfp4":
        level = e2m1_level(code)
    elif KIND == "codebook":
        level = codebook_level_of_code(code, table_ptr)
    else:
        # 2^23 + code, by its bits: converting an integer takes four times as long.
        level = (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 - LEVELS[0])
    return level


@triton.jit
def tile_scaled(level, scale, aux, KIND: tl.constexpr):
    """What a level stands for in groups of these parameters, in fp32 and not yet rounded to the model's
    dtype."""
    if KIND == "zero_point" or KIND == "zero_point_fp16":
        value = zero_point_value(level - aux, scale, KIND == "zero_point_fp16")
    elif KIND == "minmax":
        value = aux + level * scale
    elif KIND == "q4_0":
        value = level * through_fp16(scale)
    elif KIND == "q4_1":
        value = level * through_fp16(scale) + through_fp16(aux)
    elif KIND == "nvfp4":
        value = level * (aux * scale)
    else:
        value = level * scale
    return value


@triton.jit
def tile_value(
    pos,
    scale,
    aux,
    table_ptr,
    KIND: tl.constexpr,
    RULE: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    LEVELS: tl.constexpr,
    BY_RANK: tl.constexpr = False,
):
    """What the weight dequantizes to, in fp32 and not yet rounded to the model's dtype.

    BY_RANK: the kernel needs the rank, too.
    """
    if THRESHOLDS is None:
        value = tile_scaled(pos, scale, aux, KIND)
    elif len(THRESHOLDS):
        value = tile_scaled(codebook_level(pos, table_ptr, RULE, BY_RANK), scale, aux, KIND)
    elif KIND == "zero_point" or KIND == "zero_point_fp16":
        value = zero_point_value(unshifted(pos), scale, KIND == "zero_point_fp16")
    else:
        # Of the buckets of minmax-int4 the centre is half a step above the edge that they are numbered by.
        value = tile_scaled(unshifted(pos) + LEVELS[0] if KIND == "minmax" else unshifted(pos), scale, aux, KIND)
    return value


@triton.jit
def tile_unit(scale, aux, dtype, KIND: tl.constexpr, RULE: tl.constexpr):
    """(``Format.unit``, a finite reciprocal, what that is the reciprocal of: not 0), each [1, groups, 1].

    The reciprocals are those that positions took: the compiler reckons them once.
    """
    least = tl.full(scale.shape, 0x200000, tl.int32).to(tl.float32, bitcast=True)  # 2^-128
    unit = scale
    if KIND == "codebook":
        least, inverse = codebook_unit(scale), codebook_inverse(scale)
    elif KIND == "q4_0" or KIND == "q4_1":
        unit = tl.abs(scale)
        inverse = tl.abs(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale))
    elif KIND == "nvfp4":
        unit = aux * scale
        inverse = nvfp4_inverse(scale, aux)
    elif KIND == "mx_floor" or KIND == "mx_rceil" or KIND == "mx_gguf":
        unit = mx_unit(scale, KIND)
        inverse = mx_inverse(unit)
    else:
        by, _, inverse = near_reciprocal(scale, is_far(dtype, RULE))
        inverse *= by
        if not is_far(dtype, RULE):  # 2^60 stands for the reciprocal of 0
            least = tl.full(scale.shape, 2.0**-60, tl.float32)
    return unit, tl.minimum(inverse, 3.4028234663852886e38), tl.maximum(unit, least)


@triton.jit
def tile_stretched(
    change,
    pos,
    table_ptr,
    KIND: tl.constexpr,
    RULE: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    INVERSE_WIDTHS: tl.constexpr,
):
    """``Format.stretched``: as if the bucket that the weight lies in were a unit wide."""
    if THRESHOLDS is None:
        change *= e2m1_inverse_width(pos, INVERSE_WIDTHS)
    elif len(THRESHOLDS):
        change *= codebook_inverse_width(codebook_rank(pos, table_ptr, RULE), table_ptr)
    return change
