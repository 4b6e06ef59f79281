"""The recipes' arithmetic as one writes it in PyTorch, over the whole tensor at once: what a user has without this
package, and what torch.compile is given.

Bit for bit what the package gives, of weights without NaN and infinity and in whole groups. The formulas stand in
quail_kernels/formats.
"""

import torch

from quail_kernels.formats import Format


def quantized(w: torch.Tensor, recipe: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank of the bucket [groups, group_size], parameters [groups] or [groups, 2])."""
    x = w.reshape(-1, recipe.group_size or w.numel())
    kind = recipe.kind.partition("_")[0] if recipe.kind.startswith(("mx", "zero")) else recipe.kind
    return _QUANTIZED[kind](x, recipe)


def values(rank: torch.Tensor, params: torch.Tensor, recipe: Format) -> torch.Tensor:
    """What the buckets dequantize to, before the cast to the model's dtype."""
    if recipe.n_params == 2:
        scale, offset = params[:, :1], params[:, 1:]
    else:
        scale = params[:, None]
    if recipe.kind == "symmetric":
        return (rank - 8).to(scale.dtype) * scale
    if recipe.kind == "zero_point":
        return ((rank + recipe.lowest).to(scale.dtype) - offset) * scale
    if recipe.kind == "zero_point_fp16":
        return (rank.to(offset.dtype) - offset).half() * scale.half()
    if recipe.kind == "minmax":
        return offset + (rank.float() + 0.5) * scale
    if recipe.kind == "q4_0":
        return (rank - 8).float() * scale.half().float()
    if recipe.kind == "q4_1":
        return rank.float() * scale.half().float() + offset.half().float()
    levels = torch.tensor(recipe.levels, device=rank.device)[rank]
    return levels * (offset * scale) if recipe.kind == "nvfp4" else levels * scale


def buckets(rank: torch.Tensor, params: torch.Tensor, recipe: Format) -> torch.Tensor:
    """Places on the number line, where FP4's two zeros are one."""
    if recipe.kind == "q4_0":
        return torch.where(params[:, None] < 0, 16 - rank, rank)
    return torch.tensor(recipe.buckets, device=rank.device)[rank] if recipe.thresholds else rank


def _rank(position: torch.Tensor, recipe: Format) -> torch.Tensor:
    return torch.bucketize(position, torch.tensor(recipe.thresholds, device=position.device), out_int32=True)


def _codebook(x: torch.Tensor, recipe: Format) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = x.abs().amax(dim=1).float()
    return _rank(x.float() * (1.0 / absmax.clamp(min=1e-38))[:, None], recipe), absmax


def _symmetric(x: torch.Tensor, recipe: Format) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = x.abs().amax(dim=1).to(recipe.params_dtype(x.dtype)).clamp(min=recipe.smallest)
    scale = absmax / torch.full_like(absmax[:1], recipe.divisor)
    scale = scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps)
    return (x / scale[:, None]).clamp(-8, 7).round().to(torch.int32) + 8, scale


def _zero_point(x: torch.Tensor, recipe: Format) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = torch.aminmax(x, dim=1)
    if recipe.zero_in_range:
        low, high = low.clamp(max=0), high.clamp(min=0)
    if recipe.like_gptq:
        zeros = low == high
        low, high = low.float().masked_fill(zeros, -1), high.float().masked_fill(zeros, 1)
    extent = (high - low).clamp(min=recipe.smallest)
    scale = extent / torch.full_like(extent[:1], 15)
    lowest, highest = recipe.lowest, recipe.lowest + 15
    zero_point = (lowest - low / scale).clamp(lowest, highest).round().nan_to_num(0) + 0
    scale = scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps)
    position = x / scale[:, None]
    if recipe.zero_point_first:
        q = (position + zero_point[:, None]).clamp(lowest, highest).round()
    else:
        q = (position.round() + zero_point[:, None]).clamp(lowest, highest)
    return q.to(torch.int32) - lowest, torch.stack([scale, zero_point], dim=1)


def _minmax(x: torch.Tensor, recipe: Format) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = (end.float() for end in torch.aminmax(x, dim=1))
    step = (high - low) / 16
    bucket = ((x.float() - low[:, None]) / step[:, None]).floor().clamp(0, 15).nan_to_num(0)
    return bucket.to(torch.int32), torch.stack([step, low], dim=1)


def _round_half_up(position: torch.Tensor, zero: float) -> torch.Tensor:
    return (position + (zero + 0.5)).clamp(0, 15).to(torch.int32)


def _inverse(d: torch.Tensor) -> torch.Tensor:
    return (1.0 / d).masked_fill(d == 0, 0)[:, None]


def _q4_0(x: torch.Tensor, recipe: Format) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.float()
    d = x.gather(1, x.abs().argmax(dim=1, keepdim=True)).squeeze(1) / -8
    return _round_half_up(x * _inverse(d), 8), d


def _q4_1(x: torch.Tensor, recipe: Format) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.float()
    low, high = torch.aminmax(x, dim=1)
    d = (high - low) / torch.full((), 15.0, device=x.device)
    return _round_half_up((x - low[:, None]) * _inverse(d), 0), torch.stack([d, low], dim=1)


def _apart_from_zero(position: torch.Tensor) -> torch.Tensor:
    return torch.where((position == 0) & position.signbit(), -0.125, position)


def _mx(x: torch.Tensor, recipe: Format) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.float()
    absmax = x.abs().amax(dim=1)
    scale = unit = recipe.fit(absmax[:, None], False, None)
    if recipe.kind == "mx_floor":
        unit = scale.clamp(min=2.0**-126)
    elif recipe.kind == "mx_rceil":
        unit = torch.where(scale == 2.0**-127, 1.0, scale)
    position = x / unit[:, None]
    if recipe.kind == "mx_gguf":
        return _rank(torch.where(position.abs() <= 0.25, 0.0, position), recipe), scale
    return _rank(_apart_from_zero(position), recipe), scale


def _nvfp4(x: torch.Tensor, recipe: Format) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.float()
    absmax = x.abs().amax(dim=1)
    of_tensor = (absmax.amax() / torch.full((), 2688.0, device=x.device)).clamp(min=2.0**-121)
    scale = absmax / torch.full((), 6.0, device=x.device) / of_tensor
    scale = scale.clamp(2.0**-6, 448.0).to(torch.float8_e4m3fn).float()
    position = x * (1.0 / of_tensor / scale)[:, None]
    return _rank(_apart_from_zero(position), recipe), torch.stack([scale, of_tensor.expand_as(scale)], dim=1)


_QUANTIZED = {
    "codebook": _codebook,
    "symmetric": _symmetric,
    "zero": _zero_point,
    "minmax": _minmax,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "mx": _mx,
    "nvfp4": _nvfp4,
}
