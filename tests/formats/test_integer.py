"""The integer recipes against the libraries that they are named after, code for code and value for value.

AutoAWQ, MSLK and GPTQModel do not install beside this stack: their formulas stand here a second time, in NumPy. That
these give what the libraries' own functions give was checked with those functions, on the weights that
formats/README.md names.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from awkward_weights import awkward, gaussian
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle import forward as ct
from compressed_tensors.quantization.utils import calculate_qparams
from torchao.quantization import quant_primitives as ao

import quail_kernels
from quail_kernels import dequantize, fake_quant, get_format, quantize
from quail_kernels.formats import WEIGHT_DTYPES

DTYPES = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
SYMMETRIC = ["ct-int4-sym", "awq-int4-sym", "mslk-int4-sym"]
ASYMMETRIC = ["gptq-int4-asym", "awq-int4-asym", "ct-int4-asym"]
FORMATS = pytest.mark.parametrize("format", SYMMETRIC + ASYMMETRIC)


def weights(dtype, rows):
    return torch.cat([gaussian(rows, dtype), awkward(dtype)])


TEN_MILLION = 8690  # rows


def unpack(codes):
    return torch.stack([codes >> 4, codes & 15], dim=1).view(-1)


def assert_equal(got, expected, what):
    """Equal as numbers, NaN where NaN is; -0 is 0."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    different = (got != expected) & ~(got.isnan() & expected.isnan())
    at = different.nonzero()[:3].tolist()
    assert not at, f"{what}: {different.sum()} of {got.numel()} differ, first at {at}"


def check(w, format, group_size, code, params, value):
    """``code`` as stored, ``params`` [groups, n_params], ``value`` in the dtype of w: all from elsewhere."""
    codes, scales = quantize(w, format, group_size)
    recipe = get_format(format, group_size)
    # Where a scale is not finite, so is no weight of its group, and no library says what the codes are.
    judged = params[:, :1].isfinite().expand(-1, group_size).reshape(-1)
    assert_equal(unpack(codes).int()[judged], code.reshape(-1).int()[judged], "codes")
    assert_equal(scales.view(params.shape)[:, 0], params[:, 0], "scales")
    if recipe.n_params == 2:
        judged = params[:, 0].isfinite()
        assert_equal(scales[judged, 1], params[judged, 1], "zero points")
    assert_equal(fake_quant(w, format, group_size), value, "fake_quant")
    again = dequantize(codes, scales, format, group_size, shape=w.shape, dtype=w.dtype)
    assert_equal(again, value, "dequantize")


def compressed_tensors(w, group_size, symmetric):
    """(code, params, value, value by way of the codes) from the library."""
    args = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=group_size)
    groups = w.unflatten(-1, (-1, group_size))
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    q = ct.quantize(w, scale, zero_point, args, dtype=torch.int8)
    params = [scale.view(-1, 1)] + ([] if symmetric else [zero_point.to(w.dtype).view(-1, 1)])
    dequantized = ct.dequantize(q, scale, zero_point, args)
    return q.int() + 8, torch.cat(params, 1), ct.fake_quantize(w, scale, zero_point, args), dequantized


def check_against_compressed_tensors(w, group_size):
    for symmetric, format in ((True, "ct-int4-sym"), (False, "ct-int4-asym")):
        code, params, value, dequantized = compressed_tensors(w, group_size, symmetric)
        check(w, format, group_size, code, params, value)
        assert_equal(dequantized, value, "the library, with itself")


@DTYPES
def test_compressed_tensors_on_ten_million_weights(dtype):
    check_against_compressed_tensors(weights(dtype, TEN_MILLION), 128)


@DTYPES
@pytest.mark.parametrize("group_size", [8, 32, 64, 96, 1152])
def test_compressed_tensors_group_sizes(group_size, dtype):
    check_against_compressed_tensors(weights(dtype, 300), group_size)


def test_compressed_tensors_rounds_in_the_dtype_of_the_model():
    """What a recipe is frozen for: the same weights in fp32 arithmetic give other codes."""
    w = gaussian(900, torch.bfloat16)
    for format in ("ct-int4-sym", "ct-int4-asym"):
        in_bf16, in_fp32 = (unpack(quantize(x, format)[0]) for x in (w, w.float()))
        assert 0.004 < (in_bf16 != in_fp32).double().mean() < 0.03


