"""Bytes moved: every kernel reads each input once and writes each output once, counted in the interpreter.

What is read more often, or besides, stands here and in the docstring of its kernel.
"""

import importlib

import pytest
import torch
from interpreter_repair import traffic

from quail_kernels.formats import FORMATS, get_format
from quail_kernels.margin_hinge import NORMS, SPACES

fake_quant = importlib.import_module("quail_kernels.fake_quant")
bucket_compare = importlib.import_module("quail_kernels.bucket_compare")
hinge = importlib.import_module("quail_kernels.margin_hinge")

TILE = 2048
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
RECIPES = pytest.mark.parametrize("format", sorted(FORMATS))


def weight(recipe, dtype, seed=0):
    """Several programs and, where the recipe allows it, a short last group."""
    n = 4 * TILE if recipe.groups_divide_last_dim else 4 * TILE + 19
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def only(launches):
    (launch,) = launches
    return launch


def assert_once(counts, what):
    assert (counts == 1).all(), f"{what}: {(counts != 1).sum()} of {counts.numel()} elements not exactly once"


def bytes_read(launch):
    """Without arguments that hold one number or two for the whole tensor: every program reads those."""
    return launch.bytes_read(*(name for name, t in launch.tensors.items() if t.numel() > 2 and name != "table_ptr"))


def bytes_written(launch):
    return launch.bytes_written(*launch.tensors)


@RECIPES
@DTYPES
def test_fake_quant(format, dtype):
    recipe = get_format(format)
    w = weight(recipe, dtype)
    with traffic() as launches:
        w_q = fake_quant._fake_quant_triton(w, recipe, TILE)
    launch = only(launches)
    assert_once(launch.reads("w_ptr"), "w")
    assert_once(launch.writes("w_q_ptr"), "w_q")
    assert bytes_read(launch) == w.nbytes
    assert bytes_written(launch) == w_q.nbytes


@RECIPES
@DTYPES
def test_quantize(format, dtype):
    recipe = get_format(format)
    w = weight(recipe, dtype)
    with traffic() as launches:
        codes, scales = fake_quant._quantize_triton(w, recipe, TILE)
    launch = only(launches)
    assert_once(launch.reads("w_ptr"), "w")
    assert_once(launch.writes("codes_ptr"), "codes")
    assert codes.nbytes == (w.numel() + 1) // 2
    written = codes.nbytes
    if recipe.group_size is not None:
        assert_once(launch.writes("scales_ptr"), "scales")
        written += scales.nbytes
    assert bytes_written(launch) == written
    assert bytes_read(launch) == w.nbytes


@RECIPES
@DTYPES
def test_dequantize(format, dtype):
    recipe = get_format(format)
    w = weight(recipe, dtype)
    codes, scales = fake_quant._quantize_torch(w, recipe)
    with traffic() as launches:
        w_q = fake_quant._dequantize_triton(codes, scales, recipe, w.shape, dtype, TILE)
    launch = only(launches)
    assert_once(launch.reads("codes_ptr"), "codes")
    assert_once(launch.writes("w_q_ptr"), "w_q")
    read = codes.nbytes
    if recipe.group_size is not None:
        assert_once(launch.reads("scales_ptr"), "scales")
        read += scales.nbytes
    assert bytes_read(launch) == read
    assert bytes_written(launch) == w_q.nbytes


@RECIPES
@DTYPES
@pytest.mark.parametrize("shared", [False, True], ids=["own", "before"])
def test_bucket_compare(format, dtype, shared):
    recipe = get_format(format)
    before, after = weight(recipe, dtype), weight(recipe, dtype, seed=1)
    with traffic() as launches:
        bucket_compare._bucket_compare_triton(before, after, recipe, shared, True)
    launch = only(launches)
    assert_once(launch.reads("before_ptr"), "before")
    assert_once(launch.reads("after_ptr"), "after")
    assert bytes_read(launch) == 2 * before.nbytes
    for name in ("counts_ptr", "sums_ptr", "row_same_ptr"):
        assert_once(launch.writes(name), name)
    # 20 counts and 3 sums of 4 bytes for every program of 1,024 weights, and on request one count a group.
    partial = launch.bytes_written("counts_ptr", "sums_ptr")
    assert bytes_written(launch) == partial + launch.bytes_written("row_same_ptr")
    assert partial <= 92 * (before.numel() / 1024 + 1)


