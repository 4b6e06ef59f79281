"""The integer recipes: Triton against the PyTorch reference on rows that are hard, bit for bit but for NaN."""

import importlib

import pytest
import torch
from awkward_weights import awkward

from quail_kernels.formats import WEIGHT_DTYPES, get_format

fake_quant = importlib.import_module("quail_kernels.fake_quant")
bucket_compare = importlib.import_module("quail_kernels.bucket_compare")

RECIPES = ("ct-int4-sym", "awq-int4-sym", "mslk-int4-sym", "gptq-int4-asym", "awq-int4-asym", "ct-int4-asym")
FORMATS = pytest.mark.parametrize("format", [f"{name}@{size}" for name in RECIPES for size in (8, 96)])
DTYPES = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
TILE = 32768


def assert_same(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    both_nan = got.isnan() & expected.isnan()
    assert torch.equal(got.masked_fill(both_nan, 0), expected.masked_fill(both_nan, 0))
    if got.is_floating_point():
        assert torch.equal(got.signbit() | both_nan, expected.signbit() | both_nan)


@DTYPES
@FORMATS
def test_awkward_weights(format, dtype):
    recipe, w = get_format(format), awkward(dtype)
    w[0, 5], w[1, 6], w[2, 7] = torch.nan, torch.inf, -torch.inf
    codes, scales = fake_quant._quantize_torch(w, recipe)
    triton_codes, triton_scales = fake_quant._quantize_triton(w, recipe, TILE)
    assert_same(triton_codes, codes)
    assert_same(triton_scales, scales)
    w_q = fake_quant._fake_quant_torch(w, recipe)
    assert_same(fake_quant._fake_quant_triton(w, recipe, TILE), w_q)
    assert_same(fake_quant._dequantize_triton(codes, scales, recipe, w.shape, dtype, TILE), w_q)
    assert_same(fake_quant._dequantize_torch(codes, scales, recipe, w.shape, dtype), w_q)
    after = w.flip(0)
    counts, _, top, same = bucket_compare._bucket_compare_torch(w, after, recipe, False, True)
    triton_counts, _, triton_top, triton_same = bucket_compare._bucket_compare_triton(
        w, after, recipe, False, True, TILE
    )
    assert_same(triton_counts, counts)
    assert_same(triton_top, top)
    assert_same(triton_same, same)
