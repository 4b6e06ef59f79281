import dataclasses
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import weight_cases
from hypothesis import given, settings
from torch.library import opcheck
from weight_cases import FORMAT_NAMES, LAYOUTS, laid_out

from quail_kernels import bucket_compare, dequantize, fake_quant, get_format, quantize

# Those whose definitions ``naive`` has; the others are held to their own reference's parts below.
DEFINED = ["bnb-nf4", "bnb-fp4@32", "ct-int4-sym@96", "minmax-int4", "minmax-int4@32"]
# The distinct levels of each codebook: FP4's two zeros are one.
LEVELS = {
    name: np.unique(np.float32(get_format(name).levels_by_code).astype(np.float64)) for name in ("bnb-nf4", "bnb-fp4")
}


def pair(*shape, dtype=torch.float32, change=2e-3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(shape, generator=generator) * 0.02
    after = before + torch.randn(shape, generator=generator) * change
    return before.to(dtype), after.to(dtype)


def by_group(w, format):
    size = get_format(format).group_size or max(w.numel(), 1)
    return [group.double().numpy() for group in w.reshape(-1).split(size)]


def naive(before, after, format, scales):
    """The definitions in NumPy and fp64, group by group, from public codes, scales and values."""
    recipe = get_format(format)
    columns = []
    for w in (before, after):
        codes, params = quantize(w, format)
        codes = torch.stack([codes >> 4, codes & 15], dim=1).view(-1)[: w.numel()]
        columns.append((by_group(codes.view(w.shape), format), params.double().numpy()))
    (codes_x, params_x), (codes_y, params_y) = columns
    values_x, values_y = (
        by_group(fake_quant(before, format), format),
        by_group(fake_quant(after, format), format),
    )
    out = dict.fromkeys(("same_value", "on_grid", "zero_groups", "below_half_step"), 0)
    out |= {"distance": np.zeros(16, int), "sum": 0.0, "max": 0.0, "flip": 0.0, "group_same": []}
    for g, (x, y) in enumerate(zip(by_group(before, format), by_group(after, format), strict=True)):
        step, value_y = params_x[g], values_y[g]
        if recipe.kind == "codebook":
            levels = LEVELS[recipe.name]
            level_by_code = np.float32(recipe.levels_by_code).astype(np.float64)
            bucket_x = np.searchsorted(levels, level_by_code[codes_x[g].astype(int)])
            if scales == "before":
                middle = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
                p = np.float32(y) * (np.float32(1) / np.float32(max(params_x[g], 1e-38)))
                bucket_y = np.searchsorted(middle, p)
                value_y = torch.tensor(np.float32(levels)[bucket_y] * np.float32(params_x[g])).to(before.dtype)
                value_y = value_y.double().numpy()
            else:
                bucket_y = np.searchsorted(levels, level_by_code[codes_y[g].astype(int)])
            edges = np.concatenate([[-1], (levels[1:] + levels[:-1]) / 2, [1]])
            step = np.diff(edges)[bucket_x] * params_x[g]
        else:
            bucket_x, bucket_y = codes_x[g], codes_y[g]
            if scales == "before" and recipe.kind == "symmetric":
                scale = torch.tensor(params_x[g]).to(before.dtype)
                q = (torch.tensor(y).to(before.dtype) / scale).clamp(-8, 7).round()
                bucket_y, value_y = q.double().numpy() + 8, (q * scale).double().numpy()
            elif recipe.kind == "minmax":
                step, low = np.float32(params_x[g])
                if scales == "before":
                    with np.errstate(divide="ignore", invalid="ignore"):
                        bucket_y = np.nan_to_num(np.floor((np.float32(y) - low) / step)).clip(0, 15)
                    value_y = torch.tensor(low + (np.float32(bucket_y) + np.float32(0.5)) * step)
                    value_y = value_y.to(before.dtype).double().numpy()
        change = np.abs(np.float32(y) - np.float32(x)).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            out["flip"] += np.where(change == 0, 0, np.minimum(change / step, 1)).sum()
        distance = np.abs(bucket_y - bucket_x).astype(int)
        out["distance"] += np.bincount(distance, minlength=16)
        out["group_same"].append((distance == 0).sum())
        out["same_value"] += (values_x[g] == value_y).sum()
        out["on_grid"] += (values_x[g] == x).sum()
        out["zero_groups"] += not (x.any() or y.any())
        out["below_half_step"] += ((change < step / 2) | (change == 0)).sum()
        out["sum"] += change.sum()
        out["max"] = max(out["max"], change.max())
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scales", ["own", "before"])
@pytest.mark.parametrize("format", DEFINED)
def test_against_the_definitions(format, scales, dtype):
    before, after = pair(30, 192, dtype=dtype)
    before[3] = after[3] = 0
    before[4] = 0
    after[5] = 0
    after[6] = before[6]
    before[7] = fake_quant(before[7:8], format)[0]
    expected = naive(before, after, format, scales)
    got = bucket_compare(before, after, format, scales=scales, per_group=True)
    assert got.total == before.numel() and got.groups == len(expected["group_same"])
    assert got.code_distance.tolist() == expected["distance"].tolist()
    assert got.group_same_code.tolist() == expected["group_same"]
    assert got.group_total.sum() == got.total
    for name in ("same_value", "on_grid", "zero_groups", "below_half_step"):
        assert getattr(got, name) == expected[name], name
    assert got.sum_abs_change == pytest.approx(expected["sum"], rel=1e-12)
    assert got.max_abs_change == expected["max"]
    # |dw| / s is rounded to fp32 there, each term by at most two half ulp.
    assert got.sum_flip_law == pytest.approx(expected["flip"], rel=2**-23)


@pytest.mark.parametrize("format", ["bnb-nf4", "bnb-fp4"])
def test_short_last_group(format):
    before, after = pair(3, 67)
    got = bucket_compare(before, after, format, per_group=True)
    assert got.group_total.tolist() == [64, 64, 64, 9]
    ranks = [torch.tensor(get_format(format).buckets)[torch.tensor(get_format(format).codes).argsort()]]
    buckets = []
    for w in (before, after):
        codes = quantize(w, format)[0]
        buckets.append(ranks[0][torch.stack([codes >> 4, codes & 15], dim=1).view(-1)[:201].long()])
    same = buckets[0] == buckets[1]
    assert got.group_same_code.tolist() == [part.sum().item() for part in same.split(64)]


def test_the_two_zeros_of_fp4_are_one_bucket():
    before = torch.full((64,), 1e-4)
    before[0] = 1.0
    after = before.clone()
    after[1:] *= -1
    codes = [quantize(w, "bnb-fp4")[0][1:].unique().tolist() for w in (before, after)]
    assert codes == [[0x88], [0x00]]
    got = bucket_compare(before, after, "bnb-fp4")
    assert got.same_code == got.same_value == 64


def test_groups_of_zeros_are_counted_apart():
    zeros = torch.zeros(4, 64)
    ones = torch.ones(4, 64)
    for format in ("bnb-nf4", "bnb-fp4", "ct-int4-sym@64", "minmax-int4", "minmax-int4@32"):
        both = bucket_compare(zeros, zeros, format)
        assert both.zero_groups == both.groups and both.same_code == both.same_value == both.total == 256
        assert both.predicted_flip_share == 0 and both.share_below_half_step == 1
        assert bucket_compare(zeros, ones, format).zero_groups == 0
        assert bucket_compare(ones, zeros, format).zero_groups == 0


@pytest.mark.parametrize("format", ["bnb-nf4", "bnb-fp4", "bnb-nf4@4096"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_grid_tells_a_bitsandbytes_model(format, dtype):
    before, after = pair(64, 256, dtype=dtype, change=1e-5)
    assert bucket_compare(before, after, format).on_grid_share < 0.2
    shipped = fake_quant(before, format)
    got = bucket_compare(shipped, after, format)
    assert got.on_grid == got.total


def test_flip_law_predicts_the_codes_that_change():
    before, after = pair(1000, 256, change=1e-4)
    got = bucket_compare(before, after, "minmax-int4", scales="before")
    assert got.predicted_flip_share.item() == pytest.approx(1 - got.code_overlap.item(), rel=0.05)
    assert got.share_below_half_step == 1


def test_addition_is_the_comparison_of_both():
    (a, b), (c, d) = pair(3, 128), pair(5, 128, seed=1)
    d[0, 0] += 1
    together = bucket_compare(torch.cat([a, c]), torch.cat([b, d]), "bnb-nf4", per_group=True)
    parts = [bucket_compare(*tensors, "bnb-nf4", per_group=True) for tensors in ((a, b), (c, d))]
    merged = parts[0] + parts[1]
    for field in dataclasses.fields(together):
        x, y = getattr(together, field.name), getattr(merged, field.name)
        if field.name in ("sum_abs_change", "sum_flip_law"):
            torch.testing.assert_close(x, y, rtol=1e-14, atol=0)
        else:
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(y)), field.name
    with pytest.raises(ValueError, match="both with per_group or both without"):
        parts[0] + bucket_compare(a, b, "bnb-nf4")


def test_to_dict_holds_every_number():
    before, after = pair(8, 128)
    got = bucket_compare(before, after, "ct-int4-sym")
    row = got.to_dict()
    for name in ("same_code", "same_value", "on_grid", "zero_groups", "below_half_step", "code_overlap"):
        assert row[name] == getattr(got, name).item(), name
    for name in ("value_overlap", "on_grid_share", "share_below_half_step", "mean_abs_change"):
        assert row[name] == getattr(got, name).item(), name
    assert row["max_abs_change"] == got.max_abs_change and row["predicted_flip_share"] == got.predicted_flip_share
    assert row["code_distance"] == got.code_distance.tolist() and sum(row["code_distance"]) == row["total"]
    assert row["groups"] == 8 and all(isinstance(row[name], int) for name in ("total", "same_code", "on_grid"))


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_nan_and_infinity_are_seen(format):
    before, after = pair(4, 384)
    for bad in (math.nan, math.inf, -math.inf):
        spoiled = after.clone()
        spoiled[1, 3] = bad
        for tensors in ((before, spoiled), (spoiled, after), (spoiled, spoiled)):
            for scales in ("own", "before"):
                row = bucket_compare(*tensors, format, scales=scales).to_dict()
                # inf - inf is NaN: two infinities are no weight that has not changed.
                both = math.isnan(bad) or tensors[0] is tensors[1]
                for name in ("mean_abs_change", "max_abs_change"):
                    assert math.isnan(row[name]) if both else math.isinf(row[name]), name
                if math.isnan(bad) or (scales == "own" and tensors[0] is not tensors[1]):
                    assert row["value_overlap"] < 1
                assert sum(row["code_distance"]) == row["total"], "and every weight is in a bucket"


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_empty(format):
    got = bucket_compare(torch.zeros(0, 384), torch.zeros(0, 384), format, per_group=True)
    assert got.total == got.groups == 0 and got.code_distance.sum() == 0 and got.group_total.shape == (0,)
    assert got.code_overlap.isnan()


@settings(max_examples=200, deadline=None)
@given(weight_cases.weights(), st.sampled_from(LAYOUTS), st.sampled_from([0.0, 1e-3, 1.0]), st.booleans())
def test_whatever_the_weights_are(case, layout, change, shared):
    """Strides, of one or of both, change nothing; two runs are one; what it says is what its parts say."""
    format, before = case
    noise = weight_cases.normal(*before.shape, dtype=before.dtype, seed=5)
    after = laid_out(before + change * before.abs() * noise, layout)
    scales = "before" if shared else "own"
    got = bucket_compare(before, after, format, scales=scales, per_group=True)
    again = bucket_compare(before.contiguous(), after.contiguous(), format, scales=scales, per_group=True)
    for field in dataclasses.fields(got):
        a, b = (torch.as_tensor(getattr(result, field.name)) for result in (got, again))
        assert torch.equal(a.nan_to_num(nan=-1), b.nan_to_num(nan=-1)), field.name
    value = fake_quant(before, format)
    assert got.on_grid == (value == before).sum()
    assert got.code_distance.sum() == got.group_total.sum() == got.total == before.numel()
    assert got.group_same_code.sum() == got.same_code
    difference = (after.float() - before.float()).abs()
    if before.numel():
        assert torch.equal(got.max_abs_change.nan_to_num(nan=-1), difference.double().max().nan_to_num(nan=-1))
    if not shared:
        assert got.same_value == (value == fake_quant(after, format)).sum()


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_opcheck(format, layout):
    before, after = pair(4, 384)
    for shared, per_group in ((False, True), (True, False)):
        arguments = (laid_out(before, layout), after, None, format, shared, per_group)
        opcheck(torch.ops.quail.bucket_compare.default, arguments)


class Overlap(torch.nn.Module):
    def __init__(self, format):
        super().__init__()
        self.format = format

    def forward(self, before, after):
        got = bucket_compare(before, after, self.format, per_group=True)
        return (
            *(got.code_overlap, got.code_distance, got.mean_abs_change, got.max_abs_change),
            *(got.group_same_code, got.group_total),
        )


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_export_with_any_number_of_rows(format):
    step = Overlap(format)
    # A dimension of one, as the counts of a single group have, is never dynamic: here is more than one.
    rows = torch.export.Dim("rows", min=22, max=2**20)
    program = torch.export.export(step, pair(32, 384), dynamic_shapes=({0: rows}, {0: rows}))
    for n in (23, 64):
        tensors = pair(n, 384, seed=n)
        assert all(map(torch.equal, program.module()(*tensors), step(*tensors)))


def test_compiles_without_a_graph_break():
    steps = [Overlap(format) for format in FORMAT_NAMES]

    def outputs(before, after):
        return [out for step in steps for out in step(before, after)]

    tensors = pair(8, 384)
    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(*tensors), outputs(*tensors)))


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_meta_tensors_have_the_shapes_of_real_ones(format):
    tensors = pair(4, 384)
    real = bucket_compare(*tensors, format, per_group=True)
    meta = bucket_compare(*(w.to("meta") for w in tensors), format, per_group=True)
    for field in dataclasses.fields(real):
        a, b = getattr(real, field.name), getattr(meta, field.name)
        if isinstance(a, torch.Tensor):
            assert b.is_meta and (a.shape, a.dtype) == (b.shape, b.dtype), field.name
        else:
            assert a == b, field.name


