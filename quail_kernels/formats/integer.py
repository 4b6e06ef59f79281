r"""Uniform buckets: integers times a scale.

Groups run along the last dimension, 128 weights by default, and must divide it; only ``minmax-int4`` takes the
whole tensor by default. T is the model's dtype; T(..) rounds to it; ties are rounded to even; every division is
a division.

``ct-int4-sym`` (compressed-tensors 0.20, its PyTorch path; each result rounded to T)
        s = T(absmax / 7.5), or eps(T) where that is 0
        q = round(clamp(T(x / s), -8, 7))          value = T(q * s)
    The code is q + 8, as the library packs it. The library's Triton path for CUDA keeps x / s in fp32, so that
    bf16 and fp16 codes near a tie may differ there; its fake-quantized forward is as here on every device.
    compressed_tensors/quantization/lifecycle/forward_helpers.py; utils/helpers.py, calculate_qparams.

``ct-int4-asym`` (the same library and files; each result rounded to T)
        low = min(min x, 0)          high = max(max x, 0)          s = T(T(high - low) / 15)
        z = round(clamp(T(-8 - T(low / s)), -8, 7))
        q = round(clamp(T(T(x / s) + z), -8, 7))          value = T((q - z) * s)
    The zero point is added *before* rounding, which in bf16 and fp16 rounds twice. Where s is 0 it becomes eps(T)
    once z is there: a group of zeros has z = q = 0, one whose scale underflows has z = 7 where low < 0. The code
    is q + 8. The Triton path of the library differs as above, and in adding z in fp32.

``awq-int4-sym`` (AutoAWQ 0.2.9, WqQuantizer.pseudo_quantize_tensor without zero point; each result rounded to T)
        s = T(max(absmax, T(1e-5)) / 7)          q = clamp(round(T(x / s)), -8, 7)          value = T(q * s)
    The code is q + 8; q = -8 is never reached, since no weight lies below -absmax. AutoAWQ turns every layer to
    fp16 before it quantizes: to see what it deploys of a bf16 checkpoint, cast to fp16 first. It refuses NaN; here
    it is as with the others. On CUDA, PyTorch multiplies by fp32(1 / 7) where the divisor is a Python number: the
    same numbers in bf16 and fp16, in fp32 a scale that may be one ulp away.
    awq/quantize/quantizer.py.

``awq-int4-asym`` (the same function with zero point, AutoAWQ's default; each result rounded to T)
        s = T(max(T(max x - min x), T(1e-5)) / 15)          z = clamp(-round(T(min x / s)), 0, 15)
        q = clamp(round(T(x / s)) + z, 0, 15)          value = T((q - z) * s)
    Zero need not lie in the range, but z cannot leave 0 .. 15: a group far from zero saturates, and all of its
    weights get 15 * s or -15 * s. What packs the codes (WQLinear_GEMM.from_linear) reckons them anew from the
    values and finds the same.

``mslk-int4-sym`` (MSLK 1.1, int4_row_quantize, once of FBGEMM; fp32)
        s = max(absmax, 1e-6) / 8          q = clamp(round(x / s), -8, 7)          value = T(q * s)
    The largest weight of a group, where it is positive, is clamped by a whole step. The code is q + 8. The scale
    is stored in fp32, as the function returns it. Deployments store it in bf16 (MSLK) or T (torchao): of bf16
    weights that is the same number, absmax / 8 being as short as absmax, but in groups below 1e-6; of fp16
    weights it is in T, down to an absmax of 2^-11. With fp8 activations MSLK first rounds the weights to fp8 by
    row, which is not part of this.
    mslk/quantize/shuffle.py.

``gptq-int4-asym`` (GPTQModel 7.7, its RTN class: Quantizer.find_params and quantize, and the packed layer; fp32)
        low = min(min x, 0)          high = max(max x, 0)          s = (high - low) / 15
        z = round(-low / s)          q = clamp(round(x / s) + z, 0, 15)          value = T(fp16(fp16(s) * (q - z)))
    Codes come of the fp32 scale; the layer stores it in fp16, and its weights are fp16 products. So a scale below
    2^-25 makes zeros, one above 65504 infinities and NaN. A group of zeros is taken to reach from -1 to 1. A
    scale that underflows fp32 becomes 2^-126, with z = 0. z is kept in 0 .. 15, the four bits that it is packed
    into; the library's can only exceed them where the range is below 4e-43. GPTQ with sym=True gives
    the codes of ``ct-int4-sym`` on the weights in fp32.
    gptqmodel/quantization/quantizer.py, rtn.py; nn_modules/qlinear/__init__.py, pack_block, dequantize_weight.

``minmax-int4`` (the uniform buckets that reviews quote from QUAIL, https://arxiv.org/abs/2601.15538; fp32)
        step = (max - min) / 16
        bucket = clamp(floor((x - min) / step), 0, 15)          value = min + (bucket + 1/2) * step
    One group for the whole tensor by default, which is what gives the quoted steps of 0.05 to 0.1; ``@128``
    and the like group along the last dimension. That the value is the centre of the bucket is our choice: the
    quoted analysis counts buckets only. A constant group has step 0, bucket 0 and its own value.

A NaN, and infinity over infinity, is at position 0: it takes the code of q = 0 (symmetric), of q = z (asymmetric;
z is 0 where NaN or an infinity leaves it undefined) or bucket 0 (``minmax-int4``).

How far each is from other libraries and other arithmetic is measured in README.md beside this file.
"""

