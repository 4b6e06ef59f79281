r"""The legacy 4-bit blocks of llama.cpp: 32 weights along the last dimension, fp32 arithmetic, fp16 scales.

``gguf-q4_0`` (gguf 0.19, gguf/quants.py, Q4_0; ggml-quants.c, quantize_row_q4_0_ref)
        d = m / -8, with m the block's weight of largest magnitude, the first of them where several are
        q = min(trunc(x * (1 / d) + 8.5), 15)          value = (q - 8) * fp16(d)
    1 / d is 0 where d is 0; a half rounds up. The codes are decided by the fp32 d, the values by the one that
    is stored, in fp16. d is negative where m is positive: a code and its mirror image then stand for the same
    side of zero, so buckets are numbered by value, q - 8 or 8 - q from zero, from -8 to 8; of those 17 a block
    has 16. (Their distance from end to end, 16, needs two blocks whose m differ in sign: it counts as 15.)
    A block of zeros has d = -0, or 0 where its first zero is -0, code 8, and the value of a signed zero.

``gguf-q4_1`` (the same files, Q4_1, quantize_row_q4_1_ref)
        d = (max - min) / 15          q = min(trunc((x - min) * (1 / d) + 0.5), 15)
        value = q * fp16(d) + fp16(min)
    A constant block has d = 0, code 0 and the value fp16(min). A minimum of zero is stored as 0, also where it
    is -0: which one a block with both has depends on the order of the search, and no value does on that.

fp16 is part of the recipe. A d or a minimum beyond 65504 is stored as infinity, and its block dequantizes to
infinities and NaN; one below 2^-25 is stored as 0. An fp32 block so small that 1 / d overflows
(d < 2^-128) gets code 0 where x * (1 / d) is infinite or NaN: NumPy's cast to uint8 gives that on x86, where C
leaves it undefined; all its values are zeros.

A NaN takes code 0 and makes d NaN, so its block dequantizes to NaN. An infinity makes d infinite: in Q4_0 it
keeps its own value (code 0) and the rest of its block is NaN; in Q4_1 the whole block is NaN.
"""

from dataclasses import dataclass

import torch

from .._triton import shifted, tl, triton
from .base import Format
from .integer import masked_range


def _through_fp16(params: torch.Tensor) -> torch.Tensor:
    return params.half().float()


def _reciprocal(d: torch.Tensor) -> torch.Tensor:
    return (1.0 / d).masked_fill(d == 0, 0)


def _round_half_up(position: torch.Tensor, zero: float) -> torch.Tensor:
    return position.add_(zero + 0.5).nan_to_num_(nan=0, posinf=0).clamp_(0, 15).to(torch.int32)


@dataclass(frozen=True)
class Q4_0(Format):
    kind = "q4_0"
    levels = tuple(float(q) for q in range(-8, 8))
    pad_code = 8

    def params_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def fit(self, x: torch.Tensor, short: bool, of_tensor: torch.Tensor | None) -> torch.Tensor:
        x = x.float()
        first = x.abs().argmax(dim=1, keepdim=True)
        return x.gather(1, first).squeeze(1) * -0.125

    def rank(self, x: torch.Tensor, params: torch.Tensor, short: bool) -> torch.Tensor:
        return _round_half_up(x.float() * _reciprocal(params)[:, None], 8)

    def bucket(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        mirrored = (params < 0).to(torch.int8)[:, None]
        return rank.to(torch.int8).mul_(1 - 2 * mirrored).add_(16 * mirrored)

    def value(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return rank.float().sub_(8).mul_(_through_fp16(params)[:, None])

    def unit(self, params: torch.Tensor) -> torch.Tensor:
        return params.float().abs()


@dataclass(frozen=True)
class Q4_1(Format):
    kind = "q4_1"
    n_params = 2
    levels = tuple(float(q) for q in range(16))

    def params_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def fit(self, x: torch.Tensor, short: bool, of_tensor: torch.Tensor | None) -> torch.Tensor:
        x = x.float()
        # Apart they take a tenth of the time of torch.aminmax.
        low, high = (end.masked_fill(end == 0, 0) for end in (x.amin(dim=1), x.amax(dim=1)))
        # A divisor that is no tensor would make PyTorch multiply by its reciprocal on CUDA.
        return torch.stack([(high - low) / torch.full((), 15.0, device=x.device), low], dim=1)

    def rank(self, x: torch.Tensor, params: torch.Tensor, short: bool) -> torch.Tensor:
        d, low = params[:, :1], params[:, 1:]
        return _round_half_up((x.float() - low).mul_(_reciprocal(d)), 0)

    def value(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        d, low = _through_fp16(params).split(1, dim=1)
        return rank.float().mul_(d).add_(low)


RECIPES = (
    Q4_0("gguf-q4_0", 32, (32,), True),
    Q4_1("gguf-q4_1", 32, (32,), True),
)


@triton.jit
def q4_0_fit(x, absmax):
    PART: tl.constexpr = x.shape[2]
    column = PART * tl.arange(0, x.shape[0])[:, None, None] + tl.arange(0, PART)[None, None, :]
    negative = (x.to(tl.int32, bitcast=True) >> 31) & 1
    first = tl.where(tl.abs(x) == absmax, 2 * column + negative, 2 * PART * x.shape[0])
    sign = (tl.min(tl.min(first, axis=0, keep_dims=True), axis=2, keep_dims=True) & 1) << 31
    return (absmax.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True) * -0.125


@triton.jit
def q4_1_fit(x, mask):
    low, high = masked_range(x, mask)
    low, high = tl.where(low == 0, 0.0, low), tl.where(high == 0, 0.0, high)
    return tl.div_rn(high - low, tl.full(low.shape, 15.0, tl.float32)), low, (low == 0) & (high == 0)


@triton.jit
def gguf_position(x, scale, ZERO: tl.constexpr, OWN: tl.constexpr):
    """The rank - ZERO + 1.5 * 2^23; NaN and infinity are at rank 0."""
    inverse = tl.where(scale == 0, 0.0, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale))
    if OWN:
        # On its own scale a weight is infinite only where the inverse is, and that is so for the group.
        inverse = tl.where(tl.abs(inverse) < float("inf"), inverse, float("nan"))
    up = x * inverse + (ZERO + 0.5)
    if not OWN:
        up = tl.where(up < float("inf"), up, 0.0)
    return tl.floor(tl.minimum(tl.maximum(up, 0.0), 15.0)) + shifted(-ZERO)


@triton.jit
def through_fp16(x):
    return x.to(tl.float16).to(tl.float32)
