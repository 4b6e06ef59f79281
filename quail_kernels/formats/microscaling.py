r"""E2M1 numbers under a shared scale: MXFP4 (OCP) and NVFP4.

An E2M1 magnitude is one of 0, 0.5, 1, 1.5, 2, 3, 4, 6; code 8 + c is minus what code c is, so 8 is -0. With
unit the number that a position of 1 stands for, every recipe has
    p = x / unit          value = e2m1(p) * scale
where e2m1 rounds to the nearest level, a tie to the even code, and saturates at 6. A negative p that rounds to
0, and -0 itself, get code 8 and the value -0. Blocks run along the last dimension and must divide it; weights
are taken to fp32 first.

``mxfp4`` (torchao 0.18, prototype/mx_formats/mx_tensor.py, to_mx with ScaleCalculationMode.FLOOR, to_dtype;
the scale of OCP Microscaling Formats 1.0, section 6.3)
    Blocks of 32.
        scale = 2^e,  e = max(exponent(absmax) - 2, -127)          unit = max(scale, 2^-126)
    exponent is what fp32 stores: floor(log2(absmax)), and -127 for zero and subnormals. absmax / unit lies in
    [4, 8): up to a quarter of the largest weight is lost by saturation. A block with absmax < 2^-124 has
    scale 2^-127, half its unit, and dequantizes to half of what it should, as in the library.

``mxfp4-rceil`` (the same file, ScaleCalculationMode.RCEIL: the rule of cuBLAS, and what Blackwell's
cvt.rp.satfinite.ue8m0x2.f32 does)
    Blocks of 32.
        scale = 2^e,  e = clamp(ceil(log2(absmax / 6)), -127, 127)          unit = scale, or 1 where e = -127
    Nothing saturates. The ceiling is exact, as the instruction's is. The library's PyTorch path takes it of an
    fp32 log2, which may give 2^k for an absmax / 6 that is above 2^k by a few ulp; its scale is then half
    of what it is here. A block with absmax <= 6 * 2^-127 becomes zeros.

``gguf-mxfp4`` (gguf 0.19, gguf/quants.py, MXFP4; ggml-quants.c, quantize_row_mxfp4_ref)
    Blocks of 32 and the scale of ``mxfp4``, with unit = scale. The nearest level is looked for from code 0 up,
    so a tie takes the smaller magnitude, and a zero of either sign, as what rounds to zero, gets code 0. The
    library takes floor of an fp32 log2, which gives k for an absmax below 2^k by a few ulp, where this one gives
    k - 1; below absmax 2^-125 its exponent wraps around in uint8, where this one stops at 2^-127; and it hides
    NaN and infinity, where this one does not.

``nvfp4`` (torchao 0.18, prototype/mx_formats/nvfp4_tensor.py, nvfp4_quantize with per_tensor_amax_to_scale of
the tensor; https://arxiv.org/abs/2509.25149)
    Blocks of 16.
        t = max(absmax(tensor) / 2688, 2^-121)          scale = e4m3(clamp(absmax / 6 / t, 2^-6, 448))
        p = x * ((1 / t) / scale)                        value = e2m1(p) * (t * scale)
    2688 = 448 * 6; e4m3 rounds to three bits after the point, ties to even. The bound on t is not the
    library's: where t is 2^-122 or less, 1 / t / scale overflows there, and a tensor of zeros becomes NaN.

A NaN makes its block's scale NaN (0xFF in E8M0, 0x7F in E4M3), and the block dequantizes to NaN; under
``nvfp4`` it makes t and so the whole tensor NaN. The codes of such a block are 7 here; in the libraries they
are what their bit arithmetic makes of a NaN. An infinity saturates to code 7 or 15 and has an infinite value
again, since its scale is 2^126 or 2^127; the rest of its block becomes zeros. Under ``nvfp4`` it makes t infinite
and everything in the tensor NaN.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .._triton import tl, triton
from .base import look_up
from .codebook import Levels

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))


@dataclass(frozen=True)
class E2M1(Levels):
    """Positions rounded to E2M1: the buckets, whatever gives the scale.

    The reference looks a position up among thresholds, the kernels round it arithmetically. A subclass has
    ``unit(params)``, [groups], too: the difference of weights that is a difference of 1 in position.
    """

    @functools.cached_property
    def codes(self) -> tuple[int, ...]:
        return (*range(15, 7, -1), *range(8))

    @functools.cached_property
    def thresholds(self) -> tuple[float, ...]:
        """The midpoints, or the numbers below them where a tie goes up; between the zeros any negative number is
        below the threshold."""
        points = torch.tensor(self.midpoints, dtype=torch.float32, device="cpu")
        below = points.nextafter(torch.tensor(-torch.inf, device="cpu"))
        up = torch.tensor([self.tie_goes_up(rank) for rank in range(15)], device="cpu")
        return tuple(torch.where(up, below, points).tolist())

    def kernel_constants(self, dtype: torch.dtype) -> dict:
        return super().kernel_constants(dtype) | {"THRESHOLDS": None}

    def tie_goes_up(self, rank: int) -> bool:
        """Whether a position halfway between the levels of ``rank`` and ``rank + 1`` takes the upper one."""
        return self.codes[rank] == 8 or self.codes[rank + 1] % 2 == 0


@dataclass(frozen=True)
class Mx(E2M1):
    """A power of two as the scale: ``kind`` is mx_floor, mx_rceil or mx_gguf."""

    kind: str
    reach: float

    def fit(self, x: torch.Tensor, short: bool, of_tensor: torch.Tensor | None) -> torch.Tensor:
        absmax = x.float().abs().amax(dim=1)
        if self.kind == "mx_rceil":
            # A divisor that is no tensor would make PyTorch multiply by its reciprocal on CUDA.
            bits = (absmax / torch.full((), 6.0, device=x.device)).view(torch.int32)
            exponent = (bits + 0x7FFFFF >> 23).masked_fill(bits <= 0x400000, 0).clamp(max=254)
        else:
            exponent = ((absmax.view(torch.int32) >> 23) - 2).clamp(min=0)
        scale = torch.where(exponent > 0, exponent << 23, 0x400000).to(torch.int32).view(torch.float32)
        return scale.masked_fill(absmax.isnan(), torch.nan)

    def unit(self, params: torch.Tensor) -> torch.Tensor:
        if self.kind == "mx_floor":
            return params.clamp(min=2.0**-126)
        return params.masked_fill(params == 2.0**-127, 1) if self.kind == "mx_rceil" else params

    def rank(self, x: torch.Tensor, params: torch.Tensor, short: bool) -> torch.Tensor:
        position = x.float() / self.unit(params)[:, None]
        if self.kind == "mx_gguf":
            return self.rank_of(F.hardshrink(position, 0.25))
        return self.rank_of(_apart_from_zero(position))

    def tie_goes_up(self, rank: int) -> bool:
        if self.kind == "mx_gguf":
            return rank <= 7
        return super().tie_goes_up(rank)

    def value(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return look_up(self.table("levels", rank.device), rank).mul_(params[:, None])


@dataclass(frozen=True)
class NvFp4(E2M1):
    """An E4M3 scale a block, and one fp32 scale for the tensor."""

    kind = "nvfp4"
    n_params = 2
    needs_tensor = True
    reach = 6.0

    def fit_range(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        absmax = torch.maximum(low.abs(), high.abs()).float().view(1)
        return (absmax / torch.full((), 2688.0, device=absmax.device)).clamp(min=2.0**-121)

    def fit(self, x: torch.Tensor, short: bool, of_tensor: torch.Tensor | None) -> torch.Tensor:
        absmax = x.float().abs().amax(dim=1)
        scale = absmax / torch.full((), 6.0, device=x.device) / of_tensor
        scale = scale.clamp(2.0**-6, 448.0).to(torch.float8_e4m3fn).float()
        return torch.stack([scale, of_tensor.expand_as(scale)], dim=1)

    def unit(self, params: torch.Tensor) -> torch.Tensor:
        return params[:, 1] * params[:, 0]

    def rank(self, x: torch.Tensor, params: torch.Tensor, short: bool) -> torch.Tensor:
        scale, of_tensor = params[:, :1], params[:, 1:]
        position = x.float() * (1.0 / of_tensor / scale)
        return self.rank_of(_apart_from_zero(position))

    def value(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return look_up(self.table("levels", rank.device), rank).mul_(self.unit(params)[:, None])


def _apart_from_zero(position: torch.Tensor) -> torch.Tensor:
    """The same positions, but for those near zero: they are moved away from it, so that -0 is below it.

    No other position is so near a threshold that it notices.
    """
    return position + torch.full((), 1e-30, device=position.device).copysign(position)


RECIPES = (
    Mx("mxfp4", 32, (32,), True, _E2M1, kind="mx_floor", reach=8.0),
    Mx("mxfp4-rceil", 32, (32,), True, _E2M1, kind="mx_rceil", reach=6.0),
    Mx("gguf-mxfp4", 32, (32,), True, _E2M1, kind="mx_gguf", reach=8.0),
    NvFp4("nvfp4", 16, (16,), True, _E2M1),
)


@triton.jit
def power_of_two(exponent):
    """2^(exponent - 127), where 0 to 254 are the exponents that fp32 and E8M0 share."""
    return tl.where(exponent > 0, exponent << 23, 0x400000).to(tl.float32, bitcast=True)


@triton.jit
def mx_fit(absmax, KIND: tl.constexpr):
    if KIND == "mx_rceil":
        bits = tl.div_rn(absmax, tl.full(absmax.shape, 6.0, tl.float32)).to(tl.int32, bitcast=True)
        exponent = tl.where(bits <= 0x400000, 0, tl.minimum((bits + 0x7FFFFF) >> 23, 254))
    else:
        exponent = tl.maximum((absmax.to(tl.int32, bitcast=True) >> 23) - 2, 0)
    return tl.where(absmax == absmax, power_of_two(exponent), absmax)


@triton.jit
def mx_unit(scale, KIND: tl.constexpr):
    unit = scale
    if KIND == "mx_floor":
        unit = tl.where(scale < 2.0**-126, 2.0**-126, scale)
    if KIND == "mx_rceil":
        unit = tl.where(scale < 2.0**-126, 1.0, scale)
    return unit


@triton.jit
def mx_inverse(unit):
    """1 / unit, exact: unit is a power of two."""
    exponent = 254 - (unit.to(tl.int32, bitcast=True) >> 23)
    return tl.where(unit == unit, power_of_two(exponent), unit)


@triton.jit
def mx_position(x, scale, KIND: tl.constexpr, OWN: tl.constexpr):
    inverse = mx_inverse(mx_unit(scale, KIND))
    pos = x * inverse
    # On its own scale a weight is NaN only where the scale is, and that is so for the group.
    return e2m1(pos, inverse == inverse if OWN else pos == pos, KIND == "mx_gguf")


@triton.jit
def nvfp4_fit(absmax, of_tensor):
    scale = tl.div_rn(absmax, tl.full(absmax.shape, 6.0, tl.float32))
    scale = tl.div_rn(scale, tl.zeros_like(scale) + of_tensor)
    scale = tl.where(scale < 2.0**-6, 2.0**-6, tl.where(scale > 448.0, 448.0, scale))
    return e4m3(scale), tl.zeros_like(scale) + of_tensor


@triton.jit
def e4m3(x):
    """fp32 to the nearest E4M3, ties to even, for NaN and 2^-6 <= x <= 448, where E4M3 is normal."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def nvfp4_inverse(scale, of_tensor):
    return tl.div_rn(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), of_tensor), scale)


