"""The interpreter itself: what its repairs have to catch, they catch."""

from fractions import Fraction

import interpreter_repair
import numpy as np
import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _copy_kernel(out_ptr, in_ptr, shift, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(in_ptr + offsets + shift).to(tl.float32)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty))


@triton.jit
def _store_beyond_kernel(out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK) + 1, tl.zeros([BLOCK], tl.float32))


@triton.jit
def _add_in_bf16_kernel(out_ptr, in_ptr, BLOCK: tl.constexpr):
    x = tl.load(in_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.arange(0, BLOCK), x + x)


@triton.jit
def _hint_kernel(out_ptr, shift, BLOCK: tl.constexpr):
    start = tl.multiple_of(out_ptr + shift, 16)
    tl.store(start + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))


@triton.jit
def _fma_kernel(out_ptr, x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.fma(tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest_kernel(out_ptr, in_ptr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    x = tl.load(in_ptr + row[:, None] * BLOCK + column[None, :])
    tl.store(out_ptr + row, tl.reduce(x, 1, _larger))
    tl.store(out_ptr + ROWS + row, tl.sum(tl.maximum(tl.reduce(x, 1, _larger, keep_dims=True), 0.5), axis=1))


def _rounded_once(x, y, z):
    """x * y + z to the nearest fp32 number, ties to even, by fractions."""
    exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
    guess = np.float32(float(exact))
    near = (np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf)))
    return min(near, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(np.int32)) & 1))


def test_fma_rounds_once():
    generator = np.random.default_rng(0)
    x, y = (generator.standard_normal((2, 1024)) * 2.0 ** generator.integers(-20, 20, (2, 1024))).astype(np.float32)
    # What the product leaves, its halves and its neighbours: there rounding twice shows.
    z = -(x * y)
    z[256:512] *= np.float32(2**-24)
    z[512:768] = np.nextafter(z[512:768], np.float32(0))
    z[768:] = generator.standard_normal(256).astype(np.float32) * np.float32(2**25)
    x[-4:], y[-4:], z[-4:] = 1e-30, 1e-10, 1e-38
    out = torch.empty(1024)
    _fma_kernel[(1,)](out, *map(torch.from_numpy, (x, y, z)), BLOCK=1024)
    expected = np.array([_rounded_once(*row) for row in zip(x, y, z, strict=True)])
    twice = x * y + z
    assert (twice != expected).any()
    np.testing.assert_array_equal(out.numpy(), expected)


def test_a_reduction_of_the_kernels_own_and_what_a_maximum_makes_of_nan():
    x = torch.randn(4, 64) - 8
    x[1, 17], x[2, 5] = torch.nan, torch.inf
    out = torch.empty(8)
    _largest_kernel[(1,)](out, x, ROWS=4, BLOCK=64)
    torch.testing.assert_close(out[:4], x.amax(dim=1), rtol=0, atol=0, equal_nan=True)
    assert out[4:].tolist() == [0.5, 0.5, torch.inf, 0.5]


def test_a_wrong_hint_raises():
    out = torch.ones(24)
    _hint_kernel[(1,)](out, 4, BLOCK=16)
    assert not out[4:20].any()
    with pytest.raises(ValueError, match="tl.multiple_of: expected multiples of"):
        _hint_kernel[(1,)](out, 3, BLOCK=16)


def test_traffic_counts_every_element():
    x, out = torch.zeros(16), torch.zeros(16, dtype=torch.bfloat16)
    with interpreter_repair.traffic() as launches:
        _copy_kernel[(2,)](out, x, 4, BLOCK=8)
    (launch,) = launches
    assert launch.reads("in_ptr").tolist() == [0] * 4 + [2] * 8 + [0] * 4
    assert launch.writes("out_ptr").tolist() == [2] * 8 + [0] * 8
    assert launch.bytes_read("in_ptr") == 64 and launch.bytes_written("out_ptr") == 32
    assert launch.bytes_read("out_ptr") == launch.bytes_written("in_ptr") == 0


def test_load_out_of_bounds_raises():
    x, out = torch.zeros(16), torch.zeros(16)
    _copy_kernel[(1,)](out, x, 0, BLOCK=16)
    with pytest.raises(IndexError, match="load out of bounds in 3 lanes"):
        _copy_kernel[(1,)](out, x, 3, BLOCK=16)


def test_store_out_of_bounds_raises():
    with pytest.raises(IndexError, match="store out of bounds in 1 lanes"):
        _store_beyond_kernel[(1,)](torch.zeros(16), BLOCK=16)


def test_cast_to_bf16_rounds_to_nearest_even():
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(0))
    special = torch.tensor([0x3F808000, 0x3F818000, 0x00000001, 0x00018000, 0x7F7FFFFF, 0x7F800000, 0x7FC00001])
    x = torch.cat([bits, special, torch.zeros((1 << 17) - bits.numel() - 7)]).to(torch.int32).view(torch.float32)
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    _copy_kernel[(1,)](out, x, 0, BLOCK=1 << 17)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_arithmetic_in_bf16_raises():
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="arithmetic in bf16"):
        _add_in_bf16_kernel[(1,)](torch.empty_like(x), x, BLOCK=16)
