"""What the ops do on the CPU: loops over a tensor that numba compiles, with the rules as loops over a row of them.

A row is some groups, one after the other, in fp32: scratch that stays in the L1 cache. Weights are loaded into it from
their bits, uint32 of fp32 and uint16 of bf16 and fp16, and everything is done with them there, in plain loops that LLVM
turns into vector instructions. Nothing is contracted or reordered, so that every bit is that of the PyTorch reference,
but in functions that are ``unordered``.

A rule, by its KIND in ``KINDS``, is a branch of four functions, with ``scale`` and ``aux`` its parameters by group:

``_put_params``  from the weights; ``short`` says that the row is the one short group at the tensor's end
``_put_ranks``   0 to 15, uint32, from weights and parameters; ``position`` is scratch
``_put_values``  what a rank dequantizes to, rounded to the model's dtype
``_unit``        what a width of 1 is, and its reciprocal, for one group

How a loop is written decides its speed: a sum of integers of 32 bits is one of 64 to numba, unless it is cast at
once; an index that may be negative costs a select, so tables are indexed by uint32; and sixteen entries are told apart
fastest by fifteen comparisons in one expression. What is compiled is kept on disk for as long as this file does not
change: that is why all of it is in one file.
"""

import math
from typing import NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

KINDS = (
    *("codebook", "symmetric", "zero_point", "zero_point_fp16", "minmax"),
    *("q4_0", "q4_1", "mx_floor", "mx_rceil", "mx_gguf"),
)
CODEBOOK, SYMMETRIC, ZERO_POINT, ZERO_POINT_FP16, MINMAX, Q4_0, Q4_1, MX_FLOOR, MX_RCEIL, MX_GGUF = range(len(KINDS))
PER_LOGIT, L2, LINF, LABEL = range(4)  # in the order of margin_hinge.NORMS
FP32, BF16, FP16 = 0, 1, 2
MODES = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}

_ROW = 1024  # Long enough for what a call costs, short enough for ten rows in the cache.
_SMALLEST, _SMALLEST_ABSMAX = np.float32(2.0**-149), np.float32(1e-38)
_SMALLEST_NORMAL, _SMALLEST_POWER = np.float32(2.0**-126), np.float32(2.0**-127)
_INFINITY, _NAN = np.float32(np.inf), np.float32(np.nan)
_LARGEST = np.float32(np.finfo(np.float32).max)
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_MAGNITUDE = np.uint32(0x7FFFFFFF)


def _jit(**options):
    # numpy's error model: a division by zero gives infinity or NaN, and is no branch.
    options |= {"nogil": True, "error_model": "numpy"}

    def compiled(function):
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # there is no folder to keep it in
            return numba.njit(**options)(function)

    return compiled


_compiled = _jit()
_unordered = _jit(fastmath={"reassoc"})


class Recipe(NamedTuple):
    """A recipe's numbers for one dtype of weights: fp32 arrays, ``buckets``, ``codes`` and ``ranks`` uint32.

    ``kind``: the place in ``KINDS``. ``mode``: of the dtype, in ``MODES``. ``size``: of a group. ``rule``: as
    ``Format.kernel_rule`` gives it. By rank: ``levels``, ``inverse_widths``, ``buckets``, ``codes``; by
    code its rank. ``is_uniform``: all widths are 1. ``is_plain``: buckets are ranks.
    """

    kind: int
    mode: int
    size: int
    rule: np.ndarray
    thresholds: np.ndarray
    levels: np.ndarray
    inverse_widths: np.ndarray
    buckets: np.ndarray
    codes: np.ndarray
    ranks: np.ndarray
    pad_code: int
    is_uniform: bool
    is_plain: bool


class Found(NamedTuple):
    """What ``compare`` adds to: int64 but for ``sums``, fp64, and ``largest``, the fp32 bits of the largest |dw|.

    ``counts``: on the grid, groups of zeros, below half a step, unchanged. ``same_value`` [2], ``distances`` [2, 16]:
    on own grids, and on that of the weights before. ``sizes``: |dw| in steps by half octaves, from ``first_size`` on.
    ``sums``: |dw|, the flip law, dw^2, dq^2, dw dq. ``group_same``: how many are in the same bucket, by group. Either
    of ``sizes`` and ``group_same`` may be empty; without sizes there are no sums of delivery.
    """

    counts: np.ndarray
    same_value: np.ndarray
    distances: np.ndarray
    sizes: np.ndarray
    first_size: int
    sums: np.ndarray
    largest: np.ndarray
    group_same: np.ndarray


@intrinsic
def _float_of(typing_context, bits):
    """The fp32 number of 32 bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _bits_of(typing_context, x):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _half_of(typing_context, x):
    """The bits of fp32 x rounded to fp16."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _from_half(typing_context, bits):
    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@_compiled
def _brain_bits(x):
    """fp32 x rounded half to even to bf16, as its upper 16 bits; NaN stays one."""
    bits = _bits_of(x)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded if x == x else np.uint32(0x7FC0)


@_compiled
def _rounded(x, mode):
    """fp32 x rounded to the dtype of ``mode``."""
    if mode == BF16:
        x = _float_of(_brain_bits(x) << np.uint32(16))
    elif mode == FP16:
        x = _from_half(_half_of(x))
    return x


@_compiled
def _round_row(x, mode):
    if mode == BF16:
        for i in range(len(x)):
            x[i] = _float_of(_brain_bits(x[i]) << np.uint32(16))
    elif mode == FP16:
        for i in range(len(x)):
            x[i] = _from_half(_half_of(x[i]))


