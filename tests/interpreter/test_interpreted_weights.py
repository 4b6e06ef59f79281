"""fake_quant, quantize, dequantize and bucket_compare: Triton against the PyTorch reference, bit for bit."""

import importlib

import numpy as np
import pytest
import torch
import weight_cases
from hypothesis import given, settings
from weight_cases import LAYOUTS, laid_out, same_bits

from quail_kernels import formats
from quail_kernels.formats import WEIGHT_DTYPES, get_format

fake_quant = importlib.import_module("quail_kernels.fake_quant")
bucket_compare = importlib.import_module("quail_kernels.bucket_compare")

DTYPES = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
SIZES = [
    "bnb-nf4@32",
    "bnb-nf4@4096",
    "bnb-fp4@256",
    "ct-int4-sym@96",
    "ct-int4-sym@8",
    "minmax-int4@96",
    "minmax-int4@128",
]
FORMATS = pytest.mark.parametrize("format", [*formats.FORMATS, *SIZES])
TILE = 16384  # large tiles, small grids: the interpreter's cost is per program
SHAPES = [(48, 768), (3, 5, 384)]


def weights(shape, dtype, group_size):
    """Normal weights, and where groups are smaller than that, rows of zeros, ties, tiny and huge numbers."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    if group_size is None:
        return w.to(dtype)
    rows = w.view(-1, shape[-1])
    rows[1] = 0
    rows[2] = -0.0
    rows[3] = 0.375
    rows[4] = torch.arange(shape[-1]).remainder(31) - 15.0
    thresholds = torch.tensor(get_format("bnb-nf4").thresholds + get_format("bnb-fp4").thresholds)
    near = torch.cat([thresholds, thresholds.nextafter(thresholds + 1), thresholds.nextafter(thresholds - 1)])
    rows[5] = near.repeat(shape[-1] // len(near) + 1)[: shape[-1]]
    rows[5, ::32] = 1
    rows[6] *= 1e-4
    rows[7] *= 1e-38 if dtype != torch.float16 else 1e-5
    rows[8] *= 1e38 if dtype != torch.float16 else 5e5
    rows[9] = -rows[9].abs()
    return w.to(dtype)


def shapes(format):
    size = get_format(format).group_size or 1
    divides = get_format(format).groups_divide_last_dim
    tails = [] if divides else [(1,), (64 * 40 + 7,), (4096 * 2 + 130,)]
    return [shape for shape in SHAPES if not divides or shape[-1] % size == 0] + tails


def cases(format, dtype):
    for shape in shapes(format):
        big = shape if len(shape) > 1 else (12, shape[0])
        yield (weights(big, dtype, get_format(format).group_size).view(-1)[: torch.Size(shape).numel()].view(shape))


def assert_same_bits(got, expected):
    """But for the bits of a NaN, which neither IEEE 754 nor a recipe settles."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    if got.is_floating_point():
        assert torch.equal(got.isnan(), expected.isnan())
        got, expected = (x.masked_fill(x.isnan(), torch.nan) for x in (got, expected))
    got, expected = got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    assert torch.equal(got, expected), f"{(got != expected).sum()} of {got.numel()} bytes differ"


def assert_same_comparison(before, after, recipe, shared):
    counts, sums, top, same = bucket_compare._bucket_compare_torch(before, after, recipe, shared, True)
    got_counts, got_sums, got_top, got_same = bucket_compare._bucket_compare_triton(
        before, after, recipe, shared, True, TILE
    )
    assert got_counts.tolist() == counts.tolist()
    assert got_same.tolist() == same.tolist()
    assert same_bits(got_top.view(torch.float32), top.view(torch.float32))
    # A program adds at most TILE numbers >= 0 in fp32, pairwise: at most log2(TILE) + 1 roundings each.
    torch.testing.assert_close(got_sums, sums, rtol=15 * 2**-24, atol=0, equal_nan=True)


