import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
import torch
import weight_cases
from awkward_weights import awkward, gaussian
from hypothesis import given, settings
from weight_cases import FORMAT_NAMES

from quail_kernels import bucket_compare, fake_quant, get_format
from quail_kernels.formats import WEIGHT_DTYPES, tensor_range
from quail_kernels.update_comparison import (
    STEP_EDGES,
    UpdateComparison,
    UpdateTally,
    compare_update,
    compare_updates,
    join_ranges,
)

FITTING = [format for format in FORMAT_NAMES if 1152 % (get_format(format).group_size or 1) == 0]
COUNTS = ("code_distance", "same_value", "on_grid", "zero_groups", "below_half_step")
SUMS = ("sum_abs_change", "sum_flip_law")


def changed(before, scale=1e-3, seed=5):
    noise = weight_cases.normal(*before.shape, seed=seed)
    return (before.float() + scale * 50 * before.float().abs() * noise).to(before.dtype)


def assert_same(got, expected, rtol=1e-12):
    assert (got.total, got.groups) == (expected.total, expected.groups)
    for name in COUNTS:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    torch.testing.assert_close(got.max_abs_change, expected.max_abs_change, rtol=0, atol=0, equal_nan=True)
    for name in SUMS:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=rtol, atol=0, equal_nan=True)


def assert_same_updates(got, expected, rtol):
    assert_same(got.own, expected.own)
    assert_same(got.before_grid, expected.before_grid)
    assert torch.equal(got.step_histogram, expected.step_histogram)
    for name in ("sum_square_change", "sum_square_delivered", "sum_change_delivered"):
        a, b = getattr(got, name), getattr(expected, name)
        # A sum of products is as exact as its terms are large.
        terms = (expected.sum_square_change * expected.sum_square_delivered).sqrt()
        atol = rtol * terms.nan_to_num(0).item() if name == "sum_change_delivered" else 0
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


def assert_is_bucket_compare(before, after, format):
    got = compare_update(before, after, format)
    for scales, comparison in (("own", got.own), ("before", got.before_grid)):
        assert_same(comparison, bucket_compare(before, after, format, scales=scales))
    return got


def assert_delivers(got, before, after, format):
    dw = after.double() - before.double()
    dq = fake_quant(after, format).double() - fake_quant(before, format).double()
    squares, delivered, product = (dw * dw).sum(), (dq * dq).sum(), (dw * dq).sum()
    # dw and dq are rounded to fp32, and their products summed in it within a chunk.
    assert got.sum_square_change.item() == pytest.approx(squares.item(), rel=1e-6)
    assert got.sum_square_delivered.item() == pytest.approx(delivered.item(), rel=1e-6)
    within = 1e-6 * (squares * delivered).sqrt().item()
    assert got.sum_change_delivered.item() == pytest.approx(product.item(), rel=0, abs=within)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("format", FITTING)
def test_counts_are_those_of_bucket_compare(format, dtype):
    before = torch.cat([awkward(dtype), gaussian(40, dtype)])
    assert_is_bucket_compare(before, changed(before), format)
    assert_is_bucket_compare(before, before.flip(0), format)
    plain = gaussian(40, dtype)
    plain[3] = 0
    after = changed(plain)
    after[7], after[8] = plain[7], 0
    got = assert_is_bucket_compare(plain, after, format)
    assert_delivers(got, plain, after, format)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("format", FITTING)
def test_where_some_groups_keep_their_grid(format, dtype):
    before = gaussian(40, dtype)
    after = before.clone()
    after[:, 5::96] = 0.01
    after[1::9, 7] = 3
    got = assert_is_bucket_compare(before, after, format)
    assert_delivers(got, before, after, format)
    unchanged = assert_is_bucket_compare(before, before.clone(), format)
    assert unchanged.before_grid.same_code == unchanged.own.same_value == before.numel()


@settings(max_examples=150, deadline=None)
@given(weight_cases.weights(), st.sampled_from([0.0, 1e-3, 1.0]), st.integers(0, 9))
def test_whatever_the_weights_are(case, change, seed):
    format, before = case
    before = before.contiguous()
    noise = weight_cases.normal(*before.shape, dtype=before.dtype, seed=seed)
    assert_is_bucket_compare(before, before + change * before.abs() * noise, format)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("format", FITTING)
