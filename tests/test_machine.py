"""A CPU without bf16 instructions: the same numbers as from PyTorch's own product, by a faster way."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quail.machine import linear_in_fp32

CPU = torch.device("cpu")


@pytest.fixture
def without_bf16(monkeypatch):
    monkeypatch.setattr("quail.machine._cpuinfo", lambda: "flags : avx2 fma")


@pytest.fixture
def products(monkeypatch):
    """The dtypes of what PyTorch's own ``F.linear`` is given."""
    given, plain = [], F.linear
    monkeypatch.setattr(F, "linear", lambda input, *rest: given.append(input.dtype) or plain(input, *rest))
    return given


def _layer(bias: bool) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(192, 96, bias=bias).bfloat16(), torch.randn(3, 5, 192).bfloat16()


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_result_is_the_exact_one_rounded_once(without_bf16, products, bias):
    layer, x = _layer(bias)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    products.clear()
    with linear_in_fp32(CPU):
        y = layer(x)
    assert products == [torch.float32] and y.dtype == torch.bfloat16
    # Off by more than half a step of bf16 only where fp32 sums fall on the other side of a tie.
    assert (y.double() - exact).abs().le(exact.abs() * 2**-8 * 1.01 + 1e-6).all()
    assert (y == exact.bfloat16()).double().mean() > 0.99


@torch.no_grad()
def test_a_layer_of_bitsandbytes_takes_that_way_too(without_bf16, products):
    layer, x = _layer(True)
    packed = bnb.nn.Linear4bit(192, 96, compute_dtype=torch.bfloat16, quant_type="nf4")
    packed.load_state_dict(layer.state_dict())
    packed = packed.to("cpu").train()  # in evaluation mode it may pack for its kernel with AVX512-BF16
    weight = bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    with linear_in_fp32(CPU):
        y = packed(x)
        assert torch.equal(y, F.linear(x, weight.bfloat16(), packed.bias.bfloat16()))
    assert set(products) == {torch.float32}


@torch.no_grad()
def test_other_dtypes_and_machines_keep_pytorchs_own(without_bf16, products, monkeypatch):
    layer, x = _layer(True)
    with linear_in_fp32(CPU):
        layer.half()(x.half())
        layer.double()(x.double())
        layer.bfloat16()
    with linear_in_fp32(torch.device("cuda")):
        layer(x)
    monkeypatch.setattr("quail.machine._cpuinfo", lambda: "flags : amx_bf16")
    with linear_in_fp32(CPU):
        layer(x)
    assert products == [torch.float16, torch.float64, torch.bfloat16, torch.bfloat16]


def test_pytorchs_function_is_back_after_an_error_and_between_two(without_bf16):
    plain = F.linear
    with pytest.raises(RuntimeError), linear_in_fp32(CPU), linear_in_fp32(CPU):
        assert F.linear is not plain
        raise RuntimeError
    assert F.linear is plain
