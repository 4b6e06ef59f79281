r"""Uniform buckets: integers times a scale.

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

NaN takes the code of q = 0 (``ct-int4-sym``) or bucket 0 (``minmax-int4``).
"""

from dataclasses import dataclass

import torch

from .._triton import round_half_to_even, tl, triton
from .base import ROW_SIZES, Format


@dataclass(frozen=True)
class Symmetric(Format):
    """q = round(x / s) in -8 .. 7 with s = absmax / ``divisor``, in the arithmetic of the model's dtype."""

    divisor: float

    kind = "symmetric"
    levels = tuple(float(q) for q in range(-8, 8))

    def params_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def fit(self, x: torch.Tensor, short: bool, of_tensor: torch.Tensor | None) -> torch.Tensor:
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

    def kernel_rule(self, dtype: torch.dtype) -> tuple[float, ...]:
        return (self.divisor, torch.finfo(dtype).eps)


@dataclass(frozen=True)
class MinMax(Format):
    """Sixteen buckets of one width from the group's minimum to its maximum, in fp32."""

    kind = "minmax"
    n_params = 2
    levels = tuple(bucket + 0.5 for bucket in range(16))

    def fit(self, x: torch.Tensor, short: bool, of_tensor: torch.Tensor | None) -> torch.Tensor:
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


RECIPES = (
    Symmetric("ct-int4-sym", 128, ROW_SIZES, True, divisor=7.5),
    MinMax("minmax-int4", None, ROW_SIZES, True),
)


@triton.jit
def symmetric_fit(absmax, dtype, RULE: tl.constexpr):
    scale = tl.div_rn(absmax, tl.full(absmax.shape, RULE[0], tl.float32)).to(dtype).to(tl.float32)
    return tl.where(scale == 0, RULE[1], scale)


@triton.jit
def symmetric_rank(pos):
    q = tl.minimum(tl.maximum(tl.where(pos == pos, pos, 0.0), -8.0), 7.0)
    return round_half_to_even(q) + 8.0


@triton.jit
def minmax_fit(x, mask, absmax):
    low = tl.min(tl.where(mask, x, float("inf")), axis=1, keep_dims=True)
    high = tl.max(tl.where(mask, x, float("-inf")), axis=1, keep_dims=True)
    low = tl.where(absmax == absmax, low, absmax)
    return (high - low) * 0.0625, low


@triton.jit
def minmax_rank(pos):
    return tl.minimum(tl.maximum(tl.floor(tl.where(pos == pos, pos, 0.0)), 0.0), 15.0)