def test_nan_and_infinity_are_never_hidden(format, bad):
    before = gaussian(4)
    after = changed(before)
    spoiled = after.clone()
    spoiled[1, 3] = bad
    for tensors in ((before, spoiled), (spoiled, after), (spoiled, spoiled)):
        got = assert_is_bucket_compare(*tensors, format)
        assert not got.sum_square_change.isfinite() and not got.sum_square_delivered.isfinite()
        assert got.step_histogram.sum() == got.own.total


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("format", FITTING)
def test_blocks_of_a_tensor_add_up_to_it(format, dtype):
    before = gaussian(9, dtype)
    after = changed(before)
    before[:3] = after[:3] = 0
    ranges = []
    for w in (before, after):
        whole = tensor_range(w[:1])
        for row in w[1:]:
            whole = join_ranges(whole, tensor_range(row))
        ranges.append(whole)
    blocks, tally = [], UpdateTally([format], *ranges)
    for i, (x, y) in enumerate(zip(before.split([1, 2, 2, 4]), after.split([1, 2, 2, 4]), strict=True)):
        blocks.append(compare_update(x, y, format, range_before=ranges[0], range_after=ranges[1], starts=i == 0))
        tally.add(x, y, starts=i == 0)
    whole = compare_update(before, after, format)
    assert_same_updates(blocks[0] + blocks[1] + blocks[2] + blocks[3], whole, 1e-6)
    assert_same_updates(tally.results()[format], whole, 1e-6)
    assert tally.is_finite
    after[-1, -1] = math.inf
    tally.add(before[-1:], after[-1:], starts=False)
    assert not tally.is_finite


def test_a_tensor_of_zeros_in_blocks_is_one_group_of_zeros():
    zeros, smallest = torch.zeros(4, 64), torch.full((4, 64), 1e-45)
    for before, after, zero_groups in ((zeros, -zeros, 1), (zeros, smallest, 0), (smallest, zeros, 0)):
        ranges = dict(range_before=tensor_range(before), range_after=tensor_range(after))
        blocks = [compare_update(before[i], after[i], "minmax-int4", **ranges, starts=i == 0) for i in range(4)]
        total = blocks[0] + blocks[1] + blocks[2] + blocks[3]
        assert total.own.groups == 1 and total.own.zero_groups == zero_groups
        assert_same(total.own, bucket_compare(before, after, "minmax-int4"))


def test_several_formats_and_chunks_of_any_length():
    formats = ["bnb-nf4", "bnb-fp4@4096", "minmax-int4", "ct-int4-sym@8", "mxfp4", "nvfp4"]
    # Beyond a chunk, in groups of every size, with what is left over by the longest.
    before = gaussian(130, torch.bfloat16).view(-1)[: 96 * 1024 + 32]
    after = changed(before)
    got = compare_updates(before, after, formats)
    assert list(got) == formats
    for format in formats:
        assert_same_updates(got[format], compare_update(before, after, format), 1e-6)
        assert_is_bucket_compare(before, after, format)
    short = compare_updates(before[:1000], after[:1000], ["bnb-nf4", "bnb-fp4@4096", "minmax-int4"])
    for format, comparison in short.items():
        assert_same(comparison.own, bucket_compare(before[:1000], after[:1000], format))
    # Groups of 8 * 509 and 8 * 503 weights meet after two million.
    w = gaussian(1)[0, :8].repeat(509 * 503)
    primes = compare_updates(w, changed(w), ["ct-int4-sym@4072", "ct-int4-sym@4024"])
    for format, comparison in primes.items():
        assert_same(comparison.own, bucket_compare(w, changed(w), format))


@pytest.mark.parametrize("format", FITTING)
def test_the_histogram_counts_changes_by_steps(format):
    recipe = get_format(format)
    before = gaussian(8)
    after = before + torch.logspace(-9, 0, 1152)
    after[3] = before[3]
    after[4] = before[4] - 1e-6
    got = compare_update(before, after, format)
    x = before.view(-1, recipe.group_size or before.numel())
    params = recipe.params(x, False, recipe.fit_tensor(before))
    step = recipe.step(recipe.rank(x, params, False), params).reshape(before.shape)
    ratio = (after - before).abs() / step
    edges = torch.tensor((-math.inf, 0, *STEP_EDGES, math.inf)).nextafter(torch.tensor(-math.inf))
    edges[1] = 0
    expected = [((ratio > low) & (ratio <= high)).sum() for low, high in zip(edges, edges[1:], strict=False)]
    assert got.step_histogram.tolist() == [int(count) for count in expected]
    assert got.step_histogram.sum() == got.own.total and got.step_histogram[0] == (after == before).sum() > 0
    shares = (0.2, 0.5, 0.9)
    for share, quantile in zip(shares, got.step_quantiles(shares), strict=True):
        true = ratio.flatten().sort().values[int(share * ratio.numel())].item()
        assert quantile == pytest.approx(min(true, 2.0), rel=0.5, abs=2**-16)


