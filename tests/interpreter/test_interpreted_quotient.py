"""The division by a group's scale, in multiply-adds: the codes see what division gives, to the bit."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from quail_kernels.formats.integer import _quotient

NEAR = 2.0**-40  # below it the last bit may differ, where the correction underflows: every recipe rounds to 0
FAR = 2.0**22  # above it, too: every recipe clamps them


@triton.jit
def _quotient_kernel(
    out_ptr, x_ptr, scale_ptr, IN_FP32: tl.constexpr, FAR: tl.constexpr, UNBOUNDED: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.arange(0, BLOCK)
    x, scale = tl.load(x_ptr + i).to(tl.float32), tl.load(scale_ptr + i).to(tl.float32)
    tl.store(out_ptr + i, _quotient(x, scale, x_ptr.dtype.element_ty, IN_FP32, FAR, UNBOUNDED))


def quotient(x, scale, in_fp32, far, unbounded=True):
    out = torch.empty(x.shape)
    _quotient_kernel[(1,)](out, x, scale, IN_FP32=in_fp32, FAR=far, UNBOUNDED=unbounded, BLOCK=x.numel())
    return out


def assert_is_division(x, scale, in_fp32, far):
    got, expected = quotient(x, scale, in_fp32, far), x.float() / scale.float()
    if not in_fp32:
        expected = expected.to(x.dtype).float()
    tiny, huge = expected.abs() < NEAR, expected.abs() > FAR / 2
    assert (got[tiny].abs() < 2 * NEAR).all()
    assert (got[huge] * expected[huge].sign() > FAR / 4).all()
    decides = ~tiny & ~huge
    torch.testing.assert_close(got[decides], expected[decides], rtol=0, atol=0, equal_nan=True)


def fp32(exponents, generator, n):
    """Significands at random, of few bits, all ones or a power of two, with exponents from a range."""
    bits = generator.integers(0, 2**23, n)
    kind = generator.integers(0, 6, n)
    bits = np.where(kind == 0, 2**23 - 1 - (bits & 7), bits)
    bits = np.where(kind == 1, bits & 7, bits)
    bits = np.where(kind == 2, bits & ~np.int64(0xFFFF), bits)
    exponent = generator.integers(*exponents, n)
    sign = generator.integers(0, 2, n)
    return torch.from_numpy((sign << 31 | exponent << 23 | bits).astype(np.uint32).view(np.float32))


@pytest.mark.parametrize("exponents", [(100, 150), (0, 80), (170, 255), (0, 255)], ids=str)
def test_in_fp32(exponents):
    generator = np.random.default_rng(sum(exponents))
    scale = fp32(exponents, generator, 1 << 20).abs()
    scale = torch.where(scale == 0, 1e-45, scale)
    x = scale * fp32((118, 132), generator, 1 << 20)
    assert_is_division(x, scale, True, True)
    assert_is_division(fp32((0, 255), generator, 1 << 20), scale, True, True)


def test_near_what_codes_are_rounded_at():
    """Quotients at halves and whole numbers, and one number beside them."""
    generator = np.random.default_rng(0)
    scale = fp32((100, 150), generator, 1 << 20).abs()
    edge = torch.from_numpy(generator.integers(-33, 34, 1 << 20).astype(np.float32)) / 2
    x = scale * edge
    for direction in (-torch.inf, 0, torch.inf):
        assert_is_division(x if not direction else x.nextafter(torch.tensor(direction)), scale, True, True)
        assert_is_division(x if not direction else x.nextafter(torch.tensor(direction)), scale, True, False)


@pytest.mark.parametrize("x", [0.0, -0.0, 1e-45, 1.0, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan])
def test_numbers_at_the_ends(x):
    scale = torch.tensor([1e-45, 1e-40, 1e-38, 2.0**-60, 1.0, 2.0**60, 1e38, 3e38])
    x = torch.full((8,), x)
    assert_is_division(x, scale, True, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_pair_of_significands(dtype):
    """In the model's dtype the product alone has to do."""
    one = torch.ones((), dtype=dtype).view(torch.int16).item()
    significands = 1 << (7 if dtype == torch.bfloat16 else 10)
    numbers = torch.arange(one, one + significands, dtype=torch.int32).to(torch.int16).view(dtype)
    scale, x = (grid.reshape(-1).contiguous() for grid in torch.meshgrid(numbers, numbers, indexing="ij"))
    for shift in (1.0, 0.125, 8.0):
        assert_is_division(x * shift, scale, False, dtype == torch.bfloat16)
    if dtype == torch.bfloat16:
        for shift in (2.0**-126, 2.0**-130, 2.0**100):
            assert_is_division(x * shift, scale * shift, False, True)
