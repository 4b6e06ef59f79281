"""What the kernels look up of a codebook's position against PyTorch's bucketize."""

import pytest
import torch
import triton
import triton.language as tl

from quail_kernels.formats import codebook, get_format

BLOCK = 1 << 14
RANK, LEVEL, LEVEL_BY_RANK, CODE, BUCKET = range(5)
WHAT = {RANK: None, LEVEL: "levels", LEVEL_BY_RANK: "levels", CODE: "codes", BUCKET: "buckets"}


@triton.jit
def _kernel(
    out_ptr,
    pos_ptr,
    table_ptr,
    RULE: tl.constexpr,
    WHAT: tl.constexpr,
    CODES: tl.constexpr,
    TWO_ZEROS: tl.constexpr,
    N: tl.constexpr,
):
    offsets = tl.program_id(0) * N + tl.arange(0, N)
    pos = tl.load(pos_ptr + offsets).reshape(1, 1, N)
    if WHAT == 0:
        out = codebook.codebook_rank(pos, table_ptr, RULE).to(tl.float32)
    elif WHAT == 1 or WHAT == 2:
        out = codebook.codebook_level(pos, table_ptr, RULE, WHAT == 2)
    elif WHAT == 3:
        out = codebook.codebook_entry(pos, table_ptr, RULE, CODES).to(tl.float32)
    else:
        out = codebook.codebook_bucket(codebook.codebook_rank(pos, table_ptr, RULE), TWO_ZEROS).to(tl.float32)
    tl.store(out_ptr + offsets, out.reshape(N))


def positions(recipe):
    """From -1 to 1, half a thousand neighbours of every threshold and of every edge of a cell, and zeros."""
    scale, *origins = recipe.kernel_rule(torch.float32)
    edges = (torch.arange(33) - 16.5) / scale
    if origins[0] != origins[1]:
        edges = torch.cat([edges, (torch.arange(33) - 15.5) / scale])
    middle = torch.cat([torch.tensor([t for t in recipe.thresholds if t != 0]), edges, torch.linspace(-1, 1, 4001)])
    middle = middle[middle != 0]
    near = (middle.view(torch.int32)[:, None] + torch.arange(-250, 251, dtype=torch.int32)).view(torch.float32)
    least = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 2.0**-126, -(2.0**-126), 1.0, -1.0])
    return torch.cat([near.view(-1).clamp(-1, 1), least])


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("format", ["bnb-nf4", "bnb-fp4"])
def test_look_ups_are_those_of_bucketize(format, what):
    recipe = get_format(format)
    x = positions(recipe)
    rank = torch.bucketize(x, torch.tensor(recipe.thresholds))
    expected = rank if WHAT[what] is None else torch.tensor(getattr(recipe, WHAT[what]))[rank]
    padded = torch.cat([x, x[-1:].expand(-len(x) % BLOCK)])
    out = torch.empty_like(padded)
    table = recipe.kernel_table(torch.device("cpu"))
    rule, codes = recipe.kernel_rule(torch.float32), codebook._PLANES["codes"]
    _kernel[(len(padded) // BLOCK,)](out, padded, table, rule, what, codes, recipe.two_zeros, BLOCK)
    assert torch.equal(out[: len(x)], expected.float())
    assert len(set(rank.tolist())) == 16
