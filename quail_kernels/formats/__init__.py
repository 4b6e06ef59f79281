r"""The 4-bit recipes, frozen, each named after the library whose bits it reproduces.

A weight tensor is cut into groups of consecutive elements, each group is given parameters (a scale, or a step
and a minimum), and every weight is given one of sixteen buckets. The arithmetic of each recipe stands in the
file of its family, with x a weight of group g, all in fp32 unless said:

    codebook.py        bnb-nf4, bnb-fp4
    integer.py         ct-int4-sym, awq-int4-sym, mslk-int4-sym, gptq-int4-asym, awq-int4-asym, ct-int4-asym,
                       minmax-int4
    gguf.py            gguf-q4_0, gguf-q4_1
    microscaling.py    mxfp4, mxfp4-rceil, gguf-mxfp4, nvfp4

A recipe that follows a rule that is there is one entry in RECIPES; a new rule is a class with the PyTorch
reference, the Triton functions beside it, and its KIND in tiles.py; with a branch in loops.py, too, it is fast on
CPUs.

NaN and infinity are never hidden. A NaN makes its group's parameters NaN, so the whole group dequantizes to
NaN; an infinity makes them infinite, and its group dequantizes to NaN and infinity only, but for the recipes
with a power of two as the scale, where the infinity stays one and the rest of its group becomes zeros. What
code they get is said with each recipe.
"""

import functools
from dataclasses import replace

import torch

from . import codebook, gguf, integer, microscaling
from .base import (
    WEIGHT_DTYPES,
    Format,
    check_shape,
    check_weight,
    chunk_size,
    group_chunks,
    group_rows,
    group_spans,
    in_words,
    look_up,
    tensor_range,
)

__all__ = [
    "FORMATS",
    "WEIGHT_DTYPES",
    "Format",
    "check_shape",
    "check_weight",
    "chunk_size",
    "get_format",
    "group_chunks",
    "group_rows",
    "group_spans",
    "look_up",
    "tensor_range",
]

_FAMILIES = (codebook, integer, gguf, microscaling)
FORMATS: dict[str, Format] = {recipe.name: recipe for family in _FAMILIES for recipe in family.RECIPES}


def get_format(format: str, group_size: int | None = None) -> Format:
    """The recipe of that name, with the group size that the name (``ct-int4-sym@64``) or the argument gives.

    Raises ValueError where the name is unknown, the size is not legal for it, or the two sizes differ.
    """
    # torch.compile looks through the cache, with a warning.
    return (_parse if torch.compiler.is_compiling() else _parse_once)(format, group_size)


def _parse(format: str, group_size: int | None) -> Format:
    name, at, size = format.partition("@")
    if name not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, optionally with @group_size; got {format!r}")
    recipe = FORMATS[name]
    if at:
        if not size.isdecimal():
            raise ValueError(f"format: expected a number after @, as in {name}@64; got {format!r}")
        if group_size not in (None, int(size)):
            raise ValueError(f"group_size: expected {size}, as format {format!r} says, or none; got {group_size}")
        group_size = int(size)
    if group_size is None:
        return recipe
    if group_size not in recipe.legal_group_sizes:
        raise ValueError(f"group_size: expected {in_words(recipe.legal_group_sizes)} for {name}; got {group_size}")
    return replace(recipe, group_size=group_size)


# A recipe reckons its tables once: one that is made anew with every call costs a millisecond.
_parse_once = functools.lru_cache(_parse)
