import importlib

import bitsandbytes.functional as bnb
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from quail_kernels import dequantize, fake_quant, get_format, quantize
from quail_kernels.formats import WEIGHT_DTYPES

# The package exports a function of the same name.
module = importlib.import_module("quail_kernels.fake_quant")

DTYPES = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
FORMAT_NAMES = ["bnb-nf4", "bnb-fp4", "ct-int4-sym@64", "minmax-int4", "minmax-int4@32"]


def weights(*shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def unpack(codes):
    return torch.stack([codes >> 4, codes & 15], dim=1).view(-1)


def assert_same_bits(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    different = got.contiguous().view(ints) != expected.contiguous().view(ints)
    assert not different.any(), f"{different.sum()} of {different.numel()} differ"


def check_against_bitsandbytes(w, quant_type, block):
    with torch.compiler.set_stance("force_eager"):
        packed, state = bnb.quantize_4bit(w, quant_type=quant_type, blocksize=block)
        expected = bnb.dequantize_4bit(packed, state)
    format = f"bnb-{quant_type}@{block}"
    codes, absmax = quantize(w, format)
    assert_same_bits(codes, packed.view(-1))
    assert_same_bits(absmax, state.absmax)
    # For FP4's code 8 its C++ loop over the rest of a row gives -0, where all its other paths give 0.
    expected = expected.view(w.shape) + 0
    assert_same_bits(dequantize(codes, absmax, format, shape=w.shape, dtype=w.dtype), expected)
    assert_same_bits(fake_quant(w, format), expected)


@DTYPES
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_on_ten_million_weights(quant_type, dtype):
    check_against_bitsandbytes(weights(10_000_000, dtype=dtype), quant_type, 64)


@DTYPES
@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_block_sizes_zeros_and_short_last_blocks(quant_type, block, dtype):
    for n in (1, 2, 31, block, block + 1, 3 * block + 30, 20 * block - 1):
        w = weights(n, dtype=dtype, seed=n)
        w[block : 2 * block] = 0
        w[2 * block : 2 * block + 5] = -0.0
        check_against_bitsandbytes(w, quant_type, block)
    check_against_bitsandbytes(torch.zeros(block + 7, dtype=dtype), quant_type, block)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_ties_and_extremes(quant_type):
    thresholds = torch.tensor(get_format(f"bnb-{quant_type}").thresholds)
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    near = torch.cat(
        [thresholds, thresholds.nextafter(up), thresholds.nextafter(down), torch.zeros(18), -thresholds.abs()]
    )
    block = torch.cat([near, torch.ones(1)])[:64].clone()
    block[-1] = 1
    whole = torch.cat([block, block * 3, -block * 0.1, block[:63] * 7, block[-1:] * 7, block[13:64]])
    check_against_bitsandbytes(whole, quant_type, 64)
    # A tie takes the lower level.
    ranks = torch.tensor(get_format(f"bnb-{quant_type}").codes).argsort()[
        unpack(quantize(block, f"bnb-{quant_type}")[0]).long()
    ]
    assert ranks[:15].tolist() == list(range(15))
    for magnitude in (1e-40, 1e-38, 1e-30, 3e38):
        check_against_bitsandbytes(whole[:150] / 8 * magnitude, quant_type, 64)


@st.composite
def cases(draw):
    format = draw(st.sampled_from(FORMAT_NAMES))
    dtype = draw(st.sampled_from(WEIGHT_DTYPES))
    lead = draw(st.lists(st.integers(0, 4), max_size=2))
    last = draw(st.integers(0, 300))
    size = get_format(format).group_size
    if get_format(format).groups_divide_last_dim and size:
        last = last // size * size
    scale = draw(st.sampled_from([1e-6, 0.02, 1.0, 1000.0]))
    return format, (weights(*lead, last, seed=draw(st.integers(0, 99))) * scale).to(dtype)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_round_trip(case):
    format, w = case
    recipe = get_format(format)
    codes, scales = quantize(w, format)
    w_q = fake_quant(w, format)
    assert codes.shape == ((w.numel() + 1) // 2,) and scales.shape[0] == recipe.groups(w.numel())
    assert_same_bits(dequantize(codes, scales, format, shape=w.shape, dtype=w.dtype), w_q)
    size = recipe.group_size or max(w.numel(), 1)
    for group, group_q in zip(w.view(-1).split(size), w_q.view(-1).split(size), strict=True):
        if not group.numel():
            continue
        group, group_q = group.double(), group_q.double()
        reach = group.max() - group.min() if recipe.n_params == 2 else group.abs().max()
        # Half the widest bucket: NF4 0.152, FP4 1/6, int4 1/15 of absmax, min-max 1/32 of the range.
        widest = {"bnb-nf4": 0.152, "bnb-fp4": 0.1667, "ct-int4-sym": 1 / 15, "minmax-int4": 1 / 32}[recipe.name]
        rounding = torch.finfo(w.dtype).eps * group.abs().max() + torch.finfo(w.dtype).tiny
        assert (group - group_q).abs().max() <= widest * reach * (1 + 1e-6) + 2 * rounding
    if recipe.kind == "codebook":
        assert torch.equal(fake_quant(w_q, format), w_q), "a bitsandbytes grid reproduces itself"


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_not_contiguous_weights(format):
    w = weights(128, 192).t()
    assert_same_bits(fake_quant(w, format), fake_quant(w.contiguous(), format))
    every_second = weights(64, 256)[:, ::2]
    assert_same_bits(quantize(every_second, format)[0], quantize(every_second.contiguous(), format)[0])


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0), (2, 0, 64)])
def test_empty(format, shape):
    w = torch.empty(shape, dtype=torch.bfloat16)
    codes, scales = quantize(w, format)
    assert codes.shape == (0,) and scales.shape[0] == 0
    assert fake_quant(w, format).shape == shape
    assert dequantize(codes, scales, format, shape=shape, dtype=w.dtype).shape == shape


