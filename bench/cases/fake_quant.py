"""fake_quant: one read and one write of the weight. Errors are in units of the weights."""

from functools import partial
from math import prod

import torch

from quail_kernels import FORMATS, fake_quant, get_format
from quail_kernels.formats import Format

from ..case import Case, Peer, import_peer
from ..models import LLAMA_3_8B, LLAMA_32_1B, SMOLLM2_135M, SQUARE, Model
from .plain_recipes import quantized, values
from .weights import bnb_options, judge_values, peers, weight

_COMPILED = ("bnb-nf4", "ct-int4-sym")


def _eager(w: torch.Tensor, recipe: Format) -> torch.Tensor:
    return values(*quantized(w, recipe), recipe).to(w.dtype).view(w.shape)


def _bitsandbytes(bnb, w: torch.Tensor, recipe: Format) -> torch.Tensor:
    return bnb.dequantize_4bit(*bnb.quantize_4bit(w, **bnb_options(recipe)))


def _torchao(recipe: Format) -> Peer:
    """Its quantization-aware training's int4, symmetric, whose scale is fp32."""

    def build(inputs: tuple, backend: str):
        qat = import_peer("torchao.quantization.qat")
        config = qat.IntxFakeQuantizeConfig(torch.int4, group_size=recipe.group_size, is_symmetric=True)
        return partial(qat.IntxFakeQuantizer(config), *inputs)

    return build


def _case(model: Model, format: str, dtype: torch.dtype, size: float, headline: bool) -> Case:
    recipe, shape = get_format(format), model.weight(size)
    found = peers(
        lambda w: fake_quant(w, format),
        partial(_eager, recipe=recipe),
        recipe,
        partial(_bitsandbytes, recipe=recipe),
        compile=headline and format in _COMPILED,
    )
    if recipe.name == "ct-int4-sym":
        found["torchao"] = _torchao(recipe)
    n = prod(shape)
    return Case(
        op="fake_quant",
        variant=format,
        model=model.name,
        shape=shape,
        dtype=dtype,
        useful_bytes=2 * n * dtype.itemsize,
        working_bytes=n * 40,
        inputs=lambda device: (weight(shape, dtype, device),),
        peers=found,
        expected=lambda inputs: fake_quant(inputs[0].cpu(), format).to(inputs[0].device),
        check=judge_values,
        headline=headline,
    )


def cases(size: float) -> list[Case]:
    made = [_case(LLAMA_3_8B, format, torch.bfloat16, size, format in _COMPILED) for format in FORMATS]
    for model in (SMOLLM2_135M, LLAMA_32_1B, SQUARE):
        made += [_case(model, format, torch.bfloat16, size, False) for format in _COMPILED]
    made += [_case(LLAMA_3_8B, "bnb-nf4", dtype, size, False) for dtype in (torch.float32, torch.float16)]
    made += [_case(SQUARE, format, torch.float32, size, False) for format in _COMPILED]
    return made