def rows(dtype, ref_dtype, vocab):
    """Rows of [2, 3, vocab] that start at every distance from a 16-byte boundary, and more rows around them."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, vocab, generator=generator).to(dtype)
    ref = torch.randn(2, 4, vocab, generator=generator).to(ref_dtype)
    return z[:, :-1], ref[:, :-1], torch.tensor([2, 5, 0, -100, vocab - 1, 9])


HINGES = pytest.mark.parametrize(("norm", "space"), [(norm, space) for norm in NORMS for space in SPACES])
ROWS = pytest.mark.parametrize(
    ("dtype", "ref_dtype", "vocab"),
    [
        (torch.bfloat16, torch.bfloat16, 1157),
        (torch.float32, torch.bfloat16, 1157),
        (torch.float32, torch.float32, 2048),
        (torch.float16, torch.float16, 11),
    ],
)


@HINGES
@ROWS
def test_hinge_forward(norm, space, dtype, ref_dtype, vocab):
    z, ref, labels = rows(dtype, ref_dtype, vocab)
    with traffic() as launches:
        h, active, stats = hinge._margin_hinge_fwd_triton(z, ref, labels, 1.0, norm, space, -100, 512)
    launch = only(launches)
    kept = (labels != -100).view(2, 3, 1)
    per_row = {("per_logit", "log_probs"): 2, ("label", "logits"): 0}.get((norm, space), 1)
    expected = torch.full((2, 3, vocab), per_row, dtype=torch.int32)
    if norm == "label":
        expected.scatter_add_(2, labels.clamp(min=0).view(2, 3, 1), torch.ones(2, 3, 1, dtype=torch.int32))
    for name, x in (("z_ptr", z), ("ref_ptr", ref)):
        reads = launch.reads(name)
        assert torch.equal(reads, expected * kept), name
        assert launch.bytes_read(name) == reads.sum() * x.element_size(), "nothing of the rows around them"
    assert_once(launch.reads("labels_ptr"), "labels")
    for name in ("hinge_ptr", "active_ptr", "stats_ptr"):
        assert_once(launch.writes(name), name)
    assert bytes_written(launch) == h.nbytes + active.nbytes + stats.nbytes == 32 * 6


@HINGES
@ROWS
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_hinge_backward(norm, space, dtype, ref_dtype, vocab, inplace):
    z, ref, labels = rows(dtype, ref_dtype, vocab)
    options = (labels, 1.0, norm, space, -100, 512)
    _, _, stats = hinge._margin_hinge_fwd_triton(z, ref, *options)
    out = z if inplace else torch.empty(z.shape, dtype=z.dtype)
    with traffic() as launches:
        hinge._margin_hinge_bwd_triton(out, torch.ones(6), z, ref, labels, stats, *options[1:])
    launch = only(launches)
    kept = (labels != -100).view(2, 3, 1).expand(2, 3, vocab)
    nothing = torch.zeros_like(kept)
    reads_z = nothing if (norm, space) == ("label", "logits") else kept
    assert torch.equal(launch.reads("z_ptr").bool(), reads_z) and launch.reads("z_ptr").max() <= 1
    assert torch.equal(launch.reads("ref_ptr").bool(), nothing if norm == "label" else kept)
    assert launch.reads("ref_ptr").max() <= 1
    assert_once(launch.writes("out_ptr"), "the gradient")
    assert launch.bytes_read("z_ptr") == reads_z.sum() * z.element_size()
    assert bytes_written(launch) == z.numel() * z.element_size(), "nothing of the rows around them"
