"""The roundings of the microscaling kernels against PyTorch's casts, over fp32 inputs of every kind."""

import pytest
import torch
import triton
import triton.language as tl

from quail_kernels.formats import get_format, microscaling

BLOCK = 1 << 18
E4M3, E2M1, E2M1_TO_ZERO, THERE_AND_BACK, FLOOR, RCEIL = range(6)


@triton.jit
def _kernel(out_ptr, x_ptr, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    if WHAT == 0:
        out = microscaling.e4m3(x)
    elif WHAT == 1:
        out = microscaling.e2m1(x, x == x, False)
    elif WHAT == 2:
        out = microscaling.e2m1(x, x == x, True)
    elif WHAT == 3:
        out = microscaling.e2m1_level(microscaling.e2m1_code(x))
    elif WHAT == 4:
        out = microscaling.mx_fit(x, "mx_floor")
    else:
        out = microscaling.mx_fit(x, "mx_rceil")
    tl.store(out_ptr + offsets, out)


def run(x, what):
    padded = torch.cat([x, x[-1:].expand(-len(x) % BLOCK)])
    out = torch.empty_like(padded)
    _kernel[(len(padded) // BLOCK,)](out, padded, what, BLOCK)
    return out[: len(x)]


def same(got, expected):
    return torch.where(expected.isnan(), got.isnan(), got.view(torch.int32) == expected.view(torch.int32)).all()


def every_kind(step):
    """Every step-th fp32 number, which an odd step takes through all exponents, with either sign, NaN and inf."""
    bits = torch.arange(-(2**31), 2**31, step, dtype=torch.int64).to(torch.int32)
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-45, -1e-45, 2.0**-126])
    return torch.cat([bits.view(torch.float32), ends])


def test_e4m3_is_the_cast_of_pytorch():
    # One binade whole, so every mantissa and every tie; then all that the clamp lets through, and NaN.
    binade = (torch.arange(2**23, dtype=torch.int32) + (121 << 23)).view(torch.float32)
    x = torch.cat([binade, every_kind(2051)]).clamp(2.0**-6, 448.0)
    assert x.isnan().any() and (x == 448).any()
    all_nan_bits = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    x = torch.cat([x, all_nan_bits])
    assert same(run(x, E4M3), x.to(torch.float8_e4m3fn).float())


def near_midpoints():
    middle = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0])
    bits = middle.view(torch.int32)[:, None] + torch.arange(-2000, 2001, dtype=torch.int32)
    near = bits.view(-1).view(torch.float32)
    return torch.cat([near, -near])


@pytest.mark.parametrize(("what", "format"), [(E2M1, "mxfp4"), (E2M1_TO_ZERO, "gguf-mxfp4")])
def test_e2m1_is_what_the_thresholds_say(what, format):
    recipe = get_format(format)
    x = torch.cat([near_midpoints(), every_kind(4099)]).view(1, -1)
    levels = torch.tensor(recipe.levels)[recipe.rank(x, torch.ones(1), False)].view(-1)
    got = run(x.view(-1), what)
    assert same(got, levels)
    assert same(run(got, THERE_AND_BACK), levels), "through the code"


@pytest.mark.parametrize(("what", "format"), [(FLOOR, "mxfp4"), (RCEIL, "mxfp4-rceil")])
def test_scales_of_every_largest_weight(what, format):
    largest = torch.cat([near_midpoints(), every_kind(4099), (torch.arange(2**12) * 4097).int().view(torch.float32)])
    largest = largest.abs()
    assert same(run(largest, what), get_format(format).fit(largest[:, None], False, None))
