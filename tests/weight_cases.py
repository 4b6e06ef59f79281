"""Weights for tests of every recipe: what is awkward to quantize, in what is awkward to read."""

import hypothesis.strategies as st
import torch

from quail_kernels import FORMATS, get_format
from quail_kernels.formats import WEIGHT_DTYPES

# Every recipe, and group sizes that take other paths: one of many rows, one that is no power of two, small ones.
FORMAT_NAMES = [*FORMATS, "bnb-nf4@4096", "bnb-fp4@32", "ct-int4-sym@96", "ct-int4-sym@8", "minmax-int4@32"]
LAYOUTS = ["contiguous", "columns", "every second", "rows", "split", "transposed", "expanded"]


def normal(*shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def laid_out(w, layout):
    """The values of w in other strides; of ``expanded`` those of its first row."""
    if layout == "contiguous" or not w.dim():
        return w
    *lead, last = w.shape
    if layout == "transposed":
        view = w.new_zeros(w.shape[::-1]).permute(*range(w.dim() - 1, -1, -1))
    elif layout == "columns":
        view = w.new_zeros(*lead, last + 24)[..., 8 : 8 + last]
    elif layout == "every second":
        view = w.new_zeros(*lead, 2 * last)[..., ::2]
    elif layout == "split":
        view = w.new_zeros(w.shape[0], 3, *w.shape[1:])[:, 1]
    elif layout == "rows":
        view = w.new_zeros(2 * w.shape[0], *w.shape[1:])[::2]
    else:
        return w[:1].expand(w.shape)
    return view.copy_(w)


def spoiled_by(recipe, w):
    """[numel], which weights share a group with a NaN, and which do with NaN or infinity."""
    flat = w.reshape(-1)
    spoils = torch.zeros(2, w.numel(), dtype=torch.bool)
    whole = recipe.group_size is None or recipe.needs_tensor
    size = w.numel() if whole else recipe.group_size
    for start in range(0, w.numel(), max(size, 1)):
        group = flat[start : start + size]
        spoils[0, start : start + size] = group.isnan().any()
        spoils[1, start : start + size] = not group.isfinite().all()
    return spoils


def same_bits(a, b):
    """Whether two tensors are equal bit for bit, where all NaN are one."""
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    same = a.contiguous().view(ints) == b.contiguous().view(ints)
    return bool((same | (a.isnan() & b.isnan())).all()) if a.is_floating_point() else bool(same.all())


@st.composite
def weights(draw, formats=FORMAT_NAMES, most_rows=3):
    """(format, w): normal weights of any magnitude with ties, zeros, subnormals, infinities and NaN among them."""
    format, dtype = draw(st.sampled_from(formats)), draw(st.sampled_from(WEIGHT_DTYPES))
    recipe = get_format(format)
    lead = draw(st.lists(st.integers(0, most_rows), max_size=2))
    if recipe.groups_divide_last_dim and recipe.group_size:
        last = recipe.group_size * draw(st.integers(1, 3))
    else:
        last = draw(st.integers(0, 300))
    scale = draw(st.sampled_from([1e-38, 1e-6, 1.0, 1000.0, 1e38]))
    w = (normal(*lead, last, seed=draw(st.integers(0, 99))) * scale).to(dtype)
    flat = w.view(-1)
    finfo = torch.finfo(dtype)
    finite = [0.0, -0.0, finfo.smallest_normal, finfo.smallest_normal * finfo.eps, finfo.max, -finfo.max, 1.0]
    special = st.sampled_from([*finite, torch.inf, -torch.inf, torch.nan])
    for at, value in draw(st.dictionaries(st.integers(0, 2000), special, max_size=4)).items():
        if at < len(flat):
            flat[at] = value
    start, count = draw(st.integers(0, 300)), draw(st.sampled_from([0, 0, 64, 300]))
    if draw(st.booleans()):
        flat[start : start + count] = 0
    elif count:
        # Halves of whole numbers: every tie of a uniform recipe whose scale is a power of two.
        ties = flat[start : start + count]
        ties.copy_(torch.arange(len(ties)).remainder(31) - 15)
    return format, laid_out(w, draw(st.sampled_from(LAYOUTS)))