def to_dtype(dtype):
    """fp32 arrays rounded to dtype and back: with one such step after each operation, arithmetic in dtype."""
    if dtype == torch.float32:
        return lambda x: x.astype(np.float32)
    return lambda x: torch.from_numpy(x.astype(np.float32)).to(dtype).float().numpy()


def from_formulas(w, format, group_size):
    """(code, params, value) as AutoAWQ 0.2.9, MSLK 1.1 and GPTQModel 7.7 have them."""
    t = to_dtype(w.dtype)
    x = w.float().numpy().reshape(-1, group_size)
    with np.errstate(all="ignore"):
        if format == "awq-int4-sym":
            scale = t(np.maximum(np.abs(x).max(1, keepdims=True), t(np.float32([1e-5]))) / np.float32(7))
            q = np.clip(np.rint(t(x / scale)), -8, 7)
            code, params, value = q + 8, scale, t(q * scale)
        elif format == "mslk-int4-sym":
            scale = np.maximum(np.abs(x).max(1, keepdims=True), np.float32(1e-6)) / np.float32(8)
            q = np.clip(np.rint(x / scale), -8, 7)
            code, params, value = q + 8, scale, t(q * scale)
        elif format == "awq-int4-asym":
            low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
            scale = t(np.maximum(t(high - low), t(np.float32([1e-5]))) / np.float32(15))
            zero_point = np.clip(-np.rint(t(low / scale)), 0, 15)
            code = np.clip(np.rint(t(x / scale)) + zero_point, 0, 15)
            params, value = np.concatenate([scale, zero_point], 1), t((code - zero_point) * scale)
        else:
            low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
            zeros = (low == 0) & (high == 0)
            low, high = np.where(zeros, np.float32(-1), low), np.where(zeros, np.float32(1), high)
            scale = (high - low) / np.float32(15)
            underflows = scale == 0
            zero_point = np.where(underflows, 0, np.minimum(np.rint(-low / scale), 15))
            scale = np.where(underflows, np.finfo(np.float32).tiny, scale)
            code = np.clip(np.rint(x / scale) + zero_point, 0, 15)
            half = scale.astype(np.float16)
            params = np.concatenate([half, zero_point.astype(np.float16)], 1)
            value = half * (code - zero_point).astype(np.float16)
    code = torch.from_numpy(np.nan_to_num(code).astype(np.int32)).view(w.shape)
    params = torch.from_numpy(params).to(get_format(format).params_dtype(w.dtype))
    return code, params, torch.from_numpy(value).to(w.dtype).view(w.shape)


@DTYPES
@pytest.mark.parametrize("format", ["awq-int4-sym", "awq-int4-asym", "mslk-int4-sym", "gptq-int4-asym"])
def test_formulas_on_ten_million_weights(format, dtype):
    w = weights(dtype, TEN_MILLION)
    check(w, format, 128, *from_formulas(w, format, 128))


@DTYPES
@pytest.mark.parametrize("group_size", [8, 32, 64, 96, 1152])
@pytest.mark.parametrize("format", ["awq-int4-sym", "awq-int4-asym", "mslk-int4-sym", "gptq-int4-asym"])
def test_formulas_group_sizes(format, group_size, dtype):
    w = weights(dtype, 300)
    check(w, format, group_size, *from_formulas(w, format, group_size))


def torchao(w, mapping, group_size=128):
    """(code in 0 .. 15, scale, zero point) of choose_qparams_affine and quantize_affine."""
    block = (1, group_size)
    if mapping == "ASYMMETRIC, zero not preserved":
        qparams = ao._choose_qparams_affine_dont_preserve_zero(w, ao.MappingType.ASYMMETRIC, block, torch.uint8, 0, 15)
    else:
        lowest = 0 if mapping == "ASYMMETRIC" else -8
        kind = ao.MappingType[mapping]
        qparams = ao.choose_qparams_affine(w, kind, block, torch.int8, lowest, lowest + 15)
    lowest = 0 if mapping.startswith("ASYMMETRIC") else -8
    q = ao.quantize_affine(w, block, *qparams, torch.int8, lowest, lowest + 15)
    return q.int() - lowest, *(qparam.reshape(-1, 1) for qparam in qparams)