@triton.jit
def nvfp4_position(x, scale, of_tensor, OWN: tl.constexpr):
    inverse = nvfp4_inverse(scale, of_tensor)
    pos = x * inverse
    return e2m1(pos, inverse == inverse if OWN else pos == pos, False)


@triton.jit
def e2m1(pos, is_number, TIES_TO_ZERO: tl.constexpr):
    """fp32 to the nearest E2M1 number of the same sign, saturating; NaN, of which ``is_number`` is false, to 6.

    Ties go to the even code, or to the smaller magnitude, where then a zero of either sign is 0.
    """
    magnitude = tl.minimum(tl.abs(pos), 6.0)
    # The levels are half of this apart: 1, 2 or 4, by the exponent.
    twice_spacing = (tl.maximum(magnitude, 1.0).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # Adding 1.5 * 2^23 times the levels' spacing leaves none of the bits below that.
    shift = twice_spacing * 6291456.0
    if TIES_TO_ZERO:
        # A tie becomes a little less than one, which is not lost, as product and sum are rounded once.
        level = tl.fma(magnitude, tl.full(magnitude.shape, 1 - 2.0**-24, tl.float32), shift) - shift
    else:
        level = (magnitude + shift) - shift
    sign = pos.to(tl.int32, bitcast=True) & tl.where(is_number, -2147483648, 0)
    signed = (level.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return signed + 0.0 if TIES_TO_ZERO else signed


@triton.jit
def e2m1_code(level):
    """Times 2^-126 an E2M1 number, subnormal or not, has in fp32 the exponent and the bit that it is coded with."""
    return ((level.to(tl.int32, bitcast=True) >> 28) & 8) | (_e2m1_magnitude(level) >> 22)


@triton.jit
def e2m1_level(code):
    return (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True) * 2.0**126


@triton.jit
def _e2m1_magnitude(level):
    """The code of |level|, times 2^22."""
    return (tl.abs(level) * 2.0**-126).to(tl.int32, bitcast=True)


@triton.jit
def e2m1_place(level):
    """The bucket, counted from that of zero."""
    magnitude = _e2m1_magnitude(level) >> 22
    return tl.where(level < 0, -magnitude, magnitude)


@triton.constexpr_function
def _digits(numbers, by):
    """Of the eight largest, in sixteenths of each other; int32."""
    packed = sum(round(by * number) << (4 * i) for i, number in enumerate(numbers[8:]))
    return packed - (1 << 32 if packed >> 31 else 0)


@triton.jit
def e2m1_inverse_width(level, INVERSE_WIDTHS: tl.constexpr):
    """The reciprocal of the bucket's width on a position's scale: thirds, looked up in a number of eight digits, times
    the fp32 third, which rounds as they do."""
    THIRDS: tl.constexpr = _digits(INVERSE_WIDTHS, 3)
    digit = (tl.full(level.shape, THIRDS, tl.int32) >> (_e2m1_magnitude(level) >> 20)) & 15
    # 2^23 + the digit, by its bits; of that a third, less a third of 2^23.
    third = tl.full(level.shape, 0.3333333432674408, tl.float32)
    return tl.fma((digit | 0x4B000000).to(tl.float32, bitcast=True), third, -2796202.75)
