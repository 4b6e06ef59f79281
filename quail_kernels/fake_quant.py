r"""Quantize, dequantize, and both at once: what a deployment in 4 bits would make of a weight.

    quantize(w)                 = codes, scales     two codes a byte, the first weight in the high nibble
    dequantize(codes, scales)   = w_q               in the shape and dtype of w
    fake_quant(w)               = dequantize(quantize(w))

A step function has no useful derivative, so fake_quant takes the straight-through one (Bengio, Leonard and
Courville, https://arxiv.org/abs/1308.3432): dL/dw = dL/dw_q for every weight, also for the one that defines
the scale and sits on the edge of the clamp. A gradient masked by the clamp would never again move the largest
weight of a group.

fake_quant reads each weight once and writes it once. A recipe with one group for the whole tensor
(``minmax-int4``) reads it once more before that, for its range. The arithmetic of each recipe stands in
formats.py.
"""

import math

import torch

from ._triton import tl, triton
from .formats import WEIGHT_DTYPES, Format, check_shape, check_weight, get_format, group_chunks
from .formats.tiles import (
    launch_options,
    tile_constants,
    tile_entry,
    tile_fit,
    tile_level,
    tile_offsets,
    tile_position,
    tile_scaled,
    tile_value,
)

_TILE = 2048


def _fake_quant_torch(w: torch.Tensor, recipe: Format) -> torch.Tensor:
    flat = w.reshape(-1)
    w_q = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    of_tensor = recipe.fit_tensor(flat)
    for span, _, x, short in group_chunks(flat, recipe):
        params = recipe.params(x, short, of_tensor)
        w_q.view(-1)[span] = recipe.value(recipe.rank(x, params, short), params).view(-1)
    return w_q


def _quantize_torch(w: torch.Tensor, recipe: Format) -> tuple[torch.Tensor, torch.Tensor]:
    flat = w.reshape(-1)
    n = flat.numel()
    of_tensor = recipe.fit_tensor(flat)
    codes = torch.full((n + n % 2,), recipe.pad_code, dtype=torch.uint8, device=w.device)
    scales = torch.empty(recipe.params_shape(n), dtype=recipe.params_dtype(w.dtype), device=w.device)
    code_by_rank = torch.tensor(recipe.codes, dtype=torch.uint8, device=w.device)
    for span, groups, x, short in group_chunks(flat, recipe):
        params = recipe.params(x, short, of_tensor)
        scales[groups] = params
        codes[span] = code_by_rank[recipe.rank(x, params, short)].view(-1)
    return codes[0::2] << 4 | codes[1::2], scales


