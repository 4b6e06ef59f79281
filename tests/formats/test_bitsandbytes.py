"""bnb-nf4 and bnb-fp4 against bitsandbytes, byte for byte; torchao's NF4, which is another format."""

import bitsandbytes.functional as bnb
import pytest
import torch
from golden import TEN_MILLION, assert_documented, assert_same_bits, gaussian, table_row, unpack
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

from quail_kernels import dequantize, fake_quant, get_format, quantize
from quail_kernels.formats import WEIGHT_DTYPES

DTYPES = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)


def check_against(w, quant_type, block):
    with torch.compiler.set_stance("force_eager"):
        packed, state = bnb.quantize_4bit(w, quant_type=quant_type, blocksize=block)
        expected = bnb.dequantize_4bit(packed, state)
    format = f"bnb-{quant_type}@{block}"
    codes, absmax = quantize(w, format)
    assert_same_bits(codes, packed.view(-1), "codes")
    assert_same_bits(absmax, state.absmax, "absmax")
    # For FP4's code 8 its C++ loop over the rest of a row gives -0, where all its other paths give 0.
    expected = expected.view(w.shape) + 0
    assert_same_bits(dequantize(codes, absmax, format, shape=w.shape, dtype=w.dtype), expected, "dequantize")
    assert_same_bits(fake_quant(w, format), expected, "fake_quant")


@DTYPES
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_ten_million_weights(quant_type, dtype):
    check_against(gaussian(TEN_MILLION, dtype).view(-1), quant_type, 64)


@DTYPES
@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_block_sizes_zeros_and_short_last_blocks(quant_type, block, dtype):
    for n in (1, 2, 31, block, block + 1, 3 * block + 30, 20 * block - 1):
        w = gaussian(20 * block // 1024 + 1, dtype, seed=n).view(-1)[:n].clone()
        w[block : 2 * block] = 0
        w[2 * block : 2 * block + 5] = -0.0
        check_against(w, quant_type, block)
    check_against(torch.zeros(block + 7, dtype=dtype), quant_type, block)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_ties_and_extremes(quant_type):
    thresholds = torch.tensor(get_format(f"bnb-{quant_type}").thresholds)
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    near = torch.cat(
        [thresholds, thresholds.nextafter(up), thresholds.nextafter(down), torch.zeros(18), -thresholds.abs()]
    )
    block = torch.cat([near, torch.ones(1)])[:64].clone()
    block[-1] = 1
    whole = torch.cat([block, block * 3, -block * 0.1, block[:63] * 7, block[-1:] * 7, block[13:64]])
    check_against(whole, quant_type, 64)
    # A tie takes the lower level.
    ranks = torch.tensor(get_format(f"bnb-{quant_type}").codes).argsort()[
        unpack(quantize(block, f"bnb-{quant_type}")[0]).long()
    ]
    assert ranks[:15].tolist() == list(range(15))
    for magnitude in (1e-40, 1e-38, 1e-30, 3e38):
        check_against(whole[:150] / 8 * magnitude, quant_type, 64)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_nan_and_infinity(quant_type):
    w = gaussian(1, torch.float32)[0, :192].view(3, 64).clone()
    w[0, 3], w[1, 7], w[2, 9] = torch.nan, torch.inf, -torch.inf
    packed, state = bnb.quantize_4bit(w, quant_type=quant_type, blocksize=64)
    codes, absmax = quantize(w, f"bnb-{quant_type}")
    assert_same_bits(codes, packed.view(-1), "codes")
    assert torch.equal(absmax.isnan(), state.absmax.isnan())


@DTYPES
def test_nf4_of_torchao_is_another_format(dtype):
    w = gaussian(TEN_MILLION + 240, dtype)  # it wants a multiple of 64 * 256 weights
    theirs = to_nf4(w, 64, 256)
    row = table_row(
        w, "bnb-nf4", "torchao 0.18.0, `to_nf4`", unpack(theirs.quantized_data), theirs.get_original_weight()
    )
    assert_documented(row, "NF4 of torchao")