@DTYPES
@FORMATS
def test_quantize_dequantize_and_fake_quant(format, dtype):
    recipe = get_format(format)
    for w in cases(format, dtype):
        codes, scales = fake_quant._quantize_torch(w, recipe)
        triton_codes, triton_scales = fake_quant._quantize_triton(w, recipe, TILE)
        assert_same_bits(triton_codes, codes)
        assert_same_bits(triton_scales, scales)
        w_q = fake_quant._fake_quant_torch(w, recipe)
        assert_same_bits(fake_quant._fake_quant_triton(w, recipe, TILE), w_q)
        assert_same_bits(fake_quant._dequantize_triton(codes, scales, recipe, w.shape, dtype, TILE), w_q)


@pytest.mark.parametrize("format", ["bnb-nf4", "bnb-fp4"])
def test_short_last_group_of_zeros_or_subnormals(format):
    recipe = get_format(format)
    for tail in (0.0, -0.0, 1e-40, 1e-38):
        w = torch.cat([torch.randn(64), torch.full((7,), tail)])
        codes, scales = fake_quant._quantize_torch(w, recipe)
        triton_codes, triton_scales = fake_quant._quantize_triton(w, recipe, TILE)
        assert_same_bits(triton_codes, codes)
        assert_same_bits(triton_scales, scales)
        assert_same_bits(fake_quant._fake_quant_triton(w, recipe, TILE), fake_quant._fake_quant_torch(w, recipe))


@pytest.mark.parametrize("format", ["bnb-nf4", "ct-int4-sym@96", "minmax-int4"])
def test_the_tile_that_is_launched_on_a_gpu(format):
    recipe = get_format(format)
    w = weights((12, 768), torch.bfloat16, recipe.group_size)
    assert_same_bits(fake_quant._fake_quant_triton(w, recipe), fake_quant._fake_quant_torch(w, recipe))
    assert_same_bits(fake_quant._quantize_triton(w, recipe)[0], fake_quant._quantize_torch(w, recipe)[0])


@FORMATS
def test_nan_and_infinity(format):
    recipe = get_format(format)
    for bad in (torch.nan, torch.inf, -torch.inf):
        w = torch.randn(2, 768)
        w[0, 100] = bad
        codes, scales = fake_quant._quantize_triton(w, recipe, TILE)
        expected_codes, expected_scales = fake_quant._quantize_torch(w, recipe)
        assert_same_bits(codes, expected_codes)
        torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
        w_q = fake_quant._fake_quant_triton(w, recipe, TILE)
        expected = fake_quant._fake_quant_torch(w, recipe)
        torch.testing.assert_close(w_q, expected, rtol=0, atol=0, equal_nan=True)


@FORMATS
def test_empty(format):
    recipe = get_format(format)
    w = torch.empty(0, 768)
    codes, scales = fake_quant._quantize_triton(w, recipe)
    assert codes.shape == (0,) and scales.shape[0] == 0
    assert fake_quant._fake_quant_triton(w, recipe).shape == w.shape
    assert fake_quant._dequantize_triton(codes, scales, recipe, w.shape, w.dtype).shape == w.shape
    counts, sums, top, _ = bucket_compare._bucket_compare_triton(w, w, recipe, False, True)
    assert not counts.any() and not sums.any() and not top


@DTYPES
@FORMATS
@pytest.mark.parametrize("shared", [False, True], ids=["own", "before"])
def test_bucket_compare(format, dtype, shared):
    recipe = get_format(format)
    for before in cases(format, dtype):
        noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(1)) * 2e-3
        after = (before.float() + noise).to(dtype)
        after.view(-1)[: before.numel() // 8] = before.view(-1)[: before.numel() // 8]
        assert_same_comparison(before, after, recipe, shared)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "before"])
@FORMATS
def test_bucket_compare_of_several_tiles_a_program(format, shared, monkeypatch):
    monkeypatch.setattr(bucket_compare, "_PROGRAMS", 1)
    recipe = get_format(format)
    # Five tiles: the second program's last has no weights.
    before = weights((100, 768), torch.bfloat16, recipe.group_size)
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(1)) * 2e-3
    assert_same_comparison(before, (before.float() + noise).bfloat16(), recipe, shared)


