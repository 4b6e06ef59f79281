import importlib

import hypothesis.strategies as st
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle import forward as ct
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from quail_kernels import dequantize, fake_quant, get_format, quantize
from quail_kernels.formats import WEIGHT_DTYPES

# The package exports a function of the same name.
module = importlib.import_module("quail_kernels.fake_quant")

DTYPES = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
FORMAT_NAMES = [
    *("bnb-nf4", "bnb-fp4", "ct-int4-sym@64", "minmax-int4", "minmax-int4@32"),
    *("gguf-q4_0", "gguf-q4_1", "mxfp4", "mxfp4-rceil", "gguf-mxfp4", "nvfp4"),
]


def weights(*shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def unpack(codes):
    return torch.stack([codes >> 4, codes & 15], dim=1).view(-1)


def assert_same_bits(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    different = got.contiguous().view(ints) != expected.contiguous().view(ints)
    assert not different.any(), f"{different.sum()} of {different.numel()} differ"


def compressed_tensors(w, group_size):
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size)
    groups = w.unflatten(-1, (-1, group_size))
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    q = ct.quantize(w, scale, zero_point, args, dtype=torch.int8)
    return q, scale, ct.fake_quantize(w, scale, zero_point, args), ct.dequantize(q, scale, zero_point, args)


@DTYPES
@pytest.mark.parametrize("group_size", [32, 64, 96, 128])
def test_compressed_tensors(group_size, dtype):
    w = weights(2000, 1152, dtype=dtype)
    w[3] = 0
    w[4] = -0.0
    w[5] *= 1e-6
    w[6] = w[6].abs()
    w[7, ::2] = w[7].abs().max()
    # Every multiple of half a step, so every tie.
    w[8] = torch.arange(1152).remainder(31) - 15
    q, scale, fake_quantized, dequantized = compressed_tensors(w, group_size)
    codes, scales = quantize(w, "ct-int4-sym", group_size)
    assert torch.equal(unpack(codes).int() - 8, q.view(-1).int())
    assert_same_bits(scales, scale.view(-1))
    assert torch.equal(fake_quant(w, "ct-int4-sym", group_size), fake_quantized)
    assert torch.equal(dequantize(codes, scales, "ct-int4-sym", group_size, shape=w.shape, dtype=dtype), dequantized)


def test_compressed_tensors_rounds_in_the_dtype_of_the_model():
    """What a recipe is frozen for: the same weights in fp32 arithmetic give other codes."""
    w = weights(1000, 1024, dtype=torch.bfloat16)
    in_bf16, in_fp32 = (unpack(quantize(x, "ct-int4-sym")[0]) for x in (w, w.float()))
    assert 0.004 < (in_bf16 != in_fp32).double().mean() < 0.01


@DTYPES
@pytest.mark.parametrize("group_size", [None, 32, 96])
def test_minmax_against_its_definition(group_size, dtype):
    w = weights(50, 192, dtype=dtype)
    w[1] = 0.5
    groups = w.float().view(-1, group_size or w.numel()).numpy()
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    step = (high - low) / 16
    bucket = ((groups - low) / step.clip(1e-30)).clip(0, 15).astype(int)
    codes, params = quantize(w, "minmax-int4", group_size)
    assert unpack(codes).tolist() == bucket.reshape(-1).tolist()
    assert torch.equal(params, torch.cat([torch.tensor(step), torch.tensor(low)], dim=1))
    value = torch.tensor(low + (bucket + low.dtype.type(0.5)).astype("float32") * step).view(w.shape).to(dtype)
    assert torch.equal(fake_quant(w, "minmax-int4", group_size), value)


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
        # Half the widest bucket: NF4 0.152, FP4 1/6, int4 1/15 of absmax, min-max 1/32 of the range. Q4_0 clamps
        # what lies a whole step beyond its end; MXFP4 clamps 8 units to 6; of the rest an absmax that is 5 of its
        # units, or 17/16 of 6 where that much E4M3 rounds, may lose one.
        widest = {
            **{"bnb-nf4": 0.152, "bnb-fp4": 0.1667, "ct-int4-sym": 1 / 15, "minmax-int4": 1 / 32},
            **{"gguf-q4_0": 1 / 8, "gguf-q4_1": 1 / 30, "mxfp4": 1 / 4, "mxfp4-rceil": 1 / 5},
            **{"gguf-mxfp4": 1 / 4, "nvfp4": 1 / 5},
        }[recipe.name]
        rounding = torch.finfo(w.dtype).eps * group.abs().max() + torch.finfo(w.dtype).tiny
        if recipe.name in ("gguf-q4_0", "gguf-q4_1"):
            # The scale and the minimum are stored in fp16, half of whose ulp is 2^-11 or, of a subnormal, 2^-25.
            rounding += 2 * 2**-11 * group.abs().max() + 8 * 2**-24
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
        if get_format(format).needs_tensor:
            assert not w_q.isfinite().any(), "a group's scale is relative to the tensor's"
            continue
        spoiled = torch.zeros(256, dtype=torch.bool)
        spoiled[group] = True
        assert w_q[~spoiled].isfinite().all()
        if get_format(format).kind.startswith("mx_") and bad == bad:
            assert w_q[69] == bad, "a power of two as the scale: the rest of its group is 0"
            continue
        assert not w_q[group][:size].isfinite().any()
        if bad != bad:
            assert w_q[group][:size].isnan().all()


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