@DTYPES
@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_straight_through_gradient_reaches_every_weight(format, dtype):
    w = weights(4, 192, dtype=dtype)
    w[0, 0] = 1  # defines the scale, and lies on the tie of the clamp in ct-int4-sym
    w.requires_grad_()
    grad = weights(4, 192, dtype=dtype, seed=1)
    fake_quant(w, format).backward(grad)
    assert_same_bits(w.grad, grad)


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_nan_and_infinity_spoil_their_group_only(format):
    size = get_format(format).group_size
    for bad in (torch.nan, torch.inf, -torch.inf):
        w = weights(4, 64)
        w[1, 5] = bad
        group = slice(64 // size * size, 64 + size) if size and size < 64 else slice(64, 128) if size else slice(0, 256)
        w_q = fake_quant(w, format).view(-1)
        spoiled = torch.zeros(256, dtype=torch.bool)
        spoiled[group] = True
        assert w_q[~spoiled].isfinite().all()
        assert not w_q[group][:size].isfinite().any()
        if bad != bad:
            assert w_q[group][:size].isnan().all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_nan_and_infinity_as_bitsandbytes_has_them(quant_type):
    w = weights(3, 64)
    w[0, 3], w[1, 7], w[2, 9] = torch.nan, torch.inf, -torch.inf
    packed, state = bnb.quantize_4bit(w, quant_type=quant_type, blocksize=64)
    codes, absmax = quantize(w, f"bnb-{quant_type}")
    assert_same_bits(codes, packed.view(-1))
    assert torch.equal(absmax.isnan(), state.absmax.isnan())


class LargeTensors(TorchDispatchMode):
    """Collects the operators that made a tensor of more than a limit."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.found = limit, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = func._schema.returns and not any(ret.alias_info for ret in func._schema.returns)
        if made and isinstance(out, torch.Tensor) and out.nbytes > self.limit:
            self.found.append(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_reference_makes_no_temporary_of_the_size_of_the_weight(format):
    w = weights(8192, 2048, dtype=torch.bfloat16)
    with LargeTensors(8 * 2**20) as large:
        module._fake_quant_torch(w, get_format(format))
    assert large.found == ["empty"], "the output is the one large tensor"


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_opcheck(format):
    w = weights(4, 192)
    opcheck(torch.ops.quail.fake_quant.default, (w.clone().requires_grad_(), format, None))
    opcheck(torch.ops.quail.quantize.default, (w, format, None))
    codes, scales = quantize(w, format)
    opcheck(torch.ops.quail.dequantize.default, (codes, scales, format, None, [4, 192], torch.float32))


def test_compiles_without_a_graph_break():
    def step(w):
        codes, scales = quantize(w, "bnb-nf4", 128)
        return fake_quant(w, "ct-int4-sym@64") * dequantize(codes, scales, "bnb-nf4@128", shape=w.shape, dtype=w.dtype)

    eager, compiled = (weights(8, 256).requires_grad_() for _ in range(2))
    out, out_compiled = step(eager), torch.compile(step, fullgraph=True)(compiled)
    assert torch.equal(out, out_compiled)
    out.sum().backward()
    out_compiled.sum().backward()
    assert torch.equal(eager.grad, compiled.grad)


def test_two_runs_are_bit_equal():
    w = weights(1000, 576)
    for format in FORMAT_NAMES:
        assert_same_bits(fake_quant(w, format), fake_quant(w, format))


def test_what_is_refused():
    w = torch.zeros(4, 96)
    codes, scales = quantize(w, "bnb-nf4")
    refused = [
        (lambda: fake_quant(w.double(), "bnb-nf4"), "w: expected float32, bfloat16 or float16; got float64"),
        (lambda: quantize(w.int(), "bnb-nf4"), "w: expected float32, bfloat16 or float16; got int32"),
        (
            lambda: fake_quant(w, "ct-int4-sym"),
            r"w: expected a last dimension that is a multiple of 128.*ct-int4-sym; got shape \(4, 96\)",
        ),
        (lambda: fake_quant(torch.tensor(1.0), "ct-int4-sym@8"), r"multiple of 8.*got shape \(\)"),
        (
            lambda: dequantize(codes, scales, "bnb-nf4", shape=(4, 95), dtype=w.dtype),
            r"codes: expected torch.uint8 \[190\] for shape \(4, 95\); got torch.uint8 \[192\]",
        ),
        (
            lambda: dequantize(codes, scales[:-1], "bnb-nf4", shape=w.shape, dtype=w.dtype),
            r"scales: expected floating-point \[6\] for 384 weights in bnb-nf4@64; got torch.float32 \[5\]",
        ),
        (
            lambda: dequantize(codes, scales, "bnb-nf4", shape=w.shape, dtype=torch.int8),
            "dtype: expected float32",
        ),
        (
            lambda: dequantize(codes, scales, "ct-int4-sym", shape=w.shape, dtype=w.dtype),
            "shape: expected a last",
        ),
    ]
    for call, says in refused:
        with pytest.raises(ValueError, match=says):
            call()