def _dequantize_torch(
    codes: torch.Tensor, scales: torch.Tensor, recipe: Format, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    n = math.prod(shape)
    flat = torch.stack([codes >> 4, codes & 15], dim=1).view(-1)[:n]
    w_q = torch.empty(shape, dtype=dtype, device=codes.device)
    rank_by_code = torch.tensor(recipe.codes, device=codes.device).argsort()
    for span, groups, code, _ in group_chunks(flat, recipe):
        w_q.view(-1)[span] = recipe.value(rank_by_code[code.int()], scales[groups]).view(-1)
    return w_q


@triton.jit
def _fake_quant_fwd_kernel(
    w_q_ptr,
    w_ptr,
    of_tensor_ptr,
    n,
    KIND: tl.constexpr,
    RULE: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    LEVELS: tl.constexpr,
    NEEDS_TENSOR: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    HAS_SHORT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    group, offsets, mask = tile_offsets(n, GROUP_SIZE, BLOCK_GROUPS, BLOCK_SIZE)
    short = (group + 1) * GROUP_SIZE > n
    x = tl.load(w_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if PER_TENSOR:
        scale, aux = tl.load(of_tensor_ptr), tl.load(of_tensor_ptr + 1)
    else:
        of_tensor = tl.load(of_tensor_ptr) if NEEDS_TENSOR else 0.0
        scale, aux = tile_fit(x, mask, short, of_tensor, dtype, KIND, RULE)
    pos = tile_position(x, scale, aux, short, dtype, KIND, RULE, HAS_SHORT)
    w_q = tile_value(pos, scale, aux, KIND, THRESHOLDS, LEVELS)
    tl.store(w_q_ptr + offsets, w_q.to(dtype), mask=mask)


@triton.jit
def _quantize_fwd_kernel(
    codes_ptr,
    scales_ptr,
    w_ptr,
    of_tensor_ptr,
    n,
    KIND: tl.constexpr,
    RULE: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    CODES: tl.constexpr,
    N_PARAMS: tl.constexpr,
    PAD_CODE: tl.constexpr,
    NEEDS_TENSOR: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    HAS_SHORT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    group, offsets, mask = tile_offsets(n, GROUP_SIZE, BLOCK_GROUPS, BLOCK_SIZE)
    short = (group + 1) * GROUP_SIZE > n
    x = tl.load(w_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if PER_TENSOR:
        scale, aux = tl.load(of_tensor_ptr), tl.load(of_tensor_ptr + 1)
    else:
        of_tensor = tl.load(of_tensor_ptr) if NEEDS_TENSOR else 0.0
        scale, aux = tile_fit(x, mask, short, of_tensor, dtype, KIND, RULE)
        is_group = group * GROUP_SIZE < n
        tl.store(scales_ptr + N_PARAMS * group, scale.to(scales_ptr.dtype.element_ty), mask=is_group)
        if N_PARAMS == 2:
            tl.store(scales_ptr + 2 * group + 1, aux.to(scales_ptr.dtype.element_ty), mask=is_group)
    pos = tile_position(x, scale, aux, short, dtype, KIND, RULE, HAS_SHORT)
    code = tl.where(mask, tile_entry(pos, KIND, THRESHOLDS, CODES), PAD_CODE)
    high, low_nibble = tl.split(code.reshape(BLOCK_GROUPS, BLOCK_SIZE // 2, 2))
    pair = tl.arange(0, BLOCK_SIZE // 2)[None, :]
    first = group * GROUP_SIZE + 2 * pair
    pair_mask = (2 * pair < GROUP_SIZE) & (first < n)
    tl.store(codes_ptr + first // 2, (high * 16 + low_nibble).to(tl.uint8), mask=pair_mask)


@triton.jit
def _dequantize_fwd_kernel(
    w_q_ptr,
    codes_ptr,
    scales_ptr,
    n,
    KIND: tl.constexpr,
    LEVELS_BY_CODE: tl.constexpr,
    N_PARAMS: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    group, offsets, mask = tile_offsets(n, GROUP_SIZE, BLOCK_GROUPS, BLOCK_SIZE)
    pair = tl.arange(0, BLOCK_SIZE // 2)[None, :]
    first = group * GROUP_SIZE + 2 * pair
    pair_mask = (2 * pair < GROUP_SIZE) & (first < n)
    packed = tl.load(codes_ptr + first // 2, mask=pair_mask, other=0).to(tl.int32)
    code = tl.join(packed >> 4, packed & 15).reshape(BLOCK_GROUPS, BLOCK_SIZE)
    level = tile_level(code, KIND, LEVELS_BY_CODE)
    if PER_TENSOR:
        group = tl.zeros_like(group)
    is_group = group * GROUP_SIZE < n
    scale = tl.load(scales_ptr + N_PARAMS * group, mask=is_group, other=0.0)
    aux = tl.load(scales_ptr + 2 * group + 1, mask=is_group, other=0.0).to(tl.float32) if N_PARAMS == 2 else 0.0
    w_q = tile_scaled(level, scale.to(tl.float32), aux, KIND)
    if KIND == "symmetric":
        w_q = w_q.to(scale.dtype)
    tl.store(w_q_ptr + offsets, w_q.to(w_q_ptr.dtype.element_ty), mask=mask)


def _programs(n: int, constants: dict) -> tuple[int]:
    return (-(-n // (constants["GROUP_SIZE"] * constants["BLOCK_GROUPS"])),)


def _fake_quant_triton(w: torch.Tensor, recipe: Format, tile: int = _TILE) -> torch.Tensor:
    w = w.contiguous()
    w_q = torch.empty_like(w)
    if not w.numel():
        return w_q
    constants = recipe.kernel_constants(w.dtype) | tile_constants(recipe, w.numel(), tile)
    with torch.cuda.device_of(w):
        _fake_quant_fwd_kernel[_programs(w.numel(), constants)](
            w_q,
            w,
            recipe.fit_tensor(w.view(-1)),
            w.numel(),
            LEVELS=recipe.levels,
            **constants,
            **launch_options(constants),
        )
    return w_q


def _quantize_triton(w: torch.Tensor, recipe: Format, tile: int = _TILE) -> tuple[torch.Tensor, torch.Tensor]:
    w = w.contiguous()
    n = w.numel()
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    of_tensor = recipe.fit_tensor(w.view(-1))
    if recipe.group_size is None and n:
        scales = of_tensor
    else:
        scales = torch.empty(recipe.params_shape(n), dtype=recipe.params_dtype(w.dtype), device=w.device)
    if not n:
        return codes, scales
    constants = recipe.kernel_constants(w.dtype) | tile_constants(recipe, n, tile)
    with torch.cuda.device_of(w):
        _quantize_fwd_kernel[_programs(n, constants)](
            codes,
            scales,
            w,
            of_tensor,
            n,
            CODES=recipe.codes,
            N_PARAMS=recipe.n_params,
            PAD_CODE=recipe.pad_code,
            **constants,
            **launch_options(constants),
        )
    return codes, scales


def _dequantize_triton(
    codes: torch.Tensor,
    scales: torch.Tensor,
    recipe: Format,
    shape: torch.Size,
    dtype: torch.dtype,
    tile: int = _TILE,
) -> torch.Tensor:
    w_q = torch.empty(shape, dtype=dtype, device=codes.device)
    if not w_q.numel():
        return w_q
    constants = tile_constants(recipe, w_q.numel(), tile)
    options = launch_options(constants)
    del constants["HAS_SHORT"]
    with torch.cuda.device_of(codes):
        _dequantize_fwd_kernel[_programs(w_q.numel(), constants)](
            w_q,
            codes.contiguous(),
            scales.contiguous(),
            w_q.numel(),
            KIND=recipe.kind,
            N_PARAMS=recipe.n_params,
            LEVELS_BY_CODE=tuple(recipe.levels[recipe.codes.index(code)] for code in range(16)),
            **constants,
            **options,
        )
    return w_q


@torch.library.custom_op("quail::fake_quant", mutates_args=(), device_types="cpu")
def _fake_quant_op(w: torch.Tensor, format: str, group_size: int | None) -> torch.Tensor:
    return _fake_quant_torch(w, get_format(format, group_size))


@_fake_quant_op.register_kernel("cuda")
def _(w: torch.Tensor, format: str, group_size: int | None) -> torch.Tensor:
    return _fake_quant_triton(w, get_format(format, group_size))


@_fake_quant_op.register_fake
def _(w: torch.Tensor, format: str, group_size: int | None) -> torch.Tensor:
    return w.new_empty(w.shape)


_fake_quant_op.register_autograd(lambda ctx, grad: (grad, None, None))


@torch.library.custom_op("quail::quantize", mutates_args=(), device_types="cpu")
def _quantize_op(w: torch.Tensor, format: str, group_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize_torch(w, get_format(format, group_size))


@_quantize_op.register_kernel("cuda")
def _(w: torch.Tensor, format: str, group_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize_triton(w, get_format(format, group_size))


@_quantize_op.register_fake
def _(w: torch.Tensor, format: str, group_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    recipe = get_format(format, group_size)
    codes = w.new_empty((w.numel() + 1) // 2, dtype=torch.uint8)
    return codes, w.new_empty(recipe.params_shape(w.numel()), dtype=recipe.params_dtype(w.dtype))


@torch.library.custom_op("quail::dequantize", mutates_args=(), device_types="cpu")
def _dequantize_op(
    codes: torch.Tensor,
    scales: torch.Tensor,
    format: str,
    group_size: int | None,
    shape: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    return _dequantize_torch(codes, scales, get_format(format, group_size), shape, dtype)


@_dequantize_op.register_kernel("cuda")
def _(
    codes: torch.Tensor,
    scales: torch.Tensor,
    format: str,
    group_size: int | None,
    shape: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    return _dequantize_triton(codes, scales, get_format(format, group_size), shape, dtype)


@_dequantize_op.register_fake
def _(
    codes: torch.Tensor,
    scales: torch.Tensor,
    format: str,
    group_size: int | None,
    shape: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    return codes.new_empty(shape, dtype=dtype)


def fake_quant(w: torch.Tensor, format: str, group_size: int | None = None) -> torch.Tensor:
    """The weights that a deployment of ``w`` in ``format`` would compute with.

    Args:
        w: float32, bfloat16 or float16, any shape, on the CPU or on CUDA. Groups are cut from the flattened
            contiguous tensor: a weight that is not contiguous is copied first.
        format: a recipe of formats.py, as ``"bnb-nf4"`` or, with its group size, ``"ct-int4-sym@64"``.
        group_size: the group size, unless ``format`` says it; None takes the recipe's default.

    Returns:
        A contiguous tensor of w's shape and dtype. Its gradient goes to ``w`` unchanged.

    Raises:
        ValueError: on an unknown format, a group size that is not legal for it or does not divide the last
            dimension where it has to, or another dtype.
    """
    check_weight("w", w, get_format(format, group_size))
    return _fake_quant_op(w, format, group_size)


def quantize(w: torch.Tensor, format: str, group_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The 4-bit codes and the scales of ``w``: what a deployment would store.

    Takes and refuses what ``fake_quant`` does. Not differentiable.

    Returns:
        codes: uint8 [ceil(n / 2)], the first of two weights in the high nibble; an odd tail is filled with
            the code of a zero weight (``minmax-int4``: code 0).
        scales: one a group: fp32 absmax [groups] (bitsandbytes), the scale in w's dtype [groups]
            (``ct-int4-sym``), fp32 [groups, 2] = (step, minimum) (``minmax-int4``), fp16 d [groups]
            (``gguf-q4_0``) or [groups, 2] = (d, minimum) (``gguf-q4_1``), the power of two in fp32 [groups]
            (``mxfp4`` and its kin), or fp32 [groups, 2] = (E4M3 scale, scale of the tensor) (``nvfp4``).
    """
    check_weight("w", w, get_format(format, group_size))
    return _quantize_op(w.detach(), format, group_size)


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    format: str,
    group_size: int | None = None,
    *,
    shape: torch.Size | tuple[int, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weights that these codes and scales of ``quantize`` stand for, in that shape and dtype.

    Raises:
        ValueError: where the format is unknown, or codes and scales are not what ``quantize`` gives for that
            shape.
    """
    recipe = get_format(format, group_size)
    shape = torch.Size(shape)
    check_shape("shape", shape, recipe)
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16 or float16; got {dtype}")
    n = shape.numel()
    if codes.dtype != torch.uint8 or codes.shape != ((n + 1) // 2,):
        got = f"{codes.dtype} {list(codes.shape)}"
        raise ValueError(f"codes: expected torch.uint8 [{(n + 1) // 2}] for shape {tuple(shape)}; got {got}")
    if scales.dtype not in WEIGHT_DTYPES or scales.shape != recipe.params_shape(n):
        expected = f"floating-point {list(recipe.params_shape(n))} for {n} weights in {recipe}"
        raise ValueError(f"scales: expected {expected}; got {scales.dtype} {list(scales.shape)}")
    return _dequantize_op(codes.detach(), scales.detach(), format, group_size, shape, dtype)
