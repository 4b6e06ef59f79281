import importlib
import warnings

import hypothesis.strategies as st
import pytest
import torch
import weight_cases
from hypothesis import given, settings
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from weight_cases import FORMAT_NAMES, LAYOUTS, laid_out, same_bits, spoiled_by

from quail_kernels import dequantize, fake_quant, get_format, quantize
from quail_kernels.formats import WEIGHT_DTYPES, group_chunks

# The package exports a function of the same name.
module = importlib.import_module("quail_kernels.fake_quant")

DTYPES = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
ALL_FORMATS = pytest.mark.parametrize("format", FORMAT_NAMES)


def weights(*shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def unpack(codes):
    return torch.stack([codes >> 4, codes & 15], dim=1).view(-1)


def assert_same_bits(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    different = got.contiguous().view(ints) != expected.contiguous().view(ints)
    assert not different.any(), f"{different.sum()} of {different.numel()} differ"


@settings(max_examples=300, deadline=None)
@given(weight_cases.weights())
def test_whatever_the_weights_are(case):
    """Strides change nothing, two runs are one, a pass is a quantize and a dequantize, and NaN is never hidden."""
    format, w = case
    recipe = get_format(format)
    w_q = fake_quant(w, format)
    codes, scales = quantize(w, format)
    assert w_q.is_contiguous() and w_q.shape == w.shape and w_q.dtype == w.dtype
    assert codes.shape == ((w.numel() + 1) // 2,) and scales.shape == recipe.params_shape(w.numel())
    assert same_bits(dequantize(codes, scales, format, shape=w.shape, dtype=w.dtype), w_q)
    flat = w.contiguous().clone()
    assert same_bits(fake_quant(flat, format), w_q)
    assert all(map(same_bits, quantize(flat, format), (codes, scales)))
    with_nan, spoiled = spoiled_by(recipe, w)
    assert w_q.view(-1)[with_nan].isnan().all(), "a NaN makes its group NaN"
    assert not w_q.view(-1)[~w.reshape(-1).isfinite()].isfinite().any(), "an infinity does not become a number"
    largest = min(torch.finfo(recipe.params_dtype(w.dtype)).max, torch.finfo(w.dtype).max) / 1000
    if (w[w.isfinite()].abs() < largest).all():
        assert w_q.view(-1)[~spoiled].isfinite().all(), "a group without NaN and infinity is not spoiled by another"


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FORMAT_NAMES),
    st.sampled_from(WEIGHT_DTYPES),
    st.integers(1, 4),
    st.sampled_from([1e-6, 0.02, 1.0, 1000.0]),
    st.integers(0, 99),
)
def test_a_weight_moves_by_less_than_the_width_of_its_bucket(format, dtype, rows, scale, seed):
    w = (weights(rows, 384, seed=seed) * (50 * scale)).to(dtype)
    recipe = get_format(format)
    w_q = fake_quant(w, format).view(-1).double()
    of_tensor = recipe.fit_tensor(w)
    for span, _, x, short in group_chunks(w, recipe):
        params = recipe.params(x, short, of_tensor)
        step = recipe.step(recipe.rank(x, params, short), params).double()
        # What is lost where the scale is stored in fewer bits than the codes were decided with, and in the cast.
        stored = (params.double() - params.to(recipe.params_dtype(dtype)).double()).abs().view(len(params), -1)
        largest = x.double().abs().amax(dim=1, keepdim=True)
        rounding = 16 * stored.sum(dim=1, keepdim=True) + 4 * torch.finfo(dtype).eps * largest + torch.finfo(dtype).tiny
        # A zero point has four bits: a group that lies on one side of zero may be out of its reach.
        around_zero = (x.amin(dim=1) <= 0) & (x.amax(dim=1) >= 0)
        far = (x.double() - w_q[span].view(x.shape)).abs() > step + rounding
        assert not far[around_zero].any()


@pytest.mark.parametrize("format", ["bnb-nf4", "bnb-fp4", "bnb-nf4@4096"])
def test_a_bitsandbytes_grid_reproduces_itself(format):
    w_q = fake_quant(weights(33, 67), format)
    assert torch.equal(fake_quant(w_q, format), w_q)


@pytest.mark.parametrize("shape", [(0,), (0, 384), (3, 0), (2, 0, 384)])
@ALL_FORMATS
def test_empty(format, shape):
    w = torch.empty(shape, dtype=torch.bfloat16)
    codes, scales = quantize(w, format)
    assert codes.shape == (0,) and scales.shape[0] == 0
    assert fake_quant(w, format).shape == shape
    assert dequantize(codes, scales, format, shape=shape, dtype=w.dtype).shape == shape


@DTYPES
@ALL_FORMATS
def test_straight_through_gradient_reaches_every_weight(format, dtype):
    """The gradient of a step function is no derivative, and so gradcheck could only find it wrong."""
    w = weights(4, 384, dtype=dtype)
    w[0, 0] = 1  # defines the scale, and lies on the tie of the clamp in ct-int4-sym
    grad = weights(4, 384, dtype=dtype, seed=1)
    for layout in LAYOUTS:
        leaf = laid_out(w, layout).detach().requires_grad_()
        fake_quant(leaf, format).backward(grad)
        assert_same_bits(leaf.grad, grad)


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


@pytest.mark.parametrize("layout", ["contiguous", "columns", "transposed"])
@ALL_FORMATS
def test_references_make_no_temporary_of_the_size_of_the_weight(format, layout):
    w = laid_out(weights(8192, 1536, dtype=torch.bfloat16), layout)
    recipe = get_format(format)
    with LargeTensors(w.numel()) as large:
        module._fake_quant_torch(w, recipe)
    assert large.found == ["empty"], "the output is the one large tensor"
    # Codes and scales in fp32 may be as large as this for the smallest groups; int32 temporaries would be larger.
    with LargeTensors(w.numel()) as large:
        codes, scales = module._quantize_torch(w, recipe)
    assert large.found == []
    with LargeTensors(w.numel()) as large:
        module._dequantize_torch(codes, scales, recipe, w.shape, w.dtype)
    assert large.found == ["empty"]


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@ALL_FORMATS
def test_opcheck(format, layout):
    w = laid_out(weights(4, 384), layout)
    opcheck(torch.ops.quail.fake_quant.default, (w.detach().requires_grad_(), None, format))
    opcheck(torch.ops.quail.quantize.default, (w, None, format))
    codes, scales = quantize(w, format)
    opcheck(torch.ops.quail.dequantize.default, (codes, scales, None, format, [4, 384], torch.float32))


@ALL_FORMATS
def test_meta_tensors_have_the_shapes_of_real_ones(format):
    for layout in LAYOUTS:
        w = laid_out(weights(5, 384, dtype=torch.bfloat16), layout)
        real = [fake_quant(w, format), *quantize(w, format)]
        meta = [fake_quant(w.to("meta"), format), *quantize(w.to("meta"), format)]
        meta.append(dequantize(*meta[1:], format, shape=w.shape, dtype=w.dtype))
        for a, b in zip([*real, real[0]], meta, strict=True):
            assert b.is_meta and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@ALL_FORMATS
def test_vmap_is_a_loop(format):
    w = weights(3, 2, 384)
    mapped = torch.vmap(lambda w: fake_quant(w, format))(w)
    assert_same_bits(mapped, torch.stack([fake_quant(part, format) for part in w]))


class RoundTrip(torch.nn.Module):
    def __init__(self, format):
        super().__init__()
        self.format = format

    def forward(self, w):
        codes, scales = quantize(w, self.format)
        w_q = dequantize(codes, scales, self.format, shape=w.shape, dtype=w.dtype)
        return codes, scales, w_q, fake_quant(w, self.format) * 2


@ALL_FORMATS
def test_export_with_any_number_of_rows(format):
    step = RoundTrip(format)
    # A dimension of one, as the scales of a single group have, is never dynamic: here is more than one.
    rows = torch.export.Dim("rows", min=22, max=2**20)
    program = torch.export.export(step, (weights(32, 384),), dynamic_shapes=({0: rows},))
    for n in (23, 64):
        w = weights(n, 384, seed=n)
        assert all(map(torch.equal, program.module()(w), step(w)))


def test_compiles_without_a_graph_break():
    steps = [RoundTrip(format) for format in FORMAT_NAMES]

    def outputs(w):
        return [out for step in steps for out in step(w)]

    eager, compiled = (weights(8, 384).requires_grad_() for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")  # by conftest.py
        out, out_compiled = outputs(eager), torch.compile(outputs, fullgraph=True, backend="aot_eager")(compiled)
    assert all(map(torch.equal, out, out_compiled))
    sum(part.sum() for part in out[3::4]).backward()
    sum(part.sum() for part in out_compiled[3::4]).backward()
    assert torch.equal(eager.grad, compiled.grad)


def test_compiles_with_inductor():
    def step(w):
        return fake_quant(w.t(), "bnb-nf4") + fake_quant(w, "ct-int4-sym@64").t()

    w = weights(8, 384)
    assert torch.equal(torch.compile(step, fullgraph=True)(w), step(w))


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
