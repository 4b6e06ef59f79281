"""Q4_0 and Q4_1 against the Python package gguf, through its packed blocks; its MXFP4 in test_microscaling.py."""

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

from quail_kernels import bucket_compare, dequantize, fake_quant, get_format, quantize
from quail_kernels.formats import WEIGHT_DTYPES

DTYPES = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
TYPES = {"gguf-q4_0": GGMLQuantizationType.Q4_0, "gguf-q4_1": GGMLQuantizationType.Q4_1}
FORMATS = pytest.mark.parametrize("format", TYPES)


def library(w, format):
    """(codes, fp16 scales, values in the dtype of w). A byte holds the weights i and i + 16 of its block."""
    with np.errstate(all="ignore"):
        packed = gguf_quantize(w.float().numpy(), TYPES[format])
        values = torch.tensor(gguf_dequantize(packed, TYPES[format])).to(w.dtype)
    blocks = torch.tensor(packed).view(w.numel() // 32, -1)
    scales, q = blocks[:, :-16].contiguous().view(torch.float16), blocks[:, -16:]
    if format == "gguf-q4_1":
        scales[w.view(-1, 32).amin(dim=1) == 0, 1] = 0  # of either sign there
    return torch.cat([q & 15, q >> 4], dim=1).view(-1), scales, values


@DTYPES
@FORMATS
def test_ten_million_weights(format, dtype):
    w = gaussian(TEN_MILLION, dtype)
    codes, scales, values = library(w, format)
    check(w, format, codes, scales, values)
    assert_documented(
        table_row(w, format, f"gguf 0.19.0, {TYPES[format].name}", codes, values), "llama.cpp and microsc"
    )


def blocks(*rows):
    return torch.tensor([(*row, *[0.0] * (32 - len(row))) for row in rows])


HALVES = [k / 2 for k in range(-16, 16)]  # with -8 as the largest d is 1, and every other one is a tie
AWKWARD = blocks(
    [],
    [-0.0] * 32,
    [0.0, -0.0],
    [-0.0, 0.0],
    HALVES,
    [-half for half in HALVES],
    [3.0, -3.0, 1.0],
    [-3.0, 3.0, 1.0],
    [0.0, 1.5, -3.0, 3.0, -1.5, -3.0],
    [1.0] * 32,
    [-1.0] * 32,
    [k + 1 for k in range(32)],
    [-(k + 1) for k in range(32)],
    [k / 2 for k in range(32)],  # Q4_1 with d = 31/30 and many near ties
    [15.0, *(k + 0.5 for k in range(15))],  # Q4_1 with d = 1, all ties
)


@FORMATS
@pytest.mark.parametrize("factor", [1.0, 0.1, -0.37, 1e-3, 1e-7, 1e-9, 4e3, 1e5, 1e9])
def test_ties_zeros_signs_and_what_fp16_cannot_hold(format, factor):
    for dtype in WEIGHT_DTYPES:
        w = (AWKWARD * factor).to(dtype)
        w = w[w.isfinite().all(dim=1)]
        check(w, format, *library(w, format))


@FORMATS
@pytest.mark.parametrize("factor", [1e-38, 1e-39, 1e-40, 1e-43, 2e37])
def test_the_ends_of_fp32(format, factor):
    w = AWKWARD * factor
    check(w, format, *library(w, format))


def test_a_half_rounds_up_and_the_first_of_two_largest_decides():
    codes, d = quantize(AWKWARD, "gguf-q4_0")
    codes = unpack(codes).view(-1, 32).tolist()
    assert codes[4] == [min(int(k / 2 + 0.5), 15) for k in range(32)]
    assert d[6:9].tolist() == [-0.375, 0.375, 0.375]
    assert codes[6][:2] == [0, 15] and codes[7][:2] == [0, 15]
    assert d[:2].signbit().tolist() == [True, False] and codes[0] == codes[1] == [8] * 32


@FORMATS
def test_fp16_overflow_is_seen(format):
    w = blocks([8e5, -7e5, 1e5])
    w_q = fake_quant(w, format)
    assert quantize(w, format)[1].isinf().any() and not w_q.isfinite().any()
    assert_same_bits(w_q, library(w, format)[2], "values")


@FORMATS
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_as_the_library_has_them(format, bad):
    w = gaussian(2, torch.float32)[:, :64].contiguous()
    w[0, 40] = bad
    values = fake_quant(w, format)
    assert_same_bits(values, library(w, format)[2], "values")
    assert not values[0, 32:].isfinite().any() and values[0, :32].isfinite().all() and values[1].isfinite().all()


@FORMATS
def test_a_last_dimension_that_blocks_do_not_divide_is_refused_as_there(format):
    w = torch.zeros(4, 48)
    with pytest.raises(ValueError, match=rf"w: expected a last dimension.*multiple of 32.*{format}; got shape \(4, 48"):
        quantize(w, format)
    with pytest.raises(QuantError):
        library(w, format)
    with pytest.raises(ValueError, match=f"group_size: expected one of 32 for {format}; got 64"):
        quantize(w, format, 64)


def test_values_come_from_what_is_stored():
    """Codes are decided by the fp32 d, values by the fp16 one; deciding by the latter would change codes."""
    w = gaussian(1000, torch.float32)
    codes, d = quantize(w, "gguf-q4_0")
    d = d.float()[:, None]
    codes = unpack(codes).view(-1, 32)
    by_stored = (w.view(-1, 32) * (1 / d) + 8.5).trunc().clamp(0, 15)
    assert_same_bits(fake_quant(w, "gguf-q4_0"), ((codes.float() - 8) * d).view(w.shape), "values")
    assert 1e-4 < (codes != by_stored).double().mean() < 2e-3


def test_scales_of_another_dtype_than_the_weights():
    w = gaussian(4, torch.bfloat16)
    codes, d = quantize(w, "gguf-q4_0")
    assert d.dtype == torch.float16
    in_fp32 = dequantize(codes, d, "gguf-q4_0", shape=w.shape, dtype=torch.float32)
    assert_same_bits(in_fp32.bfloat16(), fake_quant(w, "gguf-q4_0"), "values")


def place(w):
    """Steps from zero, from what is stored and nothing else."""
    codes, d = quantize(w, "gguf-q4_0")
    return ((unpack(codes).view(-1, 32).int() - 8) * d.sign().int()[:, None]).clamp(-8, 8)


@DTYPES
def test_a_distance_of_q4_0_counts_buckets_by_value(dtype):
    before = gaussian(500, dtype)
    after = (before.float() + gaussian(500, torch.float32, seed=1) * 0.3).to(dtype)
    d_before, d_after = (quantize(w, "gguf-q4_0")[1] for w in (before, after))
    assert (d_before * d_after < 0).sum() > 1000, "blocks whose d changed its sign"
    got = bucket_compare(before, after, "gguf-q4_0")
    distance = (place(before) - place(after)).abs().view(-1).clamp(max=15)
    assert got.code_distance.tolist() == torch.bincount(distance, minlength=16).tolist()
    assert got.same_code > before.numel() // 3


def test_buckets_of_q4_0_where_the_largest_weight_changes_its_sign():
    before = blocks([-8.0, 7.5, 1.0, 2.0, -1.0])
    after = blocks([-7.5, 8.0, 1.0, 2.0, 8.0])
    got = bucket_compare(before, after, "gguf-q4_0")
    # By codes the zeros stay and all the rest would move; by value only the last one did, by 9, and the ends by 1.
    assert got.code_distance.tolist() == [29, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    ends = bucket_compare(blocks([-8.0]), blocks([8.0]), "gguf-q4_0")
    assert ends.code_distance[15] == 1 and ends.code_distance.sum() == 32


def test_a_step_is_a_distance():
    recipe = get_format("gguf-q4_0")
    params = recipe.fit(AWKWARD, False, None)
    assert (recipe.step(recipe.rank(AWKWARD, params, False), params) == params.abs()[:, None]).all()
    # Moving all weights of a block by one step changes all its buckets: the flip law says so of either sign of d.
    for sign in (1.0, -1.0):
        before = blocks([-8.0, *range(-6, 7)]) * sign
        after = before.clone()
        after[0, 1:14] += sign
        row = bucket_compare(before, after, "gguf-q4_0", scales="before").to_dict()
        assert row["code_distance"][1] == 13 and row["predicted_flip_share"] * 32 == pytest.approx(13)


@FORMATS
@DTYPES
def test_own_grid(format, dtype):
    once = fake_quant(gaussian(1000, dtype), format)
    moved = per_million(fake_quant(once, format) != once)
    assert_documented([f"`{format}`", SHORT[dtype], moved], "Which recipes reproduce their own grid")