@_compiled
def _load_row(bits, mode, x):
    """Weights as fp32: of fp32 weights ``bits`` is uint32, of others uint16."""
    if mode == FP32:
        for i in range(len(x)):
            x[i] = _float_of(np.uint32(bits[i]))
    elif mode == BF16:
        for i in range(len(x)):
            x[i] = _float_of(np.uint32(bits[i]) << np.uint32(16))
    else:
        for i in range(len(x)):
            x[i] = _from_half(np.uint16(bits[i]))


@_compiled
def _store_row(x, mode, bits):
    """The reverse, of numbers that are in the dtype of ``mode``."""
    if mode == FP32:
        for i in range(len(x)):
            bits[i] = _bits_of(x[i])
    elif mode == BF16:
        for i in range(len(x)):
            bits[i] = _bits_of(x[i]) >> np.uint32(16)
    else:
        for i in range(len(x)):
            bits[i] = _half_of(x[i])


@_compiled
def _groups_of(x, groups):
    """[groups, size] of a row: a loop from 0 over its last dimension has no index that may be negative."""
    return x.reshape(groups, len(x) // groups)


@_compiled
def _scale_groups(x, scale):
    by_group = _groups_of(x, len(scale))
    for group in range(len(scale)):
        by = scale[group]
        for i in range(by_group.shape[1]):
            by_group[group, i] *= by


@_compiled
def _divide_groups(x, scale, out):
    by_group, quotients = _groups_of(x, len(scale)), _groups_of(out, len(scale))
    for group in range(len(scale)):
        by = scale[group]
        for i in range(by_group.shape[1]):
            quotients[group, i] = by_group[group, i] / by


@_compiled
def _put_absmax(x, out):
    """The largest magnitude of each group, NaN where one is: the order of magnitudes is that of their bits."""
    by_group = _groups_of(x, len(out))
    for group in range(len(out)):
        largest = np.uint32(0)
        for i in range(by_group.shape[1]):
            largest = max(largest, _bits_of(by_group[group, i]) & _MAGNITUDE)
        out[group] = _float_of(largest)


@_compiled
def _look_up(table, index, out):
    for i in range(len(index)):
        out[i] = table[index[i]]


@_compiled
def _scale_by_entries(table, index, x):
    for i in range(len(index)):
        x[i] *= table[index[i]]


@_compiled
def _above(position, threshold):
    """1 for NaN, too."""
    return _ZERO if position <= threshold else _ONE


@_compiled
def _rank_among(position, t, out):
    a, b, c, d, e, f, g = t[0], t[1], t[2], t[3], t[4], t[5], t[6]
    h, j, k, m, n, o, p, q = t[7], t[8], t[9], t[10], t[11], t[12], t[13], t[14]
    for i in range(len(position)):
        x = position[i]
        below = _above(x, a) + _above(x, b) + _above(x, c) + _above(x, d) + _above(x, e) + _above(x, f) + _above(x, g)
        above = _above(x, j) + _above(x, k) + _above(x, m) + _above(x, n) + _above(x, o) + _above(x, p) + _above(x, q)
        out[i] = np.uint32(np.int32(below + _above(x, h) + above))


@_compiled
def _not_below(scale, smallest):
    """The larger one; NaN stays."""
    return smallest if scale < smallest else scale


@_compiled
def _codebook_fit(x, short, scale):
    _put_absmax(x, scale)
    if short:
        scale[0] = _not_below(scale[0], _SMALLEST_ABSMAX)


@_compiled
def _codebook_rank(x, scale, short, thresholds, position, out):
    if short:
        _divide_groups(x, np.maximum(scale, _SMALLEST_ABSMAX), position)
    else:
        position[:] = x
        _scale_groups(position, _ONE / np.maximum(scale, _SMALLEST_ABSMAX))
    _rank_among(position, thresholds, out)


@_compiled
def _level_value(rank, scale, levels, mode, out):
    _look_up(levels, rank, out)
    _scale_groups(out, scale)
    _round_row(out, mode)


@_compiled
def _symmetric_fit(x, rule, mode, scale):
    """rule: the divisor, the smallest absmax, what a scale of 0 becomes, whether the arithmetic is in fp32."""
    divisor, smallest, guard = rule[0], rule[1], rule[2]
    _put_absmax(x, scale)
    for group in range(len(scale)):
        scale[group] = _not_below(scale[group], smallest) / divisor
    _round_row(scale, FP32 if rule[3] else mode)
    for group in range(len(scale)):
        scale[group] = guard if scale[group] == _ZERO else scale[group]


@_compiled
def _put_symmetric_numbers(x, scale, rule, mode, out):
    """The integers from -8 to 7, as fp32."""
    _divide_groups(x, scale, out)
    _round_row(out, FP32 if rule[3] else mode)
    for i in range(len(out)):
        q = np.rint(min(max(out[i], np.float32(-8)), np.float32(7)))
        out[i] = q + _ZERO if out[i] == out[i] else _ZERO  # the sum makes 0 of -0


@_compiled
def _symmetric_rank(x, scale, rule, mode, position, out):
    _put_symmetric_numbers(x, scale, rule, mode, position)
    for i in range(len(out)):
        out[i] = np.uint32(np.int32(position[i] + np.float32(8)))


@_compiled
def _symmetric_value(rank, scale, mode, out):
    _put_numbers(rank, np.float32(-8), out)
    _scale_groups(out, scale)
    _round_row(out, mode)


@_compiled
def _put_range(x, low, high):
    """The smallest and the largest of each group, NaN where one is; a zero of either sign."""
    by_group = _groups_of(x, len(low))
    for group in range(len(low)):
        smallest, largest, nans = by_group[group, 0], by_group[group, 0], np.int32(0)
        for i in range(by_group.shape[1]):
            number = by_group[group, i]
            smallest = number if number < smallest else smallest
            largest = number if number > largest else largest
            nans = np.int32(nans + np.int32(number != number))
        low[group], high[group] = (_NAN, _NAN) if nans else (smallest, largest)


@_compiled
def _subtract_of_groups(x, numbers, out):
    by_group, differences = _groups_of(x, len(numbers)), _groups_of(out, len(numbers))
    for group in range(len(numbers)):
        number = numbers[group]
        for i in range(by_group.shape[1]):
            differences[group, i] = by_group[group, i] - number


@_compiled
def _add_to_groups(x, numbers):
    by_group = _groups_of(x, len(numbers))
    for group in range(len(numbers)):
        number = numbers[group]
        for i in range(by_group.shape[1]):
            by_group[group, i] += number


@_compiled
def _put_rounded(position, most, out):
    """Positions as ranks from 0 to ``most``, towards zero; NaN is 0."""
    for i in range(len(position)):
        within = min(max(position[i], _ZERO), most)
        out[i] = np.uint32(np.int32(within if position[i] == position[i] else _ZERO))


@_compiled
def _put_numbers(rank, lowest, out):
    for i in range(len(rank)):
        out[i] = np.float32(np.int32(rank[i])) + lowest


@_compiled
def _zero_point_fit(x, rule, mode, like_gptq, scale, zero_point):
    """rule: the lowest integer, the smallest range, what a scale of 0 becomes, whether the range reaches to 0."""
    lowest, mode = rule[0], FP32 if like_gptq else mode
    _put_range(x, scale, zero_point)
    for group in range(len(scale)):
        low, high = scale[group], zero_point[group]
        if rule[3]:
            low, high = (_ZERO if low > _ZERO else low), _not_below(high, _ZERO)
        if like_gptq and low == high:
            low, high = -_ONE, _ONE
        extent = _not_below(_rounded(high - low, mode), rule[1])
        fitted = _rounded(extent / np.float32(15), mode)
        if like_gptq and fitted == _ZERO:
            fitted = rule[2]
        at = _rounded(lowest - _rounded(low / fitted, mode), mode)
        at = np.rint(min(max(at, lowest), lowest + np.float32(15))) if at == at else _ZERO
        scale[group], zero_point[group] = (rule[2] if fitted == _ZERO else fitted), at + _ZERO


@_compiled
def _zero_point_rank(x, scale, zero_point, rule, mode, like_gptq, position, out):
    lowest, mode = rule[0], FP32 if like_gptq else mode
    _divide_groups(x, scale, position)
    _round_row(position, mode)
    for i in range(len(position)):
        position[i] = position[i] if position[i] == position[i] else _ZERO
    if rule[4]:  # the zero point is added before rounding
        _add_to_groups(position, zero_point)
        _round_row(position, mode)
    else:
        np.rint(position, position)
        _add_to_groups(position, zero_point)
    for i in range(len(position)):
        q = np.rint(min(max(position[i], lowest), lowest + np.float32(15)))
        out[i] = np.uint32(np.int32(q - lowest))


@_compiled
def _zero_point_value(rank, scale, zero_point, rule, mode, like_gptq, out):
    _put_numbers(rank, rule[0], out)
    _subtract_of_groups(out, zero_point, out)
    if like_gptq:
        stored = scale.copy()
        _round_row(stored, FP16)
        _scale_groups(out, stored)
        _round_row(out, FP16)
    else:
        _scale_groups(out, scale)
    _round_row(out, mode)


@_compiled
def _minmax_fit(x, step, low):
    _put_range(x, low, step)
    for group in range(len(step)):
        bottom, top = low[group] + _ZERO, step[group] + _ZERO
        step[group], low[group] = (top - bottom) / np.float32(16), bottom


@_compiled
def _minmax_rank(x, step, low, position, out):
    _subtract_of_groups(x, low, position)
    _divide_groups(position, step, position)
    np.floor(position, position)
    _put_rounded(position, np.float32(15), out)


@_compiled
def _minmax_value(rank, step, low, mode, out):
    _put_numbers(rank, _HALF, out)
    _scale_groups(out, step)
    _add_to_groups(out, low)
    _round_row(out, mode)


@_compiled
def _reciprocals(d):
    out = np.empty_like(d)
    for group in range(len(d)):
        out[group] = _ZERO if d[group] == _ZERO else _ONE / d[group]
    return out


@_compiled
def _put_rounded_half_up(position, zero, out):
    for i in range(len(position)):
        position[i] += zero + _HALF
        # What overflows gets code 0.
        position[i] = position[i] if position[i] < _INFINITY else _ZERO
    _put_rounded(position, np.float32(15), out)


@_compiled
def _q4_0_fit(x, d):
    _put_absmax(x, d)
    by_group = _groups_of(x, len(d))
    for group in range(len(d)):
        i = 0
        while abs(by_group[group, i]) < d[group]:  # the first of them; NaN is not below
            i += 1
        if d[group] != d[group]:
            by_sign = d[group]
        else:
            by_sign = by_group[group, i]
        d[group] = by_sign * np.float32(-0.125)


@_compiled
def _q4_0_rank(x, d, position, out):
    position[:] = x
    _scale_groups(position, _reciprocals(d))
    _put_rounded_half_up(position, np.float32(8), out)


@_compiled
def _q4_0_value(rank, d, mode, out):
    stored = d.copy()
    _round_row(stored, FP16)
    _put_numbers(rank, np.float32(-8), out)
    _scale_groups(out, stored)
    _round_row(out, mode)


@_compiled
def _put_q4_0_places(rank, d, place):
    """Where d is negative, codes run the other way."""
    ranks, places = _groups_of(rank, len(d)), _groups_of(place, len(d))
    for group in range(len(d)):
        mirrored = d[group] < _ZERO
        for i in range(ranks.shape[1]):
            places[group, i] = np.uint32(np.uint32(16) - ranks[group, i]) if mirrored else ranks[group, i]


@_compiled
def _q4_1_fit(x, d, low):
    _put_range(x, low, d)
    for group in range(len(d)):
        bottom = _ZERO if low[group] == _ZERO else low[group]
        top = _ZERO if d[group] == _ZERO else d[group]
        d[group], low[group] = (top - bottom) / np.float32(15), bottom


@_compiled
def _q4_1_rank(x, d, low, position, out):
    _subtract_of_groups(x, low, position)
    _scale_groups(position, _reciprocals(d))
    _put_rounded_half_up(position, _ZERO, out)


@_compiled
def _q4_1_value(rank, d, low, mode, out):
    d, low = d.copy(), low.copy()
    _round_row(d, FP16)
    _round_row(low, FP16)
    _put_numbers(rank, _ZERO, out)
    _scale_groups(out, d)
    _add_to_groups(out, low)
    _round_row(out, mode)


@_compiled
def _mx_fit(x, rceil, scale):
    _put_absmax(x, scale)
    for group in range(len(scale)):
        absmax = scale[group]
        if rceil:
            bits = np.int64(_bits_of(absmax / np.float32(6)))
            exponent = 0 if bits <= 0x400000 else min((bits + 0x7FFFFF) >> 23, 254)
        else:
            exponent = max((np.int64(_bits_of(absmax)) >> 23) - 2, 0)
        power = _float_of(np.uint32(exponent << 23 if exponent > 0 else 0x400000))
        scale[group] = power if absmax == absmax else absmax


@_compiled
def _mx_unit(scale, kind):
    if kind == MX_FLOOR:
        return _not_below(scale, _SMALLEST_NORMAL)
    return _ONE if kind == MX_RCEIL and scale == _SMALLEST_POWER else scale


@_compiled
def _mx_rank(x, scale, kind, thresholds, position, out):
    units = np.empty_like(scale)
    for group in range(len(scale)):
        units[group] = _mx_unit(scale[group], kind)
    _divide_groups(x, units, position)
    if kind == MX_GGUF:
        for i in range(len(position)):
            position[i] = _ZERO if abs(position[i]) <= np.float32(0.25) else position[i]
    else:
        # Away from zero, so that -0 is below it: no other position is so near a threshold that it notices.
        for i in range(len(position)):
            position[i] += math.copysign(np.float32(1e-30), position[i])
    _rank_among(position, thresholds, out)


@_compiled
def _with_inverse(unit):
    inverse = _ONE / unit
    return unit, (_LARGEST if inverse > _LARGEST else inverse)


@_compiled
def _put_params(x, short, recipe, scale, aux):
    kind = recipe.kind
    if kind == CODEBOOK:
        _codebook_fit(x, short, scale)
    elif kind == SYMMETRIC:
        _symmetric_fit(x, recipe.rule, recipe.mode, scale)
    elif kind == ZERO_POINT or kind == ZERO_POINT_FP16:
        _zero_point_fit(x, recipe.rule, recipe.mode, kind == ZERO_POINT_FP16, scale, aux)
    elif kind == MINMAX:
        _minmax_fit(x, scale, aux)
    elif kind == Q4_0:
        _q4_0_fit(x, scale)
    elif kind == Q4_1:
        _q4_1_fit(x, scale, aux)
    else:
        _mx_fit(x, kind == MX_RCEIL, scale)


@_compiled
def _put_ranks(x, scale, aux, short, recipe, position, out):
    kind = recipe.kind
    if kind == CODEBOOK:
        _codebook_rank(x, scale, short, recipe.thresholds, position, out)
    elif kind == SYMMETRIC:
        _symmetric_rank(x, scale, recipe.rule, recipe.mode, position, out)
    elif kind == ZERO_POINT or kind == ZERO_POINT_FP16:
        _zero_point_rank(x, scale, aux, recipe.rule, recipe.mode, kind == ZERO_POINT_FP16, position, out)
    elif kind == MINMAX:
        _minmax_rank(x, scale, aux, position, out)
    elif kind == Q4_0:
        _q4_0_rank(x, scale, position, out)
    elif kind == Q4_1:
        _q4_1_rank(x, scale, aux, position, out)
    else:
        _mx_rank(x, scale, kind, recipe.thresholds, position, out)


@_compiled
def _put_values(rank, scale, aux, recipe, out):
    kind, mode = recipe.kind, recipe.mode
    if kind == SYMMETRIC:
        _symmetric_value(rank, scale, mode, out)
    elif kind == ZERO_POINT or kind == ZERO_POINT_FP16:
        _zero_point_value(rank, scale, aux, recipe.rule, mode, kind == ZERO_POINT_FP16, out)
    elif kind == MINMAX:
        _minmax_value(rank, scale, aux, mode, out)
    elif kind == Q4_0:
        _q4_0_value(rank, scale, mode, out)
    elif kind == Q4_1:
        _q4_1_value(rank, scale, aux, mode, out)
    else:
        _level_value(rank, scale, recipe.levels, mode, out)


@_compiled
def _put_nearest(x, scale, aux, short, recipe, position, rank, out):
    """The value of each weight's rank."""
    if recipe.kind == SYMMETRIC:  # not by way of its rank, which would be two conversions more
        _put_symmetric_numbers(x, scale, recipe.rule, recipe.mode, out)
        _scale_groups(out, scale)
        _round_row(out, recipe.mode)
    else:
        _put_ranks(x, scale, aux, short, recipe, position, rank)
        _put_values(rank, scale, aux, recipe, out)


@_compiled
def _unit(scale, recipe):
    kind = recipe.kind
    if kind == Q4_0:
        return _with_inverse(abs(scale))
    if kind == MX_FLOOR or kind == MX_RCEIL or kind == MX_GGUF:
        return _with_inverse(_mx_unit(scale, kind))
    return _with_inverse(scale)


@_compiled
def _differences(x, y, dw):
    """The bits of the largest |dw|, how many are 0, and how many weights are 0 in both."""
    largest, unchanged, zeros = np.uint32(0), np.int32(0), np.int32(0)
    for i in range(len(x)):
        dw[i] = y[i] - x[i]
        largest = max(largest, _bits_of(dw[i]) & _MAGNITUDE)
        unchanged = np.int32(unchanged + np.int32(dw[i] == _ZERO))
        zeros = np.int32(zeros + np.int32((x[i] == _ZERO) & (y[i] == _ZERO)))
    return largest, unchanged, zeros


@_compiled
def _count_zero_groups(x, y, size):
    """How many groups are 0 throughout in both."""
    count = 0
    for start in range(0, len(x), size):
        n = min(size, len(x) - start)
        zeros = 0
        while zeros < n and x[start + zeros] == _ZERO and y[start + zeros] == _ZERO:
            zeros += 1
        count += zeros == n
    return count


@_compiled
def _count_equal(a, b):
    count = np.int32(0)
    for i in range(len(a)):
        count = np.int32(count + np.int32(a[i] == b[i]))
    return count


@_compiled
def _put_places(rank, scale, recipe, place):
    """By rank the place of its bucket on the number line; ``place`` is ``rank`` where they are the same."""
    if recipe.kind == Q4_0:
        _put_q4_0_places(rank, scale, place)
    elif not recipe.is_plain:
        _look_up(recipe.buckets, rank, place)


@_compiled
def _count_far_distances(a, b, counts):
    for i in range(len(a)):
        counts[np.uint32(min(abs(np.int32(a[i]) - np.int32(b[i])), 15))] += 1


@_compiled
def _count_distances(a, b, counts):
    """Adds to counts[k] how many places are k apart, 15 and more as 15."""
    same, near = np.int32(0), np.int32(0)
    for i in range(len(a)):
        same = np.int32(same + np.int32(a[i] == b[i]))
        near = np.int32(near + np.int32(np.uint32(a[i] - b[i] + np.uint32(1)) <= np.uint32(2)))
    if near == len(a):  # so it is with most small updates
        counts[0] += same
        counts[1] += near - same
    else:
        _count_far_distances(a, b, counts)


@_compiled
def _count_same_by_group(a, b, size, counts):
    for group in range(len(counts)):
        for i in range(group * size, min(group * size + size, len(a))):
            counts[group] += a[i] == b[i]


@_compiled
def _count_below_half(stretched, unit):
    count = np.int32(0)
    by_group = _groups_of(stretched, len(unit))
    for group in range(len(unit)):
        # Above 0, so that no change is below it.
        half = unit[group] * _HALF if unit[group] * _HALF > _ZERO else _SMALLEST
        for i in range(by_group.shape[1]):
            count = np.int32(count + np.int32(by_group[group, i] < half))
    return count


@_compiled
def _put_steps(dw, rank, unit, inverse_unit, recipe, ratio):
    """|dw| in the widths of the buckets: 0 where dw is, whatever the width. How many are below half of one, or 0."""
    np.abs(dw, ratio)
    if not recipe.is_uniform:
        _scale_by_entries(recipe.inverse_widths, rank, ratio)
    below = _count_below_half(ratio, unit)
    _scale_groups(ratio, inverse_unit)
    for i in range(len(dw)):
        ratio[i] = _ZERO if dw[i] == _ZERO else abs(ratio[i])
    return below


@_compiled
def _count_sizes(ratio, first, places, sizes):
    """By half octaves: fp32 without its last 22 bits counts them. ``places`` is scratch."""
    last = len(sizes) - 1
    for i in range(len(ratio)):
        place = np.int32(np.int32(_bits_of(ratio[i]) >> np.uint32(22)) - np.int32(first))
        places[i] = np.uint32(min(max(place, np.int32(0)), np.int32(last)))
    # Four counters of each: the same one twice in a row would wait for itself.
    counts = np.zeros((4, len(sizes)), np.int32)
    for i in range(len(ratio) // 4):
        counts[0, places[4 * i]] += 1
        counts[1, places[4 * i + 1]] += 1
        counts[2, places[4 * i + 2]] += 1
        counts[3, places[4 * i + 3]] += 1
    for i in range(len(ratio) // 4 * 4, len(ratio)):
        counts[0, places[i]] += 1
    for place in range(len(sizes)):
        sizes[place] += counts[0, place] + counts[1, place] + counts[2, place] + counts[3, place]


@_unordered
def _sums_of_steps(dw, ratio):
    """Of |dw|, and of what share of its bucket each change is; in fp64."""
    size, flips = 0.0, 0.0
    for i in range(len(dw)):
        size += np.float64(abs(dw[i]))
        flips += np.float64(_ONE if ratio[i] > _ONE else ratio[i])
    return size, flips


@_unordered
def _sums_of_delivery(dw, value, y_value):
    """Of dw^2, dq^2 and dw dq; in fp64, which holds these squares exactly."""
    change, delivered, both = 0.0, 0.0, 0.0
    for i in range(len(dw)):
        d, q = np.float64(dw[i]), np.float64(y_value[i] - value[i])
        change += d * d
        delivered += q * q
        both += d * q
    return change, delivered, both


@_compiled
def _groups_of_a_row(size):
    return max(_ROW // size, 1)


@_compiled
def _next_row(start, n, size):
    """(where the next row ends, how many groups it has, whether it is the short one): a short group comes alone."""
    rest = n - start
    if rest < size:
        return n, 1, True
    groups = min(rest // size, _groups_of_a_row(size))
    return start + groups * size, groups, False


@_compiled
def _pack(codes, rank, packed):
    """Two codes a byte; an odd one at the end is left."""
    for i in range(len(rank) // 2):
        packed[i] = codes[rank[2 * i]] << np.uint32(4) | codes[rank[2 * i + 1]]


@_compiled
def _unpack(ranks, packed, out):
    for i in range(len(packed)):
        pair = np.uint32(packed[i])
        out[2 * i], out[2 * i + 1] = ranks[pair >> np.uint32(4)], ranks[pair & np.uint32(15)]


@_compiled
def fake_quant(bits, recipe, out):
    size, mode = recipe.size, recipe.mode
    most = _groups_of_a_row(size)
    floats, ranks = np.empty((3, most * size), np.float32), np.empty(most * size, np.uint32)
    params = np.empty((2, most), np.float32)
    start = 0
    while start < len(bits):
        stop, groups, short = _next_row(start, len(bits), size)
        x, position, value = floats[0, : stop - start], floats[1, : stop - start], floats[2, : stop - start]
        rank, scale, aux = ranks[: stop - start], params[0, :groups], params[1, :groups]
        _load_row(bits[start:stop], mode, x)
        _put_params(x, short, recipe, scale, aux)
        _put_nearest(x, scale, aux, short, recipe, position, rank, value)
        _store_row(value, mode, out[start:stop])
        start = stop


@_compiled
def quantize(bits, recipe, codes, params):
    """params: fp32 [groups, 2], scale and aux."""
    size, mode = recipe.size, recipe.mode
    most = _groups_of_a_row(size)
    floats, ranks = np.empty((2, most * size), np.float32), np.empty(most * size, np.uint32)
    of_row = np.empty((2, most), np.float32)
    start, group = 0, 0
    while start < len(bits):
        stop, groups, short = _next_row(start, len(bits), size)
        x, position, rank = floats[0, : stop - start], floats[1, : stop - start], ranks[: stop - start]
        scale, aux = of_row[0, :groups], of_row[1, :groups]
        _load_row(bits[start:stop], mode, x)
        _put_params(x, short, recipe, scale, aux)
        _put_ranks(x, scale, aux, short, recipe, position, rank)
        for i in range(groups):
            params[group + i, 0], params[group + i, 1] = scale[i], aux[i]
        packed = codes[start // 2 : (stop + 1) // 2]
        _pack(recipe.codes, rank, packed)
        if (stop - start) % 2:
            packed[-1] = recipe.codes[rank[-1]] << np.uint32(4) | np.uint32(recipe.pad_code)
        start, group = stop, group + groups


@_compiled
def dequantize(codes, params, recipe, out):
    size, mode = recipe.size, recipe.mode
    most = _groups_of_a_row(size)
    values, ranks = np.empty(most * size, np.float32), np.empty(most * size + 1, np.uint32)
    of_row = np.empty((2, most), np.float32)
    start, group = 0, 0
    while start < len(out):
        stop, groups, _ = _next_row(start, len(out), size)
        packed = codes[start // 2 : (stop + 1) // 2]
        _unpack(recipe.ranks, packed, ranks)
        rank, value = ranks[: stop - start], values[: stop - start]
        scale, aux = of_row[0, :groups], of_row[1, :groups]
        for i in range(groups):
            scale[i], aux[i] = params[group + i, 0], params[group + i, 1]
        _put_values(rank, scale, aux, recipe, value)
        _store_row(value, mode, out[start:stop])
        start, group = stop, group + groups


@_compiled
def compare(x_bits, y_bits, recipe, own, before_grid, found):
    """``own``, ``before_grid``: which comparisons are made; of both, ``group_same`` is that of the latter."""
    size, mode = recipe.size, recipe.mode
    most = _groups_of_a_row(size)
    floats, ranks = np.empty((7, most * size), np.float32), np.empty((5, most * size), np.uint32)
    params = np.empty((6, most), np.float32)
    start, group = 0, 0
    while start < len(x_bits):
        stop, groups, short = _next_row(start, len(x_bits), size)
        n = stop - start
        x, y, dw, position = floats[0, :n], floats[1, :n], floats[2, :n], floats[3, :n]
        value, y_value, ratio = floats[4, :n], floats[5, :n], floats[6, :n]
        rank, y_rank = ranks[0, :n], ranks[1, :n]
        place, y_place = (rank, y_rank) if recipe.is_plain else (ranks[2, :n], ranks[3, :n])
        scale, aux, y_scale, y_aux = params[0, :groups], params[1, :groups], params[2, :groups], params[3, :groups]
        unit, inverse_unit = params[4, :groups], params[5, :groups]
        _load_row(x_bits[start:stop], mode, x)
        _load_row(y_bits[start:stop], mode, y)
        largest, unchanged, zeros = _differences(x, y, dw)
        found.largest[0] = max(found.largest[0], largest)
        _put_params(x, short, recipe, scale, aux)
        _put_ranks(x, scale, aux, short, recipe, position, rank)
        _put_values(rank, scale, aux, recipe, value)
        _put_places(rank, scale, recipe, place)
        for i in range(groups):
            unit[i], inverse_unit[i] = _unit(scale[i], recipe)
        found.counts[0] += _count_equal(value, x)
        if zeros >= min(size, n):
            found.counts[1] += _count_zero_groups(x, y, size)
        found.counts[2] += _put_steps(dw, rank, unit, inverse_unit, recipe, ratio)
        found.counts[3] += unchanged
        changed, flips = _sums_of_steps(dw, ratio)
        found.sums[0] += changed
        found.sums[1] += flips
        if own:
            _put_params(y, short, recipe, y_scale, y_aux)
            _put_ranks(y, y_scale, y_aux, short, recipe, position, y_rank)
            _put_values(y_rank, y_scale, y_aux, recipe, y_value)
            _put_places(y_rank, y_scale, recipe, y_place)
            found.same_value[0] += _count_equal(value, y_value)
            _count_distances(place, y_place, found.distances[0])
        if len(found.sizes):
            _count_sizes(ratio, found.first_size, ranks[4, :n], found.sizes)
            change, delivered, both = _sums_of_delivery(dw, value, y_value)
            found.sums[2] += change
            found.sums[3] += delivered
            found.sums[4] += both
        if before_grid:
            is_same_grid = own
            if own:
                for i in range(groups):
                    is_same_grid &= (scale[i] == y_scale[i]) & (aux[i] == y_aux[i])
            if not is_same_grid:
                _put_ranks(y, scale, aux, short, recipe, position, y_rank)
                _put_values(y_rank, scale, aux, recipe, y_value)
                _put_places(y_rank, scale, recipe, y_place)
            found.same_value[1] += _count_equal(value, y_value)
            _count_distances(place, y_place, found.distances[1])
        if len(found.group_same):
            _count_same_by_group(place, y_place, size, found.group_same[group : group + groups])
        start, group = stop, group + groups


@_compiled
def _exp(x):
    """e^x in fp32, within 2 ulp of it; PyTorch's loops have such a one, and numba, without SVML, none that vectorizes.

    x = n ln 2 + r with |r| <= ln 2 / 2, where e^r is a polynomial (Taylor's, to the seventh power: what is left out is
    below 2e-9), and 2^n is put into the exponent in two halves, so that results may be subnormal.
    """
    within = min(max(x, np.float32(-104)), np.float32(89))
    n = np.rint(within * np.float32(1.4426950408889634))
    r = (within - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)  # ln 2 in two parts, Cody and Waite's
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + _HALF
    p = p * r + _ONE
    p = p * r + _ONE
    exponent = np.int32(n)
    half = np.int32(exponent >> np.int32(1))
    rest = np.int32(exponent - half)
    p *= _float_of(np.uint32(np.int32(half + np.int32(127))) << np.uint32(23))
    p *= _float_of(np.uint32(np.int32(rest + np.int32(127))) << np.uint32(23))
    return p if x == x else x


@_compiled
def _in_order(bits):
    """The bits of an fp32 number as an integer of the same order, and back: of integers a maximum vectorizes."""
    return np.int32(bits ^ np.int32((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@_compiled
def _range_of(x, low, high):
    """The range so far and of x together; what a NaN makes of it is the caller's to see."""
    least, most = _in_order(np.int32(_bits_of(low))), _in_order(np.int32(_bits_of(high)))
    for i in range(len(x)):
        key = _in_order(np.int32(_bits_of(x[i])))
        least = min(least, key)
        most = max(most, key)
    return _float_of(np.uint32(_in_order(least))), _float_of(np.uint32(_in_order(most)))


@_unordered
def _sum_of_exps(x, base):
    total = _ZERO
    for i in range(len(x)):
        total += _exp(x[i] - base)
    return np.float64(total)


@_compiled
def _log_sum_exp(row, mode, x):
    top, base, total = -_INFINITY, _ZERO, 0.0
    for start in range(0, len(row), len(x)):
        n = min(len(x), len(row) - start)
        _load_row(row[start : start + n], mode, x[:n])
        _, of_tile = _range_of(x[:n], _INFINITY, top)
        if of_tile > top:
            top = of_tile
            # An infinity is no base: what it makes is then infinite, or nothing.
            new_base = _ZERO if abs(top) == _INFINITY else top
            total *= np.exp(np.float64(base) - np.float64(new_base))
            base = new_base
        total += _sum_of_exps(x[:n], base)
    return np.float32(np.float64(base) + np.log(total))


@_compiled
def _sign_or_nan(d):
    return _ONE if d > _ZERO else (-_ONE if d < _ZERO else d)


@_compiled
def _load_differences(z_row, z_mode, ref_row, ref_mode, start, z, ref, e):
    """z - z_ref of as many logits as ``e`` has; z stays in ``z``."""
    _load_row(z_row[start : start + len(e)], z_mode, z)
    _load_row(ref_row[start : start + len(e)], ref_mode, ref)
    for i in range(len(e)):
        e[i] = z[i] - ref[i]


@_unordered
def _sums_per_logit(e, shift, margin):
    """(sum of hinges, of signs inside the margin, how many are inside)."""
    hinges, signs, count = _ZERO, _ZERO, _ZERO
    for i in range(len(e)):
        d = e[i] - shift
        outside = abs(d) >= margin  # NaN is not, and so gets through
        hinges += _ZERO if outside else margin - abs(d)
        signs += _ZERO if outside else _sign_or_nan(d)
        count += _ONE if abs(d) < margin else _ZERO
    return np.float64(hinges), np.float64(signs), np.int64(count)


@_unordered
def _sums_of_l2(e, shift):
    squares, total = 0.0, 0.0
    for i in range(len(e)):
        d = np.float64(e[i] - shift)
        squares += d * d
        total += d
    return squares, total


@_compiled
def hinge_forward(z_all, z_at, z_mode, ref_all, ref_at, ref_mode, vocab, labels, kept, options, hinge, active, stats):
    """logit_margin_hinge of rows, as ``_margin_hinge_fwd_torch`` has it.

    ``z_at`` is where each starts in ``z_all``; ``options`` are norm, by its place in NORMS, log_probs and margin.
    """
    norm, log_probs, margin = options
    z, ref, e = np.empty(_ROW, np.float32), np.empty(_ROW, np.float32), np.empty(_ROW, np.float32)
    for row in range(len(z_at)):
        hinge[row], active[row], stats[row, :] = _ZERO, 0, _ZERO
        if not kept[row]:
            continue
        z_row, ref_row = z_all[z_at[row] : z_at[row] + vocab], ref_all[ref_at[row] : ref_at[row] + vocab]
        lse, shift, above, below, slope = _ZERO, _ZERO, _INFINITY, -_INFINITY, _ZERO
        if log_probs:
            lse = _log_sum_exp(z_row, z_mode, z)
            shift = lse - _log_sum_exp(ref_row, ref_mode, ref)
        if norm == PER_LOGIT:
            hinges, signs, count = 0.0, 0.0, 0
            for start in range(0, vocab, _ROW):
                n = min(_ROW, vocab - start)
                _load_differences(z_row, z_mode, ref_row, ref_mode, start, z[:n], ref[:n], e[:n])
                h, s, c = _sums_per_logit(e[:n], shift, margin)
                hinges, signs, count = hinges + h, signs + s, count + c
            weight = np.float32(1 / vocab)
            h, slope = np.float32(hinges / vocab), -weight * np.float32(signs)
        elif norm == L2:
            squares, total = 0.0, 0.0
            for start in range(0, vocab, _ROW):
                n = min(_ROW, vocab - start)
                _load_differences(z_row, z_mode, ref_row, ref_mode, start, z[:n], ref[:n], e[:n])
                s, t = _sums_of_l2(e[:n], shift)
                squares, total = squares + s, total + t
            length = np.float32(np.sqrt(squares))
            h, count = (_ZERO if length >= margin else margin - length), np.int64(length < margin)
            weight = _ZERO if length >= margin or length == _ZERO else _ONE / length
            slope = -weight * np.float32(total)
        elif norm == LINF:
            bottom, top, nans = _INFINITY, -_INFINITY, 0
            for start in range(0, vocab, _ROW):
                n = min(_ROW, vocab - start)
                _load_differences(z_row, z_mode, ref_row, ref_mode, start, z[:n], ref[:n], e[:n])
                bottom, top = _range_of(e[:n], bottom, top)
                nans += n - _count_equal(e[:n], e[:n])
            # Rounding keeps the order, so that the largest |e - shift| is at an end; two e may share it.
            highest, lowest = abs(top - shift), abs(bottom - shift)
            peak = _NAN if nans or highest != highest or lowest != lowest else max(highest, lowest)
            above = top if top - shift == peak else _INFINITY
            below = bottom if shift - bottom == peak else -_INFINITY
            n_above, n_below = 0, 0
            for start in range(0, vocab, _ROW):
                n = min(_ROW, vocab - start)
                _load_differences(z_row, z_mode, ref_row, ref_mode, start, z[:n], ref[:n], e[:n])
                for i in range(n):
                    n_above += e[i] == above
                    n_below += e[i] == below
            h, count = (_ZERO if peak >= margin else margin - peak), np.int64(peak < margin)
            ties = np.float32(n_above + n_below)
            weight = _ZERO if peak >= margin else _ONE / ties + _ZERO * peak
            slope = _ZERO if peak == _ZERO else -weight * np.float32(n_above - n_below)
        else:
            at = labels[row]
            _load_differences(z_row, z_mode, ref_row, ref_mode, at, z[:1], ref[:1], e[:1])
            d = e[0] - shift
            h, count = (_ZERO if abs(d) >= margin else margin - abs(d)), np.int64(abs(d) < margin)
            weight = _ZERO if abs(d) >= margin else _sign_or_nan(d)
            slope = -weight
        hinge[row], active[row] = h, count
        stats[row, 0], stats[row, 1], stats[row, 2] = lse, shift, weight
        stats[row, 3], stats[row, 4], stats[row, 5] = (slope if log_probs else _ZERO), above, below


@_compiled
def _put_gradient(norm, e, shift, weight, above, below, margin, g):
    """dh/dd of every norm but ``label``."""
    if norm == PER_LOGIT:
        for i in range(len(e)):
            d = e[i] - shift
            g[i] = _ZERO if abs(d) >= margin else -weight * _sign_or_nan(d)
    elif norm == L2:
        for i in range(len(e)):
            g[i] = -weight * (e[i] - shift)
    else:
        for i in range(len(e)):
            is_between = (e[i] < above) & (e[i] > below)
            g[i] = _ZERO if is_between else -weight * _sign_or_nan(e[i] - shift)


@_compiled
def hinge_backward(
    out_all, out_at, z_all, z_at, z_mode, ref_all, ref_at, ref_mode, vocab, labels, kept, options, grad, stats
):
    """The gradient of rows by their logits, as ``_margin_hinge_bwd_torch`` has it; ``out_all`` may be ``z_all``."""
    norm, log_probs, margin = options
    z, ref = np.empty(_ROW, np.float32), np.empty(_ROW, np.float32)
    e, g = np.empty(_ROW, np.float32), np.empty(_ROW, np.float32)
    for row in range(len(z_at)):
        z_row, ref_row = z_all[z_at[row] : z_at[row] + vocab], ref_all[ref_at[row] : ref_at[row] + vocab]
        lse, shift, weight, slope = stats[row, 0], stats[row, 1], stats[row, 2], stats[row, 3]
        for start in range(0, vocab, _ROW):
            n = min(_ROW, vocab - start)
            if not kept[row]:
                g[:n] = _ZERO
            elif norm == LABEL:
                g[:n] = _ZERO
                if start <= labels[row] < start + n:
                    g[labels[row] - start] = -weight
                if log_probs:
                    _load_row(z_row[start : start + n], z_mode, z[:n])
            else:
                _load_differences(z_row, z_mode, ref_row, ref_mode, start, z[:n], ref[:n], e[:n])
                _put_gradient(norm, e[:n], shift, weight, stats[row, 4], stats[row, 5], margin, g[:n])
            if kept[row]:
                if log_probs:
                    for i in range(n):
                        g[i] -= _exp(z[i] - lse) * slope
                for i in range(n):
                    g[i] *= grad[row]
                _round_row(g[:n], z_mode)
            _store_row(g[:n], z_mode, out_all[out_at[row] + start : out_at[row] + start + n])
