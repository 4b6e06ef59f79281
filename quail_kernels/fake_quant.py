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
formats/.
"""

import math

import torch

from . import cpu
from ._sharding import admit_dtensors
from ._triton import tl, triton
from .formats import (
    WEIGHT_DTYPES,
    Format,
    check_shape,
    check_weight,
    get_format,
    group_chunks,
    group_rows,
    group_spans,
    look_up,
)
from .formats.base import flat_part
from .formats.tiles import (
    in_parts,
    launch_options,
    strided,
    tile_addresses,
    tile_constants,
    tile_entry,
    tile_fit,
    tile_groups,
    tile_level,
    tile_mask,
    tile_offsets,
    tile_position,
    tile_scaled,
    tile_value,
)

_TILE = 2048
_QUANTIZE_BYTES = 8192  # of a tile: twice the weights of 16 bits spread a group's parameters and a store over more


def _fake_quant_torch(w: torch.Tensor, recipe: Format) -> torch.Tensor:
    w_q = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    of_tensor = recipe.fit_tensor(w)
    for span, _, x, short in group_chunks(w, recipe):
        params = recipe.params(x, short, of_tensor)
        w_q.view(-1)[span] = recipe.nearest(x, params, short).view(-1)
    return w_q


def _quantize_torch(w: torch.Tensor, recipe: Format) -> tuple[torch.Tensor, torch.Tensor]:
    n = w.numel()
    of_tensor = recipe.fit_tensor(w)
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    scales = torch.empty(recipe.params_shape(n), dtype=recipe.params_dtype(w.dtype), device=w.device)
    for span, groups, x, short in group_chunks(w, recipe):
        params = recipe.params(x, short, of_tensor)
        scales[groups] = params
        code = look_up(recipe.table("codes", w.device, torch.uint8), recipe.rank(x, params, short)).view(-1)
        if len(code) % 2:
            code = torch.cat([code, code.new_tensor([recipe.pad_code])])
        codes[_packed(span)] = code[0::2] << 4 | code[1::2]
    return codes, scales


def _dequantize_torch(
    codes: torch.Tensor, scales: torch.Tensor, recipe: Format, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    w_q = torch.empty(shape, dtype=dtype, device=codes.device)
    rank_by_code = torch.tensor(recipe.codes, device=codes.device).argsort().int()
    for span, groups, short in group_spans(w_q.numel(), recipe):
        packed = codes[_packed(span)]
        code = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: span.stop - span.start]
        rank = look_up(rank_by_code, group_rows(code, recipe, short).int())
        w_q.view(-1)[span] = recipe.value(rank, scales[groups]).view(-1)
    return w_q


def _packed(span: slice) -> slice:
    """Where the codes of these weights lie: a span starts with a group, so at an even weight."""
    return slice(span.start // 2, (span.stop + 1) // 2)


def _fake_quant_cpu(w: torch.Tensor, recipe: Format) -> torch.Tensor:
    loops = cpu.loops_for(recipe, w)
    if loops is None:
        return _fake_quant_torch(w, recipe)
    w_q = torch.empty(w.shape, dtype=w.dtype)
    numbers, out = cpu.recipe_of(recipe, w.dtype), cpu.bits_of(w_q)

    def work(span: slice) -> None:
        loops.fake_quant(cpu.bits_of(flat_part(w, span)), numbers, out[span])

    cpu.in_threads(work, cpu.spans_of(w.numel(), recipe.group_size))
    return w_q


def _quantize_cpu(w: torch.Tensor, recipe: Format) -> tuple[torch.Tensor, torch.Tensor]:
    loops = cpu.loops_for(recipe, w)
    if loops is None:
        return _quantize_torch(w, recipe)
    n, size = w.numel(), recipe.group_size
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8)
    params = torch.empty((recipe.groups(n), 2))
    numbers, packed, by_group = cpu.recipe_of(recipe, w.dtype), codes.numpy(), params.numpy()

    def work(span: slice) -> None:
        groups = slice(span.start // size, -(-span.stop // size))
        loops.quantize(cpu.bits_of(flat_part(w, span)), numbers, packed[_packed(span)], by_group[groups])

    cpu.in_threads(work, cpu.spans_of(n, recipe.group_size))
    scales = torch.empty(recipe.params_shape(n), dtype=recipe.params_dtype(w.dtype))
    scales.view(-1, recipe.n_params).copy_(params[:, : recipe.n_params])
    return codes, scales


def _dequantize_cpu(
    codes: torch.Tensor, scales: torch.Tensor, recipe: Format, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    w_q = torch.empty(shape, dtype=dtype)
    loops = cpu.loops_for(recipe, w_q)
    if loops is None or scales.dtype != recipe.params_dtype(dtype):
        return _dequantize_torch(codes, scales, recipe, shape, dtype)
    n, size = w_q.numel(), recipe.group_size
    params = torch.zeros((recipe.groups(n), 2))
    params[:, : recipe.n_params] = scales.reshape(-1, recipe.n_params)
    numbers, out = cpu.recipe_of(recipe, dtype), cpu.bits_of(w_q)
    packed, by_group = codes.contiguous().numpy(), params.numpy()

    def work(span: slice) -> None:
        groups = slice(span.start // size, -(-span.stop // size))
        loops.dequantize(packed[_packed(span)], by_group[groups], numbers, out[span])

    cpu.in_threads(work, cpu.spans_of(n, recipe.group_size))
    return w_q


@triton.jit
def _fake_quant_fwd_kernel(
    w_q_ptr,
    w_ptr,
    w_stride_0,
    w_stride_1,
    w_stride_2,
    w_size_1,
    w_size_2,
    of_tensor_ptr,
    table_ptr,
    n,
    KIND: tl.constexpr,
    RULE: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    LEVELS: tl.constexpr,
    NEEDS_TENSOR: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    HAS_SHORT: tl.constexpr,
    FULL: tl.constexpr,
    IN_ROWS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Reads each weight once and writes it once: 4 bytes a weight in bf16 and fp16, 8 in fp32.

    On sm_90 about 16 instructions (fake_quant bnb-nf4 bf16), about 16 instructions (fake_quant ct-int4-sym bf16); an
    H100 has time for 35 in 4 bytes.
    """
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    lane_group, offsets, lane_mask = tile_offsets(tile, n, FULL, GROUP_SIZE, BLOCK_GROUPS, BLOCK_SIZE, BLOCK_PARTS)
    group, mask = tile_groups(tile, BLOCK_GROUPS), tile_mask(lane_mask, FULL, BLOCK_GROUPS, BLOCK_PARTS)
    short = (group + 1) * GROUP_SIZE > n
    addresses = tile_addresses(
        lane_group,
        offsets,
        w_stride_0,
        w_stride_1,
        w_stride_2,
        w_size_1,
        w_size_2,
        IN_ROWS,
        GROUP_SIZE,
        BLOCK_GROUPS,
        BLOCK_PARTS,
    )
    x = in_parts(tl.load(w_ptr + addresses, mask=lane_mask, other=0.0), BLOCK_GROUPS, BLOCK_PARTS).to(tl.float32)
    if PER_TENSOR:
        scale, aux = tl.load(of_tensor_ptr), tl.load(of_tensor_ptr + 1)
    else:
        of_tensor = tl.load(of_tensor_ptr) if NEEDS_TENSOR else 0.0
        scale, aux, _ = tile_fit(x, mask, short, of_tensor, dtype, KIND, RULE, HAS_SHORT)
    pos = tile_position(x, scale, aux, short, dtype, KIND, RULE, HAS_SHORT, True)
    w_q = tile_value(pos, scale, aux, table_ptr, KIND, RULE, THRESHOLDS, LEVELS)
    tl.store(w_q_ptr + offsets, w_q.to(dtype).reshape(offsets.shape), mask=lane_mask)


