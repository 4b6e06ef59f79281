"""bucket_compare: two reads, nothing of their size written. Errors are in weights counted.

The peers count less than ours: how many weights kept their bucket and, in plain PyTorch, their value, and how large
the change is.
"""

from functools import partial
from math import prod

import torch

from quail_kernels import FORMATS, bucket_compare, get_format
from quail_kernels.formats import Format

from ..case import Case, Check
from ..models import LLAMA_3_8B, SMOLLM2_135M, SQUARE, Model
from .plain_recipes import buckets, quantized, values
from .weights import EXACT, OTHERS_MAY_DIFFER, bnb_options, peers, weight

_COMPILED = ("bnb-nf4", "ct-int4-sym")


def _pair(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    before = weight(shape, dtype, device)
    generator = torch.Generator(device).manual_seed(1)
    change = 1e-4 * torch.randn(shape, generator=generator, device=device)
    return before, (before.float() + change).to(dtype)


def _quail(before: torch.Tensor, after: torch.Tensor, format: str) -> tuple[torch.Tensor, ...]:
    compared = bucket_compare(before, after, format)
    return compared.same_code, compared.same_value, compared.mean_abs_change


def _eager(before: torch.Tensor, after: torch.Tensor, recipe: Format) -> tuple[torch.Tensor, ...]:
    (rank, params), (rank_after, params_after) = (quantized(w, recipe) for w in (before, after))
    value, value_after = values(rank, params, recipe), values(rank_after, params_after, recipe)
    same_value = (value.to(before.dtype) == value_after.to(before.dtype)).sum()
    change = (after.float() - before.float()).abs()
    same_bucket = buckets(rank, params, recipe) == buckets(rank_after, params_after, recipe)
    return same_bucket.sum(), same_value, change.mean(dtype=torch.float64)


def _bitsandbytes(bnb, before: torch.Tensor, after: torch.Tensor, recipe: Format) -> tuple[torch.Tensor]:
    codes = [bnb.quantize_4bit(w, **bnb_options(recipe))[0] for w in (before, after)]
    if recipe.name == "bnb-fp4":
        # Codes 0 and 8 are both zero, and one bucket.
        codes = [(c & 0x7F).where(c >> 4 == 8, c) for c in codes]
        codes = [(c & 0xF7).where(c & 15 == 8, c) for c in codes]
    a, b = codes
    return (((a >> 4) == (b >> 4)).sum() + ((a & 15) == (b & 15)).sum(),)


def _judge(inputs: tuple, expected: tuple, answer: tuple, peer: str) -> Check:
    errors = [abs(int(want) - int(got)) for want, got in zip(expected[:2], answer[:2], strict=False)]
    per_million = max(errors) / inputs[0].numel() * 1e6
    if peer not in EXACT:
        return Check(max(errors), per_million, per_million <= OTHERS_MAY_DIFFER)
    change_fits = abs(float(answer[2]) - float(expected[2])) <= 1e-5 * float(expected[2])
    return Check(max(errors), per_million, not any(errors) and change_fits)


def _case(model: Model, format: str, dtype: torch.dtype, size: float, headline: bool) -> Case:
    recipe, shape = get_format(format), model.weight(size)
    n = prod(shape)
    return Case(
        op="bucket_compare",
        variant=format,
        model=model.name,
        shape=shape,
        dtype=dtype,
        useful_bytes=2 * n * dtype.itemsize,
        working_bytes=n * 64,
        inputs=lambda device: _pair(shape, dtype, device),
        peers=peers(
            partial(_quail, format=format),
            partial(_eager, recipe=recipe),
            recipe,
            partial(_bitsandbytes, recipe=recipe),
            compile=headline and format in _COMPILED,
        ),
        expected=lambda inputs: _quail(*(w.cpu() for w in inputs), format),
        check=_judge,
        headline=headline,
    )


def cases(size: float) -> list[Case]:
    made = [_case(LLAMA_3_8B, format, torch.bfloat16, size, format in _COMPILED) for format in FORMATS]
    made += [_case(SMOLLM2_135M, format, torch.bfloat16, size, False) for format in _COMPILED]
    for dtype in (torch.float32, torch.bfloat16):
        made += [_case(SQUARE, format, dtype, size, False) for format in _COMPILED]
    return [*made, _case(LLAMA_3_8B, "bnb-nf4", torch.float32, size, False)]
