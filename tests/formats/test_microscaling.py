"""MXFP4 and NVFP4 against torchao, MXFP4 against gguf."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import QuantError
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize
from golden import (
    SHORT,
    TEN_MILLION,
    assert_documented,
    assert_same_bits,
    check,
    gaussian,
    per_million,
    table_row,
    unpack,
)
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import get_fp_scale, to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

from quail_kernels import bucket_compare, fake_quant, get_format, quantize
from quail_kernels.formats import WEIGHT_DTYPES

DTYPES = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
MX = ["mxfp4", "mxfp4-rceil", "gguf-mxfp4"]
ALL = [*MX, "nvfp4"]
E2M1 = torch.float4_e2m1fn_x2


def low_nibble_first(packed):
    return torch.stack([packed & 15, packed >> 4], dim=-1).view(-1)


def torchao_mx(w, mode):
    scales, packed = to_mx(w.float(), E2M1, 32, mode)
    # It multiplies in the dtype that it is asked for: exact in fp32 and bf16, but fp16 has too few exponents.
    dtype = torch.float32 if w.dtype == torch.float16 else w.dtype
    values = to_dtype(packed, scales, E2M1, 32, dtype).to(w.dtype)
    return low_nibble_first(packed), get_fp_scale(scales).view(-1), values


def torchao_nvfp4(w, of_tensor=True):
    t = per_tensor_amax_to_scale(w.abs().max()) if of_tensor else None
    q = NVFP4Tensor.to_nvfp4(w.float(), per_tensor_scale=t)
    scale = q.scale.float().view(-1)
    scales = torch.stack([scale, t.expand_as(scale)], dim=1) if of_tensor else scale
    return low_nibble_first(q.qdata), scales, q.dequantize(torch.float32).to(w.dtype)


def gguf_mxfp4(w):
    with np.errstate(all="ignore"):
        packed = gguf_quantize(w.float().numpy(), GGMLQuantizationType.MXFP4)
        values = torch.tensor(gguf_dequantize(packed, GGMLQuantizationType.MXFP4)).to(w.dtype)
    blocks = torch.tensor(packed).view(w.numel() // 32, 17)
    q = blocks[:, 1:]
    return torch.cat([q & 15, q >> 4], dim=1).view(-1), torch.exp2(blocks[:, 0].float() - 127), values


LIBRARY = {
    "mxfp4": lambda w: torchao_mx(w, ScaleCalculationMode.FLOOR),
    "mxfp4-rceil": lambda w: torchao_mx(w, ScaleCalculationMode.RCEIL),
    "gguf-mxfp4": gguf_mxfp4,
    "nvfp4": torchao_nvfp4,
}
NAMES = {
    "mxfp4": "torchao 0.18.0, `FLOOR`",
    "mxfp4-rceil": "torchao 0.18.0, `RCEIL`",
    "gguf-mxfp4": "gguf 0.19.0, MXFP4",
    "nvfp4": "torchao 0.18.0, two scales",
}
SECTION = "llama.cpp and microscaling"


@DTYPES
@pytest.mark.parametrize("format", ALL)
def test_ten_million_weights(format, dtype):
    w = gaussian(TEN_MILLION, dtype)
    codes, scales, values = LIBRARY[format](w)
    check(w, format, codes, scales, values)
    assert_documented(table_row(w, format, NAMES[format], codes, values), SECTION)


def near_thresholds(size):
    """Blocks with 6 or 4 as the largest weight and every midpoint, its neighbours in fp32 and their negatives."""
    middle = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    up, down = middle.nextafter(middle + 1), middle.nextafter(middle - 1)
    small = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 0.1, -0.1, 0.2, -0.2, 7.99, -7.99])
    points = torch.cat([middle, -middle, up, -up, down, -down, small])
    rows = []
    for largest in (6.0, 4.0):
        here = points[points.abs() <= largest] if largest == 4 else points[points.abs() <= 6]
        here = torch.cat([here, here.new_zeros(-len(here) % (size - 1))]).view(-1, size - 1)
        rows.append(torch.cat([torch.full((len(here), 1), largest), here], dim=1))
    return torch.cat(rows)


@pytest.mark.parametrize("factor", [1.0, 2.0**-9, 2.0**60, 2.0**-100])
@pytest.mark.parametrize("format", MX)
def test_ties_and_zeros(format, factor):
    w = near_thresholds(32) * factor
    check(w, format, *LIBRARY[format](w))
    check(torch.zeros(2, 32), format, *LIBRARY[format](torch.zeros(2, 32)))
    check(torch.full((2, 32), -0.0), format, *LIBRARY[format](torch.full((2, 32), -0.0)))


@pytest.mark.parametrize("factor", [1.0, 0.75, 0.5, 2.0**-5])
def test_ties_and_zeros_of_nvfp4(factor):
    """The first block makes the tensor's scale 1, and with 6 as a block's largest weight its scale is 1 then."""
    w = near_thresholds(16) * factor
    w = torch.cat([torch.full((1, 16), 2688.0), w, torch.zeros(1, 16), torch.full((1, 16), -0.0)])
    check(w, "nvfp4", *torchao_nvfp4(w))
    if factor == 1:
        assert (quantize(w, "nvfp4")[1] == 1).all(dim=1).sum() > 2


@pytest.mark.parametrize("format", ALL)
def test_ties_go_to_the_even_code_but_in_llama_cpp_to_zero(format):
    middle = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    w = torch.zeros(2, 32)
    w[0, 0] = w[1, 0] = w[1, 16] = 6
    w[0, 1:8], w[1, 1:8] = middle, -middle
    if format == "nvfp4":
        w = torch.cat([torch.full((1, 32), 2688.0), w])
    codes = unpack(quantize(w, format)[0]).view(-1, 32)[-2:, 1:8].tolist()
    even = [0, 2, 2, 4, 4, 6, 6]
    towards_zero = [0, 1, 2, 3, 4, 5, 6]
    positive = towards_zero if format == "gguf-mxfp4" else even
    assert codes[0] == positive
    assert codes[1] == [0 if format == "gguf-mxfp4" and code == 0 else code + 8 for code in positive]


def magnitudes():
    """fp32 numbers of every exponent, subnormals among them, one a block."""
    exponents = torch.arange(0, 255, dtype=torch.int32).repeat_interleave(8)
    mantissas = torch.tensor([0, 1, 0x200000, 0x3FFFFF, 0x400000, 0x400001, 0x7FFF00, 0x123456], dtype=torch.int32)
    return (exponents << 23 | mantissas.repeat(255)).view(torch.float32)


@pytest.mark.parametrize("format", MX)
def test_every_exponent(format):
    largest = magnitudes()
    if format == "gguf-mxfp4":
        largest = largest[largest >= 2.0**-125]  # its uint8 exponent wraps around below
    if format == "mxfp4-rceil":
        largest = largest[largest.view(torch.int32) & 0x7FFFFF != 0x400001]  # see the test of the exact ceiling
    w = torch.randn(len(largest), 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    w[:, 0] = -1
    w *= largest[:, None]
    check(w, format, *LIBRARY[format](w))


def test_scales_are_what_their_definitions_say():
    largest = magnitudes()
    w = torch.zeros(len(largest), 32)
    w[:, 31] = -largest
    floor, ceil, gguf = (quantize(w, format)[1].tolist() for format in MX)
    for x, by_floor, by_ceil, by_gguf in zip(largest.tolist(), floor, ceil, gguf, strict=True):
        exponent = max(math.frexp(x)[1] - 1 if x >= 2.0**-126 else -127, -125) - 2
        assert by_floor == by_gguf == Fraction(2) ** exponent
        sixth = Fraction((torch.tensor(x) / 6).item())
        assert by_ceil >= sixth and (by_ceil == 2.0**-127 or Fraction(by_ceil) / 2 < sixth)


@pytest.mark.parametrize("k", [-100, -30, -7, 5, 30, 100])
def test_ceiling_and_floor_are_exact_where_a_rounded_logarithm_is_not(k):
    """The one difference from the libraries on finite weights: a few ulp beside a power of two."""
    above = torch.full((64,), 6.0 * 2.0**k)
    below = torch.full((64,), 2.0**k)
    for i in range(64):
        above[i:] = above[i:].nextafter(torch.tensor(torch.inf))
        below[i:] = below[i:].nextafter(torch.tensor(0.0))
    for format, largest in (("mxfp4-rceil", above), ("gguf-mxfp4", below)):
        w = torch.zeros(64, 32)
        w[:, 0] = largest
        ours, theirs = quantize(w, format)[1], LIBRARY[format](w)[1]
        assert (ours == (2.0 ** (k + 1) if format == "mxfp4-rceil" else 2.0 ** (k - 3))).all()
        differ = theirs != ours
        assert (theirs[differ] / ours[differ] == (0.5 if format == "mxfp4-rceil" else 2)).all()
        assert not differ[48:].any() and (differ.any() or abs(k) < 10)


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e20, 3e37])
def test_nvfp4_at_the_ends_of_fp32(factor):
    w = gaussian(8, torch.float32)
    w[1] *= 1e-3
    w[2] *= 1e-6
    w[3] = 0
    w[4] = w[4].abs()
    w = w / w.abs().max() * factor
    check(w, "nvfp4", *torchao_nvfp4(w))


def test_nvfp4_of_a_tensor_too_small_for_the_library():
    zeros = torch.zeros(2, 16)
    assert torchao_nvfp4(zeros)[2].isnan().all()
    assert_same_bits(fake_quant(zeros, "nvfp4"), zeros, "zeros")
    w = torch.cat([gaussian(2, torch.float32) * 1e-34, torch.zeros(1, 1024)])
    assert torchao_nvfp4(w)[2][2].all() and not fake_quant(w, "nvfp4")[2].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format", ALL)
def test_nan_and_infinity(format, bad):
    w = gaussian(2, torch.float32)[:, :64].contiguous()
    w[0, 40] = bad
    values = fake_quant(w, format)
    if format == "gguf-mxfp4":
        assert gguf_mxfp4(w)[2].isfinite().all(), "the library hides it"
    else:
        _, scales, expected = LIBRARY[format](w)
        assert_same_bits(values, expected, "values")
        assert_same_bits(quantize(w, format)[1], scales, "scales")
    if format == "nvfp4":
        assert values.isnan().all()
    elif bad != bad:
        assert values[0, 32:].isnan().all() and values[0, :32].isfinite().all() and values[1].isfinite().all()
    else:
        assert values[0, 40] == bad and not values[0, 32:40].any() and not values[0, 41:].any()
        assert values[0, :32].isfinite().all() and values[0, :32].any()


@pytest.mark.parametrize("format", ALL)
def test_what_is_refused_as_there(format):
    size = get_format(format).group_size
    w = torch.zeros(4, 40)
    with pytest.raises(ValueError, match=rf"w: expected a last dimension.*multiple of {size}.*{format}; got shape"):
        quantize(w, format)
    with pytest.raises(QuantError if format == "gguf-mxfp4" else AssertionError):
        LIBRARY[format](w)
    with pytest.raises(ValueError, match=f"group_size: expected one of {size} for {format}; got 64"):
        quantize(w, format, 64)


@pytest.mark.parametrize("format", ALL)
def test_one_bucket_for_both_zeros(format):
    recipe = get_format(format)
    assert recipe.codes == (15, 14, 13, 12, 11, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7)
    assert recipe.buckets == (*range(8), *range(7, 15))
    before, after = torch.full((1, 32), 0.01), torch.full((1, 32), -0.01)
    before[0, ::16] = after[0, ::16] = 6
    got = bucket_compare(before, after, format)
    assert got.same_code == got.same_value == 32
    expected = [0x00, 0x00] if format == "gguf-mxfp4" else [0x00, 0x88]
    assert [quantize(w, format)[0][1].item() for w in (before, after)] == expected


@pytest.mark.parametrize("format", ALL)
def test_widths_tile_what_positions_can_be(format):
    recipe = get_format(format)
    by_bucket = dict(zip(recipe.buckets, recipe.widths, strict=True))
    end = {"mxfp4": 3, "gguf-mxfp4": 3}.get(format, 1)
    assert list(by_bucket.values()) == [end, 1.5, 1, 0.75, *[0.5] * 7, 0.75, 1, 1.5, end]
    assert sum(by_bucket.values()) == 2 * recipe.reach
    w = gaussian(100, torch.float32)
    params = recipe.fit(w.view(-1, recipe.group_size), False, recipe.fit_tensor(w.view(-1)))
    x = w.view(-1, recipe.group_size)
    rank = recipe.rank(x, params, False)
    error = (recipe.value(rank, params) - x).abs()
    # A value is the middle of its bucket, or no further from an end than the width, but for e4m3's rounding.
    assert (error <= recipe.step(rank, params) * (1 if format != "nvfp4" else 17 / 16)).all()
    assert (x.abs().amax(1) <= recipe.reach * recipe.unit(params) * (1 if format != "nvfp4" else 17 / 16)).all()


OTHERS = {
    ("mxfp4", NAMES["mxfp4-rceil"]): LIBRARY["mxfp4-rceil"],
    ("mxfp4", "torchao 0.18.0, `EVEN`"): lambda w: torchao_mx(w, ScaleCalculationMode.EVEN),
    ("mxfp4", "torchao 0.18.0, `CEIL`"): lambda w: torchao_mx(w, ScaleCalculationMode.CEIL),
    ("mxfp4", NAMES["gguf-mxfp4"]): gguf_mxfp4,
    ("nvfp4", "torchao 0.18.0, block scales only"): lambda w: torchao_nvfp4(w, of_tensor=False),
}


@DTYPES
@pytest.mark.parametrize(("format", "other"), OTHERS)
def test_how_far_other_rules_are(format, other, dtype):
    w = gaussian(TEN_MILLION, dtype)
    codes, _, values = OTHERS[format, other](w)
    assert_documented(table_row(w, format, other, codes, values), SECTION)


@pytest.mark.parametrize("format", ALL)
@DTYPES
def test_own_grid(format, dtype):
    once = fake_quant(gaussian(1000, dtype), format)
    moved = per_million(fake_quant(once, format) != once)
    assert_documented([f"`{format}`", SHORT[dtype], moved], "Which recipes reproduce their own grid")
