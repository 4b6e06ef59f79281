"""quantize and dequantize. Errors: of quantize in codes, of dequantize in units of the weights."""

from functools import partial
from math import prod

import torch

from quail_kernels import FORMATS, dequantize, get_format, quantize
from quail_kernels.formats import Format

from ..case import Case, Check
from ..models import LLAMA_3_8B, Model
from .plain_recipes import quantized, values
from .weights import bnb_options, judge, judge_values, peers, weight

_DTYPE = torch.bfloat16


def _eager_quantize(w: torch.Tensor, recipe: Format) -> tuple[torch.Tensor, torch.Tensor]:
    rank, params = quantized(w, recipe)
    codes = torch.tensor(recipe.codes, dtype=torch.uint8, device=w.device)[rank].view(-1)
    return codes[0::2] << 4 | codes[1::2], params.to(recipe.params_dtype(w.dtype))


def _eager_dequantize(
    codes: torch.Tensor, scales: torch.Tensor, *_, recipe: Format, shape: tuple[int, ...]
) -> torch.Tensor:
    code = torch.stack([codes >> 4, codes & 15], dim=1).view(-1, recipe.group_size or 2 * codes.numel())
    rank = torch.tensor(recipe.codes, device=codes.device).argsort()[code.int()]
    return values(rank, scales, recipe).to(_DTYPE).view(shape)


def _bitsandbytes_quantize(bnb, w: torch.Tensor, recipe: Format) -> tuple[torch.Tensor, torch.Tensor]:
    codes, state = bnb.quantize_4bit(w, **bnb_options(recipe))
    return codes.view(-1), state.absmax


def _bitsandbytes_dequantize(
    bnb, codes: torch.Tensor, scales: torch.Tensor, *_, recipe: Format, shape: tuple[int, ...]
) -> torch.Tensor:
    state = bnb.QuantState(absmax=scales, shape=torch.Size(shape), dtype=_DTYPE, **bnb_options(recipe))
    state.code = bnb.get_4bit_type(state.quant_type, device=codes.device)
    return bnb.dequantize_4bit(codes.view(-1, 1), state)


def _judge_codes(inputs: tuple, expected: tuple, answer: tuple, peer: str) -> Check:
    nibbles = [torch.stack([codes >> 4, codes & 15]).int() for codes, _ in (expected, answer)]
    error = (nibbles[0] - nibbles[1]).abs()
    equal = all(torch.equal(a, b) for a, b in zip(expected, answer, strict=True))
    return judge(error > 0, error, peer, equal)


def _quantized_on_cpu(w: torch.Tensor, format: str) -> tuple[torch.Tensor, ...]:
    return tuple(part.to(w.device) for part in quantize(w.cpu(), format))


def _cases(model: Model, format: str, size: float, headline: bool) -> list[Case]:
    recipe, shape = get_format(format), model.weight(size)
    n = prod(shape)
    stored = n // 2 + prod(recipe.params_shape(n)) * recipe.params_dtype(_DTYPE).itemsize
    common = {
        "variant": format,
        "model": model.name,
        "shape": shape,
        "dtype": _DTYPE,
        "useful_bytes": n * _DTYPE.itemsize + stored,
        "working_bytes": n * 40,
        "headline": headline,
    }

    def packed(device: torch.device) -> tuple[torch.Tensor, ...]:
        w = weight(shape, _DTYPE, device)
        # What is expected of dequantize is the reference's answer to the reference's codes.
        codes, scales = quantize(w.cpu(), format)
        expected = dequantize(codes, scales, format, shape=shape, dtype=_DTYPE)
        return codes.to(device), scales.to(device), expected.to(device)

    return [
        Case(
            op="quantize",
            inputs=lambda device: (weight(shape, _DTYPE, device),),
            peers=peers(
                lambda w: quantize(w, format),
                partial(_eager_quantize, recipe=recipe),
                recipe,
                partial(_bitsandbytes_quantize, recipe=recipe),
                compile=headline,
            ),
            expected=lambda inputs: _quantized_on_cpu(inputs[0], format),
            check=_judge_codes,
            **common,
        ),
        Case(
            op="dequantize",
            inputs=packed,
            peers=peers(
                lambda codes, scales, _: dequantize(codes, scales, format, shape=shape, dtype=_DTYPE),
                partial(_eager_dequantize, recipe=recipe, shape=shape),
                recipe,
                partial(_bitsandbytes_dequantize, recipe=recipe, shape=shape),
                compile=headline,
            ),
            expected=lambda inputs: inputs[2],
            check=judge_values,
            **common,
        ),
    ]


def cases(size: float) -> list[Case]:
    return [case for format in FORMATS for case in _cases(LLAMA_3_8B, format, size, format == "bnb-nf4")]