TORCHAO = {
    "ct-int4-sym": "SYMMETRIC",
    "gptq-int4-asym": "ASYMMETRIC",
    "ct-int4-asym": "ASYMMETRIC",
    "awq-int4-asym": "ASYMMETRIC, zero not preserved",
    "awq-int4-sym": "SYMMETRIC_NO_CLIPPING_ERR",
}


@DTYPES
@pytest.mark.parametrize("format", ["ct-int4-sym", "awq-int4-asym", "gptq-int4-asym"])
def test_torchao_differs_by_its_reciprocal_only(format, dtype):
    """The same scales and zero points bit for bit, and the same codes once x / s is x * (1 / s)."""
    w = gaussian(TEN_MILLION, dtype)
    # GPTQ reckons in fp32: so torchao is given the same weights in fp32.
    w = w.float() if format == "gptq-int4-asym" else w
    code, scale, zero_point = torchao(w, TORCHAO[format])
    recipe = get_format(format)
    params = recipe.fit(w.view(-1, 128), False, None).view(len(scale), -1)
    assert_equal(params[:, :1], scale, "scales")
    if recipe.n_params == 2:
        assert_equal(params[:, 1:], zero_point.to(params.dtype), "zero points")
    zero_point = params[:, 1:] if recipe.n_params == 2 else 8
    ours = ((w.view(-1, 128) * (1.0 / params[:, :1])).round() + zero_point).clamp(0, 15)
    assert_equal(ours.int().view(w.shape), code, "codes")


def codes_elsewhere(w, format, other):
    """Codes of the same weights in the library or arithmetic that a row of the README's table names."""
    x = w.view(-1, 128)
    if other.startswith("torchao"):
        return torchao(w, TORCHAO[format])[0]
    if other.startswith("compressed-tensors"):
        return compressed_tensors(w, 128, format == "ct-int4-sym")[0]
    if other == "its CUDA path":
        params = get_format(format).fit(x, False, None).view(len(x), -1).float()
        zero_point = params[:, 1:] if format == "ct-int4-asym" else 0
        return (x.float() / params[:, :1] + zero_point).clamp(-8, 7).round().int() + 8
    if other == "weights cast to fp16 first":
        return unpack(quantize(w.half(), format)[0]).int()
    if other == "PyTorch on CUDA":
        asymmetric = format == "awq-int4-asym"
        extent = x.amax(1) - x.amin(1) if asymmetric else x.abs().amax(1)
        reciprocal = torch.ones(()) / (15 if asymmetric else 7)
        scale = (extent.clamp(min=1e-5).float() * reciprocal).to(w.dtype)[:, None]
        zero_point = (-(x.amin(1, keepdim=True) / scale).round()).clamp(0, 15) if asymmetric else 8
        return ((x / scale).round() + zero_point).clamp(0, 15).int()
    if other == "GPTQ with sym=True":
        scale = x.float().abs().amax(1, keepdim=True) * 2 / torch.full((1,), 15.0)
        return ((x.float() / scale).round() + 8).clamp(0, 15).int()
    code, _, _ = from_formulas(w, format, 128)
    return code


README = Path(quail_kernels.formats.__file__).with_name("README.md").read_text()
README = README.partition("## Integer recipes")[2].partition("\n## ")[0]
RATE = re.compile(r"^\| `([\w-]+)` \| ([^|]+?) \| (fp32|bf16|fp16) \| ([\d,]+) \| ([\d,.]+) \|", re.MULTILINE)
NAMED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize(("format", "other", "dtype", "weights", "per_million"), RATE.findall(README))
def test_codes_that_differ_per_million(format, other, dtype, weights, per_million):
    """The committed table; a rate of 0 is exactly that."""
    w = gaussian(TEN_MILLION, NAMED[dtype])
    assert w.numel() == int(weights.replace(",", ""))
    differ = unpack(quantize(w, format)[0]).int() != codes_elsewhere(w, format, other).reshape(-1)
    per_million = float(per_million.replace(",", ""))
    assert differ.sum().item() / w.numel() * 1e6 == pytest.approx(per_million, rel=0.15, abs=0)


def test_the_table_has_every_recipe_and_dtype():
    rows = {(format, dtype) for format, _, dtype, _, _ in RATE.findall(README)}
    assert rows == {(format, dtype) for format in SYMMETRIC + ASYMMETRIC for dtype in NAMED}