@triton.jit
def _quantize_fwd_kernel(
    codes_ptr,
    scales_ptr,
    w_ptr,
    w_stride_0,
    w_stride_1,
    w_stride_2,
    w_size_1,
    w_size_2,
    of_tensor_ptr,
    table_ptr,
    n,
    n_codes,
    KIND: tl.constexpr,
    RULE: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    LEVELS: tl.constexpr,
    CODES: tl.constexpr,
    N_PARAMS: tl.constexpr,
    PAD_CODE: tl.constexpr,
    NEEDS_TENSOR: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    HAS_SHORT: tl.constexpr,
    FULL: tl.constexpr,
    IN_ROWS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Reads each weight once and writes half a byte for it, and its group's parameters once: in bf16 2.5 bytes a
    weight, and 4 (bitsandbytes), 2 (``ct-int4-sym``) or 8 (``minmax-int4``) a group.

    On sm_90 about 17 instructions (quantize bnb-nf4 bf16), about 15 instructions (quantize ct-int4-sym bf16), at most
    about 21 instructions (quantize ct-int4-asym bf16); an H100 has time for 22 in 2.5 bytes.
    """
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    lane_group, offsets, lane_mask = tile_offsets(tile, n, FULL, GROUP_SIZE, BLOCK_GROUPS, BLOCK_SIZE, BLOCK_PARTS)
    group, mask = tile_groups(tile, BLOCK_GROUPS), tile_mask(lane_mask, FULL, BLOCK_GROUPS, BLOCK_PARTS)
    short = (group + 1) * GROUP_SIZE > n
    addresses = tile_addresses(
        lane_group,
        offsets,
        w_stride_0,
        w_stride_1,
        w_stride_2,
        w_size_1,
        w_size_2,
        IN_ROWS,
        GROUP_SIZE,
        BLOCK_GROUPS,
        BLOCK_PARTS,
    )
    x = in_parts(tl.load(w_ptr + addresses, mask=lane_mask, other=0.0), BLOCK_GROUPS, BLOCK_PARTS).to(tl.float32)
    if PER_TENSOR:
        scale, aux = tl.load(of_tensor_ptr), tl.load(of_tensor_ptr + 1)
    else:
        of_tensor = tl.load(of_tensor_ptr) if NEEDS_TENSOR else 0.0
        scale, aux, _ = tile_fit(x, mask, short, of_tensor, dtype, KIND, RULE, HAS_SHORT)
        is_group = group * GROUP_SIZE < n
        tl.store(scales_ptr + N_PARAMS * group, scale.to(scales_ptr.dtype.element_ty), mask=is_group)
        if N_PARAMS == 2:
            tl.store(scales_ptr + 2 * group + 1, aux.to(scales_ptr.dtype.element_ty), mask=is_group)
    pos = tile_position(x, scale, aux, short, dtype, KIND, RULE, HAS_SHORT, True)
    code = tl.where(mask, tile_entry(pos, aux, table_ptr, KIND, RULE, THRESHOLDS, LEVELS, CODES), PAD_CODE)
    PART: tl.constexpr = BLOCK_SIZE // BLOCK_PARTS
    high, low_nibble = tl.split(code.reshape(BLOCK_PARTS, BLOCK_GROUPS, PART // 2, 2))
    packed = (high * 16 + low_nibble).to(tl.uint8)
    # In the order of memory, and in pairs of weights: the compiler then sees that a thread's bytes are neighbours.
    lanes = tl.arange(0, BLOCK_GROUPS * BLOCK_SIZE // 2)
    if GROUP_SIZE == BLOCK_SIZE:
        pairs = tile * (BLOCK_GROUPS * GROUP_SIZE // 2) + lanes
        pair_mask = pairs < n_codes
    else:
        row, pair = lanes // (BLOCK_SIZE // 2), lanes % (BLOCK_SIZE // 2)
        pairs = (tile * BLOCK_GROUPS + row) * (GROUP_SIZE // 2) + pair
        pair_mask = (pair < GROUP_SIZE // 2) & (pairs < n_codes)
    if FULL:
        pair_mask = tl.full(pairs.shape, 1, tl.int1)
    tl.store(codes_ptr + pairs, tl.permute(packed, (1, 0, 2)).reshape(lanes.shape), mask=pair_mask)


@triton.jit
def _dequantize_fwd_kernel(
    w_q_ptr,
    codes_ptr,
    codes_stride,
    scales_ptr,
    scales_stride_0,
    scales_stride_1,
    table_ptr,
    n,
    n_codes,
    KIND: tl.constexpr,
    LEVELS: tl.constexpr,
    N_PARAMS: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    FULL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Reads half a byte a weight and the parameters of its group, and writes the weight: in bf16 2.5 bytes a weight,
    and what ``_quantize_fwd_kernel`` writes a group.

    On sm_90 about 13 instructions (dequantize bnb-nf4 bf16), about 12 instructions (dequantize ct-int4-sym bf16).
    """
    tile = tl.program_id(0).to(tl.int64)
    lane_group, offsets, lane_mask = tile_offsets(tile, n, FULL, GROUP_SIZE, BLOCK_GROUPS, BLOCK_SIZE, BLOCK_PARTS)
    group = tile_groups(tile, BLOCK_GROUPS)
    pair = tl.arange(0, BLOCK_SIZE // 2)[None, None, :]
    pairs = group * (GROUP_SIZE // 2) + pair
    pair_mask = (pair < GROUP_SIZE // 2) & (pairs < n_codes)
    packed = tl.load(codes_ptr + pairs * codes_stride, mask=pair_mask, other=0).to(tl.int32)
    code = tl.join(packed >> 4, packed & 15).reshape(1, BLOCK_GROUPS, BLOCK_SIZE)
    level = tile_level(code, table_ptr, KIND, LEVELS)
    if PER_TENSOR:
        group = tl.zeros_like(group)
    is_group = group * GROUP_SIZE < n
    scales_ptr += group * scales_stride_0
    scale = tl.load(scales_ptr, mask=is_group, other=0.0)
    aux = tl.load(scales_ptr + scales_stride_1, mask=is_group, other=0.0).to(tl.float32) if N_PARAMS == 2 else 0.0
    w_q = tile_scaled(level, scale.to(tl.float32), aux, KIND)
    if KIND == "symmetric" or KIND == "zero_point" or KIND == "zero_point_fp16":
        w_q = w_q.to(scale.dtype)
    tl.store(w_q_ptr + offsets, w_q.to(w_q_ptr.dtype.element_ty).reshape(offsets.shape), mask=lane_mask)


def _programs(n: int, constants: dict) -> tuple[int]:
    return (-(-n // (constants["GROUP_SIZE"] * constants["BLOCK_GROUPS"])),)


def _fake_quant_triton(w: torch.Tensor, recipe: Format, tile: int = _TILE) -> torch.Tensor:
    n = w.numel()
    w_q = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    if not n:
        return w_q
    w, layout = strided(w)
    # Sixteen weights a thread, in chunks of 128 bits.
    size = w.element_size()
    constants = recipe.kernel_constants(w.dtype) | tile_constants(recipe, n, tile, layout, parts=size, chunk=16 // size)
    with torch.cuda.device_of(w):
        _fake_quant_fwd_kernel[_programs(n, constants)](
            w_q,
            w,
            *layout,
            recipe.fit_tensor(w),
            recipe.kernel_table(w.device),
            n,
            LEVELS=recipe.levels,
            **constants,
            **launch_options(constants),
        )
    return w_q


def _quantize_triton(w: torch.Tensor, recipe: Format, tile: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    n = w.numel()
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    w, layout = strided(w)
    of_tensor = recipe.fit_tensor(w)
    if recipe.group_size is None and n:
        scales = of_tensor
    else:
        scales = torch.empty(recipe.params_shape(n), dtype=recipe.params_dtype(w.dtype), device=w.device)
    if not n:
        return codes, scales
    # In chunks of 16 bytes a thread has 64, so that in four parts they are of one group.
    tile = tile or _QUANTIZE_BYTES // w.element_size()
    constants = recipe.kernel_constants(w.dtype) | tile_constants(recipe, n, tile, layout, parts=4)
    with torch.cuda.device_of(w):
        _quantize_fwd_kernel[_programs(n, constants)](
            codes,
            scales,
            w,
            *layout,
            of_tensor,
            recipe.kernel_table(w.device),
            n,
            codes.numel(),
            LEVELS=recipe.levels,
            CODES=recipe.column("codes"),
            N_PARAMS=recipe.n_params,
            PAD_CODE=recipe.pad_code,
            **constants,
            **launch_options(constants, 64 // w.element_size()),
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
    del constants["HAS_SHORT"], constants["IN_ROWS"]
    with torch.cuda.device_of(codes):
        _dequantize_fwd_kernel[_programs(w_q.numel(), constants)](
            w_q,
            codes,
            codes.stride(0),
            scales,
            scales.stride(0),
            scales.stride(1) if scales.dim() == 2 else None,
            recipe.kernel_table(codes.device),
            w_q.numel(),
            codes.numel(),
            KIND=recipe.kind,
            N_PARAMS=recipe.n_params,
            LEVELS=recipe.levels,
            **constants,
            **options,
        )
    return w_q


# Among a DTensor's arguments only those from the first integer on tell one sharding from another: the format
# comes after the group size.
@torch.library.custom_op("quail::fake_quant", mutates_args=(), device_types="cpu")
def _fake_quant_op(w: torch.Tensor, group_size: int | None, format: str) -> torch.Tensor:
    return _fake_quant_cpu(w, get_format(format, group_size))


@_fake_quant_op.register_kernel("cuda")
def _(w, group_size, format):
    return _fake_quant_triton(w, get_format(format, group_size))


@_fake_quant_op.register_fake
def _(w, *_):
    return w.new_empty(w.shape)


_fake_quant_op.register_autograd(lambda ctx, grad: (grad, None, None))


@torch.library.custom_op("quail::quantize", mutates_args=(), device_types="cpu")
def _quantize_op(w: torch.Tensor, group_size: int | None, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize_cpu(w, get_format(format, group_size))


@_quantize_op.register_kernel("cuda")
def _(w, group_size, format):
    return _quantize_triton(w, get_format(format, group_size))


@_quantize_op.register_fake
def _(w, group_size, format):
    recipe = get_format(format, group_size)
    codes = w.new_empty((w.numel() + 1) // 2, dtype=torch.uint8)
    return codes, w.new_empty(recipe.params_shape(w.numel()), dtype=recipe.params_dtype(w.dtype))


@torch.library.custom_op("quail::dequantize", mutates_args=(), device_types="cpu")
def _dequantize_op(
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int | None,
    format: str,
    shape: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    return _dequantize_cpu(codes, scales, get_format(format, group_size), shape, dtype)


@_dequantize_op.register_kernel("cuda")
def _(codes, scales, group_size, format, shape, dtype):
    return _dequantize_triton(codes, scales, get_format(format, group_size), shape, dtype)


@_dequantize_op.register_fake
def _(codes, scales, group_size, format, shape, dtype):
    return codes.new_empty(shape, dtype=dtype)


def fake_quant(w: torch.Tensor, format: str, group_size: int | None = None) -> torch.Tensor:
    """The weights that a deployment of ``w`` in ``format`` would compute with.

    Args:
        w: float32, bfloat16 or float16, any shape, on the CPU or on CUDA. Groups are cut from the tensor as
            flattening orders it, whatever its strides. It is read in place, 128 bits at a time where its innermost
            dimension is contiguous, aligned and whole groups long; a transposed one costs more than its bytes.
            Only a weight of more than three dimensions that do not merge is copied.
        format: a recipe of ``FORMATS``, as ``"bnb-nf4"`` or, with its group size, ``"ct-int4-sym@64"``.
        group_size: the group size, unless ``format`` says it; None takes the recipe's default.

    Returns:
        A contiguous tensor of w's shape and dtype. Its gradient goes to ``w`` unchanged. A NaN in w makes its group
        NaN; an infinity becomes no number, and what it makes of its group is said with each recipe. Of a DTensor,
        a DTensor: sharded as it was where no group straddles ranks and the recipe does not look at the whole
        tensor, gathered first where not.

    Raises:
        ValueError: on an unknown format, a group size that is not legal for it or does not divide the last
            dimension where it has to, or another dtype.
    """
    check_weight("w", w, get_format(format, group_size))
    admit_dtensors(w)
    return _fake_quant_op(w, group_size, format)


def quantize(w: torch.Tensor, format: str, group_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The 4-bit codes and the scales of ``w``: what a deployment would store.

    Takes and refuses what ``fake_quant`` does. Not differentiable. A DTensor gives DTensors, sharded where its first
    dimension is, evenly, and no group straddles ranks.

    Returns:
        codes: uint8 [ceil(n / 2)], the first of two weights in the high nibble; an odd tail is filled with
            the code of a zero weight (``minmax-int4``: code 0).
        scales: what the recipe stores for each group, [groups], or [groups, 2] where it is two numbers:
            fp32 absmax (bitsandbytes); the scale in w's dtype (``ct-int4-sym``, ``awq-int4-sym``) or in fp32
            (``mslk-int4-sym``); scale and zero point in w's dtype (``ct-int4-asym``, ``awq-int4-asym``) or in
            fp16 (``gptq-int4-asym``); fp32 step and minimum (``minmax-int4``); fp16 d (``gguf-q4_0``) or d and
            minimum (``gguf-q4_1``); the power of two in fp32 (``mxfp4`` and its kin); fp32 E4M3 scale and
            scale of the tensor (``nvfp4``).
    """
    check_weight("w", w, get_format(format, group_size))
    admit_dtensors(w)
    return _quantize_op(w.detach(), group_size, format)


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

    Codes and scales may be strided; DTensors are gathered first.

    Raises:
        ValueError: where the format is unknown, or codes and scales are not what ``quantize`` gives for that
            shape.
    """
    recipe = get_format(format, group_size)
    check_shape("shape", shape, recipe)
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16 or float16; got {dtype}")
    n = math.prod(shape)
    if codes.dtype != torch.uint8 or codes.shape != ((n + 1) // 2,):
        got = f"{codes.dtype} {list(codes.shape)}"
        raise ValueError(f"codes: expected torch.uint8 [{(n + 1) // 2}] for shape {tuple(shape)}; got {got}")
    if scales.dtype not in WEIGHT_DTYPES or scales.shape != recipe.params_shape(n):
        expected = f"floating-point {list(recipe.params_shape(n))} for {n} weights in {recipe}"
        raise ValueError(f"scales: expected {expected}; got {scales.dtype} {list(scales.shape)}")
    admit_dtensors(codes, scales)
    return _dequantize_op(codes.detach(), scales.detach(), group_size, format, list(shape), dtype)
