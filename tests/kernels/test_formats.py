import pytest
import torch
import weight_cases
from awkward_weights import awkward, gaussian
from weight_cases import FORMAT_NAMES, LAYOUTS, laid_out, same_bits

from quail_kernels import FORMATS, fake_quant, get_format
from quail_kernels.formats import WEIGHT_DTYPES
from quail_kernels.formats.base import flat_part, tensor_range
from quail_kernels.formats.tiles import strided

# As the CUDA sources of bitsandbytes spell them.
NF4_THRESHOLDS = [
    *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544),
    *(-0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767),
    *(0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683),
    *(0.5016634166240692, 0.6427869200706482, 0.8614784181118011),
]


def test_nf4_thresholds_are_those_of_the_cuda_build():
    assert torch.equal(torch.tensor(get_format("bnb-nf4").thresholds), torch.tensor(NF4_THRESHOLDS))


def test_fp4_has_one_bucket_for_both_zeros():
    fp4 = get_format("bnb-fp4")
    zeros = [rank for rank, level in enumerate(fp4.levels) if level == 0]
    assert [fp4.codes[rank] for rank in zeros] == [0, 8]
    assert len({fp4.buckets[rank] for rank in zeros}) == 1
    assert sorted(set(fp4.buckets)) == list(range(15))


def test_group_size_in_the_name_or_beside_it():
    assert get_format("ct-int4-sym@64") == get_format("ct-int4-sym", 64) == get_format("ct-int4-sym@64", 64)
    assert str(get_format("bnb-nf4@128")) == "bnb-nf4@128"
    assert get_format("bnb-nf4@128") is get_format("bnb-nf4@128"), "its tables are reckoned once"


@pytest.mark.parametrize("format", FORMATS)
def test_registry(format):
    recipe = get_format(format)
    assert recipe.name == format == str(recipe).split("@")[0]
    assert recipe.group_size is None or recipe.group_size in recipe.legal_group_sizes
    assert all(size % 2 == 0 for size in recipe.legal_group_sizes), "a group starts with a byte of codes"
    assert sorted(recipe.codes) == list(range(16)) and len(recipe.levels) == 16
    for size in (recipe.legal_group_sizes[0], recipe.legal_group_sizes[-1]):
        assert get_format(f"{format}@{size}").group_size == size


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_the_nearest_value_is_that_of_the_rank(format, dtype):
    recipe = get_format(format)
    w = torch.cat([awkward(dtype), gaussian(8, dtype)]).view(-1)
    spoiled = w.clone()
    at = torch.arange(0, len(w), 997)
    spoiled[at] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0], dtype=dtype)[torch.arange(len(at)) % 4]
    for flat in (w, spoiled):
        size = recipe.group_size or len(flat)
        x = flat[: len(flat) // size * size].view(-1, size)
        of_tensor = recipe.fit_tensor(flat)
        for short in (False, True):
            params = recipe.params(x, short, of_tensor)
            value = recipe.value(recipe.rank(x, params, short), params)
            assert same_bits(recipe.nearest(x, params, short), value)


@pytest.mark.parametrize("format", ["bnb-nf4", "bnb-fp4", "mxfp4", "mxfp4-rceil", "gguf-mxfp4", "nvfp4"])
def test_ranks_are_those_of_bucketize(format):
    recipe = get_format(format)
    thresholds = torch.tensor(recipe.thresholds)
    near = [thresholds.nextafter(torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    beyond = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e38, -1e38, torch.inf, -torch.inf, torch.nan])
    even = torch.linspace(-1.1 * recipe.reach, 1.1 * recipe.reach, 100_003)
    position = torch.cat([thresholds, *near, beyond, even])
    expected = torch.bucketize(position, thresholds, out_int32=True)
    assert torch.equal(recipe.rank_of(position.clone()), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_and_range_of_strided_weights(layout):
    w = laid_out(weight_cases.normal(3, 5, 70), layout)
    flat = w.reshape(-1)
    for start in (0, 1, 69, 70, 71, 350, 1000):
        for stop in (start + 1, start + 70, start + 701, w.numel()):
            if start < stop <= w.numel():
                part = flat_part(w, slice(start, stop))
                assert part.is_contiguous() and torch.equal(part, flat[start:stop])
    assert torch.equal(torch.stack(tensor_range(w)), torch.stack(torch.aminmax(flat)))
    spoiled = w.clone()
    spoiled[1, 2, 3] = torch.nan
    assert torch.stack(tensor_range(laid_out(spoiled, layout))).isnan().all() or layout == "expanded"


@pytest.mark.parametrize(
    ("view", "layout"),
    [
        (lambda w: w, (None, None, None, None, None)),
        (lambda w: w[:, :1], (None, 4608, 1, None, 1152)),
        (lambda w: w[..., 128:256], (None, 384, 1, None, 128)),
        (lambda w: w[..., 0], (None, None, 384, None, None)),
        (lambda w: w[:, 1:3, :, 8:16], (4608, 384, 1, 6, 8)),
        (lambda w: w.permute(0, 1, 3, 2), (1152, 1, 384, 384, 3)),
        (lambda w: w[:1, :1, :1, ::2], (None, None, 2, None, None)),
    ],
)
def test_dimensions_of_one_stride_are_one(view, layout):
    w = view(torch.arange(2 * 4 * 3 * 384).view(2, 4, 3, 384))
    same, got = strided(w)
    assert same is w and got == layout
    if layout[2] is not None:
        stride_0, stride_1, stride_2, size_1, size_2 = got
        flat = torch.arange(w.numel())
        row, column = (flat // size_2, flat % size_2) if size_2 else (0, flat)
        outer, row = (row // size_1, row % size_1) if size_1 else (0, row)
        addresses = outer * (stride_0 or 0) + row * (stride_1 or 0) + column * stride_2
        assert torch.equal(w.storage_offset() + addresses, w.reshape(-1))


def test_more_than_three_dimensions_are_copied():
    w = torch.zeros(3, 2, 2, 1536)[..., ::2].permute(2, 1, 0, 3)
    same, layout = strided(w)
    assert same.is_contiguous() and same.shape == w.shape and layout == (None,) * 5


@pytest.mark.parametrize(
    ("format", "group_size", "says"),
    [
        ("nf4", None, f"expected one of {', '.join(FORMATS)}.*got 'nf4'"),
        ("bnb-nf4@", None, "expected a number after @.*got 'bnb-nf4@'"),
        ("bnb-nf4@-64", None, "expected a number after @"),
        ("bnb-nf4@64", 128, "expected 64.*got 128"),
        ("bnb-nf4", 48, "expected one of 32, 64, 128, 256, 512, 1024, 2048, 4096 for bnb-nf4; got 48"),
        ("ct-int4-sym", 100, "expected a multiple of 8 from 8 to 4096 for ct-int4-sym; got 100"),
        ("minmax-int4", 0, "expected a multiple of 8 from 8 to 4096 for minmax-int4; got 0"),
    ],
)
def test_what_a_format_refuses(format, group_size, says):
    with pytest.raises(ValueError, match=says) as caught:
        fake_quant(torch.zeros(128), format, group_size)
    assert "\n" not in str(caught.value)