def test_quantiles_at_the_ends():
    zeros = torch.zeros(64)
    unchanged = compare_update(zeros, zeros, "bnb-nf4")
    assert unchanged.step_quantiles([0, 0.5, 1]) == [0, 0, 0]
    assert math.isnan(compare_update(zeros[:0], zeros[:0], "bnb-nf4").step_quantiles([0.5])[0])
    assert compare_update(zeros, zeros + 1, "bnb-nf4").step_quantiles([0.5, 1]) == [2, 2]


def test_what_is_delivered():
    before = gaussian(16)
    whole = compare_update(before, -before, "ct-int4-sym")
    assert whole.delivered_cosine > 0.98 and whole.delivered_share == pytest.approx(1, abs=0.02)
    assert whole.delivered_norm == pytest.approx(1, abs=0.02)
    none = compare_update(before, before, "ct-int4-sym")
    assert none.delivered_cosine.isnan() and none.delivered_norm.isnan() and none.delivered_share.isnan()
    shipped = fake_quant(before, "bnb-nf4")
    after = shipped.clone()
    after[shipped.abs() < 0.01] += 1e-6
    lost = compare_update(shipped, after, "bnb-nf4")
    assert lost.delivered_cosine == lost.delivered_norm == lost.delivered_share == 0
    # A small change of many weights arrives as whole steps of few: all of it on average, and mostly noise.
    generator = torch.Generator().manual_seed(1)
    small = before + 1e-5 * torch.randn(before.shape, generator=generator)
    noisy = compare_update(before, small, "minmax-int4@128")
    assert noisy.delivered_share == pytest.approx(1, abs=0.5) and noisy.delivered_cosine < 0.5 < noisy.delivered_norm


def test_to_dict_holds_every_number():
    before = gaussian(8)
    got = compare_update(before, changed(before), "bnb-nf4")
    row = got.to_dict()
    assert row["own"] == got.own.to_dict() and row["before_grid"] == got.before_grid.to_dict()
    assert row["step_histogram"] == got.step_histogram.tolist()
    others = set(row) - {"own", "before_grid", "step_histogram"}
    names = {field.name for field in dataclasses.fields(UpdateComparison)}
    assert others == names - {"own", "before_grid", "step_histogram"} | {
        "delivered_cosine",
        "delivered_norm",
        "delivered_share",
    }
    for name in others:
        assert row[name] == getattr(got, name).item() and row[name] > 0, name


def test_threads_of_one_core_each_find_the_same():
    blocks = [(gaussian(64, torch.bfloat16, seed=i), i) for i in range(8)]

    def compare(block):
        torch.set_num_threads(1)
        before, seed = block
        return compare_updates(before, changed(before, seed=seed), ["bnb-nf4", "minmax-int4"])

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(compare, blocks))
    alone = [compare(block) for block in blocks]
    torch.set_num_threads(threads)
    for a, b in zip(together, alone, strict=True):
        assert all(a[format].to_dict() == b[format].to_dict() for format in a)


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_nothing_of_nothing(format):
    empty = torch.zeros(0, 384, dtype=torch.bfloat16)
    got = compare_update(empty, empty, format)
    assert got.own.total == got.own.groups == 0 and got.step_histogram.shape == (len(STEP_EDGES) + 2,)
    assert got.delivered_cosine.isnan()
    before = weight_cases.normal(4, 384, dtype=torch.bfloat16)
    some = compare_update(before, changed(before), format)
    assert (got + some).to_dict() == some.to_dict()


@pytest.mark.parametrize(
    "case, message",
    [
        (lambda w: (w, w[:1], "bnb-nf4"), "after: expected the shape of before"),
        (lambda w: (w, w.half(), "bnb-nf4"), "after: expected the dtype of before"),
        (lambda w: (w.T, w.T, "bnb-nf4"), "before: expected a contiguous block"),
        (lambda w: (w.double(), w.double(), "bnb-nf4"), "before: expected float32, bfloat16 or float16"),
        (lambda w: (w[:, :100].contiguous(), w[:, :100].contiguous(), "mxfp4"), "multiple of 32"),
        (lambda w: (w, w, "nf4"), "format: expected one of"),
    ],
)
def test_refuses(case, message):
    with pytest.raises(ValueError, match=message):
        compare_update(*case(torch.zeros(4, 128)))


def test_refuses_one_range():
    w = torch.zeros(4, 128)
    with pytest.raises(ValueError, match="expected both or none"):
        compare_update(w, w, "minmax-int4", range_before=tensor_range(w))
