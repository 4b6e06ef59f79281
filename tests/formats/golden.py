"""What the golden tests of the formats share."""

import re
from pathlib import Path

import torch

import quail_kernels.formats as formats
from quail_kernels import dequantize, fake_quant, quantize

TEN_MILLION = 10_000  # rows of 1024


def gaussian(rows, dtype, seed=0):
    w = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(seed)) * 0.02
    return w.to(dtype)


def unpack(codes):
    return torch.stack([codes >> 4, codes & 15], dim=1).view(-1)


def assert_same_bits(got, expected, what):
    """-0 is not 0 here; a NaN is a NaN whatever its payload."""
    assert got.dtype == expected.dtype and got.numel() == expected.numel(), what
    got, expected = got.reshape(-1), expected.reshape(-1)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    different = got.view(bits) != expected.view(bits)
    if got.is_floating_point():
        different &= ~(got.isnan() & expected.isnan())
    at = different.nonzero().view(-1)[:3].tolist()
    assert not at, f"{what}: {different.sum()} of {got.numel()} differ, first at {at}: {got[at]} for {expected[at]}"


def check(w, format, codes, scales, values):
    """The codes, the scales as stored and the values that a library gave, against ours bit for bit."""
    got_codes, got_scales = quantize(w, format)
    assert_same_bits(unpack(got_codes), codes, "codes")
    assert_same_bits(got_scales, scales, "scales")
    assert_same_bits(fake_quant(w, format), values, "fake_quant")
    got = dequantize(got_codes, got_scales, format, shape=w.shape, dtype=w.dtype)
    assert_same_bits(got, values, "dequantize")


def documented(heading):
    """The rows of the table under a heading of formats/README.md, without its head."""
    text = (Path(formats.__file__).parent / "README.md").read_text()
    (section,) = (part for part in re.split(r"^## ", text, flags=re.MULTILINE) if part.startswith(heading))
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def table_row(w, format, other, codes, values):
    """What the table of formats/README.md says of these codes and values of another's, but for the cause."""
    differ = unpack(quantize(w, format)[0]) != codes, fake_quant(w, format) != values
    return [f"`{format}`", other, SHORT[w.dtype], f"{w.numel():,}", *map(per_million, differ)]


def assert_documented(row, heading):
    assert row in [line[: len(row)] for line in documented(heading)], f"formats/README.md, {heading}: {row}"


def per_million(different):
    """As the tables write it: whole where there are ten or more, else to a hundredth, which is one of ten million."""
    rate = different.double().mean().item() * 1e6
    return f"{rate:,.0f}" if rate >= 10 or rate == 0 else f"{rate:.2f}"
