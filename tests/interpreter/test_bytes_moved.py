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
linear = importlib.import_module("quail_kernels.linear_margin_hinge")

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


def padded(values):
    """The same values as the first columns of a buffer as the linear hinge has them; how long its rows are."""
    buffer = linear._buffer(*values.shape, values).zero_()
    buffer[:, : values.shape[1]] = values
    return buffer[:, : values.shape[1]], buffer.shape[1]


EPILOGUES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
VOCABULARIES = pytest.mark.parametrize("vocab", [1157, 2048])


def assert_rows(counts, kept, what):
    """Once for each element of the rows that are kept, padding included, and never for the others."""
    assert torch.equal(counts.bool(), kept[:, None].expand_as(counts)) and counts.max() == 1, what


@EPILOGUES
@VOCABULARIES
@pytest.mark.parametrize(
    ("logit_scale", "softcap", "has_lse"), [(1.0, None, True), (0.5, None, True), (1.0, 30.0, True), (1.0, 30.0, False)]
)
def test_logits_of_the_linear_hinge(dtype, vocab, logit_scale, softcap, has_lse):
    labels = torch.tensor([2, -100, vocab - 1, 9])
    z, width = padded(torch.randn(4, vocab, generator=torch.Generator().manual_seed(0)).to(dtype))
    lse = torch.empty(4) if has_lse else None
    with traffic() as launches:
        linear._epilogue_fwd_triton(lse, z, labels, logit_scale, softcap, -100, 512)
    launch = only(launches)
    kept = labels != -100
    assert launch.bytes_read("z_ptr") == 3 * width * z.element_size(), "the kept rows, and their padding"
    assert_rows(launch.reads("z_ptr"), kept, "logits")
    assert_once(launch.reads("labels_ptr"), "labels")
    shaped = logit_scale != 1 or softcap is not None
    if shaped:
        assert_rows(launch.writes("z_ptr"), kept, "logits")
    if has_lse:
        assert_once(launch.writes("lse_ptr"), "normalizers")
    assert bytes_written(launch) == shaped * 3 * width * z.element_size() + has_lse * 4 * 4


@EPILOGUES
@VOCABULARIES
@pytest.mark.parametrize("parts", ["hinge", "log_prob", "both"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_gradient_of_the_products(dtype, vocab, parts, softcap):
    labels = torch.tensor([2, -1, vocab, 9])
    generator = torch.Generator().manual_seed(0)
    z, width = padded(torch.randn(4, vocab, generator=generator).to(dtype))
    of_hinge = padded(torch.randn(4, vocab, generator=generator).to(dtype))[0] if parts != "log_prob" else None
    of_log_prob = torch.randn(4, generator=generator) if parts != "hinge" else None
    with traffic() as launches:
        linear._epilogue_bwd_triton(z, of_hinge, torch.ones(4), of_log_prob, labels, 1.0, softcap, 512)
    launch = only(launches)
    row, kept = width * z.element_size(), labels != -1
    assert_rows(launch.reads("z_ptr"), kept, "logits")
    assert launch.bytes_read("z_ptr") == 3 * row
    if of_hinge is not None:
        assert_rows(launch.reads("grad_hinge_logits_ptr"), kept, "the hinge's gradient")
        assert launch.bytes_read("grad_hinge_logits_ptr") == 3 * row
    assert_rows(launch.writes("z_ptr"), torch.ones(4, dtype=torch.bool), "gradients, those of ignored rows too")
    assert bytes_written(launch) == 4 * row
