"""What the cases on weights share: the tensors, the peers and how an answer is judged.

Answers are judged by the op's CPU reference. Ours and the plain form have to be equal to it bit for bit; any
other peer, whose library or compiler rounds otherwise, may give another bucket to 2 % of the weights.
"""

from collections.abc import Callable

import torch

from quail_kernels import get_format
from quail_kernels.formats import Format

from ..case import Check, Peer, compiled, needs, plain

EXACT = ("quail", "eager")
OTHERS_MAY_DIFFER = 20_000  # of a million
_BNB_TYPES = {"bnb-nf4": "nf4", "bnb-fp4": "fp4"}


def weight(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return (torch.randn(shape, generator=generator, device=device) * 0.02).to(dtype)


def peers(
    ours: Callable, eager: Callable, recipe: Format, bitsandbytes: Callable | None, compile: bool
) -> dict[str, Peer]:
    """quail and plain PyTorch, torch.compile of the latter, and bitsandbytes where it has the format."""
    found = {"quail": plain(ours), "eager": plain(eager)}
    if compile:
        found["torch.compile"] = compiled(eager)
    if recipe.name in _BNB_TYPES and bitsandbytes is not None:
        found["bitsandbytes"] = needs("bitsandbytes.functional", bitsandbytes)
    return found


def bnb_options(recipe: Format) -> dict:
    return {"blocksize": recipe.group_size, "quant_type": _BNB_TYPES[recipe.name]}


def judge(differs: torch.Tensor, error: torch.Tensor, peer: str, equal: bool) -> Check:
    """From whether each weight got another bucket, the errors, and whether every bit is as expected."""
    per_million = differs.double().mean().item() * 1e6
    passed = equal if peer in EXACT else per_million <= OTHERS_MAY_DIFFER
    return Check(error.max().item(), per_million, passed)


def judge_values(inputs: tuple, expected: torch.Tensor, answer: torch.Tensor, peer: str) -> Check:
    """Errors in units of the weights; a value further off than a rounded scale can explain is another bucket."""
    error = (answer.float() - expected.float()).abs()
    same_kind = answer.shape == expected.shape and answer.dtype == expected.dtype
    return judge(error > expected.abs().max() / 64, error, peer, same_kind and torch.equal(answer, expected))


def formats_that_fit(formats: list[str], shape: tuple[int, int]) -> list[str]:
    """Without those whose groups do not divide the last dimension."""
    recipes = {format: get_format(format) for format in formats}
    return [
        format
        for format, recipe in recipes.items()
        if not (recipe.groups_divide_last_dim and recipe.group_size and shape[-1] % recipe.group_size)
    ]