from dataclasses import dataclass

import torch

from .._triton import largest, shifted, smallest, tl, triton, unshifted
from .base import ROW_SIZES, Format


@dataclass(frozen=True)
class Symmetric(Format):
    """q = round(x / s) in -8 .. 7 with s = absmax / ``divisor``.

    ``smallest``: absmax is at least this; 0 makes a scale of 0 the dtype's eps instead.
    ``in_fp32``: the arithmetic is in fp32 and the scale stays there; otherwise in the model's dtype.
    """

    divisor: float
    smallest: float = 0.0
    in_fp32: bool = False

    kind = "symmetric"
    levels = tuple(float(q) for q in range(-8, 8))

    def params_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.in_fp32 else dtype

    def fit(self, x: torch.Tensor, short: bool, of_tensor: torch.Tensor | None) -> torch.Tensor:
        absmax = x.float().abs().amax(dim=1).to(self.params_dtype(x.dtype)).clamp(min=self.smallest)
        # A divisor that is no tensor would make PyTorch multiply by its reciprocal on CUDA.
        scale = absmax / torch.full_like(absmax[:1], self.divisor)
        return scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps)

    def _q(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        # In bf16 and fp16 the division alone rounds: the rest is the same in fp32, and faster.
        position = x.float() / params.float()[:, None]
        return position.to(params.dtype).float().clamp_(-8, 7).round_().nan_to_num_(0)

    def rank(self, x: torch.Tensor, params: torch.Tensor, short: bool) -> torch.Tensor:
        return self._q(x, params).to(torch.int32).add_(8)

    def value(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return rank.float().sub_(8).mul_(params.float()[:, None]).to(params.dtype)

    def nearest(self, x: torch.Tensor, params: torch.Tensor, short: bool) -> torch.Tensor:
        # The sum makes 0 of -0, as the way through an integer does.
        return self._q(x, params).add_(0).mul_(params.float()[:, None]).to(params.dtype)

    def kernel_rule(self, dtype: torch.dtype) -> tuple[float, ...]:
        dtype = self.params_dtype(dtype)
        return (self.divisor, _rounded(self.smallest, dtype), torch.finfo(dtype).eps, self.in_fp32)


@dataclass(frozen=True)
class ZeroPoint(Format):
    """q = round(x / s) + z in lowest .. lowest + 15, with z the integer that 0 falls on; params are (s, z).

    ``lowest``: of the integers that are stored.
    ``zero_in_range``: whether the range that s divides by 15 is made to reach 0.
    ``zero_point_first``: z is added before rounding.
    ``smallest``: the range is at least this; 0 makes a scale of 0 the dtype's eps once z is there.
    ``like_gptq``: arithmetic in fp32, the scale and the product stored in fp16; a group of zeros reaches from -1
    to 1, and a scale that is 0 all the same becomes the smallest normal number before z is there. Otherwise the
    arithmetic is in the model's dtype.
    """

    lowest: int
    zero_in_range: bool
    zero_point_first: bool = False
    smallest: float = 0.0
    like_gptq: bool = False

    n_params = 2

    @property
    def kind(self) -> str:
        return "zero_point_fp16" if self.like_gptq else "zero_point"

    @property
    def levels(self) -> tuple[float, ...]:
        return tuple(float(self.lowest + i) for i in range(16))

    def params_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float16 if self.like_gptq else dtype

    def fit(self, x: torch.Tensor, short: bool, of_tensor: torch.Tensor | None) -> torch.Tensor:
        # Apart, and in fp32, they take a tenth of the time of torch.aminmax.
        low, high = (end.to(x.dtype) for end in (x.float().amin(dim=1), x.float().amax(dim=1)))
        if self.zero_in_range:
            low, high = low.clamp(max=0), high.clamp(min=0)
        if self.like_gptq:
            low, high = low.float(), high.float()
            zeros = low == high
            low, high = low.masked_fill(zeros, -1), high.masked_fill(zeros, 1)
        extent = (high - low).clamp(min=self.smallest)
        scale = extent / torch.full_like(extent[:1], 15)
        if self.like_gptq:
            scale = scale.masked_fill(scale == 0, torch.finfo(scale.dtype).tiny)
        zero_point = (self.lowest - low / scale).clamp(self.lowest, self.lowest + 15).round()
        # -0 + 0 is 0: an integer has one zero.
        zero_point = zero_point.masked_fill(zero_point.isnan(), 0) + 0
        return torch.stack([scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps), zero_point], dim=1)

    def rank(self, x: torch.Tensor, params: torch.Tensor, short: bool) -> torch.Tensor:
        scale, zero_point = params.float().split(1, dim=1)
        position = (x.float() / scale).to(params.dtype).float().nan_to_num_(0, torch.inf, -torch.inf)
        if self.zero_point_first:
            q = position.add_(zero_point).to(params.dtype).float().clamp_(self.lowest, self.lowest + 15).round_()
        else:
            q = position.round_().add_(zero_point).clamp_(self.lowest, self.lowest + 15)
        return q.to(torch.int32).sub_(self.lowest)

    def value(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        dtype = torch.float16 if self.like_gptq else params.dtype
        scale, zero_point = params.float().split(1, dim=1)
        return rank.float().add_(self.lowest).sub_(zero_point).mul_(scale.to(dtype).float()).to(dtype)

    def kernel_rule(self, dtype: torch.dtype) -> tuple[float, ...]:
        dtype = torch.float32 if self.like_gptq else dtype
        guard = torch.finfo(dtype).tiny if self.like_gptq else torch.finfo(dtype).eps
        switches = (self.zero_in_range, self.zero_point_first, self.like_gptq)
        return (float(self.lowest), _rounded(self.smallest, dtype), guard, *switches)


@dataclass(frozen=True)
class MinMax(Format):
    """Sixteen buckets of one width from the group's minimum to its maximum, in fp32."""

    kind = "minmax"
    n_params = 2
    levels = tuple(bucket + 0.5 for bucket in range(16))

    def fit(self, x: torch.Tensor, short: bool, of_tensor: torch.Tensor | None) -> torch.Tensor:
        # Which of 0 and -0 is found depends on the order of the search: the sum is 0 for both.
        low, high = x.float().amin(dim=1) + 0, x.float().amax(dim=1) + 0
        return torch.stack([(high - low) / 16, low], dim=1)

    def rank(self, x: torch.Tensor, params: torch.Tensor, short: bool) -> torch.Tensor:
        step, low = params[:, :1], params[:, 1:]
        bucket = (x.float() - low).div_(step).floor_().clamp_(0, 15).nan_to_num_(0)
        return bucket.to(torch.int32)

    def value(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        step, low = params[:, :1], params[:, 1:]
        return rank.float().add_(0.5).mul_(step).add_(low)


def _rounded(number: float, dtype: torch.dtype) -> float:
    return torch.tensor(number, dtype=dtype, device="cpu").item()


RECIPES = (
    Symmetric("ct-int4-sym", 128, ROW_SIZES, True, divisor=7.5),
    Symmetric("awq-int4-sym", 128, ROW_SIZES, True, divisor=7.0, smallest=1e-5),
    Symmetric("mslk-int4-sym", 128, ROW_SIZES, True, divisor=8.0, smallest=1e-6, in_fp32=True),
    ZeroPoint("gptq-int4-asym", 128, ROW_SIZES, True, lowest=0, zero_in_range=True, like_gptq=True),
    ZeroPoint("awq-int4-asym", 128, ROW_SIZES, True, lowest=0, zero_in_range=False, smallest=1e-5),
    ZeroPoint("ct-int4-asym", 128, ROW_SIZES, True, lowest=-8, zero_in_range=True, zero_point_first=True),
    MinMax("minmax-int4", None, ROW_SIZES, True),
)


@triton.jit
def _rounded_to(x, dtype, IN_FP32: tl.constexpr):
    if IN_FP32:
        rounded = x
    else:
        rounded = x.to(dtype).to(tl.float32)
    return rounded


@triton.jit
def _within(x, lowest, highest):
    """NaN is at the lowest."""
    return tl.minimum(tl.maximum(x, lowest), highest)


@triton.constexpr_function
def is_far(dtype, RULE):
    """Whether scales may lie where a reciprocal overflows: in fp16 they cannot, nor where a recipe keeps them away."""
    return dtype != tl.float16 and (len(RULE) == 0 or RULE[1] == 0)


@triton.jit
def near_reciprocal(scale, FAR: tl.constexpr):
    """(a power of two, the scale times that, the reciprocal of the product); FAR: the power need not be 1."""
    by = tl.zeros_like(scale) + 1.0
    if FAR:
        by = tl.where(scale < 2.0**-60, 2.0**96, tl.where(scale > 2.0**60, 2.0**-64, by))
        scale = scale * by
    scale = tl.where(scale == 0, 2.0**-60, scale)
    return by, scale, tl.div_rn(tl.zeros_like(scale) + 1.0, scale)


@triton.jit
def _quotient(x, scale, dtype, IN_FP32: tl.constexpr, FAR: tl.constexpr, UNBOUNDED: tl.constexpr):
    """x / scale rounded to fp32, and then to ``dtype`` but IN_FP32: to the bit what division gives from 2^-40 to 2^22,
    at the price of one division a group.

    With r = 1 / s rounded and q = x r rounded, q + (x - q s) r is the rounded quotient, both multiply-adds rounding
    once: Markstein's correction (IBM Journal of Research and Development 34, 1990), of a product whose divisor is known
    in advance (Brisebarre, Muller and Raina, IEEE Transactions on Computers 53, 2004). Of x and s in bf16 or fp16 the
    product alone is near enough to be rounded like the quotient: x / s is never halfway between two numbers of that
    precision, and tests/interpreter tries every pair of significands.

    A scale that is 0 stands for one below every other. FAR: scales may be so small or large that r is not normal, and
    are brought nearer, x with them, by a power of two. UNBOUNDED: x / scale may overflow, and the correction of an
    infinity would be NaN; from 2^22 on, where every recipe clamps, it is left out. Where the correction underflows
    the last bit may differ: the quotient is far below a half, where every recipe rounds to 0. A scale that is not
    finite gives anything.
    """
    by, scale, reciprocal = near_reciprocal(scale, FAR)
    if FAR:
        x = x * by
    product = x * reciprocal
    if IN_FP32 or dtype == tl.float32:
        quotient = tl.fma(tl.fma(-product, tl.broadcast_to(scale, x.shape), x), reciprocal + tl.zeros_like(x), product)
        if UNBOUNDED:
            quotient = tl.where(tl.abs(product) < 2.0**22, quotient, product)
    else:
        quotient = product.to(dtype).to(tl.float32)
    return quotient


@triton.jit
def _clamped(position, scale, lowest, highest, zero, OWN: tl.constexpr):
    """From ``lowest`` to ``highest``; NaN, and all that shares a scale of NaN or infinity, at ``zero``."""
    if OWN:
        # On a scale that was fitted to x too, whole groups are numbers or are not: their ends are what differs.
        known = tl.abs(scale) < float("inf")
        lowest, highest = tl.where(known, lowest, zero), tl.where(known, highest, zero)
    else:
        position = tl.where(position == position, position, zero)
    return _within(position, lowest, highest)


@triton.jit
def symmetric_fit(absmax, dtype, RULE: tl.constexpr):
    absmax = tl.where(absmax < RULE[1], RULE[1], absmax)
    scale = _rounded_to(tl.div_rn(absmax, tl.full(absmax.shape, RULE[0], tl.float32)), dtype, RULE[3])
    return tl.where(scale == 0, RULE[2], scale)


@triton.jit
def symmetric_position(x, scale, dtype, RULE: tl.constexpr, OWN: tl.constexpr):
    """q + 1.5 * 2^23."""
    position = shifted(_quotient(x, scale, dtype, RULE[3], is_far(dtype, RULE), not OWN))
    return _clamped(position, scale, shifted(-8.0), shifted(7.0), shifted(0.0), OWN)


@triton.jit
def zero_point_fit(x, mask, dtype, RULE: tl.constexpr):
    """(scale, zero point, whether all are zero)."""
    LOWEST: tl.constexpr = RULE[0]
    SMALLEST: tl.constexpr = RULE[1]
    GUARD: tl.constexpr = RULE[2]
    ZERO_IN_RANGE: tl.constexpr = RULE[3]
    LIKE_GPTQ: tl.constexpr = RULE[5]
    if ZERO_IN_RANGE:  # lanes that are masked hold 0
        low, high = smallest(x), largest(x)
        is_zero = (low == 0) & (high == 0)
        low, high = tl.where(low > 0, 0.0, low), tl.maximum(high, 0.0)
    else:
        low, high = masked_range(x, mask)
        is_zero = (low == 0) & (high == 0)
    if LIKE_GPTQ:
        zeros = low == high
        low, high = tl.where(zeros, -1.0, low), tl.where(zeros, 1.0, high)
    extent = _rounded_to(high - low, dtype, LIKE_GPTQ)
    extent = tl.where(extent < SMALLEST, SMALLEST, extent)
    scale = _rounded_to(tl.div_rn(extent, tl.full(extent.shape, 15.0, tl.float32)), dtype, LIKE_GPTQ)
    guarded = tl.where(scale == 0, GUARD, scale)
    # Clamped so that it stays in fp32: of operands that are bf16, PTX would make a multiply-add for sm_80.
    below = _rounded_to(tl.div_rn(low, guarded if LIKE_GPTQ else scale), dtype, LIKE_GPTQ)
    below = _within(tl.where(below == below, below, LOWEST), -32.0, 32.0)
    zero_point = shifted(_rounded_to(LOWEST - below, dtype, LIKE_GPTQ))
    return guarded, unshifted(_within(zero_point, shifted(LOWEST), shifted(LOWEST + 15.0))), is_zero


@triton.jit
def zero_point_position(x, scale, zero_point, dtype, RULE: tl.constexpr, OWN: tl.constexpr):
    """q - z + 1.5 * 2^23."""
    LOWEST: tl.constexpr = RULE[0]
    ZERO_IN_RANGE: tl.constexpr = RULE[3]
    ZERO_POINT_FIRST: tl.constexpr = RULE[4]
    LIKE_GPTQ: tl.constexpr = RULE[5]
    UNBOUNDED: tl.constexpr = not (OWN and ZERO_IN_RANGE)
    position = _quotient(x, scale, dtype, LIKE_GPTQ, is_far(dtype, RULE), UNBOUNDED)
    lowest, highest = shifted(LOWEST), shifted(LOWEST + 15.0)
    if ZERO_POINT_FIRST:
        position = shifted(_rounded_to(position + zero_point, dtype, LIKE_GPTQ))
        position = _clamped(position, scale, lowest, highest, shifted(zero_point), OWN) - zero_point
    else:
        lowest, highest = -zero_point + lowest, -zero_point + highest
        position = _clamped(shifted(position), scale, lowest, highest, shifted(0.0), OWN)
    return position


@triton.jit
def zero_point_value(level, scale, FP16: tl.constexpr):
    """``level``: above the zero point."""
    if FP16:
        value = (level * scale.to(tl.float16).to(tl.float32)).to(tl.float16).to(tl.float32)
    else:
        value = level * scale
    return value


@triton.jit
def masked_range(x, mask):
    """(smallest, largest) of the groups, NaN where a weight is."""
    return smallest(tl.where(mask, x, float("inf"))), largest(tl.where(mask, x, float("-inf")))


@triton.jit
def minmax_fit(x, mask):
    low, high = masked_range(x, mask)
    low, high = low + 0.0, high + 0.0
    return (high - low) * 0.0625, low, (low == 0) & (high == 0)


@triton.jit
def minmax_position(x, step, low, dtype, OWN: tl.constexpr):
    """The bucket + 1.5 * 2^23."""
    position = tl.floor(_quotient(x - low, step, dtype, True, is_far(dtype, ()), not OWN))
    return shifted(_clamped(position, step, 0.0, 15.0, 0.0, OWN))