@pytest.mark.parametrize("format", ["bnb-nf4", "ct-int4-sym", "mxfp4"])
def test_bucket_compare_reads_nothing_beyond_the_last_tile(format, monkeypatch):
    """Tiles that are full of weights have no mask, and five are no multiple of two."""
    monkeypatch.setattr(bucket_compare, "_PROGRAMS", 2)
    recipe = get_format(format)
    both = torch.randn(2, 6 * TILE, generator=torch.Generator().manual_seed(0)).bfloat16()
    before, after = both[:, : 5 * TILE].unbind()
    assert_same_comparison(before, after, recipe, False)


def test_bucket_compare_twice_gives_the_same_bits():
    before, after = torch.randn(2, 64, 768).unbind()
    runs = [bucket_compare._bucket_compare_triton(before, after, get_format("bnb-nf4"), False, True) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("layout", [*LAYOUTS, "four dimensions"])
@FORMATS
def test_strides(format, layout):
    recipe = get_format(format)
    w, other = torch.randn(2, 12, 768, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    if layout == "four dimensions":
        w, other = w.view(2, 2, 3, 768), other.view(2, 2, 3, 768)
        w = w.new_zeros(3, 2, 2, 1536)[..., ::2].permute(2, 1, 0, 3).copy_(w)
    else:
        w = laid_out(w, layout)
    codes, scales = fake_quant._quantize_triton(w, recipe, TILE)
    expected_codes, expected_scales = fake_quant._quantize_torch(w.contiguous(), recipe)
    assert_same_bits(codes, expected_codes)
    assert_same_bits(scales, expected_scales)
    w_q = fake_quant._fake_quant_torch(w.contiguous(), recipe)
    assert_same_bits(fake_quant._fake_quant_triton(w, recipe, TILE), w_q)
    codes, scales = laid_out(codes, "every second"), laid_out(scales, "every second")
    assert_same_bits(fake_quant._dequantize_triton(codes, scales, recipe, w.shape, w.dtype, TILE), w_q)
    for pair in ((w, other), (other, w)):
        assert_same_comparison(*pair, recipe, False)


@settings(max_examples=60, deadline=None)
@given(weight_cases.weights(most_rows=2))
def test_whatever_the_weights_are(case):
    format, w = case
    recipe = get_format(format)
    codes, scales = fake_quant._quantize_torch(w, recipe)
    assert all(map(same_bits, fake_quant._quantize_triton(w, recipe, TILE), (codes, scales)))
    w_q = fake_quant._fake_quant_torch(w, recipe)
    assert same_bits(fake_quant._fake_quant_triton(w, recipe, TILE), w_q)
    assert same_bits(fake_quant._dequantize_triton(codes, scales, recipe, w.shape, w.dtype, TILE), w_q)


def far_apart(rows, columns, seed):
    """fp16 rows more than 2^30 elements from each other; of the 8 GB between them no page is ever touched."""
    stride = 2**30 + 64
    buffer = torch.from_numpy(np.empty((rows - 1) * stride + columns, dtype=np.float16))
    view = buffer.as_strided((rows, columns), (stride, 1))
    return view.copy_(weights((rows, columns), torch.float16, None) * (1 + seed))


@pytest.mark.parametrize("columns", [768, 770], ids=["rows of whole groups", "groups that straddle rows"])
def test_offsets_past_two_to_the_31(columns):
    recipe = get_format("bnb-nf4")
    before, after = far_apart(4, columns, 0), far_apart(4, columns, 1)
    assert before.stride(0) * 3 > 2**31
    near = before.contiguous()
    assert_same_bits(fake_quant._fake_quant_triton(before, recipe, TILE), fake_quant._fake_quant_torch(near, recipe))
    assert_same_bits(fake_quant._quantize_triton(before, recipe, TILE)[0], fake_quant._quantize_torch(near, recipe)[0])
    counts = bucket_compare._bucket_compare_triton(before, after, recipe, True, True, TILE)[0]
    assert torch.equal(counts, bucket_compare._bucket_compare_torch(near, after.contiguous(), recipe, True, True)[0])