def test_what_is_refused():
    w = torch.zeros(4, 96)
    for call, says in [
        (
            lambda: bucket_compare(w, w[:3], "bnb-nf4"),
            r"w_after: expected the shape of w_before, .*4, 96.*3, 96",
        ),
        (
            lambda: bucket_compare(w, w.half(), "bnb-nf4"),
            "w_after: expected the dtype of w_before, torch.float32",
        ),
        (
            lambda: bucket_compare(w, w, "bnb-nf4", scales="after"),
            "scales: expected 'own' or 'before'; got 'after'",
        ),
        (lambda: bucket_compare(w.int(), w.int(), "bnb-nf4"), "w_before: expected float32"),
        (lambda: bucket_compare(w, w, "ct-int4-sym"), "w_before: expected a last dimension"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()


def test_values_are_those_of_dequantize():
    """Codes may agree where values do not, and the other way round never."""
    before, after = pair(16, 192)
    after = before * 1.01
    got = bucket_compare(before, after, "bnb-nf4")
    codes, scales = quantize(before, "bnb-nf4")
    value = dequantize(codes, scales, "bnb-nf4", shape=before.shape, dtype=before.dtype)
    assert got.code_overlap > 0.999 and got.same_value == (value == fake_quant(after, "bnb-nf4")).sum()
    assert got.value_overlap < 0.2


@pytest.mark.parametrize("scales", ["own", "before"])
@pytest.mark.parametrize("format", ["minmax-int4", "minmax-int4@64"])
def test_the_sign_of_a_zero_is_no_matter(format, scales):
    zeros = torch.zeros(2, 64)
    mixed = zeros.clone()
    mixed[:, ::3] = -0.0
    after = torch.linspace(-1, 2, 128).view(2, 64)
    expected = bucket_compare(zeros, after, format, scales=scales).to_dict()
    assert expected["predicted_flip_share"] == 1
    for before in (-zeros, mixed, mixed.flip(1)):
        assert bucket_compare(before, after, format, scales=scales).to_dict() == expected