GRID = re.compile(r"^\| `([\w@-]+)` \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|$", re.MULTILINE)


@pytest.mark.parametrize(("format", "fp32", "bf16", "fp16"), GRID.findall(README))
def test_share_of_weights_that_stay_when_quantized_twice(format, fp32, bf16, fp16):
    for dtype, share in ((torch.float32, fp32), (torch.bfloat16, bf16), (torch.float16, fp16)):
        once = fake_quant(gaussian(870, dtype), format)
        stay = (fake_quant(once, format) == once).double().mean().item() * 100
        assert stay == pytest.approx(float(share), abs=0.06 if 1 < float(share) < 100 else 0.001)


def test_the_table_of_grids_has_every_recipe():
    assert [row[0] for row in GRID.findall(README)] == [*SYMMETRIC, *ASYMMETRIC, "minmax-int4@128"]


# A step of 2^-6 in each recipe, so that a weight of k / 2 steps lies on a tie for every odd k.
STEP = 2.0**-6
EXTREMES = {"ct-int4-sym": (7.5, 0), "awq-int4-sym": (7, 0), "mslk-int4-sym": (8, 0)}


@DTYPES
@pytest.mark.parametrize("format", SYMMETRIC)
def test_ties_of_symmetric_recipes_go_to_the_even_integer(format, dtype):
    reach = EXTREMES[format][0]
    steps = torch.arange(-int(2 * reach), int(2 * reach) + 1) / 2
    w = torch.nn.functional.pad(steps, (0, 40 - len(steps))) * STEP
    codes, scale = quantize(w.to(dtype), format, 40)
    assert scale.tolist() == [STEP]
    expected = [min(max(round(step), -8), 7) + 8 for step in steps.tolist()]
    assert unpack(codes)[: len(steps)].tolist() == expected


@DTYPES
@pytest.mark.parametrize("below", range(16))
@pytest.mark.parametrize("format", ASYMMETRIC)
def test_ties_of_asymmetric_recipes(format, below, dtype):
    """From -below to 15 - below steps. Rounding before the zero point is added goes to even weights, after to
    even codes: with ct-int4-asym's zero point below - 8 the two differ where that is odd."""
    steps = torch.arange(-2 * below, 31 - 2 * below) / 2
    w = torch.nn.functional.pad(steps, (0, 1)) * STEP
    codes, params = quantize(w.to(dtype), format, 32)
    zero_point = below - 8 if format == "ct-int4-asym" else below
    assert params.tolist() == [[STEP, zero_point]]
    if format == "ct-int4-asym":
        expected = [round(step + zero_point) + 8 for step in steps.tolist()]
    else:
        expected = [min(max(round(step) + zero_point, 0), 15) for step in steps.tolist()]
    assert unpack(codes)[:31].tolist() == expected


def test_groups_of_one_sign():
    """From 2 to 3: compressed-tensors and GPTQ stretch the range to 0; AutoAWQ cannot reach it and saturates."""
    w = torch.linspace(2, 3, 16)[None]
    for sign, format in ((sign, format) for sign in (1, -1) for format in ("gptq-int4-asym", "ct-int4-asym")):
        error = (fake_quant(w * sign, format, 16) - w * sign).abs().max()
        assert 0 < error <= 3 / 15 / 2 + 3 * 2**-11, format
    for sign, code, zero_point in ((1, 15, 0), (-1, 0, 15)):
        codes, params = quantize(w * sign, "awq-int4-asym", 16)
        assert set(unpack(codes).tolist()) == {code} and params[0, 1] == zero_point
        assert torch.equal(fake_quant(w * sign, "awq-int4-asym", 16), torch.full_like(w, sign * 15) * params[0, 0])


ZEROS = {
    "ct-int4-sym": (8, lambda dtype: [torch.finfo(dtype).eps]),
    "awq-int4-sym": (8, lambda dtype: [(torch.tensor([1e-5], dtype=dtype) / 7).item()]),
    "mslk-int4-sym": (8, lambda dtype: [(torch.tensor([1e-6]) / 8).item()]),
    "gptq-int4-asym": (7, lambda dtype: [(torch.tensor([2.0]) / 15).half().item(), 7.0]),
    "awq-int4-asym": (0, lambda dtype: [(torch.tensor([1e-5], dtype=dtype) / 15).item(), 0.0]),
    "ct-int4-asym": (8, lambda dtype: [torch.finfo(dtype).eps, 0.0]),
}


@DTYPES
@FORMATS
def test_a_group_of_zeros(format, dtype):
    code, params = ZEROS[format]
    for zero in (0.0, -0.0):
        codes, scales = quantize(torch.full((1, 128), zero, dtype=dtype), format)
        assert set(unpack(codes).tolist()) == {code}
        assert scales.flatten().tolist() == params(dtype)
        value = fake_quant(torch.full((1, 128), zero, dtype=dtype), format)
        assert not value.any()


@DTYPES
@FORMATS
def test_nan_and_infinity_are_never_silent(format, dtype):
    w = gaussian(1, dtype)[:, :512].clone().view(4, 128)
    w[0, 3], w[1, 7], w[2, 9] = torch.nan, torch.inf, -torch.inf
    codes, _ = quantize(w, format)
    value = fake_quant(w, format)
    assert value[0].isnan().all()
    assert not value[1:3].isfinite().any()
    assert value[3].isfinite().all()
    code = unpack(codes).view(4, 128)
    # x / NaN is NaN, and so is inf / inf: position 0, whose code is that of the zero point.
    zero = {"gptq-int4-asym": 0, "awq-int4-asym": 0}.get(format, 8)
    assert set(code[0].tolist()) == {zero}
    positive = 0 if format == "ct-int4-asym" else zero
    assert set(code[1].tolist()) == {positive} and set(code[2].tolist()) == {zero}


def test_what_fp16_cannot_hold_is_not_silent():
    """A range that overflows fp16 leaves no finite weight, and GPTQ's fp16 scale neither where it overflows."""
    w = torch.linspace(-60000, 60000, 128)[None]
    for format in ("awq-int4-asym", "ct-int4-asym"):
        assert not fake_quant(w.half(), format).isfinite().any()
        assert fake_quant(w, format).isfinite().all()
    assert fake_quant(w.half(), "gptq-int4-asym").isfinite().all()
    assert not fake_quant(w * 100, "gptq-int4-asym").isfinite().any()
    # A scale below half of the smallest fp16 number makes zeros: what the packed layer computes with.
    assert not fake_quant(torch.linspace(-1e-7, 1e-7, 128)[None], "gptq-int4-asym").any()
    assert fake_quant(torch.linspace(-1e-6, 1e-6, 128)[None], "gptq-int4-asym").any()


@DTYPES
@FORMATS
def test_no_weight_is_further_than_its_step(format, dtype):
    """Half a step, and a whole one where the recipe clamps: mslk's positive absmax is 8 steps and gets 7."""
    w = gaussian(400, dtype)
    recipe = get_format(format)
    params = recipe.fit(w.view(-1, 128), False, None)
    rank = recipe.rank(w.view(-1, 128), params, False)
    error = (fake_quant(w, format).float() - w.float()).abs().view(-1, 128) / recipe.step(rank, params)
    # x / s, the sum with a zero point and the product round to the dtype: each by half an ulp of at most 16 steps.
    allowed = (1 if format == "mslk-int4-sym" else 0.5) + 3 * 8 * torch.finfo(dtype).eps
    assert error.max() <= allowed + (15 * 2**-11 if format == "gptq-int4-asym" else 0)


@DTYPES
@pytest.mark.parametrize("group_size", [None, 32, 96])
def test_minmax_against_its_definition(group_size, dtype):
    w = gaussian(9, dtype).view(54, 192)
    w[1] = 0.5
    groups = w.float().view(-1, group_size or w.numel()).numpy()
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    step = (high - low) / 16
    bucket = ((groups - low) / step.clip(1e-30)).clip(0, 15).astype(int)
    codes, params = quantize(w, "minmax-int4", group_size)
    assert unpack(codes).tolist() == bucket.reshape(-1).tolist()
    assert torch.equal(params, torch.cat([torch.tensor(step), torch.tensor(low)], dim=1))
    value = torch.tensor(low + (bucket + low.dtype.type(0.5)).astype("float32") * step).view(w.shape).to(dtype)
    assert torch.equal(fake_quant(w, "minmax-int4", group_size), value)
